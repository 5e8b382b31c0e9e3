"""Quantizing activations in one pass: x [M, K], rounded to a format's codes and scales, bit for bit as the format's law says.

`quantize_rows_kernel`    one scale per row or tensor (FP8 and INT8): a row stays in registers where it fits
`quantize_blocks_kernel`  one scale per run of a row (FP8 1x128, NVFP4, MXFP8, MXFP4), scales plain or in the 128x4 order
`absmax_kernel`           the largest magnitude of the whole tensor in parts, for what is one per tensor

Magnitudes are compared as integers: a positive float's bits count upward with its value, and NaN lies above infinity, so the
largest is found without rounding, in any order, and a NaN is never lost. A row or block that holds a NaN or an infinity gets
the scale NaN and codes of zero: whatever is multiplied with it becomes NaN.

Codes are made by integer arithmetic. sm_80 has no conversion to E4M3 and only sm_100 and later one to E2M1; CAST takes the
instruction where there is one, which rounds alike.
"""

import triton
import triton.language as tl
from triton._C import libtriton

from .decode import minifloat, narrow, power_of_two, widen

EXACT_FMA = tl.constexpr(not triton.knobs.runtime.interpret or hasattr(libtriton.interpreter, "fma_fp32"))
"""Whether tl.fma rounds once: the interpreter of older versions rounds its product too."""

INFINITY_BITS = tl.constexpr(0x7F800000)
SMALLEST_E4M3 = tl.constexpr(2.0**-9)


