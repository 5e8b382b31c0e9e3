"""AWQ (arXiv 2306.00978) for every format and on top of every algorithm: inputs of large magnitude are divided by a factor s,
their weights multiplied by it, so that those weights lose less. Whatever makes the inputs takes up 1/s: see
quantlib.calibration.folding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from quantlib.algorithms import blocks as whole
from quantlib.algorithms.base import Algorithm, Scaling, get_algorithm, register_algorithm, require_inputs, validate_weight
from quantlib.algorithms.hessian import padded
from quantlib.algorithms.rtn import RTN
from quantlib.algorithms.statistics import InputStatistics, Need
from quantlib.errors import QuantlibError
from quantlib.formats.base import Format
from quantlib.tensor import QuantizedTensor

CLIPS = tuple(1 - 0.05 * step for step in range(1, 10))
"""What the ends of a block's range are multiplied by in the search for clipping, besides 1."""
LEAST = 1e-4
"""The smallest factor, as a share of the largest."""


@dataclass(frozen=True)
class AWQ:
    """Options, under their usual names.

    base          what chooses scales and codes of the scaled weights, by name or as an object; candidates are compared under
                  it, or, where it needs a Hessian, under rounding to nearest with scales that know their inputs
    n_grid        exponents r = 0, 1/n_grid .. of s = mean|x|^r
    duo_scaling   divide s by (mean |w|, each weight as a share of its block's largest)^(1-r); "both": try with and without
    apply_clip    then look for smaller ranges, block by block; kept for a layer where they lower its output error. A base that
                  needs a Hessian makes up for errors, and chooses its ranges itself
    never_clip    last parts of the names of layers that are not clipped
    """

    base: str | Algorithm = "rtn"
    n_grid: int = 20
    duo_scaling: bool | Literal["both"] = True
    apply_clip: bool = True
    never_clip: tuple[str, ...] = ("q_proj", "k_proj", "qkv_proj")

    needs: ClassVar[Need] = "hessian"

    def __post_init__(self) -> None:
        if self.n_grid < 1:
            raise QuantlibError(f"AWQ(n_grid={self.n_grid}): expected at least one exponent")
        if self.duo_scaling not in (True, False, "both"):
            raise QuantlibError(f"AWQ(duo_scaling={self.duo_scaling!r}): expected True, False or 'both'")
        if isinstance(self._base, Scaling):
            raise QuantlibError(f"AWQ(base={self._base.name!r}): expected an algorithm that doesn't scale inputs itself")
        object.__setattr__(self, "base", self._base)

    @property
    def name(self) -> str:
        return "awq" if self._base == RTN() else f"awq+{self._base.name}"

    @property
    def _base(self) -> Algorithm:
        return get_algorithm(self.base)

    @property
    def _trial(self) -> Algorithm:
        return RTN("mse", importance=True) if self._base.needs == "hessian" else self._base

    def _clips(self, name: str) -> bool:
        return self.apply_clip and self._base.needs != "hessian" and name.rpartition(".")[2] not in self.never_clip

    def scales(
        self, weights: Sequence[Tensor], formats: Sequence[Format], inputs: InputStatistics, sources: Tensor | None = None
    ) -> Tensor | None:
        """The factors s fp32 [P] of least output error for layers that read one input; None where none lowers it.

        weights  [N, K] each, under its format
        sources  int64 [K]: which of the P numbers that are made each input is a copy of; None: every one of itself (P = K)
        """
        width = inputs.columns if sources is None else int(sources.max()) + 1
        best, least = None, self._loss(weights, formats, inputs, None)
        for made in self._candidates(weights, formats, inputs, sources, width):
            loss = self._loss(weights, formats, inputs, made if sources is None else made[sources])
            if loss < least:
                best, least = made, loss
        return best

    def _candidates(
        self, weights: Sequence[Tensor], formats: Sequence[Format], inputs: InputStatistics, sources: Tensor | None, width: int
    ) -> Iterator[Tensor]:
        def over_copies(columns: Tensor) -> Tensor:
            if sources is None:
                return columns
            count = torch.bincount(sources, minlength=width)
            return torch.zeros(width, device=columns.device).index_add_(0, sources, columns) / count

        x = over_copies(inputs.mean_abs.to(weights[0].device))
        shares = [_shares(weight, fmt) for weight, fmt in zip(weights, formats, strict=True)]
        w = over_copies(sum(shares, torch.zeros_like(shares[0])) / sum(len(weight) for weight in weights))
        for duo in (False, True) if self.duo_scaling == "both" else (self.duo_scaling,):
            for step in range(0 if duo else 1, self.n_grid):  # without w, r = 0 scales nothing
                r = step / self.n_grid
                s = _bounded(x) ** r
                if duo:
                    s = s / _bounded(w) ** (1 - r)
                s = _bounded(s)
                yield s / (s.amax() * s.amin()).sqrt()

    def _loss(self, weights: Sequence[Tensor], formats: Sequence[Format], inputs: InputStatistics, s: Tensor | None) -> float:
        """The squared output error, of all layers together."""
        hessian = inputs.hessian.to(weights[0].device)
        seen = inputs if s is None else inputs.divided(s)
        total = 0.0
        for weight, fmt in zip(weights, formats, strict=True):
            weight = weight.detach().to(torch.float32)
            error = self._trial.quantize(weight if s is None else weight * s, fmt, seen).dequantize(torch.float32)
            error = (error if s is None else error / s) - weight
            total += float(((error @ hessian) * error).sum(dtype=torch.float64))
        return total

    def quantize(
        self, weight: Tensor, fmt: Format, inputs: InputStatistics | None = None, name: str = "weight"
    ) -> QuantizedTensor:
        """weight [N, K], scaled already -> rows layout by `base`, clipped where that lowers the output error.

        Raises QuantlibError where statistics or their Hessian are missing, else as `validate_weight` and as `base`.
        """
        validate_weight(weight, fmt, name)
        inputs = require_inputs(inputs, weight, name, self.name)
        hessian = inputs.hessian.to(weight.device)
        weight = weight.detach()
        plain = self._base.quantize(weight, fmt, inputs, name)
        if weight.numel() == 0 or not self._clips(name):
            return plain
        clipped = self._base.quantize(self._clipped(weight, fmt, inputs, hessian), fmt, inputs, name)
        errors = [inputs.output_error(weight, found.dequantize(torch.float32)) for found in (plain, clipped)]
        return clipped if errors[1] < errors[0] else plain

    def _clipped(self, weight: Tensor, fmt: Format, inputs: InputStatistics, hessian: Tensor) -> Tensor:
        """The weight with the range of every block at the share of its extent that serves the block's own inputs best."""
        n, k = weight.shape
        columns = fmt.padded(k)
        blocks = whole.split(fmt, weight)
        low, high = blocks.aminmax(dim=-1, keepdim=True)
        if fmt.zero == "none":
            high = torch.maximum(-low, high)
            low = -high
        cols = fmt.block.cols or columns
        across = columns // cols
        tiles = padded(hessian, columns).view(across, cols, across, cols)
        own = tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [G, cols, cols]

        def errors(candidate: Tensor) -> Tensor:
            found = self._trial.quantize(candidate, fmt, inputs).dequantize(torch.float32)
            error = functional.pad(found - weight, (0, columns - k)).view(n, across, cols).transpose(0, 1)
            return whole.sum_rows(fmt, ((error @ own) * error).sum(dim=2).T)

        share = torch.ones_like(high)
        least = errors(weight)
        for clip in CLIPS:
            error = errors(fmt.block.merge(blocks.clamp(low * clip, high * clip), n, columns)[:, :k])
            share = torch.where((error < least)[..., None], clip, share)
            least = torch.minimum(error, least)
        return fmt.block.merge(blocks.clamp(low * share, high * share), n, columns)[:, :k]


def _shares(weight: Tensor, fmt: Format) -> Tensor:
    """fp32 [K]: the sum over rows of |w| as a share of its block's largest."""
    n, k = weight.shape
    sizes = whole.split(fmt, weight).abs()
    largest = sizes.amax(dim=-1, keepdim=True)
    return fmt.block.merge(sizes / torch.where(largest > 0, largest, 1.0), n, fmt.padded(k))[:, :k].sum(dim=0)


def _bounded(factors: Tensor) -> Tensor:
    """Positive, and none below LEAST of the largest; a vector of zeros becomes ones."""
    largest = factors.amax()
    return torch.where(largest > 0, factors, 1.0).clamp(min=float(LEAST * largest))


register_algorithm("awq", AWQ)
register_algorithm("awq+gptq", partial(AWQ, "gptq"))
