"""Dispatch takes the least cost among the kernels that can, says why the others can't, and never fails to find one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import quantlib
import quantlib.kernels
from quantlib import dispatch
from quantlib.devices import Device, device_facts
from quantlib.kernels import Kernel, Problem, get_kernel, list_kernels, register_kernel, unregister_kernel
from quantlib.kernels.costs import decode_then_matmul, roofline

from . import cases

H100 = Device("cuda", "NVIDIA H100", "sm_90", 132, 3350.0, 989.0)
T4 = Device("cuda", "Tesla T4", "sm_75", 40, 320.0, 65.0)


def problem(m: int = 1, device: Device | None = None, spec: str = "nvfp4", **changes: object) -> Problem:
    facts = device or device_facts("cpu")
    arguments = {"dtype": torch.bfloat16, "layout": "rows", "activations": None} | changes
    return Problem("linear", m, 4096, 4096, format=quantlib.get_format(spec), device=facts, **arguments)  # type: ignore[arg-type]


class Free(Kernel):
    name, backend, operation = "free_linear", "torch", "linear"

    def supports(self, problem: Problem) -> str | None:
        return None if problem.m == 7 else "only for seven rows"

    def cost(self, problem: Problem) -> float:
        return 1e-9

    def run(self, problem: Problem, x: Tensor, weight: quantlib.QuantizedTensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


@pytest.fixture
def free() -> Iterator[None]:
    register_kernel(Free())
    yield
    unregister_kernel("free_linear")


@pytest.mark.usefixtures("free")
def test_the_cheapest_kernel_that_can_is_taken_at_once_and_forgotten_at_once() -> None:
    assert dispatch.select(problem(7)).name == "free_linear"
    other = next(choice for choice in dispatch.choices(problem(8)) if choice.kernel == "free_linear")
    assert other.refusal == "only for seven rows"
    unregister_kernel("free_linear")
    assert dispatch.select(problem(7)).name != "free_linear"
    register_kernel(Free())


@pytest.mark.parametrize("spec", cases.FORMATS)
@pytest.mark.parametrize("operation", ["linear", "dgrad", "dequantize"])
def test_every_problem_finds_a_kernel_and_every_refusal_is_a_sentence(spec: str, operation: str) -> None:
    for device in (device_facts("cpu"), H100, T4):
        for dtype in (*cases.DTYPES, torch.float64):
            for m in (0, 1, 16, 17, 4096):
                asked = Problem(operation, m, 33, 130, dtype, quantlib.get_format(spec), "rows", None, device)  # type: ignore[arg-type]
                found = dispatch.choices(asked)
                assert found[0].cost is not None
                assert len(found) == len(list_kernels(operation))
                assert all(choice.cost is not None or len(choice.refusal or "") > 10 for choice in found)


def test_fp64_and_old_gpus_end_at_the_reference_with_one_warning() -> None:
    assert dispatch.select(problem(dtype=torch.float64)).name == "reference_linear"
    dispatch._warn_reference.cache_clear()
    with pytest.warns(UserWarning, match=r"Tesla T4 .*reference kernel; quantlib.explain"):
        assert dispatch.select(problem(3, T4)).name == "reference_linear"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.select(problem(5, T4))


def test_buckets_are_exact_where_kernels_change_and_powers_of_two_above() -> None:
    assert [dispatch.bucket(m) for m in (0, 1, 16, 17, 64, 65, 128, 129, 4000)] == [0, 1, 16, 17, 64, 128, 128, 256, 4096]


def test_another_layout_refuses_the_kernels_of_the_cpu() -> None:
    found = {choice.kernel: choice for choice in dispatch.choices(problem(layout="tiles"))}
    assert found["reference_linear"].cost is not None
    assert found["cpu_linear"].refusal == "reads the layouts rows and cpu_rows; the weight lies in 'tiles'"


def test_costs_follow_bytes_at_small_m_and_flops_at_large_m() -> None:
    four, eight = problem(1, H100, "nvfp4"), problem(1, H100, "fp8")
    assert roofline(eight, 1.0) / roofline(four, 1.0) == pytest.approx(8 / 4.5, rel=0.02)
    assert roofline(problem(4096, H100, "nvfp4"), 1.0) == pytest.approx(2 * 4096**3 / 989e6, rel=1e-6)
    assert decode_then_matmul(four, 1.0) > roofline(four, 1.0)


def test_default_kernels_run_without_triton_and_without_the_extension() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['quantlib._cpu'] = None\n"
        "import torch, quantlib\n"
        "layer = quantlib.QuantLinear.from_linear(torch.nn.Linear(64, 8), 'nvfp4')\n"
        "assert layer(torch.randn(3, 64)).shape == (3, 8)\n"
        "text = str(quantlib.explain(layer, batch=(1,)))\n"
        "assert 'reference_linear' in text.splitlines()[4], text\n"
        "assert '_cpu' in text, text"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_devices_begin_with_the_cpu() -> None:
    found = quantlib.devices()
    assert found[0].kind == "cpu"
    assert found[0].units == torch.get_num_threads()
    assert len(found) == 1 + torch.cuda.device_count()


def test_the_cpu_extension_is_built_wherever_there_is_a_compiler() -> None:
    if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
        assert quantlib.kernels.cpu.unavailable is None
        assert {dispatch.select(problem(m)).backend for m in (1, 16, 512)} == {"cpu"}


@pytest.mark.parametrize("spec", ["nvfp4", "int4-g128", "fp8-e4m3-block128", "q4_k"])
@pytest.mark.parametrize("layout", ["rows", "fragments", "cpu_rows"])
@pytest.mark.parametrize("device", [None, H100], ids=["cpu", "cuda"])
def test_batch_invariant_products_of_every_batch_go_to_one_kernel(device: Device | None, layout: str, spec: str) -> None:
    for size in (33, 130, 4096):
        base = replace(problem(1, device, spec, layout=layout, batch_invariant=True), n=size, k=size)
        chosen = {dispatch.select(replace(base, m=m)).name for m in (0, 1, 2, 7, 16, 33, 300, 5000)}
        assert len(chosen) == 1, (size, chosen)
        name = chosen.pop()
        assert all(get_kernel(name).supports(replace(base, m=m)) is None for m in (1, 16, 300, 5000))
