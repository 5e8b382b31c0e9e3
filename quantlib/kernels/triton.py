"""The Triton kernels of the rows layout: every codec kind under every scale and zero kind, any block.

They need a CUDA device. With TRITON_INTERPRET=1 they also run on the CPU, for tests, and are then never the cheapest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantlib.formats import get_format
from quantlib.kernels.base import Kernel, Problem, register_kernel
from quantlib.kernels.costs import Schedule, decode_then_matmul, modelled, round_trip_cost, tuned_efficiency
from quantlib.kernels.reference import round_trip
from quantlib.kernels.triton_launch import (
    CODEC_KINDS,
    SCALE_KINDS,
    import_failure,
    interpreting,
    rows_dequantize_launch,
    rows_linear_launch,
    rows_linear_tile,
)
from quantlib.tensor import QuantizedTensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def refusal(problem: Problem, layout: str = "rows") -> str | None:
    """Why no Triton kernel can run the problem, or None."""
    fmt, device = problem.format, problem.device
    if device.kind != "cuda" and not interpreting():
        return "Triton needs a CUDA device"
    if device.kind == "cuda" and device.capability < 80:
        return f"Triton kernels need compute capability 8.0 or newer; {device.name} is {device.arch}"
    if problem.dtype not in DTYPES:
        return f"computes in fp16, bf16 or fp32, not in {str(problem.dtype).removeprefix('torch.')}"
    if problem.layout != layout:
        return f"reads the {layout} layout; the weight lies in {problem.layout!r}"
    if fmt.codec.kind not in CODEC_KINDS:
        return f"decodes the codec kinds {', '.join(CODEC_KINDS)}, not {fmt.codec.kind!r}"
    if fmt.scale.kind not in SCALE_KINDS:
        return f"decodes the scale kinds {', '.join(SCALE_KINDS)}, not {fmt.scale.kind!r}"
    return import_failure()


def activation_rows(problem: Problem, x: Tensor) -> Tensor:
    """x as the kernels read it: rounded to the activations' format where there is one, with unit column stride."""
    if problem.activations is not None:
        x = round_trip(x, get_format(problem.activations))
    return x if x.stride(1) == 1 else x.contiguous()


class TritonRowsLinear(Kernel):
    name = "triton_rows_linear"
    backend = "triton"
    operation = "linear"

    def supports(self, problem: Problem) -> str | None:
        return refusal(problem)

    def cost(self, problem: Problem) -> float:
        if interpreting():
            return math.inf
        # Decoding byte by byte takes some ten instructions a weight; a program has one tile of loads under way.
        blocks_m = -(-problem.m // (64 if problem.m <= 64 else 128))
        programs = -(-problem.n // 64) * blocks_m
        schedule = Schedule(programs, 4, 64 * 64 * problem.format.codec.bits // 8, blocks_m, instructions=10.0)
        efficiency = tuned_efficiency(problem.device, self.name, 0.5)
        return modelled(problem, schedule, 0.5, efficiency) + round_trip_cost(problem)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(x.shape[0], weight.shape[0])
        if y.numel():
            # A row's sum must not depend on the batch: one tile for every M then.
            m = 1 if problem.batch_invariant else x.shape[0]
            tile = rows_linear_tile(m, problem.k, x.dtype, problem.device.capability)
            rows_linear_launch(activation_rows(problem, x), weight, bias, y, tile).run(x.device)
        return y


def dequantize(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """W [N, K] in `dtype`, by the Triton kernel."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.numel():
        rows_dequantize_launch(weight, out).run(weight.device)
    return out


class TritonRowsDequantize(Kernel):
    name = "triton_rows_dequantize"
    backend = "triton"
    operation = "dequantize"

    def supports(self, problem: Problem) -> str | None:
        return refusal(problem)

    def cost(self, problem: Problem) -> float:
        if interpreting():
            return math.inf
        return decode_then_matmul(problem, tuned_efficiency(problem.device, self.name, 0.6))

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        return dequantize(weight, problem.dtype)


class TritonRowsDgrad(Kernel):
    """dx = dy W: the weight is decoded once by `triton_rows_dequantize`, then multiplied by torch.

    Decoding again for every tile of dy, inside a fused loop, would multiply the work of decoding by the number of tiles.
    """

    name = "triton_rows_dgrad"
    backend = "triton"
    operation = "dgrad"

    def supports(self, problem: Problem) -> str | None:
        return refusal(problem)

    def cost(self, problem: Problem) -> float:
        if interpreting():
            return math.inf
        return decode_then_matmul(problem, tuned_efficiency(problem.device, self.name, 0.6))

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        return x @ dequantize(weight, x.dtype)


for _kernel in (TritonRowsLinear(), TritonRowsDequantize(), TritonRowsDgrad()):
    register_kernel(_kernel)
