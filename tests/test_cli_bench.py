"""`quantlib bench` and tuned tables: kernels that tests register, figures that tests make up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from quantlib import tuning
from quantlib.cli import app
from quantlib.cli import console as consoles
from quantlib.devices import device_facts
from quantlib.errors import QuantlibError
from quantlib.kernels import Kernel, Problem, register_kernel, unregister_kernel
from quantlib.kernels.triton_launch import Tile
from quantlib.kernels.tuned import slug, tile_key, tuned_efficiency, tuned_tile
from quantlib.tensor import QuantizedTensor
from quantlib.timing import Calls, NoTiming, Timing
from quantlib.tuning import Tuner, measure, merged, subject, write_table


class FakeKernel(Kernel):
    """A kernel with three tiles: one is right, one is right and, by the recording, faster, one is wrong."""

    name = "fake_tunable"
    backend = "torch"
    operation = "linear"
    TILES: ClassVar = [Tile(m, 64, 64, warps, 3) for m, warps in ((16, 4), (16, 8), (32, 8), (64, 8))]

    def supports(self, problem: Problem) -> str | None:
        return None if problem.m <= 64 else "multiplies up to 64 rows"

    def cost(self, problem: Problem) -> float:
        return 1e9

    def tiles(self, problem: Problem) -> list[Tile]:
        return self.TILES

    def run_tile(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, tile: Tile) -> Tensor:
        if tile.m == 64:
            raise RuntimeError("out of resource: shared memory")
        y = x @ weight.dequantize(x.dtype).T
        return y + 1 if tile.m == 32 else y

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        return self.run_tile(problem, x, weight, bias, self.TILES[0])


class FakeClock:
    """The n-th contestant of a case takes 30, 20, 10 ... microseconds; contestants of `failing` have none."""

    name = "fake"

    def __init__(self, failing: tuple[str, ...] = ()) -> None:
        self.failing = failing
        self.labels: list[str] = []

    def time(self, label: str, contestants: dict[str, Calls]) -> dict[str, Timing | NoTiming]:
        self.labels.append(label)
        found: dict[str, Timing | NoTiming] = {}
        for place, name in enumerate(contestants):
            us = 30.0 - 10.0 * place if place < 3 else 100.0
            found[name] = NoTiming("it hung") if name in self.failing else Timing(us, us - 1, us + 1, 3, self.name)
        return found


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    fake = FakeKernel()
    register_kernel(fake)
    yield fake
    unregister_kernel(fake.name)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Invoke the application with a fake clock and a wide console."""
    monkeypatch.setattr(consoles.out, "_width", 200)
    monkeypatch.setattr("quantlib.timing.clock_for", lambda device: FakeClock())
    monkeypatch.setattr("quantlib.tuning.copies", lambda nbytes: 1)

    def invoke(*arguments: object) -> SimpleNamespace:
        result = CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])
        return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)

    return invoke


def small(m_dtype: torch.dtype = torch.bfloat16) -> tuning.Subject:
    return subject("nf4", (33, 130), "cpu", m_dtype)


def test_kernels_are_timed_and_the_one_taken_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "copies", lambda nbytes: 1)
    rows = measure(small(), 3, FakeClock())
    timed = [row for row in rows if row.timing is not None]
    assert timed
    assert [row.timing.median for row in timed if row.timing] == sorted(row.timing.median for row in timed if row.timing)
    assert sum(row.taken for row in rows) == 1
    for row in timed:
        assert row.error is not None
        assert row.error <= 8e-3
        assert row.timing is not None
        assert row.tflops == pytest.approx(2 * 3 * 33 * 130 / row.timing.median / 1e6)


def test_wrong_refused_and_failed_kernels_have_no_time(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "copies", lambda nbytes: 1)
    work, only = small(), {kernel.name}
    (row,) = measure(work, 65, FakeClock(), only)
    assert (row.timing, row.reason) == (None, "multiplies up to 64 rows")
    (row,) = measure(work, 3, FakeClock((kernel.name,)), only)
    assert (row.timing, row.reason) == (None, "it hung")
    monkeypatch.setattr(FakeKernel, "TILES", [Tile(32, 64, 64, 8, 3)])
    (row,) = measure(work, 3, FakeClock(), only)
    assert row.timing is None
    assert row.reason is not None
    assert row.reason.startswith("wrong: relative error")
    monkeypatch.setattr(FakeKernel, "TILES", [Tile(64, 64, 64, 8, 3)])
    (row,) = measure(work, 3, FakeClock(), only)
    assert row.reason == "failed: RuntimeError: out of resource: shared memory"


