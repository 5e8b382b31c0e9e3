"""Kernels for the weights of several experts: Triton's, on the fragments layout, and the reference.

The loop over experts with the kernels of single weights is declared in quantlib/grouped_dispatch.py: it dispatches itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from quantlib.errors import ShapeError
from quantlib.experts import QuantizedExperts
from quantlib.kernels.base import GroupedKernel, Grouping, Problem, register_kernel
from quantlib.kernels.costs import CLOCK, LANES, LAUNCH, activation_bytes, decode_then_matmul, packed_bytes, tuned_efficiency
from quantlib.kernels.fragments_launch import decode_instructions, whole_columns
from quantlib.kernels.grouped_launch import grouped_dgrad_launch, grouped_dgrad_tile, grouped_launch, grouped_tile
from quantlib.kernels.triton import refusal
from quantlib.kernels.triton_launch import Tile, interpreting
from quantlib.layouts import fragments

SYNC = 40.0
"""Microseconds that a GPU idles while the host waits for the offsets."""
CALL = 10.0
"""Microseconds of the host for each expert's multiplication."""


def used_experts(problem: Problem) -> int:
    """The most experts that can have a row."""
    return min(problem.experts, problem.m)


def loop_cost(problem: Problem, each: float) -> float:
    """Microseconds of a loop on the host, an expert of which takes `each`."""
    return (SYNC if problem.device.kind == "cuda" else 0.0) + used_experts(problem) * (CALL + each)


def by_expert(x: Tensor, total: int, width: int, grouping: Grouping, product: Callable[[int, Tensor], Tensor]) -> Tensor:
    """[total, width]: product(e, rows of x that belong to e) for each expert that has rows, times row_scale.

    Reads `offsets` on the host, and so waits for a GPU. Raises ShapeError where they don't ascend from 0 to at most `total`.
    """
    bounds: list[int] = grouping.offsets.tolist()
    if bounds[0] != 0 or bounds[-1] > total or any(begin > end for begin, end in pairwise(bounds)):
        raise ShapeError(f"offsets are {bounds}; they must ascend from 0 to at most the number of rows, {total}")
    out = x.new_zeros(total, width)
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            source = x[begin:end] if grouping.rows is None else x[grouping.rows[begin:end]]
            out[begin:end] = product(expert, source)
    if grouping.row_scale is None:
        return out
    wide = torch.promote_types(x.dtype, torch.float32)
    return (out.to(wide) * grouping.row_scale.to(wide)[:, None]).to(x.dtype)


class ReferenceGrouped(GroupedKernel):
    name = "reference_grouped"
    backend = "reference"
    operation = "grouped"
    layout = "any"
    scaling = "weights decoded in fp32 and rounded once to x's dtype; a row scale multiplies the rounded product"

    def supports(self, problem: Problem) -> str | None:
        return None

    def cost(self, problem: Problem) -> float:
        return loop_cost(problem, decode_then_matmul(problem, efficiency=0.05))

    def run(self, problem: Problem, x: Tensor, weight: QuantizedExperts, grouping: Grouping, bias: Tensor | None) -> Tensor:
        def product(expert: int, source: Tensor) -> Tensor:
            decoded = weight.expert(expert).dequantize(x.dtype)
            return functional.linear(source, decoded, None if bias is None else bias[expert])

        return by_expert(x, problem.m, problem.n, grouping, product)


class ReferenceGroupedDgrad(GroupedKernel):
    name = "reference_grouped_dgrad"
    backend = "reference"
    operation = "grouped_dgrad"
    layout = "any"
    scaling = ReferenceGrouped.scaling

    def supports(self, problem: Problem) -> str | None:
        return None

    def cost(self, problem: Problem) -> float:
        return loop_cost(problem, decode_then_matmul(problem, efficiency=0.05))

    def run(self, problem: Problem, x: Tensor, weight: QuantizedExperts, grouping: Grouping, bias: Tensor | None) -> Tensor:
        return by_expert(
            x, problem.m, problem.k, grouping, lambda expert, source: source @ weight.expert(expert).dequantize(x.dtype)
        )


class TritonGroupedKernel(GroupedKernel):
    """What the Triton kernels share: who they refuse, and a cost that counts the blocks that uneven experts may need."""

    backend = "triton"
    layout = "fragments"
    arithmetic_of = "gemm"
    default_efficiency = 0.6

    def supports(self, problem: Problem) -> str | None:
        return fragments.supports(problem.format) or refusal(problem, self.layout)

    def tile(self, problem: Problem) -> Tile:
        """By rows per expert: their true number is known to the device alone."""
        raise NotImplementedError

    def cost(self, problem: Problem) -> float:
        if interpreting():
            return math.inf
        device, used, rows = problem.device, used_experts(problem), self.tile(problem).m
        blocks = problem.m // rows + used
        weights = blocks * problem.n * problem.k
        memory = (used * packed_bytes(problem) + activation_bytes(problem)) / (device.bandwidth * 1e3)
        compute = 2 * rows * weights / (device.peak_tflops * 1e6 * 0.7)
        instructions = decode_instructions(problem.format, problem.dtype, self.arithmetic_of)
        decode = weights * instructions / (device.units * LANES * CLOCK * 1e3)
        efficiency = tuned_efficiency(device, self.name, self.default_efficiency)
        return LAUNCH + max(memory, compute, decode) / efficiency


class TritonGrouped(TritonGroupedKernel):
    name = "triton_grouped"
    operation = "grouped"
    scaling = "weights as the law, or exact in 16 bits with scales applied to fp32 sums where blocks allow"

    def tile(self, problem: Problem) -> Tile:
        return grouped_tile(problem.m, problem.experts, problem.format, problem.dtype, problem.device.capability)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedExperts, grouping: Grouping, bias: Tensor | None) -> Tensor:
        y = x.new_empty(problem.m, problem.n)
        if problem.experts == 0:
            return y.zero_()
        if y.numel():
            x = whole_columns(x, fragments.tile_columns(problem.format))
            bias = None if bias is None else bias.contiguous()
            offsets, rows, row_scale = grouping.offsets, grouping.rows, grouping.row_scale
            tile, capability = self.tile(problem), problem.device.capability
            grouped_launch(x, weight, offsets, rows, bias, row_scale, y, tile, capability).run(x.device)
        return y


class TritonGroupedDgrad(TritonGroupedKernel):
    name = "triton_grouped_dgrad"
    operation = "grouped_dgrad"
    arithmetic_of = "dgrad"
    scaling = "weights as the law, or exact in 16 bits"

    def tile(self, problem: Problem) -> Tile:
        return grouped_dgrad_tile(problem.m, problem.experts, problem.format, problem.dtype, problem.device.capability)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedExperts, grouping: Grouping, bias: Tensor | None) -> Tensor:
        dx = x.new_empty(problem.m, problem.k)
        if problem.experts == 0:
            return dx.zero_()
        if dx.numel():
            tile = self.tile(problem)
            dy = whole_columns(x, tile.n)
            grouped_dgrad_launch(dy, weight, grouping.offsets, grouping.row_scale, dx, tile).run(x.device)
        return dx


for _kernel in (ReferenceGrouped(), ReferenceGroupedDgrad(), TritonGrouped(), TritonGroupedDgrad()):
    register_kernel(_kernel)
