"""One run: on each case every contestant meets the error gate, those that pass are timed in turns, rows are written."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.ceilings import Ceilings, datasheet_floor_us, floor_us
from bench.contestants import Contestant, Prepared, kernel_contestants, taken
from bench.data import DTYPE, Material, problem_bytes
from bench.environment import Environment
from bench.gate import Verdict, judge
from bench.guard import DeviceLostError, Failure, attempt, check_device
from bench.protocol import Case, by_weight
from bench.quantizer import Quantizer
from bench.results import Journal, Row
from quantlib.devices import device_facts
from quantlib.timing import COLD_BYTES, Calls, Clock, NoTiming, Timing, copies

PRESENCE = Case("presence", "", 0, 0, 0)
"""The case of the rows that say once which peers are there."""
LOST = "device lost: "
DIED = "the process died here"
Timings = dict[str, Timing | NoTiming]
MOST_SETBACKS = 2
"""A contestant that this often took too long to get ready, or could not be imported, takes no further part in the run."""
NOBODY = "quantlib"
"""The contestant of a row that speaks of the whole case: quantlib has no kernel for it, or it can't be timed."""


@dataclass(frozen=True)
class Clocks:
    """`main` decides; the others fill columns of their own where there are any."""

    main: Clock
    do_bench: Clock | None = None
    host: Clock | None = None


@dataclass
class Entrant:
    """A contestant that passed the gate on a case, and what is known of it so far."""

    contestant: Contestant
    calls: Calls
    verdict: Verdict
    first_call_s: float
    extra_bytes: int | None


