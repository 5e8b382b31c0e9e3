"""Low-precision activations: quantizers agree with the format bit for bit, products with decoded operands within the limits.

Without a GPU the kernels run in Triton's interpreter, which conftest.py asks for before Triton is imported.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from quantlib.devices import Device, device_facts
from quantlib.dispatch import choices, problem_of, run, select
from quantlib.errors import FormatError, ShapeError
from quantlib.formats import Format, get_format
from quantlib.formats.codecs import E2M1, E4M3, E5M2
from quantlib.kernels import Problem, cuda_module, get_kernel, list_kernels, torch_scaled
from quantlib.kernels.activations import quantize_activations
from quantlib.kernels.activations_launch import (
    WHOLE_ROW,
    Activations,
    empty_activations,
    gemm_launch,
    math_of,
    quantize_launches,
    triton_version,
)
from quantlib.kernels.triton_launch import interpreting
from quantlib.layouts.swizzled import swizzle, swizzled_grid, swizzled_size, unswizzle
from quantlib.tensor import QuantizedTensor
from quantlib.testing import assert_close, assert_same_bits, random_weight
from tests.cases import DTYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAPABILITY = 0 if interpreting() else device_facts(DEVICE).capability

PER_ROW = ("fp8-e4m3", "int8-channel", "int8-channel-fp32", "int8-channel-bf16", "fp8-e4m3-tensor")
FLOAT_BLOCKS = ("fp8-e4m3-g128",)
SHARED_BLOCKS = ("nvfp4", "mxfp8", "mxfp8-ceil", "mxfp8-e5m2", "mxfp4", "mxfp4-ceil")
ACTIVATIONS = (*PER_ROW, *FLOAT_BLOCKS, *SHARED_BLOCKS)

PAIRS = (
    ("fp8", "fp8-e4m3"),
    ("fp8", "fp8-e5m2"),
    ("fp8", "fp8-e4m3-tensor"),
    ("fp8", "fp8-e4m3-block128"),
    ("fp8-e4m3-tensor", "fp8-e4m3-tensor"),
    ("fp8-g128", "fp8-e4m3-block128"),
    ("fp8-g128", "fp8-e4m3-g128"),
    ("int8", "int8-channel"),
    ("nvfp4", "nvfp4"),
    ("nvfp4", "nvfp4-46"),
    ("mxfp8", "mxfp4"),
    ("mxfp8", "mxfp8"),
    ("mxfp4", "mxfp4"),
    ("mxfp4", "mxfp8-e5m2"),
)
"""Activations and weights that are multiplied as they are: every kind of operand and of scale on either side."""


def random(m: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def awkward(m: int, k: int, dtype: torch.dtype, fmt: Format) -> Tensor:
    """Rows of very different size: ordinary, zero, near the smallest and the largest number, subnormal."""
    half = dtype == torch.float16 or fmt.scale.kind == "float"
    sizes = [1.0, 0.0, 1e-4, 3e4 if dtype == torch.float16 else 1e5, 1e-6 if half else 1e-38, 17.0, 1e-7 if half else 1e-41]
    rows = torch.tensor([sizes[row % len(sizes)] for row in range(m)])
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m * k)).clamp(-2, 2) * rows[:, None]
    x[::2, 0] = -0.0
    return x.to(DEVICE, dtype)


def law(x: Tensor, fmt: Format, **options: object) -> dict[str, Tensor]:
    """The parts that the format itself gives, computed on the CPU: torch divides by a constant less exactly on a GPU."""
    x = x.cpu()
    parts = fmt.fit(x, **options)  # type: ignore[arg-type]
    parts = {"codes": fmt.encode(x, parts), **parts}
    if fmt.scale.kind == "float":
        # Whether the scale of a zero block is 0 or -0 hangs on how torch takes the larger of the two.
        parts["scales"] = parts["scales"] + 0.0
    return parts


def rows_parts(quantized: Activations) -> dict[str, Tensor]:
    """The parts as the rows layout has them."""
    fmt, (m, k) = quantized.format, quantized.shape
    codes, scales = quantized.codes.view(torch.uint8), quantized.scales
    if quantized.codes.dtype == torch.int8:
        codes = codes ^ 0x80
    if quantized.swizzled:
        scales = unswizzle(scales, *fmt.grid(m, k))
    parts = {"codes": codes.cpu(), "scales": scales.cpu()}
    if quantized.global_scale is not None:
        parts["global_scale"] = quantized.global_scale.cpu()
    return parts


def assert_same_parts(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name in expected:
        assert_same_bits(found[name], expected[name])


def quantized_weight(spec: str, n: int, k: int) -> QuantizedTensor:
    fmt, weight = get_format(spec), random_weight(n, k)
    parts = fmt.fit(weight)
    return QuantizedTensor(fmt, (n, k), {"codes": fmt.encode(weight, parts), **parts}).to(DEVICE)


def expected_product(x: Tensor, fmt: Format, weight: QuantizedTensor, *added: Tensor | None) -> Tensor:
    """The fp64 product of the operands decoded by their laws, plus what is added."""
    decoded = fmt.decode(law(x, fmt), *x.shape).to(DEVICE)
    y = decoded.double() @ weight.dequantize().double().T
    for term in added:
        y = y if term is None else y + term.double()
    return y


# quantizers


@pytest.mark.parametrize("spec", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantizers_give_the_bits_of_the_format(spec: str, dtype: torch.dtype) -> None:
    fmt = get_format(spec)
    for m, k in ((1, 16), (9, 7), (8, 272), (3, 1060)):
        x = awkward(m, k, dtype, fmt)
        assert_same_parts(rows_parts(quantize_activations(x, fmt, CAPABILITY)), law(x, fmt))


@pytest.mark.parametrize("spec", SHARED_BLOCKS)
def test_swizzled_scales_are_the_plain_ones_and_their_pad_is_zero(spec: str) -> None:
    fmt = get_format(spec)
    for m, k in ((1, 16), (130, 70), (5, 1060)):
        x = awkward(m, k, torch.bfloat16, fmt)
        out = empty_activations(fmt, m, k, DEVICE, swizzled=True)
        out.scales.fill_(0xA5)
        for launch in quantize_launches(x, out, True, CAPABILITY):
            launch.run(x.device)
        expected = law(x, fmt)
        assert_same_parts(rows_parts(out), expected)
        assert_same_bits(out.scales.cpu(), swizzle(expected["scales"]))


@pytest.mark.parametrize("spec", ["fp8-e4m3", "int8-channel", "nvfp4", "fp8-e4m3-g128"])
def test_strides_of_x_do_not_matter(spec: str) -> None:
    fmt, wide = get_format(spec), random(6, 288)
    for x in (wide[:3, ::2], wide[::2, :144], wide[:3, 144:], wide[:, :5].T, wide[:1, :144].expand(3, 144)):
        assert_same_parts(rows_parts(quantize_activations(x, fmt, CAPABILITY)), law(x, fmt))


@pytest.mark.parametrize("spec", ACTIVATIONS)
def test_numbers_outside_of_x_do_not_leak_in(spec: str) -> None:
    storage = torch.full((5, 300), float("nan"), device=DEVICE)
    storage[:4, :270] = random(4, 270)
    x = storage[:4, :270]
    assert_same_parts(rows_parts(quantize_activations(x, get_format(spec), CAPABILITY)), law(x, get_format(spec)))


@pytest.mark.parametrize("spec", ["fp8-e4m3", "int8-channel"])
def test_rows_longer_than_the_registers_are_read_twice(spec: str) -> None:
    x = random(2, WHOLE_ROW + 777, torch.bfloat16)
    assert_same_parts(rows_parts(quantize_activations(x, get_format(spec), CAPABILITY)), law(x, get_format(spec)))


def probes(entries: tuple[float, ...]) -> Tensor:
    """Every value of a small float, the midpoints between neighbours, and the fp32 numbers on both sides of each."""
    values = sorted({value for value in entries if not math.isnan(value)})
    points = torch.tensor(values + [(low + high) / 2 for low, high in pairwise(values)])
    infinity = torch.full_like(points, math.inf)
    return torch.cat([points, torch.nextafter(points, infinity), torch.nextafter(points, -infinity)])


@pytest.mark.parametrize(
    ("spec", "codec", "top"),
    [("fp8-e4m3", E4M3, 448.0), ("mxfp8", E4M3, 448.0), ("mxfp8-e5m2", E5M2, 57344.0), ("mxfp4", E2M1, 6.0)],
)
def test_every_tie_goes_to_the_even_code(spec: str, codec: object, top: float) -> None:
    """A block that holds the largest number has the scale one, so that x itself is encoded."""
    fmt = get_format(spec)
    points = probes(codec.entries).clamp(-top, top)  # type: ignore[attr-defined]
    points = torch.nn.functional.pad(points, (0, -len(points) % 31)).view(-1, 31)
    x = torch.cat([points, torch.full((len(points), 1), top)], dim=1).to(DEVICE)
    quantized = quantize_activations(x, fmt, CAPABILITY)
    assert set(quantized.scales.flatten().tolist()) == {1.0 if fmt.scale.kind == "float" else 127}
    assert_same_parts(rows_parts(quantized), law(x, fmt))


def test_every_tie_of_int8_goes_to_the_even_code() -> None:
    steps = torch.arange(-255, 256) / 2
    x = torch.cat([torch.cat([steps, steps + 1e-5, steps - 1e-5]).clamp(-127.5, 127.5), torch.tensor([127.5])])[None].to(DEVICE)
    fmt = get_format("int8-fp32")
    assert_same_parts(rows_parts(quantize_activations(x, fmt, CAPABILITY)), law(x, fmt))


@pytest.mark.parametrize("size", [1e-44, 1e-41, 3e-36, 1e-30, 1e30, 3e38])
def test_nvfp4_of_very_small_and_very_large_tensors(size: float) -> None:
    fmt, x = get_format("nvfp4"), (random(4, 48).clamp(-1, 1) * size)
    assert_same_parts(rows_parts(quantize_activations(x, fmt, CAPABILITY)), law(x, fmt))


def test_a_given_global_scale_is_used() -> None:
    fmt, x = get_format("nvfp4"), random(5, 80) * 3
    given = torch.tensor(0.0007)
    found = quantize_activations(x, fmt, CAPABILITY, global_scale=given)
    assert_same_parts(rows_parts(found), law(x, fmt, shared={"global_scale": given}))


def test_scales_by_column_and_room_for_more_rows() -> None:
    fmt, x = get_format("fp8-g128"), random(5, 300)
    found = quantize_activations(x, fmt, CAPABILITY, by_column=True, rows=8)
    assert found.scales.stride() == (1, 8)
    expected = law(x, fmt)
    assert_same_bits(found.scales[:5].cpu(), expected["scales"])
    assert_same_bits(found.codes[:5].cpu(), expected["codes"])


@pytest.mark.parametrize("spec", ACTIVATIONS)
def test_an_empty_batch_launches_nothing(spec: str) -> None:
    fmt = get_format(spec)
    found = quantize_activations(torch.empty(0, 48, device=DEVICE), fmt, CAPABILITY)
    assert found.codes.shape == fmt.specs(0, 48)["codes"].shape


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("activations", "weight"), PAIRS)
def test_what_is_not_finite_makes_its_row_nan_and_no_other(activations: str, weight: str, bad: float) -> None:
    """The reference raises for float scales; a kernel can't wait for an answer, and must not give a number either."""
    fmt, packed = get_format(activations), quantized_weight(weight, 6, 80)
    x = random(3, 80)
    x[1, 37] = bad
    given = torch.tensor(0.001) if fmt.scale.kind == "e4m3_global" else None
    y = torch.empty(3, 6, device=DEVICE)
    gemm_launch(quantize_activations(x, fmt, CAPABILITY, global_scale=given), packed, None, y, CAPABILITY).run(x.device)
    assert bool(y[1].isnan().all())
    if fmt.block.rows is not None:
        assert bool(y[::2].isfinite().all())
    if fmt.scale.kind == "float":
        with pytest.raises(FormatError):
            law(x, fmt)


