"""Blocks: which weights share a scale, and the views that fit and decode work on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Block:
    """`rows` x `cols` weights share one scale; None means the whole dimension.

    Block(1, 128) is group-wise, Block(1, None) per output channel, Block(None, None) per tensor, Block(128, 128) 2-D.
    """

    rows: int | None
    cols: int | None

    def grid(self, n: int, k: int) -> tuple[int, int]:
        """The number of blocks down and across a weight [n, k] (the last ones may be partial)."""
        return (1 if self.rows is None else math.ceil(n / self.rows), 1 if self.cols is None else math.ceil(k / self.cols))

    def split(self, weight: Tensor) -> Tensor:
        """[n, k] -> [R, G, B]: one row of B weights per block; partial blocks are filled with zeros."""
        n, k = weight.shape
        down, across = self.grid(n, k)
        rows, cols = self.rows or max(n, 1), self.cols or max(k, 1)
        if (down * rows, across * cols) != (n, k):
            weight = functional.pad(weight, (0, across * cols - k, 0, down * rows - n))
        if rows == 1:
            return weight.reshape(n, across, cols)
        return weight.reshape(down, rows, across, cols).permute(0, 2, 1, 3).reshape(down, across, rows * cols)

    def merge(self, blocks: Tensor, n: int, k: int) -> Tensor:
        """The inverse of `split`: [R, G, B] -> [n, k]; where rows were padded before the split, k cuts the padding off."""
        down, across, size = blocks.shape
        rows = self.rows or max(n, 1)
        cols = self.cols or size // rows
        if rows == 1:
            return blocks.reshape(n, across * cols)[:, :k]
        tiles = blocks.reshape(down, across, rows, cols).permute(0, 2, 1, 3)
        return tiles.reshape(down * rows, across * cols)[:n, :k]
