"""The bench tooling, proven without a GPU: real kernels on the CPU and in Triton's interpreter, times from recordings.

Every figure here is a recording made up for a test. Nothing measures time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import gpu, report, run, session
from bench.ceilings import Ceilings, floor_us, measure
from bench.clock import DoBenchClock, HostClock, RecordedClock
from bench.contestants import Contestant, KernelContestant, Prepared, kernel_contestants, taken
from bench.data import Material, problem_bytes
from bench.environment import Environment, describe
from bench.gate import judge
from bench.guard import DeviceLostError, Failure, attempt
from bench.peers import Peer, list_peers
from bench.peers.cublas import TorchBf16
from bench.peers.marlin import pack_gptq
from bench.plots import ratios, roofline, write_plots
from bench.protocol import FULL, MS, PLANS, QUICK, SHAPES, Case, by_weight, cases_of, regime
from bench.results import FIELDS, Journal, Row, latest, read_rows, to_json
from bench.session import DIED, LOST, NOBODY, PRESENCE, Clocks, Session
from bench.targets import TARGETS, evaluate
from quantlib.formats import get_format
from quantlib.kernels import list_kernels
from quantlib.timing import MOST_COPIES, Calls, GraphClock, NoTiming, Timing, WallClock, copies, summary

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
H100 = Environment(
    "NVIDIA H100 80GB HBM3", "sm_90", "580.0", "2.11.0", "3.6.0", "0.1.0", "recording", "2026-01-01T00:00:00+00:00"
)
CASE = Case("linear", "nf4", 33, 130, 5)


@dataclass(frozen=True)
class Stub:
    """A contestant for tests: multiplies by what `decode` makes of the weight."""

    name: str = "stub"
    backend: str = "peer"
    limit: float | None = None
    decode: Callable[[Material], Tensor] = lambda material: material.weight
    why: str | None = None
    missing: str | None = None
    says: bool = True

    def version(self) -> str:
        return "1.0"

    def absent(self) -> str | None:
        return self.missing

    def why_not(self, case: Case, device: torch.device) -> str | None:
        return self.why

    def prepare(self, material: Material) -> Prepared:
        weight = self.decode(material)
        return Prepared(weight, lambda state, x: x @ state.T, weight.nbytes, weight if self.says else None)


def recorded(case: Case, times: Mapping[str, Any]) -> Clocks:
    return Clocks(RecordedClock({case.label: times}))


def run_session(
    path: Path, clocks: Clocks, peers: list[Any], cases: list[Case], kernels: set[str] | None = None, **options: Any
) -> list[Row]:
    journal = Journal(path)
    Session(
        journal,
        H100,
        clocks,
        Ceilings(3000.0, 800.0),
        peers,
        CPU,
        kernels={"reference_linear"} if kernels is None else kernels,
        cold_bytes=0,
        say=lambda line: None,
        **options,
    ).run(cases)
    journal.close()
    return journal.rows


def row(case: Case = CASE, **fields: Any) -> Row:
    """A synthetic row of a kernel of ours that dispatch takes."""
    basis: dict[str, Any] = {name: getattr(H100, name) for name in Environment.__dataclass_fields__}
    basis |= {"contestant": "kernel", "backend": "triton", "version": "0.1.0", "taken": True, "us": 10.0, "copy_gbps": 3000.0}
    for name in ("operation", "format", "n", "k", "m", "activations"):
        basis[name] = getattr(case, name)
    return Row(**basis | fields)


# protocol


def test_the_plans_hold_the_models_shapes_and_batches() -> None:
    full = cases_of(FULL)
    shapes = {(case.n, case.k) for case in full if case.operation == "linear"}
    assert shapes >= {shape for entries in SHAPES.values() for shape in entries}
    assert {case.m for case in full if case.operation == "linear"} >= set(MS)
    assert {"linear", "dgrad", "dequantize", "quantize"} == {case.operation for case in full}
    for case in full:
        get_format(case.format)


def test_the_quick_plan_measures_every_target_and_begins_with_decoding() -> None:
    quick = cases_of(QUICK)
    assert quick[0].m == 1
    assert quick[0].operation == "linear"
    for target in TARGETS:
        assert any(target.covers(row(case)) for case in quick), target.name
    assert cases_of(FULL)[: len(quick)] == quick


def test_cases_of_a_weight_stand_together() -> None:
    for plan in PLANS.values():
        groups = by_weight(cases_of(plan))
        assert sum(len(cases) for _, cases in groups) == len(cases_of(plan))
        assert all(case.weight == weight for weight, cases in groups for case in cases)
    assert [regime(m) for m in (1, 16, 17, 256, 257, 4096)] == ["decode"] * 2 + ["middle"] * 2 + ["prefill"] * 2


def test_labels_name_cases_uniquely() -> None:
    labels = [case.label for case in cases_of(FULL)]
    assert len(set(labels)) == len(labels)


def test_bytes_count_the_packed_weight_and_the_activations_once() -> None:
    fmt = get_format("nf4")
    assert problem_bytes(CASE) == fmt.nbytes(33, 130) + 5 * (33 + 130) * 2
    assert problem_bytes(Case("dequantize", "nf4", 33, 130, 0)) == fmt.nbytes(33, 130) + 33 * 130 * 2
    assert problem_bytes(Case("quantize", "nf4", 0, 130, 5)) == 5 * 130 * 2 + fmt.nbytes(5, 130)


# clocks


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
    assert seen == ["a0", "a1", "c0", "c0", "a0", "c0", "a1", "c0"]
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


# the gate


def wrong(material: Material) -> Tensor:
    weight = material.weight.clone()
    weight[3] = -weight[3]
    return weight


@pytest.mark.parametrize("says", [True, False])
def test_the_gate_finds_a_weight_that_is_off(says: bool) -> None:
    material = Material(CASE.weight, CPU)
    x = material.inputs(CASE)
    good, bad = Stub(says=says), Stub(says=says, decode=wrong)
    for stub in (good, bad):
        prepared = stub.prepare(material)
        verdict = judge(stub, prepared, material, CASE, x, prepared.call(prepared.state, x))
        assert verdict.error <= verdict.limit
        assert (verdict.reason is None) == (stub is good)


def test_the_gate_finds_wrong_products_and_unwritten_elements() -> None:
    material = Material(CASE.weight, CPU)
    x, prepared = material.inputs(CASE), Stub().prepare(material)
    y = prepared.call(prepared.state, x)
    for spoiled in (y * 1.05, y.where(y != y[4, 7], torch.nan), y[:, :-1], torch.zeros_like(y)):
        reason = judge(Stub(), prepared, material, CASE, x, spoiled).reason
        assert reason is not None
        assert reason.startswith("wrong: relative error")


def test_every_operation_has_a_gate() -> None:
    for operation, kernel in (("dgrad", "reference_dgrad"), ("dequantize", "reference_dequantize")):
        case = replace(CASE, operation=operation, m=0 if operation == "dequantize" else 5)
        contestant = kernel_contestants(operation, {kernel})[0]
        material = Material(case.weight, CPU)
        x, prepared = material.inputs(case), contestant.prepare(material)
        y = prepared.call(prepared.state, x)
        assert judge(contestant, prepared, material, case, x, y).reason is None
        assert judge(contestant, prepared, material, case, x, y * 1.1).reason is not None
    case = Case("quantize", "fp8-e4m3", 0, 64, 5)
    material = Material(case.weight, CPU)
    x, fmt = material.inputs(case), get_format("fp8-e4m3")
    parts = fmt.fit(x)
    parts |= {"codes": fmt.encode(x, parts)}
    stub, unused = Stub(), Prepared(None, lambda state, x: x, 0)
    assert judge(stub, unused, material, case, x, parts).reason is None
    assert judge(stub, unused, material, case, x, parts | {"scales": parts["scales"] * 2}).reason is not None


# sessions


def test_a_wrong_contestant_has_no_speed_and_says_so(tmp_path: Path) -> None:
    times = {"stub": [1.0], "fine": [20.0], "reference_linear": [10.0]}
    peers = [Stub(decode=lambda material: material.weight * 1.5, says=True), Stub("fine")]
    rows = {entry.contestant: entry for entry in run_session(tmp_path / "r.jsonl", recorded(CASE, times), peers, [CASE])[2:]}
    assert rows["stub"].us is None
    assert rows["stub"].weight_error == pytest.approx(0.5, rel=1e-2)
    assert rows["stub"].reason is not None
    assert rows["fine"].us == 20.0
    assert rows["reference_linear"].ratios == {"fine": 2.0}


def test_rates_and_shares_follow_from_the_time(tmp_path: Path) -> None:
    rows = run_session(tmp_path / "r.jsonl", recorded(CASE, {"reference_linear": [8.0, 10.0, 12.0]}), [], [CASE])
    (found,) = rows
    assert (found.us, found.us_q25, found.us_q75, found.clock) == (10.0, 9.0, 11.0, "recorded")
    assert found.gbps == pytest.approx(problem_bytes(CASE) / 10e3)
    assert found.tflops == pytest.approx(CASE.flops / 10e6)
    assert found.floor_measured == pytest.approx(problem_bytes(CASE) / 3000e3 / 10.0)
    assert found.floor_datasheet is not None
    assert found.error is not None
    assert found.limit is not None
    assert found.error <= found.limit


def test_absent_refusing_and_failing_peers_are_rows(tmp_path: Path) -> None:
    def broken(material: Material) -> Tensor:
        raise RuntimeError("no\nnvcc")

    peers = [Stub("gone", missing="absent: not installed"), Stub("picky", why="needs K of 64"), Stub("broken", decode=broken)]
    rows = run_session(tmp_path / "r.jsonl", recorded(CASE, {"reference_linear": [1.0]}), peers, [CASE])
    presence = {entry.contestant: entry.reason for entry in rows if entry.operation == PRESENCE.operation}
    assert presence == {"gone": "absent: not installed", "picky": None, "broken": None}
    reasons = {entry.contestant: entry.reason for entry in rows if entry.case == CASE}
    assert reasons == {"picky": "needs K of 64", "broken": "failed: RuntimeError: no nvcc", "reference_linear": None}


def test_each_row_is_on_the_disk_when_the_next_begins(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    lines: list[int] = []

    def count(material: Material) -> Tensor:
        lines.append(len(read_rows([path])))
        return material.weight

    run_session(path, recorded(CASE, {}), [Stub("a", why="no"), Stub("b", decode=count)], [CASE])
    assert lines == [3]  # two rows of presence, the refusal of "a"


def test_a_run_goes_on_where_its_file_ends(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    second = replace(CASE, m=7)
    clocks = Clocks(RecordedClock({case.label: {"reference_linear": [10.0], "stub": [30.0]} for case in (CASE, second)}))
    first = run_session(path, clocks, [Stub()], [CASE])
    with path.open("a") as file:
        file.write('{"device": "cut off')
    rows = run_session(path, clocks, [Stub()], [CASE, second])
    assert rows[: len(first)] == first
    assert [entry.case for entry in rows[len(first) :]] == [second, second]
    assert read_rows([path]) == rows
    assert not path.with_suffix(".running").exists()


def test_after_a_crash_the_culprit_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Journal(path).starts(CASE, "stub")
    rows = run_session(path, recorded(CASE, {"reference_linear": [10.0], "stub": [1.0]}), [Stub()], [CASE, replace(CASE, m=9)])
    stubs = [entry for entry in rows if entry.contestant == "stub" and entry.operation == "linear"]
    assert [(entry.case, entry.reason) for entry in stubs] == [(CASE, DIED)]
    again = run_session(path, recorded(CASE, {}), [Stub()], [replace(CASE, m=11)])
    assert not [entry for entry in again if entry.contestant == "stub" and entry.m == 11]


def test_a_case_that_killed_the_process_while_timed_is_left_out(tmp_path: Path) -> None:
    path, second = tmp_path / "r.jsonl", replace(CASE, m=9)
    Journal(path).starts(CASE, NOBODY)
    times = {"reference_linear": [10.0], "stub": [1.0]}
    clocks = Clocks(RecordedClock({CASE.label: times, second.label: times}))
    rows = run_session(path, clocks, [Stub()], [CASE, second])[1:]
    assert [(entry.case, entry.contestant) for entry in rows] == [
        (CASE, NOBODY),
        (second, "reference_linear"),
        (second, "stub"),
    ]


def test_a_lost_device_ends_the_process_and_names_the_culprit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: torch.device) -> None:
        raise DeviceLostError("an illegal memory access was encountered")

    monkeypatch.setattr(session, "check_device", lost)
    path = tmp_path / "r.jsonl"
    with pytest.raises(DeviceLostError):
        run_session(path, recorded(CASE, {}), [], [CASE])
    (found,) = read_rows([path])
    assert found.reason == f"{LOST}an illegal memory access was encountered"


def test_no_case_begins_when_the_time_is_up(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "r.jsonl")
    clocks = recorded(CASE, {"reference_linear": [1.0]})
    left = Session(journal, H100, clocks, Ceilings(None, None), [], CPU, seconds=-1.0, say=lambda line: None).run([CASE])
    assert left == 1
    assert not journal.rows


def test_who_takes_too_long_twice_is_left_out(tmp_path: Path) -> None:
    def endless(material: Material) -> Tensor:
        while True:
            pass

    cases = [replace(CASE, m=m) for m in (1, 2, 3)]
    clocks = Clocks(RecordedClock({case.label: {"reference_linear": [1.0]} for case in cases}))
    rows = run_session(tmp_path / "r.jsonl", clocks, [Stub("slow", decode=endless)], cases, patience_s=0.05)
    slow = [entry for entry in rows if entry.contestant == "slow" and entry.case != PRESENCE]
    assert [entry.m for entry in slow] == [1, 2]
    assert all("took more than 0.05 s" in (entry.reason or "") for entry in slow)


def test_an_operation_without_a_kernel_says_so(tmp_path: Path) -> None:
    case = replace(CASE, operation="unheard-of")
    rows = run_session(tmp_path / "r.jsonl", recorded(case, {}), [], [case])
    assert [(entry.contestant, entry.reason) for entry in rows] == [(NOBODY, "no kernel does unheard-of")]


def test_what_takes_too_long_is_a_failure() -> None:
    def endless() -> None:
        while True:
            pass

    found = attempt(endless, seconds=0.05)
    assert isinstance(found, Failure)
    assert "took more than 0.05 s" in found.reason
    assert attempt(lambda: 3, seconds=5.0) == 3


def test_the_interpreter_runs_the_tiny_plan(tmp_path: Path) -> None:
    """Real kernels, one of Triton's per operation among them, through the real command; recorded times."""
    cases = cases_of(PLANS["tiny"])
    kernels = {kernel.operation: kernel.name for kernel in list_kernels() if kernel.backend == "triton"}.values()
    names = [*kernels, *(kernel.name for kernel in list_kernels() if kernel.backend in ("cpu", "reference")), "triton_quantize"]
    recording = tmp_path / "recording.json"
    recording.write_text(json.dumps({case.label: {name: [100.0] for name in (*names, "torch_bf16")} for case in cases}))
    out = tmp_path / "rows.jsonl"
    arguments = ["--tiny", "--device", "cpu", "--clock", f"recorded:{recording}", "--peers", "torch_bf16", "--out", str(out)]
    assert run.main([*arguments, "--cold-mb", "0", "--kernels", ",".join(names)]) == 0
    rows = read_rows([out])
    assert {entry.case for entry in rows} - {PRESENCE} == set(cases)
    assert {entry.backend for entry in rows if entry.us is not None} >= {"triton", "peer"}
    for entry in rows:
        assert entry.reason is None or not entry.reason.startswith(("wrong", "failed")), f"{entry.contestant}: {entry.reason}"
    assert report.main([str(out), "--out", str(tmp_path / "report.md"), "--images", str(tmp_path / "images")]) == 0
    assert "| linear | `nf4` | 64 x 256 | 17 |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "images" / "roofline.png").exists()
    for case in cases:
        favourite = "triton_quantize" if case.operation == "quantize" else taken(case, CPU)
        assert favourite in {entry.contestant for entry in rows if entry.case == case and entry.taken}


