"""GEMV: y [M, N] = x [M, K] W^T + bias for a few rows of x, without tensor cores.

Each program owns BLOCK_N rows of W over the whole of K, so no sum is split between programs and results are deterministic.
Products are accumulated in fp32, lane by lane, and summed across lanes once at the end: one shuffle tree per output.
"""

import triton
import triton.language as tl

from .decode import decode_tile, narrow, widen


@triton.jit
def gemv_kernel(
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
    (ceil(N/BLOCK_N), ceil(M/BLOCK_M))."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(n, N - 1)
    x_rows = x + tl.minimum(m, M - 1).to(tl.int64) * x_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        weight = decode_tile(
            codes, table, scales, zeros, outer, inner, scale_map, row, first, columns, codes_stride,
            spec, BLOCK_N, BLOCK_K, EVEN_K,
        )  # fmt: skip
        weight = widen(narrow(weight, x.dtype.element_ty))
        k = first + tl.arange(0, BLOCK_K)
        if EVEN_K:
            activation = widen(tl.load(x_rows[:, None] + k[None, :]))
        else:
            activation = widen(tl.load(x_rows[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0))
        weight = tl.broadcast_to(weight[None, :, :], (BLOCK_M, BLOCK_N, BLOCK_K))
        activation = tl.broadcast_to(activation[:, None, :], (BLOCK_M, BLOCK_N, BLOCK_K))
        acc = tl.fma(weight, activation, acc)
    total = tl.sum(acc, axis=2)
    if bias is not None:
        total += widen(tl.load(bias + row))[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], narrow(total, y.dtype.element_ty), mask=mask)
