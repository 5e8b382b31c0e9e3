"""The committed table of what kernels compile to: reading, writing, comparing, and the page made from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.static_cases import ARCHS, Case, K, N, version_number
from bench.static_chips import CHIPS
from bench.static_compile import Row
from bench.static_families import FAMILIES, cases, family_of
from bench.static_model import Prediction, predict

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "results" / "compile-table.json"
SOURCES = ROOT / "bench" / "results" / "compile-sources.json"
PAGE = ROOT / "docs" / "compile-table.md"

READ = ("triton_kernels/**/*.py", "quantlib/layouts/*.py", "quantlib/formats/*.py", "quantlib/kernels/[!c]*.py",
        "quantlib/kernels/costs.py", "bench/static*.py", "bench/sass.py")  # fmt: skip
"""Files that a row can depend on; kernels in cpu_*.py and cuda_*.py are no Triton kernels."""

Table = dict[str, dict[str, Row]]
"""sm_<arch> -> case name -> row."""


def sources_digest() -> str:
    """16 hex digits over every file of READ: while they stay as they were, so do the rows."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in READ for path in ROOT.glob(pattern)):
        found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def compiled_sources() -> dict[str, str]:
    """Triton version -> digest of the sources that its committed table was last compared with as a whole."""
    return dict(json.loads(SOURCES.read_text())) if SOURCES.exists() else {}


def write_sources(version: str) -> None:
    """Note that this version's table is what the present sources compile to."""
    known = compiled_sources() | {version: sources_digest()}
    SOURCES.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


def _row(stored: dict[str, Any]) -> Row:
    loads = stored["loads"]
    return Row(**{**stored, "loads": tuple(loads) if loads else None})


def read_tables() -> dict[str, Table]:
    """The committed tables by Triton version."""
    if not TABLE.exists():
        return {}
    stored = json.loads(TABLE.read_text())
    return {
        version: {arch: {name: _row(row) for name, row in rows.items()} for arch, rows in table.items()}
        for version, table in stored.items()
    }


def write_tables(tables: dict[str, Table]) -> None:
    """Write the machine-readable table, one row a line, and the page."""
    versions = []
    for version, table in sorted(tables.items()):
        archs = []
        for arch, rows in table.items():
            lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(asdict(row))}" for name, row in rows.items())
            archs.append(f"  {json.dumps(arch)}: {{\n{lines}\n  }}")
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(archs) + "\n }")
    TABLE.write_text("{\n" + ",\n".join(versions) + "\n}\n")
    PAGE.write_text(render(tables))


def differences(version: str, table: Table, tables: dict[str, Table], part: bool = False) -> list[str]:
    """Where a fresh table differs from the committed one of the same Triton version, or in its cases from any other. `part`: a
    case that the fresh one lacks is no difference."""
    if version not in tables:
        known = ", ".join(sorted(tables)) or "none"
        print(f"the committed tables are of Triton {known}; with {version} figures aren't compared, only faults are looked for")
        if not tables:
            return ["no table is committed: run python -m bench.static --update"]
        committed = tables[max(tables)]
        return [
            f"{arch}: other cases than the committed table"
            for arch in table
            if (
                not set(table[arch]) <= set(committed.get(arch, {}))
                if part
                else set(table[arch]) != set(committed.get(arch, {}))
            )
        ]
    found = []
    for arch in sorted(set(table) | set(tables[version])):
        fresh, committed_rows = table.get(arch, {}), tables[version].get(arch, {})
        found += [
            f"{arch} {name}: committed {committed_rows.get(name)}, compiled {fresh.get(name)}"
            for name in sorted(set(fresh) if part else set(fresh) | set(committed_rows))
            if fresh.get(name) != committed_rows.get(name)
        ]
    return found


# The page.

_INTRODUCTION = f"""# What the Triton kernels compile to

Written by `python -m bench.static --update`; `make compile-check` and tests/test_static.py compare with it;
[static-analysis.md](static-analysis.md) says how each figure is found. Compiled without a GPU: nothing here was measured, and
predicted times are a model's. W is [{N}, {K}] unless K is named. No row uses local memory, and no decoding holds a fused
multiply-add.
"""


def render(tables: dict[str, Table]) -> str:
    """The page for people: every version's instructions and decoding, and the newest version's rows in full."""
    versions = sorted(tables, key=version_number, reverse=True)
    lines = [_INTRODUCTION]
    for version in versions:
        table = tables[version]
        lines += [f"## Triton {version}", "", *_instructions(table), "", *_decoding(table), ""]
    if versions:
        for arch in ARCHS:
            lines += _details(arch, versions[0], tables[versions[0]].get(f"sm_{arch}", {}))
    return "\n".join(lines).rstrip() + "\n"


def _grid(head: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> list[str]:
    head = list(head)
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def _instructions(table: Table) -> list[str]:
    rows = []
    for arch, found in table.items():
        for family in FAMILIES:
            names = {row.instruction for name, row in found.items() if name.startswith(family + " ") and "float32" not in name}
            tensor_core = sorted(names - {"none", "fma.rn.f32"})
            if tensor_core:
                rows.append([arch, family, ", ".join(f"`{name}`" for name in tensor_core)])
    return ["Tensor-core instructions for 16-bit activations:", "", *_grid(("architecture", "kernel", "instructions"), rows, 3)]


def _decoding(table: Table) -> list[str]:
    names = list(dict.fromkeys(name for rows in table.values() for name, row in rows.items() if row.decode is not None))
    rows = []
    for name in names:
        cells = [found[name].decode if name in found else None for found in table.values()]
        rows.append([name, *("" if cell is None else f"{cell:.2f}" for cell in cells)])
    return ["Decode instructions per weight in the main loop:", "", *_grid(("case", *table), rows)]


def _details(arch: int, version: str, rows: dict[str, Row]) -> list[str]:
    chip = CHIPS[arch]
    head = (
        "case",
        "registers",
        "shared",
        "CTAs per SM",
        "CTAs",
        "waves",
        "load",
        "decode",
        "loop",
        "limit",
        "predicted",
        "floor",
    )
    found = [[case.name, *details(arch, case, rows[case.name])] for case in cases(arch) if case.name in rows]
    return [
        f"## sm_{arch}, Triton {version}, modelled on {chip.name} ({chip.sms} SMs)",
        "",
        *_grid(head, found),
        "",
    ]


def details(arch: int, case: Case, row: Row) -> list[str]:
    """A row's cells: registers, bytes of shared memory, CTAs per SM, CTAs, waves, bytes per load of codes, decode and all loop
    instructions per weight, what the model says is slowest, its microseconds and the floor's."""
    model: Prediction = predict(CHIPS[arch], row, family_of(case).work(case))
    loads = "" if row.loads is None else str(row.loads[0]) if row.loads[0] == row.loads[1] else f"{row.loads[1]}-{row.loads[0]}"
    counted = row.decode is not None
    return [
        str(row.registers),
        str(row.shared),
        str(model.occupancy),
        str(row.ctas),
        f"{model.waves:.2f}",
        loads,
        "" if row.decode is None else f"{row.decode:.2f}",
        "" if row.loop is None else f"{row.loop:.2f}",
        model.limit if counted else "",
        f"{model.predicted:.1f}" if counted else "",
        f"{model.floor:.1f}",
    ]
