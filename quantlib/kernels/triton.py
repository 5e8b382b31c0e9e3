"""The generic Triton kernels: every codec kind under every scale and zero kind, in the rows layout.

They need a CUDA device. With TRITON_INTERPRET=1 they also run on the CPU, for tests, and are then never the cheapest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantlib.formats import get_format
from quantlib.kernels.base import Kernel, Problem, register_kernel
from quantlib.kernels.costs import decode_then_matmul, roofline, tuned_efficiency
from quantlib.kernels.reference import round_trip
from quantlib.kernels.triton_launch import (
    CODEC_KINDS,
    SCALE_KINDS,
    dequantize_launch,
    gemv_launch,
    gemv_tile,
    import_failure,
    interpreting,
    linear_launch,
    linear_tile,
)
from quantlib.tensor import QuantizedTensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GEMV_ROWS = 4


def refusal(problem: Problem) -> str | None:
    """Why no Triton kernel can run the problem, or None."""
    fmt, device = problem.format, problem.device
    if device.kind != "cuda" and not interpreting():
        return "Triton needs a CUDA device"
    if device.kind == "cuda" and device.capability < 80:
        return f"Triton kernels need compute capability 8.0 or newer; {device.name} is {device.arch}"
    if problem.dtype not in DTYPES:
        return f"computes in fp16, bf16 or fp32, not in {str(problem.dtype).removeprefix('torch.')}"
    if problem.layout != "rows":
        return f"reads the rows layout; the weight lies in {problem.layout!r}"
    if fmt.codec.kind not in CODEC_KINDS:
        return f"decodes the codec kinds {', '.join(CODEC_KINDS)}, not {fmt.codec.kind!r}"
    if fmt.scale.kind not in SCALE_KINDS:
        return f"decodes the scale kinds {', '.join(SCALE_KINDS)}, not {fmt.scale.kind!r}"
    return import_failure()


def _rows(problem: Problem, x: Tensor) -> Tensor:
    """x as the kernels read it: rounded to the activations' format where there is one, with unit column stride."""
    if problem.activations is not None:
        x = round_trip(x, get_format(problem.activations))
    return x if x.stride(1) == 1 else x.contiguous()


class TritonLinear(Kernel):
    name = "triton_linear"
    backend = "triton"
    operation = "linear"

    def supports(self, problem: Problem) -> str | None:
        return refusal(problem)

    def cost(self, problem: Problem) -> float:
        if interpreting():
            return math.inf
        return roofline(problem, tuned_efficiency(problem.device, self.name, 0.35), peak_share=0.4)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(x.shape[0], weight.shape[0])
        if y.numel():
            # A row's sum must not depend on the batch: one tile for every M then.
            m = 1 if problem.batch_invariant else x.shape[0]
            tile = linear_tile(m, problem.k, x.dtype, problem.device.capability)
            linear_launch(_rows(problem, x), weight, bias, y, tile).run(x.device)
        return y


class TritonGemv(Kernel):
    name = "triton_gemv"
    backend = "triton"
    operation = "linear"

    def supports(self, problem: Problem) -> str | None:
        if problem.m > GEMV_ROWS:
            return f"multiplies up to {GEMV_ROWS} rows; the batch has {problem.m}"
        if problem.batch_invariant:
            return "sums in another order than the kernels of larger batches, and batch_invariant is set"
        return refusal(problem)

    def cost(self, problem: Problem) -> float:
        if interpreting():
            return math.inf
        return roofline(problem, tuned_efficiency(problem.device, self.name, 0.5), peak_share=0.03)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(x.shape[0], weight.shape[0])
        if y.numel():
            tile = gemv_tile(x.shape[0], weight.shape[1])
            gemv_launch(_rows(problem, x), weight, bias, y, tile).run(x.device)
        return y


def dequantize(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """W [N, K] in `dtype`, by the Triton kernel."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.numel():
        dequantize_launch(weight, out).run(weight.device)
    return out


class TritonDequantize(Kernel):
    name = "triton_dequantize"
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


class TritonDgrad(Kernel):
    """dx = dy W: the weight is decoded once by `triton_dequantize`, then multiplied by torch.

    Decoding again for every tile of dy, inside a fused loop, would multiply the work of decoding by the number of tiles.
    """

    name = "triton_dgrad"
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


for _kernel in (TritonGemv(), TritonLinear(), TritonDequantize(), TritonDgrad()):
    register_kernel(_kernel)
