"""The AVX2 kernel: the identity gives back the decoded weight, and nothing depends on threads or batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import quantlib
from quantlib.dispatch import choices, problem_of, select
from quantlib.formats import Format, get_format
from quantlib.kernels import cpu, cpu_quads, get_kernel
from quantlib.kernels.cpu_pairs import exact_in_bf16
from quantlib.testing import assert_close, assert_same_bits, assert_within_ulps, random_weight

from . import cases
from .conftest import instruction_sets
from .test_cpu_kernels import UNUSUAL, fp64_product, quantized, random_x, run

if cpu.unavailable is not None:
    pytest.skip(cpu.unavailable, allow_module_level=True)
if "avx2" not in instruction_sets():
    pytest.skip(f"this CPU has no AVX2; it runs {', '.join(instruction_sets())}", allow_module_level=True)

NAME = "cpu_quads_dot"
TAKEN: tuple[Format, ...] = tuple(
    fmt for fmt in (*map(get_format, cases.FORMATS), *UNUSUAL) if cpu_quads.unreadable(fmt) is None
)
NAMES = [fmt.name for fmt in TAKEN]
SHAPES = (*cases.SHAPES, (37, 2300), (5, 4500))
"""With a last span that is not whole."""


pytestmark = pytest.mark.usefixtures("unusual_formats")


@pytest.fixture(params=[isa for isa in instruction_sets() if isa != "scalar"], autouse=True)
def wide_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every set that runs the kernel."""
    before = cpu.isa()
    cpu.native().set_isa(request.param)
    yield
    cpu.native().set_isa(before)


def test_most_formats_are_taken() -> None:
    assert {fmt.name for fmt in map(get_format, cases.FORMATS)} - set(NAMES) <= set()
    assert len(NAMES) > len(cases.FORMATS)


@pytest.mark.parametrize("spec", NAMES)
def test_identity_gives_back_the_decoded_weight(spec: str) -> None:
    for n, k in SHAPES:
        weight = quantized(spec, n, k)
        for dtype in cases.DTYPES:
            decoded = weight.dequantize(dtype).T.contiguous()
            rows = list(range(k)) if k < 600 else [0, 1, 63, 64, 127, 128, 2047, 2048, k - 1]
            y = torch.cat([run(NAME, eye, weight) for eye in torch.eye(k, dtype=dtype)[rows].split(32)])
            if dtype is torch.bfloat16 and not exact_in_bf16(weight.format):
                assert_within_ulps(y, decoded[rows], 1)
            else:
                assert_same_bits(y + 0.0, decoded[rows] + 0.0)


@pytest.mark.parametrize("spec", cases.FORMATS)
def test_products_are_those_of_the_decoded_weight(spec: str) -> None:
    for i, (n, k) in enumerate(SHAPES):
        weight = quantized(spec, n, k)
        for dtype in cases.DTYPES:
            bias = torch.randn(n).to(dtype) if i % 2 else None
            for m in (0, 1, 7) if i else (2, 32):
                x = random_x(m, k, dtype)
                assert_close(run(NAME, x, weight, bias), fp64_product(x, weight, bias))


@pytest.mark.parametrize("spec", ["int4-g32-asym", "nf4-dq", "nvfp4", "q6_k", "fp8-e4m3-block128"])
def test_bits_do_not_depend_on_threads_or_batch(spec: str) -> None:
    weight = quantized(spec, 2050, 576)
    x = random_x(16, 576, torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(NAME, x, weight))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(other, results[0])
    for m in range(1, 16):
        assert_same_bits(run(NAME, x[:m], weight), results[0][:m])


def test_strides_of_x_do_not_matter() -> None:
    weight = quantized("int4-g32-asym", 130, 130)
    base = random_x(300, 300, torch.bfloat16)
    for m in (1, 19):
        for x in (base[:m, :130], base[:130, :m].T, base[: 2 * m : 2, :260:2], base[:1, :130].expand(m, 130)):
            assert_same_bits(run(NAME, x, weight), run(NAME, x.contiguous(), weight))


@pytest.mark.parametrize("spec", ["fp8-e4m3", "fp8-e5m2"])
def test_codes_that_are_no_numbers_make_their_row_nan(spec: str) -> None:
    weight = quantized(spec, 6, 200)
    weight.parts["codes"].view(torch.uint8)[3, 70] = 0xFF
    y = run(NAME, random_x(5, 200, torch.float32), weight)
    assert y[:, 3].isnan().all()
    pair = 3 - 6 // 2  # its neighbour in the same pass: rows half the range apart
    assert y[:, [row for row in range(6) if row not in (3, pair)]].isfinite().all()


def test_infinite_and_missing_numbers_reach_every_result_of_their_row() -> None:
    weight = quantized("nvfp4", 64, 256)
    x = torch.ones(2, 256, dtype=torch.bfloat16)
    x[1, 17] = float("nan")
    y = run(NAME, x, weight)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


def test_dispatch_takes_it_where_it_is_fastest_and_says_why_not_elsewhere() -> None:
    weight = quantized("int4-g128", 4096, 4096)
    if not cpu.has_pairs():
        for dtype in cases.DTYPES:
            assert select(problem_of("linear", 1, weight, dtype)).name == NAME
    refusals = {
        choice.kernel: choice.refusal for choice in choices(problem_of("linear", 64, weight, torch.float32)) if choice.refusal
    }
    assert "multiplies up to 32 rows" in refusals[NAME]
    kernel = get_kernel(NAME)
    assert "batch_invariant" in str(kernel.supports(problem_of("linear", 1, weight, torch.float32, batch_invariant=True)))
    cpu.native().set_isa("scalar")
    assert "is written in AVX2; scalar runs here" in str(kernel.supports(problem_of("linear", 1, weight, torch.float32)))


def test_random_codes_of_every_width_keep_the_law() -> None:
    """Weights whose parts hold any bytes, not only what quantizing gives."""
    generator = torch.Generator().manual_seed(3)
    for spec in ("int4-g128", "int8-channel", "int3-g64-asym", "int2-g64", "q4_k", "q6_k"):
        weight = quantlib.quantize(random_weight(40, 512), spec)
        codes = torch.randint(0, 256, weight.parts["codes"].shape, generator=generator, dtype=torch.uint8)
        weight = quantlib.QuantizedTensor(weight.format, weight.shape, weight.parts | {"codes": codes})
        x = random_x(3, 512, torch.float32)
        assert_close(run(NAME, x, weight), fp64_product(x, weight, None))