def test_the_command_chooses_cases_and_peers() -> None:
    options = run._parser().parse_args(["--formats", "nf4", "--shapes", "64x128,33x16", "--m", "1,3", "--operation", "dgrad"])
    assert [case.label for case in run.chosen_cases(options)] == [
        f"dgrad nf4 {shape} M={m}" for shape in ("64x128", "33x16") for m in (1, 3)
    ]
    options = run._parser().parse_args(["--quick", "--m", "16"])
    assert {case.m for case in run.chosen_cases(options)} == {16}
    assert run.chosen_peers("none") == []
    assert [peer.name for peer in run.chosen_peers("marlin,gemlite")] == ["marlin", "gemlite"]
    with pytest.raises(SystemExit, match="nobody"):
        run.chosen_peers("nobody")


# peers


def test_peers_are_complete_and_absent_ones_say_why() -> None:
    peers = list_peers()
    names = {peer.name for peer in peers}
    assert names >= {name for target in TARGETS for name in target.peers}
    assert len(names) == len(peers)
    for peer in peers:
        assert isinstance(peer, Peer)
        reason = peer.absent()
        assert reason is None or reason.startswith("absent: ")
        assert peer.tried
        assert peer.version()
        for fmt in peer.formats:
            get_format(fmt)


def test_peers_refuse_in_words() -> None:
    for peer in list_peers():
        for case in cases_of(QUICK):
            reason = peer.why_not(case, CPU)
            assert reason is None or (reason and "\n" not in reason)


