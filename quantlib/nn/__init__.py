"""Level 4: torch modules."""

from quantlib.nn.experts import GroupedLinear, QuantExperts
from quantlib.nn.linear import QuantLinear
from quantlib.nn.replace import replace_module

__all__ = ["GroupedLinear", "QuantExperts", "QuantLinear", "replace_module"]
