"""The reference kernels: the format's law and torch's matmul. They run every problem, and end every search for a kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from quantlib.formats import get_format
from quantlib.formats.base import Format
from quantlib.kernels.base import Kernel, Problem, register_kernel
from quantlib.kernels.costs import decode_then_matmul, round_trip_cost
from quantlib.tensor import QuantizedTensor


def round_trip(x: Tensor, fmt: Format) -> Tensor:
    """x [M, K] rounded to a format and back, in x's dtype: what low-precision activations mean, on any device."""
    parts = fmt.fit(x)
    m, k = x.shape
    return fmt.decode({"codes": fmt.encode(x, parts), **parts}, m, k, x.dtype)


class ReferenceLinear(Kernel):
    name = "reference_linear"
    layout = "any"
    backend = "reference"
    operation = "linear"

    def supports(self, problem: Problem) -> str | None:
        return None

    def cost(self, problem: Problem) -> float:
        return decode_then_matmul(problem, efficiency=0.05) + round_trip_cost(problem)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        if problem.activations is not None:
            x = round_trip(x, get_format(problem.activations))
        x, decoded = x.contiguous(), weight.dequantize(x.dtype)
        if problem.batch_invariant and len(x) > 1:
            return torch.cat([functional.linear(row, decoded, bias) for row in x.split(1)])
        return functional.linear(x, decoded, bias)


class ReferenceDgrad(Kernel):
    name = "reference_dgrad"
    layout = "any"
    backend = "reference"
    operation = "dgrad"

    def supports(self, problem: Problem) -> str | None:
        return None

    def cost(self, problem: Problem) -> float:
        return decode_then_matmul(problem, efficiency=0.05)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        return x @ weight.dequantize(x.dtype)


class ReferenceDequantize(Kernel):
    name = "reference_dequantize"
    layout = "any"
    backend = "reference"
    operation = "dequantize"

    def supports(self, problem: Problem) -> str | None:
        return None

    def cost(self, problem: Problem) -> float:
        return decode_then_matmul(problem, efficiency=0.05)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        return weight.dequantize(problem.dtype)


for _kernel in (ReferenceLinear(), ReferenceDgrad(), ReferenceDequantize()):
    register_kernel(_kernel)

__all__ = ["ReferenceDequantize", "ReferenceDgrad", "ReferenceLinear", "round_trip"]
