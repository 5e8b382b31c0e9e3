"""The Triton kernels of the fragments layout, one regime each: gemv, skinny, gemm, dgrad, dequantize.

They serve every codec, scale and zero kind whose blocks fit the layout, on every NVIDIA chip since sm_80. With
TRITON_INTERPRET=1 they also run on the CPU, for tests, and are then never the cheapest.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantlib.kernels.base import Kernel, Problem, register_kernel
from quantlib.kernels.costs import LAUNCH, Schedule, decode_then_matmul, modelled, round_trip_cost, tuned_efficiency
from quantlib.kernels.fragments_launch import (
    decode_instructions,
    dequantize_launch,
    dgrad_grid,
    dgrad_launch,
    gemm_grid,
    gemm_launch,
    gemv_grid,
    gemv_launch,
    skinny_grid,
    skinny_launch,
    whole_columns,
)
from quantlib.kernels.fragments_tiles import PEAK_SHARE, dgrad_tiles, gemm_tiles, gemv_tiles, skinny_tiles
from quantlib.kernels.triton import activation_rows, refusal
from quantlib.kernels.triton_launch import BoundLaunch, Launch, Tile, alike, interpreting
from quantlib.kernels.tuned import tuned_tile
from quantlib.kernels.workspace import split_workspace
from quantlib.layouts import fragments
from quantlib.tensor import QuantizedTensor

GEMV_ROWS = 8
SKINNY_ROWS = 256
COLUMNS = 128
"""What skinny and gemm take of K in one turn of their loop: x must be whole up to a multiple of that."""


def even_rows(x: Tensor) -> Tensor:
    """x [M, K] with rows an even number of elements apart that start on 4 bytes, zeros behind an odd K: read two at a time."""
    m, k = x.shape
    if k % 2 == 0 and x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0:
        return x
    wide = x.new_zeros(m, k + k % 2)
    wide[:, :k] = x
    return wide[:, :k]


class FragmentKernel(Kernel):
    """What the kernels of this layout share: who they refuse, where their tile comes from, what they cost."""

    backend = "triton"
    layout = "fragments"
    default_efficiency = 0.6

    def supports(self, problem: Problem) -> str | None:
        return self.declines(problem) or fragments.supports(problem.format) or refusal(problem, self.layout)

    def declines(self, problem: Problem) -> str | None:
        """Why this kernel, of all that read the layout, leaves the problem to another; or None."""
        return None

    @abstractmethod
    def tiles(self, problem: Problem) -> list[Tile]:
        """Tiles worth trying; among equals of the cost model the first is taken."""

    def tile(self, problem: Problem) -> Tile:
        """The tuned tile, or the one of `tiles` with the least predicted cost."""
        tuned = tuned_tile(problem.device, self.name, problem)
        return tuned or min(self.tiles(problem), key=lambda tile: self.tile_cost(problem, tile))

    @abstractmethod
    def schedule(self, problem: Problem, tile: Tile) -> Schedule:
        """How the problem lies on the chip."""

    def tile_cost(self, problem: Problem, tile: Tile) -> float:
        """Predicted microseconds with a tile, on a device whose peaks are known."""
        sums = tile.splits * problem.m * problem.n if tile.splits > 1 else 0
        efficiency = tuned_efficiency(problem.device, self.name, self.default_efficiency)
        return modelled(problem, self.schedule(problem, tile), PEAK_SHARE[tile.m], efficiency, sums)

    def cost(self, problem: Problem) -> float:
        if interpreting():
            return math.inf
        return self.tile_cost(problem, self.tile(problem)) + round_trip_cost(problem)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        key = (self.name, problem.m, problem.dtype, problem.batch_invariant)
        tile = weight.memo.get(key)
        if tile is None:
            tile = weight.memo[key] = self.tile(problem)
        return self.run_tile(problem, x, weight, bias, tile)

    @abstractmethod
    def run_tile(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, tile: Tile) -> Tensor:
        """`run` with a tile of the caller's choice."""

    def launch(
        self, launch: Callable[[], Launch], weight: QuantizedTensor, tile: Tile, grid: tuple[int, int, int], **changing: Any
    ) -> None:
        """Run a launch bound once per weight, tile and specialization; `changing`: the arguments that differ between calls."""
        key = (self.name, tile, *alike(*changing.values()))
        bound = weight.memo.get(key)
        if bound is None:
            bound = weight.memo[key] = BoundLaunch(launch(), weight.device)
        bound(grid, **changing)

    def instructions(self, problem: Problem) -> float:
        """Per decoded weight."""
        return decode_instructions(problem.format, problem.dtype, self.name.removeprefix("triton_"))


