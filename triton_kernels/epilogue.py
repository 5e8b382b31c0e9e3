"""What happens to accumulators: the sum over splits of K, scales that were left out of the weights, bias, residual, rounding,
storing.

Splits of K meet in a workspace of fp32. The program that arrives last adds them up in ascending order, so that the result
depends neither on who that was nor on the run; there is no second kernel and no atomic addition of floats.
"""

import triton
import triton.language as tl

from .decode import narrow, widen
from .values import restored


@triton.jit
def scale_rows(acc, scales, outer, n, N, spec: tl.constexpr):
    """acc fp32 [R, C] of the rows `n` of W, times what decoding left out: scales of whole rows, or NVFP4's multiplier."""
    if spec.scale_at == "end":
        row = tl.minimum(n, N - 1)
        if spec.scale_home == "row":
            acc = acc * widen(tl.load(scales + row))[:, None]
        elif spec.scale_home == "tensor":
            acc = acc * widen(tl.load(scales))
        else:
            acc = acc * widen(tl.load(scales + row // spec.block_rows))[:, None]
    return restored(acc, outer, spec)


@triton.jit
def _store(acc, y, bias, residual, n, m, M, N):
    mask = (n < N)[:, None] & (m < M)[None, :]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    if bias is not None:
        acc += widen(tl.load(bias + tl.minimum(n, N - 1)))[:, None]
    if residual is not None:
        acc += widen(tl.load(residual + at, mask=mask, other=0.0))
    tl.store(y + at, narrow(acc, y.dtype.element_ty), mask=mask)


@triton.jit
def finish(
    acc, y, bias, residual, scales, outer, partial, counters, n, m, M, N, block, split, spec: tl.constexpr, SPLITS: tl.constexpr
):
    """acc fp32 [rows of W, rows of x] -> y [M, N], bias [N] and residual [M, N] added where they are given.

    n, m         the rows of W and of x that acc stands for
    partial      fp32 [SPLITS, M, N]      counters: int32, one per block of y, zero before and after
    block, split the block's number and this program's share of K
    """
    if SPLITS == 1:
        _store(scale_rows(acc, scales, outer, n, N, spec), y, bias, residual, n, m, M, N)
    else:
        mask = (n < N)[:, None] & (m < M)[None, :]
        at = m.to(tl.int64)[None, :] * N + n[:, None]
        tl.store(partial + split.to(tl.int64) * M * N + at, acc, mask=mask)
        # Every thread's part must be written before this program counts as arrived.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + block, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            tl.store(counters + block, 0)
            total = tl.zeros_like(acc)
            share = partial + at
            for _ in range(SPLITS):
                total += tl.load(share, mask=mask, other=0.0, cache_modifier=".cg")
                share += M * N
            _store(scale_rows(total, scales, outer, n, N, spec), y, bias, residual, n, m, M, N)
