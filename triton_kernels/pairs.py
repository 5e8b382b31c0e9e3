"""Two 16-bit numbers in one int32: the arithmetic that decoding does twice at a time.

The GPU has it as packed instructions, written here as PTX; the interpreter, which knows none, computes in fp32 instead. Every
result is exact, so both give the same bits.
"""

import triton
import triton.language as tl

from .decode import INTERPRET, narrow, widen

WIDTH_HALVED_BY_JOINS = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8))
"""Whether this Triton is one of those that `as_operand` is for."""

NO_ADDEND = tl.constexpr(-0x7FFF8000)
"""-0 in both halves: as the addend of a multiplication it keeps the sign of a zero."""


@triton.jit
def low_half(pair, dtype: tl.constexpr):
    """The low 16 bits of a pair, as `dtype`."""
    return (pair & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def high_half(pair, dtype: tl.constexpr):
    """The high 16 bits of a pair, as `dtype`."""
    return ((pair >> 16) & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def pair_of(low, high):
    """Two tensors of a 16-bit dtype -> pairs."""
    return (high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16 | low.to(tl.uint16, bitcast=True).to(tl.uint32)).to(tl.int32)


@triton.jit
def twice(bits):
    """A 16-bit pattern in both halves of a pair."""
    return bits | (bits << 16)


@triton.jit
def both_low(pair):
    """The low half in both halves."""
    if INTERPRET:
        return twice(pair & 0xFFFF)
    else:
        # Written as moves of halves, ptxas makes it a modifier of the instruction that reads it.
        return tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $1; mov.b32 $0, {l, l}; }", "=r,r", [pair], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def both_high(pair):
    """The high half in both halves."""
    if INTERPRET:
        return twice((pair >> 16) & 0xFFFF)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $1; mov.b32 $0, {h, h}; }", "=r,r", [pair], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def pair_fma(a, b, c, dtype: tl.constexpr):
    """a * b + c in both halves, rounded once; the callers' results are exact."""
    if INTERPRET:
        low = widen(low_half(a, dtype)) * widen(low_half(b, dtype)) + widen(low_half(c, dtype))
        high = widen(high_half(a, dtype)) * widen(high_half(b, dtype)) + widen(high_half(c, dtype))
        return pair_of(narrow(low, dtype), narrow(high, dtype))
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def pair_mul(a, b, dtype: tl.constexpr):
    """a * b in both halves."""
    return pair_fma(a, b, a * 0 + NO_ADDEND, dtype)


@triton.jit
def as_operand(tile):
    """`tile`, of 16 bits, as an operand of a product whose history Triton does not see; neighbours of its last dimension must
    share a register.

    Before 3.8 Triton halves the width of operands that were joined when it chooses mma.sync's order of K, and then shuffles
    every element into that order. It looks through pure operations only, so the empty one here says that it is not.
    """
    if WIDTH_HALVED_BY_JOINS and not INTERPRET:
        return tl.inline_asm_elementwise("", "=r,0", [tile], dtype=tile.dtype, is_pure=False, pack=2)
    else:
        return tile
