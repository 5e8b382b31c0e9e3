"""What a GPU is needed for, in one run of less than ten minutes: tests, sanitizer, bench, report. `make gpu` calls this.

    python3 -m bench.gpu                    results in $OUT where that is set, else in bench/results and build/gpu
    python3 -m bench.gpu --minutes 20

Runs from the source tree with the interpreter that it is given, installs nothing and needs no network. Every step has a time
limit of its own and runs whatever became of the step before; what is missing (a sanitizer, a peer) is reported as absent.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 9.5
DEVICE_LOST = 3
RESTARTS = 3
SANITIZER = "compute-sanitizer"
PROBE = (
    "import json, torch; gpu = torch.cuda.is_available(); "
    "print(json.dumps({'torch': torch.__version__, 'device': torch.cuda.get_device_name() if gpu else None}))"
)


@dataclass(frozen=True)
class Step:
    """One step. `command` is built from the seconds that it gets.

    least_s, most_s    what later steps leave it, what it may take; with less than `least_s` it is left out
    absent             why it can't run here, or None
    again              whether to start it again after a lost device or a crash, with what is left of its time
    """

    name: str
    command: Callable[[float], list[str]]
    least_s: float
    most_s: float
    absent: str | None = None
    again: bool = False


@dataclass(frozen=True)
class Result:
    """What became of a step: "passed", "failed", "timed out", "absent" or "left out"."""

    name: str
    state: str
    seconds: float = 0.0
    details: str = ""


@dataclass(frozen=True)
class Finished:
    """A command that ended: its exit code, None where its time was up."""

    code: int | None
    seconds: float


class Runner(Protocol):
    """Runs commands and tells the time."""

    def now(self) -> float: ...

    def run(self, command: Sequence[str], limit_s: float) -> Finished: ...


class SubprocessRunner:
    """Runs each command in a process group of its own; its output goes to the terminal and to `log`."""

    def __init__(self, log: Path) -> None:
        self.log = log
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        self.environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        self.environment.pop("TRITON_INTERPRET", None)

    def now(self) -> float:
        return time.monotonic()

    def run(self, command: Sequence[str], limit_s: float) -> Finished:
        begin = self.now()
        with self.log.open("a") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment,
                text=True,
                errors="replace",
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            reader = Thread(target=self._copy, args=(process, log), daemon=True)
            reader.start()
            try:
                code: int | None = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
                self._stop(process)
            reader.join(10)
        return Finished(code, self.now() - begin)

    @staticmethod
    def _copy(process: subprocess.Popen[str], log: Any) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            log.write(line)
            log.flush()

    @staticmethod
    def _stop(process: subprocess.Popen[str]) -> None:
        """End the group that this runner started: politely, then not."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(5)
                return
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue


def gpu_test_files() -> list[str]:
    """The test files that hold tests marked gpu: the others may need packages that the machine lacks."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if re.search(r"\bmark\.gpu\b", file.read_text())]


def plan(python: str, rows: Path, reports: Path, sanitizer: str | None) -> list[Step]:
    """The steps, in their order."""

    def sanitize(tool: str) -> Callable[[float], list[str]]:
        budget = ["-m", "bench.sanitize", "--seconds"]
        # Without torch's caching allocator every tensor has bounds of its own, which memcheck can see crossed.
        uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
        return lambda seconds: [
            *uncached, sanitizer or SANITIZER, "--tool", tool, "--error-exitcode", "9",
            python, *budget, f"{max(seconds - 15, 5):.0f}"
        ]  # fmt: skip

    missing = None if sanitizer else f"{SANITIZER} is not on the PATH"
    tests = [python, "-m", "pytest", "-p", "bench", "-p", "no:cacheprovider", "-m", "gpu", "-q", *gpu_test_files()]
    bench = [python, "-m", "bench.run", "--quick", "--out", str(rows), "--time-budget"]
    report = [python, "-m", "bench.report", str(rows), "--out", str(reports / "report.md"), "--images", str(reports)]
    return [
        Step("tests", lambda seconds: tests, 20, 150),
        Step("memcheck", sanitize("memcheck"), 20, 90, missing),
        Step("bench", lambda seconds: [*bench, f"{max(seconds - 15, 10):.0f}"], 60, 330, again=True),
        Step("report", lambda seconds: report, 10, 40),
        Step("racecheck", sanitize("racecheck"), 30, 90, missing),
    ]


def execute(steps: Sequence[Step], runner: Runner, total_s: float) -> list[Result]:
    """Run the steps within `total_s` altogether; each leaves the later ones what they need at least."""
    begin, results = runner.now(), []
    for place, step in enumerate(steps):
        reserved = sum(later.least_s for later in steps[place + 1 :] if later.absent is None)
        left = total_s - (runner.now() - begin)
        results.append(_execute(step, runner, min(step.most_s, left - reserved)))
    return results


def _execute(step: Step, runner: Runner, seconds: float) -> Result:
    if step.absent is not None:
        return Result(step.name, "absent", details=step.absent)
    if seconds < step.least_s:
        return Result(step.name, "left out", details=f"{max(seconds, 0):.0f} s were left, it needs {step.least_s:.0f}")
    begin, starts = runner.now(), 0
    while True:
        left = seconds - (runner.now() - begin)
        finished = runner.run(step.command(left), left)
        starts += 1
        crashed = finished.code is not None and (finished.code < 0 or finished.code == DEVICE_LOST)
        if not (step.again and crashed and starts <= RESTARTS and seconds - (runner.now() - begin) >= 20):
            break
    took = runner.now() - begin
    details = f"{starts} starts" if starts > 1 else ""
    if finished.code is None:
        return Result(step.name, "timed out", took, details)
    failure = "" if finished.code == 0 else f"exit code {finished.code}"
    return Result(step.name, "failed" if failure else "passed", took, ", ".join(filter(None, [failure, details])))


def summary(results: Sequence[Result], facts: dict[str, Any]) -> str:
    """The last lines of a run."""
    lines = [f"{facts['device']}, torch {facts['torch']}"]
    lines += [f"{result.name:10} {result.state:10} {result.seconds:5.0f} s  {result.details}".rstrip() for result in results]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps; 0 where none failed or ran out of time, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Tests, sanitizer and bench on a GPU.")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything together")
    options = parser.parse_args(arguments)
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if probe.returncode != 0:
        print(f"{sys.executable} can't import torch: {probe.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return 2
    facts = json.loads(probe.stdout)
    if facts["device"] is None:
        print(f"torch {facts['torch']} of {sys.executable} sees no CUDA device; nothing to do", file=sys.stderr)
        return 2
    given = os.environ.get("OUT")
    reports = Path(given).resolve() if given else ROOT / "build" / "gpu"
    reports.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    stamp = f"{datetime.now(UTC):%Y%m%d-%H%M}"
    rows = (reports if given else ROOT / "bench" / "results") / f"{slug}-{stamp}.jsonl"
    runner = SubprocessRunner(reports / "gpu.log")
    results = execute(plan(sys.executable, rows, reports, shutil.which(SANITIZER)), runner, options.minutes * 60)
    record = {"facts": facts, "steps": [asdict(result) for result in results]}
    (reports / "summary.json").write_text(json.dumps(record, indent=1) + "\n")
    report = reports / "report.md"
    if report.exists():
        print(report.read_text().split("## Cases")[0])
    print(summary(results, facts))
    print(f"rows: {rows}; report, pictures and log: {reports}")
    return 1 if any(result.state in ("failed", "timed out") for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