@pytest.mark.parametrize("peer", [peer for peer in list_peers() if not peer.needs_cuda], ids=lambda peer: peer.name)
def test_peers_that_run_here_pass_the_gate(peer: Peer) -> None:
    if peer.absent() is not None:
        pytest.skip(str(peer.absent()))
    for operation in peer.operations:
        case = Case(operation, "nf4", 64, 128, 3)
        assert peer.why_not(case, CPU) is None
        material = Material(case.weight, CPU)
        x, prepared = material.inputs(case), peer.prepare(material)
        for state in (prepared.state, prepared.copy(prepared.state)):
            with torch.no_grad():
                y = prepared.call(state, x)
            assert judge(peer, prepared, material, case, x, y).reason is None


def test_marlins_words_hold_eight_codes_each() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 1)
    words = pack_gptq(codes, 4)
    assert words.shape == (2, 2)
    assert [int(word) & 0xFFFFFFFF for word in words[:, 0]] == [0x76543210, 0xFEDCBA98]


def test_contestants_satisfy_their_protocol() -> None:
    contestant: Contestant = KernelContestant(list_kernels("linear")[0])
    peer: Contestant = TorchBf16()
    assert contestant.why_not(replace(CASE, operation="dgrad"), CPU) == "does linear"
    assert peer.backend == "peer"


