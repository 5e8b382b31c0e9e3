"""Single layers on a CPU: quantlib in every format and its peers on one weight, one batch size after the other, all in turns.

Unlike in bench.session a case holds all formats at once: peers of other formats are compared too, and a rise in the machine's
load falls on everyone alike. Reading a buffer takes its turn among the contestants, so that a share of the read bandwidth is
one of the same seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import quantlib
from bench.contestants import Contestant, Prepared, layout_at_load
from bench.cpu_settings import READ_BYTES, reader
from bench.data import Material
from bench.gate import Verdict, judge
from bench.guard import Failure, attempt
from bench.peers.bitsandbytes import BitsAndBytes
from bench.peers.cublas import TorchBf16
from bench.peers.ggml import Ggml
from bench.peers.int4_cpu import TorchInt4Cpu
from bench.peers.torch_fp32 import TorchFp32
from bench.protocol import Case, Shape
from quantlib import dispatch
from quantlib.timing import Calls, Clock, NoTiming, Timing, copies

SHAPE: Shape = (14336, 4096)
MS = (1, 2, 4, 8, 16, 64, 512)
DGRAD_MS = (64, 512)
IN_INT8 = ("int4-g32", "nvfp4", "q4_k")
"""Formats that take part with x in int8 too."""
FORMATS = ("int4-g128", "int4-g32", "int4-g32-asym", "nf4", "nvfp4", "mxfp4", "q4_k", "fp8-e4m3", "int8-channel")
COLD_BYTES = 128 << 20
PATIENCE_S = 60.0
CPU = torch.device("cpu")
READ = "read"


@dataclass(frozen=True)
class Entrant:
    """Who takes part. `format`: its own word for its numbers; `judged_as`: the format of quantlib's that is nearest to it,
    whose error the gate allows it."""

    contestant: Contestant
    format: str
    judged_as: str

    @property
    def name(self) -> str:
        return self.contestant.name


@dataclass(frozen=True)
class Ours:
    """quantlib as a user calls it: dispatch chooses the kernel."""

    format: str
    activations: str | None = None
    backend: str = "cpu"

    @property
    def limit(self) -> float | None:
        """As for llama.cpp's kernels, which round x to 8 bits too."""
        return None if self.activations is None else Ggml.limit

    @property
    def name(self) -> str:
        return f"quantlib {self.format}" + ("" if self.activations is None else f", x in {self.activations}")

    def version(self) -> str:
        return quantlib.__version__

    def absent(self) -> str | None:
        return None

    def why_not(self, case: Case, device: torch.device) -> str | None:
        return "does linear alone" if self.activations is not None and case.operation != "linear" else None

    def prepare(self, material: Material) -> Prepared:
        calls: dict[str, Callable[[Any, Tensor], Any]] = {
            "linear": lambda state, x: quantlib.linear(x, state, activations=self.activations),
            "dgrad": lambda state, dy: dispatch.run("dgrad", dy, state),
        }
        case, call = replace(material.case, activations=self.activations), calls[material.case.operation]
        weight = material.quantized.to_layout(layout_at_load(case, CPU))
        return Prepared(weight, call, weight.nbytes, material.decoded, lambda state: state.apply(torch.clone))


PEERS = (
    Entrant(TorchBf16(), "bf16", "int4-g128"),
    Entrant(TorchFp32(), "fp32", "int4-g128"),
    Entrant(TorchInt4Cpu(), "int4-g128", "int4-g128"),
    Entrant(BitsAndBytes(), "nf4", "nf4"),
    Entrant(Ggml("q4_0"), "q4_0", "int4-g32"),
    Entrant(Ggml("q4_1"), "q4_1", "int4-g32-asym"),
    Entrant(Ggml("q4_k"), "q4_k", "q4_k"),
    Entrant(Ggml("q8_0"), "q8_0", "int8-channel"),
)


def entrants(formats: Sequence[str] = FORMATS) -> list[Entrant]:
    """quantlib in each format, and every peer, whether it is there or not."""
    rounded = [Entrant(Ours(spec, "int8"), spec, spec) for spec in formats if spec in IN_INT8]
    return [*(Entrant(Ours(spec), spec, spec) for spec in formats), *rounded, *PEERS]


