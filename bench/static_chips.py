"""The chip that stands for each architecture, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One chip.

    sms; clock        streaming multiprocessors; GHz at which peak_tflops is stated
    bandwidth         GB/s
    peak_tflops       dense bf16 with fp32 accumulation
    shared_sm         bytes of shared memory of an SM; `shared_cta`: that one CTA may use
    warps_sm, ctas_sm      that an SM holds at most
    """

    name: str
    sms: int
    clock: float
    bandwidth: float
    peak_tflops: float
    shared_sm: int
    shared_cta: int
    warps_sm: int
    ctas_sm: int


_KIB = 1024

CHIPS: dict[int, Chip] = {
    80: Chip("A100 SXM 80GB", 108, 1.41, 2039, 312, 164 * _KIB, 163 * _KIB, 64, 32),
    89: Chip("L40S", 142, 2.52, 864, 362, 100 * _KIB, 99 * _KIB, 48, 24),
    90: Chip("H100 SXM", 132, 1.83, 3350, 989, 228 * _KIB, 227 * _KIB, 64, 32),
    100: Chip("B200", 148, 1.85, 8000, 2250, 228 * _KIB, 227 * _KIB, 64, 32),
    103: Chip("B300", 148, 1.85, 8000, 2250, 228 * _KIB, 227 * _KIB, 64, 32),
    120: Chip("RTX 5090", 170, 2.41, 1792, 210, 100 * _KIB, 99 * _KIB, 48, 24),
    121: Chip("GB10", 48, 2.42, 273, 62, 100 * _KIB, 99 * _KIB, 48, 24),
}
"""A card of each architecture, from datasheets; what an SM holds, from the CUDA programming guide (compute capabilities).

The clocks of the data-centre chips are those their peaks are stated at: 2048, 4096 and 8192 flops per SM and cycle on sm_80,
sm_90 and sm_100. B300 sells with 148 of its die's 160 SMs.
"""
