"""HQQ: the error that it lowers, for every format, and what it must never do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import quantlib
from quantlib.algorithms import HQQ, RTN, get_algorithm
from quantlib.formats.packing import unpack
from quantlib.testing import assert_same_bits
from tests.cases import FORMATS, SHAPES

P = 0.7
COARSE = ("fp8", "mxfp")
"""Eight-bit floats lose nothing by their scale, and powers of two are too far apart to follow."""


def heavy_tailed(n: int, k: int, seed: int = 0) -> Tensor:
    """Weights [n, k] with outliers (Student's t with 4 degrees of freedom)."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(5, n, k, generator=generator)
    return 0.02 * normal[0] / normal[1:].square().mean(0).sqrt()


def lp_errors(fmt: quantlib.Format, weight: Tensor, found: quantlib.QuantizedTensor) -> Tensor:
    """fp64 [groups]: sum |w - q|^p over the blocks that share a super-scale."""
    k = weight.shape[1]
    error = (found.dequantize(torch.float32) - weight).abs().double().pow(P)
    padded = torch.nn.functional.pad(error, (0, fmt.padded(k) - k))
    per_block = fmt.block.split(padded).sum(-1)
    return per_block.view(len(per_block), -1, fmt.scale.count).sum(-1)


@pytest.mark.parametrize("spec", FORMATS)
def test_no_block_is_worse_than_the_rule_of_absmax(spec: str) -> None:
    fmt = quantlib.get_format(spec)
    weight = heavy_tailed(48, 768)
    found = HQQ(lp_norm=P).quantize(weight, fmt)
    fmt.check(found.parts, 48, 768)
    before, after = lp_errors(fmt, weight, RTN().quantize(weight, fmt)), lp_errors(fmt, weight, found)
    if "dq" in spec.split("-"):  # the scales are quantized together, so that one block's may grow by another's
        assert after.sum() < before.sum()
    else:
        assert bool((after <= before * (1 + 1e-9)).all())
    if not spec.startswith(COARSE):
        assert after.sum() < 0.996 * before.sum()


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_any_shape(spec: str, n: int, k: int) -> None:
    fmt = quantlib.get_format(spec)
    weight = heavy_tailed(n, k, seed=1)
    weight[0, : k // 2] = 0
    found = HQQ().quantize(weight.to(torch.bfloat16), fmt)
    fmt.check(found.parts, n, k)
    decoded = found.dequantize(torch.float32)
    assert decoded.isfinite().all()
    plain = RTN().quantize(weight.to(torch.bfloat16), fmt)
    weight = weight.to(torch.bfloat16).float()
    assert lp_errors(fmt, weight, found).sum() <= lp_errors(fmt, weight, plain).sum() * (1 + 1e-9)


@pytest.mark.parametrize("spec", ["int4-g128", "q4_k", "int2-g32-asym", "nf4", "fp8-e4m3-block128"])
def test_a_weight_in_slabs_is_the_weight_at_once(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantlib.formats import base

    fmt, weight = quantlib.get_format(spec), heavy_tailed(300, 512)
    whole = HQQ().quantize(weight, fmt)
    monkeypatch.setattr(base.Format.slabs, "__defaults__", (1 << 13,))
    assert len(fmt.slabs(weight)) > 1
    for part, bits in HQQ().quantize(weight, fmt).parts.items():
        assert_same_bits(bits, whole.parts[part])


def test_codes_do_not_depend_on_the_weights_size() -> None:
    fmt, weight = quantlib.get_format("int4-g64-fp32"), heavy_tailed(16, 256)
    small, large = HQQ().quantize(weight, fmt), HQQ().quantize(weight * 64, fmt)
    assert_same_bits(small.parts["codes"], large.parts["codes"])
    assert_same_bits(small.parts["scales"] * 64, large.parts["scales"])


def test_one_iteration_is_that_of_the_paper() -> None:
    """With one block and one step the minimum is the mean of w_q - (w - w_e) / scale, w_e by generalised shrinkage."""
    fmt = quantlib.Format(
        "test", quantlib.formats.codecs.Affine(4, signed=False), quantlib.formats.block.Block(1, 64),
        quantlib.formats.scales.FloatScale(torch.float32, has_minimum=True), zero="minimum",
    )  # fmt: skip
    weight = heavy_tailed(200, 64)
    start = RTN().quantize(weight, fmt)
    scale, minimum = start.parts["scales"], start.parts["minima"]
    steps = weight / scale
    codes = unpack(start.parts["codes"], 4, 64).float()
    error = steps - (codes - minimum / scale)
    size = error.abs()
    rest = error.sign() * (size - size ** (P - 1) / 10).clamp(min=0)
    expected = ((codes - (steps - rest)).mean(1, keepdim=True) * scale).clamp(min=0)
    found = HQQ(iters=1).quantize(weight, fmt)
    assert_same_bits(found.parts["scales"], scale)
    moved = (found.parts["minima"] != minimum)[:, 0]
    assert int(moved.sum()) > 20
    torch.testing.assert_close(found.parts["minima"][moved], expected[moved])


def test_it_has_a_name_and_needs_no_data() -> None:
    method = get_algorithm("hqq")
    assert method == HQQ()
    assert method.needs == "nothing"
    with pytest.raises(quantlib.QuantlibError, match="expected 0 < lp_norm <= 1"):
        HQQ(lp_norm=0)
    with pytest.raises(quantlib.ShapeError, match="up: 1 of 64 weights are NaN"):
        HQQ().quantize(torch.tensor([[float("nan")] + [1.0] * 63]), quantlib.get_format("nf4"), name="up")
