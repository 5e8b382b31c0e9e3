"""The errors quantlib raises. Each message names the tensor or module, what was found, what was expected and what to do."""

from __future__ import annotations


class QuantlibError(Exception):
    """Base class of every error that quantlib raises on purpose."""


class FormatError(QuantlibError, ValueError):
    """A spec string, a format option or a scale that no format can hold."""


class ShapeError(QuantlibError, ValueError):
    """A tensor whose shape, dtype or values don't fit the operation."""


class CheckpointError(QuantlibError, RuntimeError):
    """A file or state dict that can't be read or written as asked."""


class KernelError(QuantlibError, RuntimeError):
    """No kernel can run the problem, or the one that was forced can't."""
