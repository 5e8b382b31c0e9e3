"""GGUF K-quant blocks <-> the parts of our rows layout, bit for bit in both directions.

A GGUF row is a run of blocks of 256 weights, each with its own scales inside; the rows layout keeps every kind of number in a
tensor of its own. No value changes on the way: codes, integer scales and fp16 super-scales are moved, never recomputed.

    q4_k, 144 bytes   d fp16 | dmin fp16 | 12 bytes: 8 six-bit scales, 8 six-bit minima | 128 bytes of nibbles
    q6_k, 210 bytes   128 bytes of low nibbles | 64 bytes of high bit pairs | 16 int8 scales | d fp16

Definition: block_q4_K and block_q6_K of ggml-common.h. Nothing here needs the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.errors import CheckpointError
from quantlib.formats.base import Format
from quantlib.formats.packing import pack, unpack
from quantlib.formats.scales import Parts

SUPER_BLOCK = 256
"""Weights per block of every K-quant."""


@dataclass(frozen=True)
class BlockType:
    """One GGUF type: its name there, the bytes of a block, and both directions between blocks [N, B, nbytes] and parts."""

    name: str
    nbytes: int
    to_parts: Callable[[Tensor], Parts]
    from_parts: Callable[[Parts, int], Tensor]


def read_blocks(fmt: Format, data: Tensor, k: int, name: str = "weight") -> Parts:
    """GGUF bytes uint8 [N, k/256 * bytes per block] -> the parts of a weight [N, k] in the rows layout.

    Raises CheckpointError where the format has no GGUF blocks, or the bytes are not those of rows of k weights.
    """
    kind, blocks = block_type(fmt, name), _blocks_per_row(fmt, k, name)
    if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] != blocks * kind.nbytes:
        raise CheckpointError(
            f"{name}: {kind.name} rows of {k} weights are uint8 [N, {blocks * kind.nbytes}], "
            f"found {str(data.dtype).removeprefix('torch.')} {list(data.shape)}"
        )
    return kind.to_parts(data.contiguous().view(data.shape[0], blocks, kind.nbytes))


def write_blocks(fmt: Format, parts: Parts, n: int, k: int, name: str = "weight") -> Tensor:
    """The parts of a weight [n, k] in the rows layout -> GGUF bytes uint8 [n, k/256 * bytes per block]; inverts `read_blocks`.

    Raises CheckpointError where the format has no GGUF blocks or k is no multiple of 256, ShapeError for wrong parts.
    """
    kind, blocks = block_type(fmt, name), _blocks_per_row(fmt, k, name)
    fmt.check(parts, n, k, name)
    return kind.from_parts(parts, blocks).reshape(n, blocks * kind.nbytes)


def block_type(fmt: Format, name: str = "weight") -> BlockType:
    """The GGUF type that holds a format. Raises CheckpointError where there is none."""
    if fmt.name not in BLOCK_TYPES:
        raise CheckpointError(f"{name}: {fmt.name} has no GGUF blocks; those that have: {', '.join(BLOCK_TYPES)}")
    return BLOCK_TYPES[fmt.name]


def _blocks_per_row(fmt: Format, k: int, name: str) -> int:
    if k % SUPER_BLOCK:
        raise CheckpointError(
            f"{name}: rows of {k} weights can't lie in {fmt.name} blocks of {SUPER_BLOCK}; choose a format with smaller blocks"
        )
    return k // SUPER_BLOCK


def _halves(blocks: Tensor, start: int) -> Tensor:
    """The fp16 number at byte `start` of blocks [N, B, nbytes] -> fp16 [N, B]."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).squeeze(-1)


def _half_bytes(numbers: Tensor) -> Tensor:
    """fp16 [N, B] -> uint8 [N, B, 2]."""
    return numbers.contiguous().unsqueeze(-1).view(torch.uint8)


# Q4_K


def _q4_k_to_parts(blocks: Tensor) -> Parts:
    n, count, _ = blocks.shape
    scales, minima = _unpack_six_bits(blocks[..., 4:16])
    # Byte i of each group of 32 holds weight i of one sub-block below and weight i of the next one above.
    nibbles = blocks[..., 16:].reshape(n, count, 4, 1, 32)
    codes = torch.cat([nibbles & 15, nibbles >> 4], dim=3)
    return {
        "codes": pack(codes.flatten(1), 4),
        "scales": pack(scales.flatten(1), 6),
        "minima": pack(minima.flatten(1), 6),
        "super_scales": _halves(blocks, 0),
        "super_minima": _halves(blocks, 2),
    }


