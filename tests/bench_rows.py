"""Rows of a bench run that never was: every figure is made up for a test."""

from __future__ import annotations

from typing import Any

from bench.environment import Environment
from bench.protocol import Case
from bench.results import Row

H100 = Environment(
    "NVIDIA H100 80GB HBM3", "sm_90", "580.0", "2.11.0", "3.6.0", "0.1.0", "recording", "2026-01-01T00:00:00+00:00"
)
CASE = Case("linear", "nf4", 33, 130, 5)


def row(case: Case = CASE, **fields: Any) -> Row:
    """A synthetic row of a kernel of ours that dispatch takes."""
    basis: dict[str, Any] = {name: getattr(H100, name) for name in Environment.__dataclass_fields__}
    basis |= {"contestant": "kernel", "backend": "triton", "version": "0.1.0", "taken": True, "us": 10.0, "copy_gbps": 3000.0}
    for name in ("operation", "format", "n", "k", "m", "activations"):
        basis[name] = getattr(case, name)
    return Row(**basis | fields)
