"""Scaled product: y [M, N] = decoded(A) decoded(W)^T + bias + residual, both operands quantized, rows of K packed codes.

MATH says in what the tensor cores multiply:

    "fp8"      codes as they are, two FP8 operands        "int8"    codes as they are, exact int32 sums
    "scaled"   codes and block scales as they are, by the block-scaled instructions of sm_100 and later
    "decode"   codes times block scales, decoded in registers to COMPUTE. That product is exact in 16 bits (a significand of at
               most 6 bits for NVFP4, 4 for MX and FP8; MX needs bf16's exponents), so the sum is one of the same numbers

Scales per row, channel and tensor multiply the fp32 sum at the end; scales that change along K (1x128, 128x128) multiply the
sum of each step. Sums are fp32: on Hopper, whose FP8 instruction keeps fewer bits, each step of K is added up apart.

The transpose is computed, y^T = W A^T, as in `linear`: rows of W fill the wide side of the instruction where M is small. Tiles
run in groups that share operands in L2. Each program owns its outputs over the whole of K: no atomics, one fixed order.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from .decode import minifloat, multiply_add, narrow, power_of_two, widen

GROUP_N = tl.constexpr(8)


@dataclass(frozen=True)
class OperandSpec:
    """What the kernel must know at compile time about an operand; 0 stands for "the whole dimension".

    element      "e2m1" | "e4m3" | "e5m2" | "int8"
    scale        "float" (fp16, bf16, fp32) | "e8m0" | "e4m3_global"
    block_rows, block_cols    the numbers that share a scale
    offset       what the stored integer exceeds its number by (int8: 128 in the rows layout, 0 in two's complement)
    """

    element: str
    scale: str
    block_rows: int
    block_cols: int
    offset: int = 0


@triton.jit
def _load(rows, first, end, COUNT: tl.constexpr, EVEN: tl.constexpr):
    """Elements first .. first + COUNT of rows (pointers [ROWS]); those from `end` on are 0."""
    at = first + tl.arange(0, COUNT)
    if EVEN:
        return tl.load(rows[:, None] + at[None, :])
    else:
        return tl.load(rows[:, None] + at[None, :], mask=(at < end)[None, :], other=0.0)


@triton.jit
def _codes(rows, k, columns, spec: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr):
    """The stored codes of columns k .. k + COLS, as stored: E2M1 two a byte."""
    if spec.element == "e2m1":
        return _load(rows, k // 2, columns // 2, COLS // 2, EVEN)
    elif spec.offset == 128:
        # A flipped high bit takes 128 off in two's complement.
        return (_load(rows, k, columns, COLS, EVEN) ^ 0x80).to(tl.int8, bitcast=True)
    else:
        return _load(rows, k, columns, COLS, EVEN)


@triton.jit
def _e4m3_of_e2m1(packed, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The E4M3 codes of the same numbers as E2M1 codes, two a byte: float8e4nv [ROWS, COLS]."""
    code = tl.reshape(tl.join(packed & 0xF, packed >> 4), (ROWS, COLS))
    magnitude = code & 7
    # Both exponents move by their biases' difference; 0 and 0.5 are subnormal in E2M1, and 0.5 is not in E4M3.
    wide = tl.where(magnitude >= 2, (magnitude << 2) + 0x30, magnitude * 0x30)
    return (wide | (code & 8) << 4).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _block_scales(rows, k, columns, spec: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr):
    """The stored scales of the blocks of columns k .. k + COLS; rows: pointers [ROWS] to the first scale of each row."""
    return _load(rows, k // spec.block_cols, columns // spec.block_cols, COLS // spec.block_cols, EVEN)


@triton.jit
def _decoded(
    rows,
    scale_rows,
    k,
    columns,
    spec: tl.constexpr,
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Code times block scale, exactly, in `dtype`: [ROWS, COLS]. Float scales are left to the caller."""
    codes = _codes(rows, k, columns, spec, COLS, EVEN)
    if spec.element == "e2m1":
        codes = tl.reshape(tl.join(codes & 0xF, codes >> 4), (ROWS, COLS))
        value = minifloat(codes, 2, 1)
    elif spec.element == "e4m3":
        value = minifloat(codes, 4, 3)
    else:
        value = minifloat(codes, 5, 2)
    if spec.scale != "float":
        stored = _block_scales(scale_rows, k, columns, spec, COLS, EVEN)
        scale = power_of_two(stored) if spec.scale == "e8m0" else minifloat(stored, 4, 3)
        value = tl.reshape(value, (ROWS, COLS // spec.block_cols, spec.block_cols)) * scale[:, :, None]
        value = tl.reshape(value, (ROWS, COLS))
    return narrow(value, dtype)


@triton.jit
def _float_scales(scales, row, k, across, spec: tl.constexpr):
    """The fp32 scale of each row (int64 [ROWS]) at column k, a whole step of K under one."""
    if spec.block_rows == 0:
        row = row * 0
    elif spec.block_rows > 1:
        row = row // spec.block_rows
    column = 0 if spec.block_cols == 0 else k // spec.block_cols
    return widen(tl.load(scales + row * across + column))


@triton.jit
def scaled_gemm_kernel(
    a,
    a_scales,
    a_global,
    w,
    w_scales,
    w_global,
    bias,
    residual,
    y,
    M,
    N,
    columns,
    a_stride,
    w_stride,
    a_across,
    w_across,
    a_spec: tl.constexpr,
    w_spec: tl.constexpr,
    MATH: tl.constexpr,
    COMPUTE: tl.constexpr,
    EXPAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """a, w: codes, rows `a_stride` and `w_stride` elements apart, `columns` codes that both have (the rest is padding).

    a_scales, w_scales    [rows, across], plain; for "scaled" NVFP4 of dtype E4M3, otherwise E8M0 and E4M3 are uint8
    a_global, w_global    fp32 multipliers or None        bias [N] or None       residual [M, N], contiguous, or None
    EXPAND                "scaled" of 4 bits times 8: rewrite E2M1 as E4M3, for chips whose instruction doesn't mix them
    y                     [M, N], contiguous; the grid is (ceil(M / BLOCK_M) * ceil(N / BLOCK_N),)
    """
    across_m = tl.cdiv(M, BLOCK_M)
    across_n = tl.cdiv(N, BLOCK_N)
    # GROUP_N rows of tiles of W run down M together: their codes stay in L2 while a's are read.
    group = tl.program_id(0) // (GROUP_N * across_m)
    within = tl.program_id(0) % (GROUP_N * across_m)
    height = tl.minimum(across_n - group * GROUP_N, GROUP_N)
    n = (group * GROUP_N + within % height) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = within // height * BLOCK_M + tl.arange(0, BLOCK_M)
    w_row = tl.minimum(n, N - 1).to(tl.int64)
    a_row = tl.minimum(m, M - 1).to(tl.int64)
    w_rows = w + w_row * w_stride
    a_rows = a + a_row * a_stride
    w_scale_rows = w_scales + w_row * w_across
    a_scale_rows = a_scales + a_row * a_across
    FLOAT: tl.constexpr = a_spec.scale == "float"
    STEPPED: tl.constexpr = FLOAT and (a_spec.block_cols + w_spec.block_cols > 0)

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if MATH == "int8" else tl.float32)
    for k in range(0, columns, BLOCK_K):
        if MATH == "decode":
            w_tile = _decoded(w_rows, w_scale_rows, k, columns, w_spec, COMPUTE, BLOCK_N, BLOCK_K, EVEN_K)
            a_tile = _decoded(a_rows, a_scale_rows, k, columns, a_spec, COMPUTE, BLOCK_M, BLOCK_K, EVEN_K)
        else:
            w_tile = _codes(w_rows, k, columns, w_spec, BLOCK_K, EVEN_K)
            a_tile = _codes(a_rows, k, columns, a_spec, BLOCK_K, EVEN_K)
            if EXPAND and w_spec.element == "e2m1":
                w_tile = _e4m3_of_e2m1(w_tile, BLOCK_N, BLOCK_K)
            if EXPAND and a_spec.element == "e2m1":
                a_tile = _e4m3_of_e2m1(a_tile, BLOCK_M, BLOCK_K)
        a_tile = tl.trans(a_tile)
        if MATH == "scaled":
            w_scale = _block_scales(w_scale_rows, k, columns, w_spec, BLOCK_K, EVEN_K)
            a_scale = _block_scales(a_scale_rows, k, columns, a_spec, BLOCK_K, EVEN_K)
            W_ELEMENT: tl.constexpr = "e4m3" if EXPAND and w_spec.element == "e2m1" else w_spec.element
            A_ELEMENT: tl.constexpr = "e4m3" if EXPAND and a_spec.element == "e2m1" else a_spec.element
            acc = tl.dot_scaled(w_tile, w_scale, W_ELEMENT, a_tile, a_scale, A_ELEMENT, acc)
        elif STEPPED:
            zero = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            part = multiply_add(w_tile, a_tile, zero) if MATH == "decode" else tl.dot(w_tile, a_tile, zero)
            w_scale = _float_scales(w_scales, w_row, k, w_across, w_spec)
            a_scale = _float_scales(a_scales, a_row, k, a_across, a_spec)
            acc += part * w_scale[:, None] * a_scale[None, :]
        elif MATH == "decode":
            acc = multiply_add(w_tile, a_tile, acc)
        elif MATH == "fp8":
            acc = tl.dot(w_tile, a_tile, acc, max_num_imprecise_acc=BLOCK_K)
        else:
            acc = tl.dot(w_tile, a_tile, acc, out_dtype=tl.int32)

    total = acc.to(tl.float32)
    if FLOAT:
        if not STEPPED:
            w_scale = _float_scales(w_scales, w_row, 0, w_across, w_spec)
            a_scale = _float_scales(a_scales, a_row, 0, a_across, a_spec)
            total = total * w_scale[:, None] * a_scale[None, :]
    else:
        # MX has none; NVFP4's two are multiplied first.
        if w_global is not None:
            factor = tl.load(w_global)
            if a_global is not None:
                factor *= tl.load(a_global)
            total *= factor
        elif a_global is not None:
            total *= tl.load(a_global)
    total = tl.trans(total)
    if bias is not None:
        total += widen(tl.load(bias + w_row))[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    if residual is not None:
        total += widen(tl.load(residual + at, mask=mask, other=0.0))
    tl.store(y + at, narrow(total, y.dtype.element_ty), mask=mask)
