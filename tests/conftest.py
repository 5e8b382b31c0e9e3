"""Settings that must stand before anything is imported, and what every test run ends with: the skipped tests and why."""

from __future__ import annotations

import importlib
import os
import pkgutil
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

# Threads that wait must not spin: test processes share few cores. Read when torch loads its OpenMP runtime.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

warnings.filterwarnings("ignore", message=".*Enum subclass.*")


def import_kernels() -> None:
    """Triton decides at a kernel's import whether it is interpreted: import all of them before a test changes the
    environment."""
    import quantlib.triton_kernels

    for module in pkgutil.iter_modules(quantlib.triton_kernels.__path__, "quantlib.triton_kernels."):
        importlib.import_module(module.name)


def pytest_configure(config: pytest.Config) -> None:
    import_kernels()
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def instruction_sets() -> list[str]:
    """Those that the CPU kernels can run in here; none where they were not built."""
    from quantlib.kernels import cpu

    return [] if cpu.unavailable is not None else list(cpu._cpu.available_isas())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", getattr(metafunc.module, "RUNS_IN", instruction_sets()), indirect=True)


@contextmanager
def running(isa: str) -> Iterator[None]:
    """Inside, the CPU kernels run in that instruction set, and dispatch knows it."""
    from quantlib import dispatch
    from quantlib.kernels import cpu

    before = cpu.isa()
    cpu._cpu.set_isa(isa)
    dispatch._select.cache_clear()
    try:
        yield
    finally:
        cpu._cpu.set_isa(before)
        dispatch._select.cache_clear()


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set (of the module's RUNS_IN, if it has any), which the CPU kernels run in until the test ends."""
    with running(request.param):
        yield request.param


@pytest.fixture(scope="module")
def unusual_formats(request: pytest.FixtureRequest) -> Iterator[None]:
    """The module's UNUSUAL, formats that no family builds, in the registry until the module ends."""
    from quantlib.formats import register, unregister

    for fmt in request.module.UNUSUAL:
        register(fmt)
    yield
    for fmt in request.module.UNUSUAL:
        unregister(fmt.name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr) for report in skipped)
    terminalreporter.write_line(f"skipped tests: {len(skipped)}")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"  {count:4d}  {reason}")
