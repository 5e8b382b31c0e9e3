"""Predicted time from a model of the chip: bytes over bandwidth, or flops over peak, over an efficiency.

Efficiencies that were measured on a device are data: bench/tuned/<device>.json, installed as `quantlib.tuned`.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from importlib import resources

from quantlib.devices import Device
from quantlib.kernels.base import Problem


def packed_bytes(problem: Problem) -> int:
    """Bytes of the weight's parts."""
    return problem.format.nbytes(problem.n, problem.k)


def activation_bytes(problem: Problem) -> int:
    """Bytes of x and y (or dy and dx)."""
    return problem.m * (problem.n + problem.k) * problem.dtype.itemsize


def roofline(problem: Problem, efficiency: float, peak_share: float = 1.0) -> float:
    """Microseconds of a fused kernel: the packed weight is read once; `peak_share` of the matrix peak is reachable."""
    device = problem.device
    memory = (packed_bytes(problem) + activation_bytes(problem)) / (device.bandwidth * 1e3)
    compute = 2 * problem.m * problem.n * problem.k / (device.peak_tflops * 1e6 * peak_share)
    return max(memory, compute) / efficiency


def decode_then_matmul(problem: Problem, efficiency: float) -> float:
    """Microseconds of writing the decoded weight, reading it again and multiplying; `efficiency` scales the decoding."""
    device = problem.device
    decoded = problem.n * problem.k * problem.dtype.itemsize
    decode = (packed_bytes(problem) + decoded) / (device.bandwidth * 1e3) / efficiency
    if problem.operation == "dequantize":
        return decode
    matmul_memory = (decoded + activation_bytes(problem)) / (device.bandwidth * 1e3)
    compute = 2 * problem.m * problem.n * problem.k / (device.peak_tflops * 1e6)
    return decode + max(matmul_memory, compute)


@lru_cache(maxsize=16)
def _tuned_table(name: str) -> dict[str, float]:
    try:
        text = resources.files("quantlib.tuned").joinpath(f"{name}.json").read_text()
    except (ModuleNotFoundError, FileNotFoundError):
        return {}
    return dict(json.loads(text)["efficiency"])


def tuned_efficiency(device: Device, kernel: str, default: float) -> float:
    """The share of the model's speed that `kernel` was measured to reach on this device, or the default."""
    slug = re.sub(r"[^a-z0-9]+", "-", (device.arch if device.kind == "cpu" else device.name).lower()).strip("-")
    return _tuned_table(slug).get(kernel, default)
