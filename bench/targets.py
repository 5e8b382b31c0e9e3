"""What the kernels are meant to reach, as data, and how far rows of a run show it.

Every outcome is a ratio to its goal's unit: a share of the copy bandwidth measured in the same run, or a peer's microseconds
over ours. Where a target speaks of several cases, the worst one counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from bench.protocol import FOUR_BIT, QUANTIZERS, SQUARES, TALL, WIDE, Shape
from bench.results import Row

LOW_BIT_PEERS = ("marlin", "humming", "gemlite", "bitsandbytes", "tinygemm")


@dataclass(frozen=True)
class Target:
    """One claim.

    measure      "copy": bytes of the problem per second over the measured copy bandwidth; "peers": the fastest of `peers`
                 that ran, its microseconds over ours
    goal         the least ratio; `strict` where it must be exceeded
    ms           smallest and largest M; shapes, formats: empty means any
    copyless     only kernels count whose working memory holds no 16-bit copy of the weight
    """

    name: str
    goal: float
    measure: Literal["copy", "peers"]
    peers: tuple[str, ...] = ()
    strict: bool = False
    operation: str = "linear"
    formats: tuple[str, ...] = FOUR_BIT
    shapes: tuple[Shape, ...] = ()
    ms: tuple[int, int] = (1, 16)
    activations: str | None = None
    copyless: bool = False
    device: str = "H100"

    def covers(self, row: Row) -> bool:
        """Whether the row is one of ours, of a case that the target speaks of, on its device."""
        return (
            row.ours
            and self.device in row.device
            and row.operation == self.operation
            and row.activations == self.activations
            and (not self.formats or row.format in self.formats)
            and (not self.shapes or (row.n, row.k) in self.shapes)
            and self.ms[0] <= row.m <= self.ms[1]
        )


TARGETS = (
    Target("4-bit, M <= 16, wide and tall", 0.70, "copy", shapes=(WIDE, TALL)),
    Target("4-bit, M <= 16, square", 0.60, "copy", shapes=SQUARES),
    *(
        Target(f"4-bit, M <= 16, against {peer}", 1.0, "peers", (peer,), strict=True, shapes=(WIDE, TALL, *SQUARES))
        for peer in LOW_BIT_PEERS
    ),
    Target("4-bit, M 64-256, against the best peer", 1.0, "peers", LOW_BIT_PEERS, ms=(64, 256)),
    Target("4-bit, M >= 512, against bf16", 0.95, "peers", ("torch_bf16",), ms=(512, 4096)),
    Target(
        "4-bit dX, M 512-4096, against decoding first, without a 16-bit copy",
        1.0, "peers", ("dequantize_cublas",), operation="dgrad", ms=(512, 4096), copyless=True,
    ),
    Target(
        "FP8 W8A8 with quantization, 8192x8192, M 4096, against bf16",
        1.5, "peers", ("torch_bf16",), formats=("fp8-e4m3",), shapes=((8192, 8192),), ms=(4096, 4096), activations="fp8-e4m3",
    ),
    Target("quantizing activations", 0.75, "copy", operation="quantize", formats=QUANTIZERS, ms=(4096, 4096)),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """A target and the worst ratio among the cases that were measured; None where none was."""

    target: Target
    ratio: float | None
    where: str = ""
    cases: int = 0

    @property
    def met(self) -> bool | None:
        if self.ratio is None:
            return None
        return self.ratio > self.target.goal if self.target.strict else self.ratio >= self.target.goal

    @property
    def state(self) -> str:
        return {None: "not measured", True: "met", False: "not met"}[self.met]


def evaluate(rows: Iterable[Row]) -> list[Outcome]:
    """The outcome of every target, in the table's order."""
    rows = list(rows)
    return [_outcome(target, rows) for target in TARGETS]


def _outcome(target: Target, rows: list[Row]) -> Outcome:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        if target.covers(row) and row.us is not None:
            cases.setdefault(row.case.label, []).append(row)
    ratios = {}
    for label, found in cases.items():
        counted = _counted(target, found)
        ratio = None if counted is None else _ratio(target, counted)
        if ratio is not None:
            ratios[label] = ratio
    if not ratios:
        return Outcome(target, None)
    worst = min(ratios, key=lambda label: ratios[label])
    return Outcome(target, ratios[worst], worst, len(ratios))


def _counted(target: Target, found: list[Row]) -> Row | None:
    """The row that stands for a case: what dispatch takes; the fastest without a copy where the target asks for that."""
    if target.copyless:
        found = [row for row in found if row.extra_bytes is not None and row.extra_bytes < 2 * row.n * row.k]
        return min(found, key=lambda row: row.us or 0.0, default=None)
    return next((row for row in found if row.taken), None)


def _ratio(target: Target, row: Row) -> float | None:
    if target.measure == "copy":
        return None if row.copy_gbps is None or row.gbps is None else row.gbps / row.copy_gbps
    known = [row.ratios[peer] for peer in target.peers if peer in row.ratios]
    return min(known) if known else None
