"""quantlib._cpu under AddressSanitizer and UndefinedBehaviorSanitizer: how it is built, and tests run with it in its place.

python -m tests.sanitized MODULE REPORT pytest-arguments        (what test_cpu_sanitizers.py starts)
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

from build_tools import cpu
from build_tools.host import ROOT, Compiler

from .simt.build import locked

OUTPUT = ROOT / "build" / "sanitized"
# -O1 keeps the order and the number of loads and stores near the source's; results don't depend on it (-ffp-contract=off).
FLAGS = (
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-O1",
    "-g1",
)
RUNTIMES = ("libasan.so", "libubsan.so")
FAULT_STATUS = 87
"""What a process ends with after a report: no status of Python or pytest."""


def runtimes(compiler: Compiler) -> list[str]:
    """The paths of the sanitizers' shared libraries; empty where the compiler has none."""
    ask = [[*compiler.command, f"-print-file-name={name}"] for name in RUNTIMES]
    paths = [subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in ask]
    return paths if all(Path(path).is_absolute() for path in paths) else []


def why_not(compiler: Compiler) -> str | None:
    """Why nothing can be built and run under the sanitizers, or None."""
    if not compiler.accepts(list(FLAGS)):
        return f"{compiler.version} does not link with {FLAGS[0]}"
    if not runtimes(compiler):
        return f"{compiler.version} has no {' and '.join(RUNTIMES)} to load into Python: g++ and its libasan and libubsan have"
    return None


def build(name: str, variant: cpu.Variant) -> Path:
    """The module, compiled with FLAGS and linked anew from objects that are kept under build/. Raises BuildError."""
    target = OUTPUT / f"{name}.so"
    with locked(OUTPUT / "build.lock"):
        fresh = target.with_suffix(f".{os.getpid()}.so")
        cpu.build(fresh, {}, [sysconfig.get_path("include")], replace(variant, flags=FLAGS))
        fresh.replace(target)
    return target


@dataclass(frozen=True)
class Outcome:
    """How a process ended, and what it and the sanitizers wrote."""

    status: int
    output: str


def run(compiler: Compiler, isas: Sequence[str], *arguments: str) -> Outcome:
    """Python with the sanitizers loaded before everything else; whatever they report ends it. `isas` may run in it."""
    status = f"exitcode={FAULT_STATUS}"
    environment = os.environ | {
        "LD_PRELOAD": ":".join(runtimes(compiler)),
        # Python keeps memory until it ends. Frames that are kept after a return lie at multiples of 32 bytes (gcc before 13.3,
        # PR 110027), where aligned stores of 64 are faults of their own.
        "ASAN_OPTIONS": f"{status}:detect_leaks=0:detect_stack_use_after_return={int('avx512' not in isas)}",
        "UBSAN_OPTIONS": f"{status}:print_stacktrace=1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    environment.pop("QUANTLIB_CPU_ISA", None)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return Outcome(done.returncode, done.stdout)


# In the process that the sanitizers watch


def put_in_place(module: str) -> Any:
    """Load the module as quantlib._cpu, before quantlib loads the installed one."""
    assert "quantlib" not in sys.modules
    spec = importlib.util.spec_from_file_location("quantlib._cpu", module)
    assert spec is not None
    assert spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    sys.modules["quantlib._cpu"] = native
    spec.loader.exec_module(native)
    from quantlib.kernels import cpu as kernels

    assert kernels.native() is native, kernels.unavailable
    return native


def kernel_names(native: Any) -> list[str]:
    """The functions of the extension that run kernels: those that are told a number of threads."""
    return sorted(name for name, function in vars(native).items() if "threads:" in (getattr(function, "__doc__", None) or ""))


def count_calls(native: Any) -> Counter[str]:
    """Counts, from now on, "function instruction-set one|several" threads."""
    calls: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        @wraps(function)
        def call(*arguments: Any) -> Any:
            threads = "one" if arguments[-1] == 1 else "several"
            calls[f"{name} {native.isa()} {threads}"] += 1
            return function(*arguments)

        return call

    for name in kernel_names(native):
        setattr(native, name, counted(name, getattr(native, name)))
    return calls


class Tally:
    """A plugin of pytest: how many tests of each file passed. Tests that are about threads set their number themselves."""

    def __init__(self) -> None:
        self.passed: Counter[str] = Counter()

    def pytest_sessionstart(self) -> None:
        import torch

        torch.set_num_threads(1)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.passed:
            self.passed[report.nodeid.partition("::")[0]] += 1


def main(module: str, report: str, *arguments: str) -> int:
    calls, tally = count_calls(put_in_place(module)), Tally()
    import pytest

    # What pytest captures is gone where a sanitizer ends the process.
    status = int(pytest.main(["--capture=no", *arguments], plugins=[tally]))
    Path(report).write_text(json.dumps({"passed": tally.passed, "calls": calls}))
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