def test_without_a_given_scale_nvfp4_has_one_for_the_whole_tensor_and_so_one_nan() -> None:
    x = random(2, 32)
    x[1, 3] = math.nan
    found = quantize_activations(x, get_format("nvfp4"), CAPABILITY)
    assert found.global_scale is not None
    assert bool(found.global_scale.isnan())
    assert set(found.scales.flatten().tolist()) == {0x7F}


# the order of swizzled scales


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (1, 1), (128, 4), (129, 5), (300, 33)])
def test_swizzle_has_an_exact_inverse_and_follows_the_formula(rows: int, columns: int) -> None:
    scales = torch.randint(1, 256, (rows, columns), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    flat = swizzle(scales)
    assert flat.shape == (swizzled_size(rows, columns),)
    assert_same_bits(unswizzle(flat, rows, columns), scales)
    expected = torch.zeros_like(flat)
    across = math.ceil(columns / 4)
    for m in range(rows):
        for s in range(columns):
            expected[((m // 128) * across + s // 4) * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + s % 4] = scales[m, s]
    assert_same_bits(flat, expected)
    assert swizzled_grid(rows, columns) == (math.ceil(rows / 128) * 128, across * 4)


def test_unswizzle_says_what_size_it_needs() -> None:
    with pytest.raises(ShapeError, match=r"1024 elements in whole 128x4 tiles, found 512"):
        unswizzle(torch.zeros(512, dtype=torch.uint8), 129, 3)


# products


KERNELS = {"float": "triton_scaled_fp8", "e8m0": "triton_scaled_mx", "e4m3_global": "triton_scaled_nvfp4"}


def kernel_of(activations: str) -> str:
    fmt = get_format(activations)
    return "triton_scaled_int8" if fmt.codec.kind == "affine" else KERNELS[fmt.scale.kind]


@pytest.mark.parametrize(("activations", "weight"), PAIRS)
def test_products_of_quantized_operands(activations: str, weight: str) -> None:
    kernel, fmt = kernel_of(activations), get_format(activations)
    for m, n, k, dtype in ((1, 33, 48, torch.float32), (5, 9, 300, torch.bfloat16), (17, 40, 130, torch.float16)):
        packed, x = quantized_weight(weight, n, k), random(m, k, dtype, seed=m)
        bias = random(1, n, dtype, seed=9)[0] if m > 1 else None
        y = run("linear", x, packed, bias, activations=activations, kernel=kernel)
        assert y.dtype == dtype
        assert_close(y, expected_product(x, fmt, packed, bias))
        reference = run("linear", x, packed, bias, activations=activations, kernel="reference_linear")
        assert_close(y, reference.double())


ROUTES = (
    *((capability, "fp8", "fp8-e4m3") for capability in (80, 90)),
    *((capability, "fp8-g128", "fp8-e4m3-block128") for capability in (80, 90)),
    (80, "int8", "int8-channel"),
    (90, "nvfp4", "nvfp4"),
    *((capability, "mxfp8", "mxfp4") for capability in (80, 100, 120)),
    *((100, activations, activations) for activations in ("mxfp4", "mxfp8")),
)
"""A chip and what it multiplies: FP8 and block-scaled instructions, decoding to fp16 and bf16, E2M1 rewritten as E4M3."""


@pytest.mark.skipif(not interpreting(), reason="runs other chips' routes in Triton's interpreter")
@pytest.mark.parametrize(("capability", "activations", "weight"), ROUTES)
def test_every_route_gives_the_same_numbers(capability: int, activations: str, weight: str) -> None:
    """All but NVFP4's native one, which the interpreter computes wrongly; but for the scales' dtype it is MX's."""
    fmt = get_format(activations)
    if math_of(fmt, torch.bfloat16, capability)[0] == "scaled" and triton_version() < (3, 8):
        pytest.skip("the interpreter of Triton 3.6 and 3.7 has no working dot_scaled")
    packed, x = quantized_weight(weight, 33, 288), random(7, 288, torch.bfloat16)
    bias, residual = random(1, 33, torch.bfloat16, seed=1)[0], random(7, 33, torch.bfloat16, seed=2)
    y = torch.empty(7, 33, dtype=torch.bfloat16, device=DEVICE)
    gemm_launch(quantize_activations(x, fmt, CAPABILITY), packed, bias, y, capability, residual=residual).run(x.device)
    assert_close(y, expected_product(x, fmt, packed, bias, residual))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("activations", "weight"), [("mxfp8", "mxfp4"), ("mxfp8", "mxfp8"), ("mxfp4", "mxfp4")])
def test_identity_gives_the_decoded_weight(activations: str, weight: str, dtype: torch.dtype) -> None:
    """MX holds 1 and 0 exactly, so x = eye(K) gives the weight itself, bit for bit; adding zero folds -0."""
    packed, x = quantized_weight(weight, 17, 72), torch.eye(72, dtype=dtype, device=DEVICE)
    y = run("linear", x, packed, activations=activations, kernel="triton_scaled_mx")
    assert_same_bits(y.T.contiguous(), packed.dequantize(dtype) + 0.0)


def test_an_int8_sum_is_exact() -> None:
    """Codes at the ends of their range, K long enough that fp32 could not hold the sum of their products."""
    fmt, k = get_format("int8"), 2048
    packed = quantized_weight("int8-channel", 3, k)
    packed.parts["codes"].fill_(0)
    packed.parts["codes"][:, 0] = 129
    x = torch.full((2, k), -1.0, device=DEVICE)
    y = run("linear", x, packed, activations="int8", kernel="triton_scaled_int8")
    scales = law(x, fmt)["scales"].double().to(DEVICE) * packed.parts["scales"].double().T
    assert_close(y, scales * (128 * 128 * (k - 1) - 128))


@pytest.mark.parametrize(("activations", "weight"), [("fp8", "fp8-e4m3"), ("nvfp4", "nvfp4")])
def test_an_empty_batch_gives_an_empty_result(activations: str, weight: str) -> None:
    packed = quantized_weight(weight, 12, 64)
    x = torch.empty(0, 64, dtype=torch.bfloat16, device=DEVICE)
    y = run("linear", x, packed, activations=activations, kernel=kernel_of(activations))
    assert y.shape == (0, 12)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(("activations", "weight"), [("fp8", "fp8-e4m3"), ("mxfp8", "mxfp4")])
def test_batch_invariant_rows_do_not_depend_on_the_batch(activations: str, weight: str) -> None:
    packed, x = quantized_weight(weight, 20, 96), random(40, 96, torch.bfloat16)
    options = {"activations": activations, "kernel": kernel_of(activations), "batch_invariant": True}
    whole = run("linear", x, packed, **options)  # type: ignore[arg-type]
    for rows in (slice(0, 1), slice(3, 20)):
        assert_same_bits(run("linear", x[rows], packed, **options), whole[rows])  # type: ignore[arg-type]


def test_other_weights_take_the_ordinary_kernels() -> None:
    packed, x = quantized_weight("int4-g128", 20, 128), random(3, 128)
    y = run("linear", x, packed, activations="nvfp4")
    assert_close(y, expected_product(x, get_format("nvfp4"), packed))


# choosing


HOPPER = Device("cuda", "a Hopper GPU", "sm_90", 132, 3350.0, 989.0)
BLACKWELL = Device("cuda", "a Blackwell GPU", "sm_100", 148, 8000.0, 2250.0)


def problem(activations: str | None, weight: str, device: Device, **changes: object) -> Problem:
    packed = quantized_weight(weight, 32, 128)
    asked = problem_of("linear", 4096, packed, torch.bfloat16, activations)
    return replace(asked, **({"n": 8192, "k": 8192, "device": device} | changes))  # type: ignore[arg-type]


SCALED = [kernel for kernel in list_kernels("linear") if "scaled" in kernel.name]


def test_kernels_of_activations_refuse_everything_else() -> None:
    assert {kernel.name for kernel in SCALED} == {
        "triton_scaled_fp8", "triton_scaled_int8", "triton_scaled_mx", "triton_scaled_nvfp4",
        "torch_scaled_fp8", "torch_scaled_fp8_blocks", "torch_scaled_mxfp8", "torch_scaled_nvfp4",
        "cuda_scaled_nvfp4", "cuda_scaled_mx", "cuda_sm90_scaled_fp8",
    }  # fmt: skip
    for kernel in SCALED:
        assert "none are asked for" in str(kernel.supports(problem(None, "fp8-e4m3", HOPPER)))
        assert kernel.supports(problem("int8", "int4-g128", BLACKWELL)) is not None


REFUSALS = (
    ("triton_scaled_fp8", problem("nvfp4", "nvfp4", HOPPER), "takes other activations than nvfp4"),
    ("triton_scaled_fp8", problem("fp8", "int4-g128", HOPPER), "multiplied with fp8 weights, not with int4-g128"),
    ("triton_scaled_fp8", problem("fp8", "fp8-e4m3", HOPPER, dtype=torch.float64), "not in float64"),
    ("triton_scaled_fp8", problem("fp8", "fp8-e4m3", HOPPER, layout="fragments"), "reads the rows layout"),
    ("triton_scaled_fp8", problem("fp8", "fp8-e4m3", replace(HOPPER, arch="sm_75")), "8.0 or newer"),
    ("triton_scaled_fp8", problem("fp8-e5m2", "fp8-e4m3", HOPPER), "takes other activations"),
    ("triton_scaled_int8", problem("int8", "int8-g64", HOPPER), "one scale per channel or tensor"),
    ("triton_scaled_int8", problem("int8", "int8-channel", HOPPER, k=1 << 17), "holds K up to 65536"),
    ("triton_scaled_nvfp4", problem("nvfp4-46", "nvfp4", HOPPER), "no kernel quantizes activations to nvfp4-46"),
    ("triton_scaled_nvfp4", problem("nvfp4", "mxfp4", HOPPER), "nvfp4 weights, not with mxfp4"),
    ("triton_scaled_nvfp4", problem("nvfp4", "nvfp4", HOPPER, batch_invariant=True), "one scale for the whole batch"),
    ("triton_scaled_mx", problem("mxfp8", "fp8-e4m3", HOPPER), "mxfp4 and mxfp8 weights, not with fp8-e4m3"),
    ("torch_scaled_fp8", problem("fp8", "fp8-e4m3-block128", HOPPER), "takes fp8 activations and weights of one scale"),
)


@pytest.mark.parametrize(("kernel", "asked", "words"), REFUSALS, ids=lambda value: value if isinstance(value, str) else "")
def test_refusals_say_why(kernel: str, asked: Problem, words: str) -> None:
    assert words in str(get_kernel(kernel).supports(asked))


TORCH_REFUSALS = (
    ("torch_scaled_fp8", problem("fp8", "fp8-e4m3", device_facts("cpu")), "needs a CUDA device"),
    ("torch_scaled_fp8", problem("fp8", "fp8-e4m3", replace(HOPPER, arch="sm_80")), "needs sm_89 or newer"),
    ("torch_scaled_fp8", problem("fp8", "fp8-e4m3", HOPPER, n=8200), "N in multiples of 16"),
    ("torch_scaled_fp8", problem("fp8", "fp8-e4m3", HOPPER, dtype=torch.float16), "bf16 alone"),
    ("torch_scaled_fp8", problem("fp8", "fp8-e4m3", HOPPER, dtype=torch.float32), "gives fp16 or bf16"),
    ("torch_scaled_fp8", problem("fp8", "fp8-e4m3", HOPPER, batch_invariant=True), "batch_invariant"),
    ("torch_scaled_fp8_blocks", problem("fp8-g128", "fp8-block128", BLACKWELL), "needs sm_90 for"),
    ("torch_scaled_fp8_blocks", problem("fp8-g128", "fp8-block128", HOPPER, k=4112), "K in multiples of 128"),
    ("torch_scaled_mxfp8", problem("mxfp8", "mxfp8", HOPPER), "needs sm_100 or newer"),
    ("torch_scaled_nvfp4", problem("nvfp4", "nvfp4", BLACKWELL, k=4112), "K of 32"),
)


@pytest.mark.parametrize(
    ("kernel", "asked", "words"), TORCH_REFUSALS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_torch_refusals_say_why(kernel: str, asked: Problem, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert words in str(get_kernel(kernel).supports(asked))


@pytest.mark.parametrize(
    ("activations", "weight", "device", "kernels"),
    [
        ("fp8", "fp8-e4m3", HOPPER, {"triton_scaled_fp8", "torch_scaled_fp8"}),
        ("fp8-g128", "fp8-e4m3-block128", HOPPER, {"triton_scaled_fp8", "torch_scaled_fp8_blocks"}),
        ("int8", "int8-channel", HOPPER, {"triton_scaled_int8"}),
        ("nvfp4", "nvfp4", BLACKWELL, {"triton_scaled_nvfp4", "torch_scaled_nvfp4"}),
        ("mxfp8", "mxfp8", BLACKWELL, {"triton_scaled_mx", "torch_scaled_mxfp8"}),
        ("mxfp8", "mxfp4", BLACKWELL, {"triton_scaled_mx"}),
    ],
)
def test_large_batches_take_native_kernels(
    activations: str, weight: str, device: Device, kernels: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cuda_module, "refusal", lambda sources, capability: "not looked at here")
    asked = problem(activations, weight, device)
    costs = {choice.kernel: choice.cost for choice in choices(asked) if choice.kernel in kernels}
    assert set(costs) == kernels
    assert all(cost is not None and 0 < cost < math.inf for cost in costs.values())
    assert select(asked).name in kernels


@pytest.mark.skipif(not interpreting(), reason="says what holds under Triton's interpreter")
def test_the_interpreter_is_never_chosen_by_itself() -> None:
    for activations, weight in PAIRS:
        assert select(problem(activations, weight, device_facts("cpu"))).backend not in ("triton", "torch")


# torch's own product


def meta_weight(spec: str, n: int, k: int) -> QuantizedTensor:
    fmt = get_format(spec)
    specs = fmt.specs(n, k)
    parts = {name: torch.empty(part.shape, dtype=part.dtype, device="meta") for name, part in specs.items()}
    return QuantizedTensor(fmt, (n, k), parts)


CALLS = (
    ("fp8", "fp8-e4m3", torch_scaled.row_operands, {}),
    ("fp8", "fp8-e4m3-tensor", torch_scaled.row_operands, {}),
    ("fp8-e4m3-tensor", "fp8-e4m3-tensor", torch_scaled.row_operands, {}),
    ("fp8-g128", "fp8-e4m3-block128", torch_scaled.block_operands, {"by_column": True}),
    ("fp8-g128", "fp8-e4m3-g128", torch_scaled.block_operands, {"by_column": True}),
    ("mxfp8", "mxfp8", torch_scaled.mx_operands, {"swizzled": True}),
    ("nvfp4", "nvfp4", torch_scaled.nvfp4_operands, {"swizzled": True}),
)


@pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "Meta"),
    reason="this torch does not check scaled_mm's arguments without a GPU",
)
@pytest.mark.parametrize(("activations", "weight", "operands", "options"), CALLS, ids=lambda value: str(value)[:12])
def test_torch_accepts_the_operands(activations: str, weight: str, operands: object, options: dict[str, bool]) -> None:
    """torch checks shapes, strides, dtypes and recipes on tensors without storage."""
    a = empty_activations(get_format(activations), 12, 1152, "meta", **options)
    prepared = operands(a, meta_weight(weight, 256, 1152))  # type: ignore[operator]
    bias = torch.empty(256, dtype=torch.bfloat16, device="meta")
    y = prepared.multiply(bias, torch.bfloat16)
    assert y.shape == (12, 256)
    assert y.dtype == torch.bfloat16


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ACTIVATIONS)
def test_quantizers_at_real_size_on_a_gpu(spec: str) -> None:
    fmt = get_format(spec)
    for dtype in DTYPES:
        x = awkward(517, 4112, dtype, fmt)
        assert_same_parts(rows_parts(quantize_activations(x, fmt, CAPABILITY)), law(x, fmt))
        if fmt.scale.kind != "float":
            assert_same_parts(rows_parts(quantize_activations(x, fmt, CAPABILITY, swizzled=True)), law(x, fmt))


@pytest.mark.gpu
@pytest.mark.parametrize(("activations", "weight"), PAIRS)
def test_products_at_real_size_on_a_gpu(activations: str, weight: str) -> None:
    packed, fmt = quantized_weight(weight, 1040, 1568), get_format(activations)
    for m in (1, 16, 33, 64, 500):
        for dtype in DTYPES:
            x = random(m, 1568, dtype, seed=m)
            expected = expected_product(x, fmt, packed)
            for choice in choices(problem_of("linear", m, packed, dtype, activations)):
                if choice.refusal is None and choice.backend in ("triton", "torch"):
                    assert_close(run("linear", x, packed, activations=activations, kernel=choice.kernel), expected)
