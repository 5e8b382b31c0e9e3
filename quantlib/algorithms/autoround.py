"""AutoRound (arXiv 2309.05516) for every format: which way each weight is rounded, and how far each block's range reaches,
learned by signed gradient descent on the layer's output error tr (Q - W) H (Q - W)^T.

    place = position of w / scale on the ladder of code values: 3.25 lies a quarter of the way from value 3 to value 4
    q     = ladder[round(place + V)],  V in [-1/2, 1/2]

Positions are counted in steps of the ladder, evenly spaced or not, so that one law serves integers, floats and code books.

The gradient by V is taken half-way between the two values that a weight may be rounded to. Taken at the value that the weight
has (straight through the rounding, as in the paper), a weight's own error always points to the other one, and descent on all
tokens at once swings to and fro: on correlated inputs it ends above the error it started from, this one a quarter below. For
the same reason the gradient by an end of a range is the exact one, with codes held fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantlib.algorithms import blocks as whole
from quantlib.algorithms.base import register_algorithm, require_inputs, validate_weight
from quantlib.algorithms.hessian import padded
from quantlib.algorithms.statistics import InputStatistics, Need
from quantlib.errors import QuantlibError
from quantlib.formats.base import Format
from quantlib.formats.codecs import Codec
from quantlib.formats.effective import Effective
from quantlib.formats.scales import DoubleQuantScale, Parts
from quantlib.tensor import QuantizedTensor

REACH = (0.5, 1.5)
"""What the ends of a block's range may be multiplied by, from where the search left them."""


@dataclass(frozen=True)
class AutoRound:
    """Options, under their usual names.

    iters                 steps of descent; the best state on the way is kept, for each row by itself where scales allow it
    lr                    how far V moves in the first step, falling to zero linearly; default 3 / iters, with which V can go
                          to an end and come back (under the paper's 1 / iters it just reaches one)
    minmax_lr             the same for the ends of ranges; default: lr / 6, for an end moves a whole block's weights
    enable_minmax_tuning  learn the ends of ranges too, not only roundings, where the format's scales can move in small steps
    """

    iters: int = 200
    lr: float | None = None
    minmax_lr: float | None = None
    enable_minmax_tuning: bool = True

    needs: ClassVar[Need] = "hessian"

    def __post_init__(self) -> None:
        rates = [rate for rate in (self.lr, self.minmax_lr) if rate is not None]
        if self.iters < 0 or not all(0 < rate < math.inf for rate in rates):
            raise QuantlibError(f"{self}: expected iters >= 0 and learning rates above zero")

    @property
    def name(self) -> str:
        return "autoround"

    def quantize(
        self, weight: Tensor, fmt: Format, inputs: InputStatistics | None = None, name: str = "weight"
    ) -> QuantizedTensor:
        """weight [N, K] -> rows layout. On the inputs its error is at most that of nearest codes under a search with
        importance, where descent starts. Raises QuantlibError where statistics or their Hessian are missing, else as
        `validate_weight`."""
        validate_weight(weight, fmt, name)
        inputs = require_inputs(inputs, weight, name, self.name)
        hessian = inputs.hessian.to(weight.device)
        weight = weight.detach()
        shared = fmt.fit_shared(weight)
        start = fmt.fit(weight, inputs.mean_square, "mse", shared)
        if weight.numel() == 0:
            return whole.nearest(fmt, weight, start)
        descent = _Descent(fmt, weight, padded(hessian, fmt.padded(weight.shape[1])), shared, start)
        lr = 3 / max(self.iters, 1) if self.lr is None else self.lr
        minmax_lr = lr / 6 if self.minmax_lr is None else self.minmax_lr
        if not (self.enable_minmax_tuning and fmt.scale.continuous):
            minmax_lr = 0.0
        for step in range(self.iters):
            left = 1 - step / self.iters
            descent.step(lr * left, minmax_lr * left)
            descent.keep()
        codes, parts = descent.best()
        return whole.packed(fmt, codes, parts, weight.shape[1])


class _Ladder:
    """A codec's values in ascending order, each once."""

    def __init__(self, codec: Codec, device: torch.device) -> None:
        found: dict[float, int] = {}
        for code, value in enumerate(codec.entries):
            if value == value:
                found.setdefault(value + 0.0, code)
        ordered = sorted(found)
        self.values = torch.tensor(ordered, dtype=torch.float32, device=device)
        self._codes = torch.tensor([found[value] for value in ordered], dtype=torch.uint8, device=device)
        self.top = len(ordered) - 1
        steps = self.values.diff()
        self._middles = (self.values[1:] + self.values[:-1]) / 2
        self._per_unit = 1 / steps
        self._even = bool((steps == steps[0]).all())

    def place(self, x: Tensor) -> Tensor:
        """x fp32 -> its position 0..top among the values, with a fraction between two of them. Overwrites `x`."""
        if self._even:
            return x.sub_(self.values[0]).mul_(self._per_unit[0]).clamp_(0, self.top)
        x.clamp_(float(self.values[0]), float(self.values[-1]))
        below = torch.bucketize(x, self.values[1:-1], out_int32=True, right=True).view(-1)
        offset = (x.view(-1) - self.values.index_select(0, below)).mul_(self._per_unit.index_select(0, below))
        return offset.add_(below).view(x.shape)

    def decode(self, ranks: Tensor) -> Tensor:
        """Positions that are whole, fp32 -> values."""
        if self._even:
            return ranks / self._per_unit[0] + self.values[0]
        return self.values.index_select(0, ranks.view(-1).to(torch.int32)).view(ranks.shape)

    def middle(self, below: Tensor) -> Tensor:
        """Half-way from each whole position, fp32, to the next."""
        if self._even:
            return below.add(0.5).div_(self._per_unit[0]).add_(self.values[0])
        return self._middles.index_select(0, below.view(-1).to(torch.int32)).view(below.shape)

    def codes(self, ranks: Tensor) -> Tensor:
        """uint8 positions -> codes."""
        return self._codes.index_select(0, ranks.view(-1).to(torch.int32)).view(ranks.shape)


