"""C++ kernels that multiply pairs of bf16 numbers (csrc/cpu/pairs_*.h), for CPUs with AVX-512 BF16 and VBMI.

Few rows of x run at the speed of memory: codes become bf16 numbers by one look-up, and scales wait for sums of columns
that share one. Many rows, and dX, run at the speed of the instruction: blocks of W are decoded to bf16 in the cache.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from quantlib.formats.base import Format
from quantlib.formats.codecs import decode
from quantlib.kernels import cpu
from quantlib.kernels.base import Kernel, Problem, register_kernel
from quantlib.kernels.cpu import ROUNDED_TO_BF16, Packed, predicted, refusal, rounded_activations
from quantlib.tensor import QuantizedTensor

CODE_BITS = (2, 3, 4, 5, 6, 8)
"""Widths of codes that have a look-up in registers."""
PLANES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""bf16 numbers whose sum is a number of x, exactly."""
ROWS_AT_ONCE = 1024
"""Rows of x or dY in one call: bounds the memory of fp32 sums."""


@lru_cache(maxsize=256)
def exact_in_bf16(fmt: Format) -> bool:
    """Whether bf16 holds every value of the format's codec: integers, minifloats; not NF4's entries."""
    values = decode(fmt.codec, torch.arange(len(fmt.codec.entries), dtype=torch.uint8))
    return torch.equal(values.to(torch.bfloat16).to(torch.float32).nan_to_num(), values.nan_to_num())


class PairsKernel(Kernel):
    """What the kernels of this file share. `function` is the extension's."""

    backend = "cpu"
    function: ClassVar[str]
    batch_invariant: ClassVar[bool] = False
    """Whether it serves every batch, a row of x with the same bits in each."""

    def missing(self) -> str | None:
        """What the instruction set that runs lacks, or None."""
        if cpu.has_pairs():
            return None
        return f"multiplies bf16 pairs, which needs AVX-512 BF16 and VBMI; {cpu.isa()} runs here"

    def supports(self, problem: Problem) -> str | None:
        """Why the kernel can't run the problem, or None."""
        why = refusal(problem) or self.missing()
        if why is not None:
            return why
        if problem.batch_invariant and not self.batch_invariant:
            return "dispatch takes another kernel for another batch, and batch_invariant is set"
        if problem.format.codec.bits not in CODE_BITS:
            return f"looks up codes of {', '.join(map(str, CODE_BITS))} bits, not {problem.format.codec.bits}"
        return None

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        n, k = weight.shape
        contracted, width = (k, n) if self.operation == "linear" else (n, k)
        y = x.new_empty(x.shape[0], width)
        if not y.numel():
            return y
        if not contracted and self.operation == "dgrad":
            return y.zero_()
        function = getattr(cpu.native(), self.function)
        Packed.of(weight).products(function, rounded_activations(problem, x), bias, y, ROWS_AT_ONCE)
        return y


def decode_rate(problem: Problem, narrow: float, wide: float) -> float:
    """Weights per ns and thread, as measured: codes of 8 bits, and numbers that are subtracted, take twice the instructions."""
    return narrow if problem.format.codec.bits <= 6 and problem.format.zero == "none" else wide


class ExactPairsKernel(PairsKernel):
    """Codes are multiplied as bf16 numbers, scales wait: x of any dtype where bf16 holds the numbers."""

    def supports(self, problem: Problem) -> str | None:
        why = super().supports(problem)
        if why is None and problem.dtype is not torch.bfloat16 and not exact_in_bf16(problem.format):
            return f"takes a format whose values bf16 doesn't hold ({problem.format}) for bf16 x alone"
        return why