def plan(shapes: Iterable[Shape], ms: Sequence[int], dgrad_ms: Sequence[int]) -> list[list[Case]]:
    """Groups of cases that share their weight, each in the order of M. A case's format is everyone's own."""
    groups = [
        [Case(operation, "", n, k, m) for m in some]
        for n, k in shapes
        for operation, some in (("linear", ms), ("dgrad", dgrad_ms))
    ]
    return [group for group in groups if group]


@dataclass(frozen=True)
class Entry:
    """One entrant on one case: bytes and layout of its weight, what the gate found, and its time or why there is none."""

    case: Case
    entrant: Entrant
    timing: Timing | NoTiming
    nbytes: int | None = None
    layout: str | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True)
class _Ready:
    """An entrant's weight in as many copies as no cache holds, shared by the cases of a group."""

    material: Material
    prepared: Prepared
    states: list[Any]


class Contest:
    """The cases of one group among everyone. Preparing happens once; memory is that of all weights together."""

    def __init__(
        self,
        clock: Clock,
        everyone: Sequence[Entrant],
        say: Callable[[str], None] = print,
        cold_bytes: int = COLD_BYTES,
        read_bytes: int = READ_BYTES,
    ) -> None:
        self.clock, self.everyone, self.say, self.cold_bytes, self.read_bytes = clock, everyone, say, cold_bytes, read_bytes
        self._read = reader(read_bytes)

    def run(self, cases: Sequence[Case]) -> Iterator[tuple[list[Entry], float | None]]:
        """Per case: everyone's entry, and the GB/s that were read in its turns."""
        base = Material(cases[0].weight, CPU)
        ready: dict[str, _Ready | Failure] = {}
        for entrant in self.everyone:
            case = replace(cases[0], format=entrant.judged_as)
            reason = entrant.contestant.absent() or entrant.contestant.why_not(case, CPU)
            if reason is None:
                self.say(f"preparing {entrant.name}")
                ready[entrant.name] = attempt(partial(self._prepare, entrant, base), PATIENCE_S)
            else:
                ready[entrant.name] = Failure(reason)
        for case in cases:
            yield self._case(case, ready)

    def _prepare(self, entrant: Entrant, base: Material) -> _Ready:
        material = base.in_format(entrant.judged_as)
        prepared = entrant.contestant.prepare(material)
        more = copies(prepared.nbytes, self.cold_bytes) - 1
        return _Ready(material, prepared, [prepared.state, *(prepared.copy(prepared.state) for _ in range(more))])

    def _case(self, case: Case, ready: dict[str, _Ready | Failure]) -> tuple[list[Entry], float | None]:
        x = Material(case, CPU, seed=1).inputs(case)
        entries = {entrant.name: self._judged(entrant, case, x, ready[entrant.name]) for entrant in self.everyone}
        calls: dict[str, Calls] = {READ: [self._read]}
        for name, entry in entries.items():
            state = ready[name]
            if entry.verdict is not None and entry.verdict.reason is None and isinstance(state, _Ready):
                calls[name] = [partial(state.prepared.call, weight, x) for weight in state.states]
        found = self.clock.time(case.label, calls)
        read = found.pop(READ)
        entries |= {name: replace(entries[name], timing=timing) for name, timing in found.items()}
        return list(entries.values()), self.read_bytes / read.median / 1e3 if isinstance(read, Timing) else None

    def _judged(self, entrant: Entrant, case: Case, x: Tensor, state: _Ready | Failure) -> Entry:
        """Call once and compare with fp64; the entry has a reason where that fails, and no time yet."""
        own = replace(case, format=entrant.format)
        if isinstance(state, Failure):
            return Entry(own, entrant, NoTiming(state.reason))
        prepared = state.prepared
        layout = str(getattr(prepared.state, "layout", "")) or None
        found = attempt(
            lambda: judge(entrant.contestant, prepared, state.material, case, x, prepared.call(prepared.state, x)), PATIENCE_S
        )
        if isinstance(found, Failure):
            return Entry(own, entrant, NoTiming(found.reason), prepared.nbytes, layout)
        return Entry(own, entrant, NoTiming(found.reason or "not timed"), prepared.nbytes, layout, found)
