"""torch's own product of quantized operands (cuBLASLt, CUTLASS), which competes in the table: where it is faster, it runs.

torch.nn.functional.scaled_mm in torch 2.11 and later takes FP8 with one scale per tensor, per row, or per 1x128 and 128x128
(Hopper alone), and NVFP4 and MXFP8 with scales in the 128x4 order (sm_100 and later). x is quantized by this package's kernels,
which write that order directly. N and K must be multiples of 16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

from quantlib.kernels.activations import (
    activations_of,
    native_speedup,
    product_cost,
    quantize_activations,
    quantize_cost,
)
from quantlib.kernels.activations_launch import Activations, element_of, import_failure, pair_refusal
from quantlib.kernels.base import Kernel, Problem, register_kernel
from quantlib.kernels.costs import tuned_efficiency
from quantlib.kernels.triton_launch import interpreting
from quantlib.layouts.swizzled import swizzle
from quantlib.tensor import QuantizedTensor

DTYPES = (torch.float16, torch.bfloat16)
_SWIZZLED = SwizzleType.SWIZZLE_32_4_4


@dataclass(frozen=True)
class Operands:
    """The arguments of torch's scaled_mm: two matrices, their scales with their recipes, and whether scales are swizzled.

    a [M, K] row-major and w [K, N] column-major, FP8 or packed pairs of E2M1.
    """

    a: Tensor
    w: Tensor
    a_scales: list[Tensor]
    w_scales: list[Tensor]
    a_recipe: list[ScalingType]
    w_recipe: list[ScalingType]
    swizzled: bool

    def multiply(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The product [M, N] in `dtype`, plus bias [N]; sums in fp32 (Hopper's fast accumulation is left off)."""
        order = [_SWIZZLED, SwizzleType.NO_SWIZZLE][: len(self.a_recipe)] if self.swizzled else None
        return scaled_mm(
            self.a, self.w, self.a_scales, self.a_recipe, self.w_scales, self.w_recipe, order, order, bias, dtype
        )  # fmt: skip


def row_operands(a: Activations, weight: QuantizedTensor) -> Operands:
    """FP8 with one scale per row of each, or one for each."""
    by_tensor = a.format.block.rows is None and weight.format.block.rows is None
    n = weight.shape[0]
    w_scales = weight.parts["scales"].reshape(1, -1)
    a_scales = a.scales.reshape(-1, 1)
    if not by_tensor:
        w_scales = w_scales.expand(1, n).contiguous()
        a_scales = a_scales.expand(a.shape[0], 1).contiguous()
    recipe = [ScalingType.TensorWise if by_tensor else ScalingType.RowWise]
    return Operands(*_fp8_codes(a, weight), [a_scales], [w_scales], recipe, recipe, False)


def block_operands(a: Activations, weight: QuantizedTensor) -> Operands:
    """FP8 1x128 times 128x128 or 1x128; the scales of a lie by column. 128x128 scales are padded to four along K."""
    scales = weight.parts["scales"]
    if weight.format.block.rows == 1:
        w_scales, recipe = scales.T.contiguous().T, ScalingType.BlockWise1x128
    else:
        w_scales, recipe = functional.pad(scales, (0, -scales.shape[1] % 4)).T, ScalingType.BlockWise128x128
    return Operands(*_fp8_codes(a, weight), [a.scales], [w_scales], [ScalingType.BlockWise1x128], [recipe], False)


def mx_operands(a: Activations, weight: QuantizedTensor) -> Operands:
    """MXFP8 times MXFP8; the scales of a are swizzled."""
    w_scales = swizzle(weight.parts["scales"]).view(torch.float8_e8m0fnu)
    recipe = [ScalingType.BlockWise1x32]
    return Operands(*_fp8_codes(a, weight), [a.scales.view(torch.float8_e8m0fnu)], [w_scales], recipe, recipe, True)


