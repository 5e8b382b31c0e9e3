"""Quantized linear layers that are fast, exact about their numerics and usable wherever a torch.nn.Linear is.

    import quantlib
    quantlib.patch(model, "nvfp4")

Importing has no side effects and takes no GPU memory.
"""

from quantlib import kernels as _kernels
from quantlib.algorithms import quantize
from quantlib.calibration import ScaleTuning, Statistics, calibrate, calibration_tokens, tune_scales
from quantlib.devices import devices
from quantlib.errors import CheckpointError, FormatError, KernelError, QuantlibError, ShapeError
from quantlib.evaluation import Evaluation, evaluate
from quantlib.experts import QuantizedExperts
from quantlib.explain import explain
from quantlib.formats import Format, get_format, list_formats
from quantlib.grouped_ops import grouped_linear
from quantlib.nn import QuantExperts, QuantLinear
from quantlib.ops import linear
from quantlib.patch import patch, unpatch
from quantlib.plan import Plan, plan
from quantlib.report import PatchReport
from quantlib.serialization import load, save
from quantlib.tensor import QuantizedTensor

__version__ = "0.1.0"

del _kernels

__all__ = [
    "CheckpointError",
    "Evaluation",
    "Format",
    "FormatError",
    "KernelError",
    "PatchReport",
    "Plan",
    "QuantExperts",
    "QuantLinear",
    "QuantizedExperts",
    "QuantizedTensor",
    "QuantlibError",
    "ScaleTuning",
    "ShapeError",
    "Statistics",
    "calibrate",
    "calibration_tokens",
    "devices",
    "evaluate",
    "explain",
    "get_format",
    "grouped_linear",
    "linear",
    "list_formats",
    "load",
    "patch",
    "plan",
    "quantize",
    "save",
    "tune_scales",
    "unpatch",
]