def test_the_fastest_right_tile_is_kept(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "copies", lambda nbytes: 1)
    lines: list[str] = []
    tuner, work = Tuner(FakeClock(), lines.append), small()
    tuner.add(work, [1, 16, 65], {kernel.name})
    table = tuner.table(device_facts("cpu"))
    tiles = table["tiles"][kernel.name]
    assert set(tiles) == {tile_key(work.problem(m, "rows")) for m in (1, 16)}
    assert list(tiles.values()) == [asdict(kernel.TILES[1])] * 2  # 20 us; the others of the four are slower or wrong
    assert 0 < table["efficiency"][kernel.name] <= 1
    assert table["device"] == device_facts("cpu").name
    assert set(table) == {"device", "triton", "created", "efficiency", "tiles"}
    assert len([line for line in lines if line.startswith(kernel.name) and "the best of 2" in line]) == 2


def test_what_is_written_is_what_kernels_read(kernel: FakeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "copies", lambda nbytes: 1)
    tuner, work, device = Tuner(FakeClock(), lambda line: None), small(), device_facts("cpu")
    tuner.add(work, [4], {kernel.name})
    table = tuner.table(device)
    write_table(table, tmp_path / f"{slug(device)}.json")
    monkeypatch.setenv("QUANTLIB_TUNED", str(tmp_path))
    assert tuned_tile(device, kernel.name, work.problem(3, "rows")) == kernel.TILES[1]  # M = 3 and 4 are one class
    assert tuned_tile(device, kernel.name, work.problem(5, "rows")) is None
    assert tuned_efficiency(device, kernel.name, 0.123) == table["efficiency"][kernel.name]


def test_nothing_to_tune_is_said() -> None:
    with pytest.raises(QuantlibError, match="has a tile to tune"):
        Tuner(FakeClock(), print).table(device_facts("cpu"))


def test_tables_are_joined_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "table.json"
    old: dict[str, Any] = {"device": "X", "triton": "3", "created": "a", "efficiency": {"k": 0.5, "j": 0.1}}
    old |= {"tiles": {"k": {"one": {"m": 1}, "two": {"m": 2}}}}
    write_table(old, path)
    new = old | {"created": "b", "efficiency": {"k": 0.7}, "tiles": {"k": {"two": {"m": 3}}, "l": {"x": {"m": 4}}}}
    write_table(new, path)
    found = json.loads(path.read_text())
    assert found["tiles"] == {"k": {"one": {"m": 1}, "two": {"m": 3}}, "l": {"x": {"m": 4}}}
    assert found["efficiency"] == {"k": 0.7, "j": 0.1}
    assert found["created"] == "b"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(QuantlibError, match="write to another file"):
        merged(old, new | {"device": "Y"})
    path.write_text("{")
    with pytest.raises(QuantlibError, match="is no tuned table"):
        write_table(new, path)


def test_dgrad_is_timed_against_its_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "copies", lambda nbytes: 1)
    work = subject("nf4", (33, 130), "cpu", torch.bfloat16, "dgrad")
    rows = measure(work, 5, FakeClock())
    assert any(row.timing is not None for row in rows)
    with pytest.raises(QuantlibError, match="expected linear or dgrad"):
        subject("nf4", (33, 130), "cpu", torch.bfloat16, "dequantize")


def test_the_command_prints_a_table(run) -> None:  # type: ignore[no-untyped-def]
    kernels = "cpu_linear,cpu_lookup_dot,reference_linear"  # dispatch takes one of them
    result = run("--shape", "33x130", "--format", "nf4,int4", "--m", "1,5", "--device", "cpu", "--kernel", kernels)
    assert result.code == 0, result.err
    assert "linear, nf4, W 33 x 130, bfloat16" in result.out
    assert "linear, int4-g128, W 33 x 130, bfloat16" in result.out
    assert " *" in result.out
    assert "clock: fake" in result.out


def test_the_command_writes_a_table(run, kernel: FakeKernel, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "cpu.json"
    result = run(
        "--tune", "--shape", "33x130", "--format", "nf4", "--m", "1", "--device", "cpu", "--kernel", kernel.name, "-o", path
    )
    assert result.code == 0, result.err
    assert kernel.name in json.loads(path.read_text())["tiles"]
    assert kernel.name in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shape", "12"), "is no NxK"),
        (("--m", "0"), "is no list of batch sizes"),
        (("--dtype", "int8"), "is unknown"),
        (("--format", "int5"), "unknown format"),
        (("--operation", "dequantize"), "expected linear or dgrad"),
        (("--kernel", "nothing"), "no kernel of linear"),
        (("--output", "x.json"), "without --tune nothing is written"),
    ],
)
def test_the_command_refuses_in_words(run, arguments: tuple[str, ...], words: str) -> None:  # type: ignore[no-untyped-def]
    result = run(*arguments, "--device", "cpu")
    assert result.code == 1
    assert words in result.err
    assert "Traceback" not in result.err


def test_a_problem_has_the_layout_of_its_kernel() -> None:
    problem = small().problem(3, "rows")
    assert replace(problem, m=4) == small().problem(4, "rows")
