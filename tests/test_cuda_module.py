"""quantlib._cuda in use: when it is loaded, what is said where it can't be, and what is inside."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import cuda_read, cuda_static, cuda_table
from quantlib.errors import KernelError
from quantlib.kernels import cuda_module

ROOT = Path(__file__).parents[1]


def test_import_and_kernels_on_the_cpu_load_no_cuda() -> None:
    code = (
        "import sys, torch, quantlib; from quantlib.formats import get_format;"
        "w = quantlib.quantize(torch.randn(32, 64), 'nf4'); quantlib.linear(torch.randn(2, 64), w); quantlib.devices();"
        "assert 'quantlib._cuda' not in sys.modules, 'loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No cached answers of cuda_module, before or after."""

    def forget() -> None:
        for cached in (cuda_module._load, cuda_module.facts, cuda_module.refusal, cuda_module.launcher, cuda_module.chip):
            cached.cache_clear()

    forget()
    yield monkeypatch
    monkeypatch.undo()
    forget()


def test_a_missing_module_is_explained_and_refuses(fresh: pytest.MonkeyPatch) -> None:
    fresh.setitem(sys.modules, "quantlib._cuda", None)
    fresh.setattr(cuda_module, "build_record", lambda name: {"why": "no nvcc found (looked everywhere)\nmore"})
    expected = "the CUDA extension quantlib._cuda was not built (no nvcc found (looked everywhere))"
    assert cuda_module.unavailable() == cuda_module.refusal("sm80", 80) == expected
    with pytest.raises(KernelError, match="doctor"):
        cuda_module.launcher("sm80_gemv")