# rows, targets, tables, pictures


def test_a_row_survives_its_line() -> None:
    full = row(ratios={"marlin": 1.5}, error=1e-3, reason="why", extra_bytes=7)
    record = json.loads(to_json(full))
    assert set(record) <= set(FIELDS)
    assert {"device", "driver", "torch", "triton", "quantlib", "commit", "date", "operation", "n", "k", "m"} <= set(record)
    assert Row(**record) == full
    assert "do_bench_us" not in record


def test_the_latest_row_of_a_case_counts() -> None:
    old, new = row(us=5.0), row(us=7.0, date="2026-02-01T00:00:00+00:00")
    assert latest([new, old, row(replace(CASE, m=1))]) == [new, row(replace(CASE, m=1))]


def outcomes(*rows: Row) -> dict[str, tuple[float | None, str]]:
    return {outcome.target.name: (outcome.ratio, outcome.state) for outcome in evaluate(rows)}


def test_targets_are_not_measured_without_rows() -> None:
    assert set(outcomes().values()) == {(None, "not measured")}
    wide = Case("linear", "int4-g128", 28672, 4096, 1)
    on_another_card = row(wide, device="NVIDIA A100", gbps=2900.0)
    hidden = row(wide, us=None, gbps=None, reason="wrong: relative error 1 exceeds 0.008")
    not_taken = row(wide, taken=False, gbps=2900.0)
    for useless in (on_another_card, hidden, not_taken):
        assert set(outcomes(useless).values()) == {(None, "not measured")}


