"""C++ kernels that multiply pairs of bf16 numbers (csrc/cpu/pairs_*.h), for CPUs with AVX-512 BF16 and VBMI.

Few rows of x run at the speed of memory: codes become bf16 numbers by one look-up, and scales wait for sums of eight columns.
Many rows, and dX, run at the speed of the instruction: blocks of W are decoded to bf16 in the cache.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

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


def pairs_refusal(problem: Problem) -> str | None:
    """Why no kernel of this file can run the problem, or None."""
    why = refusal(problem)
    if why is not None:
        return why
    if not cpu.has_pairs():
        return f"multiplies bf16 pairs, which needs AVX-512 BF16 and VBMI; {cpu.isa()} runs here"
    if problem.batch_invariant:
        return "dispatch takes another kernel for another batch, and batch_invariant is set: cpu_linear serves every one"
    if problem.format.codec.bits not in CODE_BITS:
        return f"looks up codes of {', '.join(map(str, CODE_BITS))} bits, not {problem.format.codec.bits}"
    return None


def _decode_rate(problem: Problem, narrow: float, wide: float) -> float:
    """Weights per ns and thread, as measured: codes of 8 bits, and numbers that are subtracted, take twice the instructions."""
    return narrow if problem.format.codec.bits <= 6 and problem.format.zero == "none" else wide


def _in_chunks(function: Any, packed: Packed, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
    for start in range(0, x.shape[0], ROWS_AT_ONCE):
        packed.product(function, x[start : start + ROWS_AT_ONCE], bias, out[start : start + ROWS_AT_ONCE])


class CpuPairsDot(Kernel):
    name = "cpu_pairs_dot"
    backend = "cpu"
    operation = "linear"
    scaling = (
        "code values in bf16 (exact; entries of code books that bf16 doesn't hold are rounded, for bf16 x alone); scales, "
        "zeros and minima on fp32 sums of eight columns"
    )

    def supports(self, problem: Problem) -> str | None:
        why = pairs_refusal(problem)
        if why is None and problem.dtype is not torch.bfloat16 and not exact_in_bf16(problem.format):
            return f"takes a format whose values bf16 doesn't hold ({problem.format}) for bf16 x alone"
        return why

    def cost(self, problem: Problem) -> float:
        rate = _decode_rate(problem, 60.0, 22.0)
        return predicted(problem, self.name, rate, peak_share=1.68 / PLANES[problem.dtype])

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(x.shape[0], weight.shape[0])
        if y.numel():
            _in_chunks(cpu.native().pairs_dot, Packed.of(weight), rounded_activations(problem, x), bias, y)
        return y


class CpuPairsTile(Kernel):
    name = "cpu_pairs_tile"
    backend = "cpu"
    operation = "linear"
    scaling = ROUNDED_TO_BF16

    def supports(self, problem: Problem) -> str | None:
        if problem.dtype is not torch.bfloat16:
            return f"multiplies bf16; x is {str(problem.dtype).removeprefix('torch.')}"
        return pairs_refusal(problem)

    def cost(self, problem: Problem) -> float:
        return predicted(problem, self.name, _decode_rate(problem, 18.0, 12.0), peak_share=2.0)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(x.shape[0], weight.shape[0])
        if y.numel():
            _in_chunks(cpu.native().pairs_tile, Packed.of(weight), rounded_activations(problem, x), bias, y)
        return y


class CpuPairsDgrad(Kernel):
    name = "cpu_pairs_dgrad"
    backend = "cpu"
    operation = "dgrad"
    scaling = ROUNDED_TO_BF16

    def supports(self, problem: Problem) -> str | None:
        if problem.dtype is not torch.bfloat16:
            return f"multiplies bf16; dY is {str(problem.dtype).removeprefix('torch.')}"
        return pairs_refusal(problem)

    def cost(self, problem: Problem) -> float:
        return predicted(problem, self.name, _decode_rate(problem, 9.0, 7.0), peak_share=1.9)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        if weight.shape[0] == 0:
            return x.new_zeros(x.shape[0], weight.shape[1])
        dx = x.new_empty(x.shape[0], weight.shape[1])
        if dx.numel():
            _in_chunks(cpu.native().pairs_dgrad, Packed.of(weight), x, None, dx)
        return dx


register_kernel(CpuPairsDot())
register_kernel(CpuPairsTile())
register_kernel(CpuPairsDgrad())
