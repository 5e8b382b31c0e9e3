"""GEMM: y [M, N] = x [M, K] W^T for many rows of x, W in the fragments layout.

As in skinny.py the transpose is computed and decoded weights are the A operand, in registers. Here the arithmetic is the limit:
a program is persistent and takes blocks of y one after the other, so that no wave is left half empty and the epilogue of one
block hides behind the loads of the next. Blocks are ordered in groups of GROUP block rows of x, whose rows and weights then
meet in the second-level cache. Scales are applied to weights, once for all rows of x.
"""

import triton
import triton.language as tl

from .epilogue import finish
from .fragments import load_codes, load_strips
from .skinny import load_whole_columns, tile_product


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
):  # fmt: skip
    """x [M, K], rows x_stride apart, unit column stride, zeros behind K up to a multiple of 128; y, residual
    [M, N] contiguous; bias [N]; bias and residual may be
    None. Grid: any number of programs, at most one per block of y."""
    T: tl.constexpr = 32 * WARPS
    BLOCK_N: tl.constexpr = 16 * WARPS
    TILE_K: tl.constexpr = spec.tile_columns
    TURN: tl.constexpr = 128 // TILE_K
    last = tiles - 1
    blocks_n, blocks_m = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    for number in tl.range(tl.program_id(0), blocks_n * blocks_m, tl.num_programs(0)):
        block_n, block_m = block_of(number, blocks_n, blocks_m, GROUP)
        strip = (block_n * WARPS + tl.arange(0, T) // 32).to(tl.int64)
        strip = tl.minimum(strip, (N - 1) // 16)
        m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        scale, zero, unit0, unit1 = load_strips(
            scales, zeros, outer, inner, strip, strip * 0, unit_stride, outer_stride, spec, WARPS
        )
        scale_b, zero_b, unit0_b, unit1_b = 0, 0, 0, 0
        if TURN == 2:
            scale_b, zero_b, unit0_b, unit1_b = load_strips(
                scales, zeros, outer, inner, strip, tl.minimum(strip * 0 + 1, last), unit_stride, outer_stride, spec, WARPS
            )
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for turn in tl.range(0, tl.cdiv(K, TURN * TILE_K), num_stages=STAGES):
            tile = TURN * turn
            w0, upper, w1, w2 = load_codes(codes, codes1, codes2, strip, tile, tiles, spec, WARPS)
            activation = load_whole_columns(x, m, M, x_stride, tile * TILE_K, TILE_K)
            next_scale, next_zero, next_unit0, next_unit1 = load_strips(
                scales, zeros, outer, inner, strip, tl.minimum(tile + TURN, last), unit_stride, outer_stride, spec, WARPS
            )
            if TURN == 2:
                tile_b = tl.minimum(tile + 1, last)
                w0_b, upper_b, w1_b, w2_b = load_codes(codes, codes1, codes2, strip, tile_b, tiles, spec, WARPS)
                activation_b = load_whole_columns(x, m, M, x_stride, tile * TILE_K + TILE_K, TILE_K)
                next_scale_b, next_zero_b, next_unit0_b, next_unit1_b = load_strips(
                    scales, zeros, outer, inner, strip, tl.minimum(tile + 3, last), unit_stride, outer_stride, spec, WARPS
                )
            acc = tile_product(
                acc, w0, upper, w1, w2, scale, zero, unit0, unit1, activation, scales, outer, inner, scale_map, table, strip,
                tile, N - 1, across, x.dtype.element_ty, spec, WARPS, BLOCK_M,
            )  # fmt: skip
            if TURN == 2:
                acc = tile_product(
                    acc, w0_b, upper_b, w1_b, w2_b, scale_b, zero_b, unit0_b, unit1_b, activation_b, scales, outer, inner,
                    scale_map, table, strip, tile_b, N - 1, across, x.dtype.element_ty, spec, WARPS, BLOCK_M,
                )  # fmt: skip
                scale_b, zero_b, unit0_b, unit1_b = next_scale_b, next_zero_b, next_unit0_b, next_unit1_b
            scale, zero, unit0, unit1 = next_scale, next_zero, next_unit0, next_unit1
        n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        finish(acc, y, bias, residual, scales, outer, None, None, n, m, M, N, 0, 0, spec, 1)
