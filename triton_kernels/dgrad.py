"""Dgrad: dX [M, K] = dY [M, N] W, from the forward pass's packed weight: no second copy, no transpose, nothing re-quantized.

The sum runs over N, so a decoded tile is the B operand, [16 * DOWN rows of W, COLUMNS * ACROSS columns], and goes through
shared memory once (tensor cores read it transposed from there). A tile is decoded once per block of x's rows: a program takes
as many rows of dY as registers hold accumulators for, so that decoding is a small share of the multiplication.
"""

import triton
import triton.language as tl

from .decode import multiply_add, narrow
from .fragments import beside, decode_fragments, load_codes, load_strips
from .gemm import block_of
from .values import restored


@triton.jit
def load_whole_gradient(dy, m, M, dy_stride, first, BLOCK_N: tl.constexpr):
    """dY [BLOCK_M, BLOCK_N] from column `first`; rows behind M repeat the last one."""
    n = first + tl.arange(0, BLOCK_N)
    return tl.load(dy + (tl.minimum(m, M - 1).to(tl.int64) * dy_stride)[:, None] + n[None, :])


@triton.jit
def columns_product(
    dy, m, M, dy_stride, codes, codes1, codes2, table, scales, zeros, outer, inner, scale_map,
    block_k, N, across, tiles, unit_stride, outer_stride,
    spec: tl.constexpr, BLOCK_M: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dY W for one block of W's columns: fp32 [BLOCK_M, COLUMNS * ACROSS], summed over N; m: int [BLOCK_M], the rows of dY."""
    WARPS: tl.constexpr = DOWN * ACROSS
    BLOCK_N: tl.constexpr = 16 * DOWN
    warp = tl.arange(0, 32 * WARPS) // 32
    tile = tl.minimum((block_k * ACROSS + warp % ACROSS).to(tl.int64), tiles - 1)
    last_strip = (N - 1) // 16
    strip = tl.minimum((warp // ACROSS).to(tl.int64), last_strip)
    scale, zero, unit0, unit1 = load_strips(scales, zeros, outer, inner, strip, tile, unit_stride, outer_stride, spec, WARPS)
    acc = tl.zeros((BLOCK_M, spec.tile_columns * ACROSS), dtype=tl.float32)
    for step in tl.range(0, tl.cdiv(N, BLOCK_N), num_stages=STAGES):
        # The clamped strip of the last step decodes rows that dY's zeros leave out.
        strip = tl.minimum((step * DOWN + warp // ACROSS).to(tl.int64), last_strip)
        w0, upper, w1, w2 = load_codes(codes, codes1, codes2, strip, tile, tiles, spec, WARPS)
        ahead = tl.minimum(strip + DOWN, last_strip)
        next_scale, next_zero, next_unit0, next_unit1 = load_strips(
            scales, zeros, outer, inner, ahead, tile, unit_stride, outer_stride, spec, WARPS
        )
        gradient = load_whole_gradient(dy, m, M, dy_stride, step * BLOCK_N, BLOCK_N)
        leaves = decode_fragments(
            w0, upper, w1, w2, scale, zero, unit0, unit1, scales, outer, inner, scale_map, table, strip, tile, N - 1, across,
            dy.dtype.element_ty, spec, WARPS,
        )  # fmt: skip
        acc = multiply_add(gradient, beside(leaves, spec.tile_columns, DOWN, ACROSS), acc)
        scale, zero, unit0, unit1 = next_scale, next_zero, next_unit0, next_unit1
    return restored(acc, outer, spec)


@triton.jit
def dgrad_kernel(
    dy, dx, codes, codes1, codes2, table, scales, zeros, outer, inner, scale_map,
    M, N, K, dy_stride, across, tiles, unit_stride, outer_stride,
    spec: tl.constexpr, BLOCK_M: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """dy [M, N], rows dy_stride apart, unit column stride, zeros behind N up to a whole block; dx [M, K] contiguous. DOWN *
    ACROSS warps. Grid: (blocks of dx,)."""
    BLOCK_K: tl.constexpr = spec.tile_columns * ACROSS
    block_k, block_m = block_of(tl.program_id(0), tl.cdiv(K, BLOCK_K), tl.cdiv(M, BLOCK_M), GROUP)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = columns_product(
        dy, m, M, dy_stride, codes, codes1, codes2, table, scales, zeros, outer, inner, scale_map,
        block_k, N, across, tiles, unit_stride, outer_stride, spec, BLOCK_M, DOWN, ACROSS, STAGES,
    )  # fmt: skip
    k = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (m < M)[:, None] & (k < K)[None, :]
    tl.store(dx + m.to(tl.int64)[:, None] * K + k[None, :], narrow(acc, dx.dtype.element_ty), mask=mask)
