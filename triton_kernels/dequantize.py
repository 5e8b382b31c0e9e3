"""Dequantize: W [N, K] in the output's dtype from the fragments layout, decoded by the law in fp32 and rounded once."""

import triton
import triton.language as tl

from .fragments import decode_fragments, load_codes, load_strips, stacked


@triton.jit
def dequantize_kernel(
    out, codes, codes1, codes2, table, scales, zeros, outer, inner, scale_map,
    N, K, across, tiles, unit_stride, outer_stride, spec: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """out [N, K], contiguous. One program writes 16 * WARPS rows of one tile; the grid is (tiles along K, blocks of rows)."""
    T: tl.constexpr = 32 * WARPS
    tile = tl.program_id(0)
    strip = (tl.program_id(1) * WARPS + tl.arange(0, T) // 32).to(tl.int64)
    strip = tl.minimum(strip, (N - 1) // 16)
    w0, upper, w1, w2 = load_codes(codes, codes1, codes2, strip, tile, tiles, spec, WARPS)
    scale, zero, unit0, unit1 = load_strips(scales, zeros, outer, inner, strip, tile, unit_stride, outer_stride, spec, WARPS)
    leaves = decode_fragments(
        w0, upper, w1, w2, scale, zero, unit0, unit1, scales, outer, inner, scale_map, table, strip, tile, N - 1, across,
        out.dtype.element_ty, spec, WARPS,
    )  # fmt: skip
    n = tl.program_id(1) * 16 * WARPS + tl.arange(0, 16 * WARPS)
    k = tile * spec.tile_columns + tl.arange(0, spec.tile_columns)
    mask = (n < N)[:, None] & (k < K)[None, :]
    tl.store(out + n.to(tl.int64)[:, None] * K + k[None, :], stacked(leaves, spec.tile_columns, WARPS), mask=mask)
