"""Choosing scales: the absmax rules, and the search that lowers the (weighted) squared error, once for every format.

A fit is an `Effective`: what has been chosen per block, before the scale kind's final rounding.

The search holds on to one fact: for given codes the squared error of a block is a quadratic in its scale and minimum, and its
coefficients are a few sums over the block (`Moments`). So every candidate is rounded to codes once, solved for the best scale
and minimum that those codes allow, and compared by the error it has then, without a second pass over the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantlib.formats.codecs import Affine, nearest
from quantlib.formats.effective import Effective
from quantlib.formats.scales import Parts, SuperScale

if TYPE_CHECKING:
    from quantlib.formats.base import Format

SPAN_FACTORS = (1.08, 1.0, 0.92, 0.84)
"""What the low and the high end of a block's range are multiplied by, each on its own, where a grid has a zero or a minimum."""

WIDE_FACTORS = tuple(0.5 + 0.04 * step for step in range(17))
FINE_FACTORS = tuple(0.84 + 0.02 * step for step in range(17))
"""What the first scale is multiplied by where any scale can be stored: few codes gain by clipping a lot, many codes don't."""

LEAST_SQUARES_STEPS = 3
CHUNK = 1 << 20
"""Weights that the search works on at once: this bounds its temporaries (about eight of 4 bytes a weight)."""


# the absmax rules


def initial(fmt: Format, blocks: Tensor, shared: Parts) -> Effective:
    """The format's own rule, from the extremes of blocks [R, G, B]."""
    low, high = torch.aminmax(blocks, dim=-1)
    if fmt.zero != "none":
        return _spanning(fmt, low.clamp(max=0), high.clamp(min=0), shared)
    if fmt.rule == "fullrange":
        extreme = torch.where(-low >= high, low, high)
        return Effective(fmt.scale.round(-extreme / _lowest(fmt), shared))
    return Effective(fmt.scale.from_absmax(torch.maximum(-low, high).abs(), fmt.codec.divisor, shared))


def _lowest(fmt: Format) -> float:
    return -min(fmt.codec.entries)


def _spanning(fmt: Format, low: Tensor, high: Tensor, shared: Parts) -> Effective:
    """A grid whose ends lie at low <= 0 <= high: an asymmetric integer zero point, or a float minimum."""
    top = float((1 << fmt.codec.bits) - 1)
    scale = fmt.scale.round((high - low) / top, shared)
    if fmt.zero == "minimum":
        return Effective(scale, minimum=-low)
    nonzero = torch.where(scale == 0, torch.ones_like(scale), scale)
    return Effective(scale, zero=(-low / nonzero).round().clamp(0, top))


def best_divisor(fmt: Format, blocks: Tensor, importance: Tensor | None, shared: Parts, first: Effective) -> Effective:
    """Per block the best of the format's divisors (four-over-six: absmax at 6 or at 4)."""
    best, best_error = first, _true_error(fmt, blocks, importance, first)
    absmax = blocks.abs().amax(dim=-1)
    for divisor in fmt.divisors:
        other = Effective(fmt.scale.from_absmax(absmax, divisor, shared))
        error = _true_error(fmt, blocks, importance, other)
        best, best_error = best.where(error < best_error, other), torch.minimum(error, best_error)
    return best


def _true_error(fmt: Format, blocks: Tensor, importance: Tensor | None, fit: Effective) -> Tensor:
    """The weighted squared error [R, G] of encoding and decoding with a fit."""
    error = (fmt.decode_blocks(fmt.encode_blocks(blocks, fit), fit) - blocks).square_()
    if importance is not None:
        error *= importance
    return error.sum(dim=-1)


# the search


