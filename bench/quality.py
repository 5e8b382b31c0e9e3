"""Quality of algorithms on the demo model: perplexity and KL by format, algorithm and seed; docs/quality.md's table of them.

    python -m bench.quality                          rows that bench/results/quality/demo.jsonl lacks; hours, may be stopped
    python -m bench.quality --only nvfp4 --seeds 1   rows whose format begins so; of the seeds the first
    python -m bench.quality --algorithm gptq         rows whose algorithm begins so, tuned or not
    python -m bench.quality --update                 no run: write the table into docs/quality.md

A row is of one seed; what no sample of text can change, and text of another kind, are run with the first alone. Text that
calibrates ("topics": pydoc's, without its first quarter; "docstrings": the standard library's) is never scored (the first
16 windows of 512 tokens of pydoc's topics, protocol A).
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import quantlib
from bench.report import updated
from quantlib.evaluation import ReferenceLogits, capture_reference, default_text, evaluate, make_windows
from quantlib.integrations.demo_model import load_demo_model
from quantlib.running import structural_copy

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "quality" / "demo.jsonl"
PAGE = ROOT / "docs" / "quality.md"
BEGIN, END = "<!-- calibrated: begin -->", "<!-- calibrated: end -->"
WINDOW, WINDOWS, SAMPLES, LENGTH = 512, 16, 128, 512


@dataclass(frozen=True)
class Case:
    """A format, what quantizes to it, the text that calibrates ("" for none), and whether scales are tuned afterwards."""

    spec: str
    algorithm: str
    text: str = ""
    tuned: bool = False

    @property
    def name(self) -> str:
        return f"{self.algorithm} + tune_scales" if self.tuned else self.algorithm


def _cases() -> Iterator[Case]:
    for spec in ("int4-g64", "nvfp4", "nf4", "mxfp4"):
        yield Case(spec, "rtn")
        yield Case(spec, "rtn-mse")
        yield Case(spec, "rtn-importance", "topics")
        yield Case(spec, "gptq", "topics")
        if spec != "mxfp4":
            yield Case(spec, "gptq", "topics", tuned=True)
        if spec == "int4-g64":
            yield Case(spec, "rtn-importance", "docstrings")
            yield Case(spec, "gptq", "docstrings")
            yield Case(spec, "awq", "topics")
            yield Case(spec, "autoround", "topics")
    for spec in ("q4_k", "q4_0", "q5_0"):
        yield Case(spec, "rtn-mse")
        yield Case(spec, "rtn-importance", "topics")


CASES = tuple(_cases())


@dataclass(frozen=True)
class Row:
    """One case with one seed, as measured."""

    spec: str
    algorithm: str
    text: str
    tuned: bool
    seed: int
    perplexity: float
    original: float
    kl: float
    top1: float
    digest: str
    bits_per_weight: float
    seconds: float

    @property
    def case(self) -> Case:
        return Case(self.spec, self.algorithm, self.text, self.tuned)


def docstrings() -> str:
    """Every docstring of the standard library's modules, in the order of their paths, joined by a blank line."""
    found = []
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("**/*.py")):
        if {"site-packages", "test", "tests", "idlelib", "pydoc_data"} & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
        found += [text for node in nodes if (text := ast.get_docstring(node))]
    return "\n\n".join(found)


def read_rows() -> list[Row]:
    """Every committed row."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [Row(**json.loads(line)) for line in lines]


@dataclass(frozen=True)
class Quantized:
    """A case's model before scales are tuned."""

    case: Case
    seed: int
    model: Any
    tokens: torch.Tensor | None
    bits_per_weight: float
    seconds: float


def quantized(case: Case, seed: int, model: Any, tokenizer: Any) -> Quantized:
    """Quantize a copy as the case says, without tuning."""
    copy, started = structural_copy(model), time.perf_counter()
    tokens = None
    if case.text:
        text = None if case.text == "topics" else docstrings()
        tokens = quantlib.calibration_tokens(text, tokenizer, samples=SAMPLES, length=LENGTH, seed=seed)
    report = quantlib.patch(copy, case.spec, algorithm=case.algorithm, calibration=tokens, progress=False)
    return Quantized(replace(case, tuned=False), seed, copy, tokens, report.bits_per_weight, time.perf_counter() - started)


