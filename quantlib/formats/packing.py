"""Bit planes: unpacked codes of 1 to 8 bits <-> bytes, along the last dimension.

A width that is a power of two packs as one plane, low first (element 2i of a 4-bit row sits in the low nibble of
byte i). The others split into two planes that stand one after the other in the row, the low bits first:

    3 = 2 + 1      5 = 4 + 1      6 = 4 + 2      7 = 4 + 2 + 1
    row of a 6-bit tensor, C codes:   [ low nibbles, C/2 bytes | high bit pairs, C/4 bytes ]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantlib.errors import ShapeError

_PLANES: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}


def planes(bits: int) -> tuple[int, ...]:
    """The plane widths that a `bits`-wide code splits into, low bits first."""
    return _PLANES[bits]


def granule(bits: int) -> int:
    """The number of codes after which every plane ends on a whole byte."""
    return 8 // min(planes(bits))


def packed_width(columns: int, bits: int) -> int:
    """Bytes per row of `columns` codes; `columns` must be a multiple of `granule(bits)`."""
    return math.ceil(columns * bits / 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (uint8 [..., C], values < 2**bits) into uint8 [..., C*bits/8].

    Raises ShapeError where C is not a multiple of `granule(bits)`.
    """
    if codes.shape[-1] % granule(bits):
        raise ShapeError(f"can't pack {codes.shape[-1]} codes of {bits} bits: a multiple of {granule(bits)} is needed")
    if bits == 8:
        return codes.contiguous()
    packed, shift = [], 0
    for width in planes(bits):
        plane = (codes >> shift) & ((1 << width) - 1)
        per_byte = 8 // width
        out = plane[..., 0::per_byte].clone()
        for i in range(1, per_byte):
            out |= plane[..., i::per_byte] << (i * width)
        packed.append(out)
        shift += width
    return packed[0] if len(packed) == 1 else torch.cat(packed, dim=-1)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., columns*bits/8] -> uint8 [..., columns]."""
    if packed.shape[-1] != packed_width(columns, bits):
        raise ShapeError(
            f"packed row of {packed.shape[-1]} bytes can't hold {columns} codes of {bits} bits "
            f"({packed_width(columns, bits)} bytes expected)"
        )
    if bits == 8:
        return packed
    codes = torch.zeros(*packed.shape[:-1], columns, dtype=torch.uint8, device=packed.device)
    start, shift = 0, 0
    for width in planes(bits):
        per_byte = 8 // width
        plane = packed[..., start : start + columns // per_byte]
        mask = (1 << width) - 1
        for i in range(per_byte):
            codes[..., i::per_byte] |= ((plane >> (i * width)) & mask) << shift
        start += columns // per_byte
        shift += width
    return codes
