"""C++ kernels that look up bytes of fp32 numbers (csrc/cpu/lookup_*.h), for CPUs with AVX2 and without products of bf16 pairs.

Few rows of x: codes go into products without a store, and scales wait for the sums of a block's columns. More rows: blocks of W
are decoded to fp32 in the cache, once for all of them.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from quantlib.kernels import cpu
from quantlib.kernels.base import Kernel, Problem, register_kernel
from quantlib.kernels.cpu import Packed, native_codec, predicted, refusal, rounded_activations
from quantlib.tensor import QuantizedTensor

CODE_BITS = range(2, 9)
"""Widths of codes that come apart into bytes."""
ROWS_AT_ONCE = 1024
"""Rows of x in one call: bounds the memory of x in fp32."""
DOT_ROWS = 8
"""Rows of x up to which decoding for each of them is no slower than storing what was decoded."""


class LookupKernel(Kernel):
    """What both kernels share. `function` is the extension's."""

    backend = "cpu"
    operation = "linear"
    function: ClassVar[str]

    def supports(self, problem: Problem) -> str | None:
        """Why the kernel can't run the problem, or None."""
        why = refusal(problem)
        if why is not None:
            return why
        if not cpu.has_lookup():
            return f"looks up bytes by AVX2, where no products of bf16 pairs are faster; {cpu.isa()} runs here"
        fmt = problem.format
        if fmt.codec.bits not in CODE_BITS:
            return f"looks up codes of 2 to 8 bits, not {fmt.codec.bits}"
        if fmt.codec.bits > 4 and native_codec(fmt) == "table":
            return f"looks up tables of up to 16 entries; {fmt} has {len(fmt.codec.entries)}"
        columns = 32 if fmt.codec.bits == 8 else 16
        if (fmt.block.cols or 0) % columns:
            return f"needs blocks of a multiple of {columns} columns; {fmt} has {fmt.block.cols}"
        return None

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(x.shape[0], weight.shape[0])
        if not y.numel():
            return y
        function = getattr(cpu.native(), self.function)
        Packed.of(weight).products(function, rounded_activations(problem, x), bias, y, ROWS_AT_ONCE)
        return y


class CpuLookupDot(LookupKernel):
    name = "cpu_lookup_dot"
    function = "lookup_dot"
    scaling = (
        "code values in fp32 (entries of code books rounded to bf16 for bf16 x); scales, zeros and minima on fp32 sums of four "
        "or eight columns"
    )

    def supports(self, problem: Problem) -> str | None:
        if problem.m > DOT_ROWS:
            return f"multiplies up to {DOT_ROWS} rows; the batch has {problem.m}"
        if problem.batch_invariant:
            return "dispatch takes another kernel for another batch, and batch_invariant is set: cpu_lookup_tile serves all"
        return super().supports(problem)

    def cost(self, problem: Problem) -> float:
        # Decoding is done again for every row, so it counts as multiplying. Rates of both kernels: two cores of Zen 3.
        return predicted(problem, self.name, decode_rate=60.0, peak_share=1.0)


class CpuLookupTile(LookupKernel):
    name = "cpu_lookup_tile"
    function = "lookup_tile"
    scaling = "weights decoded in fp32 and not rounded; fp32 products and sums, rounded once to x's dtype"

    def supports(self, problem: Problem) -> str | None:
        if problem.batch_invariant and cpu.isa() != "avx2":
            return f"leaves batch_invariant to cpu_linear with {cpu.isa()}, where which is faster depends on the batch"
        return super().supports(problem)

    def cost(self, problem: Problem) -> float:
        return predicted(problem, self.name, decode_rate=10.4, peak_share=1.42)


register_kernel(CpuLookupDot())
register_kernel(CpuLookupTile())
