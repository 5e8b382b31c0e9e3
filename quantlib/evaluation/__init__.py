"""How good a quantized model still is: perplexity under named protocols, KL against the original, plots and a report."""

from quantlib.evaluation.reference import ReferenceLogits
from quantlib.evaluation.result import Divergence, Evaluation, Ratio
from quantlib.evaluation.scoring import capture_reference, evaluate
from quantlib.evaluation.windows import PROTOCOLS, Protocol, TokenWindows, default_text, make_windows

__all__ = [
    "PROTOCOLS",
    "Divergence",
    "Evaluation",
    "Protocol",
    "Ratio",
    "ReferenceLogits",
    "TokenWindows",
    "capture_reference",
    "default_text",
    "evaluate",
    "make_windows",
]
