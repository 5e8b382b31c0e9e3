"""Check what nvcc made of the CUDA kernels, without a GPU: tensor-core instructions, registers and spills on every target.

    python -m bench.cuda_static             check quantlib._cuda, compare with the committed table; 1 where they differ
    python -m bench.cuda_static --update    check, write this nvcc's table and docs/cuda-table.md

The module that is installed is what is read: machine code and PTX from the module itself, spills as ptxas reported them at the
build.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from bench.cuda_read import Table, read_module
from bench.cuda_table import differences, read_tables, write_tables
from quantlib.kernels import cuda_module


@dataclass(frozen=True)
class Intent:
    """What kernels are meant to multiply with: `sass` and `ptx` begin the instructions' names; none are meant where both are
    empty. `source` and `kernel` are patterns."""

    source: str
    sass: str = ""
    ptx: str = ""
    kernel: str = "*"


INTENTS = (
    Intent("common/*"),
    Intent("sm80/*", sass="HMMA.16816", ptx="mma.sync.aligned.m16n8k16"),
    Intent("sm90/scaled_fp8*", sass="QGMMA.64x"),
    Intent("sm90/*", sass="HGMMA.64x"),
    Intent("sm100/*fp4*", sass="UTCOMMA"),
    Intent("sm100/*", sass="UTCQMMA"),
    Intent("sm120/*fp4*", sass="OMMA.SF"),
    Intent("sm120/*", sass="QMMA.SF"),
)
"""The first that fits counts."""


def intent_of(source: str, kernel: str) -> Intent:
    """What a kernel is meant to multiply with."""
    return next(intent for intent in INTENTS if fnmatch(source, intent.source) and fnmatch(kernel, intent.kernel))


def notes_of(kernels: Iterable[dict[str, Any]]) -> list[str]:
    """What ptxas advised at the build."""
    return [
        f"{kernel['source']} {kernel['name']} {target}: {note}"
        for kernel in kernels
        for target, usage in kernel["targets"].items()
        for note in usage["notes"]
    ]


def faults(table: Table) -> list[str]:
    """What is wrong with a table, in words."""
    found = []
    for source, kernels in table.items():
        for kernel, rows in kernels.items():
            intent = intent_of(source, kernel)
            for target, row in rows.items():
                where = f"{source} {kernel} {target}"
                wanted = intent.ptx if target.startswith("compute_") else intent.sass
                if wanted and not any(name.startswith(wanted) for name in row.instructions):
                    multiplies = ", ".join(row.instructions) or "no tensor core"
                    found.append(f"{where}: multiplies by {multiplies}, {wanted} was intended")
                if row.spills:
                    found.append(f"{where}: spills {row.spills} bytes")
                if row.stack:
                    found.append(f"{where}: keeps {row.stack} bytes on the stack")
    return found


def main() -> int:
    """Run the check; 0 where nothing is wrong and nothing differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_static", description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the table instead of comparing with it")
    options = parser.parse_args()
    reason = cuda_module.unavailable()
    if reason is not None:
        print(reason)
        return 1
    module, known, tables = cuda_module.module(), cuda_module.facts(), read_tables()
    version = known["nvcc"]
    table = read_module(Path(module.__file__), known["kernels"])
    wrong = faults(table)
    if options.update:
        missing = {**known["left_out"], **dict.fromkeys(known["not_asked_for"], "QUANTLIB_CUDA_ARCHS")}
        wrong += [
            f"the build lacks {family} ({why.splitlines()[0]}); the table is a whole one's" for family, why in missing.items()
        ]
        if not wrong:
            write_tables({**tables, version: table})
    elif version in tables:
        wrong += differences(table, tables[version])
    else:
        others = ", ".join(sorted(tables)) or "none"
        print(f"the committed tables are of nvcc {others}: with {version} only faults are looked for")
    print("\n".join([*wrong, *notes_of(known["kernels"])]))
    rows = sum(len(rows) for kernels in table.values() for rows in kernels.values())
    print(f"nvcc {version}: {sum(map(len, table.values()))} kernels, {rows} with their targets, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
