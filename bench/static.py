"""Compile every Triton kernel for every architecture, without a GPU, and read the machine code.

    python -m bench.static                  check, compare with bench/results/compile-table.json; 1 where they differ
    python -m bench.static --update         check, write this Triton's table and docs/compile-table.md
    python -m bench.static --sample 6       every sixth case, where a whole check has seen the same sources; else all
    python -m bench.static --only skinny    print what matches (--only, --format, --arch, --dtype, -m), compare with nothing
    python -m bench.static --only skinny --format nvfp4 --arch 90 --sass      and the main loop, instruction by instruction

Arguments, constexprs and options are those of a real launch: the kernels' own launchers build them, from tensors on the `meta`
device, and Triton's own specialization reads them. docs/static-analysis.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from bench.static_cases import ARCHS, Case
from bench.static_chips import CHIPS
from bench.static_compile import Compiled, Job, Row, compile_jobs
from bench.static_decode import Decode
from bench.static_families import FAMILIES, family_of, intended, sweep_cases
from bench.static_table import (
    Table,
    compiled_sources,
    details,
    differences,
    read_tables,
    sources_digest,
    write_sources,
    write_tables,
)
from quantlib.formats import get_format
from quantlib.formats.packing import planes
from quantlib.kernels import triton_launch

WORKERS = 2
FEW = 4
"""Cases up to which starting worker processes takes longer than it saves."""

CHUNK = 16
"""Cases that one process compiles and then disassembles together."""

STYLES = {
    "decode": "bold yellow",
    "load w": "bold green",
    "use": "bold red",
    "load": "green",
    "store": "green",
    "acc": "magenta",
    "x": "cyan",
    "scale": "blue",
}
"""Role of an instruction -> how it is shown; the others are dim."""


def _load(case: Case, loads: tuple[int, int]) -> int:
    """Bytes of the narrowest load of codes; of the widest where codes lie in several planes, the upper ones of fewer bits."""
    widest, narrowest = loads
    return narrowest if len(planes(get_format(case.format).codec.bits)) == 1 else widest


def faults(arch: int, case: Case, row: Row, version: str) -> list[str]:
    """What is wrong with a case that a version of Triton compiled, in words."""
    family, chip = family_of(case), CHIPS[arch]
    found = []
    wanted = intended(family, arch, case, version)
    if not row.instruction.startswith(wanted):
        found.append(f"multiplies by {row.instruction}, {wanted} was intended")
    if row.local:
        found.append(f"uses local memory ({row.local})")
    if row.shared > chip.shared_cta:
        found.append(f"needs {row.shared} bytes of shared memory, the chip has {chip.shared_cta}")
    if row.fused:
        found.append(f"decodes with {row.fused} fused multiply-adds")
    if row.loads is not None and _load(case, row.loads) < family.min_load:
        found.append(f"loads codes by {_load(case, row.loads)} bytes, {family.min_load} were intended")
    limit = family.limit(arch, case)
    if limit is not None and row.decode is not None and row.decode > limit:
        found.append(f"decodes with {row.decode} instructions per weight, the limit is {limit}")
    return [f"sm_{arch} {case.name}: {fault}" for fault in found]


def triton_version() -> str:
    """The installed Triton's version."""
    import triton

    return str(triton.__version__)


def _unread(result: Compiled, machine_code: bool) -> list[str]:
    """Faults of what could not be compiled, or not be counted though its machine code was asked for."""
    if result.row is None or (machine_code and result.reason is not None):
        found = [result.reason]
    else:
        found = list(result.decode.doubts) if result.decode is not None else []
    return [f"sm_{result.arch} {result.case.name}: {fault}" for fault in found]


def _work(jobs: list[Job]) -> list[Compiled]:
    torch.set_num_threads(1)
    return compile_jobs(jobs)


def _results(jobs: list[Job]) -> Iterator[Compiled]:
    """The jobs' results in their order, by processes of their own where there are many."""
    if len(jobs) <= FEW:
        yield from compile_jobs(jobs)
        return
    chunks = [jobs[start : start + CHUNK] for start in range(0, len(jobs), CHUNK)]
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        for results in pool.map(_work, chunks):
            yield from results


def table_jobs() -> list[Job]:
    """Every case of the table, once."""
    found: dict[tuple[int, Case], Job] = {}
    for arch in ARCHS:
        for family in FAMILIES.values():
            for case, sweep in sweep_cases(arch, family):
                found.setdefault((arch, case), Job(arch, case, sweep.machine_code))
    return list(found.values())


def compile_all(jobs: list[Job]) -> tuple[Table, list[str]]:
    """Every job's row, and what is wrong."""
    table: Table = {f"sm_{arch}": {} for arch in ARCHS}
    wrong: list[str] = []
    for job, result in zip(jobs, _results(jobs), strict=True):
        wrong += _unread(result, job.machine_code)
        if result.row is not None:
            table[f"sm_{job.arch}"][job.case.name] = result.row
            wrong += faults(job.arch, job.case, result.row, triton_version())
    return table, wrong


# Looking at few cases.


