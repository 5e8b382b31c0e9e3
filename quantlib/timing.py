"""Clocks: microseconds per call of several contestants, measured in turns within one process.

Contestants are interleaved, so that a chip that slows down slows all of them, and each call of a contestant uses another copy
of its weight, so that no call finds its weight in the L2 cache (the copies together exceed `COLD_BYTES`).

GraphClock      a CUDA graph of at least 20 calls, replayed; what a server that captures its decoding step sees
WallClock       for a CPU: ratios within one run mean something, absolute figures of a shared machine do not
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import quantiles
from typing import Any, Protocol

import torch

COLD_BYTES = 256 << 20
"""More than any L2 cache: the copies of a weight that are rotated occupy at least this."""
MOST_COPIES = 128

Calls = Sequence[Callable[[], Any]]
"""The same call, once per copy of the weight."""


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median and the quartiles of `samples` measurements. `clock` says how they were taken."""

    median: float
    q25: float
    q75: float
    samples: int
    clock: str


@dataclass(frozen=True)
class NoTiming:
    """Why a contestant has none."""

    reason: str


class Clock(Protocol):
    """Times every contestant of one case. A contestant that fails gets a NoTiming and does not disturb the others."""

    name: str

    def time(self, label: str, contestants: Mapping[str, Calls]) -> dict[str, Timing | NoTiming]: ...


def summary(samples: Sequence[float], clock: str) -> Timing:
    """The quartiles of samples in microseconds."""
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1, clock)
    q25, median, q75 = quantiles(samples, n=4, method="inclusive")
    return Timing(median, q25, q75, len(samples), clock)


def copies(nbytes: int, cold_bytes: int = COLD_BYTES) -> int:
    """How many copies of a weight of `nbytes` are rotated."""
    return min(MOST_COPIES, 1 + cold_bytes // nbytes) if nbytes else 1


def clock_for(device: torch.device) -> Clock:
    """The clock that decides on this device."""
    return GraphClock() if device.type == "cuda" else WallClock()


def in_turns(rounds: Mapping[str, Callable[[], float]], repeats: int, clock: str) -> dict[str, Timing | NoTiming]:
    """Take one sample (microseconds) of each contestant after the other, `repeats` times; every other time from the last to the
    first, so that what one leaves behind (threads that spin, full caches) does not always meet the same one."""
    samples: dict[str, list[float]] = {name: [] for name in rounds}
    failed: dict[str, NoTiming] = {}
    order = list(rounds.items())
    for turn in range(repeats):
        for name, sample in order if turn % 2 == 0 else reversed(order):
            if name in failed:
                continue
            try:
                samples[name].append(sample())
            except Exception as error:  # a contestant may raise anything; the others go on
                failed[name] = failure(error)
    return {name: failed[name] if name in failed else summary(samples[name], clock) for name in rounds}


def failure(error: Exception) -> NoTiming:
    """What a contestant gets that raised while it was timed."""
    return NoTiming(f"failed while timed: {type(error).__name__}: {error}")


class GraphClock:
    """Replays of a CUDA graph of at least `least` calls; every copy of the weight is used.

    What can't be captured is timed by events around the same calls, and says so (`clock` "events"): its launches count then.
    A round of all contestants is repeated `repeats` times, less often (at least 5 times) where a replay is long.
    """

    name = "graph"

    def __init__(self, least: int = 20, repeats: int = 15, limit_us: float = 300e3) -> None:
        self.least, self.repeats, self.limit_us = least, repeats, limit_us

    def time(self, label: str, contestants: Mapping[str, Calls]) -> dict[str, Timing | NoTiming]:
        rounds: dict[str, Callable[[], float]] = {}
        clocks: dict[str, str] = {}
        found: dict[str, Timing | NoTiming] = {}
        longest = 1.0
        for name, calls in contestants.items():
            many = [calls[place % len(calls)] for place in range(max(self.least, len(calls)))]
            try:
                replay, clocks[name] = _replay(many)
                sample = _event_sample(replay, len(many))
                sample()
                longest = max(longest, sample() * len(many))
            except Exception as error:
                found[name] = failure(error)
            else:
                rounds[name] = sample
        repeats = max(5, min(self.repeats, int(self.limit_us / longest)))
        for name, timing in in_turns(rounds, repeats, self.name).items():
            found[name] = replace(timing, clock=clocks[name]) if isinstance(timing, Timing) else timing
        return {name: found[name] for name in contestants}


def _replay(calls: Calls) -> tuple[Callable[[], Any], str]:
    """What runs the calls once more, and the clock's name: a graph of them, or the calls themselves."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except Exception:
        torch.cuda.synchronize()
        return (lambda: [call() for call in calls]), "events"
    return graph.replay, "graph"


def _event_sample(replay: Callable[[], Any], calls: int) -> Callable[[], float]:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample() -> float:
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / calls

    return sample


class WallClock:
    """Wall time on the CPU, each sample long enough for the timer, copies of the weight in rotation."""

    name = "wall"

    def __init__(self, repeats: int = 7, sample_us: float = 5e3) -> None:
        self.repeats, self.sample_us = repeats, sample_us

    def time(self, label: str, contestants: Mapping[str, Calls]) -> dict[str, Timing | NoTiming]:
        rounds = {name: self._sample(calls) for name, calls in contestants.items()}
        return in_turns(rounds, self.repeats, self.name)

    def _sample(self, calls: Calls) -> Callable[[], float]:
        done = count = 0

        def run(number: int) -> float:
            nonlocal done
            begin = time.perf_counter_ns()
            for _ in range(number):
                calls[done % len(calls)]()
                done += 1
            return (time.perf_counter_ns() - begin) / 1e3 / number

        def sample() -> float:
            nonlocal count
            if not count:
                count = max(1, int(self.sample_us / max(run(1), 1e-3)))
            return run(count)

        return sample
