"""Program: products joined in one step have the bits of the same products apart, in every format, dtype and instruction set."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import quantlib
from quantlib.dispatch import problem_of
from quantlib.errors import KernelError
from quantlib.formats import get_format
from quantlib.kernels import cpu, get_kernel
from quantlib.kernels.cpu_program import Program, Term, function_of
from quantlib.kernels.reference import round_trip
from quantlib.testing import assert_same_bits, random_weight

from .test_cpu_kernels import UNUSUAL as UNUSUAL  # what the fixture registers
from .test_cpu_kernels import quantized, random_x, run

if cpu.unavailable is not None:
    pytest.skip(cpu.unavailable, allow_module_level=True)

FORMATS = (
    "int4-g32", "int4-g32-asym", "int4-channel-bf16", "int8-g32", "int8-channel", "int3-g64-asym", "nf4", "nf4-dq", "nvfp4",
    "mxfp4", "fp8-e4m3-block128", "q4_k", "q6_k",
)  # fmt: skip
KERNELS = ("cpu_linear", "cpu_pairs_dot", "cpu_pairs_strip", "cpu_amx_strip", "cpu_lookup_dot")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEIGHTS = (576, 192, 37)
THREADS = (1, 2, 3)


def terms(weights: Sequence[quantlib.QuantizedTensor], dtype: torch.dtype) -> list[Term[quantlib.QuantizedTensor]]:
    """The second with a bias."""
    return [
        Term(weight, random_x(1, weight.shape[0], dtype)[0] if i == 1 else None, torch.zeros(weight.shape[0], dtype=dtype))
        for i, weight in enumerate(weights)
    ]


def kernels_for(weight: quantlib.QuantizedTensor, dtype: torch.dtype) -> list[str]:
    """Those that take one row of x; cpu_linear always does."""
    problems = {name: problem_of("linear", 1, placed(weight, name), dtype) for name in KERNELS}
    found = [name for name, problem in problems.items() if get_kernel(name).supports(problem) is None]
    assert "cpu_linear" in found
    return found


def placed(weight: quantlib.QuantizedTensor, name: str) -> quantlib.QuantizedTensor:
    """The weight in the layout that a kernel reads."""
    layout = get_kernel(name).layout
    return weight if layout == "any" else weight.to_layout(layout)


@pytest.mark.parametrize("k", [576, 1536])
@pytest.mark.parametrize("spec", FORMATS)
def test_products_in_one_step_are_those_of_the_kernel(spec: str, k: int, isa: str) -> None:
    weights = [quantized(spec, n, k) for n in HEIGHTS]
    for dtype in DTYPES:
        x = random_x(1, k, dtype)
        for name in kernels_for(weights[0], dtype):
            laid = [placed(weight, name) for weight in weights]
            expected = [run(name, x, term.weight, term.bias) for term in terms(laid, dtype)]
            function = function_of(get_kernel(name))
            assert function is not None
            for threads in THREADS:
                joined = terms(laid, dtype)
                program = Program(1, dtype, threads)
                program.product(function, x[0], joined)
                program.run(0, 0)
                for term, y in zip(joined, expected, strict=True):
                    assert_same_bits(term.y, y[0])


@pytest.mark.parametrize("k", [70, 1536])
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_products_in_one_step_are_those_apart(dtype: torch.dtype, k: int, isa: str) -> None:
    x = random_x(1, k, dtype)[0]
    weights = [random_weight(n, k).to(dtype) for n in HEIGHTS]
    biases = [None, random_x(1, HEIGHTS[1], dtype)[0], None]

    def made(groups: Sequence[slice], threads: int) -> list[Tensor]:
        every = [
            Term(weight, bias, torch.zeros(len(weight), dtype=dtype)) for weight, bias in zip(weights, biases, strict=True)
        ]
        program = Program(1, dtype, threads)
        for group in groups:
            program.dense(x, every[group])
        program.run(0, 0)
        return [term.y for term in every]

    expected = made([slice(i, i + 1) for i in range(len(HEIGHTS))], 1)
    for threads in THREADS:
        for y, other in zip(made([slice(None)], threads), expected, strict=True):
            assert_same_bits(y, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [8, 37, 1536])
def test_a_gate_in_the_step_is_a_step_of_its_own(n: int, dtype: torch.dtype, isa: str) -> None:
    k = 576
    x = random_x(1, k, dtype)[0]
    weights = [quantlib.quantize(random_weight(n, k) * scale, "int4-g32") for scale in (50.0, 1.0)]
    plain = [weight.dequantize(dtype) for weight in weights]

    def made(gated: bool, threads: int) -> list[Tensor]:
        packed = terms(weights, dtype)
        dense = [Term(weight, None, torch.zeros(n, dtype=dtype)) for weight in plain]
        program = Program(1, dtype, threads)
        program.product("linear", x, packed, gated)
        program.dense(x, dense, gated)
        if not gated:
            program.gate(packed[0].y, packed[1].y, packed[0].y)
            program.gate(dense[0].y, dense[1].y, dense[0].y)
        program.run(0, 0)
        return [packed[0].y, dense[0].y]

    expected = made(False, 1)
    for threads in THREADS:
        for y, other in zip(made(True, threads), expected, strict=True):
            assert_same_bits(y, other)


@pytest.mark.parametrize("spec", ["q4_k", "q6_k", "super-3", "super-4", "super-5", "int4-g32", "nvfp4"])
@pytest.mark.usefixtures("unusual_formats")
def test_a_rows_product_does_not_depend_on_the_rows_beside_it(spec: str, isa: str) -> None:
    """Numbers of consecutive rows are expanded together; widths with one block to more than a run of 64."""
    for k in (256, 500, 576, 1536, 2048, 2300):
        weight = quantized(spec, 41, k)
        x = random_x(1, k, torch.float32)
        for name in kernels_for(weight, x.dtype):
            y = run(name, x, weight)[0]
            for row in (0, 1, 15, 16, 20, 40):
                parts = {
                    key: part[row : row + 1] if part.dim() == 2 and len(part) == 41 else part
                    for key, part in weight.parts.items()
                }
                alone = quantlib.QuantizedTensor(weight.format, (1, k), parts)
                assert_same_bits(run(name, x, alone)[0], y[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 40, 576])
def test_rounding_to_int8_is_a_step(dtype: torch.dtype, k: int, isa: str) -> None:
    x, y = torch.randn(k).to(dtype), torch.empty(k, dtype=dtype)
    program = Program(1, dtype, 1)
    program.embed(x[None].contiguous(), kept := torch.empty(k, dtype=dtype))
    program.round(kept, y)
    program.run(0, 0)
    assert_same_bits(y[None], round_trip(x[None], get_format("int8")))


def test_a_step_takes_one_format_and_what_fits() -> None:
    program = Program(1, torch.float32, 1)
    x = torch.zeros(576)
    four, eight = terms([quantized("int4-g32", 64, 576)], x.dtype), terms([quantized("int8-g32", 64, 576)], x.dtype)
    with pytest.raises(KernelError, match="one format"):
        program.product("linear", x, four + eight)
    with pytest.raises(KernelError, match="64 x 576"):
        program.product("linear", torch.zeros(512), four)
    with pytest.raises(KernelError, match="two products of one height"):
        program.product("linear", x, four, gated=True)
    with pytest.raises(KernelError, match="two products of one height"):
        program.dense(x, [Term(torch.zeros(n, 576), None, torch.zeros(n)) for n in (64, 32)], gated=True)