@dataclass
class Session:
    """A run over cases. `say` receives one line per case.

    seconds       the time budget; no case is begun that would probably not fit
    patience_s    what one contestant may take to prepare, compile and answer for the first time
    """

    journal: Journal
    environment: Environment
    clocks: Clocks
    ceilings: Ceilings
    peers: Sequence[Contestant]
    device: torch.device
    kernels: set[str] | None = None
    seconds: float = math.inf
    patience_s: float = 25.0
    cold_bytes: int = COLD_BYTES
    say: Callable[[str], None] = print
    _began: float = field(default_factory=time.monotonic)
    _slowest: float = 0.0

    def __post_init__(self) -> None:
        rows = self.journal.rows
        self._done = {(row.case.label, row.contestant) for row in rows}
        self._setbacks: Counter[str] = Counter()
        self._barred = {row.contestant for row in rows if row.reason and row.reason.startswith((LOST, DIED))}

    def run(self, cases: Iterable[Case]) -> int:
        """Measure the cases in their order; returns how many the time budget left out. Raises DeviceLostError."""
        self._report_presence()
        cases = list(cases)
        self._blame_the_dead(cases)
        done = 0
        for weight, group in by_weight(cases):
            arena = _Arena(self, weight)
            for case in group:
                if time.monotonic() - self._began + self._slowest > self.seconds:
                    return len(cases) - done
                begin = time.monotonic()
                self._run_case(arena, case)
                self._slowest = max(self._slowest * 0.9, time.monotonic() - begin)
                done += 1
        return 0

    def _blame_the_dead(self, cases: Sequence[Case]) -> None:
        """Write down where an earlier process died, and leave the contestant out; NOBODY means that it died while timing."""
        died = self.journal.died_at()
        if died is None:
            return
        label, name = died
        for case in cases:
            if case.label == label:
                self._write(case, name, "", reason=DIED)
        self._barred.add(name)

    def _report_presence(self) -> None:
        for peer in self.peers:
            if (PRESENCE.label, peer.name) not in self._done:
                reason = peer.absent()
                self._write(PRESENCE, peer.name, "peer", version="" if reason else peer.version(), reason=reason)
        self.peers = [peer for peer in self.peers if peer.absent() is None]

    def _run_case(self, arena: _Arena, case: Case) -> None:
        everyone: list[Contestant] = [*self._kernels(case), *self.peers]
        pending = [
            contestant
            for contestant in everyone
            if (case.label, contestant.name) not in self._done and contestant.name not in self._barred
        ]
        if not pending or (case.label, NOBODY) in self._done:
            return
        x = arena.material.inputs(case)
        entrants: dict[str, Entrant] = {}
        for contestant in pending:
            reason = contestant.why_not(case, self.device)
            if reason is not None:
                self._write(case, contestant.name, contestant.backend, version=contestant.version(), reason=reason)
                continue
            entrant = self._enter(arena, contestant, case, x)
            if entrant is not None:
                entrants[contestant.name] = entrant
        self.journal.starts(case, NOBODY)
        try:
            timings = self._timings(case, entrants)
        except DeviceLostError as error:
            self._write(case, NOBODY, "", reason=f"{LOST}{error}")
            raise
        self._write_entrants(case, entrants, *timings)
        self.journal.rests()

    def _kernels(self, case: Case) -> list[Contestant]:
        """quantlib's kernels; the reference takes part only where it is what quantlib would run."""
        names = self.kernels
        if case.operation == "quantize":
            return [Quantizer()] if names is None or Quantizer.name in names else []
        found: list[Contestant] = [*kernel_contestants(case.operation, names)]
        favourite = taken(case, self.device)
        if names is None and favourite is not None and favourite not in {entry.name for entry in found}:
            found += kernel_contestants(case.operation, {favourite})
        if not found and (case.label, NOBODY) not in self._done:
            self._write(case, NOBODY, "", reason=f"no kernel does {case.operation}")
        return found

    def _enter(self, arena: _Arena, contestant: Contestant, case: Case, x: Tensor) -> Entrant | None:
        """Prepare, call once, judge. None, and a row that says why, where that fails."""
        self.journal.starts(case, contestant.name)
        found = attempt(lambda: arena.enter(contestant, case, x), self.patience_s)
        common: dict[str, Any] = {"version": contestant.version(), "layout": getattr(contestant, "layout", None)}
        try:
            check_device(self.device)
        except DeviceLostError as error:
            self._write(case, contestant.name, contestant.backend, reason=f"{LOST}{error}", **common)
            raise
        if isinstance(found, Failure):
            self._setbacks[contestant.name] += found.lasting
            if self._setbacks[contestant.name] >= MOST_SETBACKS:
                self._barred.add(contestant.name)
            self._write(case, contestant.name, contestant.backend, reason=found.reason, **common)
            return None
        verdict = found.verdict
        if verdict.reason is not None:
            errors = {"error": _finite(verdict.error), "limit": verdict.limit, "weight_error": _finite(verdict.weight_error)}
            self._write(case, contestant.name, contestant.backend, reason=verdict.reason, **errors, **common)
            return None
        return found

    def _timings(self, case: Case, entrants: dict[str, Entrant]) -> tuple[Timings, dict[str, Timings]]:
        """What the clock that decides says, and the other clocks by their columns."""
        calls = {name: entrant.calls for name, entrant in entrants.items()}
        main = self.clocks.main.time(case.label, calls) if calls else {}
        check_device(self.device)
        others = {
            column: {} if clock is None or not calls else clock.time(case.label, calls)
            for column, clock in (("do_bench_us", self.clocks.do_bench), ("host_us", self.clocks.host))
        }
        check_device(self.device)
        return main, others

    def _write_entrants(self, case: Case, entrants: dict[str, Entrant], main: Timings, others: dict[str, Timings]) -> None:
        peers = {row.contestant: row.us for row in self.journal.rows if row.case == case and row.us and not row.ours}
        medians = {name: timing.median for name, timing in main.items() if isinstance(timing, Timing)}
        peers |= {name: us for name, us in medians.items() if entrants[name].contestant.backend == "peer"}
        favourite = taken(case, self.device) if entrants and case.operation != "quantize" else Quantizer.name
        for name, entrant in entrants.items():
            timing = main[name]
            columns = {column: entry.median for column, by in others.items() if isinstance(entry := by.get(name), Timing)}
            ours = entrant.contestant.backend != "peer"
            ratios = {peer: us / medians[name] for peer, us in peers.items() if us} if ours and name in medians else {}
            self._write(
                case,
                name,
                entrant.contestant.backend,
                version=entrant.contestant.version(),
                layout=getattr(entrant.contestant, "layout", None),
                taken=name == favourite,
                error=_finite(entrant.verdict.error),
                limit=entrant.verdict.limit,
                weight_error=_finite(entrant.verdict.weight_error),
                first_call_s=entrant.first_call_s,
                extra_bytes=entrant.extra_bytes,
                ratios=ratios,
                **(self._speeds(case, timing) if isinstance(timing, Timing) else {"reason": timing.reason}),
                **columns,
            )
        self.say(_line(case, medians, favourite))

    def _speeds(self, case: Case, timing: Timing) -> dict[str, Any]:
        nbytes, flops, us = problem_bytes(case), case.flops, timing.median
        copy, matmul = self.ceilings.copy_gbps, self.ceilings.matmul_tflops
        facts = device_facts(self.device)
        return {
            "clock": timing.clock,
            "us": us,
            "us_q25": timing.q25,
            "us_q75": timing.q75,
            "gbps": nbytes / us / 1e3,
            "tflops": flops / us / 1e6,
            "floor_datasheet": datasheet_floor_us(nbytes, flops, facts) / us,
            "floor_measured": None if copy is None or matmul is None else floor_us(nbytes, flops, copy, matmul) / us,
        }

    def _write(self, case: Case, contestant: str, backend: str, **fields: Any) -> None:
        fields = {"version": "", **fields}
        self.journal.add(
            Row(
                **asdict(self.environment),
                operation=case.operation,
                format=case.format,
                n=case.n,
                k=case.k,
                m=case.m,
                activations=case.activations,
                contestant=contestant,
                backend=backend,
                copy_gbps=self.ceilings.copy_gbps,
                matmul_tflops=self.ceilings.matmul_tflops,
                **fields,
            )
        )
        self._done.add((case.label, contestant))