def test_targets_take_the_worst_case() -> None:
    wide, tall = Case("linear", "int4-g128", 28672, 4096, 1), Case("linear", "nf4", 8192, 28672, 16)
    name, marlin = "4-bit, M <= 16, wide and tall", "4-bit, M <= 16, against marlin"
    found = outcomes(row(wide, gbps=2700.0, ratios={"marlin": 1.2}), row(tall, gbps=2250.0, ratios={"marlin": 1.0}))
    assert found[name] == (pytest.approx(0.75), "met")
    assert found[marlin] == (1.0, "not met")  # as fast is not faster
    assert outcomes(row(wide, gbps=2000.0))[name] == (pytest.approx(2 / 3), "not met")


def test_the_best_peer_counts_and_a_copy_does_not() -> None:
    middle = Case("linear", "int4-g128", 8192, 8192, 64)
    found = outcomes(row(middle, ratios={"marlin": 1.4, "gemlite": 0.9, "torch_bf16": 0.5}))
    assert found["4-bit, M 64-256, against the best peer"] == (0.9, "not met")
    name = "4-bit dX, M 512-4096, against decoding first, without a 16-bit copy"
    backward = Case("dgrad", "nf4", 8192, 8192, 512)
    copying = row(backward, us=5.0, extra_bytes=2 * 8192 * 8192, ratios={"dequantize_cublas": 2.0})
    fused = row(backward, us=9.0, extra_bytes=1 << 20, ratios={"dequantize_cublas": 1.1}, taken=False)
    assert outcomes(copying)[name] == (None, "not measured")
    assert outcomes(copying, fused)[name] == (1.1, "met")