def selected(options: argparse.Namespace) -> list[Job]:
    """The cases that the filters leave."""
    return list(
        dict.fromkeys(
            Job(arch, case, True)
            for name, family in FAMILIES.items()
            if not options.only or name.startswith(options.only)
            for arch in ARCHS
            if not options.arch or arch == options.arch
            for case, _ in sweep_cases(arch, family)
            if case.format.startswith(options.format or "")
            and case.dtype.startswith(options.dtype or "")
            and options.m in (None, case.m)
        )
    )


def show(console: Console, result: Compiled, sass: bool) -> list[str]:
    """Print one case; returns its faults."""
    heading = f"[bold]sm_{result.arch} {result.case.name}[/]"
    if result.row is None:
        console.print(f"{heading}  [red]{result.reason}[/]", highlight=False)
        return _unread(result, True)
    row = result.row
    if result.decode is not None and sass:
        _show_loop(console, result.decode)
    cells = details(result.arch, result.case, row)
    grid = Grid(box=None, pad_edge=False, header_style="dim")
    names = ("registers", "shared", "CTAs/SM", "CTAs", "waves", "load", "decode", "loop", "limit", "predicted µs", "floor µs")
    for name in names:
        grid.add_column(name, justify="right")
    grid.add_row(*cells)
    console.print(f"{heading}  {row.instruction}", highlight=False)
    console.print(grid)
    if result.decode is not None:
        _show_counts(console, result.decode)
    wrong = faults(result.arch, result.case, row, triton_version())
    doubts = [result.reason] if result.reason else list(result.decode.doubts) if result.decode else []
    for line in (*doubts, *wrong):
        console.print(f"[red]{line}[/]", highlight=False)
    return wrong + _unread(result, True)


def _show_loop(console: Console, decode: Decode) -> None:
    for found in decode.body:
        role = decode.roles[found.address]
        console.print(
            Text(f"{found.address:05x}  {role:8} {found.text}", style=STYLES.get(role, "dim"), no_wrap=True), soft_wrap=True
        )


def _show_counts(console: Console, decode: Decode) -> None:
    roles: dict[str, int] = {}
    for role in decode.roles.values():
        roles[role] = roles.get(role, 0) + 1
    listed = "  ".join(f"{role} {count}" for role, count in sorted(roles.items(), key=lambda pair: -pair[1]))
    opcodes = "  ".join(f"{name} {count}" for name, count in decode.opcodes.most_common())
    each = decode.weights / decode.threads
    console.print(f"  loop of {decode.total} instructions, {decode.weights:.0f} weights a CTA, {each:g} a thread: {listed}")
    console.print(f"  decode: {opcodes}")


def main() -> int:
    """Run the check; 0 where nothing is wrong and nothing differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the table instead of comparing with it")
    parser.add_argument("--sample", type=int, default=1, help="compile one case of so many where no source has changed")
    parser.add_argument("--only", help="kernels whose names begin so")
    parser.add_argument("--format", help="formats whose names begin so")
    parser.add_argument("--dtype", help="dtypes of activations whose names begin so")
    parser.add_argument("--arch", type=int, choices=ARCHS)
    parser.add_argument("-m", type=int, help="rows of x")
    parser.add_argument("--sass", action="store_true", help="print the main loops")
    options = parser.parse_args()
    # The interpreter would replace the very functions that are to be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    failure = triton_launch.import_failure()
    if failure is not None:
        print(failure)
        return 1
    filtered = any((options.only, options.format, options.dtype, options.arch, options.sass, options.m is not None))
    if filtered and options.update:
        parser.error("--update writes the whole table: it goes with no filter")
    if filtered:
        console = Console(width=None if sys.stdout.isatty() else 140)
        return 1 if [fault for result in _results(selected(options)) for fault in show(console, result, options.sass)] else 0
    if options.sample < 1 or (options.update and options.sample > 1):
        parser.error("--sample is a whole number, and goes without --update")
    return _check(options.update, options.sample)


def sampled(jobs: list[Job], every: int) -> list[Job]:
    """One job of so many, spread over kernels and architectures: the first of each pair of them, and every such one on."""
    kept, seen = [], dict[tuple[int, str], int]()
    for job in jobs:
        number = seen.get((job.arch, job.case.kernel), 0)
        seen[job.arch, job.case.kernel] = number + 1
        if number % every == 0:
            kept.append(job)
    return kept


def _check(update: bool, every: int) -> int:
    version = triton_version()
    unchanged = compiled_sources().get(version) == sources_digest()
    part = every > 1 and unchanged
    jobs = table_jobs()
    table, wrong = compile_all(sampled(jobs, every) if part else jobs)
    tables = read_tables()
    if not wrong and update:
        write_tables({**tables, version: table})
    elif not update:
        wrong += differences(version, table, tables, part)
    if not wrong and every == 1 and version in read_tables():
        write_sources(version)
    print("\n".join(wrong))
    rows = sum(map(len, table.values()))
    print(f"Triton {version}: {rows} kernels compiled for {len(table)} architectures, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
