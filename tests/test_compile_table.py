"""The committed compile table is complete, sound and what the installed Triton makes of the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from bench import compile_check
from bench.compile_check import ARCHS, PAGE, ROOT, Case, Row, Table
from quantlib.formats import get_format
from tests.cases import FORMATS

TABLES = compile_check.read_tables()


def test_the_compiled_formats_cover_every_kind() -> None:
    def kinds(specs: tuple[str, ...]) -> set[tuple[str, object]]:
        formats = [get_format(spec) for spec in specs]
        facts = ("codec", "scale", "zero", "bits")
        values = [(fmt.codec.kind, fmt.scale.kind, fmt.zero, fmt.codec.bits) for fmt in formats]
        return {(fact, value) for row in values for fact, value in zip(facts, row, strict=True)}

    # 2-bit codes lie as the low plane of 3-bit codes does.
    assert kinds(FORMATS) - {("bits", 2)} <= kinds(compile_check.FORMATS)


@pytest.mark.parametrize("version", sorted(TABLES))
def test_every_committed_row_is_sound(version: str) -> None:
    for arch in ARCHS:
        rows = TABLES[version][f"sm_{arch}"]
        assert set(rows) == {case.name for case in compile_check.cases(arch)}
        for case in compile_check.cases(arch):
            assert compile_check.faults(arch, case, rows[case.name]) == []


def test_the_page_shows_the_table() -> None:
    assert PAGE.read_text() == compile_check.render(TABLES)


def test_every_fault_is_found() -> None:
    case = Case("linear", "nf4", "bfloat16", 16, 4096)
    good = Row("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", 96, 20000, 0, 0)
    assert compile_check.faults(89, case, good) == []
    bad = {"multiplies by fma": replace(good, instruction="fma.rn.f32"), "local memory": replace(good, local=8)}
    bad |= {"shared memory": replace(good, shared=101377), "fused": replace(good, fused=1)}
    for words, row in bad.items():
        (fault,) = compile_check.faults(89, case, row)
        assert words in fault
        assert case.name in fault


def test_a_changed_figure_is_a_difference() -> None:
    version = max(TABLES)
    rows = dict(TABLES[version]["sm_90"])
    name = next(iter(rows))
    rows[name] = replace(rows[name], registers=rows[name].registers + 1)
    changed: Table = {**TABLES[version], "sm_90": rows}
    assert compile_check.differences(version, TABLES[version], TABLES) == []
    (difference,) = compile_check.differences(version, changed, TABLES)
    assert name in difference
    del rows[name]
    assert len(compile_check.differences(version, changed, TABLES)) == 1
    assert len(compile_check.differences("0.0.0", changed, TABLES)) == 1


@pytest.mark.slow
def test_the_kernels_compile_to_the_committed_table() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compile_check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
