"""Activations in int8: rows of x are rounded as the format's law says, bit by bit, and multiplied as integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import quantlib
from quantlib import dispatch
from quantlib.errors import KernelError
from quantlib.formats import Format, get_format
from quantlib.formats.codecs import Affine
from quantlib.kernels import cpu, cpu_int8, get_kernel
from quantlib.testing import assert_close, assert_same_bits

from . import cases
from .conftest import instruction_sets, running
from .test_cpu_kernels import UNUSUAL, for_numbers_of_threads, fp64_product, quantized, random_x

if cpu.unavailable is not None:
    pytest.skip(cpu.unavailable, allow_module_level=True)

INT8 = get_format("int8")
TAKEN: tuple[Format, ...] = tuple(
    fmt for fmt in (*map(get_format, cases.FORMATS), *UNUSUAL) if cpu_int8.unit_of(fmt) is not None
)
SHAPES = (*cases.SHAPES, (50, 1300), (13, 576))
"""With more rows than are decoded together, and with columns in several blocks, the last not whole."""

pytestmark = pytest.mark.usefixtures("unusual_formats")
multiplies = pytest.mark.skipif(not cpu.has_int8(), reason=f"this CPU multiplies no bytes; it runs {cpu.isa()}")


def parts_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """The law's codes and scales, as `quantize_rows` gives them."""
    parts = INT8.fit(x)
    return INT8.encode(x, parts).view(x.shape), parts["scales"][:, 0].float()


def rounded(x: Tensor) -> Tensor:
    """x rounded to int8 and back, fp64."""
    codes, scales = parts_of(x)
    return (codes.double() - 128) * scales.double()[:, None]


