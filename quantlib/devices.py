"""Facts about the devices at hand: what kernels declare their support and their cost against."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Device:
    """One device.

    kind            "cpu" or "cuda"
    name            the chip's name
    arch            "sm_90" for a GPU; "avx512", "avx2" or "scalar" for a CPU
    units           SMs, or threads that torch uses
    bandwidth       GB/s of its main memory, datasheet or estimate
    peak_tflops     dense 16-bit matrix TFLOP/s, datasheet or estimate
    """

    kind: str
    name: str
    arch: str
    units: int
    bandwidth: float
    peak_tflops: float

    @property
    def capability(self) -> int:
        """90 for sm_90; 0 for a CPU."""
        return int(self.arch.removeprefix("sm_")) if self.kind == "cuda" else 0


_GPU_FACTS: dict[int, tuple[float, float]] = {
    80: (2039, 312),
    86: (936, 142),
    89: (1008, 165),
    90: (3350, 989),
    100: (8000, 2250),
    103: (8000, 2500),
    120: (1792, 210),
    121: (273, 62),
}
"""capability -> (GB/s, dense bf16 TFLOP/s) of a typical card of that family, from the vendor's datasheets."""


def _cpu_arch() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "scalar")


def device_facts(device: torch.device | str) -> Device:
    """The facts of a torch device; a device that isn't a GPU of CUDA is described as the CPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return _cpu_facts(torch.get_num_threads())
    return _gpu_facts(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=8)
def _cpu_facts(threads: int) -> Device:
    arch = _cpu_arch()
    per_thread = {"avx512": 0.1, "avx2": 0.05, "scalar": 0.005}[arch]
    return Device("cpu", platform.processor() or platform.machine(), arch, threads, 20.0, threads * per_thread)


@lru_cache(maxsize=64)
def _gpu_facts(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major * 10 + properties.minor
    known = max((key for key in _GPU_FACTS if key <= capability), default=80)
    bandwidth, peak = _GPU_FACTS[known]
    return Device("cuda", properties.name, f"sm_{capability}", properties.multi_processor_count, bandwidth, peak)


def devices() -> list[Device]:
    """The CPU and every visible CUDA GPU. Takes no GPU memory beyond what asking for properties needs."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return [device_facts("cpu"), *(device_facts(f"cuda:{index}") for index in gpus)]
