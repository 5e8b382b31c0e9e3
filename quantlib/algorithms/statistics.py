"""What a linear layer's inputs look like: sums over calibration tokens that algorithms choose scales and codes by."""

from __future__ import annotations

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
    outer     [K, K] of x x^T, fp32 or fp64; None where only moments were asked for
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
        k = self.sum_sq.numel()
        if x.shape[-1] != k:
            raise ShapeError(f"{name}: inputs have {x.shape[-1]} columns, expected {k}")
        x = x.detach().reshape(-1, k).to(torch.float32)
        squares = x.square().sum(dim=0, dtype=torch.float64)
        if not bool(torch.isfinite(squares).all()):
            bad = int((~torch.isfinite(x)).sum())
            raise QuantlibError(
                f"{name}: {bad} of {x.numel()} calibration activations are NaN or infinite; run the model in bf16 or fp32, "
                "or leave out the text that brings them about"
            )
        self.tokens += x.shape[0]
        self.sum_sq += squares
        self.sum_abs += x.abs().sum(dim=0, dtype=torch.float64)
        if self.outer is not None:
            _add_outer(self.outer, x)

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
        """[K, K]: 2 / tokens * sum x x^T, the second derivative of the mean squared output error by a row of the weight."""
        if self.outer is None:
            raise QuantlibError("these statistics hold moments only; an algorithm with Hessians must ask for them")
        return self.outer * (2 / max(self.tokens, 1))


SQUARE = 512
"""Columns of a block of the outer product: it is symmetric, so blocks below the diagonal are copied."""


def _add_outer(outer: Tensor, x: Tensor) -> None:
    k = outer.shape[0]
    for start in range(0, k, SQUARE):
        stop = min(start + SQUARE, k)
        block = x[:, start:stop].T @ x[:, start:]
        outer[start:stop, start:] += block
        if stop < k:
            outer[stop:, start:stop] += block[:, stop - start :].T
