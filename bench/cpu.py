"""quantlib on a CPU beside torch, bitsandbytes and llama.cpp: single layers, and a whole model. Only ratios of one run count.

    python -m bench.cpu                               one layer shape, and the demo model
    python -m bench.cpu --quick                       a smoke run: everything, small
    python -m bench.cpu --only layers --shapes 14336x4096,4096x4096 --m 1,16
    python -m bench.cpu --only model --rounds 3

Rows go to bench/results/cpu-*.jsonl; docs/benchmarks.md explains them, `python -m bench.cpu_report` draws them. A peer that is
not there is reported with what to install.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import llama_cpp
from bench.clock import SettledClock
from bench.contestants import taken
from bench.cpu_layers import CPU, DGRAD_MS, FORMATS, MS, SHAPE, Contest, Entry, Ours, entrants, plan
from bench.cpu_model import (
    KINDS,
    LLAMA,
    NEW_TOKENS,
    PREFILL_TOKENS,
    PROMPT_TOKENS,
    VARIANTS,
    Conversation,
    Speaker,
    Spoken,
    TorchSpeaker,
    Variant,
    llama_speakers,
    prepare,
)
from bench.cpu_settings import READ_BYTES, THREADS, describe_settings, pin, reader
from bench.environment import Environment, describe
from bench.results import Journal, Row
from bench.run import default_path, numbers, shapes, words
from quantlib.timing import NoTiming, Timing

console = Console(highlight=False, soft_wrap=True)
QUICK: dict[str, Any] = {"shapes": ((1024, 1024),), "m": (1, 16), "dgrad_m": (64,), "rounds": 3}
QUICK |= {"new_tokens": 8, "prefill": 64, "read_mb": 64}


def load_model() -> Any:
    """The demo model in fp32. Raises QuantlibError where a package is missing."""
    from quantlib.integrations.demo_model import load_demo_model

    return load_demo_model()[0]


def main(arguments: Sequence[str] | None = None, load: Callable[[], Any] = load_model) -> int:
    """Run; returns the exit code: 0 where something was timed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args(arguments)
    pin(options.threads)
    environment, settings = describe(CPU), describe_settings()
    environment = replace(environment, device=settings["chip"])
    path = options.out or default_path(f"cpu {settings['chip']}")
    with closing(Journal(path)) as journal, torch.inference_mode():
        run = Run(journal, environment, settings)
        console.print(f"{', '.join(f'{name} {value}' for name, value in settings.items())}; rows go to {path}")
        if options.only != "model":
            run.layers(options)
        if options.only != "layers":
            run.model(options, load)
        timed = sum(row.us is not None for row in journal.rows)
        console.print(f"{timed} of {len(journal.rows)} rows have a time: {path}")
    return 0 if timed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description="quantlib and its peers on a CPU.")
    parser.add_argument("--quick", action="store_true", help="small shapes and few tokens; other options still count")
    parser.add_argument("--only", choices=("layers", "model"), help="one half of the run")
    parser.add_argument("--threads", type=int, default=THREADS, help="of everyone; the process is kept on as many CPUs")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each contestant")
    parser.add_argument("--formats", type=words, default=FORMATS, help="of layers: int4-g128,nf4")
    parser.add_argument("--shapes", type=shapes, default=(SHAPE,), help="of layers, NxK: 14336x4096,4096x4096")
    parser.add_argument("--m", type=numbers, default=MS, help="batch sizes of y = x W^T")
    parser.add_argument("--dgrad-m", type=numbers, default=DGRAD_MS, help="batch sizes of dX")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="of the model: those whose name begins so")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--prefill", type=int, default=PREFILL_TOKENS, help="tokens of the long prompt")
    parser.add_argument("--read-mb", type=int, default=READ_BYTES >> 20, help="of the buffer for the read bandwidth")
    parser.add_argument("--out", type=Path, help="JSONL (default: bench/results/cpu-CHIP-DATE.jsonl)")
    return parser