class CpuPairsDot(ExactPairsKernel):
    name = "cpu_pairs_dot"
    operation = "linear"
    function = "pairs_dot"
    scaling = (
        "code values in bf16 (exact; entries of code books that bf16 doesn't hold are rounded, for bf16 x alone); scales "
        "and zeros on fp32 sums of eight columns, minima on those of x over their columns"
    )

    def cost(self, problem: Problem) -> float:
        # Four rows of x share what decoding costs. Minima are subtracted once a row, which costs nothing here.
        narrow = problem.format.codec.bits <= 4 and problem.format.zero != "integer"
        rate, share = (100.0 if narrow else 27.0) / -(-max(problem.m, 1) // 4), 1.33
        if cpu.has_tiles():  # such CPUs have half the rate of look-ups and a third of that of products
            rate, share = decode_rate(problem, 55.0, 26.0 if problem.format.codec.bits <= 6 else 13.0), 0.64
        return predicted(problem, self.name, rate, peak_share=share / PLANES[problem.dtype])


class CpuPairsStrip(ExactPairsKernel):
    name = "cpu_pairs_strip"
    operation = "linear"
    function = "pairs_strip"
    layout = "cpu_rows"
    batch_invariant = True
    scaling = (
        "code values in bf16 (exact; entries of code books that bf16 doesn't hold are rounded, for bf16 x alone); scales "
        "and zeros on fp32 sums of a block of columns, minima on those of x over it"
    )

    def cost(self, problem: Problem) -> float:
        m, turn = max(problem.m, 1), 8  # rows of x at once, and kernels for 1, 2 and 4 of the rest
        rest = m % turn
        whole = m - rest + next(run for run in (0, 1, 2, 4, turn) if run >= rest)
        # Codes are looked up again for every eight rows of x; narrow blocks add what scaling their sums takes.
        share = 1.65 if problem.format.codec.bits > 6 else 2.25 if (problem.format.block.cols or 64) >= 64 else 1.95
        decode = 75.0
        if cpu.has_tiles():
            share, decode = 0.9, 20.0 if problem.format.codec.bits > 4 else 60.0
        return predicted(replace(problem, m=whole), self.name, decode, peak_share=share / PLANES[problem.dtype])


class RoundedPairsKernel(PairsKernel):
    """Weights are rounded to bf16, which suits bf16 x alone."""

    scaling = ROUNDED_TO_BF16

    def supports(self, problem: Problem) -> str | None:
        if problem.dtype is not torch.bfloat16:
            return (
                f"multiplies bf16; {'x' if self.operation == 'linear' else 'dY'} is {str(problem.dtype).removeprefix('torch.')}"
            )
        return super().supports(problem)


class CpuPairsTile(RoundedPairsKernel):
    name = "cpu_pairs_tile"
    operation = "linear"
    layout = "any"
    function = "pairs_tile"

    def cost(self, problem: Problem) -> float:
        narrow = problem.format.codec.bits <= 6 and problem.format.zero != "integer"
        return predicted(problem, self.name, 12.0 if narrow else 10.0, peak_share=0.8 if cpu.has_tiles() else 2.19)


def strip_refusal(problem: Problem) -> str | None:
    """Why strips of a format can't be rounded to bf16, whose numbers are looked up as bf16 but where codes have four bits."""
    if problem.format.codec.bits == 4 or exact_in_bf16(problem.format):
        return None
    return f"takes values that bf16 holds, or 4-bit codes; those of {problem.format} are neither"


class CpuPairsStripTile(RoundedPairsKernel):
    name = "cpu_pairs_strip_tile"
    operation = "linear"
    function = "pairs_strip_tile"
    layout = "cpu_rows"

    def supports(self, problem: Problem) -> str | None:
        return super().supports(problem) or strip_refusal(problem)

    def cost(self, problem: Problem) -> float:
        whole = replace(problem, m=-(-max(problem.m, 1) // 8) * 8)
        return predicted(whole, self.name, decode_rate(problem, 15.0, 12.0), peak_share=0.8 if cpu.has_tiles() else 2.4)


class CpuPairsDgrad(RoundedPairsKernel):
    name = "cpu_pairs_dgrad"
    operation = "dgrad"
    layout = "any"
    function = "pairs_dgrad"

    def cost(self, problem: Problem) -> float:
        return predicted(problem, self.name, decode_rate(problem, 9.0, 7.0), peak_share=0.75 if cpu.has_tiles() else 1.9)


register_kernel(CpuPairsDot())
register_kernel(CpuPairsStrip())
register_kernel(CpuPairsTile())
register_kernel(CpuPairsStripTile())
register_kernel(CpuPairsDgrad())