def nvfp4_operands(a: Activations, weight: QuantizedTensor) -> Operands:
    """NVFP4 times NVFP4; the scales of a are swizzled, and both tensors have a global scale."""
    codes = (part.view(torch.float4_e2m1fn_x2) for part in (a.codes, weight.parts["codes"]))
    matrix, transposed = next(codes), next(codes).T
    assert a.global_scale is not None
    a_scales = [a.scales.view(torch.float8_e4m3fn), a.global_scale]
    w_scales = [swizzle(weight.parts["scales"]).view(torch.float8_e4m3fn), weight.parts["global_scale"]]
    recipe = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    return Operands(matrix, transposed, a_scales, w_scales, recipe, recipe, True)


_FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def _fp8_codes(a: Activations, weight: QuantizedTensor) -> tuple[Tensor, Tensor]:
    matrix = a.codes.view(_FP8[element_of(a.format) or ""])
    return matrix, weight.parts["codes"].view(_FP8[element_of(weight.format) or ""]).T


class TorchScaled(Kernel):
    """x quantized by this package, multiplied by torch.nn.functional.scaled_mm."""

    backend = "torch"
    operation = "linear"
    scaling = "codes and block scales multiplied by cuBLASLt or CUTLASS; other scales multiply fp32 sums"
    needs: ClassVar[tuple[int, ...]]
    """The capabilities that torch accepts: from the first on, to the last where there are two."""
    takes: ClassVar[str]
    """What activations and weights, in words."""

    def matches(self, problem: Problem) -> bool:
        """Whether the formats are those that the kernel takes."""
        raise NotImplementedError

    def operands(self, x: Tensor, weight: QuantizedTensor, problem: Problem) -> Operands:
        """x, quantized, and the weight, as scaled_mm takes them."""
        raise NotImplementedError

    def supports(self, problem: Problem) -> str | None:
        fmt, device = activations_of(problem), problem.device
        if fmt is None:
            return "multiplies quantized activations; none are asked for"
        if pair_refusal(fmt, problem.format) is not None or not self.matches(problem):
            return f"takes {self.takes}, not {fmt} and {problem.format}"
        if device.kind != "cuda" or interpreting():
            return "torch's scaled_mm needs a CUDA device"
        low, high = self.needs[0], self.needs[-1] if len(self.needs) > 1 else math.inf
        if not low <= device.capability <= high:
            chips = f"sm_{low}" if high == low else f"sm_{low} or newer"
            return f"torch's scaled_mm needs {chips} for {self.takes}; {device.name} is {device.arch}"
        if problem.layout != "rows":
            return f"reads the rows layout; the weight lies in {problem.layout!r}"
        if problem.dtype not in DTYPES:
            return f"gives fp16 or bf16, not {str(problem.dtype).removeprefix('torch.')}"
        multiple = 32 if element_of(fmt) == "e2m1" else 16
        if problem.n % 16 or problem.k % multiple:
            return f"needs N in multiples of 16 and K of {multiple}; the weight is [{problem.n}, {problem.k}]"
        if problem.batch_invariant:
            return "torch picks its algorithm by M, and batch_invariant is set"
        return import_failure()

    def cost(self, problem: Problem) -> float:
        fmt = activations_of(problem)
        if fmt is None:
            return math.inf
        efficiency = tuned_efficiency(problem.device, self.name, 0.7)
        product = product_cost(problem, fmt, native_speedup(fmt, problem.format), efficiency)
        return quantize_cost(problem, fmt) + self.reorder_cost(problem) + product

    def reorder_cost(self, problem: Problem) -> float:
        """Predicted microseconds of bringing the weight's scales into torch's order."""
        return 0.0

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        m = x.shape[0]
        if m * weight.shape[0] == 0:
            return x.new_empty(m, weight.shape[0])
        return self.operands(x, weight, problem).multiply(bias, x.dtype)[:m]


