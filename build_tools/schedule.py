"""Compiling side by side within the machine's memory: one file of CUTLASS templates can take several gigabytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from build_tools import BuildError

T = TypeVar("T")
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Task(Generic[T]):
    """Something to run in a thread: `memory`, in GB, is what it may take at its peak."""

    name: str
    memory: float
    run: Callable[[], T]


def available_memory(meminfo: Path = MEMINFO) -> float:
    """GB that processes can take without swapping; endless where the system doesn't tell."""
    try:
        for line in meminfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) / 1e6
    except (OSError, ValueError):
        pass
    return float("inf")


def worker_count() -> int:
    """How many compilers may run at the same time: MAX_JOBS where it is set, else one per core that this process may use."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked:
        if not asked.isdigit() or int(asked) == 0:
            raise BuildError(f"MAX_JOBS must be a positive number, found {asked!r}")
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(tasks: Sequence[Task[T]], memory: float, workers: int) -> list[T | BuildError]:
    """The results of all tasks in their order; a BuildError stands for itself.

    Those that run together take `memory` GB at most; a task that needs more than that runs alone. Large ones start first.
    """
    results: dict[int, T | BuildError] = {}
    waiting = sorted(range(len(tasks)), key=lambda index: -tasks[index].memory)
    running: dict[Future[T], int] = {}
    with ThreadPoolExecutor(max_workers=workers) as pool:
        try:
            while waiting or running:
                for index in list(waiting):
                    used = sum(tasks[other].memory for other in running.values())
                    if len(running) < workers and (not running or used + tasks[index].memory <= memory):
                        waiting.remove(index)
                        running[pool.submit(tasks[index].run)] = index
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    index = running.pop(done)
                    error = done.exception()
                    if error is not None and not isinstance(error, BuildError):
                        raise error
                    results[index] = done.result() if error is None else error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return [results[index] for index in range(len(tasks))]
