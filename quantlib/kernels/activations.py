"""Kernels for low-precision activations: x is quantized in one pass, then multiplied with a quantized weight as both lie.

The numbers are those that `round_trip` (quantlib.kernels.reference) stands for, on every device: natively where the chip
multiplies the formats, otherwise decoded by hand. `round_trip` rounds decoded numbers to x's dtype; here they aren't rounded.

Where x holds a NaN or an infinity, the law raises for float scales; these kernels, which can't wait for an answer from the GPU,
give NaN for every row that shares a scale with it.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from quantlib.formats import get_format
from quantlib.formats.base import Format
from quantlib.kernels.activations_launch import (
    LONGEST_INT8_ROW,
    Activations,
    element_of,
    empty_activations,
    gemm_launch,
    import_failure,
    math_of,
    pair_refusal,
    quantize_launches,
)
from quantlib.kernels.base import Kernel, Problem, register_kernel
from quantlib.kernels.costs import packed_bytes, tuned_efficiency
from quantlib.kernels.triton_launch import interpreting
from quantlib.tensor import QuantizedTensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

DECODED_SHARE = 0.25
"""The share of the 16-bit peak that is left where both operands are decoded in registers for every tile."""


def capability_of(problem: Problem) -> int:
    """The capability that kernels are built for: 0 in Triton's interpreter, which has no instruction of any chip."""
    return 0 if interpreting() else problem.device.capability


def quantize_activations(
    x: Tensor,
    fmt: Format,
    capability: int,
    *,
    swizzled: bool = False,
    by_column: bool = False,
    rows: int | None = None,
    global_scale: Tensor | None = None,
) -> Activations:
    """x [M, K], any strides -> its codes and scales, bit for bit those of `fmt.fit` and `fmt.encode`.

    swizzled, by_column   forms of the scales (activations_launch.empty_activations)
    rows                  at least M: room for so many rows, those from M on left as they are
    global_scale          nvfp4: a given fp32 multiplier instead of the one that x itself leads to
    """
    m, k = x.shape
    out = empty_activations(fmt, m if rows is None else rows, k, x.device, swizzled, by_column)
    if global_scale is not None and out.global_scale is not None:
        out.global_scale.copy_(global_scale)
    if m:
        x = x if x.stride(1) == 1 else x.contiguous()
        for launch in quantize_launches(x, out, global_scale is None, capability):
            launch.run(x.device)
    return out


def quantize_cost(problem: Problem, fmt: Format) -> float:
    """Predicted microseconds of quantizing x to the format."""
    read = problem.m * problem.k * problem.dtype.itemsize
    # What is one per tensor takes a pass of its own before the codes.
    passes = 2 if fmt.scale.kind == "e4m3_global" or fmt.block.rows is None else 1
    total = passes * read + fmt.nbytes(problem.m, problem.k)
    return total / (problem.device.bandwidth * 1e3) / tuned_efficiency(problem.device, "triton_quantize", 0.7)


def native_speedup(activations: Format, weight: Format) -> float:
    """Multiples of the 16-bit peak at which tensor cores multiply the two formats, where they do."""
    return 4.0 if {element_of(activations), element_of(weight)} == {"e2m1"} else 2.0


def product_cost(problem: Problem, fmt: Format, speedup: float, efficiency: float) -> float:
    """Predicted microseconds of the product of quantized operands; `speedup`: its peak as a multiple of the 16-bit one."""
    device = problem.device
    result = problem.m * problem.n * problem.dtype.itemsize
    memory = (packed_bytes(problem) + fmt.nbytes(problem.m, problem.k) + result) / (device.bandwidth * 1e3)
    compute = 2 * problem.m * problem.n * problem.k / (device.peak_tflops * 1e6 * speedup)
    return max(memory, compute) / efficiency


def activations_of(problem: Problem) -> Format | None:
    """The format that x is quantized to, or None."""
    return None if problem.activations is None else get_format(problem.activations)


