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

from .decode import narrow, widen
from .dgrad import columns_product
from .epilogue import scale_rows
from .gemm import block_of
from .skinny import strips_product


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
    """A part of the weights, from the expert's own on; 0, which nothing reads, where the format has no such part."""
    if part is None:
        return 0
    else:
        return part + expert.to(tl.int64) * stride


@triton.jit(do_not_specialize=["total", "slots", "M"])
def grouped_kernel(
    x, y, bias, offsets, rows, row_scale, codes, codes1, codes2, table, scales, zeros, outer, inner, scale_map,
    codes_expert, codes1_expert, codes2_expert, scales_expert, zeros_expert, outer_expert, inner_expert,
    total, slots, experts, M, N, K, x_stride, across, tiles, unit_stride, outer_stride,
    spec: tl.constexpr, BLOCK_M: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
    GROUP: tl.constexpr, EXPERTS: tl.constexpr, BY_ROW: tl.constexpr, BY_WARP: tl.constexpr,
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
    codes1, codes2 = of_expert(codes1, expert, codes1_expert), of_expert(codes2, expert, codes2_expert)
    scales, zeros = of_expert(scales, expert, scales_expert), of_expert(zeros, expert, zeros_expert)
    outer, inner = of_expert(outer, expert, outer_expert), of_expert(inner, expert, inner_expert)

    strip = (block_n * WARPS + tl.arange(0, T) // 32).to(tl.int64)
    strip = tl.minimum(strip, (N - 1) // 16)
    acc = strips_product(
        x, source, M, x_stride, codes, codes1, codes2, table, scales, zeros, outer, inner, scale_map,
        strip, 0, tl.cdiv(K, spec.tile_columns), N, across, tiles, unit_stride, outer_stride,
        spec, BLOCK_M, WARPS, 1, STAGES, BY_WARP,
    )  # fmt: skip
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
    BLOCK_K: tl.constexpr = spec.tile_columns * ACROSS
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
    codes1, codes2 = of_expert(codes1, expert, codes1_expert), of_expert(codes2, expert, codes2_expert)
    scales, zeros = of_expert(scales, expert, scales_expert), of_expert(zeros, expert, zeros_expert)
    outer, inner = of_expert(outer, expert, outer_expert), of_expert(inner, expert, inner_expert)

    acc = columns_product(
        dy, m, end, dy_stride, codes, codes1, codes2, table, scales, zeros, outer, inner, scale_map,
        block_k, N, across, tiles, unit_stride, outer_stride, spec, BLOCK_M, DOWN, ACROSS, STAGES,
    )  # fmt: skip
    if row_scale is not None:
        acc = acc * widen(tl.load(row_scale + tl.minimum(m, end - 1)))[:, None]
    tl.store(at, narrow(acc, dx.dtype.element_ty), mask=mask)
