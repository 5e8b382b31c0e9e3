"""Grouped products for mixture-of-experts: every row has a weight of its own choice among E, in the fragments layout.

Rows are sorted by expert; where each expert's rows begin is known to the device alone (`offsets`), so that the host never
waits for the router. The grid is therefore an upper bound, and a program finds its work from its slot number. No prefix sum is
needed: expert e's blocks begin at slot offsets[e] // BLOCK_M + e, which leaves room for ceil(count / BLOCK_M) of them, because

    ceil(count / B) <= (offset + count) // B - offset // B + 1

and at most one slot per expert stays empty. Where there are fewer rows than such slots, a slot is a row, and has work if a
block begins there.
"""

import triton
import triton.language as tl

from .decode import multiply_add, narrow, widen
from .dgrad import load_whole_gradient
from .epilogue import scale_rows
from .fragments import beside, by_row, decode_fragments, lanes_of, load_codes, load_strips, rows_of, stacked, tile_scale
from .gemm import block_of
from .skinny import load_whole_columns
from .values import restored


@triton.jit
def find_rows(offsets, slot, total, experts, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr, BY_ROW: tl.constexpr):
    """The work of a slot: (expert, first row, end of the expert's rows); nothing to do where the first is not before the end.

    offsets int32 [experts + 1]; rows from offsets[experts] to `total` belong to no expert and are found as number `experts`.
    EXPERTS is a power of two above `experts`; BY_ROW: slots are rows.
    """
    expert = tl.arange(0, EXPERTS)
    begin = tl.load(offsets + tl.minimum(expert, experts))
    first_slot = begin if BY_ROW else begin // BLOCK_M + expert
    found = tl.sum(((expert <= experts) & (first_slot <= slot)).to(tl.int32), axis=0) - 1
    begin = tl.load(offsets + found)
    end = tl.minimum(tl.load(offsets + found + 1, mask=found < experts, other=total), total)
    if BY_ROW:
        first = tl.where((slot - begin) % BLOCK_M == 0, slot, end)
    else:
        first = begin + (slot - begin // BLOCK_M - found) * BLOCK_M
    return found, first, end


@triton.jit
def of_expert(part, expert, stride):
    """A part of the weights, from the expert's own on."""
    return part + expert.to(tl.int64) * stride


@triton.jit(do_not_specialize=["total", "slots", "M"])
def grouped_kernel(
    x, y, bias, offsets, rows, row_scale, codes, codes1, codes2, table, scales, zeros, outer, inner, scale_map,
    codes_expert, codes1_expert, codes2_expert, scales_expert, zeros_expert, outer_expert, inner_expert,
    total, slots, experts, M, N, K, x_stride, across, tiles, unit_stride, outer_stride,
    spec: tl.constexpr, BLOCK_M: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, EXPERTS: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """y [total, N] = row_scale * (x[rows] W[expert]^T + bias[expert]); rows that belong to no expert become zero.

    x            [M, K], rows x_stride apart, unit column stride, zeros behind K up to a whole tile; rows int32 [total] says
                 which of them each row of y reads (None: its own)
    y, bias      [total, N], contiguous; [experts, N] or None
    offsets      int32 [experts + 1], ascending from 0: row t belongs to e where offsets[e] <= t < offsets[e + 1]
    row_scale    float [total] or None
    *_expert     elements from one expert's part to the next one's
    slots        see above; like all that varies with the batch it leaves the compiled kernel as it is
    Grid: (blocks of 16 * WARPS rows of W times slots,). As in gemm.py decoded weights are the A operand, in registers.
    """
    T: tl.constexpr = 32 * WARPS
    BLOCK_N: tl.constexpr = 16 * WARPS
    TILE_K: tl.constexpr = spec.tile_columns
    dtype: tl.constexpr = x.dtype.element_ty
    block_n, slot = block_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), slots, GROUP)
    expert, first, end = find_rows(offsets, slot, total, experts, BLOCK_M, EXPERTS, BY_ROW)
    if first >= end:
        return
    m = first + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    at = y + m.to(tl.int64)[None, :] * N + n[:, None]
    mask = (n < N)[:, None] & (m < end)[None, :]
    if expert == experts:
        tl.store(at, tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32).to(y.dtype.element_ty), mask=mask)
        return
    source = tl.minimum(m, end - 1)
    if rows is not None:
        source = tl.load(rows + source)
    codes = of_expert(codes, expert, codes_expert)
    if codes1 is not None:
        codes1 = of_expert(codes1, expert, codes1_expert)
    if codes2 is not None:
        codes2 = of_expert(codes2, expert, codes2_expert)
    scales = of_expert(scales, expert, scales_expert)
    if zeros is not None:
        zeros = of_expert(zeros, expert, zeros_expert)
    if outer is not None:
        outer = of_expert(outer, expert, outer_expert)
    if inner is not None:
        inner = of_expert(inner, expert, inner_expert)

    strip = (block_n * WARPS + tl.arange(0, T) // 32).to(tl.int64)
    strip = tl.minimum(strip, (N - 1) // 16)
    scale, zero, unit0, unit1 = load_strips(
        scales, zeros, outer, inner, strip, strip * 0, unit_stride, outer_stride, spec, WARPS
    )
    if spec.scale_at == "tile":
        acc = tl.zeros((WARPS, 8, 4, 2, BLOCK_M // 8, 2), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for tile in tl.range(0, tl.cdiv(K, TILE_K), num_stages=STAGES):
        w0, upper, w1, w2 = load_codes(codes, codes1, codes2, strip, tile, tiles, spec, WARPS)
        next_scale, next_zero, next_unit0, next_unit1 = load_strips(
            scales, zeros, outer, inner, strip, tl.minimum(tile + 1, tiles - 1), unit_stride, outer_stride, spec, WARPS
        )
        activation = load_whole_columns(x, source, M, x_stride, tile * TILE_K, TILE_K)
        leaves = decode_fragments(
            w0, upper, w1, w2, scale, zero, unit0, unit1, scales, outer, inner, scale_map, table, strip, tile, N - 1, across,
            dtype, spec, WARPS,
        )  # fmt: skip
        weight = stacked(leaves, TILE_K, WARPS)
        if spec.scale_at == "tile":
            scale0 = tile_scale(scale, unit0, scales, outer, inner, scale_map, strip, tile, N - 1, across, spec, 0, 0, T)
            scale1 = tile_scale(scale, unit0, scales, outer, inner, scale_map, strip, tile, N - 1, across, spec, 1, 0, T)
            part = lanes_of(multiply_add(weight, activation, tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)), WARPS, BLOCK_M)
            acc = tl.fma(part, tl.broadcast_to(by_row(scale0, scale1, WARPS), part.shape), acc)
        else:
            acc = multiply_add(weight, activation, acc)
        scale, zero, unit0, unit1 = next_scale, next_zero, next_unit0, next_unit1
    if spec.scale_at == "tile":
        acc = tl.reshape(rows_of(acc), (BLOCK_N, BLOCK_M))

    acc = scale_rows(acc, scales, outer, n, N, spec)
    if bias is not None:
        acc += widen(tl.load(of_expert(bias, expert, N) + tl.minimum(n, N - 1)))[:, None]
    if row_scale is not None:
        acc = acc * widen(tl.load(row_scale + tl.minimum(m, end - 1)))[None, :]
    tl.store(at, narrow(acc, y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["total", "slots"])
def grouped_dgrad_kernel(
    dy, dx, offsets, row_scale, codes, codes1, codes2, table, scales, zeros, outer, inner, scale_map,
    codes_expert, codes1_expert, codes2_expert, scales_expert, zeros_expert, outer_expert, inner_expert,
    total, slots, experts, N, K, dy_stride, across, tiles, unit_stride, outer_stride,
    spec: tl.constexpr, BLOCK_M: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
    STAGES: tl.constexpr, GROUP: tl.constexpr, EXPERTS: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """dx [total, K] = row_scale * dy [total, N] W[expert], contiguous; rows that belong to no expert become zero.

    dy has rows dy_stride apart, unit column stride, and zeros behind N up to a whole block of 16 * DOWN rows of W; the rest
    as in `grouped_kernel`, the product as in dgrad.py.
    Grid: (blocks of dx's columns times slots,).
    """
    WARPS: tl.constexpr = DOWN * ACROSS
    T: tl.constexpr = 32 * WARPS
    BLOCK_N: tl.constexpr = 16 * DOWN
    BLOCK_K: tl.constexpr = spec.tile_columns * ACROSS
    dtype: tl.constexpr = dy.dtype.element_ty
    block_k, slot = block_of(tl.program_id(0), tl.cdiv(K, BLOCK_K), slots, GROUP)
    expert, first, end = find_rows(offsets, slot, total, experts, BLOCK_M, EXPERTS, BY_ROW)
    if first >= end:
        return
    m = first + tl.arange(0, BLOCK_M)
    k = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    at = dx + m.to(tl.int64)[:, None] * K + k[None, :]
    mask = (m < end)[:, None] & (k < K)[None, :]
    if expert == experts:
        tl.store(at, tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32).to(dx.dtype.element_ty), mask=mask)
        return
    codes = of_expert(codes, expert, codes_expert)
    if codes1 is not None:
        codes1 = of_expert(codes1, expert, codes1_expert)
    if codes2 is not None:
        codes2 = of_expert(codes2, expert, codes2_expert)
    scales = of_expert(scales, expert, scales_expert)
    if zeros is not None:
        zeros = of_expert(zeros, expert, zeros_expert)
    if outer is not None:
        outer = of_expert(outer, expert, outer_expert)
    if inner is not None:
        inner = of_expert(inner, expert, inner_expert)

    warp = tl.arange(0, T) // 32
    tile = tl.minimum((block_k * ACROSS + warp % ACROSS).to(tl.int64), tiles - 1)
    last_strip = (N - 1) // 16
    strip = tl.minimum((warp // ACROSS).to(tl.int64), last_strip)
    scale, zero, unit0, unit1 = load_strips(scales, zeros, outer, inner, strip, tile, unit_stride, outer_stride, spec, WARPS)
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for step in tl.range(0, tl.cdiv(N, BLOCK_N), num_stages=STAGES):
        # The clamped strip of the last step decodes rows that dY's zeros leave out.
        strip = tl.minimum((step * DOWN + warp // ACROSS).to(tl.int64), last_strip)
        w0, upper, w1, w2 = load_codes(codes, codes1, codes2, strip, tile, tiles, spec, WARPS)
        ahead = tl.minimum(strip + DOWN, last_strip)
        next_scale, next_zero, next_unit0, next_unit1 = load_strips(
            scales, zeros, outer, inner, ahead, tile, unit_stride, outer_stride, spec, WARPS
        )
        gradient = load_whole_gradient(dy, m, end, dy_stride, step * BLOCK_N, BLOCK_N)
        leaves = decode_fragments(
            w0, upper, w1, w2, scale, zero, unit0, unit1, scales, outer, inner, scale_map, table, strip, tile, N - 1, across,
            dtype, spec, WARPS,
        )  # fmt: skip
        acc = multiply_add(gradient, beside(leaves, spec.tile_columns, DOWN, ACROSS), acc)
        scale, zero, unit0, unit1 = next_scale, next_zero, next_unit0, next_unit1
    acc = restored(acc, outer, spec)
    if row_scale is not None:
        acc = acc * widen(tl.load(row_scale + tl.minimum(m, end - 1)))[:, None]
    tl.store(at, narrow(acc, dx.dtype.element_ty), mask=mask)
