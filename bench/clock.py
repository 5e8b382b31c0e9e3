"""The clocks of a run beside those of quantlib.timing, which decide.

DoBenchClock    triton.testing.do_bench; comparable with published numbers
HostClock       how long Python takes to launch, without waiting for the device
SettledClock    wall time after a call that is not counted, for libraries whose threads spin
RecordedClock   plays figures back from a file; it proves the tooling where there is no device
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from quantlib.timing import Calls, NoTiming, Timing, WallClock, failure, in_turns, summary


class DoBenchClock:
    """triton.testing.do_bench, which clears the L2 cache before every call and counts launches that the device waits for."""

    name = "do_bench"

    def __init__(self, warmup_ms: int = 10, measure_ms: int = 40) -> None:
        self.warmup_ms, self.measure_ms = warmup_ms, measure_ms

    def time(self, label: str, contestants: Mapping[str, Calls]) -> dict[str, Timing | NoTiming]:
        from triton.testing import do_bench

        found: dict[str, Timing | NoTiming] = {}
        for name, calls in contestants.items():
            try:
                quartiles = do_bench(calls[0], warmup=self.warmup_ms, rep=self.measure_ms, quantiles=[0.25, 0.5, 0.75])
            except Exception as error:  # a contestant may raise anything; the others go on
                found[name] = failure(error)
            else:
                q25, median, q75 = (1e3 * value for value in quartiles)
                found[name] = Timing(median, q25, q75, 1, self.name)
        return found


class HostClock:
    """Time until a call returns, while the device still works; few calls at a time, so that the launch queue never fills."""

    name = "host"

    def __init__(self, calls: int = 20, repeats: int = 9) -> None:
        self.calls, self.repeats = calls, repeats

    def time(self, label: str, contestants: Mapping[str, Calls]) -> dict[str, Timing | NoTiming]:
        return in_turns({name: self._sample(calls[0]) for name, calls in contestants.items()}, self.repeats, self.name)

    def _sample(self, call: Callable[[], Any]) -> Callable[[], float]:
        def sample() -> float:
            torch.cuda.synchronize()
            begin = time.perf_counter_ns()
            for _ in range(self.calls):
                call()
            return (time.perf_counter_ns() - begin) / 1e3 / self.calls

        return sample


class SettledClock(WallClock):
    """Wall time on the CPU. Before each sample its contestant runs once, uncounted: threads that the one before left spinning
    come to rest, and caches hold what this contestant leaves in them."""

    def _sample(self, calls: Calls) -> Callable[[], float]:
        measured = super()._sample(calls)

        def sample() -> float:
            calls[-1]()
            return measured()

        return sample


class RecordedClock:
    """Plays back samples: {case label: {contestant: [microseconds, ...] or a reason}}. It calls nothing."""

    name = "recorded"

    def __init__(self, recording: Mapping[str, Mapping[str, Any]]) -> None:
        self.recording = recording

    @classmethod
    def load(cls, path: Path) -> RecordedClock:
        return cls(json.loads(path.read_text()))

    def time(self, label: str, contestants: Mapping[str, Calls]) -> dict[str, Timing | NoTiming]:
        recorded = self.recording.get(label, {})
        return {name: self._timing(recorded.get(name, "not in the recording")) for name in contestants}

    def _timing(self, entry: Any) -> Timing | NoTiming:
        return NoTiming(entry) if isinstance(entry, str) else summary(entry, self.name)
