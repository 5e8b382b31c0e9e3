"""The committed compile table is complete, sound and what the installed Triton makes of the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import static, static_table
from bench.static_cases import ARCHS, Case
from bench.static_cases import FORMATS as COMPILED_FORMATS
from bench.static_chips import CHIPS
from bench.static_compile import Row, instruction_of
from bench.static_families import FAMILIES, cases
from bench.static_model import Work, ctas_per_sm, predict
from bench.static_table import PAGE, ROOT, Table, differences, read_tables, render
from quantlib.formats import get_format
from tests.cases import FORMATS

TABLES = read_tables()

GOOD = Row(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    registers=96,
    shared=20000,
    tmem=0,
    local=0,
    warps=4,
    ctas=64,
    passes=1,
    fused=0,
    loads=(16, 16),
    decode=3.0,
    loop=6.0,
)


def test_the_compiled_formats_cover_every_kind() -> None:
    def kinds(specs: tuple[str, ...]) -> set[tuple[str, object]]:
        formats = [get_format(spec) for spec in specs]
        facts = ("codec", "scale", "zero", "bits")
        values = [(fmt.codec.kind, fmt.scale.kind, fmt.zero, fmt.codec.bits) for fmt in formats]
        return {(fact, value) for row in values for fact, value in zip(facts, row, strict=True)}

    # 2-bit codes lie as the low plane of 3-bit codes does.
    assert kinds(FORMATS) - {("bits", 2)} <= kinds(COMPILED_FORMATS)


def test_tables_are_committed() -> None:
    assert TABLES


@pytest.mark.parametrize("version", sorted(TABLES))
def test_every_committed_row_is_sound(version: str) -> None:
    for arch in ARCHS:
        rows = TABLES[version][f"sm_{arch}"]
        assert set(rows) == {case.name for case in cases(arch)}
        for case in cases(arch):
            assert static.faults(arch, case, rows[case.name], version) == []


@pytest.mark.parametrize("version", sorted(TABLES))
def test_every_disassembled_case_is_counted(version: str) -> None:
    for job in static.table_jobs():
        row = TABLES[version][f"sm_{job.arch}"][job.case.name]
        counted = job.machine_code and bool(FAMILIES[job.case.kernel].codes)
        assert (row.decode is not None) == counted, f"sm_{job.arch} {job.case.name}"


def test_the_page_shows_the_table() -> None:
    assert PAGE.read_text() == render(TABLES)


def test_every_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("rows_linear", "nf4", "bfloat16", 16)
    limited = replace(FAMILIES["rows_linear"], max_decode=((89, "nf4", 3.5),), min_load=16)
    monkeypatch.setitem(FAMILIES, "rows_linear", limited)
    assert static.faults(89, case, GOOD, "3.9.0") == []
    bad = {"multiplies by fma": replace(GOOD, instruction="fma.rn.f32"), "local memory": replace(GOOD, local=8)}
    bad |= {"shared memory": replace(GOOD, shared=101377), "fused": replace(GOOD, fused=1)}
    bad |= {"loads codes by 4 bytes": replace(GOOD, loads=(16, 4)), "the limit is 3.5": replace(GOOD, decode=3.6)}
    for words, row in bad.items():
        (fault,) = static.faults(89, case, row, "3.9.0")
        assert words in fault
        assert case.name in fault


def test_an_instruction_is_intended_from_the_triton_on_that_emits_it() -> None:
    case = Case("scaled_gemm", "int8-channel", "bfloat16", 512, activations="int8")
    tcgen05 = replace(GOOD, instruction="tcgen05.mma.cta_group::1.kind::i8")
    one_warp = replace(GOOD, instruction="mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32")
    assert static.faults(100, case, one_warp, "3.6.0") == static.faults(100, case, tcgen05, "3.8.0") == []
    for row, version in ((tcgen05, "3.6.0"), (one_warp, "3.8.0")):
        (fault,) = static.faults(100, case, row, version)
        assert "was intended" in fault


def test_a_limit_holds_for_a_format_and_its_variants_alone() -> None:
    family = replace(FAMILIES["rows_linear"], max_decode=((90, "int4", 4.0), (90, "nf4", 5.0)))
    limits = {
        fmt: family.limit(90, Case("rows_linear", fmt, "bfloat16", 16)) for fmt in ("int4-g128", "nf4", "nf4-dq", "nvfp4")
    }
    assert limits == {"int4-g128": 4.0, "nf4": 5.0, "nf4-dq": 5.0, "nvfp4": None}
    assert family.limit(80, Case("rows_linear", "nf4", "bfloat16", 16)) is None


def test_a_changed_figure_is_a_difference() -> None:
    version = max(TABLES)
    rows = dict(TABLES[version]["sm_90"])
    name = next(iter(rows))
    rows[name] = replace(rows[name], registers=rows[name].registers + 1)
    changed: Table = {**TABLES[version], "sm_90": rows}
    assert differences(version, TABLES[version], TABLES) == []
    (difference,) = differences(version, changed, TABLES)
    assert name in difference
    del rows[name]
    assert len(differences(version, changed, TABLES)) == 1
    assert len(differences("0.0.0", changed, TABLES)) == 1


def test_the_tensor_core_instruction_is_named_before_fma() -> None:
    ptx = "fma.rn.f32 %f1;\nwgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f2};\n"
    assert instruction_of(ptx) == "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16"
    assert instruction_of("fma.rn.f32 %f1;") == "fma.rn.f32"
    assert instruction_of("add.f32 %f1;") == "none"


@pytest.mark.parametrize(
    ("row", "ctas"),
    [
        (replace(GOOD, registers=32, shared=0), 16),  # 64 warps
        (replace(GOOD, registers=255, shared=0), 2),  # 8 warps of 8192 registers
        (replace(GOOD, registers=96, shared=0), 5),  # 21 warps of 3072 registers, 20 in whole groups
        (replace(GOOD, registers=32, shared=100 * 1024), 2),
        (replace(GOOD, registers=32, shared=0, warps=1), 32),
        (replace(GOOD, registers=32, shared=0, tmem=256), 2),
    ],
)
def test_every_resource_bounds_occupancy(row: Row, ctas: int) -> None:
    assert ctas_per_sm(CHIPS[100], row) == ctas


def test_the_slowest_resource_is_predicted() -> None:
    chip = CHIPS[90]
    full = replace(GOOD, ctas=chip.sms, loop=6.0)
    weights = 1 << 24
    memory = predict(chip, replace(full, loop=0.1), Work(bytes=weights // 2, flops=0, weights=weights))
    assert (memory.limit, memory.predicted) == ("memory", memory.floor)
    issue = predict(chip, full, Work(bytes=weights // 2, flops=0, weights=weights))
    assert issue.limit == "issue"
    assert issue.predicted == pytest.approx(weights * 6.0 / 32 / (chip.sms * 4 * chip.clock * 1e3))
    tensor = predict(chip, full, Work(bytes=1, flops=chip.sms * 10**12, weights=1))
    assert tensor.limit == "tensor"
    uneven = predict(chip, replace(full, ctas=chip.sms + 1), Work(bytes=1, flops=chip.sms * 10**12, weights=1))
    assert uneven.predicted > 1.9 * tensor.predicted


def test_a_sample_holds_every_kernel_of_every_architecture() -> None:
    jobs = static.table_jobs()
    few = static.sampled(jobs, 6)
    assert len(few) < len(jobs) / 3
    assert {(job.arch, job.case.kernel) for job in few} == {(job.arch, job.case.kernel) for job in jobs}
    assert static.sampled(jobs, 1) == jobs


def test_a_part_of_the_table_may_lack_cases_and_not_change_them() -> None:
    committed: Table = {"sm_80": {"a": GOOD, "b": GOOD}}
    assert differences("3.9.0", {"sm_80": {"a": GOOD}}, {"3.9.0": committed}, part=True) == []
    assert differences("3.9.0", {"sm_80": {"a": GOOD}}, {"3.9.0": committed})
    assert differences("3.9.0", {"sm_80": {"a": replace(GOOD, registers=97)}}, {"3.9.0": committed}, part=True)
    assert differences("3.9.0", {"sm_80": {"c": GOOD}}, {"3.9.0": committed}, part=True)


def test_a_changed_source_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "triton_kernels").mkdir()
    source = tmp_path / "triton_kernels" / "gemv.py"
    source.write_text("a = 1\n")
    monkeypatch.setattr(static_table, "ROOT", tmp_path)
    before = static_table.sources_digest()
    assert static_table.sources_digest() == before
    source.write_text("a = 2\n")
    assert static_table.sources_digest() != before
    assert all(list(ROOT.glob(pattern)) for pattern in static_table.READ)


@pytest.mark.slow
def test_the_kernels_compile_to_the_committed_table() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Everything that could change a row is read for the digest; `make compile-check` compiles every row all the same.
    command = [sys.executable, "-m", "bench.static", "--sample", "6"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
