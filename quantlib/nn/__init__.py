"""Level 4: torch modules."""

from quantlib.nn.linear import QuantLinear
from quantlib.nn.replace import replace_module

__all__ = ["QuantLinear", "replace_module"]
