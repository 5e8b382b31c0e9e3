"""QuantizedTensor: a weight in a quantized format. A plain object that holds plain tensors; no tensor subclass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantlib.errors import ShapeError
from quantlib.formats.base import Format
from quantlib.layouts import get_layout


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight [N, K] as packed parts.

    format   what the numbers are
    shape    (N, K) = (out_features, in_features), without padding
    parts    name -> tensor, in the order of `format.specs`; shapes and dtypes in the rows layout are `format.specs(N, K)`
    layout   the name of the layout that `parts` lie in
    memo     what kernels derive from the parts and want again at the next call; it lives as long as this object
    """

    format: Format
    shape: tuple[int, int]
    parts: dict[str, Tensor]
    layout: str = "rows"
    memo: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def device(self) -> torch.device:
        return self.parts["codes"].device

    @property
    def nbytes(self) -> int:
        """Bytes that the parts occupy."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / (N * K)."""
        n, k = self.shape
        return 8 * self.nbytes / (n * k) if n * k else 0.0

    def to_layout(self, name: str) -> QuantizedTensor:
        """The same weight in another layout (through `rows`). Raises ShapeError where the format can't lie so."""
        if name == self.layout:
            return self
        source, target = get_layout(self.layout), get_layout(name)
        refusal = target.supports(self.format)
        if refusal is not None:
            raise ShapeError(f"layout {name!r} does not take {self.format}: {refusal}")
        rows = source.inverse(self.format, *self.shape, self.parts)
        return QuantizedTensor(self.format, self.shape, target.forward(self.format, *self.shape, rows), name)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] in `dtype`: decoded in fp32 by the format's law, rounded once."""
        return self.format.decode(self.to_layout("rows").parts, *self.shape, dtype)

    def apply(self, function: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        """The same weight with `function` applied to every part (a move to a device, a clone)."""
        parts = {name: function(part) for name, part in self.parts.items()}
        return QuantizedTensor(self.format, self.shape, parts, self.layout)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same weight on `device`."""
        return self.apply(lambda part: part.to(device))

    def __repr__(self) -> str:
        n, k = self.shape
        size = f"{self.bits_per_weight:.3f} bits per weight"
        return f"QuantizedTensor({self.format}, [{n}, {k}], {size}, {self.layout}, {self.device})"