class _Descent:
    """The state: V for every weight, and the ends of every block's range, each a factor of where it started.

    A range with a minimum has two ends, where its grid begins and where it stops; any other has one, its scale. (An integer
    zero stays: to move it is to jump.)
    """

    def __init__(self, fmt: Format, weight: Tensor, hessian: Tensor, shared: Parts, start: Parts) -> None:
        self.fmt, self.hessian, self.shared = fmt, hessian, shared
        self.shape = (len(weight), len(hessian))
        self.blocks = whole.split(fmt, weight)
        self.curvature = fmt.block.split(hessian.diagonal().expand(self.shape))
        self.ladder = _Ladder(fmt.codec, weight.device)
        self.offsets = torch.zeros_like(self.blocks)
        self.together = isinstance(fmt.scale, DoubleQuantScale)
        self.lowest, self.highest = float(self.ladder.values[0]), float(self.ladder.values[-1])
        self.numbers = fmt.effective(start)
        self.ends = self._ends()
        self.factors = [torch.ones_like(end) for end in self.ends]
        self._forward(start)
        self._best = (self.losses, self.ranks.to(torch.uint8), self.numbers, start)

    def _ends(self) -> list[Tensor]:
        scale, minimum = self.numbers.scale, self.numbers.minimum
        return [scale] if minimum is None else [end * scale - minimum for end in (self.lowest, self.highest)]

    def _wanted(self) -> Effective:
        """The numbers [R, G] of the present ends, before they are stored."""
        ends = [end * factor for end, factor in zip(self.ends, self.factors, strict=True)]
        if len(ends) == 1:
            return Effective(ends[0], zero=self.numbers.zero)
        scale = (ends[1] - ends[0]) / (self.highest - self.lowest)
        return Effective(scale, minimum=(self.lowest * scale - ends[0]).clamp(min=0))

    def _forward(self, parts: Parts) -> None:
        """Ranks, the error of every row of blocks, and its gradient by every weight's value, under stored scales."""
        self.parts, self.numbers = parts, self.fmt.effective(parts)
        scale, zero, minimum = (None if grid is None else grid[..., None] for grid in _fields(self.numbers))
        assert scale is not None
        moved = self.blocks if minimum is None else self.blocks + minimum
        exact = moved / torch.where(scale == 0, torch.inf, scale)
        if zero is not None:
            exact += zero
        place = self.ladder.place(exact)
        below = place.floor().clamp_(max=self.ladder.top - 1)
        self.ranks = place.add_(self.offsets).round_().clamp_(0, self.ladder.top)
        self.values = self.ladder.decode(self.ranks)
        self.middle = self.ladder.middle(below)
        decoded = (self.values if zero is None else self.values - zero) * scale
        if minimum is not None:
            decoded -= minimum
        error = self.fmt.block.merge(decoded.sub_(self.blocks), *self.shape)
        slope = error @ self.hessian
        self.losses = whole.sum_rows(self.fmt, (slope * error).sum(dim=1, dtype=torch.float64))
        self.slope = self.fmt.block.split(slope)

    def step(self, lr: float, minmax_lr: float) -> None:
        """Move against the signs of the gradient."""
        parts = self.parts
        if minmax_lr:
            for factor, gradient in zip(self.factors, self._by_ends(), strict=True):
                factor.sub_(gradient.sign_().mul_(minmax_lr)).clamp_(*REACH)
        scale = self.numbers.scale[..., None]
        own = self.middle.sub_(self.values).mul_(self.curvature).mul_(scale)
        self.offsets.sub_(own.add_(self.slope).sign_().mul_(scale.sign() * lr)).clamp_(-0.5, 0.5)
        if minmax_lr:
            parts = self.fmt.store(self._wanted(), self.shared)
        self._forward(parts)

    def _by_ends(self) -> list[Tensor]:
        """The error's derivative [R, G] by every end's factor, codes as they are."""
        if len(self.ends) == 1:
            units = self.values if self.numbers.zero is None else self.values - self.numbers.zero[..., None]
            return [(units * self.slope).sum(dim=-1) * self.ends[0]]
        share = (self.values - self.lowest).div_(self.highest - self.lowest).mul_(self.slope).sum(dim=-1)
        return [(self.slope.sum(dim=-1) - share) * self.ends[0], share * self.ends[1]]

    def keep(self) -> None:
        """Remember the present state where it is the best so far: for each row of blocks, or all of them where scales are
        quantized together."""
        losses, ranks, numbers, parts = self._best
        if self.together:
            if float(self.losses.sum()) < float(losses.sum()):
                self._best = (self.losses, self.ranks.to(torch.uint8), self.numbers, self.parts)
            return
        better = self.losses < losses
        rows = better.nonzero()[:, 0]
        ranks[rows] = self.ranks[rows].to(torch.uint8)
        self._best = (torch.where(better, self.losses, losses), ranks, numbers.where(better[:, None], self.numbers), parts)

    def best(self) -> tuple[Tensor, Parts]:
        """Codes uint8 [n, columns] and stored scales of the best state."""
        _, ranks, numbers, parts = self._best
        codes = self.fmt.block.merge(self.ladder.codes(ranks), *self.shape)
        return codes, parts if self.together else self.fmt.store(numbers, self.shared)


def _fields(numbers: Effective) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return numbers.scale, numbers.zero, numbers.minimum


register_algorithm("autoround", AutoRound)
