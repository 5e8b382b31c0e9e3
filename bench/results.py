"""Rows of a run: one JSON object a line, written and flushed one by one, so that a run that is cut off loses nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

from bench.protocol import Case


@dataclass(frozen=True)
class Row:
    """One contestant on one case. docs/benchmarks.md says what each field means; None where something was not measured.

    A row whose error exceeds its limit has no speed: `reason` says so.
    """

    # what ran where
    device: str
    arch: str
    driver: str
    torch: str
    triton: str
    quantlib: str
    commit: str
    date: str
    # the case
    operation: str
    format: str
    n: int
    k: int
    m: int
    activations: str | None
    # the contestant
    contestant: str
    backend: str
    version: str
    layout: str | None = None
    taken: bool = False
    # correctness
    error: float | None = None
    limit: float | None = None
    weight_error: float | None = None
    # speed
    clock: str | None = None
    us: float | None = None
    us_q25: float | None = None
    us_q75: float | None = None
    do_bench_us: float | None = None
    host_us: float | None = None
    first_call_s: float | None = None
    extra_bytes: int | None = None
    gbps: float | None = None
    tflops: float | None = None
    copy_gbps: float | None = None
    matmul_tflops: float | None = None
    floor_datasheet: float | None = None
    floor_measured: float | None = None
    read_gbps: float | None = None
    nbytes: int | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    reason: str | None = None

    @property
    def case(self) -> Case:
        return Case(self.operation, self.format, self.n, self.k, self.m, self.activations)

    @property
    def numbers(self) -> str:
        """The format, and the one that x is rounded to."""
        return self.format if self.activations is None else f"{self.format}, x in {self.activations}"

    @property
    def ours(self) -> bool:
        """Whether the contestant is a kernel of quantlib's."""
        return self.backend != "peer"


FIELDS = tuple(entry.name for entry in fields(Row))
DEFAULTS = {entry.name: entry.default for entry in fields(Row) if entry.default is not MISSING} | {"ratios": {}, "settings": {}}


def to_json(row: Row) -> str:
    """One line; fields that say nothing are left out."""
    record = {name: value for name, value in asdict(row).items() if name not in DEFAULTS or value != DEFAULTS[name]}
    return json.dumps(record, allow_nan=False)


class Journal:
    """A JSONL file of rows that grows; each row is on the disk when `add` returns.

    `marker` names what is running, for a next run to find where this process died.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.marker = path.with_suffix(".running")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = read_rows([path]) if path.exists() else []
        cut_off = bool(self.rows) and not path.read_text().endswith("\n")
        self._file = path.open("a")
        if cut_off:
            self._file.write("\n")

    def add(self, row: Row) -> None:
        self._file.write(to_json(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.append(row)

    def starts(self, case: Case, contestant: str) -> None:
        self.marker.write_text(json.dumps({"case": case.label, "contestant": contestant}))

    def rests(self) -> None:
        """Nothing is running that could be blamed."""
        self.marker.unlink(missing_ok=True)

    def died_at(self) -> tuple[str, str] | None:
        """(case, contestant) at which an earlier process died, or None."""
        try:
            found = json.loads(self.marker.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return found["case"], found["contestant"]

    def close(self) -> None:
        self._file.close()
        self.rests()


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """The rows of JSONL files; a last line that was cut off is left out, fields that are no longer known are dropped."""
    rows = []
    for path in paths:
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows.append(Row(**{name: value for name, value in record.items() if name in FIELDS}))
    return rows


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows of the same device, case and contestant the newest, in the order of first appearance."""
    newest: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = row.device, row.case.label, row.contestant
        if key not in newest or newest[key].date <= row.date:
            newest[key] = row
    return list(newest.values())
