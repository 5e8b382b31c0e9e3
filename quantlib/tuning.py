"""Timing kernels on the device at hand, and tuned tables made from it: `quantlib bench`.

A tuned table (quantlib/kernels/tuned.py says what it holds, and reads it) replaces a kernel's rule for its tile and dispatch's
guess of its efficiency by what was measured.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import geometric_mean
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from quantlib import dispatch
from quantlib.algorithms import quantize
from quantlib.devices import Device, device_facts
from quantlib.errors import QuantlibError
from quantlib.formats import get_format
from quantlib.formats.base import Format
from quantlib.kernels import Kernel, Problem, list_kernels
from quantlib.kernels.base import Operation
from quantlib.kernels.costs import activation_bytes, packed_bytes, roofline
from quantlib.kernels.triton_launch import Tile
from quantlib.kernels.tuned import tile_key
from quantlib.tensor import QuantizedTensor
from quantlib.testing import LIMITS, relative_error
from quantlib.timing import Clock, NoTiming, Timing, copies

MEMORY_BOUND_M = 16
"""Efficiencies are taken from problems up to this M, where the weight's bytes decide and not a matrix peak."""

Table = dict[str, Any]


@runtime_checkable
class Tunable(Protocol):
    """A kernel whose tile can be chosen: `tiles(problem)` offers some, its own choice first; `run_tile` runs with one."""

    def tiles(self, problem: Problem) -> list[Tile]: ...

    def run_tile(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, tile: Tile) -> Tensor: ...


@dataclass(frozen=True)
class Measured:
    """One kernel, or one tile of it, on one problem.

    timing      None where it was refused, failed or was wrong: `reason` says so
    predicted   microseconds that dispatch expects
    error       relative error to fp64
    taken       dispatch takes this kernel for the problem
    """

    kernel: str
    backend: str
    m: int
    timing: Timing | None
    predicted: float | None
    error: float | None
    gbps: float | None
    tflops: float | None
    taken: bool
    reason: str | None = None


@dataclass(frozen=True)
class Subject:
    """A random weight of one format and shape on a device, and the operation it is multiplied in."""

    fmt: Format
    shape: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    operation: Operation
    rows: QuantizedTensor
    decoded: Tensor

    def problem(self, m: int, layout: str) -> Problem:
        n, k = self.shape
        return Problem(self.operation, m, n, k, self.dtype, self.fmt, layout, None, device_facts(self.device))

    def x(self, m: int) -> Tensor:
        """Random x [m, K], or dy [m, N]."""
        width = self.shape[0] if self.operation == "dgrad" else self.shape[1]
        return torch.randn(m, width, device=self.device).to(self.dtype)

    def error(self, x: Tensor, y: Tensor) -> float:
        """Relative error of y to the fp64 product, on at most 64 rows; infinite where y holds a NaN."""
        if not bool(torch.isfinite(y).all()):
            return math.inf
        some = torch.linspace(0, len(x) - 1, min(len(x), 64), device=x.device).long()
        wide = self.decoded.double() if self.operation == "dgrad" else self.decoded.double().T
        return relative_error(y[some], x[some].double() @ wide)


def subject(
    spec: str | Format, shape: tuple[int, int], device: torch.device | str, dtype: torch.dtype, operation: Operation = "linear"
) -> Subject:
    """Make a random weight [N, K], quantize it on the device. Raises QuantlibError for an operation that has no batch."""
    if operation not in ("linear", "dgrad"):
        raise QuantlibError(f"operation {operation!r} can't be timed here; expected linear or dgrad")
    fmt, device = get_format(spec), torch.device(device)
    weight = quantize(torch.randn(shape, device=device) * 0.02, fmt)
    return Subject(fmt, shape, device, dtype, operation, weight, weight.dequantize(dtype))


def measure(work: Subject, m: int, clock: Clock, kernels: set[str] | None = None) -> list[Measured]:
    """Every kernel that runs the problem (or those named), timed in turns; the fastest first, then those without a time."""
    x = work.x(m)
    calls: dict[str, list[Callable[[], Any]]] = {}
    errors: dict[str, float] = {}
    found: list[Measured] = []
    best = dispatch.best_layout(work.fmt, work.shape, work.device, work.dtype)
    taken = dispatch.select(work.problem(m, best)).name
    chosen = [kernel for kernel in list_kernels(work.operation) if _wanted(kernel, kernels, taken)]
    problems = {kernel.name: work.problem(m, _layout(kernel)) for kernel in chosen}
    for kernel in chosen:
        problem = problems[kernel.name]
        outcome = kernel.supports(problem) or _checked(work, kernel, problem, x)
        if isinstance(outcome, str):
            found.append(_row(kernel, problem, None, None, kernel.name == taken, outcome))
        else:
            calls[kernel.name], errors[kernel.name] = outcome
    timings = clock.time(_label(work, m), calls)
    for kernel in chosen:
        if kernel.name in calls:
            timing, problem = timings[kernel.name], problems[kernel.name]
            found.append(_row(kernel, problem, timing, errors[kernel.name], kernel.name == taken))
    return sorted(found, key=lambda row: math.inf if row.timing is None else row.timing.median)


def _wanted(kernel: Kernel, names: set[str] | None, taken: str) -> bool:
    return kernel.name in names if names is not None else kernel.backend != "reference" or kernel.name == taken


def _layout(kernel: Kernel) -> str:
    return "rows" if kernel.layout == "any" else kernel.layout


def _label(work: Subject, m: int) -> str:
    return f"{work.operation} {work.fmt} {work.shape[0]}x{work.shape[1]} M={m}"


