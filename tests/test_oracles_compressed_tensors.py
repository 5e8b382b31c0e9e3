"""Integer formats against compressed-tensors: scales, codes, packed int32 words; FP8 blocks; NVFP4's order of operations."""

from __future__ import annotations

import pytest
import torch

from quantlib.formats import get_format
from quantlib.formats.packing import pack, unpack
from quantlib.testing import assert_same_bits, random_weight

_REASON = "the oracle compressed-tensors is not installed (pip install quantlib-kernels[oracles])"
args = pytest.importorskip("compressed_tensors.quantization", reason=_REASON)
helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers", reason=_REASON)
packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers", reason=_REASON)


def quantized(spec: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    fmt = get_format(spec)
    scales = fmt.fit(weight)
    return {"codes": fmt.encode(weight, scales), **scales}


def words(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [N, B] as the int32 words that hold them on a little-endian machine."""
    return torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4)).contiguous().view(torch.int32)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("k", [256, 264])
def test_packed_bytes_are_those_of_pack_to_int32(bits: int, k: int) -> None:
    """Codes are value + 2^(bits-1), low first, so whole-byte widths pack to the same bytes."""
    half = 1 << (bits - 1)
    values = torch.randint(-half, half, (33, k), dtype=torch.int8, generator=torch.Generator().manual_seed(bits))
    ours = words(pack((values.to(torch.int16) + half).to(torch.uint8), bits))
    assert_same_bits(ours, packing.pack_to_int32(values, bits))


@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, 64), (4, 32), (8, 128), (8, None)], ids=str)
def test_symmetric_scales_and_codes_equal_compressed_tensors(bits: int, group_size: int | None) -> None:
    n, k = 64, 512
    weight = random_weight(n, k, seed=bits)
    spec = f"int{bits}-{'channel' if group_size is None else f'g{group_size}'}-fp32"
    parts = quantized(spec, weight)
    blocks = weight.view(n, -1, group_size or k)
    strategy = {"strategy": "channel"} if group_size is None else {"strategy": "group", "group_size": group_size}
    settings = args.QuantizationArgs(num_bits=bits, type="int", symmetric=True, **strategy)
    scale, zero = helpers.calculate_qparams(blocks.amin(-1), blocks.amax(-1), settings)
    assert_same_bits(parts["scales"], scale)
    theirs = args.quantize(weight, scale, zero, settings, dtype=torch.int8)
    assert_same_bits(words(parts["codes"]), packing.pack_to_int32(theirs, bits))


@pytest.mark.parametrize("group_size", [32, 128])
def test_asymmetric_scales_equal_compressed_tensors_and_zeros_differ_only_next_to_a_tie(group_size: int) -> None:
    n, k = 64, 512
    weight = random_weight(n, k, seed=6)
    parts = quantized(f"int4-g{group_size}-asym-fp32", weight)
    blocks = weight.view(n, -1, group_size)
    settings = args.QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=group_size)
    scale, zero = helpers.calculate_qparams(blocks.amin(-1), blocks.amax(-1), settings)
    assert_same_bits(parts["scales"], scale)
    # Their zero is rounded after -8 is added, ours before: the same number but for the parity of a tie.
    exact = -blocks.amin(-1).double() / scale.double()
    near_tie = (exact - exact.floor() - 0.5).abs() < 1e-5
    theirs = zero.to(torch.int16) + 8
    assert not ((parts["zeros"] != theirs) & ~near_tie).any()
    codes = args.quantize(weight, scale, zero, settings, dtype=torch.int8).to(torch.int16) + 8
    same = (parts["zeros"] == theirs).repeat_interleave(group_size, dim=1)
    ours = unpack(parts["codes"], 4, k).to(torch.int16)
    # They round w/scale + zero in one step as we do.
    assert torch.equal(ours[same], codes[same])


def test_fp8_blocks_equal_the_checkpoint_convention() -> None:
    """weight_scale_inv of HF's fp8 checkpoints: [ceil(N/128), ceil(K/128)]; it MULTIPLIES the codes in spite of its name."""
    n, k = 200, 300
    weight = random_weight(n, k, seed=7)
    fmt, parts = get_format("fp8-block128"), quantized("fp8-block128", weight)
    assert parts["scales"].shape == (2, 3)
    padded = torch.nn.functional.pad(weight, (0, 84, 0, 56)).view(2, 128, 3, 128)
    scale = padded.abs().amax(dim=(1, 3)) / 448
    assert_same_bits(parts["scales"], scale)
    expanded = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
    codes = (weight / expanded).to(torch.float8_e4m3fn)
    assert_same_bits(parts["codes"][:, :k], codes.view(torch.uint8))
    assert_same_bits(fmt.decode(parts, n, k), codes.float() * expanded)


def test_nvfp4_scales_of_compressed_tensors_differ_in_the_order_of_operations_and_nowhere_else() -> None:
    """They keep the reciprocal 448*6/absmax as global scale and multiply by it: an E4M3 code differs, by one, only where the
    exact quotient lies within an fp32 rounding or two of a tie; less than one scale in a thousand."""
    n, k = 512, 1024
    weight = random_weight(n, k, seed=8)
    parts = quantized("nvfp4", weight)
    blocks = weight.view(n, -1, 16)
    settings = args.QuantizationArgs(
        num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    inverse = (448 * 6) / weight.abs().max().reshape(1)
    scale, _ = helpers.calculate_qparams(blocks.amin(-1), blocks.amax(-1), settings, global_scale=inverse)
    theirs = scale.to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int16)
    step = (parts["scales"].to(torch.int16) - theirs).abs()
    assert int(step.max()) <= 1
    assert int((step > 0).sum()) <= step.numel() // 1000
