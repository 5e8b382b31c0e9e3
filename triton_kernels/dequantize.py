"""Dequantize: the packed weight -> W [N, K] in the output's dtype, decoded in fp32 and rounded once."""

import triton
import triton.language as tl

from .decode import decode_tile, narrow


@triton.jit
def dequantize_kernel(
    out,
    codes,
    table,
    scales,
    zeros,
    outer,
    inner,
    scale_map,
    N,
    K,
    columns,
    codes_stride,
    spec: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """out [N, K], contiguous. One program writes BLOCK_N x BLOCK_K weights; the grid is (ceil(K/BLOCK_K), ceil(N/BLOCK_N))."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(0) * BLOCK_K
    weight = decode_tile(
        codes, table, scales, zeros, outer, inner, scale_map, tl.minimum(n, N - 1), first, columns, codes_stride,
        spec, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    k = first + tl.arange(0, BLOCK_K)
    mask = (n < N)[:, None] & (k < K)[None, :]
    tl.store(out + n.to(tl.int64)[:, None] * K + k[None, :], narrow(weight, out.dtype.element_ty), mask=mask)
