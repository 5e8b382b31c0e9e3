"""All blocks of a weight at once: numbers that storing has rounded, and the packed weight that they lead to."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from quantlib.formats.base import Format
from quantlib.formats.effective import Effective
from quantlib.formats.packing import pack
from quantlib.formats.scales import Parts
from quantlib.tensor import QuantizedTensor


def store(fmt: Format, numbers: Effective, shared: Parts) -> Parts:
    """Every part but `codes`, from numbers fp32 [R, G]. Raises FormatError where one is out of range."""
    parts = fmt.scale.store(numbers.scale, numbers.minimum, shared)
    if numbers.zero is not None:
        parts["zeros"] = numbers.zero.to(torch.uint8)
    return parts


def split(fmt: Format, weight: Tensor) -> Tensor:
    """weight [n, k] -> blocks fp32 [R, G, B]; k is padded with zeros to whole super-blocks."""
    more = fmt.padded(weight.shape[1]) - weight.shape[1]
    return fmt.block.split(functional.pad(weight.to(torch.float32), (0, more)))


def slabs(fmt: Format, weight: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows of the weight, rows of its grid, blocks fp32 [R, G, B]) over slabs that bound temporary memory."""
    height = fmt.block.rows or max(len(weight), 1)
    for start, stop, slab in fmt.slabs(weight):
        yield slice(start, stop), slice(start // height, -(-stop // height)), split(fmt, slab)


def live(fmt: Format, n: int, k: int, device: torch.device) -> Tensor | None:
    """fp32 [R, G, B]: 1 for each element of a weight [n, k], 0 for padding; None where there is none."""
    ones = split(fmt, torch.ones(n, k, device=device))
    return None if ones.numel() == n * k else ones


def nearest(fmt: Format, weight: Tensor, parts: Parts) -> QuantizedTensor:
    """weight [n, k] under stored scales, every element at its nearest code."""
    numbers = fmt.effective(parts)
    shape = (weight.shape[0], fmt.padded(weight.shape[1]))
    codes = torch.empty(shape, dtype=torch.uint8, device=weight.device)
    for rows, grid, blocks in slabs(fmt, weight):
        found = fmt.encode_blocks(blocks, numbers.rows(grid.start, grid.stop))
        codes[rows] = fmt.block.merge(found, rows.stop - rows.start, shape[1])
    return packed(fmt, codes, parts, weight.shape[1])


def packed(fmt: Format, codes: Tensor, parts: Parts, k: int) -> QuantizedTensor:
    """codes uint8 [n, padded k] and the other parts -> the weight [n, k] in the rows layout."""
    whole = {"codes": pack(codes, fmt.codec.bits), **parts}
    ordered = {name: whole[name].clone(memory_format=torch.contiguous_format) for name in fmt.specs(len(codes), k)}
    return QuantizedTensor(fmt, (len(codes), k), ordered)
