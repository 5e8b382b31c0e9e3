"""All blocks of a weight at once: numbers that storing has rounded, and the packed weight that they lead to."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from quantlib.formats.base import Format
from quantlib.formats.packing import pack
from quantlib.formats.scales import Parts
from quantlib.tensor import QuantizedTensor


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
    n, k = weight.shape
    found = {"codes": fmt.encode_under(weight, fmt.effective(parts)), **parts}
    return QuantizedTensor(fmt, (n, k), {name: found[name] for name in fmt.specs(n, k)})


def packed(fmt: Format, codes: Tensor, parts: Parts, k: int) -> QuantizedTensor:
    """codes uint8 [n, padded k] and the other parts -> the weight [n, k] in the rows layout."""
    whole = {"codes": pack(codes, fmt.codec.bits), **parts}
    ordered = {name: whole[name].clone(memory_format=torch.contiguous_format) for name in fmt.specs(len(codes), k)}
    return QuantizedTensor(fmt, (len(codes), k), ordered)


def sum_rows(fmt: Format, rows: Tensor) -> Tensor:
    """[n, ...] -> [R, ...]: sums over the rows of each row of blocks."""
    height = fmt.block.rows or max(len(rows), 1)
    padding = (0, 0) * (rows.dim() - 1) + (0, -len(rows) % height)
    return functional.pad(rows, padding).reshape(-1, height, *rows.shape[1:]).sum(dim=1)
