"""A weight's columns one at a time under a format: groups whose scales are fitted together, and rounding of single columns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from quantlib.algorithms.blocks import packed
from quantlib.formats.base import Format
from quantlib.formats.effective import Effective
from quantlib.formats.scales import DoubleQuantScale, FloatScale, Parts
from quantlib.formats.search import Search
from quantlib.tensor import QuantizedTensor


@dataclass(frozen=True)
class Grid:
    """The scales of a weight [n, k] (k padded to whole groups) that columns are rounded under, fp32 [R, blocks across].

    Filled group by group. Where scales can't be stored by themselves (double quantization), `plain` is the format that they are
    fitted in first.
    """

    fmt: Format
    n: int
    k: int
    shared: Parts
    numbers: Effective

    @classmethod
    def empty(cls, fmt: Format, weight: Tensor) -> Grid:
        n, k = weight.shape
        shape = fmt.grid(n, k)

        def zeros() -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=weight.device)

        numbers = Effective(zeros(), zeros() if fmt.zero == "integer" else None, zeros() if fmt.zero == "minimum" else None)
        return cls(fmt, n, k, fmt.fit_shared(weight), numbers)

    @property
    def columns(self) -> int:
        """k, padded to whole groups."""
        return self.fmt.padded(self.k)

    @property
    def group(self) -> int:
        """Columns whose scales are fitted together: a block, all blocks under one super-scale, or the row."""
        cols = self.fmt.block.cols
        return self.columns if cols is None else cols * self.fmt.scale.count

    def fit(self, start: int, weight: Tensor, importance: Tensor | None, search: Search) -> None:
        """Fit the group that begins at column `start` to weight [n, group]."""
        parts = self.fmt.fit(weight, importance=importance, search=search, shared=self.shared)
        found = self.fmt.effective(parts)
        first = 0 if self.fmt.block.cols is None else start // self.fmt.block.cols
        for mine, theirs in _pairs(self.numbers, found):
            mine[:, first : first + theirs.shape[1]] = theirs

    def at(self, column: int) -> Effective:
        """The numbers [R, 1] of one column."""
        block = 0 if self.fmt.block.cols is None else column // self.fmt.block.cols
        numbers = self.numbers

        def one(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[:, block : block + 1]

        return Effective(numbers.scale[:, block : block + 1], one(numbers.zero), one(numbers.minimum))

    def round(self, column: Tensor, numbers: Effective) -> tuple[Tensor, Tensor]:
        """A column [n] -> its codes uint8 [n] and their fp32 values [n]."""
        n = column.shape[0]
        rows = self.fmt.block.rows or max(n, 1)
        blocks = column.to(torch.float32)
        if n % rows:
            blocks = functional.pad(blocks, (0, -n % rows))
        codes = self.fmt.encode_blocks(blocks.view(-1, 1, rows), numbers)
        values = self.fmt.decode_blocks(codes, numbers)
        return codes.reshape(-1)[:n], values.reshape(-1)[:n]

    def result(self, codes: Tensor, scales: Parts | None = None) -> QuantizedTensor:
        """The packed weight of codes uint8 [columns, n]; `scales`: as they are stored already."""
        scales = self.fmt.store(self.numbers, self.shared) if scales is None else scales
        return packed(self.fmt, codes.T.contiguous(), scales, self.k)


def _pairs(mine: Effective, theirs: Effective) -> list[tuple[Tensor, Tensor]]:
    pairs = ((mine.scale, theirs.scale), (mine.zero, theirs.zero), (mine.minimum, theirs.minimum))
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def storable(fmt: Format) -> Format:
    """The format itself where each group's scales can be stored by themselves; else the same with fp32 scales."""
    return replace(fmt, scale=FloatScale(torch.float32)) if isinstance(fmt.scale, DoubleQuantScale) else fmt