def scored(case: Case, found: Quantized, model: Any, reference: ReferenceLogits) -> Row:
    """The row of a quantized model, its scales tuned (in place) where the case says so."""
    assert reference.evaluation is not None
    seconds = found.seconds
    if case.tuned:
        assert found.tokens is not None
        tuning = quantlib.tune_scales(found.model, model, found.tokens)
        print(tuning, flush=True)
        seconds += tuning.seconds
    score = evaluate(found.model, reference.windows, reference=reference, progress=False)
    assert score.divergence is not None
    original = reference.evaluation.perplexity
    scores = score.perplexity, original, score.divergence.kl, score.divergence.top1, score.digest
    return Row(case.spec, case.algorithm, case.text, case.tuned, found.seed, *scores, found.bits_per_weight, seconds)


def run_missing(only: str, algorithm: str, seeds: range) -> None:
    """Run and append what the results lack. A tuned case goes on with the model of the same case untuned, run just before."""
    known = {(row.case, row.seed) for row in read_rows()}
    wanted = [
        (case, seed)
        for seed in seeds
        for case in CASES
        if case.spec.startswith(only) and case.name.startswith(algorithm) and (not seed or case.text == "topics")
    ]
    missing = [one for one in wanted if one not in known]
    print(f"{len(missing)} of {len(wanted)} rows to run")
    model, tokenizer = load_demo_model()
    cut = make_windows(default_text(), tokenizer, protocol="A", window=WINDOW, windows=WINDOWS)
    last: Quantized | None = None
    with capture_reference(model, cut, progress=False) as reference:
        for case, seed in missing:
            torch.manual_seed(seed)
            if last is None or (last.case, last.seed) != (replace(case, tuned=False), seed):
                last = quantized(case, seed, model, tokenizer)
            row = scored(case, last, model, reference)
            with RESULTS.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
            print(
                f"{case.spec} {case.name} {case.text} seed {seed}: {row.perplexity:.3f}, KL {row.kl:.4f}, {row.seconds:.0f} s",
                flush=True,
            )


def table(rows: list[Row]) -> list[str]:
    """Markdown: means over seeds, how far the seeds lie apart, and the share of rounding to nearest's loss that is won back."""
    head = ("format", "algorithm", "text", "seeds", "perplexity", "KL", "top-1", "closed")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    worst = {row.spec: row.perplexity for row in rows if row.algorithm == "rtn"}
    for case in CASES:
        found = [row for row in rows if row.case == case]
        if not found:
            continue
        perplexity, kl = [row.perplexity for row in found], [row.kl for row in found]
        original, top1 = found[0].original, statistics.fmean(row.top1 for row in found)
        spread = f" ± {(max(perplexity) - min(perplexity)) / 2:.3f}" if len(found) > 1 else ""
        closed = ""
        if case.spec in worst and case.algorithm != "rtn":
            share = (worst[case.spec] - statistics.fmean(perplexity)) / (worst[case.spec] - original)
            closed = f"{share:.0%}"
        cells = (f"`{case.spec}`", case.name, case.text or "-", str(len(found)), f"{statistics.fmean(perplexity):.3f}{spread}")
        lines.append("| " + " | ".join((*cells, f"{statistics.fmean(kl):.4f}", f"{top1:.1%}", closed)) + " |")
    return lines


def update() -> None:
    """Write the table between its marks in docs/quality.md."""
    PAGE.write_text(updated(PAGE.read_text(), "\n".join(table(read_rows())), BEGIN, END))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="formats whose names begin so")
    parser.add_argument("--algorithm", default="", help="algorithms whose names begin so")
    parser.add_argument("--seeds", type=int, default=3, help="so many, from the first")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--update", action="store_true", help="write docs/quality.md's table")
    options = parser.parse_args()
    if options.update:
        update()
    else:
        run_missing(options.only, options.algorithm, range(options.first_seed, options.seeds))


if __name__ == "__main__":
    main()
