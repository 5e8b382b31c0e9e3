"""What a CPU benchmark fixes before it begins, and what the machine reads per second under these settings."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from quantlib.kernels.cpu import isa

THREADS = 2
READ_BYTES = 512 << 20
"""Of the buffer that the read bandwidth is measured on: many times the last-level cache."""
OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_SPINCOUNT")


def pin(threads: int = THREADS) -> None:
    """Keep this process on its first `threads` CPUs, and torch on as many threads. Call it before any product.

    Threads are not bound one by one (OMP_PROC_BIND): libraries may bring an OpenMP runtime each, and one that starts within the
    binding of another would see a single CPU.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


def describe_settings() -> dict[str, str]:
    """The chip, the instruction set that quantlib's kernels run, threads, CPUs, and what OpenMP was told."""
    found = {"chip": chip(), "isa": isa() or "none", "threads": str(torch.get_num_threads())}
    if hasattr(os, "sched_getaffinity"):
        found["cpus"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return found | {name: os.environ[name] for name in OPENMP if name in os.environ}


def chip() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def reader(nbytes: int = READ_BYTES) -> Callable[[], float]:
    """A call that reads `nbytes` once, in order, on every thread: torch's sum of fp32 numbers."""
    buffer = torch.ones(nbytes // 4)
    return lambda: float(buffer.sum())
