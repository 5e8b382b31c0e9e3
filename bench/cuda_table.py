"""The committed table of what CUDA kernels compile to: reading, writing, comparing, and the page made from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.cuda_read import Row, Table

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "results" / "cuda-table.json"
PAGE = ROOT / "docs" / "cuda-table.md"


def read_tables() -> dict[str, Table]:
    """The committed tables by version of nvcc."""
    if not TABLE.exists():
        return {}

    def row(stored: dict[str, Any]) -> Row:
        return Row(**{**stored, "instructions": tuple(stored["instructions"])})

    return {
        version: {
            source: {name: {target: row(stored) for target, stored in rows.items()} for name, rows in kernels.items()}
            for source, kernels in table.items()
        }
        for version, table in json.loads(TABLE.read_text()).items()
    }


def write_tables(tables: dict[str, Table]) -> None:
    """Write the machine-readable table, a kernel on a target a line, and the page."""
    stored = {
        version: {
            source: {name: {target: asdict(row) for target, row in rows.items()} for name, rows in kernels.items()}
            for source, kernels in table.items()
        }
        for version, table in sorted(tables.items())
    }
    TABLE.write_text(_lines(stored, 0, 4) + "\n")
    PAGE.write_text(render(tables))


def _lines(value: Any, level: int, deepest: int) -> str:
    """JSON with a line for each value at the deepest level."""
    if level == deepest:
        return json.dumps(value)
    pad = " " * (level + 1)
    inside = ",\n".join(f"{pad}{json.dumps(key)}: {_lines(each, level + 1, deepest)}" for key, each in value.items())
    return f"{{\n{inside}\n{pad[1:]}}}"


def differences(table: Table, committed: Table) -> list[str]:
    """Where a fresh table differs from the committed one of the same nvcc."""
    fresh, known = _flat(table), _flat(committed)
    return [
        f"{key}: committed {known.get(key)}, built {fresh.get(key)}"
        for key in sorted(set(fresh) | set(known))
        if fresh.get(key) != known.get(key)
    ]


def _flat(table: Table) -> dict[str, Row]:
    return {
        f"{source} {name} {target}": row
        for source, kernels in table.items()
        for name, rows in kernels.items()
        for target, row in rows.items()
    }


# The page.

_INTRODUCTION = """# What the CUDA kernels compile to

Written by `python -m bench.cuda_static --update`, which reads the module that `make build` made; without it, it compares, as
tests/test_cuda_module.py does. Compiled without a GPU: nothing here was measured. No kernel spills, or keeps anything on the
stack.
"""


def render(tables: dict[str, Table]) -> str:
    """The page for people."""
    lines = [_INTRODUCTION]
    for version, table in sorted(tables.items(), reverse=True):
        lines += [f"## nvcc {version}", "", "Tensor-core instructions:", ""]
        lines += _grid(("source", "target", "kernels", "instructions"), _instructions(table), 4)
        lines += ["", "Registers of a thread:", ""]
        for source, kernels in table.items():
            targets = [target for target in dict.fromkeys(t for rows in kernels.values() for t in rows) if "sm_" in target]
            lines += [f"### {source}", ""]
            lines += _grid(("kernel", *targets), _registers(kernels, targets))
            lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def _grid(head: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> list[str]:
    head = list(head)
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def _instructions(table: Table) -> Iterator[list[str]]:
    for source, kernels in table.items():
        for target in dict.fromkeys(target for rows in kernels.values() for target in rows):
            rows = [rows[target] for rows in kernels.values() if target in rows]
            names = sorted({name for row in rows for name in row.instructions})
            yield [source, target, str(len(rows)), ", ".join(f"`{name}`" for name in names) or "none"]


def _registers(kernels: dict[str, dict[str, Row]], targets: list[str]) -> Iterator[list[str]]:
    for name, rows in kernels.items():
        yield [f"`{name}`", *(str(rows[target].registers) if target in rows else "" for target in targets)]
