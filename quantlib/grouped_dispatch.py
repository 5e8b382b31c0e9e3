"""Which kernel multiplies rows by their experts, and the loop over experts that every device can run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from quantlib import dispatch
from quantlib.devices import device_facts
from quantlib.experts import QuantizedExperts
from quantlib.formats.base import Format
from quantlib.kernels import base
from quantlib.kernels.base import GroupedKernel, Grouping, Operation, Problem
from quantlib.kernels.grouped import by_expert, loop_cost, used_experts
from quantlib.layouts import get_layout


class LoopKernel(GroupedKernel):
    """The kernels of single weights, expert after expert, each chosen by dispatch."""

    backend = "torch"
    layout = "any"
    single: Operation

    def supports(self, problem: Problem) -> str | None:
        return None

    def cost(self, problem: Problem) -> float:
        share = -(-problem.m // max(1, used_experts(problem)))
        one = replace(problem, operation=self.single, m=share, experts=1)
        best = dispatch.choices(one)[0].cost
        assert best is not None
        return loop_cost(problem, best)


class LoopGrouped(LoopKernel):
    name = "loop_grouped"
    operation = "grouped"
    single = "linear"
    scaling = "as the kernel of the single weight; a row scale multiplies its rounded result"

    def run(self, problem: Problem, x: Tensor, weight: QuantizedExperts, grouping: Grouping, bias: Tensor | None) -> Tensor:
        def product(expert: int, source: Tensor) -> Tensor:
            return dispatch.run("linear", source, weight.expert(expert), None if bias is None else bias[expert])

        return by_expert(x, problem.m, problem.n, grouping, product)


class LoopGroupedDgrad(LoopKernel):
    name = "loop_grouped_dgrad"
    operation = "grouped_dgrad"
    single = "dgrad"
    scaling = LoopGrouped.scaling

    def run(self, problem: Problem, x: Tensor, weight: QuantizedExperts, grouping: Grouping, bias: Tensor | None) -> Tensor:
        return by_expert(x, problem.m, problem.k, grouping, lambda expert, dy: dispatch.run("dgrad", dy, weight.expert(expert)))


for _kernel in (LoopGrouped(), LoopGroupedDgrad()):
    base.register_kernel(_kernel)


def run(
    operation: Operation,
    x: Tensor,
    weight: QuantizedExperts,
    grouping: Grouping,
    bias: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """Select and run: x is [M, K] for grouped, dy [T, N] for grouped_dgrad."""
    experts, n, k = weight.shape
    total = x.shape[0] if grouping.rows is None else grouping.rows.shape[0]
    facts = device_facts(x.device)
    problem = Problem(operation, total, n, k, x.dtype, weight.format, weight.layout, None, facts, experts=experts)
    return base.get_grouped_kernel(dispatch.choose(problem, kernel)).run(problem, x, weight, grouping, bias)


def best_layout(
    fmt: Format,
    shape: tuple[int, int, int],
    device: torch.device | str,
    dtype: torch.dtype,
    kernel: str | None = None,
    rows_per_expert: Iterable[int] = (1, 16, 512),
) -> str:
    """The layout with the least total predicted cost of `grouped` over some numbers of rows; a forced kernel's own layout."""
    if kernel is not None:
        layout = base.get_grouped_kernel(kernel).layout
        return "rows" if layout == "any" else layout
    experts, n, k = shape
    named = {entry.layout for entry in (*base.list_grouped_kernels("grouped"), *base.list_kernels("linear"))} - {"any"}
    usable = sorted(name for name in {"rows", *named} if get_layout(name).supports(fmt) is None)
    facts = device_facts(device)

    def total(layout: str) -> float:
        cost = 0.0
        for rows in rows_per_expert:
            problem = Problem("grouped", experts * rows, n, k, dtype, fmt, layout, None, facts, experts=experts)
            best = dispatch.choices(problem)[0].cost
            cost += float("inf") if best is None else best
        return cost

    return min(usable, key=lambda name: (total(name), name != "rows"))