@triton.jit
def magnitude_bits(x):
    """x, any float dtype -> the bits of |x| in fp32 as int32, which order as the magnitudes do."""
    return widen(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def nearest_code(value, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """fp32, no NaN -> the code (uint32) of the nearest small float: ties to the even code, saturating.

    The sign of zero is kept in 8 bits; in E2M1 only a number below zero has the sign bit, as in the format's law.
    """
    BIAS: tl.constexpr = 2 ** (EXPONENT_BITS - 1) - 1
    DROPPED: tl.constexpr = 23 - MANTISSA_BITS
    # The highest code: E4M3 gives up one to NaN, E5M2 the whole top exponent to infinity and NaN.
    if EXPONENT_BITS == 4 and MANTISSA_BITS == 3:
        LARGEST: tl.constexpr = 448.0
    elif EXPONENT_BITS == 5 and MANTISSA_BITS == 2:
        LARGEST: tl.constexpr = 57344.0
    else:
        LARGEST: tl.constexpr = (2.0 - 2.0**-MANTISSA_BITS) * 2.0 ** (2**EXPONENT_BITS - 1 - BIAS)
    magnitude = tl.minimum(tl.abs(value), LARGEST)
    bits = magnitude.to(tl.uint32, bitcast=True)
    even = bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)
    normal = (even >> DROPPED) - ((127 - BIAS) << MANTISSA_BITS)
    # Added to a number whose last bit weighs one step of the subnormals, the sum is rounded to a step, ties to even.
    STEP: tl.constexpr = 2.0 ** (1 - BIAS - MANTISSA_BITS + 23)
    STEP_BITS: tl.constexpr = (127 + 1 - BIAS - MANTISSA_BITS + 23) << 23
    subnormal = (magnitude + STEP).to(tl.uint32, bitcast=True) - STEP_BITS
    code = tl.where(magnitude < 2.0 ** (1 - BIAS), subnormal, normal)
    if EXPONENT_BITS + MANTISSA_BITS < 7:
        negative = (value < 0).to(tl.uint32)
    else:
        negative = value.to(tl.uint32, bitcast=True) >> 31
    return code | (negative << (EXPONENT_BITS + MANTISSA_BITS))


@triton.jit
def _e2m1_pairs(low, high):
    """Two fp32 numbers -> the byte of their E2M1 codes, by the instruction of sm_100 and later."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b8 byte0, byte1, byte2, byte3;
        cvt.rn.satfinite.e2m1x2.f32 byte0, $5, $1;
        cvt.rn.satfinite.e2m1x2.f32 byte1, $6, $2;
        cvt.rn.satfinite.e2m1x2.f32 byte2, $7, $3;
        cvt.rn.satfinite.e2m1x2.f32 byte3, $8, $4;
        mov.b32 $0, {byte0, byte1, byte2, byte3};
        }
        """,
        "=r,f,f,f,f,f,f,f,f",
        [low, high],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def byte_codes(value, ELEMENT: tl.constexpr, CAST: tl.constexpr):
    """fp32, already divided by the scale -> one code a byte (uint8). "int8" is two's complement: the format's code less 128."""
    if ELEMENT == "int8":
        # 1.5 * 2^23 has a last bit of one: the sum's low byte is the nearest integer, ties to even.
        bounded = tl.minimum(tl.maximum(value, -128.0), 127.0)
        return ((bounded + 12582912.0).to(tl.uint32, bitcast=True) & 0xFF).to(tl.uint8)
    elif ELEMENT == "e5m2":
        return nearest_code(value, 5, 2).to(tl.uint8)
    elif CAST:
        return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        return nearest_code(value, 4, 3).to(tl.uint8)


@triton.jit
def pair_codes(low, high, CAST: tl.constexpr):
    """Two fp32 tensors, already divided by the scale -> the bytes of their E2M1 codes, `low` in the low nibble."""
    if CAST:
        # Adding zero makes -0 to +0, which the law gives no sign.
        return _e2m1_pairs(low + 0.0, high + 0.0)
    else:
        return (nearest_code(low, 2, 1) | (nearest_code(high, 2, 1) << 4)).to(tl.uint8)


@triton.jit
def _float_scale(peak_bits, DIVISOR: tl.constexpr, dtype: tl.constexpr):
    """The scale of a magnitude's bits, peak / DIVISOR rounded toward zero to `dtype` as FloatScale stores it; NaN where the
    peak is no finite number or the scale doesn't fit."""
    exact = tl.div_rn(peak_bits.to(tl.float32, bitcast=True), DIVISOR)
    if dtype == tl.float32:
        scale = exact
    else:
        nearest = narrow(exact, dtype)
        bits = nearest.to(tl.uint16, bitcast=True)
        # The smallest stays: rounding it down would leave nothing.
        above = (widen(nearest) > exact) & (bits > 1)
        scale = widen((bits - above.to(tl.uint16)).to(dtype, bitcast=True))
        # What FloatScale refuses, because it exceeds the largest fp16.
        if dtype == tl.float16:
            scale = tl.where(exact > 65504.0, float("nan"), scale)
    return tl.where(peak_bits < INFINITY_BITS, scale, float("nan"))


@triton.jit
def _largest_part(peaks, PEAKS: tl.constexpr, BLOCK_PEAKS: tl.constexpr):
    """The largest of the PEAKS parts that `absmax_kernel` left."""
    at = tl.arange(0, BLOCK_PEAKS)
    return tl.max(tl.load(peaks + at, mask=at < PEAKS, other=0), axis=0)


@triton.jit
def _quotient(value, scale):
    """value / scale, rounded as IEEE says up to a magnitude of 1024 and cut off there, where every code has saturated; 0 where
    the scale is 0 or NaN. `scale` is one per row or block, of a shape that broadcasts.

    Dividing costs a dozen instructions and a branch. Instead the scale is inverted once and each product corrected twice by its
    exact remainder, which ends at the rounded quotient (Markstein, IBM J. Res. Dev. 34, 1990): the first correction leaves an
    error below one unit in the last place, and from there the second is exact. Both are first multiplied by a power of two that
    keeps the inverse and remainders that matter out of the subnormal numbers.
    """
    usable = scale > 0
    if EXACT_FMA:
        power = tl.where(scale < 2.0**-62, 2.0**64, tl.where(scale > 2.0**62, 2.0**-64, 1.0))
        divisor = tl.where(usable, scale * power, 1.0)
        inverse = tl.div_rn(1.0, divisor)
        bound = tl.where(usable, divisor * 1024.0, 0.0)
        magnitude = tl.minimum(tl.abs(value) * power, bound)
        quotient = magnitude * inverse
        quotient = tl.fma(tl.fma(-quotient, divisor, magnitude), inverse, quotient)
        quotient = tl.fma(tl.fma(-quotient, divisor, magnitude), inverse, quotient)
        sign = value.to(tl.uint32, bitcast=True) & tl.where(usable, 0x80000000, 0).to(tl.uint32)
        return (quotient.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    else:
        return tl.where(usable, tl.div_rn(value, tl.where(usable, scale, 1.0)), 0.0)


@triton.jit
def quantize_rows_kernel(
    x,
    codes,
    scales,
    peaks,
    K,
    columns,
    x_stride,
    DIVISOR: tl.constexpr,
    ELEMENT: tl.constexpr,
    CAST: tl.constexpr,
    WHOLE: tl.constexpr,
    PEAKS: tl.constexpr,
    BLOCK_PEAKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x [M, K], rows `x_stride` apart -> codes uint8 [M, columns], columns >= K filled with zeros; scales float [M].

    With `peaks`, the PEAKS parts that `absmax_kernel` left, there is one scale for the whole tensor: scales float [1].
    One program a row. WHOLE: the row fits BLOCK_K and is read once; otherwise it is read twice, the second time from L2.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    codes += row * columns
    k = tl.arange(0, BLOCK_K)
    if WHOLE:
        value = tl.load(x + k, mask=k < K, other=0.0)
    if peaks is not None:
        peak = _largest_part(peaks, PEAKS, BLOCK_PEAKS)
    elif WHOLE:
        peak = tl.max(magnitude_bits(value), axis=0)
    else:
        largest = tl.zeros((BLOCK_K,), dtype=tl.int32)
        for start in range(0, K, BLOCK_K):
            part = tl.load(x + start + k, mask=start + k < K, other=0.0)
            largest = tl.maximum(largest, magnitude_bits(part))
        peak = tl.max(largest, axis=0)
    scale = _float_scale(peak, DIVISOR, scales.dtype.element_ty)
    if peaks is None:
        tl.store(scales + row, narrow(scale, scales.dtype.element_ty))
    elif row == 0:
        tl.store(scales, narrow(scale, scales.dtype.element_ty))
    if WHOLE:
        tl.store(codes + k, byte_codes(_quotient(widen(value), scale), ELEMENT, CAST), mask=k < columns)
    else:
        for start in range(0, columns, BLOCK_K):
            part = tl.load(x + start + k, mask=start + k < K, other=0.0)
            code = byte_codes(_quotient(widen(part), scale), ELEMENT, CAST)
            tl.store(codes + start + k, code, mask=start + k < columns)


@triton.jit
def absmax_kernel(x, peaks, M, K, x_stride, BLOCK_K: tl.constexpr):
    """x [M, K], rows `x_stride` apart -> peaks int32 [programs]: the bits of the largest magnitude that each program met."""
    across = tl.cdiv(K, BLOCK_K)
    largest = tl.zeros((BLOCK_K,), dtype=tl.int32)
    for chunk in range(tl.program_id(0), M * across, tl.num_programs(0)):
        k = chunk % across * BLOCK_K + tl.arange(0, BLOCK_K)
        value = tl.load(x + (chunk // across).to(tl.int64) * x_stride + k, mask=k < K, other=0.0)
        largest = tl.maximum(largest, magnitude_bits(value))
    tl.store(peaks + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def global_multiplier(peaks, PEAKS: tl.constexpr, BLOCK_PEAKS: tl.constexpr, TOP: tl.constexpr):
    """NVFP4's fp32 multiplier from `absmax_kernel`'s parts: peak / TOP; 1 where that is 0, NaN where x isn't finite."""
    peak = _largest_part(peaks, PEAKS, BLOCK_PEAKS)
    scale = tl.div_rn(peak.to(tl.float32, bitcast=True), TOP)
    scale = tl.where(scale > 0, scale, 1.0)
    return tl.where(peak < INFINITY_BITS, scale, float("nan"))


@triton.jit
def _power_code(peak_bits, DIVISOR: tl.constexpr, CEIL: tl.constexpr):
    """The E8M0 code (uint32) of the bits of a block's largest magnitude; 255 (NaN) where that isn't finite."""
    if CEIL:
        # The smallest power of two that isn't below the ratio; a subnormal ratio lies under 2^-127 (bit 22) or above.
        ratio = tl.div_rn(peak_bits.to(tl.float32, bitcast=True), DIVISOR).to(tl.int32, bitcast=True)
        exponent = ratio >> 23
        fraction = ratio & 0x7FFFFF
        code = exponent + tl.where(exponent == 0, fraction > (1 << 22), fraction > 0).to(tl.int32)
    else:
        # floor(log2(peak)) - floor(log2(DIVISOR)): a difference of exponent fields.
        shift: tl.constexpr = 15 if DIVISOR == 57344.0 else 8 if DIVISOR == 448.0 else 2
        code = tl.maximum((peak_bits >> 23) - shift, 0)
    return tl.where(peak_bits < INFINITY_BITS, tl.minimum(code, 254), 255).to(tl.uint32)


@triton.jit
def _block_code(peak_bits, multiplier, DIVISOR: tl.constexpr):
    """The E4M3 code (uint32) of the bits of a block's largest magnitude under NVFP4's multiplier; NaN's where not finite.

    The scale is rounded, multiplied out and rounded again, as the format does when it stores a scale: under a subnormal
    multiplier the two differ.
    """
    peak = peak_bits.to(tl.float32, bitcast=True)
    code = nearest_code(tl.maximum(tl.div_rn(peak, DIVISOR * multiplier), SMALLEST_E4M3), 4, 3)
    again = tl.div_rn(minifloat(code, 4, 3) * multiplier, multiplier)
    code = nearest_code(tl.maximum(again, SMALLEST_E4M3), 4, 3)
    code = tl.where(peak_bits < INFINITY_BITS, code, 0x7F)
    return tl.where(multiplier == multiplier, code, 0x7F)


@triton.jit
def scale_offset(m, s, across, row_stride, column_stride, SWIZZLED: tl.constexpr):
    """Where the scale of row m and column s lies: in the 128x4 order of tcgen05 and cuBLASLt, or plain by strides.

    In the 128x4 order 512 consecutive bytes hold 128 rows of 4 columns; rows 32 apart lie beside each other.
    """
    if SWIZZLED:
        tile = (m // 128) * tl.cdiv(across, 4) + s // 4
        return tile * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + s % 4
    else:
        return m * row_stride + s * column_stride


@triton.jit
def quantize_blocks_kernel(
    x,
    codes,
    scales,
    peaks,
    global_scale,
    M,
    K,
    columns,
    across,
    x_stride,
    scale_row_stride,
    scale_column_stride,
    DIVISOR: tl.constexpr,
    TOP: tl.constexpr,
    ELEMENT: tl.constexpr,
    SCALE: tl.constexpr,
    CEIL: tl.constexpr,
    GROUP: tl.constexpr,
    SWIZZLED: tl.constexpr,
    CAST: tl.constexpr,
    PEAKS: tl.constexpr,
    BLOCK_PEAKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x [M, K], rows `x_stride` apart -> codes uint8 [M, columns] (E2M1: [M, columns / 2], the lower column in the low nibble)
    and one scale per GROUP columns, `across` = columns / GROUP in a row.

    scales         fp32 (SCALE "float") or uint8; plain with the given strides, or SWIZZLED, a buffer of whole 128x4 tiles
    global_scale   fp32, one: read where peaks is None, else written, from the PEAKS parts that `absmax_kernel` left
    The grid is (ceil(rows / BLOCK_M), ceil(columns / BLOCK_K)) over the rows and columns that have a place in `scales`: for
    SWIZZLED whole tiles, whose places outside of x are set to zero here.
    """
    RUNS: tl.constexpr = BLOCK_K // GROUP
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (m < M)[:, None] & (k < K)[None, :]
    value = tl.load(x + m[:, None] * x_stride + k[None, :], mask=inside, other=0.0)
    peak = tl.max(tl.reshape(magnitude_bits(value), (BLOCK_M, RUNS, GROUP)), axis=2)
    value = tl.reshape(widen(value), (BLOCK_M, RUNS, GROUP))

    s = tl.program_id(1) * RUNS + tl.arange(0, RUNS)
    own = (m < M)[:, None] & (s < across)[None, :]
    places = scales + scale_offset(m[:, None], s[None, :], across, scale_row_stride, scale_column_stride, SWIZZLED)
    if SCALE == "float":
        scale = _float_scale(peak, DIVISOR, tl.float32)
        tl.store(places, scale, mask=own)
        value = _quotient(value, scale[:, :, None])
    else:
        if SCALE == "e8m0":
            code = _power_code(peak, DIVISOR, CEIL)
            # Dividing by a power of two is multiplying by its inverse; codes of a block that isn't finite are zero.
            finite = code < 255
            value = tl.where(finite[:, :, None], value * power_of_two(tl.where(finite, 254 - code, 0))[:, :, None], 0.0)
        else:
            if peaks is None:
                multiplier = tl.load(global_scale)
            else:
                multiplier = global_multiplier(peaks, PEAKS, BLOCK_PEAKS, TOP)
                if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
                    tl.store(global_scale, multiplier)
            code = _block_code(peak, multiplier, DIVISOR)
            value = _quotient(value, (minifloat(code, 4, 3) * multiplier)[:, :, None])
        if SWIZZLED:
            rows = tl.cdiv(M, 128) * 128
            padded = tl.cdiv(across, 4) * 4
            # The pad is zeroed in the same store.
            code = tl.where(own, code, 0)
            tl.store(places, code.to(tl.uint8), mask=(m < rows)[:, None] & (s < padded)[None, :])
        else:
            tl.store(places, code.to(tl.uint8), mask=own)

    if ELEMENT == "e2m1":
        low, high = tl.split(tl.reshape(value, (BLOCK_M, BLOCK_K // 2, 2)))
        byte = tl.program_id(1) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
        mask = (m < M)[:, None] & (byte < columns // 2)[None, :]
        tl.store(codes + m[:, None] * (columns // 2) + byte[None, :], pair_codes(low, high, CAST), mask=mask)
    else:
        value = tl.reshape(value, (BLOCK_M, BLOCK_K))
        mask = (m < M)[:, None] & (k < columns)[None, :]
        tl.store(codes + m[:, None] * columns + k[None, :], byte_codes(value, ELEMENT, CAST), mask=mask)
