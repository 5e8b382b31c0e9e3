"""Kernels of the `rows` layout: every format, any block; the ones that are taken where a format doesn't fit the fragments
layout.

linear       y [M, N] = x [M, K] W^T + bias on tensor cores. The transpose is computed, y^T = W x^T: the weight's rows stand on
the wide
             side of the instruction, so few rows of x waste little of it. Each program owns its outputs over the whole of K: no
             atomics, one fixed order.
dequantize   the packed weight -> W [N, K] in the output's dtype, decoded in fp32 and rounded once.
"""

import triton
import triton.language as tl

from .decode import decode_tile, multiply_add, narrow, widen


@triton.jit
def rows_linear_kernel(
    x,
    y,
    bias,
    codes,
    table,
    scales,
    zeros,
    outer,
    inner,
    scale_map,
    M,
    N,
    K,
    x_stride,
    columns,
    codes_stride,
    spec: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """x [M, K] with rows `x_stride` apart and unit column stride; y [M, N] contiguous; bias [N] or None; the grid is
    (ceil(M/BLOCK_M), ceil(N/BLOCK_N)): programs that share rows of W run side by side and read them from L2."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    x_rows = x + tl.minimum(m, M - 1).to(tl.int64) * x_stride
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        weight = decode_tile(
            codes, table, scales, zeros, outer, inner, scale_map, row, first, columns, codes_stride,
            spec, BLOCK_N, BLOCK_K, EVEN_K,
        )  # fmt: skip
        k = first + tl.arange(0, BLOCK_K)
        if EVEN_K:
            activation = tl.load(x_rows[None, :] + k[:, None])
        else:
            activation = tl.load(x_rows[None, :] + k[:, None], mask=(k < K)[:, None], other=0.0)
        acc = multiply_add(narrow(weight, x.dtype.element_ty), activation, acc)
    total = tl.trans(acc)
    if bias is not None:
        total += widen(tl.load(bias + row))[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], narrow(total, y.dtype.element_ty), mask=mask)


@triton.jit
def rows_dequantize_kernel(
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
