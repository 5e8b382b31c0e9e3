"""A model of one chip per architecture: how many CTAs an SM holds, and how long a launch would take at best.

    floor       max(bytes / bandwidth, flops / peak): no kernel is faster
    predicted   the slowest of memory, tensor cores and instruction issue, divided by how evenly CTAs fill the SMs

It knows nothing of latency, of launch overhead or of the power limit: a prediction far above the floor says what to work on,
one close to it says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.static_cases import Work
from bench.static_chips import Chip
from bench.static_compile import Row

REGISTERS_SM = 65536
RESERVED = 1024
"""Bytes of shared memory that a CTA takes more than it asks for."""

SCHEDULERS = 4
TENSOR_MEMORY = 512
"""Columns of an SM of sm_100 and sm_103."""


def ctas_per_sm(chip: Chip, row: Row) -> int:
    """CTAs that one SM holds at once: bounded by registers, shared memory, tensor memory, warps and CTAs.

    Registers go to warps in units of 256 and to 4 warps at a time.
    """
    per_warp = -(-row.registers * 32 // 256) * 256
    warps = REGISTERS_SM // per_warp // 4 * 4
    bounds = [chip.ctas_sm, chip.warps_sm // row.warps, warps // row.warps]
    bounds.append(chip.shared_sm // (-(-row.shared // 128) * 128 + RESERVED))
    if row.tmem:
        bounds.append(TENSOR_MEMORY // row.tmem)
    return min(bounds)


@dataclass(frozen=True)
class Prediction:
    """Microseconds, and what they come from.

    occupancy, waves   CTAs that an SM holds; how often the chip is filled with as many
    balance            1 where all SMs get equally many CTAs
    limit              what takes longest: "memory", "tensor" or "issue"
    """

    occupancy: int
    waves: float
    balance: float
    limit: str
    predicted: float
    floor: float


def predict(chip: Chip, row: Row, work: Work) -> Prediction:
    """What the model makes of a row."""
    occupancy = max(1, ctas_per_sm(chip, row))
    memory = work.bytes / (chip.bandwidth * 1e3)
    tensor = work.flops / (chip.peak_tflops * 1e6)
    instructions = work.weights * row.passes * (row.loop or 0.0) / 32
    issue = instructions / (chip.sms * SCHEDULERS * chip.clock * 1e3)
    balance = row.ctas / (chip.sms * -(-row.ctas // chip.sms))
    limit, slowest = max((("memory", memory), ("tensor", tensor), ("issue", issue)), key=lambda pair: pair[1])
    waves = row.ctas / (chip.sms * occupancy)
    return Prediction(occupancy, waves, balance, limit, slowest / balance, max(memory, tensor))
