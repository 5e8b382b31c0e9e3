"""Level 4: torch modules."""

from quantlib.nn.linear import QuantLinear

__all__ = ["QuantLinear"]
