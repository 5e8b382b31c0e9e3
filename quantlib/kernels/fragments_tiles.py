"""Tiles of the fragments kernels by rule: what runs where no tuned table says better, and what `quantlib bench --tune` tries.

The rules come from a count of bytes under way. A chip's memory is busy when bandwidth * latency bytes are on their way, about
18 KB per SM on an H100; a warp has one or two tiles of 512 bytes. So few rows of x want many warps per SM and, where N gives
too few, splits of K; many rows of x want wide tiles, so that a decoded weight is used often.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from quantlib.devices import Device
from quantlib.kernels.triton_launch import Tile

WARPS_WANTED = 12
"""Warps per SM that keep memory busy, at two tiles of 512 bytes each."""


NARROW_REGISTERS = {8: 128, 16: 128, 32: 168}
"""Bounds for tiles of few rows. They need fewer; without a bound ptxas spills a value or two to fit one more program on an
SM."""
PEAK_SHARE = {8: 0.15, 16: 0.25, 32: 0.4, 64: 0.6, 128: 0.7, 256: 0.75}
"""Rows of x in a tile -> the share of the matrix peak that its instructions reach; narrow ones leave units waiting for W."""


@lru_cache(maxsize=1024)
def gemv_tiles(n: int, tiles: int, units: int) -> list[Tile]:
    """Warps and splits of gemv: as few as keep every SM supplied, each warp with at least two tiles to stream."""
    strips = -(-n // 16)
    warps, splits = 4, 1
    while strips * warps * splits < units * WARPS_WANTED and tiles >= 4 * warps * splits:
        if warps < 8:
            warps *= 2
        else:
            splits *= 2
    first = Tile(8, 16, 0, warps, 1, NARROW_REGISTERS[8], splits)
    others = [
        Tile(8, 16, 0, warps, 1, NARROW_REGISTERS[8], splits)
        for warps in (2, 4, 8, 16)
        for splits in (1, 2, 4, 8)
        if tiles >= warps * splits and strips * splits <= units * 64
    ]
    return [first, *(tile for tile in others if tile != first)]


def _splits(blocks: int, tiles: int, wanted: int) -> int:
    """Splits of K (a power of two) that bring `blocks` programs near `wanted`, with at least four tiles each."""
    splits = 1
    while blocks * splits * 2 <= wanted and tiles >= 8 * splits and splits < 16:
        splits *= 2
    return splits


def _roomy(device: Device) -> bool:
    """Whether a program may use more than 99 KB of shared memory: data-centre chips, not sm_86, sm_89, sm_120 and sm_121."""
    return device.capability in (80, 90, 100, 103)


@lru_cache(maxsize=1024)
def skinny_tiles(m: int, n: int, tiles: int, dtype: torch.dtype, device: Device) -> list[Tile]:
    """Tiles of skinny: up to 64 rows of x at once (more accumulators, scaled tile by tile, would not fit the registers), 64
    rows of W, splits for up to three programs per SM."""
    if dtype == torch.float32:
        # No tensor cores without TF32's rounding: accumulators in registers bound the tile.
        return [Tile(16, 32, 0, 2, 2, registers=255)]
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64
    found = []
    for rows in dict.fromkeys((block_m, max(16, block_m // 2))):
        stages = 4 if rows <= 32 else 3
        splits = _splits(-(-n // 64) * -(-m // rows), tiles, device.units * 3)
        registers = NARROW_REGISTERS.get(rows)
        found += [Tile(rows, 64, 0, 4, stages, registers, count) for count in dict.fromkeys((splits, max(1, splits // 2), 1))]
    return found


@lru_cache(maxsize=1024)
def gemm_tiles(m: int, dtype: torch.dtype, device: Device) -> list[Tile]:
    """Tiles of gemm, rows of x x rows of W: 128 x 128 for many rows, where one SM's tensor cores are busy and registers still
    hold it all; half of either where that leaves SMs idle."""
    if dtype == torch.float32:
        return [Tile(16, 32, 0, 2, 2, registers=255, per_unit=4)]
    small = Tile(64, 64, 0, 4, 3, registers=255, per_unit=2)
    if m <= 64:
        return [small]
    return [Tile(128, 128, 0, 8, 3 if _roomy(device) else 2, registers=255), small]


def by_warp(capability: int) -> bool:
    """Whether tensor cores are one warp's (mma.sync), which holds accumulators and operands in its own registers, and not a
    warpgroup's (wgmma, tcgen05)."""
    return not 90 <= capability < 120


@lru_cache(maxsize=1024)
def dgrad_tiles(m: int, width: int, dtype: torch.dtype, device: Device) -> list[Tile]:
    """Tiles of dgrad: 64 rows of W at once, 128 of its columns, as many rows of dY as registers allow."""
    if dtype == torch.float32:
        return [Tile(16, 16, 0, 1, 1, registers=255)]
    rows = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    registers = NARROW_REGISTERS.get(rows)
    if width == 128:
        return [Tile(64, 64, 0, 8, 3) if rows >= 64 and by_warp(device.capability) else Tile(rows, 64, 0, 4, 3, registers)]
    found = [Tile(rows, 64, 0, 8, 3, registers)]
    return found if rows <= 64 else [*found, Tile(64, 64, 0, 8, 3)]