@dataclass(frozen=True)
class Moments:
    """Weighted sums per block [...] over the weights w and the grid's values v: sum vv, vw, ww; with a minimum also v, w, 1.

    The error of w = v * scale - minimum is  ww - 2 scale vw + scale^2 vv + 2 minimum w - 2 scale minimum v + minimum^2 one.
    """

    vv: Tensor
    vw: Tensor
    ww: Tensor
    v: Tensor | None = None
    w: Tensor | None = None
    one: Tensor | None = None

    def error(self, scale: Tensor, minimum: Tensor | None) -> Tensor:
        """The squared error of these codes under another scale and minimum."""
        error = self.ww - 2 * scale * self.vw + scale.square() * self.vv
        if minimum is None or self.v is None or self.w is None or self.one is None:
            return error
        return error + 2 * minimum * (self.w - scale * self.v) + minimum.square() * self.one

    def solve(self) -> tuple[Tensor, Tensor | None]:
        """The scale and the minimum (never below zero) of the least error; NaN where the block leaves them open."""
        if self.v is None or self.w is None or self.one is None:
            return self.vw / self.vv, None
        determinant = self.one * self.vv - self.v.square()
        scale = (self.one * self.vw - self.v * self.w) / determinant
        minimum = (self.v * self.vw - self.vv * self.w) / determinant
        return torch.where(minimum < 0, self.vw / self.vv, scale), minimum.clamp(min=0)


class Problem:
    """Blocks [n, B] to fit, with their weights of the squared error."""

    def __init__(self, fmt: Format, blocks: Tensor, importance: Tensor | None, shared: Parts) -> None:
        self.fmt, self.blocks, self.importance, self.shared = fmt, blocks, importance, shared
        self.weighted = blocks if importance is None else blocks * importance
        self.ww = (self.weighted * blocks).sum(dim=-1)
        self.w = self.one = None
        if fmt.zero == "minimum":
            self.w = self.weighted.sum(dim=-1)
            self.one = torch.full_like(self.w, blocks.shape[-1]) if importance is None else importance.sum(dim=-1)

    def moments(self, fit: Effective) -> Moments:
        """The sums of the codes that a fit leads to."""
        inverse = torch.where(fit.scale == 0, 0.0, 1 / fit.scale)[..., None]
        x = self.blocks * inverse if fit.minimum is None else (self.blocks + fit.minimum[..., None]).mul_(inverse)
        if fit.zero is None:
            v = nearest(self.fmt.codec, x)
        else:
            v = nearest(self.fmt.codec, x.add_(fit.zero[..., None])).sub_(fit.zero[..., None])
        vw = (v * self.weighted).sum(dim=-1)
        hv = v if self.importance is None else v * self.importance
        total = None if self.w is None else hv.sum(dim=-1)
        return Moments((hv * v).sum(dim=-1), vw, self.ww, total, self.w, self.one)

    def improve(self, fit: Effective) -> tuple[Effective, Tensor]:
        """The best scale and minimum that can be stored for the codes of a fit, and the error [n] that this leaves."""
        moments = self.moments(fit)
        scale, minimum = moments.solve()
        scale = self.fmt.scale.round(scale, self.shared)
        error = moments.error(scale, minimum)
        unsolved = moments.error(fit.scale, fit.minimum)
        # Signs stay as they are: a scale that turned over would belong to other codes.
        usable = (error < unsolved) & (scale * fit.scale > 0)
        solved = Effective(scale, fit.zero, minimum)
        return fit.where(usable, solved), torch.where(usable, error, unsolved)

    def true_error(self, fit: Effective) -> Tensor:
        """The squared error [n] of encoding and decoding, not of the sums."""
        return _true_error(self.fmt, self.blocks, self.importance, fit)


