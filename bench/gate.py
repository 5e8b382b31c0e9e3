"""The error gate: a contestant whose result is wrong has no speed.

The result is compared with the fp64 product of what the contestant multiplies by: its decoded weight, and x as its
activations format rounds it. Where a peer does not say what its weight decodes to, the product with the identity tells; and
that weight must be about as near to the original as quantlib's is, so that a kernel that is wrong everywhere is still found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.contestants import Contestant, Prepared
from bench.data import DTYPE, Material, worst_row_error
from bench.protocol import Case
from bench.quantizer import parts_of
from quantlib.formats import get_format
from quantlib.kernels.reference import round_trip
from quantlib.testing import LIMITS, relative_error

CHECKED_ROWS = 256
"""Rows of a large result that are compared; all of it is checked for NaN and infinity."""


WEIGHT_SLACK = 0.02
"""What a peer's own way of quantizing may add to one and a half times the error of quantlib's, row by row."""


@dataclass(frozen=True)
class Verdict:
    """error: of the result; weight_error: of its weight's worst row, to the original; reason: None where the gate is open."""

    error: float
    limit: float
    weight_error: float | None
    reason: str | None


def judge(contestant: Contestant, prepared: Prepared, material: Material, case: Case, x: Tensor, y: Any) -> Verdict:
    """Compare y with what fp64 gives."""
    limit = LIMITS[DTYPE] if contestant.limit is None else contestant.limit
    if case.operation == "quantize":
        return _verdict(_quantized_error(case, x, y), limit, None)
    if case.operation == "dequantize":
        return _verdict(relative_error(y, material.decoded), limit, None)
    decoded = prepared.decoded
    if decoded is None:
        decoded = decode_by_identity(prepared, case, x)
    own = decoded is material.decoded
    weight_error = material.weight_error if own else worst_row_error(decoded, material.weight)
    reason = None
    if not weight_error <= 1.5 * material.weight_error + WEIGHT_SLACK:
        reason = f"its weight is off: error {weight_error:.3g} in the worst row, quantlib's is {material.weight_error:.3g}"
    return _verdict(_product_error(contestant, case, x, y, decoded), limit, weight_error, reason)


def _verdict(error: float, limit: float, weight_error: float | None, reason: str | None = None) -> Verdict:
    if not error <= limit:
        reason = f"wrong: relative error {error:.3g} exceeds {limit:.3g}"
    return Verdict(error, limit, weight_error, reason)


def _product_error(contestant: Contestant, case: Case, x: Tensor, y: Tensor, decoded: Tensor) -> float:
    n, k = decoded.shape
    if tuple(y.shape) != (case.m, k if case.operation == "dgrad" else n) or not bool(torch.isfinite(y).all()):
        return float("inf")
    rows = torch.linspace(0, case.m - 1, min(case.m, CHECKED_ROWS), device=x.device).long()
    some = x[rows]
    if case.activations is not None and contestant.backend != "peer":
        some = round_trip(some, get_format(case.activations))
    wide = decoded.double() if case.operation == "dgrad" else decoded.double().T
    return relative_error(y[rows], some.double() @ wide)


def _quantized_error(case: Case, x: Tensor, result: Any) -> float:
    fmt = get_format(case.format)
    return relative_error(fmt.decode(parts_of(result), case.m, case.k, DTYPE), round_trip(x, fmt))


def decode_by_identity(prepared: Prepared, case: Case, like: Tensor, chunk: int = 1024) -> Tensor:
    """The weight [N, K] that a linear layer multiplies by, column by column: y of the identity's rows is W^T."""
    columns = []
    for start in range(0, case.k, chunk):
        size = min(chunk, case.k - start)
        rows = torch.zeros(size, case.k, dtype=like.dtype, device=like.device)
        rows[torch.arange(size), start + torch.arange(size)] = 1
        columns.append(prepared.call(prepared.state, rows).T)
    return torch.cat(columns, dim=1)