def test_the_report_shows_targets_cases_and_failures() -> None:
    wide = Case("linear", "int4-g128", 28672, 4096, 1)
    rows = [
        row(wide, gbps=2700.0, tflops=5.0, floor_measured=0.9, error=1e-3, ratios={"marlin": 1.2, "gemlite": 1.6}, host_us=4.0),
        row(wide, contestant="other", us=None, taken=False, reason="wrong: relative error 0.5 exceeds 0.008"),
        row(PRESENCE, contestant="marlin", us=None, taken=False, version="", reason="absent: gptqmodel is not installed"),
    ]
    text = report.document(rows)
    assert "| 4-bit, M <= 16, wide and tall | H100 | >= 0.70 of copy | 0.90 of copy | met |" in text
    assert (
        "| linear | `int4-g128` | 28672 x 4096 | 1 | kernel | 10.0 | 2700 | 5.0 | 90% | 4 | 1.0e-03 | marlin | 1.20 |" in text
    )
    assert "| linear | `int4-g128` | decode | 1 | 90% | 1.20 |" in text
    assert "- marlin: absent: gptqmodel is not installed" in text
    assert "- other, linear int4-g128 28672x4096 M=1: wrong: relative error 0.5 exceeds 0.008" in text
    assert "commit recording" in text
    empty = report.document([])
    assert empty.count("not measured") == len(TARGETS)
    assert "No run on a GPU has been recorded." in empty


def test_the_readme_block_is_replaced_between_its_markers() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.updated(text, "new") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    with pytest.raises(ValueError, match="needs one"):
        report.updated("no markers", "new")


def test_the_readme_shows_what_the_committed_rows_say() -> None:
    rows = latest(read_rows(sorted(report.RESULTS.glob("*.jsonl"))))
    readme = (ROOT / "README.md").read_text()
    assert report.updated(readme, report.readme_block(rows)) == readme, "run python -m bench.report --update"


def test_pictures_are_written_and_repeat_byte_for_byte(tmp_path: Path) -> None:
    rows = [
        row(Case(operation, "nf4", 8192, 8192, m), tflops=10.0 * m, matmul_tflops=800.0, ratios={"torch_bf16": 0.5 + m / 20})
        for operation in ("linear", "dgrad")
        for m in (1, 16, 64)
    ]
    paths = write_plots(rows, tmp_path)
    assert [path.name for path in paths] == ["roofline.png", "ratios.png"]
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_plots(rows, tmp_path)] == first
    assert all(picture.startswith(b"\x89PNG") for picture in first)
    assert write_plots([], tmp_path / "empty") == []
    assert roofline([]) is None
    assert ratios([row()]) is None


# one command on a GPU


class FakeRunner:
    """Pretends that commands run: each takes the seconds its name says, at most its limit."""

    def __init__(self, seconds: Mapping[str, float], codes: Mapping[str, list[int]] | None = None) -> None:
        self.seconds, self.codes = seconds, dict(codes or {})
        self.time, self.log = 0.0, list[tuple[str, float]]()

    def now(self) -> float:
        return self.time

    def run(self, command: list[str], limit_s: float) -> gpu.Finished:
        name = next(word for word in ("pytest", "memcheck", "racecheck", "bench.run", "bench.report") if word in command)
        self.log.append((name, limit_s))
        took = min(self.seconds.get(name, 1.0), limit_s)
        self.time += took
        if took < self.seconds.get(name, 1.0):
            return gpu.Finished(None, took)
        codes = self.codes.get(name, [])
        return gpu.Finished(codes.pop(0) if codes else 0, took)


def steps(sanitizer: str | None = "/bin/compute-sanitizer") -> list[gpu.Step]:
    return gpu.plan("python3", Path("rows.jsonl"), Path("reports"), sanitizer)


