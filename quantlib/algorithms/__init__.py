"""Level 2: how scales and codes are chosen. Each algorithm is written once, against `Format`, and so serves every format."""

from quantlib.algorithms.base import Algorithm, get_algorithm, register_algorithm, validate_weight
from quantlib.algorithms.gptq import GPTQ
from quantlib.algorithms.rtn import RTN, quantize
from quantlib.algorithms.statistics import InputStatistics, Need

__all__ = [
    "GPTQ",
    "RTN",
    "Algorithm",
    "InputStatistics",
    "Need",
    "get_algorithm",
    "quantize",
    "register_algorithm",
    "validate_weight",
]
