"""GGUF: every type's blocks against the `gguf` package's dequantizer, MXFP4 and plain blocks against its quantizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.checkpoints.gguf import read_blocks, write_blocks
from quantlib.checkpoints.gguf_blocks import BLOCK_TYPES
from quantlib.errors import CheckpointError
from quantlib.formats import get_format
from quantlib.testing import assert_same_bits, random_weight

gguf = pytest.importorskip("gguf", reason="the oracle package `gguf` is not installed (pip install quantlib-kernels[oracles])")

HALVES = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "iq4_nl": (0,), "q2_k": (80, 82), "q3_k": (108,),
    "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
}  # fmt: skip
"""Where the fp16 numbers of each type's block stand."""


def quantized(spec: str, weight: torch.Tensor, **options: object) -> dict[str, torch.Tensor]:
    fmt = get_format(spec)
    scales = fmt.fit(weight, **options)  # type: ignore[arg-type]
    return {"codes": fmt.encode(weight, scales), **scales}


def oracle_dequantize(name: str, data: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[name]))


def oracle_quantize(name: str, weight: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[name]))


def random_blocks(spec: str, n: int, count: int, seed: int) -> torch.Tensor:
    """Random bytes whose fp16 numbers are any finite numbers, subnormals and both zeros among them."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, size=(n, count, BLOCK_TYPES[spec].nbytes), dtype=np.uint8)
    for start in HALVES[spec]:
        halves = rng.integers(0, 1 << 16, size=(n, count), dtype=np.uint16)
        finite = np.where((halves & 0x7C00) == 0x7C00, halves & 0x83FF, halves).astype(np.uint16)
        blocks[..., start : start + 2] = finite[..., None].view(np.uint8)
    return torch.from_numpy(blocks.reshape(n, count * BLOCK_TYPES[spec].nbytes))


@pytest.mark.parametrize("spec", BLOCK_TYPES)
@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 4), count=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_random_blocks_survive_reading_and_writing_and_decode_bit_exactly(spec: str, n: int, count: int, seed: int) -> None:
    fmt, k = get_format(spec), BLOCK_TYPES[spec].weights * count
    data = random_blocks(spec, n, count, seed)
    parts = read_blocks(fmt, data, k)
    fmt.check(parts, n, k)
    assert_same_bits(write_blocks(fmt, parts, n, k), data)
    if n:
        assert_same_bits(fmt.decode(parts, n, k), oracle_dequantize(BLOCK_TYPES[spec].name, data))


@pytest.mark.parametrize("spec", BLOCK_TYPES)
@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_weights_decode_in_gguf_as_they_do_here(spec: str, search: str, dtype: torch.dtype) -> None:
    n, k = 37, 768
    weight = random_weight(n, k, dtype)
    weight[3, 256:300] = 0
    weight[5] = 0
    fmt, parts = get_format(spec), quantized(spec, weight, search=search)
    data = write_blocks(fmt, parts, n, k)
    assert (
        data.numel() == fmt.nbytes(n, k) == n * gguf.quant_shape_to_byte_shape((k,), gguf.GGMLQuantizationType[spec.upper()])[0]
    )
    assert_same_bits(fmt.decode(parts, n, k), oracle_dequantize(BLOCK_TYPES[spec].name, data))
    back = read_blocks(fmt, data, k)
    for name, part in parts.items():
        assert_same_bits(back[name], part)


def test_blocks_that_do_not_fit_are_refused_by_name() -> None:
    fmt = get_format("q4_k")
    with pytest.raises(CheckpointError, match=r"blk\.0: rows of 300 weights.*256"):
        read_blocks(fmt, torch.zeros(2, 144, dtype=torch.uint8), 300, "blk.0")
    with pytest.raises(CheckpointError, match=r"\[N, 288\].*uint8 \[2, 144\]"):
        read_blocks(fmt, torch.zeros(2, 144, dtype=torch.uint8), 512)
    with pytest.raises(CheckpointError, match=r"nf4 has no GGUF blocks.*q4_0, .*q6_k"):
        read_blocks(get_format("nf4"), torch.zeros(2, 144, dtype=torch.uint8), 256)
    with pytest.raises(CheckpointError, match="rows of 130"):
        write_blocks(fmt, quantized("q4_k", torch.randn(2, 130)), 2, 130)


def mxfp4_codes(data: torch.Tensor, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """GGUF MXFP4 blocks -> scales [n, k/32] and codes [n, k]: an exponent and 16 bytes each, first half in the low nibbles."""
    blocks = data.view(n, k // 32, 17)
    return blocks[..., 0], torch.cat([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], dim=-1).reshape(n, k)


def test_mxfp4_floor_equals_gguf_but_for_ties_and_negative_zeros() -> None:
    """Same exponents everywhere. gguf takes the first nearest value in table order: ties go to the lower code (we take the even
    one), and a weight that rounds to zero from below gets +0 (we keep the sign)."""
    n, k = 256, 1024
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    weight[0, :64] = 0
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    weight[1, :32] = torch.cat([ties, -ties, torch.full((18,), 4.0)])
    fmt, parts = get_format("mxfp4"), quantized("mxfp4", weight)
    scales, theirs = mxfp4_codes(oracle_quantize("MXFP4", weight), n, k)
    assert torch.equal(parts["scales"], scales)
    ours = torch.stack([parts["codes"] & 15, parts["codes"] >> 4], dim=-1).view(n, k)
    x = weight / fmt.effective(parts).scale.repeat_interleave(32, dim=1)
    tied = torch.isin(x.abs(), ties)
    negative_zero = (ours == 8) & (theirs == 0)
    assert torch.equal((ours != theirs) & ~negative_zero, (ours != theirs) & tied & ~negative_zero)
    assert negative_zero.sum() > 1000
    assert not (theirs == 8).any()
    assert ours[1, :7].tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert theirs[1, :7].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_mxfp4_error_on_gaussians_is_exactly_that_of_gguf() -> None:
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    fmt = get_format("mxfp4")
    decoded = fmt.decode(quantized("mxfp4", weight), 1024, 1024)
    assert torch.equal(decoded, oracle_dequantize("MXFP4", oracle_quantize("MXFP4", weight)))


def test_full_range_int4_of_group_32_is_q4_0() -> None:
    """The same scales; the same codes except next to a rounding boundary: Q4_0 divides by the scale before rounding it."""
    n, k = 64, 1024
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    parts = quantized("int4-g32-full", weight)
    blocks = oracle_quantize("Q4_0", weight).view(n, k // 32, 18)
    theirs = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    assert torch.equal(parts["scales"], theirs)
    codes = torch.cat([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], dim=-1).reshape(n, k)
    ours = torch.stack([parts["codes"] & 15, parts["codes"] >> 4], dim=-1).view(n, k)
    x = weight / parts["scales"].float().repeat_interleave(32, dim=1)
    distance = ((x - x.floor()) - 0.5).abs()
    assert bool((distance[ours != codes] < 8 * 2**-11).all())
    assert (ours != codes).float().mean() < 2e-3


def test_searched_int8_beats_q8_0() -> None:
    weight = torch.randn(32, 1024, generator=torch.Generator().manual_seed(2))
    fmt = get_format("int8-g32")
    ours = fmt.decode(quantized("int8-g32", weight, search="mse"), 32, 1024)
    theirs = oracle_dequantize("Q8_0", oracle_quantize("Q8_0", weight))
    assert (ours - weight).square().mean() < (theirs - weight).square().mean()