def test_the_gpu_run_has_its_order_and_fits_ten_minutes() -> None:
    runner = FakeRunner({"pytest": 60.0, "memcheck": 50.0, "bench.run": 200.0, "racecheck": 40.0})
    results = gpu.execute(steps(), runner, gpu.MINUTES * 60)
    assert [result.name for result in results] == ["tests", "memcheck", "bench", "report", "racecheck"]
    assert {result.state for result in results} == {"passed"}
    slow = FakeRunner(dict.fromkeys(("pytest", "memcheck", "bench.run", "bench.report", "racecheck"), 1e9))
    results = gpu.execute(steps(), slow, gpu.MINUTES * 60)
    assert slow.time <= gpu.MINUTES * 60 < 600
    assert [result.state for result in results][:4] == ["timed out"] * 4
    assert dict(slow.log)["bench.run"] >= 240


def test_the_steps_speak_the_commands_languages() -> None:
    commands = {step.name: step.command(100.0) for step in steps()}
    options = run._parser().parse_args(commands["bench"][3:])
    assert (options.plan, options.time_budget) == ("quick", 85.0)
    assert commands["memcheck"][:2] == ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    assert commands["memcheck"][2:7] == ["/bin/compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    assert commands["memcheck"][7:] == ["python3", "-m", "bench.sanitize", "--seconds", "85"]
    assert "rows.jsonl" in commands["report"]


def test_a_step_that_fails_does_not_stop_the_next() -> None:
    results = gpu.execute(steps(None), FakeRunner({}, {"pytest": [1]}), 570)
    assert [result.state for result in results] == ["failed", "absent", "passed", "passed", "absent"]
    assert "not on the PATH" in results[1].details


def test_the_bench_starts_again_after_a_lost_device_or_a_crash() -> None:
    runner = FakeRunner({"bench.run": 30.0}, {"bench.run": [gpu.DEVICE_LOST, -11, 0]})
    bench = gpu.execute(steps(), runner, 570)[2]
    assert (bench.state, bench.details) == ("passed", "3 starts")
    limits = [limit for name, limit in runner.log if name == "bench.run"]
    assert limits == sorted(limits, reverse=True)
    runner = FakeRunner({"bench.run": 30.0}, {"bench.run": [gpu.DEVICE_LOST] * 9})
    assert gpu.execute(steps(), runner, 570)[2].state == "failed"
    assert gpu.DEVICE_LOST == run.DEVICE_LOST


def test_steps_without_enough_time_are_left_out() -> None:
    results = gpu.execute(steps(), FakeRunner({}), 60)
    assert results[0].state == "left out"
    assert results[0].details


def test_the_subprocess_runner_ends_what_it_started(tmp_path: Path) -> None:
    runner = gpu.SubprocessRunner(tmp_path / "log")
    done = runner.run([sys.executable, "-c", "print('hello'); raise SystemExit(4)"], 60)
    assert done.code == 4
    assert "hello" in (tmp_path / "log").read_text()
    assert runner.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.2).code is None


def test_without_a_gpu_nothing_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert gpu.main([]) == 2
    assert not (tmp_path / "out").exists()


def test_gpu_tests_are_named_by_file() -> None:
    files = gpu.gpu_test_files()
    assert files
    assert "tests/test_bench.py" not in files
    for name in files:
        assert "@pytest.mark." + "gpu" in (ROOT / name).read_text()


def test_the_source_tree_runs_uninstalled(tmp_path: Path) -> None:
    """A copy of the tree, nothing of it installed: Triton's kernels and tuned tables are found, launches run."""
    for name in ("quantlib", "triton_kernels", "bench", "pyproject.toml"):
        source = ROOT / name
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build.json", "results")
        shutil.copytree(source, tmp_path / name, ignore=ignore) if source.is_dir() else shutil.copy(source, tmp_path / name)
    # -S leaves out site-packages' .pth files, and with them an editable installation; the packages stay reachable by path.
    packages = os.pathsep.join(entry for entry in sys.path if entry.endswith("site-packages"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), packages]), "TRITON_INTERPRET": "1"}
    code = (
        "import sys; sys.argv = ['sanitize', '--formats', 'nf4', '--seconds', '2']; import bench.sanitize, quantlib;"
        f"assert quantlib.__file__.startswith({str(tmp_path)!r}), quantlib.__file__;"
        "from quantlib.kernels.triton_launch import import_failure; assert import_failure() is None, import_failure();"
        "import quantlib.tuned; raise SystemExit(bench.sanitize.main())"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 wrong" in done.stdout


def test_an_environment_names_its_versions() -> None:
    found = describe(CPU)
    assert found.torch == torch.__version__
    assert found.commit
    assert found.arch
