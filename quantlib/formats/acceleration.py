"""What a device computes by itself, faster than torch and with the same bits.

Formats know torch only. Code for a device (quantlib.kernels.cpu_quantize) registers an `Accelerator` here, and `Format` asks it
first. It answers None to whatever it does not take over: torch then does it, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quantlib.formats.base import Format
    from quantlib.formats.effective import Effective
    from quantlib.formats.scales import Parts
    from quantlib.formats.search import Problem, Search


class Accelerator(Protocol):
    """A device's own code for weights [n, k] of any strides and float dtype. None: not taken over (this format, this shape, a
    weight that is not finite)."""

    def extremes(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """The least and the greatest element of a tensor that is not empty."""
        ...

    def problem(self, fmt: Format, weight: Tensor, importance: Tensor | None, shared: Parts, search: Search) -> Problem | None:
        """The blocks of a weight, padded to whole ones, for a fit by `search`. importance: [k] or [n, k], or None."""
        ...

    def encode(self, fmt: Format, weight: Tensor, numbers: Effective) -> Tensor | None:
        """`Format.encode` under these fp32 numbers [R, G]."""
        ...


_accelerators: dict[str, Accelerator] = {}
_plain = False


def register_accelerator(device_type: str, accelerator: Accelerator) -> None:
    """Let weights on devices of a type ("cpu", "cuda") be quantized by `accelerator`."""
    _accelerators[device_type] = accelerator


def accelerator(device: torch.device) -> Accelerator | None:
    """The accelerator of a device, if it has one."""
    return None if _plain else _accelerators.get(device.type)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, no accelerator runs (for tests and comparisons; not for several threads)."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before
