"""NVFP4 and MXFP4 (round-up exponents) against NVIDIA ModelOpt's tensors, byte for byte."""

from __future__ import annotations

import warnings

import pytest
import torch

from quantlib.formats import get_format
from quantlib.testing import assert_same_bits, random_weight

from .cases import DTYPES

_REASON = "the oracle nvidia-modelopt is not installed (without its dependencies, plus scipy, omegaconf and pulp<4)"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    nvfp4_tensor = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor", reason=_REASON, exc_type=ImportError)
    mxfp4_tensor = pytest.importorskip("modelopt.torch.quantization.qtensor.mxfp4_tensor", reason=_REASON, exc_type=ImportError)


def quantized(spec: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    fmt = get_format(spec)
    scales = fmt.fit(weight)
    return {"codes": fmt.encode(weight, scales), **scales}


def ties_of_e2m1(k: int) -> torch.Tensor:
    """A row whose blocks of 16 hold every E2M1 tie with both signs under an exact scale: 6 in each block."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    return torch.cat([ties, -ties, torch.tensor([6.0, -6.0])]).repeat(k // 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_nvfp4_codes_scales_and_global_equal_modelopt(dtype: torch.dtype, kind: str) -> None:
    weight = random_weight(129, 576, dtype, seed=1)
    if kind == "ties":
        weight[:8] = ties_of_e2m1(576).to(dtype)
        weight[8] = 1e-6
        weight[9, ::2] = 0
    theirs, scale, global_scale = nvfp4_tensor.NVFP4QTensor.quantize(weight.clone(), 16)
    parts = quantized("nvfp4", weight)
    assert_same_bits(parts["global_scale"], global_scale)
    assert_same_bits(parts["scales"], scale.view(torch.uint8))
    assert_same_bits(parts["codes"], theirs._quantized_data)
    decoded = get_format("nvfp4").decode(parts, 129, 576)
    again = theirs.dequantize(dtype=torch.float32, scale=scale, double_scale=global_scale, block_sizes={-1: 16})
    assert torch.equal(decoded, again)


def test_nvfp4_zero_block_takes_the_smallest_scale_where_modelopt_writes_one() -> None:
    """Writers are free here: every reader gets zeros from either. We store 2^-9, the smallest scale; modelopt 1.0."""
    weight = random_weight(4, 64, seed=2)
    weight[1, 16:32] = 0
    theirs, scale, _ = nvfp4_tensor.NVFP4QTensor.quantize(weight.clone(), 16)
    parts = quantized("nvfp4", weight)
    differ = parts["scales"] != scale.view(torch.uint8)
    assert differ.nonzero().tolist() == [[1, 1]]
    assert parts["scales"][1, 1].view(torch.float8_e4m3fn).float() == 2.0**-9
    assert scale[1, 1].float() == 1.0
    assert_same_bits(parts["codes"], theirs._quantized_data)
    assert not get_format("nvfp4").decode(parts, 4, 64)[1, 16:32].any()


def test_nvfp4_negative_zero_input_keeps_no_sign_in_either() -> None:
    weight = random_weight(2, 32, seed=3)
    weight[0, ::2] = -0.0
    theirs, _, _ = nvfp4_tensor.NVFP4QTensor.quantize(weight.clone(), 16)
    codes = quantized("nvfp4", weight)["codes"]
    assert_same_bits(codes, theirs._quantized_data)
    assert not (codes[0] & 15).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_ceil_equals_modelopt_but_for_ties_and_zeros(dtype: torch.dtype) -> None:
    """Same exponents. modelopt sends ties to the lower code (we: to the even one) and an exact zero to code 8, which is -0."""
    weight = random_weight(128, 512, dtype, seed=4)
    weight[0] = ties_of_e2m1(512).to(dtype)
    weight[1, ::3] = 0
    theirs, scale = mxfp4_tensor.MXFP4QTensor.quantize(weight.clone(), 32)
    fmt, parts = get_format("mxfp4-ceil"), quantized("mxfp4-ceil", weight)
    assert_same_bits(parts["scales"], scale.view(128, 16))
    ours, others = (torch.stack([c & 15, c >> 4], dim=-1).view(128, 512) for c in (parts["codes"], theirs._quantized_data))
    x = weight.float() / fmt.effective(parts).scale.repeat_interleave(32, dim=1)
    zero = weight == 0
    tied = torch.isin(x.abs(), torch.tensor([0.75, 1.75, 3.5]))
    assert torch.equal(ours != others, zero | tied)
    assert (ours[zero] == 0).all()
    assert (others[zero] == 8).all()
    assert torch.equal(ours[tied] - 1, others[tied])
