"""What peers have in common: their backend, their distribution, and the plain reasons why one can't run a case."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from typing import ClassVar

import torch

from bench.contestants import Prepared
from bench.data import Material
from bench.environment import version
from bench.protocol import Case


class Peer(ABC):
    """A library beside quantlib.

    distribution, module, tried    its name on the package index, the module to import, and the version it was written for
    formats         quantlib's spec -> the peer's own word for numbers of the same size
    operations      what it does
    activations     what it rounds x to, as in Case
    """

    name: ClassVar[str]
    backend = "peer"
    limit: float | None = None
    distribution: ClassVar[str]
    module: ClassVar[str]
    tried: ClassVar[str]
    formats: ClassVar[Mapping[str, str]]
    operations: ClassVar[tuple[str, ...]] = ("linear",)
    activations: ClassVar[tuple[str | None, ...]] = (None,)
    needs_cuda: ClassVar[bool] = True

    def version(self) -> str:
        return version(self.distribution) or "unknown"

    def absent(self) -> str | None:
        if find_spec(self.module) is None:
            return f"absent: {self.distribution} is not installed ({self.tried} is what the adapter was written for)"
        if self.needs_cuda and not torch.cuda.is_available():
            return "absent: needs a CUDA device"
        return None

    def why_not(self, case: Case, device: torch.device) -> str | None:
        if case.operation not in self.operations:
            return f"does {', '.join(self.operations)}"
        if case.activations not in self.activations:
            return "keeps x in 16 bits" if None in self.activations else f"rounds x to {self.activations[0]}"
        if self.formats and case.format not in self.formats:
            return f"has no {case.format}; it has {', '.join(self.formats)}"
        return self.shape_refusal(case)

    def shape_refusal(self, case: Case) -> str | None:
        """Why N and K don't fit, or None."""
        return None

    @abstractmethod
    def prepare(self, material: Material) -> Prepared: ...


def multiples(case: Case, n: int, k: int) -> str | None:
    """The refusal of a library that needs N and K to be multiples."""
    if case.n % n or case.k % k:
        return f"needs N a multiple of {n} and K of {k}"
    return None