def _checked(
    work: Subject, kernel: Kernel, problem: Problem, x: Tensor, tile: Tile | None = None
) -> tuple[list[Callable[[], Any]], float] | str:
    """The calls to time and the error, or in words why there are none."""

    def call(weight: QuantizedTensor) -> Tensor:
        if tile is not None:
            assert isinstance(kernel, Tunable)
            return kernel.run_tile(problem, x, weight, None, tile)
        return kernel.run(problem, x, weight, None)

    try:
        weight = work.rows.to_layout(problem.layout)
        error = work.error(x, call(weight))
    except Exception as raised:  # a tile may not compile; the others still can
        return f"failed: {type(raised).__name__}: {' '.join(str(raised).split())[:200]}"
    if not error <= LIMITS[work.dtype]:
        return f"wrong: relative error {error:.3g} exceeds {LIMITS[work.dtype]:.3g}"
    weights = [weight, *(weight.apply(torch.clone) for _ in range(copies(weight.nbytes) - 1))]
    return [partial(call, weight) for weight in weights], error


def _row(
    kernel: Kernel,
    problem: Problem,
    timing: Timing | NoTiming | None,
    error: float | None,
    taken: bool,
    reason: str | None = None,
) -> Measured:
    if isinstance(timing, NoTiming):
        reason, timing = timing.reason, None
    predicted = kernel.cost(problem) if kernel.supports(problem) is None else None
    gbps = tflops = None
    if timing is not None:
        gbps = (packed_bytes(problem) + activation_bytes(problem)) / timing.median / 1e3
        tflops = 2 * problem.m * problem.n * problem.k / timing.median / 1e6
    return Measured(kernel.name, kernel.backend, problem.m, timing, predicted, error, gbps, tflops, taken, reason)


class Tuner:
    """Collects the fastest tile of every tunable kernel, and how near to the model of the chip each comes.

    A tile that fails or gives a wrong result is out. `say` receives a line per kernel and problem.
    """

    def __init__(self, clock: Clock, say: Callable[[str], None]) -> None:
        self.clock, self.say = clock, say
        self.tiles: dict[str, dict[str, dict[str, Any]]] = {}
        self.shares: dict[str, list[float]] = {}

    def add(self, work: Subject, ms: Iterable[int], kernels: set[str] | None = None) -> None:
        """Time each tile of each kernel (or those named) on this weight, at each M."""
        for kernel in list_kernels(work.operation):
            if not isinstance(kernel, Tunable) or (kernels is not None and kernel.name not in kernels):
                continue
            for m in ms:
                problem = work.problem(m, _layout(kernel))
                if kernel.supports(problem) is None:
                    self._add(work, kernel, problem)

    def _add(self, work: Subject, kernel: Kernel, problem: Problem) -> None:
        best = _best_tile(work, kernel, problem, self.clock)
        where = f"{kernel.name}, {_label(work, problem.m)}"
        if best is None:
            return self.say(f"{where}: no tile ran")
        tile, us, count = best
        self.tiles.setdefault(kernel.name, {})[tile_key(problem)] = asdict(tile)
        if problem.m <= MEMORY_BOUND_M:
            self.shares.setdefault(kernel.name, []).append(min(1.0, roofline(problem, 1.0) / us))
        return self.say(f"{where}: {us:.1f} us with {tile}, the best of {count}")

    def table(self, device: Device) -> Table:
        """What was found. Efficiencies are geometric means over problems. Raises QuantlibError where nothing was."""
        if not self.tiles:
            raise QuantlibError(f"no kernel that runs on {device.name} has a tile to tune")
        efficiency = {name: round(geometric_mean(shares), 4) for name, shares in self.shares.items()}
        return {
            "device": device.name,
            "triton": _version("triton"),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "efficiency": efficiency,
            "tiles": self.tiles,
        }


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _best_tile(work: Subject, kernel: Kernel, problem: Problem, clock: Clock) -> tuple[Tile, float, int] | None:
    """The fastest tile, its microseconds, and how many were tried."""
    assert isinstance(kernel, Tunable)
    x, tiles, calls = work.x(problem.m), {}, {}
    for place, tile in enumerate(dict.fromkeys(kernel.tiles(problem))):
        checked = _checked(work, kernel, problem, x, tile)
        if not isinstance(checked, str):
            tiles[str(place)], calls[str(place)] = tile, checked[0]
    if not calls:
        return None
    timings = clock.time(f"{kernel.name} {_label(work, problem.m)}", calls)
    medians = {place: timing.median for place, timing in timings.items() if isinstance(timing, Timing)}
    if not medians:
        return None
    best = min(medians, key=lambda place: medians[place])
    return tiles[best], medians[best], len(tiles)


def merged(old: Mapping[str, Any], new: Table) -> Table:
    """The new table, with entries of the old one for what was not measured again. Raises QuantlibError for another device."""
    if old.get("device") != new["device"]:
        raise QuantlibError(f"the table is of {old.get('device')!r}, measured was {new['device']!r}; write to another file")
    tiles = {name: dict(entries) for name, entries in old.get("tiles", {}).items()}
    for name, entries in new["tiles"].items():
        tiles.setdefault(name, {}).update(entries)
    return new | {"efficiency": dict(old.get("efficiency", {})) | new["efficiency"], "tiles": tiles}


def write_table(table: Table, path: Path) -> None:
    """Write a table, joined with what `path` holds already; whole or not at all."""
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise QuantlibError(f"{path} is no tuned table: {error}") from error
        table = merged(old, table)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)
