"""Decoding in registers: a tile of the rows layout -> fp32 weights [ROWS, COLS]; w = (value - zero) * scale - minimum.

Each difference and product is rounded once to fp32, so kernels that call this must be launched with enable_fp_fusion=False:
a multiply fused with the following subtraction rounds once where the law rounds twice. That option isn't enough: ptxas 12.9
(Triton 3.6) fuses packed mul.rn.f32x2 and sub.rn.f32x2 on sm_100 and sm_120 all the same, hence `rounded_product`.

What a weight is made of arrives as a WeightSpec, a constexpr; the branches below are taken at compile time.

8-bit floats are decoded by hand: sm_80 has no cast from E4M3, and Triton's interpreter casts some codes wrongly.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""The interpreter cuts fp32 off to bf16 instead of rounding, and multiplies bf16 as integers: bf16 is done by hand there."""


@dataclass(frozen=True)
class WeightSpec:
    """What a kernel must know at compile time about a quantized weight; 0 stands for "none" and "the whole dimension".

    codec            "affine" | "table" | "minifloat"
    bits, planes     the width of a code, and of each of its bit planes in the rows layout (`plane0` low .. `plane2` high)
    offset           affine: value = code - offset
    exponent_bits, mantissa_bits      minifloat
    block_rows, block_cols            the weights that share a scale
    scale            "float" | "e4m3_global" | "e8m0" | "double" | "super"
    zero             "none" | "integer" | "minimum"
    scale_plane0 .., scale_offset     super: the planes of a packed scale, and scale = code - scale_offset
    scale_count                       super: blocks under one fp16 unit; double: scales under one absmax
    """

    codec: str
    bits: int
    plane0: int
    plane1: int
    plane2: int
    offset: int
    exponent_bits: int
    mantissa_bits: int
    block_rows: int
    block_cols: int
    scale: str
    zero: str
    scale_plane0: int
    scale_plane1: int
    scale_plane2: int
    scale_offset: int
    scale_count: int


