"""One command on a GPU: its steps, their time, and a source tree that runs as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from bench import gpu, run
from bench.environment import describe

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


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
    assert "tests/test_bench_gpu.py" not in files
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
