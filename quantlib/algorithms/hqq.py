"""HQQ: half-quadratic quantization (Badri & Shaji, 2023, "Half-Quadratic Quantization of Large Machine Learning Models"), for
every format and without data.

A block's error is sum |w - q|^p with p < 1, which lets few weights be far off so that many come near. It is split in two: a
rest takes the outliers by shrinkage, and the block's zero (or minimum, or scale) is the least-squares one for what remains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from quantlib.algorithms import blocks as whole
from quantlib.algorithms.base import register_algorithm, validate_weight
from quantlib.algorithms.statistics import InputStatistics, Need
from quantlib.errors import QuantlibError
from quantlib.formats.base import Format
from quantlib.formats.codecs import Codec, decode
from quantlib.formats.effective import Effective
from quantlib.formats.scales import Parts
from quantlib.tensor import QuantizedTensor


class _Slab:
    """Blocks fp32 [R, G, B] of some rows of a weight [n, k]; `live` tells weights from padding where there is any."""

    def __init__(self, fmt: Format, rows: slice, blocks: Tensor, weight: Tensor) -> None:
        self.fmt, self.blocks = fmt, blocks
        self.live = whole.live(fmt, rows.stop - rows.start, weight.shape[1], weight.device)


@dataclass(frozen=True)
class HQQ:
    """Options, under their usual names.

    lp_norm  p of the error sum |w - q|^p, in (0, 1]
    beta     how strongly the split is held together; errors are counted in steps from code to code, so that a weight that is
             multiplied by a constant keeps its codes
    kappa    what beta is multiplied by in each iteration
    iters    iterations at most; a block stops where its error no longer falls

    Where the format has a minimum, that is what is chosen, under the scale of the absmax rule; where it has neither minimum nor
    zero, the scale is. Stored zeros are integers, which hardly ever move by themselves: there the scale follows the zero.
    """

    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iters: int = 20

    needs: ClassVar[Need] = "nothing"

    def __post_init__(self) -> None:
        if not 0 < self.lp_norm <= 1 or self.beta <= 0 or self.kappa < 1 or self.iters < 0:
            raise QuantlibError(f"{self}: expected 0 < lp_norm <= 1, beta > 0, kappa >= 1 and iters >= 0")

    @property
    def name(self) -> str:
        return "hqq"

    def quantize(
        self, weight: Tensor, fmt: Format, inputs: InputStatistics | None = None, name: str = "weight"
    ) -> QuantizedTensor:
        """weight [N, K] -> rows layout; no block (where blocks share a super-scale: no super-block; where all scales
        are quantized together: no weight) has a larger error than under the absmax rule. Raises as `validate_weight`."""
        validate_weight(weight, fmt, name)
        weight = weight.detach()
        shared = fmt.fit_shared(weight)
        start = fmt.fit(weight, shared=shared)
        if weight.numel() == 0:
            return whole.nearest(fmt, weight, start)
        numbers = fmt.effective(start)
        found = [
            self._solve(_Slab(fmt, rows, part, weight), numbers.rows(grid.start, grid.stop), shared)
            for rows, grid, part in whole.slabs(fmt, weight)
        ]
        best = fmt.store(Effective.cat(found), shared)
        return whole.nearest(fmt, weight, self._better(weight, fmt, start, best, shared))

    def _better(self, weight: Tensor, fmt: Format, start: Parts, best: Parts, shared: Parts) -> Parts:
        """Of two sets of stored scales the better one for each super-block, and never one worse than `start` in all."""
        before, after = self._errors(weight, fmt, start), self._errors(weight, fmt, best)
        count = fmt.scale.count
        better = (after - before).view(len(after), -1, count).sum(dim=2) < 0
        mixed = fmt.effective(start).where(better.repeat_interleave(count, dim=1), fmt.effective(best))
        chosen = fmt.store(mixed, shared)
        ways = [(float(before.sum()), start), (float(after.sum()), best)]
        ways.append((float(self._errors(weight, fmt, chosen).sum()), chosen))
        if bool(better.all()):  # what `mixed` would be stored as a second time
            ways.pop()
        return min(ways, key=lambda way: way[0])[1]

    def _errors(self, weight: Tensor, fmt: Format, parts: Parts) -> Tensor:
        """fp64 [R, G]: the error of every block under stored scales."""
        numbers = fmt.effective(parts)
        return torch.cat(
            [
                self._error(_Slab(fmt, rows, part, weight), numbers.rows(grid.start, grid.stop))
                for rows, grid, part in whole.slabs(fmt, weight)
            ]
        )

    def _error(self, slab: _Slab, numbers: Effective) -> Tensor:
        values = slab.fmt.decode_blocks(slab.fmt.encode_blocks(slab.blocks, numbers), numbers)
        error = values.sub_(slab.blocks).abs_().pow_(self.lp_norm)
        if slab.live is not None:
            error *= slab.live
        return error.sum(dim=-1, dtype=torch.float64)

    def _solve(self, slab: _Slab, start: Effective, shared: Parts) -> Effective:
        """The best numbers [R, G] met on the way from `start`, each as its scale kind rounds it."""
        state = best = start
        best_error = state_error = self._error(slab, start)
        active = torch.ones_like(state_error, dtype=torch.bool)
        beta = self.beta
        for _ in range(self.iters):
            state = state.where(active, self._step(slab.blocks, slab.fmt, state, beta))
            beta *= self.kappa
            error = self._error(slab, state)
            active &= error < state_error
            state_error = error
            rounded = _rounded(slab.fmt, state, shared)
            error = self._error(slab, rounded)
            best = best.where(error < best_error, rounded)
            best_error = torch.minimum(error, best_error)
            if not bool(active.any()):
                break
        return best

    def _step(self, blocks: Tensor, fmt: Format, state: Effective, beta: float) -> Effective:
        """The zero, minimum or scale of least squares to what shrinkage leaves of the blocks."""
        codes = fmt.encode_blocks(blocks, state)
        units = decode(fmt.codec, codes)
        step = torch.where(state.scale == 0, 1.0, state.scale)[..., None]
        error = (blocks - fmt.decode_blocks(codes, state)) / step
        spacing = _spacing(fmt.codec)
        target = blocks / step - self._shrunk(error / spacing, beta) * spacing
        if state.zero is not None:
            zero = (units - target).mean(dim=-1).clamp(0, float((1 << fmt.codec.bits) - 1)).round()
            return self._scaled(replace(state, zero=zero), units - zero[..., None], target)
        if state.minimum is not None:
            return replace(state, minimum=(units - target).mean(dim=-1).mul(state.scale).clamp(min=0))
        return self._scaled(state, units, target)

    @staticmethod
    def _scaled(state: Effective, units: Tensor, target: Tensor) -> Effective:
        factor = (units * target).sum(dim=-1) / units.square().sum(dim=-1)
        return replace(state, scale=torch.where(factor > 0, state.scale * factor, state.scale))

    def _shrunk(self, error: Tensor, beta: float) -> Tensor:
        size = error.abs()
        return error.sign() * (size - size.pow(self.lp_norm - 1) / beta).clamp_(min=0)


def _spacing(codec: Codec) -> float:
    """The mean distance of neighbouring values: 1 for integers."""
    values = {value for value in codec.entries if math.isfinite(value)}
    return (max(values) - min(values)) / (len(values) - 1)


def _rounded(fmt: Format, state: Effective, shared: Parts) -> Effective:
    """The state as near as blocks can be stored one by one."""
    scale = fmt.scale.round(state.scale, shared)
    if state.zero is not None:
        return Effective(scale, zero=state.zero.round())
    return Effective(scale, minimum=None if state.minimum is None else fmt.scale.round(state.minimum, shared))


register_algorithm("hqq", HQQ)
