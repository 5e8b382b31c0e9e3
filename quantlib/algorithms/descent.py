"""Coordinate descent on a layer's output error, tr (W - Q) H (W - Q)^T: each code, then each scale and minimum, takes its best
value while all others stay. No step raises the error."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.algorithms.blocks import sum_rows
from quantlib.algorithms.columns import Grid
from quantlib.formats.codecs import decode
from quantlib.formats.scales import SuperScale

BLOCK = 128


def descend(weight: Tensor, grid: Grid, hessian: Tensor, codes: Tensor, values: Tensor, sweeps: int, scales: bool) -> None:
    """Improve codes uint8 and their values [columns, n] in place, and the grid's scales where `scales` allows it.

    weight   [columns, n], transposed and padded as `codes`; fp32 or fp64
    hessian  [columns, columns], its diagonal positive
    """
    slope = hessian @ (weight - values)  # what the error falls by, as a value grows
    for _ in range(sweeps):
        _codes(grid, hessian, codes, values, slope)
        if scales:
            _scales(grid, hessian, codes, values, slope)


def _codes(grid: Grid, hessian: Tensor, codes: Tensor, values: Tensor, slope: Tensor) -> None:
    for start in range(0, len(codes), BLOCK):
        stop = min(start + BLOCK, len(codes))
        steps = torch.empty_like(values[start:stop])
        for column in range(start, stop):
            best = values[column] + slope[column] / hessian[column, column]
            found, value = grid.round(best, grid.at(column))
            step = value.to(values.dtype) - values[column]
            codes[column] = found
            values[column] += step
            slope[start:stop].addr_(hessian[start:stop, column], step, alpha=-1)
            steps[column - start] = step
        slope[:start].addmm_(hessian[:start, start:stop], steps, alpha=-1)
        slope[stop:].addmm_(hessian[stop:, start:stop], steps, alpha=-1)


def _scales(grid: Grid, hessian: Tensor, codes: Tensor, values: Tensor, slope: Tensor) -> None:
    cols = grid.fmt.block.cols or len(codes)
    for start in range(0, len(codes), cols):
        stop = start + cols
        block = start // cols
        zero = grid.at(start).zero
        units = decode(grid.fmt.codec, codes[start:stop]).to(values.dtype)
        if zero is not None:
            units -= _spread(grid, zero, units.shape[1])
        _step(grid, hessian, start, stop, units, values, slope, grid.numbers.scale, block)
        if grid.numbers.minimum is not None:
            _step(grid, hessian, start, stop, -torch.ones_like(units), values, slope, grid.numbers.minimum, block)


def _spread(grid: Grid, numbers: Tensor, n: int) -> Tensor:
    """One number per block of rows [R] or [R, 1] -> one per row [n]."""
    rows = grid.fmt.block.rows or max(n, 1)
    return numbers.reshape(-1).repeat_interleave(rows)[:n]


def _step(
    grid: Grid, hessian: Tensor, start: int, stop: int, direction: Tensor, values: Tensor, slope: Tensor, numbers: Tensor,
    block: int,
) -> None:  # fmt: skip
    """Move the numbers [R] of one block of columns, in place, along `direction` [columns, n] to the best that can be stored."""
    n = direction.shape[1]
    curved = hessian[start:stop, start:stop] @ direction
    gain, curvature = (sum_rows(grid.fmt, (direction * part).sum(0)) for part in (slope[start:stop], curved))
    present = numbers[:, block]
    wanted = present.to(gain.dtype) + torch.where(curvature > 0, gain / curvature, 0.0)
    stored = _storable(grid, numbers, block, wanted.to(torch.float32))
    step = stored.to(gain.dtype) - present.to(gain.dtype)
    better = 2 * gain * step - curvature * step * step > 0
    moves = direction * _spread(grid, torch.where(better, step, 0.0), n)
    numbers[:, block] = torch.where(better, stored, present)
    values[start:stop] += moves
    slope.addmm_(hessian[:, start:stop], moves, alpha=-1)


def _storable(grid: Grid, numbers: Tensor, block: int, wanted: Tensor) -> Tensor:
    """What is nearest to `wanted` [R] and can be stored as a block's number, while all others stay as they are."""
    kind = grid.fmt.scale
    if not isinstance(kind, SuperScale):
        return kind.round(wanted, grid.shared)
    first = block // kind.count * kind.count
    unit, integers = (part[:, block - first] for part in kind.integers(numbers[:, first : first + kind.count]))
    near = torch.where(unit == 0, 0.0, wanted / unit).round().clamp(kind.lowest, kind.top) * unit
    # The largest integer defines the unit.
    return torch.where(integers.abs() == kind.top, numbers[:, block], near)