def refine(fmt: Format, blocks: Tensor, importance: Tensor | None, shared: Parts, first: Effective) -> Effective:
    """The least-error fit found for blocks [R, G, B], starting from `first`; never worse than `first` in any block that has a
    scale of its own, nor in any super-block where scales share one."""
    down, across, size = blocks.shape
    flat, flat_importance = blocks.reshape(-1, size), None if importance is None else importance.reshape(-1, size)
    start_fit = first.reshape(-1)
    step = max(1, CHUNK // max(size * fmt.scale.count, 1)) * fmt.scale.count
    fits = []
    for start in range(0, down * across, step):
        stop = min(start + step, down * across)
        problem = Problem(fmt, flat[start:stop], None if flat_importance is None else flat_importance[start:stop], shared)
        fits.append(_refine(problem, start_fit.rows(start, stop)))
    return Effective.cat(fits).reshape(down, across) if fits else first


def _refine(problem: Problem, first: Effective) -> Effective:
    best, best_error = problem.improve(first)
    for candidate in _candidates(problem, first):
        best, best_error = _keep_better(best, best_error, *problem.improve(candidate))
    for _ in range(LEAST_SQUARES_STEPS if problem.fmt.scale.continuous else 0):
        best, best_error = _keep_better(best, best_error, *problem.improve(best))
    if isinstance(problem.fmt.scale, SuperScale):
        return _refine_super(problem, problem.fmt.scale, first, best)
    return first.where(problem.true_error(best) < problem.true_error(first), best)


def _keep_better(best: Effective, best_error: Tensor, other: Effective, error: Tensor) -> tuple[Effective, Tensor]:
    return best.where(error < best_error, other), torch.minimum(error, best_error)


def _candidates(problem: Problem, first: Effective) -> list[Effective]:
    fmt, shared = problem.fmt, problem.shared
    if fmt.zero != "none":
        low, high = torch.aminmax(problem.blocks, dim=-1)
        low, high = low.clamp(max=0), high.clamp(min=0)
        return [_spanning(fmt, low * below, high * above, shared) for below, above in product(SPAN_FACTORS, SPAN_FACTORS)]
    factors = FINE_FACTORS if isinstance(fmt.codec, Affine) and fmt.codec.bits > 5 else WIDE_FACTORS
    scales = fmt.scale.candidates(first.scale, factors, shared)
    if isinstance(fmt.codec, Affine) and fmt.codec.signed:
        scales += [-scale for scale in scales]
    return [replace(first, scale=scale) for scale in scales]


# scales under a super-scale


def _refine_super(problem: Problem, kind: SuperScale, first: Effective, best: Effective) -> Effective:
    """Integer scales and minima that suit the codes, twice over; per super-block never worse than rounding `first`."""
    result = _snapped(kind, first)
    result_error = problem.true_error(result)
    fit = best
    for _ in range(2):
        fit = _integer_scales(problem.moments(fit), kind, fit)
        error = problem.true_error(fit)
        better = (error - result_error).view(-1, kind.count).sum(dim=-1, keepdim=True) < 0
        better = better.expand(-1, kind.count).reshape(-1)
        result, result_error = result.where(better, fit), torch.where(better, error, result_error)
    return result


def _snapped(kind: SuperScale, fit: Effective) -> Effective:
    """The fit as it is after storing."""
    minimum = None if fit.minimum is None else fit.minimum[None]
    scale, minimum = kind.load(kind.store(fit.scale[None], minimum, {}))
    return Effective(scale[0], minimum=None if minimum is None else minimum[0])


def _integer_scales(moments: Moments, kind: SuperScale, fit: Effective) -> Effective:
    """For the codes that `moments` describe: the integers of least error under the super-scales that `fit` asks for.

    The largest integer stays at the top of its range, so that storing the result finds the same super-scale again.
    """
    unit, integers = kind.integers(fit.scale)
    defines_unit = integers.abs() == kind.top
    best, best_error = fit, torch.full_like(fit.scale, torch.inf)
    for step in (0, -1, 1):
        near = torch.where(defines_unit, integers, (integers + step).clamp(kind.lowest, kind.top))
        candidate = Effective(near * unit, minimum=_integer_minimum(moments, kind, fit.minimum, near * unit))
        error = moments.error(candidate.scale, candidate.minimum)
        best, best_error = _keep_better(best, best_error, candidate, error)
    return best


def _integer_minimum(moments: Moments, kind: SuperScale, minimum: Tensor | None, scale: Tensor) -> Tensor | None:
    """The minimum of least error for a scale, in whole units of the super-minimum that `minimum` asks for."""
    if minimum is None or moments.v is None or moments.w is None or moments.one is None:
        return None
    unit, integers = kind.integers(minimum)
    wanted = (scale * moments.v - moments.w) / moments.one
    near = torch.where(unit == 0, 0.0, wanted / unit).round().clamp(0, kind.top)
    return torch.where(integers == kind.top, integers, near) * unit
