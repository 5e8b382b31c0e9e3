"""The Triton kernels of the rows layout decode by the law, bit for bit, and multiply within the limits of their dtype, for
every kind of format.

Without a GPU they run in Triton's interpreter, which conftest.py asks for before Triton is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from quantlib.devices import Device, device_facts
from quantlib.dispatch import choices, problem_of, run, select
from quantlib.formats import Format, get_format
from quantlib.formats.block import Block
from quantlib.formats.codecs import Affine, Minifloat, Table
from quantlib.formats.scales import E8M0Scale, FloatScale, SuperScale
from quantlib.kernels import Problem, list_kernels
from quantlib.kernels.triton_launch import import_failure, interpreting
from quantlib.tensor import QuantizedTensor
from quantlib.testing import assert_close, assert_same_bits, random_weight
from tests.cases import DTYPES, FORMATS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def quantized(fmt: Format, n: int, k: int) -> QuantizedTensor:
    weight = random_weight(n, k)
    parts = fmt.fit(weight)
    return QuantizedTensor(fmt, (n, k), {"codes": fmt.encode(weight, parts), **parts}).to(DEVICE)


def identity(k: int, dtype: torch.dtype) -> Tensor:
    return torch.eye(k, dtype=dtype, device=DEVICE)


def assert_decodes(weight: QuantizedTensor, dtype: torch.dtype) -> None:
    """x = eye(K) gives the decoded weight itself; adding zero folds -0, which no sum keeps."""
    k = weight.shape[1]
    law = weight.dequantize(dtype)
    assert_same_bits(
        run("dequantize", torch.empty(0, dtype=dtype, device=DEVICE), weight, kernel="triton_rows_dequantize"), law
    )
    assert_same_bits(run("linear", identity(k, dtype), weight, kernel="triton_rows_linear").T.contiguous(), law + 0.0)


def expected_product(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ weight.dequantize(x.dtype).double().T
    return y if bias is None else y + bias.double()


def test_kernels_can_be_imported() -> None:
    assert import_failure() is None


@pytest.mark.parametrize("spec", FORMATS)
def test_identity_gives_the_decoded_weight(spec: str) -> None:
    weight = quantized(get_format(spec), 17, 130)
    for dtype in DTYPES:
        assert_decodes(weight, dtype)


@pytest.mark.parametrize("spec", ["int3-g64-asym", "nf4-dq", "fp8-e4m3-block128", "nvfp4", "q4_k", "q6_k"])
@pytest.mark.parametrize(("n", "k"), [(1, 16), (3, 7), (131, 264), (5, 576)])
def test_identity_off_the_tiles(spec: str, n: int, k: int) -> None:
    assert_decodes(quantized(get_format(spec), n, k), torch.bfloat16)


CUSTOM = (
    Format("three-values", Table((-1.5, -0.25, 0.5, 3.0)), Block(1, 48), FloatScale(torch.bfloat16)),
    Format("table256", Table(tuple((i - 100) / 7 for i in range(256))), Block(1, None), FloatScale(torch.float32)),
    Format("int5", Affine(5), Block(1, 24), FloatScale(torch.float16)),
    Format("int7-minimum", Affine(7, signed=False), Block(1, 40), FloatScale(torch.float16, has_minimum=True), zero="minimum"),
    Format("int1", Affine(1), Block(1, 8), FloatScale(torch.float16)),
    Format("e3m2", Minifloat(3, 2), Block(1, 32), E8M0Scale()),
    Format("blocks2d-asym", Affine(4, signed=False), Block(16, 32), FloatScale(torch.float16), zero="integer"),
    Format("columns2d", Affine(8), Block(None, 64), FloatScale(torch.float32)),
    Format("super5", Affine(2), Block(1, 16), SuperScale(bits=5, count=8, signed=True)),
)
"""Values of the known kinds that no registered format has: odd widths and blocks, 256-entry tables, float minima, 2-D zeros."""


@pytest.mark.parametrize("fmt", CUSTOM, ids=str)
def test_a_format_of_known_kinds_needs_no_kernel(fmt: Format) -> None:
    weight = quantized(fmt, 19, 200)
    for dtype in (torch.float32, torch.bfloat16):
        assert_decodes(weight, dtype)


def every_code(spec: str, fill_scales: int | None) -> QuantizedTensor:
    """A weight that holds all 256 codes, and scales of one given code."""
    fmt = get_format(spec)
    weight = quantized(fmt, 8, 256)
    weight.parts["codes"].copy_(torch.arange(256, dtype=torch.uint8).repeat(8, 1)[:, : weight.parts["codes"].shape[1]])
    if fill_scales is not None:
        weight.parts["scales"].fill_(fill_scales)
    return weight


@pytest.mark.parametrize(
    ("spec", "scale"), [("fp8-e4m3", None), ("fp8-e5m2", None), ("mxfp8", 0), ("mxfp8", 1), ("mxfp4", 255), ("nvfp4", 0x7F)]
)
def test_extreme_codes_decode_by_the_law(spec: str, scale: int | None) -> None:
    """NaN, infinity, subnormals and the smallest exponents, which no encoder writes but a checkpoint may hold."""
    weight = every_code(spec, scale)
    law = weight.dequantize(torch.float32)
    found = run("dequantize", torch.empty(0, device=DEVICE), weight, kernel="triton_rows_dequantize")
    assert torch.equal(found.isnan(), law.isnan())
    assert_same_bits(found.nan_to_num(nan=0.0), law.nan_to_num(nan=0.0))


PRODUCTS = (*((m, torch.bfloat16) for m in (1, 5, 17, 33, 65)), *((33, dtype) for dtype in DTYPES))


@pytest.mark.parametrize(("m", "dtype"), dict.fromkeys(PRODUCTS), ids=str)
@pytest.mark.parametrize("spec", ["int4-g32-asym", "nf4-dq", "q4_k"])
def test_products_stay_within_the_limit(spec: str, m: int, dtype: torch.dtype) -> None:
    n, k = 70, 200
    weight = quantized(get_format(spec), n, k)
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator).to(DEVICE, dtype)
    bias = torch.randn(n, generator=generator).to(DEVICE, dtype)
    assert_close(run("linear", x, weight, bias, kernel="triton_rows_linear"), expected_product(x, weight, bias))


@pytest.mark.parametrize("spec", FORMATS)
def test_products_of_every_format(spec: str) -> None:
    weight = quantized(get_format(spec), 33, 130)
    x = torch.randn(7, 130, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.float16)
    assert_close(run("linear", x, weight, kernel="triton_rows_linear"), expected_product(x, weight))


def test_strides_of_x_do_not_matter() -> None:
    kernel = "triton_rows_linear"
    weight = quantized(get_format("int4-g32-asym"), 18, 72)
    wide = torch.randn(6, 144, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for x in (wide[:3, ::2], wide[::2, :72], wide[:3, 72:], wide[:, :3].T.repeat(1, 12), wide[:1, :72].expand(3, 72)):
        assert_same_bits(run("linear", x, weight, kernel=kernel), run("linear", x.clone().contiguous(), weight, kernel=kernel))


def test_an_empty_batch_gives_an_empty_result() -> None:
    kernel = "triton_rows_linear"
    weight = quantized(get_format("nf4"), 12, 64)
    y = run("linear", torch.empty(0, 64, dtype=torch.bfloat16, device=DEVICE), weight, kernel=kernel)
    assert y.shape == (0, 12)
    assert y.dtype == torch.bfloat16


def test_numbers_outside_of_k_do_not_leak_in() -> None:
    """A NaN that lies right behind a row of x, where a masked lane would read it, changes nothing."""
    weight = quantized(get_format("int4-g128"), 9, 40)
    storage = torch.full((5, 64), float("nan"), device=DEVICE)
    storage[:, :40] = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    x = storage[:, :40]
    assert_close(run("linear", x, weight, kernel="triton_rows_linear"), expected_product(x, weight))


def test_dgrad_is_the_product_with_the_decoded_weight() -> None:
    weight = quantized(get_format("nvfp4"), 24, 80)
    dy = torch.randn(5, 24, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    assert_close(run("dgrad", dy, weight, kernel="triton_rows_dgrad"), dy.double() @ weight.dequantize().double())


def test_activations_are_rounded_before_the_product() -> None:
    weight = quantized(get_format("nvfp4"), 24, 80)
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    expected = run("linear", x, weight, activations="mxfp8", kernel="reference_linear")
    assert_close(run("linear", x, weight, activations="mxfp8", kernel="triton_rows_linear"), expected.double())


def test_batch_invariant_rows_do_not_depend_on_the_batch() -> None:
    weight = quantized(get_format("nf4"), 20, 96)
    x = torch.randn(70, 96, generator=torch.Generator().manual_seed(6)).to(DEVICE, torch.bfloat16)
    whole = run("linear", x, weight, kernel="triton_rows_linear", batch_invariant=True)
    for rows in (slice(0, 1), slice(3, 20)):
        assert_same_bits(run("linear", x[rows], weight, kernel="triton_rows_linear", batch_invariant=True), whole[rows])


def triton_problems(device: Device) -> Iterator[Problem]:
    weight = quantized(get_format("int4"), 16, 128)
    for operation in ("linear", "dgrad", "dequantize"):
        yield replace(problem_of(operation, 1, weight, torch.float32), device=device)


@pytest.mark.skipif(not interpreting(), reason="says what holds under Triton's interpreter")
def test_the_interpreter_is_never_chosen_by_itself() -> None:
    for problem in triton_problems(device_facts("cpu")):
        assert select(problem).backend != "triton"


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    old = Device("cuda", "an old GPU", "sm_75", 40, 300.0, 60.0)
    for device, words in ((device_facts("cpu"), "needs a CUDA device"), (old, "8.0 or newer")):
        for problem in triton_problems(device):
            refusals = [choice.refusal for choice in choices(problem) if choice.kernel.startswith("triton_rows")]
            assert refusals
            assert all(refusal is not None and words in refusal for refusal in refusals)
    doubled = [replace(problem, dtype=torch.float64, device=replace(old, arch="sm_90")) for problem in triton_problems(old)]
    for problem in doubled:
        for kernel in list_kernels(problem.operation):
            if kernel.name.startswith("triton_rows"):
                assert "not in float64" in str(kernel.supports(problem))


@pytest.mark.gpu
@pytest.mark.parametrize("spec", FORMATS)
def test_products_at_real_size_on_a_gpu(spec: str) -> None:
    weight = quantized(get_format(spec), 1024, 1536)
    for m in (1, 4, 16, 32, 64, 512):
        for dtype in DTYPES:
            x = torch.randn(m, 1536, generator=torch.Generator().manual_seed(m)).to(DEVICE, dtype)
            assert_close(run("linear", x, weight, kernel="triton_rows_linear"), expected_product(x, weight))


@pytest.mark.gpu
@pytest.mark.parametrize("spec", FORMATS)
def test_identity_at_real_size_on_a_gpu(spec: str) -> None:
    weight = quantized(get_format(spec), 777, 1160)
    for dtype in DTYPES:
        assert_decodes(weight, dtype)
