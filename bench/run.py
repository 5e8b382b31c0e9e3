"""Time quantlib's kernels and their peers side by side.

    python -m bench.run --quick --time-budget 300           what the targets ask for, most important first
    python -m bench.run --full --out bench/results/h100.jsonl
    python -m bench.run --formats nf4 --shapes 8192x8192 --m 1,16 --peers none
    python -m bench.run --tiny                              a few seconds, on any machine

Each row is one contestant on one case; docs/benchmarks.md explains the fields. A run into a file that exists goes on where
that file ends. Exit codes: 0 done; 1 nothing could be measured; 3 the device was lost (run again: the culprit is left out).
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console

from bench import ceilings
from bench.clock import DoBenchClock, HostClock, RecordedClock
from bench.environment import ROOT, describe
from bench.guard import DeviceLostError
from bench.peers import Peer, list_peers
from bench.protocol import MS, PLANS, Block, Case, Shape, cases_of
from bench.results import Journal
from bench.session import Clocks, Session
from quantlib.timing import COLD_BYTES, Clock, GraphClock, WallClock, clock_for

DEVICE_LOST = 3
console = Console(highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if str(device) == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    cases = chosen_cases(options)
    environment = describe(device)
    clocks = chosen_clocks(options.clock, device)
    with closing(Journal(options.out or default_path(environment.device))) as journal, torch.no_grad():
        console.print(f"{environment.device}: {len(cases)} cases, rows go to {journal.path}")
        found = ceilings.measure(clocks.main, device)
        console.print(f"copy {_shown(found.copy_gbps)} GB/s, bf16 product {_shown(found.matmul_tflops)} TFLOP/s")
        session = Session(
            journal=journal,
            environment=environment,
            clocks=clocks,
            ceilings=found,
            peers=chosen_peers(options.peers),
            device=device,
            kernels=set(options.kernels.split(",")) if options.kernels else None,
            seconds=options.time_budget,
            patience_s=options.patience,
            cold_bytes=options.cold_mb << 20,
            say=_progress(len(cases)),
        )
        try:
            left_out = session.run(cases)
        except DeviceLostError as error:
            console.print(f"[red]the device was lost[/red]: {error}; run again to go on without the culprit")
            return DEVICE_LOST
    if left_out:
        console.print(f"the time budget left out {left_out} of {len(cases)} cases")
    timed = sum(row.us is not None for row in journal.rows)
    console.print(f"{timed} of {len(journal.rows)} rows have a time: {journal.path}")
    return 0 if timed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Time quantlib's kernels and their peers.")
    plan = parser.add_mutually_exclusive_group()
    for name in PLANS:
        plan.add_argument(f"--{name}", dest="plan", action="store_const", const=name, help="a plan of bench/protocol.py")
    parser.add_argument("--formats", type=words, help="only these formats: int4-g128,nf4")
    parser.add_argument("--shapes", type=shapes, help="only these weights NxK: 8192x8192,28672x4096")
    parser.add_argument("--m", type=numbers, help="only these batch sizes: 1,16,4096")
    parser.add_argument("--operation", type=words, help="only these: linear,dgrad,dequantize,quantize")
    parser.add_argument("--activations", help="with --formats and --shapes: what x is rounded to")
    parser.add_argument("--kernels", help="only these kernels of quantlib's, by name")
    parser.add_argument("--peers", default="all", help="all, none, or names: " + ", ".join(peer.name for peer in list_peers()))
    parser.add_argument("--out", type=Path, help="JSONL (default: bench/results/DEVICE-DATE.jsonl)")
    parser.add_argument("--clock", default="auto", help="auto, graph, do_bench, wall, or recorded:FILE")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: a GPU where there is one)")
    parser.add_argument("--time-budget", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--patience", type=float, default=25.0, metavar="SECONDS", help="for one contestant to get ready")
    parser.add_argument("--cold-mb", type=int, default=COLD_BYTES >> 20, help="copies of a weight that are rotated, MB")
    parser.set_defaults(plan=None)
    return parser


def words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in words(text))


def shapes(text: str) -> tuple[Shape, ...]:
    pairs = [tuple(int(side) for side in word.split("x")) for word in words(text)]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of NxK")
    return tuple((n, k) for n, k in pairs)


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """A plan's cases where one is named, filtered by the other options; else the product of formats and shapes."""
    if options.plan is None and options.formats and options.shapes:
        blocks = [
            Block(options.formats, options.shapes, options.m or MS, operation, options.activations)
            for operation in options.operation or ("linear",)
        ]
        return cases_of(tuple(blocks))
    return [
        case
        for case in cases_of(PLANS[options.plan or "quick"])
        if (not options.formats or case.format in options.formats)
        and (not options.shapes or (case.n, case.k) in options.shapes)
        and (not options.m or case.m in options.m)
        and (not options.operation or case.operation in options.operation)
    ]


def chosen_clocks(name: str, device: torch.device) -> Clocks:
    """The clocks that a name and the device mean."""
    if name.startswith("recorded:"):
        return Clocks(RecordedClock.load(Path(name.removeprefix("recorded:"))))
    if name == "auto":
        cuda = device.type == "cuda"
        return Clocks(clock_for(device), DoBenchClock() if cuda else None, HostClock() if cuda else None)
    known: dict[str, type[Clock]] = {"graph": GraphClock, "do_bench": DoBenchClock, "wall": WallClock}
    if name not in known:
        raise SystemExit(f"--clock {name!r} is unknown; expected auto, {', '.join(known)} or recorded:FILE")
    return Clocks(known[name]())


def chosen_peers(text: str) -> list[Peer]:
    """Peers by name, all, or none."""
    peers = {peer.name: peer for peer in list_peers()}
    if text == "all":
        return list(peers.values())
    names = () if text == "none" else words(text)
    unknown = [name for name in names if name not in peers]
    if unknown:
        raise SystemExit(f"--peers {', '.join(unknown)}: unknown; known: all, none, {', '.join(peers)}")
    return [peers[name] for name in names]


def default_path(device: str) -> Path:
    """bench/results/DEVICE-DATE.jsonl."""
    slug = "-".join(device.lower().split()) or "unknown"
    return ROOT / "bench" / "results" / f"{slug}-{datetime.now(UTC):%Y%m%d-%H%M}.jsonl"


def _progress(total: int) -> Callable[[str], None]:
    count = iter(range(1, total + 1))
    return lambda line: console.print(f"[dim]{next(count, total)}/{total}[/dim] {line}")


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    # Being ended politely is no crash: the journal is closed, and nothing that was running is blamed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
