"""C++ kernels that multiply in the tile registers of AMX (csrc/cpu/amx_*.h), for CPUs with AMX BF16 and bf16 x.

Few rows of x cost little more than one: codes become exact bf16 numbers in the cache, and one product of tiles takes sixteen
rows of W and sixteen lanes, each a row of x and a block's columns. Many rows, and dX, decode as the kernels of bf16 pairs do
and multiply at some sixteen times their rate.
"""

from __future__ import annotations

from math import gcd

from quantlib.kernels import cpu
from quantlib.kernels.base import Problem, register_kernel
from quantlib.kernels.cpu import predicted
from quantlib.kernels.cpu_pairs import CpuPairsDot, RoundedPairsKernel

SPAN = 128
"""Columns that are decoded together."""
TILE = 16
"""Lanes of a tile."""
BOOK_ENTRIES = 64
"""Of the code books of all blocks in a span, if they are to be rounded before codes are looked up."""
PRODUCTS = 9.5
"""The rate of products of tiles, in units of torch's fp32 matmul on one core."""


def blocks_in_span(problem: Problem) -> int:
    """Blocks of columns with a scale of their own."""
    return SPAN // gcd(SPAN, problem.format.block.cols or SPAN)


class AmxKernel(RoundedPairsKernel):
    """What the kernels of this file share."""

    def missing(self) -> str | None:
        if cpu.has_tiles():
            return None
        return f"multiplies in tile registers, which needs AMX BF16; {cpu.isa()} runs here"

    def priced(self, problem: Problem, nanoseconds: float) -> float:
        """Microseconds where a thread decodes a span of one row in so many nanoseconds."""
        return predicted(problem, self.name, SPAN / nanoseconds, peak_share=PRODUCTS)


class CpuAmxDot(AmxKernel):
    name = "cpu_amx_dot"
    operation = "linear"
    function = "amx_dot"
    scaling = CpuPairsDot.scaling

    def cost(self, problem: Problem) -> float:
        # Two tiles beside each other share what is loaded.
        tiles = -(-problem.m * blocks_in_span(problem) // TILE)
        decode = 11.5 if problem.format.codec.bits > 6 else 5.5
        return self.priced(problem, decode + 3.8 * min(tiles, 2) + 9.0 * max(tiles - 2, 0))


def rounding_time(problem: Problem) -> float:
    """Nanoseconds to decode and round a span of one row."""
    if problem.format.codec.bits > 6:
        return 30.0
    return 13.0 if blocks_in_span(problem) << problem.format.codec.bits <= BOOK_ENTRIES else 20.0


class CpuAmxLinear(AmxKernel):
    name = "cpu_amx_linear"
    operation = "linear"
    function = "amx_linear"

    def cost(self, problem: Problem) -> float:
        return self.priced(problem, rounding_time(problem))


class CpuAmxDgrad(AmxKernel):
    name = "cpu_amx_dgrad"
    operation = "dgrad"
    function = "amx_dgrad"

    def cost(self, problem: Problem) -> float:
        return self.priced(problem, 12.0 + rounding_time(problem))


register_kernel(CpuAmxDot())
register_kernel(CpuAmxLinear())
register_kernel(CpuAmxDgrad())
