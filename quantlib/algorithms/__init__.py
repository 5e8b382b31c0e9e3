"""Level 2: how codes are CHOSEN. Every algorithm is written once against Format.fit, encode and decode."""

from quantlib.algorithms.base import Algorithm, get_algorithm, validate_weight
from quantlib.algorithms.rtn import RTN, quantize

__all__ = ["RTN", "Algorithm", "get_algorithm", "quantize", "validate_weight"]
