"""The CUDA C++ kernel for Hopper of the fragments layout (csrc/cuda/sm90): linear_tile, for batches of 16 and more rows.

It reads the same packed weight as the kernels of sm80 and Triton and competes with them in the same table. Status: run by the
emulator, bit for bit where the formats allow, and compiled; never run on a GPU so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from quantlib.formats.base import Format
from quantlib.kernels import cuda_module
from quantlib.kernels.base import Problem, register_kernel
from quantlib.kernels.costs import Schedule, modelled, tuned_efficiency
from quantlib.kernels.cuda_fragments import CudaLinear
from quantlib.kernels.cuda_fragments_launch import DTYPES, Deal, Variant, arithmetic, deal

FEWEST_ROWS = 16
PEAK_SHARE = {16: 0.2, 32: 0.4, 64: 0.65, 128: 0.75}
"""Rows of x in a block -> the share of the matrix peak that its wgmma can reach (estimates)."""
INSTRUCTIONS = {"int4": 3.0, "float4": 3.5, "table": 4.0}
"""Codec -> machine instructions per weight in the main loop without the scaling of sums (counted in SASS); others take
about OTHER_INSTRUCTIONS."""
OTHER_INSTRUCTIONS = 3.5


@dataclass(frozen=True)
class TileVariant(Variant):
    """One compiled instance (csrc/cuda/sm90/tile_variants.h).

    piece       columns after which sums are scaled: blocks of scales are multiples of it; 0: at the end, or in the weights
    per_unit    programs that one SM holds
    """

    piece: int
    per_unit: int


@lru_cache(maxsize=8)
def tile_variants(module: Any) -> tuple[TileVariant, ...]:
    """The instances in a module, quantlib._cuda or the emulator's."""
    return tuple(TileVariant(index, **facts) for index, facts in enumerate(module.sm90_linear_tile_variants()))


def scaled_columns(fmt: Format) -> int:
    """Columns after which sums must be scaled; 0 where that is done at the end, or in the weights."""
    return 0 if fmt.scale.kind == "e4m3_global" else fmt.block.cols or 0


@lru_cache(maxsize=256)
def tile_instances(module: Any, fmt: Format, dtype: torch.dtype) -> tuple[TileVariant, ...]:
    """The instances that serve a format, one for each number of rows: those that scale sums as seldom as its blocks allow."""
    kinds, columns = arithmetic(fmt, dtype), scaled_columns(fmt)
    decoding = [v for v in tile_variants(module) if (v.codec, v.scaling) == kinds and v.dtype == DTYPES[dtype]]
    fitting = [v for v in decoding if (columns % v.piece == 0 if v.piece and columns else v.piece == columns)]
    longest = max((v.piece for v in fitting), default=0)
    return tuple(v for v in fitting if v.piece == longest)


class CudaLinearTile(CudaLinear):
    """y = x W^T with W decoded into the registers of wgmma and x brought by TMA."""

    name = "cuda_sm90_linear_tile"

    def most_rows(self) -> int | None:
        return None

    def supports(self, problem: Problem) -> str | None:
        if problem.device.kind == "cuda" and problem.device.capability != 90:
            return f"uses wgmma, which Hopper (sm_90) alone has; {problem.device.name} is {problem.device.arch}"
        if problem.m < FEWEST_ROWS:
            return f"multiplies {FEWEST_ROWS} and more rows; the batch has {problem.m}"
        refusal = super().supports(problem) or cuda_module.refusal("sm90", problem.device.capability)
        if refusal is None and not self.instances(problem):
            return f"was not built for blocks like those of {problem.format}"
        return refusal

    def instances(self, problem: Problem) -> tuple[TileVariant, ...]:
        return tile_instances(cuda_module.module(), problem.format, problem.dtype)

    def plan(self, problem: Problem) -> tuple[Variant, Deal]:
        units = problem.device.units
        plans = [(each, deal(problem.m, problem.n, problem.k, each, units * each.per_unit)) for each in self.instances(problem)]
        return min(plans, key=lambda plan: self.plan_cost(problem, *plan))

    def plan_cost(self, problem: Problem, variant: Variant, dealt: Deal) -> float:
        """Predicted microseconds of an instance."""
        assert isinstance(variant, TileVariant)
        # A lane scales rows / 2 sums for 8 weights of each 16 columns of a piece.
        scaling = variant.rows / variant.piece if variant.piece else 0.0
        instructions = INSTRUCTIONS.get(variant.codec, OTHER_INSTRUCTIONS) + scaling
        x_bytes = variant.rows * variant.depth * 2
        words = max(1, variant.columns * variant.depth * problem.format.codec.bits // 8)
        stages = variant.shared_bytes // (x_bytes + words)
        blocks_m = -(-problem.m // variant.rows)
        used = problem.m / (blocks_m * variant.rows)  # a block's products are made for all of its rows
        schedule = Schedule(dealt.programs, variant.per_unit, max(1, stages - 1) * words, blocks_m, instructions)
        sums = 2 * dealt.programs * variant.rows * variant.columns if dealt.shared else 0
        efficiency = tuned_efficiency(problem.device, self.name, self.default_efficiency)
        return modelled(problem, schedule, PEAK_SHARE[variant.rows] * used, efficiency, sums)


register_kernel(CudaLinearTile())