class ScaledLinear(Kernel):
    """x quantized by `quantize`, multiplied by `scaled_gemm`. Subclasses name the kind of activations that they take."""

    backend = "triton"
    operation = "linear"
    element: ClassVar[str | None] = None
    scale: ClassVar[str] = "float"

    def supports(self, problem: Problem) -> str | None:
        fmt, device = activations_of(problem), problem.device
        if fmt is None:
            return "multiplies quantized activations; none are asked for"
        if fmt.scale.kind != self.scale or (self.element is not None and element_of(fmt) != self.element):
            return f"takes other activations than {fmt}"
        if device.kind != "cuda" and not interpreting():
            return "Triton needs a CUDA device"
        if device.kind == "cuda" and device.capability < 80:
            return f"Triton kernels need compute capability 8.0 or newer; {device.name} is {device.arch}"
        if problem.dtype not in DTYPES:
            return f"computes in fp16, bf16 or fp32, not in {str(problem.dtype).removeprefix('torch.')}"
        if problem.layout != "rows":
            return f"reads the rows layout; the weight lies in {problem.layout!r}"
        refusal = pair_refusal(fmt, problem.format)
        if refusal is not None:
            return refusal
        if element_of(fmt) == "int8" and problem.k > LONGEST_INT8_ROW:
            return f"sums int8 products in int32, which holds K up to {LONGEST_INT8_ROW}; K is {problem.k}"
        if problem.batch_invariant and (fmt.scale.kind == "e4m3_global" or fmt.block.rows is None):
            return f"{fmt} has one scale for the whole batch, and batch_invariant is set"
        return import_failure()

    def cost(self, problem: Problem) -> float:
        fmt = activations_of(problem)
        if interpreting() or fmt is None:
            return math.inf
        math_kind, _ = math_of(fmt, problem.dtype, problem.device.capability)
        speedup = DECODED_SHARE if math_kind == "decode" else native_speedup(fmt, problem.format)
        if problem.dtype == torch.float32 and math_kind == "decode":
            speedup = 0.03
        efficiency = tuned_efficiency(problem.device, self.name, 0.6)
        return quantize_cost(problem, fmt) + product_cost(problem, fmt, speedup, efficiency)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(x.shape[0], weight.shape[0])
        fmt = activations_of(problem)
        if y.numel() and fmt is not None:
            capability = capability_of(problem)
            quantized = quantize_activations(x, fmt, capability)
            launch = gemm_launch(quantized, weight, bias, y, capability, batch_invariant=problem.batch_invariant)
            launch.run(x.device)
        return y


class ScaledFp8(ScaledLinear):
    """FP8 activations per token, tensor or 1x128 and FP8 weights per channel, tensor, 1x128 or 128x128."""

    name = "triton_scaled_fp8"
    element = "e4m3"
    scaling = "codes multiplied as they are (sm_80: in fp16, exactly); scales multiply fp32 sums, those along K every 128"


class ScaledInt8(ScaledLinear):
    """INT8 activations per token or tensor and INT8 weights per channel or tensor."""

    name = "triton_scaled_int8"
    element = "int8"
    scaling = "exact int32 sums of codes; scales multiply the sum in fp32"


class ScaledMx(ScaledLinear):
    """MXFP8 or MXFP4 activations and weights, in any combination."""

    name = "triton_scaled_mx"
    scale = "e8m0"
    scaling = "codes and block scales multiplied as they are (natively, or decoded exactly); fp32 sums"


class ScaledNvfp4(ScaledLinear):
    """NVFP4 activations and weights."""

    name = "triton_scaled_nvfp4"
    scale = "e4m3_global"
    scaling = "codes and block scales multiplied as they are (natively, or decoded exactly); global scales multiply fp32 sums"


for _kernel in (ScaledFp8(), ScaledInt8(), ScaledMx(), ScaledNvfp4()):
    register_kernel(_kernel)
