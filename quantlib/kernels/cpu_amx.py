"""C++ kernels that multiply in the tile registers of AMX (csrc/cpu/amx_*.h), for CPUs with AMX BF16 and bf16 x.

What codes of sixteen rows of W side by side come out as, pairs of columns, are the rows of a tile: weights in `cpu_rows` are
decoded, and multiplied with sixteen rows of x, or of dY, in one instruction. Few rows of x cost little more than one.
"""

from __future__ import annotations

from dataclasses import replace

from quantlib.kernels import cpu
from quantlib.kernels.base import Problem, register_kernel
from quantlib.kernels.cpu import predicted
from quantlib.kernels.cpu_pairs import CpuPairsStrip, RoundedPairsKernel, strip_refusal
from quantlib.layouts.strips import whole_words

SPAN = 128
"""Columns of a row, which costs are counted for."""
TILE = 16
"""Lanes of a tile: rows of x, or pairs of one and a block of columns where blocks are narrower than TILE_COLUMNS."""
TILE_COLUMNS = 32
"""Columns that one product of tiles adds up."""
X_TILES = 2
"""Tiles of x that few rows are multiplied with at once."""
STARTING_US = 1.0
"""What a call takes besides, more than one of `cpu_pairs_strip`: x is arranged before the threads multiply, and each shapes its
registers. In a model of small layers the latter is the faster for one row of x."""
PRODUCTS = 17.0
"""The rate of products of tiles, in units of torch's fp32 matmul on one core."""


def rows_in_tile(problem: Problem) -> int:
    """Rows of x that one tile has lanes for."""
    columns = problem.format.block.cols or SPAN
    return TILE * columns // TILE_COLUMNS if columns in (8, 16) else TILE


class AmxKernel(RoundedPairsKernel):
    """What the kernels of this file share."""

    def missing(self) -> str | None:
        if cpu.has_tiles():
            return None
        return f"multiplies in tile registers, which needs AMX BF16; {cpu.isa()} runs here"

    def priced(self, problem: Problem, nanoseconds: float, share: float = PRODUCTS) -> float:
        """Microseconds where a thread decodes a span of one row in so many nanoseconds."""
        # Where one kernel must serve every batch, what one row of x takes matters less than what the others do.
        starting = 0.0 if problem.batch_invariant else STARTING_US
        return starting + predicted(problem, self.name, SPAN / nanoseconds, peak_share=share)


class CpuAmxStrip(AmxKernel):
    name = "cpu_amx_strip"
    operation = "linear"
    function = "amx_strip"
    layout = "cpu_rows"
    batch_invariant = True
    scaling = CpuPairsStrip.scaling

    def cost(self, problem: Problem) -> float:
        m, rows = 1 if problem.batch_invariant else max(problem.m, 1), rows_in_tile(problem)  # as `predicted` counts
        # Codes are decoded again for every X_TILES tiles of x. A tile costs its products, and what scaling sums takes.
        runs, rest = divmod(m, X_TILES * rows)
        tiles = X_TILES * runs + (rest / rows if rest <= rows else X_TILES)
        decode = 7.0 if problem.format.codec.bits > 4 else 3.8
        scaling = 6.0 if problem.format.block.cols in (TILE_COLUMNS - 8, TILE_COLUMNS) else 4.5
        scaling += 0.0 if problem.format.zero == "none" else 2.0
        return self.priced(problem, decode * (runs + (rest > 0)) + scaling * tiles, share=10 * PRODUCTS)


class AmxTileKernel(AmxKernel):
    """Many rows of x or dY: W in the layout `rows` is turned over block by block."""

    layout = "any"

    def supports(self, problem: Problem) -> str | None:
        why = super().supports(problem)
        if why is None and not whole_words(problem.format, problem.k):
            return f"turns rows of whole 32-bit words over; {problem.k} columns of {problem.format} are none"
        return why or strip_refusal(problem)


def rounding_time(problem: Problem) -> float:
    """Nanoseconds to decode and round a span of one row."""
    wide = problem.format.codec.bits > 4
    turned = 0.0 if problem.layout == "cpu_rows" else 4.0 if wide else 2.0
    return turned + (17.0 if wide else 9.5 if problem.format.zero == "none" else 13.0)


class CpuAmxLinear(AmxTileKernel):
    name = "cpu_amx_linear"
    operation = "linear"
    function = "amx_linear"

    def cost(self, problem: Problem) -> float:
        # Fewer rows than two tiles by two multiply take as long: W is rounded into the second-level cache and read from there.
        return self.priced(replace(problem, m=max(problem.m, 2 * TILE)), rounding_time(problem))


class CpuAmxDgrad(AmxTileKernel):
    name = "cpu_amx_dgrad"
    operation = "dgrad"
    function = "amx_dgrad"

    def cost(self, problem: Problem) -> float:
        return self.priced(problem, 5.0 + rounding_time(problem))


register_kernel(CpuAmxStrip())
register_kernel(CpuAmxLinear())
register_kernel(CpuAmxDgrad())
