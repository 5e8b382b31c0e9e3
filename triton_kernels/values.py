"""Codes of the fragments layout -> weights in the dtype of the product. `spec.values` says how:

    law       the format's law: fp32 (value - zero) * scale - minimum, rounded once to the operand's dtype
    affine    the same number by one fused multiply-add, (128 + code) * scale - (128 + zero) * scale; both products are exact in
              fp32 because scales have at most 11 significant bits there and codes at most 7
    integer   code - zero, exact in 16 bits; scales are applied to accumulators
    float     a small float times its block's scale, exact in 16 bits but for a power of two, for which `restored` makes up

A pair is the two weights (b = 0, 1) of a (g, h), P = 2 g + h; its codes lie in the two halves of a word.
"""

import triton
import triton.language as tl

from .decode import INTERPRET, narrow, rounded_product
from .entries import integer_value, word_of
from .pairs import both_high, both_low, high_half, low_half, pair_fma, pair_mul, twice


@triton.jit
def restored(acc, outer, spec: tl.constexpr):
    """fp32 sums of products with NVFP4-like operands, times the tensor's multiplier and the power of two that `_scale_numbers`
    left out; other sums as they are."""
    if spec.values == "float" and spec.scale == "e4m3_global":
        missing: tl.constexpr = 2.0 ** (10 - 2 ** (spec.exponent_bits - 1))
        acc = acc * (tl.load(outer) * missing)
    return acc


@triton.jit
def plane_codes(word, upper, hidden, BITS: tl.constexpr, P: tl.constexpr, S: tl.constexpr):
    """The fields of pair P of step S in one plane, in both halves: int32 [T]. `upper`: at 8 bits the word of g = 1.

    hidden: a zero that the compiler can't see. A mask that is followed by an OR of another constant becomes one instruction,
    which takes one constant only; a mask that looks variable stays in a register, a constant one is moved there at every use.
    """
    if BITS == 8:
        return ((upper if P >= 2 else word) >> (8 * (P % 2))) & (0x00FF00FF + hidden)
    elif BITS == 4:
        return (word >> (4 * P)) & (0x000F000F + hidden)
    elif BITS == 2:
        return (word >> (2 * P + 8 * (S % 2))) & (0x00030003 + hidden)
    else:
        return (word >> (P + 4 * (S % 4))) & (0x00010001 + hidden)


@triton.jit
def pair_codes(word0, upper, word1, word2, hidden, spec: tl.constexpr, P: tl.constexpr, S: tl.constexpr):
    """Whole codes of pair P, in both halves: int32 [T]."""
    codes = plane_codes(word0, upper, hidden, spec.plane0, P, S)
    if spec.plane1 > 0:
        codes |= plane_codes(word1, word1, hidden, spec.plane1, P, S) << spec.plane0
    if spec.plane2 > 0:
        codes |= plane_codes(word2, word2, hidden, spec.plane2, P, S) << (spec.plane0 + spec.plane1)
    return codes


# Small floats.


@triton.jit
def split_sign_bits(word, P: tl.constexpr):
    """4-bit floats: sign (bit 15) and magnitude (bits 8 .. 6) of pair P in both halves. The layout spreads a half so that
    bf16 and fp16 need the same number of shifts and masks (layouts/fragments.py)."""
    if P == 0:
        return ((word << 6) & 0x01C001C0) | ((word << 2) & -0x7FFF8000)
    elif P == 1:
        return (word << 3) & -0x7E3F7E40
    elif P == 2:
        return (word & 0x01C001C0) | ((word << 1) & -0x7FFF8000)
    else:
        return ((word >> 3) & 0x01C001C0) | (word & -0x7FFF8000)


