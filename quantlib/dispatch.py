"""Which kernel runs a problem: those that support it, the least predicted cost first, the reference last."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from quantlib.devices import device_facts
from quantlib.errors import KernelError
from quantlib.formats.base import Format
from quantlib.kernels import base
from quantlib.kernels.base import Declaration, Kernel, Operation, Problem
from quantlib.layouts import get_layout
from quantlib.tensor import QuantizedTensor

PREPARE_FOR = (1, 16, 512)
"""The batch sizes that one layout is chosen for: one copy of the weight serves decoding and prefill."""

INVARIANT_M = 16
"""The batch size that the kernel of batch-invariant products is chosen for."""

MOST_REMEMBERED = 256
"""Entries of a weight's memo, most of them one per batch size, before it is emptied."""


@dataclass(frozen=True)
class Choice:
    """One kernel's answer to a problem: a predicted cost in microseconds, or the reason why it can't run."""

    kernel: str
    backend: str
    cost: float | None
    refusal: str | None


def problem_of(
    operation: Operation,
    m: int,
    weight: QuantizedTensor,
    dtype: torch.dtype,
    activations: str | None = None,
    device: torch.device | str | None = None,
    batch_invariant: bool = False,
) -> Problem:
    """The problem of multiplying m rows of `dtype` with this weight, on its own device unless another is named."""
    n, k = weight.shape
    facts = device_facts(weight.device if device is None else device)
    return Problem(operation, m, n, k, dtype, weight.format, weight.layout, activations, facts, True, batch_invariant)


def bucket(m: int) -> int:
    """M as dispatch caches it: exact up to 64, then the next power of two."""
    return m if m <= 64 else 1 << (m - 1).bit_length()


def _refusal(kernel: Declaration, problem: Problem) -> str | None:
    if kernel.layout not in ("any", problem.layout):
        return f"works on the layout {kernel.layout!r}, the weight lies in {problem.layout!r}"
    return kernel.supports(problem)


def choices(problem: Problem) -> list[Choice]:
    """Every kernel of the operation: those that can run it by cost, then those that can't, with their reasons."""
    found = []
    for kernel in base.declarations(problem.operation):
        refusal = _refusal(kernel, problem)
        cost = kernel.cost(problem) if refusal is None else None
        found.append(Choice(kernel.name, kernel.backend, cost, refusal))
    return sorted(found, key=lambda choice: (choice.cost is None, choice.cost or 0.0))


def select(problem: Problem, kernel: str | None = None) -> Kernel:
    """The kernel that runs a problem of one weight; `kernel` forces one by name. Raises as `choose`."""
    return base.get_kernel(choose(problem, kernel))


def choose(problem: Problem, kernel: str | None = None) -> str:
    """The name of the kernel that runs the problem; `kernel` forces one.

    Raises KernelError where the forced kernel is unknown, of another operation, or can't run the problem (saying why).
    """
    if kernel is None:
        # One kernel for every batch, or which of two that sum differently comes first would depend on it.
        m = INVARIANT_M if problem.batch_invariant else bucket(problem.m)
        return _select(replace(problem, m=m), _table_version())
    _check_forced(problem, base.get_declaration(kernel))
    return kernel


def _table_version() -> tuple[str, ...]:
    return tuple(kernel.name for kernel in base.declarations())


@lru_cache(maxsize=4096)
def _select(problem: Problem, version: tuple[str, ...]) -> str:
    best = choices(problem)[0]
    if best.cost is None:
        raise KernelError(f"no kernel runs {problem}: " + "; ".join(f"{c.kernel}: {c.refusal}" for c in choices(problem)))
    if problem.device.kind == "cuda" and best.backend == "reference":
        _warn_reference(problem.device.name, problem.format.name)
    return best.kernel


@lru_cache(maxsize=64)
def _warn_reference(device: str, fmt: str) -> None:
    warnings.warn(
        f"quantlib runs {fmt} on {device} with its slow reference kernel; quantlib.explain(layer) says why", stacklevel=2
    )


def _check_forced(problem: Problem, kernel: Declaration) -> None:
    name = kernel.name
    if kernel.operation != problem.operation:
        raise KernelError(f"kernel {name!r} does {kernel.operation}, asked for {problem.operation}")
    refusal = _refusal(kernel, problem)
    if refusal is not None:
        raise KernelError(f"kernel {name!r} can't run {problem.format} M={problem.m} N={problem.n} K={problem.k}: {refusal}")


def run(
    operation: Operation,
    x: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None = None,
    activations: str | None = None,
    kernel: str | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Select and run. x is [M, K] for linear, [M, N] for dgrad, and an empty tensor of the wanted dtype for dequantize."""
    m = 0 if operation == "dequantize" else x.shape[0]
    # The problem and its kernel are kept with the weight: stating and choosing anew costs more than a small kernel runs.
    key = (operation, m, x.dtype, x.device, activations, kernel, batch_invariant, base.generation())
    found = weight.memo.get(key)
    if found is None:
        if len(weight.memo) > MOST_REMEMBERED:
            weight.memo.clear()
        problem = problem_of(operation, m, weight, x.dtype, activations, x.device, batch_invariant)
        found = weight.memo[key] = problem, select(problem, kernel)
    problem, chosen = found
    result: Tensor = chosen.run(problem, x, weight, bias)
    return result


def best_layout(
    fmt: Format,
    shape: tuple[int, int],
    device: torch.device | str,
    dtype: torch.dtype,
    kernel: str | None = None,
    ms: Iterable[int] = PREPARE_FOR,
    activations: str | None = None,
) -> str:
    """The layout with the least total predicted cost of `linear` over `ms`; a forced kernel's own layout."""
    if kernel is not None:
        layout = base.get_kernel(kernel).layout
        return "rows" if layout == "any" else layout
    if 0 in shape:
        return "rows"
    names = {"rows"} | {entry.layout for entry in base.list_kernels("linear") if entry.layout != "any"}
    usable = sorted(name for name in names if get_layout(name).supports(fmt) is None)

    def total(layout: str) -> float:
        cost = 0.0
        for m in ms:
            facts = device_facts(device)
            best = choices(Problem("linear", m, *shape, dtype, fmt, layout, activations, facts))[0]
            cost += float("inf") if best.cost is None else best.cost
        return cost

    return min(usable, key=lambda name: (total(name), name != "rows"))
