"""Tables and pictures from the rows of runs.

    python -m bench.report bench/results/h100.jsonl             Markdown: targets, then every case
    python -m bench.report --images docs/images FILE...         and the pictures
    python -m bench.report --update                             README's block, from all of bench/results/*.jsonl

Where no run has measured something the tables say "not measured".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean

from bench.environment import ROOT
from bench.protocol import regime
from bench.results import Row, latest, read_rows
from bench.targets import Outcome, evaluate

README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- gpu targets: begin -->", "<!-- gpu targets: end -->"


def targets_table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: what each target asks for, what was measured, and whether that is enough."""
    lines = ["| target | device | asked for | measured | state | worst of |", "| --- | --- | --- | --- | --- | --- |"]
    for outcome in outcomes:
        target = outcome.target
        unit = " of copy" if target.measure == "copy" else "x"
        sign = ">" if target.strict else ">="
        measured = "" if outcome.ratio is None else f"{outcome.ratio:.2f}{unit}"
        where = "" if outcome.ratio is None else f"{outcome.cases} cases: {outcome.where}"
        lines.append(
            f"| {target.name} | {target.device} | {sign} {target.goal:.2f}{unit} | {measured} | {outcome.state} | {where} |"
        )
    return "\n".join(lines)


def provenance(rows: Sequence[Row]) -> str:
    """One line per device: what ran where."""
    seen = dict.fromkeys(
        f"{row.device}, driver {row.driver or '-'}, torch {row.torch}, Triton {row.triton or '-'}, commit {row.commit}"
        for row in rows
    )
    return "\n".join(f"Measured on {line}." for line in seen) or "No run on a GPU has been recorded."


def summary_table(rows: Sequence[Row]) -> str:
    """Markdown: per case what quantlib takes, its share of the floor, and the best peer against it."""
    heads = ["operation", "format", "N x K", "M", "kernel", "us", "GB/s", "TFLOP/s", "of the floor", "host us", "error"]
    heads += ["best peer", "ratio"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row in rows:
        if not row.taken or row.us is None:
            continue
        best = min(row.ratios, key=lambda peer: row.ratios[peer], default=None)
        cells = [
            row.operation if row.activations is None else f"{row.operation}, x {row.activations}",
            f"`{row.format}`",
            f"{row.n} x {row.k}",
            str(row.m),
            row.contestant,
            f"{row.us:.1f}",
            f"{row.gbps:.0f}",
            f"{row.tflops:.1f}",
            "" if row.floor_measured is None else f"{row.floor_measured:.0%}",
            "" if row.host_us is None else f"{row.host_us:.0f}",
            "" if row.error is None else f"{row.error:.1e}",
            best or "",
            "" if best is None else f"{row.ratios[best]:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "No case was timed."


def regime_table(rows: Sequence[Row]) -> str:
    """Markdown: per operation, format and regime the geometric means of the share of the floor and of the best peer's ratio."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.taken and row.us is not None and row.m and row.operation != "quantize":
            groups.setdefault((row.operation, row.format, regime(row.m)), []).append(row)
    lines = ["| operation | format | regime | cases | of the floor | best peer's time over ours |", f"|{' --- |' * 6}"]
    for (operation, fmt, name), found in groups.items():
        shares = [row.floor_measured for row in found if row.floor_measured]
        leads = [min(row.ratios.values()) for row in found if row.ratios]
        share = f"{geometric_mean(shares):.0%}" if shares else ""
        lead = f"{geometric_mean(leads):.2f}" if leads else ""
        lines.append(f"| {operation} | `{fmt}` | {name} | {len(found)} | {share} | {lead} |")
    return "\n".join(lines) if groups else "No case was timed."


def failures_list(rows: Sequence[Row]) -> str:
    """Markdown: peers that were absent, and contestants that failed or were wrong."""
    lines = []
    for row in rows:
        if row.operation == "presence":
            lines.append(f"- {row.contestant} {row.version}".rstrip() + (f": {row.reason}" if row.reason else ""))
        elif row.reason is not None and row.reason.startswith(("wrong", "failed", "its weight", "device lost", "the process")):
            lines.append(f"- {row.contestant}, {row.case.label}: {row.reason}")
    return "\n".join(dict.fromkeys(lines)) or "None."


def document(rows: Sequence[Row]) -> str:
    """The whole report in Markdown."""
    return "\n\n".join(
        [
            "# Measured",
            provenance(rows),
            "## Targets",
            targets_table(evaluate(rows)),
            "## Regimes",
            regime_table(rows),
            "## Cases",
            summary_table(rows),
            "## Peers, and what failed",
            failures_list(rows),
        ]
    )


def updated(text: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """A page with the text between its markers replaced. Raises ValueError where they are not there once each, in order."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the page needs one {begin} and one {end} after it")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def readme_block(rows: Sequence[Row]) -> str:
    """What README shows: the targets, and which run measured them."""
    gpu = [row for row in rows if row.arch.startswith("sm_")]
    return f"{targets_table(evaluate(gpu))}\n\n{provenance(gpu)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print or write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Tables and pictures from result files.")
    parser.add_argument("files", nargs="*", type=Path, help="JSONL files (default: bench/results/*.jsonl)")
    parser.add_argument("--out", type=Path, help="write the Markdown here instead of printing it")
    parser.add_argument("--images", type=Path, metavar="DIR", help="write roofline.png and ratios.png")
    parser.add_argument("--update", action="store_true", help="replace the block between the markers in README.md")
    options = parser.parse_args(arguments)
    rows = latest(read_rows(options.files or sorted(RESULTS.glob("*.jsonl"))))
    if options.images is not None:
        from bench.plots import write_plots

        for path in write_plots(rows, options.images):
            print(f"wrote {path}", file=sys.stderr)
    if options.update:
        README.write_text(updated(README.read_text(), readme_block(rows)))
    elif options.out is not None:
        options.out.write_text(document(rows) + "\n")
    else:
        print(document(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
