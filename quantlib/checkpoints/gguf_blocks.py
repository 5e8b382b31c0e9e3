"""What lies where in the blocks of GGUF's types: each type's bytes [N, B, nbytes] <-> parts of the rows layout.

Byte order is little endian; bits and halves of a byte are numbered from the lowest. Definition: ggml-common.h.

    q4_0   18 bytes    d fp16 | 16 bytes: weight l below, weight l + 16 above
    q4_1   20          d, m fp16 | the same
    q5_0   22          d | 4 bytes: bit l is weight l's highest | as q4_0
    q5_1   24          d, m | as q5_0
    q8_0   34          d | 32 int8
    iq4_nl 18          as q4_0
    q2_k   84          16 bytes: scale below, minimum above | 64 bytes of pairs | d, dmin
    q3_k  110          32 bytes of highest bits | 64 bytes of pairs | 12 bytes: 16 six-bit scales | d
    q4_k  144          d, dmin | 12 bytes: 8 six-bit scales, 8 six-bit minima | 128 bytes of nibbles
    q5_k  176          d, dmin | 12 bytes as q4_k | 32 bytes of highest bits | as q4_k
    q6_k  210          128 bytes of low nibbles | 64 bytes of high pairs | 16 int8 scales | d
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.formats.packing import pack, unpack
from quantlib.formats.scales import Parts


@dataclass(frozen=True)
class BlockType:
    """One GGUF type: its name there, weights and bytes of a block; blocks [N, B, nbytes] -> parts, and (parts, B) -> blocks."""

    name: str
    weights: int
    nbytes: int
    to_parts: Callable[[Tensor], Parts]
    from_parts: Callable[[Parts, int], Tensor]


def _halves(blocks: Tensor, start: int) -> Tensor:
    """The fp16 number at byte `start` of blocks [N, B, nbytes] -> fp16 [N, B]."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).squeeze(-1)


def _half_bytes(numbers: Tensor) -> Tensor:
    """fp16 [N, B] -> uint8 [N, B, 2]."""
    return numbers.contiguous().unsqueeze(-1).view(torch.uint8)


def _split(fields: Tensor, width: int) -> Tensor:
    """uint8 [...] -> uint8 [8 / width, ...]: every byte's fields of `width` bits, the lowest first."""
    return torch.stack([(fields >> shift) & ((1 << width) - 1) for shift in range(0, 8, width)])


def _join(fields: Tensor, width: int) -> Tensor:
    """The inverse of `_split`."""
    joined = torch.zeros_like(fields[0])
    for shift, field in zip(range(0, 8, width), fields, strict=True):
        joined |= field << shift
    return joined


# Runs: bytes [N, B, 32 r] hold the weights of r runs, weight 32 (8 / width) i + 32 j + l in field j of byte 32 i + l.


