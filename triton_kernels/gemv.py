"""GEMV: y [M, N] = x [M, K] W^T for up to 8 rows of x, W in the fragments layout.

At these M nothing counts but the bytes of W, so the main loop has no shared memory and no barrier: every warp streams tiles of
its own, 16 rows by 64 columns in one 16-byte load per lane, and multiplies them by the narrowest tensor-core instruction (the
transpose is computed: 16 rows of W, 8 rows of x). Both operands come into the registers where the instruction wants them: a
lane's weights by the layout, its activations because it loads just those pairs of x that it needs, which the first-level cache
serves. The next tile's words are under way while one is decoded.

The warps of a program share 16 rows of W and split K; they meet once, at the end. Where N gives too few programs for the chip,
K is split between programs too (epilogue.py).
"""

import triton
import triton.language as tl

from .decode import multiply_add
from .epilogue import finish
from .fragments import by_row, decode_fragments, lanes_of, load_codes, load_strips, rows_of, tile_scale, tiles_of
from .pairs import as_operand, high_half, low_half

ROWS = tl.constexpr(8)
"""Rows of x that one program multiplies: the narrow side of mma m16n8k16."""


@triton.jit
def _load_halves(pairs, column, last, dtype: tl.constexpr, MASKED: tl.constexpr):
    """One pair of activations per lane: its low and its high half, [T] each; 0 from column `last` on."""
    if MASKED:
        pair = tl.load(pairs, mask=column < last, other=0)
    else:
        pair = tl.load(pairs)
    return low_half(pair, dtype), high_half(pair, dtype)


@triton.jit
def _load_half_tile(pairs, column, last, dtype: tl.constexpr, MASKED: tl.constexpr):
    """The pairs of four steps, 8 columns apart: [T, 2 (g), 2 (step low), 2 (step high), 2 (b)]."""
    a0, b0 = _load_halves(pairs, column, last, dtype, MASKED)
    a1, b1 = _load_halves(pairs + 4, column + 8, last, dtype, MASKED)
    a2, b2 = _load_halves(pairs + 8, column + 16, last, dtype, MASKED)
    a3, b3 = _load_halves(pairs + 12, column + 24, last, dtype, MASKED)
    a4, b4 = _load_halves(pairs + 16, column + 32, last, dtype, MASKED)
    a5, b5 = _load_halves(pairs + 20, column + 40, last, dtype, MASKED)
    a6, b6 = _load_halves(pairs + 24, column + 48, last, dtype, MASKED)
    a7, b7 = _load_halves(pairs + 28, column + 56, last, dtype, MASKED)
    low = tl.join(tl.join(tl.join(a0, a1), tl.join(a2, a3)), tl.join(tl.join(a4, a5), tl.join(a6, a7)))
    high = tl.join(tl.join(tl.join(b0, b1), tl.join(b2, b3)), tl.join(tl.join(b4, b5), tl.join(b6, b7)))
    return tl.join(low, high)


