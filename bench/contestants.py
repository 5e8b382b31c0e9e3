"""Who takes part: every kernel of quantlib by name, and peers (bench/peers). Both look the same to a run."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import quantlib
from bench.data import DTYPE, Material
from bench.protocol import Case
from quantlib import dispatch
from quantlib.devices import Device, device_facts
from quantlib.formats import get_format
from quantlib.kernels import Kernel, Problem, list_kernels


@dataclass(frozen=True)
class Prepared:
    """A contestant ready to multiply.

    state     its weight; `copy` makes another one in other memory
    call      (state, x) -> y
    decoded   the weight [N, K] that it multiplies by, or None: then multiplying by the identity tells
    nbytes    of the state, for the number of copies that no cache holds
    """

    state: Any
    call: Callable[[Any, Tensor], Any]
    nbytes: int
    decoded: Tensor | None = None
    copy: Callable[[Any], Any] = deepcopy


class Contestant(Protocol):
    """A kernel of quantlib's or a peer.

    name       one word, the same in every run
    backend    "triton", "cuda", "cpu", "torch", "reference", or "peer"
    limit      the largest relative error to fp64 of its own weights; None: the limit of its dtype in quantlib.testing
    """

    @property
    def name(self) -> str: ...

    @property
    def backend(self) -> str: ...

    @property
    def limit(self) -> float | None: ...

    def version(self) -> str: ...

    def absent(self) -> str | None:
        """None where it can be used on this machine; otherwise the reason."""
        ...

    def why_not(self, case: Case, device: torch.device) -> str | None:
        """None where it can run the case; otherwise the reason."""
        ...

    def prepare(self, material: Material) -> Prepared:
        """Make its own form of the weight. May raise; then it counts as failed."""
        ...


@dataclass(frozen=True)
class KernelContestant:
    """One kernel, forced by name through the public API, its weight in the kernel's own layout."""

    kernel: Kernel
    limit: float | None = None

    @property
    def name(self) -> str:
        return self.kernel.name

    @property
    def backend(self) -> str:
        return self.kernel.backend

    @property
    def layout(self) -> str:
        return "rows" if self.kernel.layout == "any" else self.kernel.layout

    def version(self) -> str:
        return quantlib.__version__

    def absent(self) -> str | None:
        return None

    def why_not(self, case: Case, device: torch.device) -> str | None:
        if self.kernel.operation != case.operation:
            return f"does {self.kernel.operation}"
        return self.kernel.supports(problem_of(case, device_facts(device), self.layout))

    def prepare(self, material: Material) -> Prepared:
        case, name = material.case, self.kernel.name
        weight = material.quantized.to_layout(self.layout)
        calls: dict[str, Callable[[Any, Tensor], Any]] = {
            "linear": lambda state, x: quantlib.linear(x, state, activations=case.activations, kernel=name),
            "dgrad": lambda state, dy: dispatch.run("dgrad", dy, state, kernel=name),
            "dequantize": lambda state, empty: dispatch.run("dequantize", empty, state, kernel=name),
        }
        return Prepared(weight, calls[case.operation], weight.nbytes, material.decoded, lambda state: state.apply(torch.clone))


def problem_of(case: Case, device: Device, layout: str = "rows") -> Problem:
    """The problem as dispatch sees it."""
    fmt = get_format(case.format)
    return Problem(case.operation, case.m, case.n, case.k, DTYPE, fmt, layout, case.activations, device)  # type: ignore[arg-type]


def layout_at_load(case: Case, device: torch.device) -> str:
    """The layout that a layer of the case brings its weight into."""
    return dispatch.best_layout(get_format(case.format), (case.n, case.k), device, DTYPE, activations=case.activations)


def taken(case: Case, device: torch.device) -> str | None:
    """The kernel that dispatch takes: in the layout that it would choose at load, at this M. None where it has no part."""
    if not list_kernels(case.operation):
        return None
    return dispatch.select(problem_of(case, device_facts(device), layout_at_load(case, device))).name


def kernel_contestants(operation: str, names: set[str] | None = None) -> list[KernelContestant]:
    """The kernels of an operation; `names` chooses among them. Without it the slow reference is left out."""
    kernels = list_kernels(operation)
    chosen = [k for k in kernels if (k.backend != "reference" if names is None else k.name in names)]
    return [KernelContestant(kernel) for kernel in chosen]
