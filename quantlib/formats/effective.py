"""The fp32 numbers that encoding and decoding use, one per block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Effective:
    """fp32 [R, G]: scale and, where the format has them, zero (an integer) and minimum:

    w = (value - zero) * scale - minimum
    """

    scale: Tensor
    zero: Tensor | None = None
    minimum: Tensor | None = None

    def rows(self, start: int, stop: int) -> Effective:
        """The blocks of block rows start..stop."""
        zero = None if self.zero is None else self.zero[start:stop]
        minimum = None if self.minimum is None else self.minimum[start:stop]
        return Effective(self.scale[start:stop], zero, minimum)

    def reshape(self, *shape: int) -> Effective:
        """The same numbers in another shape."""

        def shaped(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.reshape(shape)

        return Effective(self.scale.reshape(shape), shaped(self.zero), shaped(self.minimum))

    @staticmethod
    def cat(fits: list[Effective]) -> Effective:
        """Fits of consecutive blocks as one."""

        def join(tensors: list[Tensor | None]) -> Tensor | None:
            present = [t for t in tensors if t is not None]
            return torch.cat(present) if present else None

        scale = torch.cat([fit.scale for fit in fits])
        return Effective(scale, join([fit.zero for fit in fits]), join([fit.minimum for fit in fits]))

    def where(self, better: Tensor, other: Effective) -> Effective:
        """`other`'s numbers where `better` [R, G], else one's own."""

        def pick(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            return None if mine is None or theirs is None else torch.where(better, theirs, mine)

        scale = torch.where(better, other.scale, self.scale)
        return Effective(scale, pick(self.zero, other.zero), pick(self.minimum, other.minimum))
