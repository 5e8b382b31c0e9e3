"""Clocks of the bench, proven by recordings and by a GPU that is made up. Nothing measures time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.ceilings import Ceilings, floor_us, measure
from bench.clock import DoBenchClock, HostClock, RecordedClock
from quantlib.timing import MOST_COPIES, Calls, GraphClock, NoTiming, Timing, WallClock, copies, summary

CPU = torch.device("cpu")


def test_a_summary_is_the_median_and_the_quartiles() -> None:
    assert summary([3.0, 1.0, 2.0, 5.0, 4.0], "x") == Timing(3.0, 2.0, 4.0, 5, "x")
    assert summary([7.0], "x") == Timing(7.0, 7.0, 7.0, 1, "x")


def test_a_recorded_clock_plays_back_and_calls_nothing(tmp_path: Path) -> None:
    path = tmp_path / "recording.json"
    path.write_text(json.dumps({"case": {"a": [1.0, 2.0, 3.0], "b": "it hung"}}))

    def never() -> None:
        raise AssertionError("called")

    found = RecordedClock.load(path).time("case", {"a": [never], "b": [never], "c": [never]})
    assert found["a"] == Timing(2.0, 1.5, 2.5, 3, "recorded")
    assert found["b"] == NoTiming("it hung")
    assert found["c"] == NoTiming("not in the recording")


def test_a_clock_takes_contestants_in_turns_and_copies_in_rotation() -> None:
    seen: list[str] = []
    contestants: dict[str, Calls] = {
        "a": [lambda: seen.append("a0"), lambda: seen.append("a1")],
        "b": [lambda: 1 / 0],
        "c": [lambda: seen.append("c0")],
    }
    found = WallClock(repeats=3, sample_us=0.0).time("x", contestants)
    assert seen == ["a0", "a1", "c0", "c0", "c0", "a0", "a1", "c0"]
    assert isinstance(found["a"], Timing)
    assert found["b"] == NoTiming("failed while timed: ZeroDivisionError: division by zero")


def test_copies_of_a_weight_exceed_any_cache() -> None:
    assert copies(9 << 20) * (9 << 20) > 256 << 20
    assert copies(1 << 30) == 1
    assert copies(1) == MOST_COPIES
    assert copies(0) == 1


class FakeCuda:
    """Enough of torch.cuda for the graph clock: what is called during a capture runs again at each replay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuse: bool = False) -> None:
        self.now, self.refuse, self.replays = 0.0, refuse, 0
        for name in ("Stream", "CUDAGraph", "Event", "stream", "graph", "current_stream", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"fake_{name.lower()}"))

    def fake_stream(self, stream: Any = None) -> Any:
        return nullcontext() if stream is not None else SimpleNamespace(wait_stream=lambda other: None)

    def fake_current_stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None)

    def fake_synchronize(self, device: Any = None) -> None:
        pass

    def fake_cudagraph(self) -> Any:
        return SimpleNamespace(replay=self._replay, cost=0.0)

    def _replay(self) -> None:
        self.replays += 1
        self.now += self.captured

    @contextmanager
    def fake_graph(self, graph: Any) -> Iterator[None]:
        if self.refuse:
            raise RuntimeError("operation not permitted when stream is capturing")
        before = self.now
        yield
        self.captured, self.now = self.now - before, before

    def fake_event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace(synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: (end.at - event.at) / 1e3
        return event

    def call(self, us: float, seen: list[int], copy: int) -> Callable[[], None]:
        def run() -> None:
            seen.append(copy)
            self.now += us

        return run


@pytest.mark.parametrize("refuse", [False, True])
def test_the_graph_clock_uses_every_copy_and_counts_calls(monkeypatch: pytest.MonkeyPatch, refuse: bool) -> None:
    cuda, seen = FakeCuda(monkeypatch, refuse), list[int]()
    calls = {"few": [cuda.call(3.0, [], 0)], "many": [cuda.call(7.0, seen, copy) for copy in range(33)], "bad": [lambda: 1 / 0]}
    found = GraphClock(repeats=6).time("case", calls)
    clock = "events" if refuse else "graph"
    assert list(found) == ["few", "many", "bad"]
    assert found["bad"] == NoTiming("failed while timed: ZeroDivisionError: division by zero")
    assert set(seen) == set(range(33))
    if refuse:  # the fake's replays know only the last capture
        assert found["few"] == Timing(pytest.approx(3.0), pytest.approx(3.0), pytest.approx(3.0), 6, clock)
    many = found["many"]
    assert isinstance(many, Timing)
    assert (many.median, many.clock, many.samples) == (pytest.approx(7.0), clock, 6)
    assert (cuda.replays > 0) != refuse


def test_long_calls_are_repeated_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    found = GraphClock(repeats=15, limit_us=1e6).time("case", {"slow": [cuda.call(1e4, [], 0)]})["slow"]
    assert isinstance(found, Timing)
    assert found.samples == 5


def test_do_bench_and_host_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.testing.do_bench", lambda call, **options: [call() + offset for offset in (-1, 0, 1)])
    found = DoBenchClock().time("case", {"a": [lambda: 5.0], "b": [lambda: 1 / 0]})
    assert found["a"] == Timing(5e3, 4e3, 6e3, 1, "do_bench")
    assert isinstance(found["b"], NoTiming)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    host = HostClock(calls=2, repeats=3).time("case", {"a": [lambda: None], "b": [lambda: 1 / 0]})
    assert isinstance(host["a"], Timing)
    assert isinstance(host["b"], NoTiming)


def test_ceilings_come_from_the_same_clock() -> None:
    clock = RecordedClock({"ceiling copy": {"torch": [1000.0]}, "ceiling matmul": {"torch": [100.0]}})
    found = measure(clock, CPU, copy_bytes=1 << 20, side=64)
    assert found.copy_gbps == pytest.approx((1 << 20) / 1e6)
    assert found.matmul_tflops == pytest.approx(2 * 64**3 / 1e8)
    assert measure(RecordedClock({}), CPU, copy_bytes=1 << 10, side=8) == Ceilings(None, None)
    assert floor_us(3000, 0, gbps=3.0, tflops=1.0) == pytest.approx(1.0)
    assert floor_us(0, 10**6, gbps=1.0, tflops=1.0) == pytest.approx(1.0)
