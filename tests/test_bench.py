"""The bench tooling, proven without a GPU: real kernels on the CPU and in Triton's interpreter, times from recordings.

Every figure here is a recording made up for a test. Nothing measures time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import report, run, session
from bench.ceilings import Ceilings
from bench.clock import RecordedClock
from bench.contestants import Contestant, KernelContestant, Prepared, kernel_contestants, taken
from bench.data import Material, problem_bytes
from bench.gate import judge
from bench.guard import DeviceLostError, Failure, attempt
from bench.peers import Peer, list_peers
from bench.peers.cublas import TorchBf16
from bench.peers.marlin import pack_gptq
from bench.protocol import FULL, MS, PLANS, QUICK, SHAPES, Case, by_weight, cases_of, regime
from bench.results import Journal, Row, read_rows
from bench.session import DIED, LOST, NOBODY, PRESENCE, Clocks, Session
from bench.targets import TARGETS
from quantlib.formats import get_format
from quantlib.kernels import list_kernels
from tests.bench_rows import CASE, H100, row

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


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
