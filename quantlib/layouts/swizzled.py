"""The 128x4 order of block scales that tcgen05 and cuBLASLt read (NVFP4 and MX on sm_100 and later).

A tile of 128 rows and 4 scale columns is 512 consecutive bytes. Inside it rows 32 apart lie beside each other, so that one
16-byte line holds the scales of rows r, r + 32, r + 64 and r + 96:

    offset(row m, column s) = ((m // 128) * ceil(S / 4) + s // 4) * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + s % 4

    byte of a tile:    row bits  4 3 2 1 0 | 6 5 |  column bits  1 0

Whole tiles are stored; the hardware reads the pad, so it must hold zeros.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from quantlib.errors import ShapeError

TILE_ROWS = 128
TILE_COLUMNS = 4


def swizzled_grid(rows: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of the scales [rows, columns] after padding to whole tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // TILE_COLUMNS) * TILE_COLUMNS


def swizzled_size(rows: int, columns: int) -> int:
    """The number of scales that the order stores for scales [rows, columns], padding included."""
    down, across = swizzled_grid(rows, columns)
    return down * across


def swizzle(scales: Tensor) -> Tensor:
    """Scales [R, S] of a one-byte dtype -> flat [swizzled_size(R, S)] in the 128x4 order, the pad zero."""
    rows, columns = scales.shape
    down, across = swizzled_grid(rows, columns)
    padded = functional.pad(scales, (0, across - columns, 0, down - rows))
    tiles = padded.reshape(down // TILE_ROWS, 4, 32, across // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1)


def unswizzle(flat: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `swizzle`: flat [swizzled_size(rows, columns)] -> scales [rows, columns]; the pad is dropped.

    Raises ShapeError where the number of elements is another.
    """
    down, across = swizzled_grid(rows, columns)
    if flat.numel() != down * across:
        raise ShapeError(
            f"swizzled scales of [{rows}, {columns}] have {down * across} elements in whole 128x4 tiles, found {flat.numel()}"
        )
    tiles = flat.reshape(down // TILE_ROWS, across // TILE_COLUMNS, 32, 4, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(down, across)[:rows, :columns].contiguous()