@triton.jit
def float_bits(word0, upper, word1, word2, hidden, spec: tl.constexpr, P: tl.constexpr, S: tl.constexpr):
    """Codes of a small float, moved under bf16's bits, subnormals included: both halves are value * 2^-(128 - 2^(exponent -
    1))."""
    if spec.bits == 4:
        moved = split_sign_bits(word0, P)
        if spec.mantissa_bits == 0:
            moved = (moved & -0x7FFF8000) | ((moved & 0x01C001C0) << 1)
        elif spec.mantissa_bits == 2:
            moved = (moved & -0x7FFF8000) | ((moved & 0x01C001C0) >> 1)
        return moved
    MAGNITUDE: tl.constexpr = spec.exponent_bits + spec.mantissa_bits
    mask: tl.constexpr = (1 << MAGNITUDE) - 1
    sign: tl.constexpr = 1 << MAGNITUDE
    codes = pair_codes(word0, upper, word1, word2, hidden, spec, P, S)
    moved = (codes & (mask | (mask << 16))) << (7 - spec.mantissa_bits)
    return moved | ((codes & (sign | (sign << 16))) << (15 - MAGNITUDE))


@triton.jit
def float_pair(moved, scale, dtype: tl.constexpr, spec: tl.constexpr):
    """`float_bits` -> pairs in `dtype`, times the block's scale pair where scales are applied to weights; exact."""
    if dtype == tl.float16:
        moved = (moved & -0x7FFF8000) | ((moved & 0x0FFF0FFF) << 3)
    if spec.scale == "e4m3_global":
        return pair_mul(moved, scale, dtype)
    BIAS: tl.constexpr = 127 if dtype == tl.bfloat16 else 15
    MANTISSA: tl.constexpr = 7 if dtype == tl.bfloat16 else 10
    REBIAS: tl.constexpr = BIAS - (1 << (spec.exponent_bits - 1)) + 1
    if REBIAS > 0:
        factor: tl.constexpr = ((BIAS + REBIAS) << MANTISSA) | ((BIAS + REBIAS) << (16 + MANTISSA))
        moved = pair_mul(moved, moved * 0 + factor, dtype)
    if spec.scale_at == "weight":
        moved = pair_mul(moved, scale, dtype)
    return moved


@triton.jit
def _scale_numbers(fields, dtype: tl.constexpr, spec: tl.constexpr):
    """Two scales' codes, in bits 11 .. 4 of both halves -> pairs in `dtype`, times what `float_pair`'s operand lacks.

    E4M3 (NVFP4): an E4M3 code under bf16's bits is scale * 2^-120; it is multiplied to scale * 2^118 (E2M1's bits stand for
    value * 2^-126 there), or to scale * 2^6 in fp16 (value * 2^-14): no factor and no product leaves the range, the product is
    2^-8 of the weight, which `restored` makes up for, and its six significant bits fit either mantissa.
    E8M0 (bf16): the power of two itself; 2^-127 is subnormal in bf16 too.
    """
    if spec.scale == "e8m0":
        codes = fields << 3
        low = tl.where((fields & 0xFFF) == 0, 0x40, 0)
        high = tl.where((fields & 0xFFF0000) == 0, 0x400000, 0)
        return codes | low | high
    elif dtype == tl.bfloat16:
        raised = pair_mul(fields, fields * 0 + 0x7B807B80, dtype)  # 2^120
        return pair_mul(raised, fields * 0 + 0x7A807A80, dtype)  # 2^118
    else:
        return pair_mul(fields << 3, fields * 0 + 0x74007400, dtype)  # 2^14