def _read_runs(fields: Tensor, width: int, run: int = 32) -> Tensor:
    """Bytes [N, B, run * r] -> codes [N, B, run * r * 8 / width]."""
    n, count, size = fields.shape
    return _split(fields.reshape(n, count, size // run, run), width).movedim(0, 3).reshape(n, count, size * 8 // width)


def _write_runs(codes: Tensor, width: int, run: int = 32) -> Tensor:
    """The inverse of `_read_runs`."""
    n, count, size = codes.shape
    size = size * width // 8
    fields = codes.reshape(n, count, size // run, 8 // width, run).movedim(3, 0)
    return _join(fields, width).reshape(n, count, size)


def _codes_of(parts: Parts, bits: int, count: int, weights: int) -> Tensor:
    """uint8 [N, B, weights]."""
    codes = unpack(parts["codes"], bits, count * weights)
    return codes.view(len(codes), count, weights)


# Blocks of 32


def _plain(bits: int, offset: bool) -> tuple[Callable[[Tensor], Parts], Callable[[Parts, int], Tensor]]:
    """Both directions for codes of 4, 5 or 8 bits with a scale, and with `offset` m = -minimum."""
    head = 4 if offset else 2

    def to_parts(blocks: Tensor) -> Parts:
        if bits == 8:
            codes = blocks[..., head:] ^ 128
        else:
            codes = _read_runs(blocks[..., -16:], 4, run=16)
        if bits == 5:
            # Bit l % 8 of byte l / 8 belongs to weight l.
            codes = codes | _split(blocks[..., head : head + 4], 1).movedim(0, -1).flatten(2) << 4
        parts = {"codes": pack(codes.flatten(1), bits), "scales": _halves(blocks, 0)}
        return parts | {"minima": -_halves(blocks, 2)} if offset else parts

    def from_parts(parts: Parts, count: int) -> Tensor:
        codes = _codes_of(parts, bits, count, 32)
        numbers = [_half_bytes(parts["scales"])] + ([_half_bytes(-parts["minima"])] if offset else [])
        if bits == 8:
            return torch.cat([*numbers, codes ^ 128], dim=-1)
        if bits == 5:
            numbers.append(_join((codes >> 4).unflatten(2, (4, 8)).movedim(-1, 0), 1))
        return torch.cat([*numbers, _write_runs(codes & 15, 4, run=16)], dim=-1)

    return to_parts, from_parts


# Q2_K


def _q2_k_to_parts(blocks: Tensor) -> Parts:
    scales, minima = _split(blocks[..., :16], 4)
    return {
        "codes": pack(_read_runs(blocks[..., 16:80], 2).flatten(1), 2),
        "scales": pack(scales.flatten(1), 4),
        "minima": pack(minima.flatten(1), 4),
        "super_scales": _halves(blocks, 80),
        "super_minima": _halves(blocks, 82),
    }


def _q2_k_from_parts(parts: Parts, count: int) -> Tensor:
    numbers = torch.stack([unpack(parts[name], 4, count * 16).unflatten(1, (count, 16)) for name in ("scales", "minima")])
    pairs = _write_runs(_codes_of(parts, 2, count, 256), 2)
    tail = [_half_bytes(parts["super_scales"]), _half_bytes(parts["super_minima"])]
    return torch.cat([_join(numbers, 4), pairs, *tail], dim=-1)


# Q3_K: a scale's low nibble lies in bytes 0-7, of scales 0-7 below and of 8-15 above; its high pair in field i / 4 of byte
# 8 + i % 4. A code's highest bit is bit j of byte l for weight 32 j + l. Codes and scales are biased by 4 and by 32.


def _q3_k_to_parts(blocks: Tensor) -> Parts:
    low = _split(blocks[..., 96:104], 4).movedim(0, 2).flatten(2)
    high = _split(blocks[..., 104:108], 2).movedim(0, 2).flatten(2)
    codes = _read_runs(blocks[..., 32:96], 2) | _read_runs(blocks[..., :32], 1) << 2
    return {
        "codes": pack(codes.flatten(1), 3),
        "scales": pack((low | high << 4).flatten(1), 6),
        "super_scales": _halves(blocks, 108),
    }


def _q3_k_from_parts(parts: Parts, count: int) -> Tensor:
    codes = _codes_of(parts, 3, count, 256)
    scales = unpack(parts["scales"], 6, count * 16).unflatten(1, (count, 16))
    low = _join((scales & 15).unflatten(2, (2, 8)).movedim(2, 0), 4)
    high = _join((scales >> 4).unflatten(2, (4, 4)).movedim(2, 0), 2)
    fields = [_write_runs(codes >> 2, 1), _write_runs(codes & 3, 2), low, high]
    return torch.cat([*fields, _half_bytes(parts["super_scales"])], dim=-1)


# Q4_K and Q5_K


def _with_minima(bits: int) -> tuple[Callable[[Tensor], Parts], Callable[[Parts, int], Tensor]]:
    """Both directions for codes of 4 or 5 bits in blocks of 32."""

    def to_parts(blocks: Tensor) -> Parts:
        scales, minima = _unpack_six_bits(blocks[..., 4:16])
        codes = _read_runs(blocks[..., -128:], 4)
        if bits == 5:
            codes = codes | _read_runs(blocks[..., 16:48], 1) << 4
        return {
            "codes": pack(codes.flatten(1), bits),
            "scales": pack(scales.flatten(1), 6),
            "minima": pack(minima.flatten(1), 6),
            "super_scales": _halves(blocks, 0),
            "super_minima": _halves(blocks, 2),
        }

    def from_parts(parts: Parts, count: int) -> Tensor:
        codes = _codes_of(parts, bits, count, 256)
        scales, minima = (unpack(parts[name], 6, count * 8).unflatten(1, (count, 8)) for name in ("scales", "minima"))
        fields = [_half_bytes(parts["super_scales"]), _half_bytes(parts["super_minima"]), _pack_six_bits(scales, minima)]
        fields += [_write_runs(codes >> 4, 1)] if bits == 5 else []
        return torch.cat([*fields, _write_runs(codes & 15, 4)], dim=-1)

    return to_parts, from_parts


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


# Q6_K: weight 128 h + 32 j + l has its low nibble in byte 64 h + 32 (j % 2) + l, below for j < 2 and above for j >= 2.


def _q6_k_to_parts(blocks: Tensor) -> Parts:
    codes = _read_runs(blocks[..., :128], 4, run=64) | _read_runs(blocks[..., 128:192], 2) << 4
    return {
        "codes": pack(codes.flatten(1), 6),
        # int8 to offset binary: flipping the sign bit adds 128.
        "scales": pack((blocks[..., 192:208] ^ 128).flatten(1), 8),
        "super_scales": _halves(blocks, 208),
    }


def _q6_k_from_parts(parts: Parts, count: int) -> Tensor:
    codes = _codes_of(parts, 6, count, 256)
    scales = unpack(parts["scales"], 8, count * 16).unflatten(1, (count, 16)) ^ 128
    fields = [_write_runs(codes & 15, 4, run=64), _write_runs(codes >> 4, 2), scales]
    return torch.cat([*fields, _half_bytes(parts["super_scales"])], dim=-1)


BLOCK_TYPES: dict[str, BlockType] = {
    "q4_0": BlockType("Q4_0", 32, 18, *_plain(4, offset=False)),
    "q4_1": BlockType("Q4_1", 32, 20, *_plain(4, offset=True)),
    "q5_0": BlockType("Q5_0", 32, 22, *_plain(5, offset=False)),
    "q5_1": BlockType("Q5_1", 32, 24, *_plain(5, offset=True)),
    "q8_0": BlockType("Q8_0", 32, 34, *_plain(8, offset=False)),
    "iq4_nl": BlockType("IQ4_NL", 32, 18, *_plain(4, offset=False)),
    "q2_k": BlockType("Q2_K", 256, 84, _q2_k_to_parts, _q2_k_from_parts),
    "q3_k": BlockType("Q3_K", 256, 110, _q3_k_to_parts, _q3_k_from_parts),
    "q4_k": BlockType("Q4_K", 256, 144, *_with_minima(4)),
    "q5_k": BlockType("Q5_K", 256, 176, *_with_minima(5)),
    "q6_k": BlockType("Q6_K", 256, 210, _q6_k_to_parts, _q6_k_from_parts),
}
"""Format name -> its GGUF type."""
