"""Predicted time from a model of the chip: bytes over bandwidth, flops over peak, instructions over issue slots, waves of
programs.

Efficiencies that were measured on a device are data (tuned.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from quantlib.kernels.base import Problem
from quantlib.kernels.tuned import tuned_efficiency


def packed_bytes(problem: Problem) -> int:
    """Bytes of the weight's parts."""
    return problem.format.nbytes(problem.n, problem.k)


def activation_bytes(problem: Problem) -> int:
    """Bytes of x and y (or dy and dx)."""
    return problem.m * (problem.n + problem.k) * problem.dtype.itemsize


def matrix_peak(problem: Problem) -> float:
    """TFLOP/s of products in the problem's dtype: tensor cores for 16 bits; on a GPU a sixteenth of that for fp32, which none
    multiplies without rounding to TF32."""
    device = problem.device
    whole = device.kind == "cpu" or problem.dtype.itemsize == 2
    return device.peak_tflops if whole else device.peak_tflops / 16


def roofline(problem: Problem, efficiency: float, peak_share: float = 1.0) -> float:
    """Microseconds of a fused kernel: the packed weight is read once; `peak_share` of the matrix peak is reachable."""
    device = problem.device
    memory = (packed_bytes(problem) + activation_bytes(problem)) / (device.bandwidth * 1e3)
    compute = 2 * problem.m * problem.n * problem.k / (matrix_peak(problem) * 1e6 * peak_share)
    return max(memory, compute) / efficiency


def decode_then_matmul(problem: Problem, efficiency: float) -> float:
    """Microseconds of writing the decoded weight, reading it again and multiplying; `efficiency` scales the decoding."""
    device = problem.device
    decoded = problem.n * problem.k * problem.dtype.itemsize
    decode = (packed_bytes(problem) + decoded) / (device.bandwidth * 1e3) / efficiency
    if problem.operation == "dequantize":
        return decode
    matmul_memory = (decoded + activation_bytes(problem)) / (device.bandwidth * 1e3)
    compute = 2 * problem.m * problem.n * problem.k / (matrix_peak(problem) * 1e6)
    return decode + max(matmul_memory, compute)


LAUNCH = 3.0
"""Microseconds that a kernel takes on a GPU before its first byte arrives and after its last one is stored."""
MEETING = 1.0
"""Microseconds that splits of K take to meet: partial sums stored, a counter raised, the others' sums loaded."""
LATENCY = 0.7
"""Microseconds from a load of main memory to its result: bytes under way per SM = bandwidth * LATENCY / SMs fill the
bandwidth."""
LANES = 128
"""Instructions that an SM issues per clock: four schedulers of 32 lanes."""
CLOCK = 1.7
"""GHz, near enough for every chip from sm_80 on."""


def round_trip_cost(problem: Problem) -> float:
    """Microseconds of rounding x to the activations' format and back by torch's own operations, where a kernel asks for that:
    some 20 launches, and as many passes over x."""
    if problem.activations is None:
        return 0.0
    return 20 * (LAUNCH + problem.m * problem.k * 8 / (problem.device.bandwidth * 1e3))


@dataclass(frozen=True)
class Schedule:
    """How a kernel spreads a problem over the chip.

    programs, per_unit   how many programs there are, and how many of them one SM holds at once
    in_flight            bytes of packed weights that one program has under way
    decoded              how often each weight is decoded
    instructions         per decoded weight
    """

    programs: int
    per_unit: int
    in_flight: int
    decoded: int
    instructions: float


def modelled(problem: Problem, schedule: Schedule, peak_share: float, efficiency: float, partial_sums: int = 0) -> float:
    """Microseconds of a fused kernel on a GPU: the longest of memory, tensor cores and decoding, stretched by SMs that have
    less to do than others.

    peak_share      of the matrix peak that the kernel's instruction reaches; efficiency: of the whole model's speed
    partial_sums    fp32 numbers that splits of K write and read again; half of that traffic stays in the L2 cache
    """
    device = problem.device
    programs = max(1, schedule.programs)
    turns = -(-programs // device.units)
    fill = programs / (turns * device.units)
    resident = min(programs, device.units * schedule.per_unit)
    under_way = resident * schedule.in_flight / (device.bandwidth * 1e3 * LATENCY)
    # Reading the weight again for other rows of x mostly finds it in the L2 cache, which has some four times the bandwidth.
    weight = packed_bytes(problem) * (1 + (schedule.decoded - 1) / 4)
    bytes_moved = weight + activation_bytes(problem) + 4 * partial_sums
    memory = bytes_moved / (device.bandwidth * 1e3) / min(1.0, under_way)
    compute = 2 * problem.m * problem.n * problem.k / (matrix_peak(problem) * 1e6 * peak_share) / fill
    decode = problem.n * problem.k * schedule.decoded * schedule.instructions / (device.units * LANES * CLOCK * 1e3) / fill
    meeting = MEETING if partial_sums else 0.0
    return LAUNCH + meeting + max(memory, compute, decode) / efficiency


__all__ = [
    "LAUNCH",
    "Schedule",
    "activation_bytes",
    "decode_then_matmul",
    "matrix_peak",
    "modelled",
    "packed_bytes",
    "roofline",
    "round_trip_cost",
    "tuned_efficiency",
]