@triton.jit
def float_scale_pair(
    words, H: tl.constexpr, E: tl.constexpr, COUNT: tl.constexpr, dtype: tl.constexpr, spec: tl.constexpr, T: tl.constexpr
):
    """The scale of block E in the lanes' row r + 8 H, in both halves: int32 [T]. Every second byte of a word is converted at
    once."""
    START: tl.constexpr = H * max(16, COUNT * 8) + E * 8
    word = word_of(words, START // 32, T)
    if (START // 8) % 2 == 0:
        numbers = _scale_numbers((word << 4) & 0x0FF00FF0, dtype, spec)
    else:
        numbers = _scale_numbers((word >> 4) & 0x0FF00FF0, dtype, spec)
    if START % 32 < 16:
        return both_low(numbers)
    else:
        return both_high(numbers)


# Integers.


@triton.jit
def integer_pair(codes, zero, dtype: tl.constexpr, spec: tl.constexpr):
    """Pairs of codes -> pairs of code - offset - zero in `dtype`, exactly; zero: int32 [T] or 0.

    Codes become the low mantissa bits of a power of two that is then taken off again: 128 in bf16 (7 bits), 1024 in fp16.
    """
    if dtype == tl.bfloat16:
        magic: tl.constexpr = 0x43004300
        one: tl.constexpr = 0x3F803F80
        # -(128 + z) is exact for z < 128: eight significant bits.
        shift = twice(0xC300 | (codes * 0 + zero + spec.offset))
    else:
        magic: tl.constexpr = 0x64006400
        one: tl.constexpr = 0x3C003C00
        shift = twice(0xE400 | (codes * 0 + zero + spec.offset))
    return pair_fma(codes | magic, codes * 0 + one, shift, dtype)


# Values one by one, in fp32.


@triton.jit
def lookup(table, lane_entry, code, spec: tl.constexpr):
    """The code book's entry, fp32. A book of 16 is spread over the lanes and read by a shuffle, which takes the code's low four
    bits by itself."""
    if INTERPRET or spec.bits != 4:
        return tl.load(table + (code & ((1 << spec.bits) - 1)))
    else:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x101f, 0xffffffff;", "=f,f,r", [lane_entry, code],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _scaled(value, scale, zero, dtype: tl.constexpr, spec: tl.constexpr):
    """A value under the law; scales and minima left out where they come later."""
    if spec.zero == "integer":
        value = value - integer_value(zero)
    if spec.scale_at == "weight":
        if spec.zero == "minimum":
            value = rounded_product(value, scale) - zero
        else:
            value = value * scale
    return narrow(value, dtype)


@triton.jit
def decode_pair(
    word0, upper, word1, word2, scale, zero, table, lane_entry, hidden,
    dtype: tl.constexpr, spec: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The two weights of pair P of step S in `dtype`, [T] each.

    scale    fp32 [T], a pair where spec.values is "float", nothing where spec.scale_at isn't "weight"
    zero     int32 [T] where spec.zero is "integer", fp32 where it is "minimum"
    """
    if spec.values == "float":
        pair = float_pair(float_bits(word0, upper, word1, word2, hidden, spec, P, S), scale, dtype, spec)
        return low_half(pair, dtype), high_half(pair, dtype)
    elif spec.values == "integer":
        pair = integer_pair(pair_codes(word0, upper, word1, word2, hidden, spec, P, S), zero, dtype, spec)
        return low_half(pair, dtype), high_half(pair, dtype)
    elif spec.values == "affine":
        # 128 + code as bf16, and so as the upper half of an fp32.
        magic = pair_codes(word0, upper, word1, word2, hidden, spec, P, S) | 0x43004300
        shift = integer_value(magic * 0 + zero, -128 - spec.offset) * -scale
        low = (magic << 16).to(tl.float32, bitcast=True)
        high = (magic & -0x10000).to(tl.float32, bitcast=True)
        return narrow(tl.fma(low, scale, shift), dtype), narrow(tl.fma(high, scale, shift), dtype)
    elif spec.codec == "table":
        if spec.bits == 4:
            low, high = word0 >> (4 * P), word0 >> (4 * P + 16)
        else:
            codes = pair_codes(word0, upper, word1, word2, hidden, spec, P, S)
            low, high = codes, codes >> 16
        first, second = lookup(table, lane_entry, low, spec), lookup(table, lane_entry, high, spec)
        return _scaled(first, scale, zero, dtype, spec), _scaled(second, scale, zero, dtype, spec)
    elif spec.codec == "minifloat":
        moved = float_bits(word0, upper, word1, word2, hidden, spec, P, S)
        rebias: tl.constexpr = 2.0 ** (128 - 2 ** (spec.exponent_bits - 1))
        first = (moved << 16).to(tl.float32, bitcast=True) * rebias
        second = (moved & -0x10000).to(tl.float32, bitcast=True) * rebias
        return _scaled(first, scale, zero, dtype, spec), _scaled(second, scale, zero, dtype, spec)
    else:
        codes = pair_codes(word0, upper, word1, word2, hidden, spec, P, S)
        first = integer_value(codes & 0xFFFF, spec.offset)
        second = integer_value(codes >> 16, spec.offset)
        return _scaled(first, scale, zero, dtype, spec), _scaled(second, scale, zero, dtype, spec)
