"""What the device reaches at best: datasheet figures, and the copy bandwidth and matrix rate measured in the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from quantlib.devices import Device
from quantlib.timing import Clock, Timing

COPY_LABEL, MATMUL_LABEL = "ceiling copy", "ceiling matmul"


@dataclass(frozen=True)
class Ceilings:
    """GB/s of a device-to-device copy, bytes read plus bytes written, and TFLOP/s of a large bf16 product; None unmeasured."""

    copy_gbps: float | None
    matmul_tflops: float | None


def measure(clock: Clock, device: torch.device, copy_bytes: int = 1 << 30, side: int = 8192) -> Ceilings:
    """Time a copy of random bytes and a product of random square matrices on `device`."""
    if device.type == "cpu":
        copy_bytes, side = min(copy_bytes, 64 << 20), min(side, 512)
    source = torch.randint(0, 256, (copy_bytes // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _microseconds(clock, COPY_LABEL, lambda: target.copy_(source))
    left = torch.randn(side, side, device=device).to(torch.bfloat16)
    right = torch.randn(side, side, device=device).to(torch.bfloat16)
    product = _microseconds(clock, MATMUL_LABEL, lambda: left @ right)
    return Ceilings(
        None if copy is None else 2 * source.numel() / copy / 1e3,
        None if product is None else 2 * side**3 / product / 1e6,
    )


def _microseconds(clock: Clock, label: str, call: Callable[[], Any]) -> float | None:
    timing = clock.time(label, {"torch": [call]})["torch"]
    return timing.median if isinstance(timing, Timing) else None


def floor_us(nbytes: int, flops: int, gbps: float, tflops: float) -> float:
    """The least microseconds that moving `nbytes` and computing `flops` take."""
    return max(nbytes / gbps / 1e3, flops / tflops / 1e6)


def datasheet_floor_us(nbytes: int, flops: int, device: Device) -> float:
    """The same at the datasheet's rates."""
    return floor_us(nbytes, flops, device.bandwidth, device.peak_tflops)
