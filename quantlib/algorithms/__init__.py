"""Level 2: how scales and codes are chosen. Each algorithm is written once, against `Format`, and so serves every format."""

from quantlib.algorithms.autoround import AutoRound
from quantlib.algorithms.awq import AWQ
from quantlib.algorithms.base import (
    Algorithm,
    Scaling,
    get_algorithm,
    list_algorithms,
    register_algorithm,
    validate_weight,
)
from quantlib.algorithms.gptq import GPTQ
from quantlib.algorithms.hqq import HQQ
from quantlib.algorithms.rtn import RTN, quantize
from quantlib.algorithms.statistics import InputStatistics, Need

__all__ = [
    "AWQ",
    "GPTQ",
    "HQQ",
    "RTN",
    "Algorithm",
    "AutoRound",
    "InputStatistics",
    "Need",
    "Scaling",
    "get_algorithm",
    "list_algorithms",
    "quantize",
    "register_algorithm",
    "validate_weight",
]
