"""Which problems the CUDA kernels of the fragments layout take, at what predicted cost, and what they say where they don't; the
instances are the emulator's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from quantlib.devices import Device
from quantlib.dispatch import choices
from quantlib.formats import get_format
from quantlib.kernels import cuda_fragments, cuda_module, get_kernel
from quantlib.kernels.base import Problem
from quantlib.kernels.cuda_fragments_launch import Variant, deal
from tests.test_cuda_fragments import emulator

H100 = Device("cuda", "NVIDIA H100", "sm_90", 132, 3350, 989)
NAMES = ("cuda_sm80_gemv", "cuda_sm80_linear_frag", "cuda_sm80_dgrad_frag")


@pytest.fixture(autouse=True)
def _built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine whose quantlib._cuda holds every instance."""
    monkeypatch.setattr(cuda_module, "module", emulator)
    monkeypatch.setattr(cuda_module, "refusal", lambda sources, capability: None if sources == "sm80" else "not built")
    cuda_fragments.instances.cache_clear()
    yield
    cuda_fragments.instances.cache_clear()


def problem(m: int, spec: str = "int4-g128", operation: str = "linear", **others: object) -> Problem:
    base = Problem("linear", m, 4096, 4096, torch.bfloat16, get_format(spec), "fragments", None, H100)
    return replace(base, operation=operation, **others)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (problem(9), "up to 8 rows"),
        (problem(1, dtype=torch.float32), "fp16 or bf16"),
        (problem(1, layout="rows"), "fragments layout"),
        (problem(1, batch_invariant=True), "batch_invariant"),
        (problem(1, spec="q4_k"), "minima"),
        (problem(1, spec="int8-g64-asym-fp32"), "zero points"),
        (problem(1, device=Device("cpu", "", "avx2", 2, 20, 0.1)), "CUDA device"),
        (problem(1, device=replace(H100, arch="sm_75")), "8.0 or newer"),
    ],
)
def test_a_refusal_says_why(asked: Problem, words: str) -> None:
    reason = get_kernel("cuda_sm80_gemv").supports(asked)
    assert reason is not None
    assert words in reason


def test_a_module_without_the_kernels_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_module, "refusal", lambda sources, capability: f"built without {sources} for {capability}")
    assert get_kernel("cuda_sm80_linear_frag").supports(problem(16)) == "built without sm80 for 90"


@pytest.mark.parametrize("spec", ["int4-g128", "nf4", "nvfp4", "mxfp4", "fp8-e4m3"])
@pytest.mark.parametrize(("m", "operation"), [(1, "linear"), (16, "linear"), (64, "linear"), (16, "dgrad"), (512, "dgrad")])
def test_every_regime_has_a_plan_between_the_floor_and_reason(spec: str, m: int, operation: str) -> None:
    asked = problem(m, spec, operation)
    offered = [get_kernel(name) for name in NAMES if get_kernel(name).operation == operation]
    costs = [kernel.cost(asked) for kernel in offered if kernel.supports(asked) is None]
    floor = asked.format.nbytes(4096, 4096) / (H100.bandwidth * 1e3)
    assert costs
    assert all(floor < cost < 60 * floor for cost in costs)


def test_dispatch_compares_them_with_the_other_kernels() -> None:
    found = choices(problem(1))
    costs = {choice.kernel: choice.cost for choice in found if choice.cost is not None}
    assert {"cuda_sm80_gemv", "cuda_sm80_linear_frag"} <= set(costs)
    assert list(costs.values()) == sorted(costs.values())
    refused = {choice.kernel: choice.refusal for choice in choices(problem(512)) if choice.refusal is not None}
    assert "up to 256 rows" in refused["cuda_sm80_linear_frag"]


@pytest.mark.parametrize("m", [1, 8, 9, 33, 130, 1000])
@pytest.mark.parametrize("wanted", [1, 7, 132, 264])
def test_every_turn_of_every_block_is_dealt_out_once(m: int, wanted: int) -> None:
    variant = Variant(0, "int4", "half", "bfloat16", rows=16, columns=64, depth=256, threads=256, shared_bytes=90000)
    dealt = deal(m, 1000, 5000, variant, wanted)
    assert dealt.blocks == -(-m // 16) * 16
    assert dealt.turns == 20
    assert (dealt.programs - 1) * dealt.each < dealt.blocks * dealt.turns <= dealt.programs * dealt.each
    assert dealt.programs <= max(wanted, 1)


def test_without_a_gpu_nothing_is_imported() -> None:
    code = (
        "import sys, torch, quantlib\n"
        "model = torch.nn.Sequential(torch.nn.Linear(256, 64))\n"
        "quantlib.patch(model, 'int4-g128', progress=False)\n"
        "model(torch.randn(2, 256))\n"
        "quantlib.explain(model, batch=(1, 16))\n"
        "assert 'quantlib._cuda' not in sys.modules, 'loaded'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
