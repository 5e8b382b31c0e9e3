"""QuantizedExperts: the weights of several experts, packed alike and stacked, so that one kernel reaches them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlib.errors import ShapeError
from quantlib.formats.base import Format
from quantlib.tensor import QuantizedTensor


@dataclass(frozen=True)
class QuantizedExperts:
    """Weights [E, N, K] of one format and layout; each expert is quantized by itself, with its own scales of every level.

    format   what the numbers are
    shape    (E, N, K) = (experts, out_features, in_features), without padding
    parts    name -> tensor; entry e of its first dimension is that part of expert e
    layout   the name of the layout that every expert's parts lie in

    `stack` makes it from single weights, `expert` gives one back, bit for bit.
    """

    format: Format
    shape: tuple[int, int, int]
    parts: dict[str, Tensor]
    layout: str = "rows"

    @classmethod
    def stack(cls, weights: Sequence[QuantizedTensor]) -> QuantizedExperts:
        """Weights [N, K] -> [E, N, K]. Raises ShapeError where there is none, or where they are not alike."""
        if not weights:
            raise ShapeError("there are no experts to stack: pass at least one QuantizedTensor")
        first = weights[0]
        for number, weight in enumerate(weights):
            if (weight.format, weight.shape, weight.layout) != (first.format, first.shape, first.layout):
                raise ShapeError(f"expert {number} is {weight}, expert 0 is {first}; stacked experts must be alike")
        parts = {name: torch.stack([weight.parts[name] for weight in weights]) for name in first.parts}
        return cls(first.format, (len(weights), *first.shape), parts, first.layout)

    @property
    def device(self) -> torch.device:
        return self.parts["codes"].device

    @property
    def nbytes(self) -> int:
        """Bytes that the parts occupy."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / (E * N * K)."""
        experts, n, k = self.shape
        return 8 * self.nbytes / (experts * n * k) if experts * n * k else 0.0

    def expert(self, number: int) -> QuantizedTensor:
        """One expert's weight [N, K]; its parts are views."""
        return QuantizedTensor(
            self.format, self.shape[1:], {name: part[number] for name, part in self.parts.items()}, self.layout
        )

    def unstack(self) -> list[QuantizedTensor]:
        """Every expert's weight, as `expert` gives it."""
        return [self.expert(number) for number in range(self.shape[0])]

    def to_layout(self, name: str) -> QuantizedExperts:
        """The same weights in another layout. Raises ShapeError where the format can't lie so."""
        if name == self.layout:
            return self
        return QuantizedExperts.stack([weight.to_layout(name) for weight in self.unstack()])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [E, N, K] in `dtype`: decoded in fp32 by the format's law, rounded once."""
        return torch.stack([weight.dequantize(dtype) for weight in self.unstack()])

    def apply(self, function: Callable[[Tensor], Tensor]) -> QuantizedExperts:
        """The same weights with `function` applied to every part (a move to a device, a clone)."""
        parts = {name: function(part) for name, part in self.parts.items()}
        return QuantizedExperts(self.format, self.shape, parts, self.layout)

    def to(self, device: torch.device | str) -> QuantizedExperts:
        """The same weights on `device`."""
        return self.apply(lambda part: part.to(device))

    def __repr__(self) -> str:
        size = f"{self.bits_per_weight:.3f} bits per weight"
        return f"QuantizedExperts({self.format}, {list(self.shape)}, {size}, {self.layout}, {self.device})"