class TritonGemv(FragmentKernel):
    name = "triton_gemv"
    operation = "linear"
    scaling = "codes or weights exact in 16 bits times x, scales applied to fp32 sums where blocks allow, else as the law"

    def declines(self, problem: Problem) -> str | None:
        if problem.m > GEMV_ROWS:
            return f"multiplies up to {GEMV_ROWS} rows; the batch has {problem.m}"
        if problem.dtype not in (torch.float16, torch.bfloat16):
            return "multiplies on tensor cores in fp16 or bf16 only"
        if problem.batch_invariant:
            return "sums in another order than the kernels of larger batches, and batch_invariant is set"
        return None

    def tiles(self, problem: Problem) -> list[Tile]:
        return gemv_tiles(problem.n, fragments.tiles(problem.format, problem.k), problem.device.units)

    def schedule(self, problem: Problem, tile: Tile) -> Schedule:
        programs = -(-problem.n // 16) * tile.splits
        in_flight = 2 * tile.warps * 16 * fragments.tile_columns(problem.format) * problem.format.codec.bits // 8
        return Schedule(programs, 40 // tile.warps, in_flight, 1, self.instructions(problem))

    def run_tile(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, tile: Tile) -> Tensor:
        (m, n), device = (x.shape[0], weight.shape[0]), weight.device
        y = x.new_empty(m, n)
        if y.numel():
            partial, counters = split_workspace(tile.splits, m, n, -(-n // 16), device)
            rows = even_rows(activation_rows(problem, x))
            self.launch(
                lambda: gemv_launch(rows, weight, bias, None, y, partial, counters, tile),
                weight, tile, gemv_grid(n, tile),
                x=rows, y=y, bias=bias, partial=partial, counters=counters, M=m, x_stride=rows.stride(0),
            )  # fmt: skip
        return y


class TritonSkinny(FragmentKernel):
    name = "triton_skinny"
    operation = "linear"
    scaling = TritonGemv.scaling

    def declines(self, problem: Problem) -> str | None:
        if problem.m > SKINNY_ROWS:
            return f"multiplies up to {SKINNY_ROWS} rows; the batch has {problem.m}"
        if problem.batch_invariant:
            return "its tile follows the batch, and batch_invariant is set"
        return None

    def tiles(self, problem: Problem) -> list[Tile]:
        return skinny_tiles(problem.m, problem.n, fragments.tiles(problem.format, problem.k), problem.dtype, problem.device)

    def schedule(self, problem: Problem, tile: Tile) -> Schedule:
        blocks_m = -(-problem.m // tile.m)
        programs = -(-problem.n // (16 * tile.warps)) * blocks_m * tile.splits
        width = fragments.tile_columns(problem.format)
        in_flight = max(1, tile.stages - 1) * tile.warps * 16 * width * problem.format.codec.bits // 8
        return Schedule(programs, max(1, 16 // tile.warps), in_flight, blocks_m, self.instructions(problem))

    def run_tile(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, tile: Tile) -> Tensor:
        (m, n), device = (x.shape[0], weight.shape[0]), weight.device
        y = x.new_empty(m, n)
        if y.numel():
            blocks = -(-n // (16 * tile.warps)) * -(-m // tile.m)
            partial, counters = split_workspace(tile.splits, m, n, blocks, device)
            rows = whole_columns(activation_rows(problem, x), COLUMNS)
            self.launch(
                lambda: skinny_launch(rows, weight, bias, None, y, partial, counters, tile, problem.device.capability),
                weight, tile, skinny_grid(m, n, tile),
                x=rows, y=y, bias=bias, partial=partial, counters=counters, M=m, x_stride=rows.stride(0),
            )  # fmt: skip
        return y


class TritonGemm(FragmentKernel):
    name = "triton_gemm"
    operation = "linear"
    scaling = "weights as the law, or exact in 16 bits with the scales of whole rows and tensors applied to fp32 sums"

    def tiles(self, problem: Problem) -> list[Tile]:
        # A row's sum must not depend on the batch: one tile for every M then.
        m = 1 if problem.batch_invariant else problem.m
        return gemm_tiles(m, problem.dtype, problem.device)

    def tile(self, problem: Problem) -> Tile:
        return self.tiles(problem)[0] if problem.batch_invariant else super().tile(problem)

    def schedule(self, problem: Problem, tile: Tile) -> Schedule:
        blocks_m = -(-problem.m // tile.m)
        programs = -(-problem.n // (16 * tile.warps)) * blocks_m
        width = fragments.tile_columns(problem.format)
        in_flight = max(1, tile.stages - 1) * tile.warps * 16 * width * problem.format.codec.bits // 8
        return Schedule(programs, tile.per_unit, in_flight, blocks_m, self.instructions(problem))

    def run_tile(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, tile: Tile) -> Tensor:
        (m, n), units = (x.shape[0], weight.shape[0]), problem.device.units
        y = x.new_empty(m, n)
        if y.numel():
            rows = whole_columns(activation_rows(problem, x), COLUMNS)
            self.launch(
                lambda: gemm_launch(rows, weight, bias, None, y, tile, units, problem.device.capability),
                weight, tile, gemm_grid(m, n, tile, units),
                x=rows, y=y, bias=bias, M=m, x_stride=rows.stride(0),
            )  # fmt: skip
        return y


class TritonDgrad(FragmentKernel):
    """dx = dy W, decoded from the forward pass's packed weight inside the multiplication."""

    name = "triton_dgrad"
    operation = "dgrad"
    scaling = "weights as the law, or exact in 16 bits"

    def tiles(self, problem: Problem) -> list[Tile]:
        return dgrad_tiles(problem.m, fragments.tile_columns(problem.format), problem.dtype, problem.device)

    def schedule(self, problem: Problem, tile: Tile) -> Schedule:
        blocks_m = -(-problem.m // tile.m)
        width = fragments.tile_columns(problem.format)
        programs = -(-problem.k // (width * tile.warps * 16 // tile.n)) * blocks_m
        in_flight = max(1, tile.stages - 1) * tile.warps * 16 * width * problem.format.codec.bits // 8
        return Schedule(programs, 1, in_flight, blocks_m, self.instructions(problem))

    def run_tile(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None, tile: Tile) -> Tensor:
        dy = whole_columns(x, tile.n)
        dx = x.new_empty(x.shape[0], weight.shape[1])
        if dx.numel():
            grid = dgrad_grid(dy.shape[0], weight.shape[1], fragments.tile_columns(weight.format), tile)
            self.launch(
                lambda: dgrad_launch(dy, weight, dx, tile), weight, tile, grid,
                dy=dy, dx=dx, M=dy.shape[0], dy_stride=dy.stride(0),
            )  # fmt: skip
        return dx


def dequantize(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """W [N, K] in `dtype`, by the Triton kernel."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.numel():
        dequantize_launch(weight, out).run(weight.device)
    return out


class TritonDequantize(Kernel):
    name = "triton_dequantize"
    backend = "triton"
    operation = "dequantize"
    layout = "fragments"

    def supports(self, problem: Problem) -> str | None:
        return fragments.supports(problem.format) or refusal(problem, self.layout)

    def cost(self, problem: Problem) -> float:
        if interpreting():
            return math.inf
        return decode_then_matmul(problem, tuned_efficiency(problem.device, self.name, 0.6))

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        return dequantize(weight, problem.dtype)


class TritonDecodedLinear(Kernel):
    """y = x W^T by decoding W once into 16 bits and multiplying with torch's library: where M is so large that it wins."""

    name = "triton_decoded_linear"
    backend = "triton"
    operation = "linear"
    layout = "fragments"

    def supports(self, problem: Problem) -> str | None:
        if problem.batch_invariant:
            return "torch's library chooses its order of summation by the batch, and batch_invariant is set"
        return fragments.supports(problem.format) or refusal(problem, self.layout)

    def cost(self, problem: Problem) -> float:
        if interpreting():
            return math.inf
        decoded = decode_then_matmul(problem, tuned_efficiency(problem.device, "triton_dequantize", 0.6))
        return 2 * LAUNCH + decoded / 0.75 + round_trip_cost(problem)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(activation_rows(problem, x), dequantize(weight, x.dtype), bias)


class TritonDecodedDgrad(Kernel):
    """dx = dy W by decoding W once and multiplying with torch's library."""

    name = "triton_decoded_dgrad"
    backend = "triton"
    operation = "dgrad"
    layout = "fragments"

    def supports(self, problem: Problem) -> str | None:
        return fragments.supports(problem.format) or refusal(problem, self.layout)

    def cost(self, problem: Problem) -> float:
        if interpreting():
            return math.inf
        return 2 * LAUNCH + decode_then_matmul(problem, tuned_efficiency(problem.device, "triton_dequantize", 0.6)) / 0.75

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        return x @ dequantize(weight, x.dtype)


for _kernel in (
    TritonGemv(),
    TritonSkinny(),
    TritonGemm(),
    TritonDecodedLinear(),
    TritonDgrad(),
    TritonDecodedDgrad(),
    TritonDequantize(),
):
    register_kernel(_kernel)
