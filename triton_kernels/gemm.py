"""GEMM: y [M, N] = x [M, K] W^T for many rows of x, W in the fragments layout.

As in skinny.py the transpose is computed and decoded weights are the A operand, in registers. Here the arithmetic is the limit:
a program is persistent and takes blocks of y one after the other, so that no wave is left half empty and the epilogue of one
block hides behind the loads of the next. Blocks are ordered in groups of GROUP block rows of x, whose rows and weights then
meet in the second-level cache. Scales are applied to weights, once for all rows of x.
"""

import triton
import triton.language as tl

from .epilogue import finish
from .skinny import strips_product


@triton.jit
def block_of(number, blocks_n, blocks_m, GROUP: tl.constexpr):
    """The `number`-th block of y: (block of W's rows, block of x's rows), GROUP blocks of x side by side."""
    in_group = GROUP * blocks_n
    first_m = number // in_group * GROUP
    size = tl.minimum(blocks_m - first_m, GROUP)
    return number % in_group // size, first_m + number % in_group % size


@triton.jit
def gemm_kernel(
    x, y, bias, residual, codes, codes1, codes2, table, scales, zeros, outer, inner, scale_map,
    M, N, K, x_stride, across, tiles, unit_stride, outer_stride,
    spec: tl.constexpr, BLOCK_M: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
    BY_WARP: tl.constexpr,
):  # fmt: skip
    """x [M, K], rows x_stride apart, unit column stride, zeros behind K up to a multiple of 128; y, residual [M, N]
    contiguous; bias [N]; bias and residual may be None. Grid: any number of programs, at most one per block of y."""
    T: tl.constexpr = 32 * WARPS
    BLOCK_N: tl.constexpr = 16 * WARPS
    TURN: tl.constexpr = 128 // spec.tile_columns
    blocks_n, blocks_m = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    for number in tl.range(tl.program_id(0), blocks_n * blocks_m, tl.num_programs(0)):
        block_n, block_m = block_of(number, blocks_n, blocks_m, GROUP)
        strip = (block_n * WARPS + tl.arange(0, T) // 32).to(tl.int64)
        strip = tl.minimum(strip, (N - 1) // 16)
        m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        acc = strips_product(
            x, m, M, x_stride, codes, codes1, codes2, table, scales, zeros, outer, inner, scale_map,
            strip, 0, tl.cdiv(K, TURN * spec.tile_columns), N, across, tiles, unit_stride, outer_stride,
            spec, BLOCK_M, WARPS, TURN, STAGES, BY_WARP,
        )  # fmt: skip
        n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        finish(acc, y, bias, residual, scales, outer, None, None, n, m, M, N, 0, 0, spec, 1)