class TorchScaledFp8(TorchScaled):
    name = "torch_scaled_fp8"
    needs = (89,)
    takes = "fp8 activations and weights of one scale per row or tensor"

    def matches(self, problem: Problem) -> bool:
        fmt = activations_of(problem)
        whole = fmt is not None and fmt.block.cols is None and problem.format.block.cols is None
        return whole and fmt is not None and element_of(fmt) == "e4m3" and fmt.scale.kind == "float"

    def supports(self, problem: Problem) -> str | None:
        refusal = super().supports(problem)
        fmt = activations_of(problem)
        if refusal is not None or fmt is None:
            return refusal
        by_tensor = fmt.block.rows is None and problem.format.block.rows is None
        if problem.dtype != torch.bfloat16 and not by_tensor:
            return "torch's scaled_mm with one scale per row gives bf16 alone"
        if element_of(problem.format) != "e4m3" and not by_tensor:
            return "torch's scaled_mm with one scale per row takes e4m3 weights alone"
        return None

    def operands(self, x: Tensor, weight: QuantizedTensor, problem: Problem) -> Operands:
        fmt = activations_of(problem)
        assert fmt is not None
        return row_operands(quantize_activations(x, fmt, problem.device.capability), weight)


class TorchScaledFp8Blocks(TorchScaled):
    name = "torch_scaled_fp8_blocks"
    needs = (90, 90)
    takes = "fp8-g128 activations and fp8-block128 or fp8-g128 weights"

    def matches(self, problem: Problem) -> bool:
        fmt = activations_of(problem)
        blocks = (problem.format.block.rows, problem.format.block.cols)
        return fmt is not None and (fmt.block.cols == 128) and blocks in ((128, 128), (1, 128))

    def supports(self, problem: Problem) -> str | None:
        refusal = super().supports(problem)
        if refusal is None and problem.k % 128:
            return f"needs K in multiples of 128; K is {problem.k}"
        return refusal

    def operands(self, x: Tensor, weight: QuantizedTensor, problem: Problem) -> Operands:
        fmt = activations_of(problem)
        assert fmt is not None
        # A column of scales must start at a multiple of 16 bytes.
        rows = -(-x.shape[0] // 4) * 4
        return block_operands(quantize_activations(x, fmt, problem.device.capability, by_column=True, rows=rows), weight)


class _Swizzled(TorchScaled):
    needs = (100,)

    def reorder_cost(self, problem: Problem) -> float:
        scales = problem.format.specs(problem.n, problem.k)["scales"].nbytes
        return 2 * scales / (problem.device.bandwidth * 1e3)

    def quantized(self, x: Tensor, problem: Problem) -> Activations:
        """x with its scales in the 128x4 order."""
        fmt = activations_of(problem)
        assert fmt is not None
        return quantize_activations(x, fmt, problem.device.capability, swizzled=True)


class TorchScaledMxfp8(_Swizzled):
    name = "torch_scaled_mxfp8"
    takes = "mxfp8 activations and mxfp8 weights, not both e5m2"

    def matches(self, problem: Problem) -> bool:
        fmt = activations_of(problem)
        elements = {None if fmt is None else element_of(fmt), element_of(problem.format)}
        return fmt is not None and fmt.scale.kind == "e8m0" and elements in ({"e4m3"}, {"e4m3", "e5m2"})

    def operands(self, x: Tensor, weight: QuantizedTensor, problem: Problem) -> Operands:
        return mx_operands(self.quantized(x, problem), weight)


class TorchScaledNvfp4(_Swizzled):
    name = "torch_scaled_nvfp4"
    takes = "nvfp4 activations and nvfp4 weights"

    def matches(self, problem: Problem) -> bool:
        fmt = activations_of(problem)
        return fmt is not None and fmt.scale.kind == "e4m3_global"

    def operands(self, x: Tensor, weight: QuantizedTensor, problem: Problem) -> Operands:
        return nvfp4_operands(self.quantized(x, problem), weight)


for _kernel in (TorchScaledFp8(), TorchScaledFp8Blocks(), TorchScaledMxfp8(), TorchScaledNvfp4()):
    register_kernel(_kernel)
