"""Choosing scales: the absmax rules, and the searches that lower the (weighted) squared error, once for every format.

A fit is an `Effective`: what has been chosen per block, before the scale kind's final rounding. Searches compare candidates by the error
of a full encode and decode, so that they see the grid's real shape; a candidate that isn't better is never taken.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantlib.formats.codecs import Affine, decode
from quantlib.formats.effective import Effective
from quantlib.formats.scales import SEARCH_FACTORS, Parts

if TYPE_CHECKING:
    from quantlib.formats.base import Format


def initial(fmt: Format, blocks: Tensor, shared: Parts) -> Effective:
    """The format's own rule, from the extremes of blocks [R, G, B]."""
    low, high = torch.aminmax(blocks, dim=-1)
    if fmt.zero != "none":
        return _spanning(fmt, low.clamp(max=0), high.clamp(min=0), shared)
    if fmt.rule == "fullrange":
        extreme = torch.where(-low >= high, low, high)
        return Effective(fmt.scale.round(-extreme / _lowest(fmt), shared))
    return Effective(fmt.scale.from_absmax(torch.maximum(-low, high), fmt.codec.divisor, shared))


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


def _codes_and_error(fmt: Format, blocks: Tensor, importance: Tensor | None, fit: Effective) -> tuple[Tensor, Tensor]:
    """The codes [R, G, B] that the fit leads to, and the weighted squared error [R, G]."""
    codes = fmt.encode_blocks(blocks, fit)
    error = (fmt.decode_blocks(codes, fit) - blocks).square_()
    if importance is not None:
        error *= importance
    return codes, error.sum(dim=-1)


def best_divisor(fmt: Format, blocks: Tensor, importance: Tensor | None, shared: Parts, first: Effective) -> Effective:
    """Per block the best of the format's divisors (four-over-six: absmax at 6 or at 4)."""
    best, best_error = first, _codes_and_error(fmt, blocks, importance, first)[1]
    absmax = blocks.abs().amax(dim=-1)
    for divisor in fmt.divisors:
        other = Effective(fmt.scale.from_absmax(absmax, divisor, shared))
        best, best_error = _keep_better(fmt, blocks, importance, best, best_error, other)
    return best


def _keep_better(
    fmt: Format, blocks: Tensor, importance: Tensor | None, best: Effective, best_error: Tensor, other: Effective
) -> tuple[Effective, Tensor]:
    error = _codes_and_error(fmt, blocks, importance, other)[1]
    better = error < best_error
    return best.where(better, other), torch.where(better, error, best_error)


def refine(fmt: Format, blocks: Tensor, importance: Tensor | None, shared: Parts, first: Effective) -> Effective:
    """The least-error fit among candidates around `first`, then least-squares steps where a scale can take any value."""
    best, best_error = first, _codes_and_error(fmt, blocks, importance, first)[1]
    for other in _candidates(fmt, blocks, shared, first):
        best, best_error = _keep_better(fmt, blocks, importance, best, best_error, other)
    if fmt.scale.kind in ("float", "double", "super"):
        for _ in range(4):
            other = _least_squares(fmt, blocks, importance, shared, best)
            best, best_error = _keep_better(fmt, blocks, importance, best, best_error, other)
    return best


def _candidates(fmt: Format, blocks: Tensor, shared: Parts, first: Effective) -> list[Effective]:
    if fmt.zero != "none":
        low, high = torch.aminmax(blocks, dim=-1)
        low, high = low.clamp(max=0), high.clamp(min=0)
        return [_spanning(fmt, low * factor, high * factor, shared) for factor in SEARCH_FACTORS if factor < 1]
    scales = fmt.scale.candidates(first.scale, shared)
    if isinstance(fmt.codec, Affine) and fmt.codec.signed and fmt.scale.kind == "float":
        scales += [-scale for scale in scales]
    return [replace(first, scale=scale) for scale in scales]


def _least_squares(fmt: Format, blocks: Tensor, importance: Tensor | None, shared: Parts, fit: Effective) -> Effective:
    """The scale (and minimum) that fits the present codes best."""
    codes, _ = _codes_and_error(fmt, blocks, importance, fit)
    values = decode(fmt.codec, codes)
    if fit.zero is not None:
        values = values - fit.zero[..., None]
    weights = torch.ones_like(values) if importance is None else importance
    vv, vw = (weights * values * values).sum(-1), (weights * values * blocks).sum(-1)
    if fit.minimum is None:
        return replace(fit, scale=_finite(fmt, vw / vv, fit.scale, shared))
    one, v, w = weights.sum(-1), (weights * values).sum(-1), (weights * blocks).sum(-1)
    determinant = one * vv - v * v
    scale = (one * vw - v * w) / determinant
    minimum = (v * vw - vv * w) / determinant
    no_minimum = minimum < 0
    scale = torch.where(no_minimum, vw / vv, scale)
    minimum = minimum.clamp(min=0)
    usable = (determinant > 0) & torch.isfinite(scale) & torch.isfinite(minimum)
    return Effective(
        torch.where(usable, fmt.scale.round(scale, shared), fit.scale), minimum=torch.where(usable, minimum, fit.minimum)
    )


def _finite(fmt: Format, scale: Tensor, otherwise: Tensor, shared: Parts) -> Tensor:
    rounded = fmt.scale.round(scale, shared)
    return torch.where(torch.isfinite(rounded), rounded, otherwise)