class _Arena:
    """What the cases of one weight share: the weight, and each contestant's copies of it."""

    def __init__(self, session: Session, weight: Case) -> None:
        self.device, self.cold_bytes = session.device, session.cold_bytes
        self.material = Material(weight, session.device)
        self._prepared: dict[str, tuple[Prepared, list[Any]]] = {}

    def enter(self, contestant: Contestant, case: Case, x: Tensor) -> Entrant:
        if contestant.name not in self._prepared:
            prepared = contestant.prepare(self.material)
            self._prepared[contestant.name] = prepared, [prepared.state]
        prepared, states = self._prepared[contestant.name]
        self._poison(case)
        begin = time.perf_counter()
        y = prepared.call(prepared.state, x)
        check_device(self.device)
        first_call_s = time.perf_counter() - begin
        verdict = judge(contestant, prepared, self.material, case, x, y)
        del y
        if verdict.reason is None and len(states) == 1:
            states += [prepared.copy(prepared.state) for _ in range(copies(prepared.nbytes, self.cold_bytes) - 1)]
        calls = [lambda state=state: prepared.call(state, x) for state in states]
        return Entrant(contestant, calls, verdict, first_call_s, self._extra_bytes(calls[0]))

    def _poison(self, case: Case) -> None:
        """Leave NaN where the allocator will probably put the result: an element that is never written then shows."""
        rows, columns = case.n if case.operation == "dequantize" else case.m, case.n if case.operation == "linear" else case.k
        torch.full((rows, columns), math.nan, dtype=DTYPE, device=self.device)

    def _extra_bytes(self, call: Callable[[], Any]) -> int | None:
        """Bytes that a call takes beyond its result; None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = call()
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before
        del y
        return torch.cuda.max_memory_allocated() - before - kept


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None


def _line(case: Case, medians: dict[str, float], favourite: str | None) -> str:
    order = sorted(medians, key=lambda name: medians[name])
    times = [f"{name}{'*' if name == favourite else ''} {medians[name]:.1f} us" for name in order]
    return f"{case.label}: {'  '.join(times) or 'nothing to time'}"