def _q4_k_from_parts(parts: Parts, count: int) -> Tensor:
    n = parts["codes"].shape[0]
    codes = unpack(parts["codes"], 4, count * SUPER_BLOCK).reshape(n, count, 4, 2, 32)
    nibbles = (codes[..., 0, :] | codes[..., 1, :] << 4).reshape(n, count, 128)
    scales = unpack(parts["scales"], 6, count * 8).reshape(n, count, 8)
    minima = unpack(parts["minima"], 6, count * 8).reshape(n, count, 8)
    heads = [_half_bytes(parts["super_scales"]), _half_bytes(parts["super_minima"]), _pack_six_bits(scales, minima)]
    return torch.cat([*heads, nibbles], dim=-1)


def _unpack_six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes [..., 12] -> 8 scales and 8 minima of 6 bits, uint8 [..., 8] each.

    Bytes 0-3 and 4-7 hold scales and minima 0-3 in their low six bits; bytes 8-11 the low nibbles of scales (below) and minima
    (above) 4-7, whose high bit pairs sit on top of bytes 0-3 and 4-7.
    """
    first, second, low = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = torch.cat([first & 63, (low & 15) | (first >> 6) << 4], dim=-1)
    minima = torch.cat([second & 63, (low >> 4) | (second >> 6) << 4], dim=-1)
    return scales, minima


def _pack_six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """The inverse of `_unpack_six_bits`."""
    first = scales[..., :4] | (scales[..., 4:] >> 4) << 6
    second = minima[..., :4] | (minima[..., 4:] >> 4) << 6
    low = (scales[..., 4:] & 15) | (minima[..., 4:] & 15) << 4
    return torch.cat([first, second, low], dim=-1)


# Q6_K: weight 128 h + 32 j + l has its low nibble in byte 64 h + 32 (j % 2) + l, below for j < 2 and above for j >= 2, and its
# high bits in pair j of byte 32 h + l.


def _q6_k_to_parts(blocks: Tensor) -> Parts:
    n, count, _ = blocks.shape
    nibbles = blocks[..., :128].reshape(n, count, 2, 1, 2, 32)
    low = torch.cat([nibbles & 15, nibbles >> 4], dim=3).reshape(n, count, 2, 4, 32)
    pairs = blocks[..., 128:192].reshape(n, count, 2, 1, 32)
    high = torch.cat([pairs & 3, (pairs >> 2) & 3, (pairs >> 4) & 3, pairs >> 6], dim=3)
    # int8 to offset binary: flipping the sign bit adds 128.
    scales = blocks[..., 192:208] ^ 128
    return {
        "codes": pack((low | high << 4).flatten(1), 6),
        "scales": pack(scales.flatten(1), 8),
        "super_scales": _halves(blocks, 208),
    }


def _q6_k_from_parts(parts: Parts, count: int) -> Tensor:
    n = parts["codes"].shape[0]
    codes = unpack(parts["codes"], 6, count * SUPER_BLOCK).reshape(n, count, 2, 4, 32)
    low, high = codes & 15, codes >> 4
    nibbles = (low[:, :, :, :2] | low[:, :, :, 2:] << 4).reshape(n, count, 128)
    pairs = high[:, :, :, 0] | high[:, :, :, 1] << 2 | high[:, :, :, 2] << 4 | high[:, :, :, 3] << 6
    scales = unpack(parts["scales"], 8, count * 16).reshape(n, count, 16) ^ 128
    return torch.cat([nibbles, pairs.reshape(n, count, 64), scales, _half_bytes(parts["super_scales"])], dim=-1)


BLOCK_TYPES: dict[str, BlockType] = {
    "q4_k": BlockType("Q4_K", 144, _q4_k_to_parts, _q4_k_from_parts),
    "q6_k": BlockType("Q6_K", 210, _q6_k_to_parts, _q6_k_from_parts),
}
"""Format name -> its GGUF type."""
