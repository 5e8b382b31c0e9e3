"""Single layers on a CPU: quantlib in every format and its peers on one weight, one batch size after the other, all in turns.

Unlike in bench.session a case holds all formats at once: peers of other formats are compared too, and a rise in the machine's
load falls on everyone alike. Reading a buffer takes its turn among the contestants, so that a share of the read bandwidth is one
of the same seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import quantlib
from bench.contestants import Contestant, Prepared
from bench.cpu_settings import READ_BYTES, reader
from bench.data import Material
from bench.gate import judge
from bench.guard import Failure, attempt
from bench.peers import Peer
from bench.peers.bitsandbytes import BitsAndBytes
from bench.peers.cublas import TorchBf16
from bench.peers.ggml import Ggml
from bench.peers.int4_cpu import TorchInt4Cpu
from bench.protocol import Case, Shape
from quantlib import dispatch
from quantlib.formats import get_format
from quantlib.timing import Calls, Clock, NoTiming, Timing, copies

SHAPE = (14336, 4096)
MS = (1, 2, 4, 8, 16, 64, 512)
DGRAD_MS = (64, 512)
FORMATS = ("int4-g128", "int4-g32", "int4-g32-asym", "nf4", "nvfp4", "mxfp4", "q4_k", "fp8-e4m3", "int8-channel")
PEERS: tuple[tuple[Peer, str], ...] = (
    (TorchBf16(), "int4-g128"),
    (TorchInt4Cpu(), "int4-g128"),
    (BitsAndBytes(), "nf4"),
    (Ggml("q4_0"), "int4-g32"),
    (Ggml("q4_1"), "int4-g32-asym"),
    (Ggml("q4_k"), "q4_k"),
    (Ggml("q8_0"), "int8-channel"),
)
"""Each peer, and the format of quantlib's that its numbers are nearest to: the gate compares their errors."""
READ = "read"
COLD_BYTES = 128 << 20
PATIENCE_S = 60.0
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ours:
    """quantlib as a user calls it: dispatch chooses the kernel."""

    format: str
    backend: str = "cpu"
    limit: float | None = None

    @property
    def name(self) -> str:
        return f"quantlib {self.format}"

    def version(self) -> str:
        return quantlib.__version__

    def absent(self) -> str | None:
        return None

    def why_not(self, case: Case, device: torch.device) -> str | None:
        return None

    def prepare(self, material: Material) -> Prepared:
        calls: dict[str, Callable[[Any, Tensor], Any]] = {
            "linear": lambda state, x: quantlib.linear(x, state),
            "dgrad": lambda state, dy: dispatch.run("dgrad", dy, state),
        }
        weight, call = material.quantized, calls[material.case.operation]
        return Prepared(weight, call, weight.nbytes, material.decoded, lambda state: state.apply(torch.clone))


def contestants(formats: Sequence[str] = FORMATS) -> list[tuple[Contestant, str]]:
    """Everyone who takes part, with the format whose weight the gate compares theirs with."""
    return [*((Ours(spec), spec) for spec in formats), *PEERS]


def plan(shapes: Iterable[Shape], ms: Sequence[int], dgrad_ms: Sequence[int]) -> list[Case]:
    """The cases; their format is everyone's own."""
    return [
        Case(operation, "", n, k, m) for n, k in shapes for operation, some in (("linear", ms), ("dgrad", dgrad_ms)) for m in some
    ]


@dataclass(frozen=True)
class Entry:
    """What is known of one contestant on one case; `timing` where it passed the gate."""

    case: Case
    contestant: Contestant
    nbytes: int = 0
    error: float | None = None
    weight_error: float | None = None
    timing: Timing | NoTiming = field(default_factory=lambda: NoTiming("not timed"))


@dataclass
class _Seat:
    """A contestant's weight in as many copies as no cache holds, shared by the cases of one operation and shape."""

    contestant: Contestant
    material: Material
    prepared: Prepared
    states: list[Any]


class Layers:
    """The contest over one operation and shape; `cases` differ in M alone."""

    def __init__(self, clock: Clock, cold_bytes: int = COLD_BYTES, read_bytes: int = READ_BYTES) -> None:
        self.clock, self.cold_bytes, self.read_bytes = clock, cold_bytes, read_bytes
        self._read = reader(read_bytes)

    def run(
        self, cases: Sequence[Case], everyone: Sequence[tuple[Contestant, str]], say: Callable[[str], None]
    ) -> Iterable[tuple[list[Entry], float | None]]:
        """Per case: every contestant's entry, and GB/s of reading measured in its turns."""
        base = Material(cases[0].weight, CPU)
        seats: dict[str, _Seat | Failure] = {}
        for contestant, spec in everyone:
            reason = contestant.absent() or contestant.why_not(_in_format(cases[0], spec), CPU)
            if reason is not None:
                seats[contestant.name] = Failure(reason)
                continue
            say(f"preparing {contestant.name}")
            seats[contestant.name] = attempt(lambda c=contestant, s=spec: self._seat(c, base.in_format(s)), PATIENCE_S)  # type: ignore[misc]
        for case in cases:
            yield self._case(case, everyone, seats)

    def _seat(self, contestant: Contestant, material: Material) -> _Seat:
        prepared = contestant.prepare(material)
        more = copies(prepared.nbytes, self.cold_bytes) - 1
        return _Seat(contestant, material, prepared, [prepared.state, *(prepared.copy(prepared.state) for _ in range(more))])

    def _case(
        self, case: Case, everyone: Sequence[tuple[Contestant, str]], seats: Mapping[str, _Seat | Failure]
    ) -> tuple[list[Entry], float | None]:
        x = Material(case.weight, CPU, seed=1).inputs(case)
        entries: dict[str, Entry] = {}
        calls: dict[str, Calls] = {READ: [self._read]}
        for contestant, spec in everyone:
            own = _in_format(case, spec if contestant.backend != "peer" else contestant.name)
            seat = seats[contestant.name]
            if isinstance(seat, Failure):
                entries[contestant.name] = Entry(own, contestant, timing=NoTiming(seat.reason))
                continue
            entries[contestant.name] = entry = self._judged(seat, own, case, x)
            if entry.timing.__class__ is NoTiming and entry.timing.reason == "not timed":  # type: ignore[union-attr]
                calls[contestant.name] = [lambda state=state, seat=seat: seat.prepared.call(state, x) for state in seat.states]
        found = self.clock.time(case.label, calls)
        read = found.pop(READ)
        for name, timing in found.items():
            entries[name] = Entry(**{**entries[name].__dict__, "timing": timing})
        return list(entries.values()), self.read_bytes / read.median / 1e3 if isinstance(read, Timing) else None

    def _judged(self, seat: _Seat, own: Case, case: Case, x: Tensor) -> Entry:
        """Call once and compare with fp64; an entry with a reason where that fails."""
        judged = attempt(
            lambda: judge(seat.contestant, seat.prepared, seat.material, case, x, seat.prepared.call(seat.states[0], x)), PATIENCE_S
        )
        if isinstance(judged, Failure):
            return Entry(own, seat.contestant, seat.prepared.nbytes, timing=NoTiming(judged.reason))
        known = (seat.prepared.nbytes, judged.error, judged.weight_error)
        return Entry(own, seat.contestant, *known, *([NoTiming(judged.reason)] if judged.reason else []))


def _in_format(case: Case, spec: str) -> Case:
    return Case(case.operation, spec, case.n, case.k, case.m)


def taken(case: Case) -> str:
    """The kernel that dispatch takes for a case of quantlib's, on this machine."""
    from bench.contestants import taken as kernel

    get_format(case.format)
    return kernel(case, CPU) or ""
