"""What a linear layer's inputs look like: sums over calibration tokens that algorithms choose scales and codes by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantlib.errors import QuantlibError, ShapeError

Need = Literal["nothing", "moments", "hessian"]
"""What an algorithm asks of the inputs: no data; mean |x| and mean x^2 of each; the mean of x x^T as well."""


@dataclass
class InputStatistics:
    """Sums over the inputs x [tokens, K] that layers with one common input have seen.

    tokens    how many
    sum_abs   [K] of |x|, fp64
    sum_sq    [K] of x^2, fp64
    outer     [K, K] of x x^T, fp32; None where only moments were asked for
    """

    tokens: int
    sum_abs: Tensor
    sum_sq: Tensor
    outer: Tensor | None = None

    @classmethod
    def empty(cls, k: int, need: Need, device: torch.device | str = "cpu") -> InputStatistics:
        """Nothing seen yet."""
        zeros = torch.zeros(k, dtype=torch.float64, device=device)
        outer = torch.zeros(k, k, dtype=torch.float32, device=device) if need == "hessian" else None
        return cls(0, zeros, zeros.clone(), outer)

    def add(self, x: Tensor, name: str = "input") -> None:
        """Count inputs [..., K] of any float dtype. Raises QuantlibError where one is NaN or infinite."""
        if x.shape[-1] != self.columns:
            raise ShapeError(f"{name}: inputs have {x.shape[-1]} columns, expected {self.columns}")
        x = x.detach().reshape(-1, self.columns).to(torch.float32)
        squares, sizes = torch.zeros_like(self.sum_sq), torch.zeros_like(self.sum_abs)
        for rows in x.split(CACHED if x.device.type == "cpu" else max(len(x), 1)):
            squares += rows.square().sum(dim=0, dtype=torch.float64)
            sizes += rows.abs().sum(dim=0, dtype=torch.float64)
        if not bool(torch.isfinite(squares).all()):
            bad = int((~torch.isfinite(x)).sum())
            raise QuantlibError(
                f"{name}: {bad} of {x.numel()} calibration activations are NaN or infinite; run the model in bf16 or fp32, "
                "or leave out the text that brings them about"
            )
        self.tokens += x.shape[0]
        self.sum_sq += squares
        self.sum_abs += sizes
        if self.outer is not None:
            _add_outer(self.outer, x)

    def divided(self, factors: Tensor) -> InputStatistics:
        """The statistics of x / factors, for factors [K]."""
        s = factors.to(device=self.sum_sq.device, dtype=torch.float64)
        outer = None if self.outer is None else self.outer / torch.outer(s, s).to(torch.float32)
        return InputStatistics(self.tokens, self.sum_abs / s.abs(), self.sum_sq / s.square(), outer)

    def tensors(self) -> list[Tensor]:
        """The sums themselves, to be added up over processes."""
        return [self.sum_abs, self.sum_sq] + ([] if self.outer is None else [self.outer])

    @property
    def columns(self) -> int:
        """K."""
        return self.sum_sq.numel()

    @property
    def mean_abs(self) -> Tensor:
        """[K] fp32: mean |x|."""
        return (self.sum_abs / max(self.tokens, 1)).to(torch.float32)

    @property
    def mean_square(self) -> Tensor:
        """[K] fp32: mean x^2, the importance of each input's weights."""
        return (self.sum_sq / max(self.tokens, 1)).to(torch.float32)

    @property
    def hessian(self) -> Tensor:
        """[K, K] fp32: 2 / tokens * sum x x^T, the second derivative of the mean squared output error by a weight's row."""
        if self.outer is None:
            raise QuantlibError("these statistics hold moments only; an algorithm with Hessians must ask for them")
        return self.outer * (2 / max(self.tokens, 1))

    def output_error(self, weight: Tensor, decoded: Tensor) -> float:
        """||x (decoded - weight)^T|| / ||x weight^T|| over all tokens, for weights [N, K]. Without the outer product, as if
        inputs were independent of each other."""
        weight = weight.detach().to(torch.float32)
        error, signal = self._energy(decoded.to(torch.float32) - weight), self._energy(weight)
        return math.sqrt(error / signal if signal else error)

    def _energy(self, matrix: Tensor) -> float:
        if self.outer is None:
            return float((matrix.square().sum(dim=0, dtype=torch.float64) * self.sum_sq.to(matrix.device)).sum())
        return max(0.0, float(((matrix @ self.outer.to(matrix.device)) * matrix).sum(dtype=torch.float64)))


CACHED = 64
"""Rows whose squares a CPU sums at a time: they stay in its cache, where those of a whole batch would need fresh pages."""
SQUARE = 512
"""Columns of a block of the outer product: it is symmetric, so blocks below the diagonal are copied."""


def _add_outer(outer: Tensor, x: Tensor) -> None:
    k = outer.shape[0]
    for start in range(0, k, SQUARE):
        stop = min(start + SQUARE, k)
        outer[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
        outer[stop:, start:stop] = outer[start:stop, stop:].T
