"""Level 5: what a model's linear layers read, from sample text, and quantizing block by block on it."""

from quantlib.calibration.distillation import ScaleTuning, tune_scales
from quantlib.calibration.sequential import quantize_in_sequence
from quantlib.calibration.statistics import Statistics, calibrate
from quantlib.calibration.tokens import calibration_tokens

__all__ = ["ScaleTuning", "Statistics", "calibrate", "calibration_tokens", "quantize_in_sequence", "tune_scales"]
