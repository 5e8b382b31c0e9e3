"""Choosing scales: the absmax rules, and the search that lowers the (weighted) squared error, once for every format.

A fit is an `Effective`: what has been chosen per block, before the scale kind's final rounding.

The search holds on to one fact: for given codes the squared error of a block is a quadratic in its scale and minimum, and its
coefficients are a few sums over the block (`Moments`). So every candidate is rounded to codes once, solved for the best scale
and minimum that those codes allow, and compared by the error it has then, without a second pass over the weights.

Candidates differ in the last bits of such sums, so the order of additions is part of the definition: `tree_sum`, the same on
every device. What a device computes by itself (quantlib.formats.acceleration) adds in that order too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Literal, Protocol

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

Search = Literal["absmax", "mse"]


def tree_sum(terms: Tensor) -> Tensor:
    """terms fp32 [..., B] -> [...]: the upper half is added to the lower one until one term is left; where B is no power of
    two, as if zeros stood after its end. Overwrites `terms`."""
    while (size := terms.shape[-1]) > 1:
        half = 1 << (size - 1).bit_length() - 1
        terms[..., : size - half] += terms[..., half:]
        terms = terms[..., :half]
    return terms[..., 0] if terms.shape[-1] else terms.sum(dim=-1)


class Problem(Protocol):
    """Blocks to fit, numbered 0..n-1. `TorchProblem` serves every format and device; a device may have a faster one."""

    fmt: Format
    shared: Parts

    def extremes(self) -> tuple[Tensor, Tensor]:
        """fp32 [n]: the least and the greatest weight of every block, its padding included; a zero may have either sign."""
        ...

    def true_error(self, fit: Effective) -> Tensor:
        """fp32 [n]: the (weighted) squared error of encoding and decoding with a fit."""
        ...

    def moments(self, fit: Effective) -> Moments:
        """The sums over every block of the codes that a fit leads to."""
        ...

    def descend(self, first: Effective, candidates: Sequence[Effective], steps: int) -> Effective:
        """Per block the best solution of `first` and the candidates, improved by `steps` further solutions."""
        ...


def fit(problem: Problem, search: Search) -> Effective:
    """Scales (and zeros, minima) [n] for the problem's blocks."""
    low, high = problem.extremes()
    low, high = low + 0.0, high + 0.0  # a zero takes the plus sign, whatever the order of comparisons
    first = initial(problem.fmt, low, high, problem.shared)
    if problem.fmt.divisors:
        first = best_divisor(problem, first, torch.maximum(-low, high))
    return refine(problem, first, low, high) if search == "mse" else first


# the absmax rules


def initial(fmt: Format, low: Tensor, high: Tensor, shared: Parts) -> Effective:
    """The format's own rule, from the extremes of every block."""
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
        return Effective(scale, minimum=0.0 - low)
    nonzero = torch.where(scale == 0, torch.ones_like(scale), scale)
    return Effective(scale, zero=(-low / nonzero).round().clamp(0, top))


def best_divisor(problem: Problem, first: Effective, absmax: Tensor) -> Effective:
    """Per block the best of the format's divisors (four-over-six: absmax at 6 or at 4)."""
    best, best_error = first, problem.true_error(first)
    for divisor in problem.fmt.divisors:
        other = Effective(problem.fmt.scale.from_absmax(absmax, divisor, problem.shared))
        best, best_error = _keep_better(best, best_error, other, problem.true_error(other))
    return best


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


class TorchProblem:
    """Blocks fp32 [n, B] in torch. importance [n, B] or None: the weights of the squared error."""

    def __init__(self, fmt: Format, blocks: Tensor, importance: Tensor | None, shared: Parts) -> None:
        self.fmt, self.blocks, self.importance, self.shared = fmt, blocks, importance, shared

    def extremes(self) -> tuple[Tensor, Tensor]:
        return torch.aminmax(self.blocks, dim=-1)

    def true_error(self, fit: Effective) -> Tensor:
        codes = self.fmt.encode_blocks(self.blocks, fit)
        error = (self.fmt.decode_blocks(codes, fit) - self.blocks).square_()
        if self.importance is not None:
            error *= self.importance
        return tree_sum(error)

    @cached_property
    def _weighted(self) -> Tensor:
        return self.blocks if self.importance is None else self.blocks * self.importance

    @cached_property
    def _constant(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """ww, and for a minimum w and one: the moments that no code changes."""
        ww = tree_sum(self._weighted * self.blocks)
        if self.fmt.zero != "minimum":
            return ww, None, None
        w = tree_sum(self._weighted.clone())
        return (
            ww,
            w,
            torch.full_like(w, self.blocks.shape[-1]) if self.importance is None else tree_sum(self.importance.clone()),
        )

    def moments(self, fit: Effective) -> Moments:
        inverse = torch.where(fit.scale == 0, 0.0, 1 / fit.scale)[..., None]
        x = self.blocks * inverse if fit.minimum is None else (self.blocks + fit.minimum[..., None]).mul_(inverse)
        if fit.zero is None:
            v = nearest(self.fmt.codec, x)
        else:
            v = nearest(self.fmt.codec, x.add_(fit.zero[..., None])).sub_(fit.zero[..., None])
        ww, w, one = self._constant
        vw = tree_sum(v * self._weighted)
        hv = v if self.importance is None else v * self.importance
        vv = tree_sum(hv * v)
        total = None if w is None else tree_sum(hv)
        return Moments(vv, vw, ww, total, w, one)

    def _improve(self, fit: Effective) -> tuple[Effective, Tensor]:
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

    def descend(self, first: Effective, candidates: Sequence[Effective], steps: int) -> Effective:
        best, best_error = self._improve(first)
        for candidate in candidates:
            best, best_error = _keep_better(best, best_error, *self._improve(candidate))
        for _ in range(steps):
            best, best_error = _keep_better(best, best_error, *self._improve(best))
        return best


def refine(problem: Problem, first: Effective, low: Tensor, high: Tensor) -> Effective:
    """The least-error fit found from `first` on and the extremes of every block; never worse than `first` in any block that has
    a scale of its own, nor in any super-block where scales share one."""
    kind = problem.fmt.scale
    steps = LEAST_SQUARES_STEPS if kind.continuous else 0
    best = problem.descend(first, _candidates(problem.fmt, first, low, high, problem.shared), steps)
    if isinstance(kind, SuperScale):
        return _refine_super(problem, kind, first, best)
    return first.where(problem.true_error(best) < problem.true_error(first), best)


def _keep_better(best: Effective, best_error: Tensor, other: Effective, error: Tensor) -> tuple[Effective, Tensor]:
    return best.where(error < best_error, other), torch.minimum(error, best_error)


def _candidates(fmt: Format, first: Effective, low: Tensor, high: Tensor, shared: Parts) -> list[Effective]:
    if fmt.zero != "none":
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