class Run:
    """Measures and writes rows."""

    def __init__(self, journal: Journal, environment: Environment, settings: dict[str, str]) -> None:
        self.journal, self.environment, self.settings = journal, environment, settings

    def layers(self, options: argparse.Namespace) -> None:
        """Every case of the plan."""
        contest = Contest(SettledClock(options.rounds), entrants(options.formats), _say, read_bytes=options.read_mb << 20)
        for group in plan(options.shapes, options.m, options.dgrad_m):
            for entries, read in contest.run(group):
                self._write_layers(entries, read)

    def _write_layers(self, entries: Sequence[Entry], read: float | None) -> None:
        medians = {entry.entrant.name: entry.timing.median for entry in entries if isinstance(entry.timing, Timing)}
        peers = {entry.entrant.name for entry in entries if entry.entrant.contestant.backend == "peer"}
        order = sorted(medians, key=medians.__getitem__)
        first = entries[0].case
        times = "  ".join(f"{name} {medians[name]:.0f} us" for name in order)
        console.print(f"{first.operation} {first.n}x{first.k} M={first.m}: {times}")
        for entry in entries:
            contestant, case, verdict = entry.entrant.contestant, entry.case, entry.verdict
            ours, name = contestant.backend != "peer", entry.entrant.name
            activations = contestant.activations if isinstance(contestant, Ours) else None
            case = replace(case, activations=activations)
            fields = self._times(entry.timing)
            if name in medians and entry.nbytes:
                fields |= {"gbps": entry.nbytes / medians[name] / 1e3, "tflops": case.flops / medians[name] / 1e6}
            if ours and name in medians:
                fields["ratios"] = {peer: medians[peer] / medians[name] for peer in sorted(peers & medians.keys())}
            if verdict is not None:
                fields |= {
                    "error": _finite(verdict.error),
                    "limit": verdict.limit,
                    "weight_error": _finite(verdict.weight_error),
                }
            self._write(
                operation=case.operation,
                format=case.format,
                n=case.n,
                k=case.k,
                m=case.m,
                contestant=(taken(case, CPU) or "none") if ours else name,
                activations=activations,
                backend=contestant.backend,
                version=contestant.version(),
                layout=entry.layout,
                taken=ours,
                nbytes=entry.nbytes,
                read_gbps=read,
                **fields,
            )

    def model(self, options: argparse.Namespace, load: Callable[[], Any]) -> None:
        """Every variant of the demo model, and llama.cpp's."""
        _say("loading the demo model")
        model = load()
        # Nothing ends a text before its length is reached.
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
        talk = Conversation.random(model.config.vocab_size, PROMPT_TOKENS, options.new_tokens, options.prefill, options.rounds)
        missing = llama_cpp.absent()
        with ExitStack() as stack:
            speakers: dict[str, Speaker] = {}
            if missing is None:
                room = max(options.prefill, PROMPT_TOKENS + options.new_tokens)
                speakers |= stack.enter_context(llama_speakers(model, KINDS, talk.prompt, room, _say))
            for variant in chosen_variants(options.variants):
                _say(f"preparing {variant.name}")
                speakers[variant.name] = prepare(model, variant)
            original = TorchSpeaker(model).prefill(talk.long_prompt)
            _say(f"{options.rounds} rounds of {len(speakers)} models")
            found, reads = talk.hold(speakers, original, reader(options.read_mb << 20))
        if missing is not None:
            console.print(f"{LLAMA.strip()}: {missing}")
            found += [Spoken(LLAMA + kind, "generate", 0, NoTiming(missing)) for kind in KINDS]
        read = (options.read_mb << 20) / reads[0].median / 1e3 if reads else None
        self._write_model(found, read)

    def _write_model(self, found: Sequence[Spoken], read: float | None) -> None:
        medians = {(each.operation, each.name): each.timing.median for each in found if isinstance(each.timing, Timing)}
        for each in found:
            own = medians.get((each.operation, each.name))
            peer = not each.name.startswith("quantlib")
            ratios = {
                name: median / own
                for (operation, name), median in medians.items()
                if own and not peer and operation == each.operation and not name.startswith("quantlib")
            }
            theirs = llama_cpp.installed() if each.name.startswith(LLAMA) else self.environment.torch
            if own:
                console.print(f"{each.operation} {each.name}: {1e6 / own:.1f} tokens/s")
            self._write(
                operation=each.operation,
                format=each.matrices,
                n=0,
                k=0,
                m=each.tokens,
                contestant=each.name,
                backend="peer" if peer else "cpu",
                version=theirs if peer else self.environment.quantlib,
                nbytes=each.nbytes,
                error=_finite(each.error),
                read_gbps=read,
                ratios=ratios,
                **self._times(each.timing),
            )

    def _times(self, timing: Timing | NoTiming) -> dict[str, Any]:
        if isinstance(timing, NoTiming):
            return {"reason": timing.reason}
        return {"clock": timing.clock, "us": timing.median, "us_q25": timing.q25, "us_q75": timing.q75}

    def _write(self, **fields: Any) -> None:
        self.journal.add(Row(**(asdict(self.environment) | {"activations": None, "settings": self.settings} | fields)))


def chosen_variants(beginnings: Sequence[str] | None) -> list[Variant]:
    """Those whose name begins with one of the words; all where there are none."""
    return [variant for variant in VARIANTS if beginnings is None or variant.name.startswith(tuple(beginnings))]


def _finite(value: float | None) -> float | None:
    return value if value is not None and value - value == 0 else None


def _say(line: str) -> None:
    console.print(f"[dim]{line}[/dim]")


if __name__ == "__main__":
    sys.exit(main())