@triton.jit
def widen(x):
    """x, any float dtype -> fp32, exactly."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """fp32 -> dtype, to nearest, ties to even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(value != value, 0x7FC00000, even)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def rounded_product(a, b):
    """a * b in fp32, rounded, where an addition follows that must not be fused with it: assembly stays a scalar mul.rn."""
    if INTERPRET:
        return a * b
    else:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def multiply_add(a, b, acc):
    """acc [A, C] fp32 + a [A, B] times b [B, C], both of one dtype; fp32 operands are not cut to TF32."""
    if INTERPRET:
        return tl.dot(widen(a), widen(b), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def minifloat(code, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """Codes (integers) of a small float -> fp32.

    The code's bits are moved under fp32's and the difference of the exponents' biases is multiplied in, which is exact for
    subnormals too. E4M3's and E5M2's highest codes are NaN (and infinity), as in torch.
    """
    bits = code.to(tl.uint32)
    magnitude = bits & ((1 << (EXPONENT_BITS + MANTISSA_BITS)) - 1)
    sign = (bits >> (EXPONENT_BITS + MANTISSA_BITS)) << 31
    rebias: tl.constexpr = 2.0 ** (128 - 2 ** (EXPONENT_BITS - 1))
    value = ((magnitude << (23 - MANTISSA_BITS)) | sign).to(tl.float32, bitcast=True) * rebias
    if EXPONENT_BITS == 4 and MANTISSA_BITS == 3:
        value = tl.where(magnitude == 0x7F, float("nan"), value)
    elif EXPONENT_BITS == 5 and MANTISSA_BITS == 2:
        special = (magnitude << 21) | sign | 0x7F800000
        value = tl.where(magnitude >= 0x7C, special.to(tl.float32, bitcast=True), value)
    return value


@triton.jit
def power_of_two(code):
    """E8M0: codes -> 2^(code - 127) in fp32; 2^-127 is subnormal there, and 255 is NaN."""
    bits = code.to(tl.uint32) << 23
    bits = tl.where(code == 0, 1 << 22, bits)
    return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _plane(rows, k, columns, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr):
    """The fields of one bit plane for columns k .. k + COLS: uint32 [ROWS, COLS].

    rows: pointers [ROWS] to the plane's first byte; every byte is loaded once and spread over its 8 / WIDTH fields.
    """
    PER_BYTE: tl.constexpr = 8 // WIDTH
    byte = k // PER_BYTE + tl.arange(0, COLS // PER_BYTE)
    if EVEN:
        loaded = tl.load(rows[:, None] + byte[None, :])
    else:
        loaded = tl.load(rows[:, None] + byte[None, :], mask=(byte < columns // PER_BYTE)[None, :], other=0)
    loaded = loaded.to(tl.uint32)
    # Joins keep all fields of a byte in the thread that loaded it.
    if PER_BYTE == 1:
        fields = loaded
    elif PER_BYTE == 2:
        fields = _pair(loaded, WIDTH, WIDTH)
    elif PER_BYTE == 4:
        fields = _quad(loaded, WIDTH, WIDTH)
    else:
        fields = tl.join(_quad(loaded, 2 * WIDTH, WIDTH), _quad(loaded >> WIDTH, 2 * WIDTH, WIDTH))
    return tl.reshape(fields, (ROWS, COLS))


@triton.jit
def _pair(packed, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """Two fields of WIDTH bits, STRIDE bits apart: [..., 2]."""
    return tl.join(packed & ((1 << WIDTH) - 1), (packed >> STRIDE) & ((1 << WIDTH) - 1))


@triton.jit
def _quad(packed, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """Four fields of WIDTH bits, STRIDE bits apart: [..., 2, 2], of which the last index is the low one."""
    return tl.join(_pair(packed, 2 * STRIDE, WIDTH), _pair(packed >> STRIDE, 2 * STRIDE, WIDTH))


@triton.jit
def _codes(rows, k, columns, spec: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr):
    """Codes uint32 [ROWS, COLS] of columns k .. k + COLS; rows: pointers [ROWS] to the first byte of each row."""
    codes = _plane(rows, k, columns, spec.plane0, ROWS, COLS, EVEN)
    if spec.plane1 > 0:
        start = columns * spec.plane0 // 8
        codes |= _plane(rows + start, k, columns, spec.plane1, ROWS, COLS, EVEN) << spec.plane0
    if spec.plane2 > 0:
        start = columns * (spec.plane0 + spec.plane1) // 8
        codes |= _plane(rows + start, k, columns, spec.plane2, ROWS, COLS, EVEN) << (spec.plane0 + spec.plane1)
    return codes


@triton.jit
def _values(codes, table, spec: tl.constexpr):
    """Codes uint32 -> fp32 values, before any scale."""
    if spec.codec == "affine":
        # 2^23 + code, built from bits: an addition costs less than a conversion from integer, and is exact.
        return (codes | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + spec.offset)
    elif spec.codec == "minifloat":
        return minifloat(codes, spec.exponent_bits, spec.mantissa_bits)
    else:
        return tl.load(table + codes)


@triton.jit
def _field(rows, column, start, WIDTH: tl.constexpr):
    """Single fields of a bit plane that starts `start` bytes into each row: column [1, S] -> uint32 [ROWS, S]."""
    byte = tl.load(rows + start + column * WIDTH // 8).to(tl.uint32)
    return (byte >> (column * WIDTH % 8).to(tl.uint32)) & ((1 << WIDTH) - 1)


@triton.jit
def _integers(packed, row, group, across, spec: tl.constexpr):
    """Packed integer scales of a `super` scale -> fp32 [ROWS, S]; row int64 [ROWS, 1], group [1, S]."""
    width: tl.constexpr = spec.scale_plane0 + spec.scale_plane1 + spec.scale_plane2
    rows = packed + row * (across * width // 8)
    codes = _field(rows, group, 0, spec.scale_plane0)
    if spec.scale_plane1 > 0:
        codes |= _field(rows, group, across * spec.scale_plane0 // 8, spec.scale_plane1) << spec.scale_plane0
    if spec.scale_plane2 > 0:
        low: tl.constexpr = spec.scale_plane0 + spec.scale_plane1
        codes |= _field(rows, group, across * low // 8, spec.scale_plane2) << low
    return (codes.to(tl.int32) - spec.scale_offset).to(tl.float32)


@triton.jit
def _scale(scales, outer, inner, scale_map, row, group, across, spec: tl.constexpr):
    """The fp32 scale of every block: row int64 [ROWS, 1], group [1, S] -> [ROWS, S]."""
    if spec.scale == "super":
        unit = tl.load(outer + row * (across // spec.scale_count) + group // spec.scale_count).to(tl.float32)
        return _integers(scales, row, group, across, spec) * unit
    elif spec.scale == "double":
        at = row * across + group
        value = tl.load(scale_map + tl.load(scales + at).to(tl.int32))
        return rounded_product(value, tl.load(outer + at // spec.scale_count)) + tl.load(inner)
    else:
        stored = tl.load(scales + row * across + group)
        if spec.scale == "e4m3_global":
            return minifloat(stored, 4, 3) * tl.load(outer)
        elif spec.scale == "e8m0":
            return power_of_two(stored)
        else:
            return widen(stored)


@triton.jit
def _minimum(zeros, inner, row, group, across, spec: tl.constexpr):
    """The fp32 minimum of every block, as `_scale`."""
    if spec.scale == "super":
        unit = tl.load(inner + row * (across // spec.scale_count) + group // spec.scale_count).to(tl.float32)
        return _integers(zeros, row, group, across, spec) * unit
    else:
        return widen(tl.load(zeros + row * across + group))


@triton.jit
def decode_tile(
    codes,
    table,
    scales,
    zeros,
    outer,
    inner,
    scale_map,
    row,
    k,
    columns,
    codes_stride,
    spec: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Weights fp32 [ROWS, COLS] of rows `row` (int [ROWS], each inside the weight) and columns k .. k + COLS.

    codes      uint8 pointer; `codes_stride` bytes a row, `columns` codes a row (K padded, as the format stores it)
    table      fp32 pointer: the values of a table codec
    scales     pointer of the stored dtype       zeros   uint8 zero points, or the stored minima
    outer      global_scale | scale_absmax | super_scales       inner   scale_offset | super_minima
    scale_map  fp32 pointer: the 256 values of double quantization's codes
    k          a multiple of COLS; EVEN: k + COLS never passes the end of a row, so nothing is masked
    """
    row = row.to(tl.int64)
    values = _values(_codes(codes + row * codes_stride, k, columns, spec, ROWS, COLS, EVEN), table, spec)

    # The largest power of two that divides a block's columns: all weights of such a run share their scale.
    LOW_BIT: tl.constexpr = spec.block_cols & -spec.block_cols
    RUN: tl.constexpr = COLS if LOW_BIT == 0 or LOW_BIT > COLS else LOW_BIT
    RUNS: tl.constexpr = COLS // RUN
    column = k + tl.arange(0, RUNS) * RUN
    if spec.block_cols == 0:
        across = 1
        group = column * 0
    else:
        across = columns // spec.block_cols
        group = column // spec.block_cols
        if not EVEN:
            group = tl.minimum(group, across - 1)
    if spec.block_rows == 0:
        row = row * 0
    elif spec.block_rows > 1:
        row = row // spec.block_rows

    scale = _scale(scales, outer, inner, scale_map, row[:, None], group[None, :], across, spec)
    values = tl.reshape(values, (ROWS, RUNS, RUN))
    if spec.zero == "integer":
        zero = tl.load(zeros + row[:, None] * across + group[None, :]).to(tl.float32)
        values = values - zero[:, :, None]
    if spec.zero == "minimum":
        minimum = _minimum(zeros, inner, row[:, None], group[None, :], across, spec)
        values = rounded_product(values, scale[:, :, None]) - minimum[:, :, None]
    else:
        values = values * scale[:, :, None]
    return tl.reshape(values, (ROWS, COLS))