def test_a_broken_module_is_explained(fresh: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("undefined symbol: cuTensorMapEncodeTiled")

    fresh.setattr(cuda_module, "import_module", broken)
    assert "can't be loaded (ImportError: undefined symbol" in (cuda_module.unavailable() or "")


class FakeError(RuntimeError):
    kernel, shape, reason, code = "sm80_gemv", "M=1", "an illegal memory access", 700


class FakeModule:
    CudaError = FakeError

    @staticmethod
    def facts() -> dict[str, Any]:
        return {
            "sources": {
                "sm80/gemv.cu": {"targets": ["sm_80", "compute_80"], "chips": [80, 86, 87, 88, 89], "ptx": 80},
                "sm90/tile.cu": {"targets": ["sm_90a"], "chips": [90], "ptx": None},
            },
            "left_out": {"sm100": "no CUTLASS headers\nat all"},
            "not_asked_for": ["sm120"],
        }

    @staticmethod
    def kernels() -> list[dict[str, Any]]:
        def usage(registers: int, spilled: int = 0) -> dict[str, int]:
            return {"registers": registers, "spill_stores": spilled, "spill_loads": 0}

        return [
            {"source": "sm80/gemv.cu", "name": "gemv<1>", "targets": {"sm_80": usage(40)}},
            {"source": "sm80/gemv.cu", "name": "gemv<2>", "targets": {"sm_80": usage(64)}},
            {"source": "sm90/tile.cu", "name": "tile", "targets": {"sm_90a": usage(168, 24)}},
        ]

    @staticmethod
    def sm80_gemv(device: int) -> int:
        if device:
            raise FakeError("sm80_gemv(M=1): an illegal memory access")
        return 7

    @staticmethod
    def device_properties(_: int) -> dict[str, int]:
        sizes = ("multiprocessors", "shared_per_block", "shared_per_multiprocessor", "registers_per_multiprocessor")
        return {"major": 9, "minor": 0, **dict.fromkeys((*sizes, "threads_per_multiprocessor", "l2_bytes"), 5)}


def test_a_module_says_for_which_chips_it_has_kernels(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(cuda_module, "import_module", lambda name: FakeModule)
    assert [cuda_module.refusal("sm80", chip) for chip in (80, 86, 90, 121)] == [None] * 4
    assert cuda_module.refusal("sm80/gemv", 90) is None
    assert cuda_module.refusal("sm90", 90) is None
    assert cuda_module.refusal("sm90", 100) == "quantlib._cuda holds sm90 for sm_90a, nothing for sm_100"
    for sources, words in (("sm100", "no CUTLASS headers)"), ("sm120", "QUANTLIB_CUDA_ARCHS"), ("sm80/dgrad", "no sources")):
        assert words in (cuda_module.refusal(sources, 100) or "")
    assert cuda_module.chip(0).capability == 90


def test_doctor_lists_kernels_by_target_or_says_why_there_are_none(fresh: pytest.MonkeyPatch) -> None:
    from quantlib.cli import doctor

    fresh.setattr(cuda_module, "import_module", lambda name: FakeModule)
    table = doctor._cuda_kernels()
    assert not isinstance(table, str)
    shown = {str(column.header): list(column.cells) for column in table.columns}
    assert list(shown) == ["source", "kernel", "instances", "sm_80", "sm_90a", "compute_80"]
    assert shown["kernel"] == ["gemv", "tile"]
    assert (shown["sm_80"], shown["compute_80"]) == (["40-64", ""], ["PTX", ""])
    assert shown["sm_90a"][0] == ""
    assert "168" in str(shown["sm_90a"][1])
    assert "spills 24 bytes" in str(shown["sm_90a"][1])
    for cached in (cuda_module._load, cuda_module.facts):
        cached.cache_clear()
    fresh.setitem(sys.modules, "quantlib._cuda", None)
    fresh.setattr(cuda_module, "import_module", importlib.import_module)
    fresh.setattr(cuda_module, "build_record", lambda name: {"why": "QUANTLIB_CUDA=0 asked for a build without it"})
    assert "QUANTLIB_CUDA=0" in str(doctor._cuda_kernels())


def test_what_cuda_refuses_is_a_kernel_error_with_advice(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(cuda_module, "import_module", lambda name: FakeModule)
    assert cuda_module.launcher("sm80_gemv")(0) == 7
    with pytest.raises(KernelError, match=r"sm80_gemv\(M=1\): an illegal memory access; .*CUDA_LAUNCH_BLOCKING=1"):
        cuda_module.launcher("sm80_gemv")(1)
    with pytest.raises(KernelError, match=r"no launcher 'sm80_gemm'.*make build"):
        cuda_module.launcher("sm80_gemm")


# The committed table, and the module that is built here.


def test_each_fault_of_a_kernel_is_found() -> None:
    good = cuda_read.Row(("HMMA.16816.F32.BF16",), 64, 0, 0, 0)

    def of(row: cuda_read.Row, target: str = "sm_80") -> list[str]:
        return cuda_static.faults({"sm80/linear_frag.cu": {"kernel<1>": {target: row}}})

    assert of(good) == []
    ptx = cuda_read.Row(("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",))
    assert of(ptx, "compute_80") == []
    for words, row in {
        "no tensor core, HMMA.16816 was intended": replace(good, instructions=()),
        "spills 8 bytes": replace(good, spills=8),
        "keeps 16 bytes on the stack": replace(good, stack=16),
    }.items():
        (fault,) = of(row)
        assert words in fault
        assert "kernel<1> sm_80" in fault


def test_the_page_shows_the_committed_table() -> None:
    tables = cuda_table.read_tables()
    if not tables:
        pytest.skip("no table is committed")
    assert cuda_table.PAGE.read_text() == cuda_table.render(tables)
    for table in tables.values():
        assert cuda_static.faults(table) == []


def test_a_changed_figure_is_a_difference() -> None:
    table = {"sm80/a.cu": {"k": {"sm_80": cuda_read.Row(("HMMA",), 64, 0, 0, 0)}}}
    other = {"sm80/a.cu": {"k": {"sm_80": cuda_read.Row(("HMMA",), 65, 0, 0, 0)}}}
    assert cuda_table.differences(table, table) == []
    assert len(cuda_table.differences(table, other)) == len(cuda_table.differences(table, {})) == 1


@pytest.mark.slow
def test_the_built_module_holds_the_intended_instructions() -> None:
    """Machine code and PTX of every kernel for every target, and the committed table where it is of the same nvcc."""
    if reason := cuda_module.unavailable():
        pytest.skip(reason)
    known = cuda_module.facts()
    table = cuda_read.read_module(Path(cuda_module.module().__file__), known["kernels"])
    assert table
    assert cuda_static.faults(table) == []
    committed = cuda_table.read_tables().get(known["nvcc"])
    if committed and not known["left_out"] and not known["not_asked_for"]:
        assert cuda_table.differences(table, committed) == []