@triton.jit
def load_activations(x, m, first, last, x_stride, COLUMNS: tl.constexpr, WARPS: tl.constexpr, MASKED: tl.constexpr):
    """x^T of one tile per warp, straight into the order of the B operand of mma m16n8k16: [WARPS, COLUMNS, 8].

    m: int [T], the row that each lane (its r) loads; first: the tile's first column [T]; columns from `last` on are 0.
    x's rows are an even number of elements apart and start on 4 bytes.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    column = first + (tl.arange(0, 32 * WARPS) % 4) * 2
    pairs = x.to(tl.pointer_type(tl.int32), bitcast=True) + (m.to(tl.int64) * x_stride + column) // 2
    leaves = _load_half_tile(pairs, column, last, dtype, MASKED)
    if COLUMNS == 64:
        lanes = tl.reshape(leaves, (WARPS, 8, 4, 2, 2, 2, 2))  # warp, r, q, g, step low, step high, b
        return as_operand(tl.reshape(tl.permute(lanes, (0, 5, 4, 3, 2, 6, 1)), (WARPS, 64, 8)))
    else:
        leaves = tl.join(leaves, _load_half_tile(pairs + 32, column + 64, last, dtype, MASKED))
        lanes = tl.reshape(leaves, (WARPS, 8, 4, 2, 2, 2, 2, 2))  # warp, r, q, g, step low, step middle, b, step high
        return as_operand(tl.reshape(tl.permute(lanes, (0, 7, 5, 4, 3, 2, 6, 1)), (WARPS, 128, 8)))


@triton.jit
def gemv_kernel(
    x, y, bias, residual, codes, codes1, codes2, table, scales, zeros, outer, inner, scale_map, partial, counters,
    M, N, K, x_stride, across, tiles, unit_stride, outer_stride,
    spec: tl.constexpr, WARPS: tl.constexpr, SPLITS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """x [M, K], 16 bits, rows x_stride apart, unit column stride; y, residual [M, N] contiguous; bias [N]; bias and residual
    may be None. partial, counters: see epilogue.finish. EVEN_K: the tiles of K are whole, and WARPS * SPLITS divides their
    number. Grid: (strips of 16 rows of W, SPLITS)."""
    T: tl.constexpr = 32 * WARPS
    TILE_K: tl.constexpr = spec.tile_columns
    dtype: tl.constexpr = x.dtype.element_ty
    lane = tl.arange(0, T)
    warp = (lane // 32).to(tl.int64)
    strip = warp * 0 + tl.program_id(0)
    m = tl.minimum((lane % 32) // 4, M - 1)
    turns = tl.cdiv(tl.cdiv(K, TILE_K), WARPS * SPLITS)
    start = tl.program_id(1) * turns * WARPS
    tile = start + warp
    here = tl.minimum(tile, tiles - 1)
    w0, upper, w1, w2 = load_codes(codes, codes1, codes2, strip, here, tiles, spec, WARPS)
    scale, zero, unit0, unit1 = load_strips(scales, zeros, outer, inner, strip, here, unit_stride, outer_stride, spec, WARPS)
    if spec.scale_at == "tile":
        acc = tl.zeros((WARPS, 8, 4, 2, 1, 2), dtype=tl.float32)
    else:
        acc = tl.zeros((WARPS, 16, ROWS), dtype=tl.float32)
    for _ in range(turns):
        activation = load_activations(x, m, tile * TILE_K, K, x_stride, TILE_K, WARPS, not EVEN_K)
        ahead = tl.minimum(tile + WARPS, tiles - 1)
        next0, next_upper, next1, next2 = load_codes(codes, codes1, codes2, strip, ahead, tiles, spec, WARPS)
        next_scale, next_zero, next_unit0, next_unit1 = load_strips(
            scales, zeros, outer, inner, strip, ahead, unit_stride, outer_stride, spec, WARPS
        )
        leaves = decode_fragments(
            w0, upper, w1, w2, scale, zero, unit0, unit1, scales, outer, inner, scale_map, table, strip, here, N - 1, across,
            dtype, spec, WARPS,
        )  # fmt: skip
        weight = as_operand(tiles_of(leaves, TILE_K, WARPS))
        if spec.scale_at == "tile":
            scale0 = tile_scale(scale, unit0, scales, outer, inner, scale_map, strip, here, N - 1, across, spec, 0, 0, T)
            scale1 = tile_scale(scale, unit0, scales, outer, inner, scale_map, strip, here, N - 1, across, spec, 1, 0, T)
            part = multiply_add(weight, activation, tl.zeros((WARPS, 16, ROWS), dtype=tl.float32))
            part = lanes_of(part, WARPS, ROWS)
            acc = tl.fma(part, tl.broadcast_to(by_row(scale0, scale1, WARPS), part.shape), acc)
        else:
            acc = multiply_add(weight, activation, acc)
        w0, upper, w1, w2 = next0, next_upper, next1, next2
        scale, zero, unit0, unit1 = next_scale, next_zero, next_unit0, next_unit1
        tile += WARPS
        here = ahead
    if spec.scale_at == "tile":
        acc = tl.reshape(rows_of(acc), (WARPS, 16, ROWS))
    total = tl.sum(acc, axis=0)
    n = tl.program_id(0) * 16 + tl.arange(0, 16)
    finish(
        total, y, bias, residual, scales, outer, partial, counters, n, tl.arange(0, ROWS), M, N,
        tl.program_id(0), tl.program_id(1), spec, SPLITS,
    )  # fmt: skip
