"""Entries of the fragments layout's strip parts: the scales, zeros and minima of a lane's two rows, from words already loaded.

Words are int32 [T, count], one row of them per lane; H is 0 for the lane's row r and 1 for r + 8, E the block within the tile.
"""

import triton
import triton.language as tl

from .decode import minifloat, power_of_two, rounded_product


@triton.jit
def word_of(words, INDEX: tl.constexpr, T: tl.constexpr):
    """Column INDEX of int32 [T, count], count a power of two up to 16: [T]. Splits name registers, they cost nothing."""
    for level in tl.static_range(4):
        if words.shape[1] > 1:
            even, odd = tl.split(tl.reshape(words, (T, words.shape[1] // 2, 2)))
            if (INDEX >> level) % 2 == 1:
                words = odd
            else:
                words = even
    return tl.reshape(words, (T,))


@triton.jit
def entry(words, H: tl.constexpr, E: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, T: tl.constexpr):
    """Entry E of COUNT entries of BITS bits, as stored: int32 [T]."""
    START: tl.constexpr = H * max(16, COUNT * BITS) + E * BITS
    word = word_of(words, START // 32, T)
    if BITS == 32:
        return word
    elif START % 32 + BITS == 32:
        return (word.to(tl.uint32) >> (32 - BITS)).to(tl.int32)
    else:
        return (word >> (START % 32)) & ((1 << BITS) - 1)


@triton.jit
def float_entry(
    words, H: tl.constexpr, E: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, DTYPE: tl.constexpr, T: tl.constexpr
):
    """An entry that is a float of the dtype DTYPE ("fp16", "bf16", "fp32"): fp32 [T]."""
    bits = entry(words, H, E, BITS, COUNT, T)
    if DTYPE == "fp32":
        return bits.to(tl.float32, bitcast=True)
    elif DTYPE == "bf16":
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def integer_value(code, OFFSET: tl.constexpr = 0):
    """Non-negative integers below 2^23, less OFFSET -> fp32, by bits: exact, and cheaper than a conversion."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + OFFSET)


@triton.jit
def super_entry(words, unit, H: tl.constexpr, E: tl.constexpr, COUNT: tl.constexpr, OFFSET: tl.constexpr, T: tl.constexpr):
    """K-quants: an integer entry, less OFFSET, times its fp16 unit: fp32 [T]."""
    value = integer_value(entry(words, H, E, 8, COUNT, T), OFFSET)
    return value * float_entry(unit, H, 0, 16, 1, "fp16", T)


@triton.jit
def double_scale(code, absmax, offset, scale_map):
    """Double quantization: fp32 map[code] * absmax + offset."""
    return rounded_product(tl.load(scale_map + code), absmax) + tl.load(offset)


@triton.jit
def scale_of_code(code, outer, spec: tl.constexpr):
    """An 8-bit float scale's code -> fp32: E4M3 times the tensor's multiplier, or a power of two."""
    if spec.scale == "e4m3_global":
        return minifloat(code, 4, 3) * tl.load(outer)
    else:
        return power_of_two(code)
