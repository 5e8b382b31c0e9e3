"""Activations in int8 on the CPU (csrc/cpu/int8_*.h): x is rounded to int8, row by row, and multiplied as integers.

For `activations="int8"` alone, never of a kernel's own accord. CPUs with AVX-512 VNNI multiply bytes twice as fast as bf16.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from quantlib.formats.base import Format
from quantlib.formats.codecs import decode
from quantlib.kernels import cpu
from quantlib.kernels.base import Kernel, Problem, register_kernel
from quantlib.kernels.cpu import DTYPES, Packed, in_int8, predicted, quantize_rows, refusal
from quantlib.tensor import QuantizedTensor

UNITS = (1.0, 0.5, 0.25, 0.125)
"""Of what the values of a codec may be whole multiples: of integers, E2M1, E2M3."""
ROWS_AT_ONCE = 1024
"""Rows of x in one call: bounds the memory of fp32 sums."""
LANES = 16
"""Rows of x that one instruction serves, whether they are there or not."""


@lru_cache(maxsize=256)
def unit_of(fmt: Format) -> float | None:
    """The largest of UNITS of which every value of the codec is a whole multiple that int8 holds; None where there is none."""
    values = decode(fmt.codec, torch.arange(len(fmt.codec.entries), dtype=torch.uint8))
    for unit in UNITS:
        whole = values / unit
        if torch.equal(whole, whole.round()) and float(whole.min()) >= -128 and float(whole.max()) <= 127:
            return unit
    return None


class CpuInt8Tile(Kernel):
    name = "cpu_int8_tile"
    backend = "cpu"
    layout = "any"
    operation = "linear"
    scaling = "integer sums over each block of columns; scales and minima of the blocks in fp32, that of the row of x last"

    def supports(self, problem: Problem) -> str | None:
        """Why the kernel can't run the problem, or None."""
        if problem.activations is None:
            return "multiplies activations in int8; none are asked for"
        if not in_int8(problem.activations):
            return f"takes activations in int8, not in {problem.activations}"
        why = refusal(problem)
        if why is not None:
            return why
        if not cpu.has_int8():
            return f"multiplies bytes, which needs AVX-512 VNNI; {cpu.isa()} runs here"
        if problem.batch_invariant:
            return "dispatch takes another kernel for another batch, and batch_invariant is set"
        if unit_of(problem.format) is None:
            return f"multiplies whole numbers up to 127; values of {problem.format} are no multiples of one unit"
        return None

    def cost(self, problem: Problem) -> float:
        lanes = replace(problem, m=-(-max(problem.m, 1) // LANES) * LANES)
        return predicted(lanes, self.name, decode_rate=6.0, peak_share=4.2)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(x.shape[0], weight.shape[0])
        if not y.numel():
            return y
        packed, bias = Packed.of(weight), None if bias is None else bias.to(torch.float32).contiguous()
        for start in range(0, x.shape[0], ROWS_AT_ONCE):
            codes, scales = quantize_rows(x[start : start + ROWS_AT_ONCE])
            cpu.native().int8_tile(
                packed.plan.native,
                packed.native,
                len(codes),
                DTYPES[x.dtype],
                codes.data_ptr(),
                scales.data_ptr(),
                unit_of(problem.format),
                0 if bias is None else bias.data_ptr(),
                y[start:].data_ptr(),
                torch.get_num_threads(),
            )
        return y


register_kernel(CpuInt8Tile())
