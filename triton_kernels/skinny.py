"""Skinny: y [M, N] = x [M, K] W^T for a few dozen rows of x, W in the fragments layout.

The transpose is computed, y^T = W x^T: decoded weights are the A operand, in the registers where they were made (mma.sync and
wgmma take it from there), and few rows of x waste little of the instruction. A program owns 16 * WARPS rows of W and one of
SPLITS ranges of K; its warps share x through shared memory. Code words come through asynchronous copies, several tiles ahead;
the few words of scales come one tile ahead through registers.
"""

import triton
import triton.language as tl

from .decode import multiply_add
from .epilogue import finish
from .fragments import by_row, decode_fragments, lanes_of, load_codes, load_strips, rows_of, stacked, tile_scale
from .pairs import as_operand


@triton.jit
def load_whole_columns(x, m, M, x_stride, first, TILE_K: tl.constexpr):
    """x^T [TILE_K, BLOCK_M] from column `first`; rows behind M repeat the last one."""
    k = first + tl.arange(0, TILE_K)
    return tl.load(x + (tl.minimum(m, M - 1).to(tl.int64) * x_stride)[None, :] + k[:, None])


@triton.jit
def tile_product(
    acc, w0, upper, w1, w2, scale, zero, unit0, unit1, activation, scales, outer, inner, scale_map, table, strip, tile,
    last_row, across, dtype: tl.constexpr, spec: tl.constexpr, WARPS: tl.constexpr, BLOCK_M: tl.constexpr,
    BY_WARP: tl.constexpr,
):  # fmt: skip
    """acc + one tile of W times x^T. acc: fp32 [16 * WARPS, BLOCK_M], or in `lanes_of` shape where scales are applied to
    sums."""
    T: tl.constexpr = 32 * WARPS
    leaves = decode_fragments(
        w0, upper, w1, w2, scale, zero, unit0, unit1, scales, outer, inner, scale_map, table, strip, tile, last_row, across,
        dtype, spec, WARPS,
    )  # fmt: skip
    weight = stacked(leaves, spec.tile_columns, WARPS)
    if BY_WARP and dtype != tl.float32:
        weight = as_operand(weight)
    if spec.scale_at == "tile":
        scale0 = tile_scale(scale, unit0, scales, outer, inner, scale_map, strip, tile, last_row, across, spec, 0, 0, T)
        scale1 = tile_scale(scale, unit0, scales, outer, inner, scale_map, strip, tile, last_row, across, spec, 1, 0, T)
        part = lanes_of(multiply_add(weight, activation, tl.zeros((16 * WARPS, BLOCK_M), dtype=tl.float32)), WARPS, BLOCK_M)
        return tl.fma(part, tl.broadcast_to(by_row(scale0, scale1, WARPS), part.shape), acc)
    else:
        return multiply_add(weight, activation, acc)


@triton.jit
def strips_product(
    x, m, M, x_stride, codes, codes1, codes2, table, scales, zeros, outer, inner, scale_map,
    strip, start, stop, N, across, tiles, unit_stride, outer_stride,
    spec: tl.constexpr, BLOCK_M: tl.constexpr, WARPS: tl.constexpr, TURN: tl.constexpr, STAGES: tl.constexpr,
    BY_WARP: tl.constexpr,
):  # fmt: skip
    """W x^T of each warp's strip: fp32 [16 * WARPS, BLOCK_M], summed over the turns `start` to `stop` of TURN tiles each.

    m: int [BLOCK_M], the rows of x, which has zeros behind K up to the end of the last turn. Two tiles of 64 columns a turn
    share the loop's barriers and counters; where K has an odd one, the last is repeated against zeros of x. BY_WARP: tensor
    cores are one warp's (mma.sync).
    """
    TILE_K: tl.constexpr = spec.tile_columns
    last = tiles - 1
    scale, zero, unit0, unit1 = load_strips(
        scales, zeros, outer, inner, strip, tl.minimum(strip * 0 + TURN * start, last), unit_stride, outer_stride, spec, WARPS
    )
    scale_b, zero_b, unit0_b, unit1_b = 0, 0, 0, 0
    if TURN == 2:
        scale_b, zero_b, unit0_b, unit1_b = load_strips(
            scales, zeros, outer, inner, strip, tl.minimum(strip * 0 + TURN * start + 1, last), unit_stride, outer_stride,
            spec, WARPS,
        )  # fmt: skip
    if spec.scale_at == "tile":
        acc = tl.zeros((WARPS, 8, 4, 2, BLOCK_M // 8, 2), dtype=tl.float32)
    else:
        acc = tl.zeros((16 * WARPS, BLOCK_M), dtype=tl.float32)
    for turn in tl.range(start, stop, num_stages=STAGES):
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
            acc, w0, upper, w1, w2, scale, zero, unit0, unit1, activation, scales, outer, inner, scale_map, table, strip, tile,
            N - 1, across, x.dtype.element_ty, spec, WARPS, BLOCK_M, BY_WARP,
        )  # fmt: skip
        if TURN == 2:
            acc = tile_product(
                acc, w0_b, upper_b, w1_b, w2_b, scale_b, zero_b, unit0_b, unit1_b, activation_b, scales, outer, inner,
                scale_map, table, strip, tile_b, N - 1, across, x.dtype.element_ty, spec, WARPS, BLOCK_M, BY_WARP,
            )  # fmt: skip
            scale_b, zero_b, unit0_b, unit1_b = next_scale_b, next_zero_b, next_unit0_b, next_unit1_b
        scale, zero, unit0, unit1 = next_scale, next_zero, next_unit0, next_unit1
    if spec.scale_at == "tile":
        acc = tl.reshape(rows_of(acc), (16 * WARPS, BLOCK_M))
    return acc


@triton.jit
def skinny_kernel(
    x, y, bias, residual, codes, codes1, codes2, table, scales, zeros, outer, inner, scale_map, partial, counters,
    M, N, K, x_stride, across, tiles, unit_stride, outer_stride,
    spec: tl.constexpr, BLOCK_M: tl.constexpr, WARPS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    BY_WARP: tl.constexpr,
):  # fmt: skip
    """x [M, K], rows x_stride apart, unit column stride, zeros behind K up to a multiple of 128; y, residual [M, N]
    contiguous; bias [N]; bias and residual may be None. partial, counters: see epilogue.finish. Grid: (blocks of 16 * WARPS
    rows of W, blocks of BLOCK_M rows of x, SPLITS)."""
    T: tl.constexpr = 32 * WARPS
    BLOCK_N: tl.constexpr = 16 * WARPS
    TURN: tl.constexpr = 128 // spec.tile_columns
    strip = (tl.program_id(0) * WARPS + tl.arange(0, T) // 32).to(tl.int64)
    strip = tl.minimum(strip, (N - 1) // 16)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    turns = tl.cdiv(K, TURN * spec.tile_columns)
    each = tl.cdiv(turns, SPLITS)
    start = tl.program_id(2) * each
    acc = strips_product(
        x, m, M, x_stride, codes, codes1, codes2, table, scales, zeros, outer, inner, scale_map,
        strip, start, tl.minimum(start + each, turns), N, across, tiles, unit_stride, outer_stride,
        spec, BLOCK_M, WARPS, TURN, STAGES, BY_WARP,
    )  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    finish(
        acc, y, bias, residual, scales, outer, partial, counters, n, m, M, N,
        tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.program_id(2), spec, SPLITS,
    )  # fmt: skip