def run(x: Tensor, weight: quantlib.QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    return dispatch.run("linear", x, weight, bias, activations="int8", kernel="cpu_int8_tile")


@pytest.mark.parametrize("level", instruction_sets())
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_rows_are_rounded_as_the_law_says(level: str, dtype: torch.dtype) -> None:
    with running(level):
        for m, k in ((0, 7), (1, 1), (1, 576), (5, 33), (40, 1000)):
            x = random_x(m, k, dtype) * torch.logspace(-6, 3, max(m, 1))[:m, None].to(dtype)
            if m > 2:
                x[2] = 0
                x[3] = torch.linspace(-127.5, 127.5, k).round().to(dtype)  # ties, once they are divided
            for given in (x, x.T.contiguous().T, torch.cat([x, x], dim=1)[:, :k]):
                for (codes, scales), (expected, numbers) in zip(
                    for_numbers_of_threads(lambda given=given: cpu.quantize_rows(given)), [parts_of(x)] * 4, strict=True
                ):
                    assert_same_bits(codes, expected)
                    assert_same_bits(scales, numbers)


@pytest.mark.parametrize("level", instruction_sets())
def test_the_smallest_and_the_largest_scales_are_the_laws(level: str) -> None:
    with running(level):
        peaks = torch.tensor([5.9e-8, 1e-7, 7.6e-6, 7.7e-6, 1e-5, 2.0, 8.3e6])
        x = peaks[:, None] * torch.tensor([[1.0, -0.5, 0.25]])
        codes, scales = cpu.quantize_rows(x)
        expected, numbers = parts_of(x)
        assert_same_bits(codes, expected)
        assert_same_bits(scales, numbers)


@pytest.mark.parametrize("level", instruction_sets())
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_makes_its_row_nan_and_no_other(level: str, bad: float) -> None:
    with running(level):
        x = random_x(3, 70, torch.float32)
        x[1, 69] = bad
        codes, scales = cpu.quantize_rows(x)
        assert bool(scales[1].isnan())
        assert_same_bits(codes[::2], parts_of(x[::2])[0])
        assert bool(scales[::2].isfinite().all())
        assert bool(cpu.quantize_rows(torch.tensor([[1e9]]))[1].isinf().all())  # beyond fp16
        if not cpu.has_int8():
            return
        y = run(torch.cat([x, torch.full((1, 70), 1e9)]), quantized("int4-g32", 5, 70))
        assert bool(y[1].isnan().all() and y[3].isnan().all())
        assert bool(y[::2].isfinite().all())


@multiplies
@pytest.mark.parametrize("spec", [fmt.name for fmt in TAKEN])
def test_products_are_those_of_rounded_x_and_the_decoded_weight(spec: str) -> None:
    for i, (n, k) in enumerate(SHAPES):
        weight = quantized(spec, n, k)
        for dtype in cases.DTYPES if spec in cases.FORMATS else (torch.float32,):  # random parts leave fp16's range
            bias = torch.randn(n).to(dtype) if i % 2 else None
            for m in (0, 1, 15, 16, 33, 50):
                x = random_x(m, k, dtype)
                assert_close(run(x, weight, bias), fp64_product(rounded(x), weight, bias))


@multiplies
@pytest.mark.parametrize("spec", [fmt.name for fmt in TAKEN])
def test_integers_lose_nothing(spec: str) -> None:
    """One column at a time: products of integers are exact, and what is left are the roundings of two scales."""
    n, k = 37, 300
    weight = quantized(spec, n, k)
    x = torch.zeros(k, k)
    x.fill_diagonal_(127.0)
    codes, scales = cpu.quantize_rows(x)
    assert int(codes[0, 0]) == 255
    decoded = weight.dequantize().double().T * (127 * scales.double()[:, None])
    assert_close(run(x, weight), decoded)
    exact = (run(x, weight).double() - decoded).abs() <= decoded.abs() * 2**-22 + 2.0**-140
    if weight.format.zero == "none":  # a zero or minimum is subtracted from a product already rounded
        assert bool(exact.all())


@multiplies
@pytest.mark.parametrize("spec", ["int4-g32-asym", "q6_k", "q4_k", "nvfp4", "int8-channel"])
def test_bits_do_not_depend_on_threads_batch_or_strides(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantized(spec, 1030, 1536)
    x = random_x(50, 1536, torch.bfloat16)
    results = for_numbers_of_threads(lambda: run(x, weight))
    strips = weight.to_layout("cpu_rows")
    for other in (*results[1:], *for_numbers_of_threads(lambda: run(x, strips))):
        assert_same_bits(other, results[0])
    for m in (1, 2, 16, 17, 33):
        assert_same_bits(run(x[:m], weight), results[0][:m])
    assert_same_bits(run(x.T.contiguous().T, weight), results[0])
    monkeypatch.setattr(cpu_int8, "ROWS_AT_ONCE", 7)
    assert_same_bits(run(x, weight), results[0])


@multiplies
def test_wide_sums_stay_within_their_integers() -> None:
    """The largest x times the largest weights, all of one sign, over the widest block."""
    weight = quantlib.quantize(-torch.ones(3, 4096), "int8-channel")
    x = torch.ones(2, 4096)
    x[1] = -1
    assert_close(run(x, weight), fp64_product(rounded(x), weight))


@multiplies
def test_dispatch_takes_it_for_int8_alone_and_refusals_have_words() -> None:
    weight = quantized("int4-g128", 576, 1536)

    def asked(m: int = 600, of: quantlib.QuantizedTensor = weight, **changes: object) -> dispatch.Problem:
        return dispatch.problem_of("linear", m, of, torch.bfloat16, **changes)  # type: ignore[arg-type]

    with running("avx512_bf16" if cpu.has_tiles() else cpu.isa()):  # bf16 in tile registers is faster than bytes without
        assert dispatch.select(asked(activations="int8")).name == "cpu_int8_tile"
    assert dispatch.select(asked()).name != "cpu_int8_tile"
    kernel = get_kernel("cpu_int8_tile")
    for problem, word in (
        (asked(), "none are asked for"),
        (asked(activations="fp8"), "not in fp8"),
        (asked(activations="int8", of=quantized("nf4", 64, 64)), "no multiples of one unit"),
        (asked(activations="int8", batch_invariant=True), "batch_invariant is set"),
    ):
        assert word in str(kernel.supports(problem)), kernel.supports(problem)
    with running("scalar"):
        assert "needs AVX-512 VNNI; scalar runs here" in str(kernel.supports(asked(activations="int8")))
        with pytest.raises(KernelError, match="AVX-512 VNNI"):
            run(random_x(2, 1536, torch.bfloat16), weight)
        with pytest.raises(ValueError, match="no products of bytes"):
            kernel.run(asked(activations="int8"), random_x(2, 1536, torch.bfloat16), weight, None)


def test_units_are_what_values_are_multiples_of() -> None:
    expected = {
        "int4-g128": 1.0,
        "int8-channel": 1.0,
        "nvfp4": 0.5,
        "mxfp4": 0.5,
        "q6_k": 1.0,
        "iq4_nl": 1.0,
        "nf4": None,
        "fp8-e4m3": None,
    }
    assert {spec: cpu_int8.unit_of(get_format(spec)) for spec in expected} == expected
    wide = Format("int8-asym-wide", Affine(8, signed=False), INT8.block, INT8.scale, zero="integer")
    assert cpu_int8.unit_of(wide) is None  # its values leave the byte
