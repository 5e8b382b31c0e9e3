"""FP8 times FP8 on Hopper by this package's own kernel (csrc/cuda/sm90/scaled_fp8.h): scales per 128 of K or of whole rows.

Both operands lie as in the rows layout. Tensor cores multiply the codes; every 128 of K both scales multiply their sums, which
are added up in fp32. x is quantized by Triton's kernel; torch's scaled_mm competes in the same table.

Status: run by the emulator and compiled; never run on a GPU so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quantlib.kernels import cuda_module
from quantlib.kernels.activations import activations_of, native_speedup, quantize_activations, quantize_cost
from quantlib.kernels.activations_launch import Activations, element_of, import_failure, pair_refusal
from quantlib.kernels.base import Kernel, Problem, register_kernel
from quantlib.kernels.costs import tuned_efficiency
from quantlib.kernels.cuda_fragments_launch import Deal, Variant, deal
from quantlib.kernels.cuda_scaled import Tile, tile_cost
from quantlib.kernels.workspace import split_workspace
from quantlib.tensor import QuantizedTensor

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
"""Of y -> the launcher's word."""

PEAK_SHARE = {16: 0.12, 32: 0.25, 64: 0.45, 128: 0.7, 256: 0.85}
"""Rows of x in a block of y, beside 128 of W -> the share of the FP8 peak at which its operands come from the L2 cache
(estimates)."""

INVARIANT_ROWS = 128
"""Rows of x in a block where no row may depend on its batch: one number for every batch."""

CODES_MULTIPLE = 16
"""Tensor copies want rows of codes at multiples of 16 bytes."""

SCALING = {(128, 128): "block", (None, None): "block", (1, 128): "row", (1, None): "row"}
"""Block of the weight's format, rows and columns -> how its scales are read: one per block of y, or one per row of W."""


@lru_cache(maxsize=8)
def variants(module: Any) -> tuple[Variant, ...]:
    """The instances in a module, quantlib._cuda or the emulator's."""
    return tuple(Variant(index, **facts) for index, facts in enumerate(module.sm90_scaled_fp8_variants()))


def instances(module: Any, weight_block: tuple[int | None, int | None]) -> tuple[Variant, ...]:
    """The instances for a weight, one for each number of rows of x."""
    return tuple(variant for variant in variants(module) if variant.scaling == SCALING[weight_block])


# operands


@dataclass(frozen=True)
class Operand:
    """One matrix as the kernel reads it.

    codes     uint8 [rows, columns]
    scales    fp32 [turns or 1, pitch]: for each 128 of K, or for all of it, a number per row or per 128 rows; the pitch is a
              multiple of 4
    """

    codes: Tensor
    scales: Tensor

    def argument(self, module: Any) -> Any:
        """The module's Fp8Operand; the caller keeps this object alive for as long."""
        codes, scales = self.codes, self.scales
        return module.Fp8Operand(codes.data_ptr(), codes.shape[1], scales.data_ptr(), scales.shape[1], scales.shape[0] > 1)


def _at_16_bytes(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def activations_operand(a: Activations) -> Operand:
    """x, whose scales lie by column and come in fours (`quantize_activations(by_column=True, rows=...)`), or are one."""
    scales = a.scales.T
    if scales.numel() == 1:
        scales = scales.expand(1, -(-a.codes.shape[0] // 4) * 4)
    return Operand(a.codes, scales.contiguous())


def weight_operand(weight: QuantizedTensor) -> Operand:
    """The weight, made at the first call and kept with it; scales are copied, codes are not."""
    found = weight.memo.get("cuda_sm90_fp8")
    if isinstance(found, Operand):
        return found
    scales = weight.parts["scales"]
    if weight.format.block.rows is None:
        scales = scales.reshape(1, 1).expand(-(-weight.shape[0] // 128), 1)
    by_column = functional.pad(scales.float().T, (0, -scales.shape[0] % 4)).contiguous()
    made = Operand(_at_16_bytes(weight.parts["codes"]), by_column)
    # What is made while a CUDA graph is captured exists only when the graph is replayed.
    if weight.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        weight.memo["cuda_sm90_fp8"] = made
    return made


def multiply(
    module: Any,
    launch: Callable[..., None],
    variant: Variant,
    x: Operand,
    w: Operand,
    k: int,
    bias: Tensor | None,
    y: Tensor,
    dealt: Deal,
    partial: Tensor | None,
    counters: Tensor | None,
    stream: int,
) -> None:
    """y [M, N] = x W^T plus bias [N] of y's dtype: fp16, bf16 or fp32, contiguous.

    launch       the module's sm90_scaled_fp8
    partial      fp32 [2 * programs * rows * columns]; counters: int32 [blocks], zero before and after; None where not shared

    An fp32 result is as exact as sums of 128 products are in tensor cores, that is about as fp16.
    """
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (bias, partial, counters)]
    schedule = module.Schedule(dealt.blocks, dealt.turns, dealt.each, *addresses[1:])
    launch(
        variant.index, x.argument(module), w.argument(module), y.data_ptr(), addresses[0], DTYPES[y.dtype], *y.shape, k,
        schedule, dealt.programs, stream,
    )  # fmt: skip


# the kernel


def tile_of(variant: Variant, shares_k: bool = True) -> Tile:
    """An instance as the cost model sees it. Of the stages in shared memory one is being multiplied."""
    share = PEAK_SHARE[variant.rows]
    return Tile(str(variant.rows), variant.columns, variant.rows, 1, shares_k, share, variant.shared_bytes * 3 // 4)


@lru_cache(maxsize=4096)
def plan(problem: Problem, offered: tuple[Variant, ...]) -> tuple[Variant, Deal]:
    """The instance with the least predicted cost, and how its work is dealt out."""
    m, n, k = problem.m, problem.n, problem.k
    if problem.batch_invariant:
        chosen = next(variant for variant in offered if variant.rows == INVARIANT_ROWS)
        return chosen, deal(m, n, k, chosen, wanted=-(-m // chosen.rows) * -(-n // chosen.columns))
    chosen = min(offered, key=lambda variant: product_cost(problem, variant))
    return chosen, deal(m, n, k, chosen, problem.device.units)


def product_cost(problem: Problem, variant: Variant) -> float:
    """Predicted microseconds of the product at the model's full speed."""
    speedup = native_speedup(problem.format, problem.format)
    return tile_cost(problem, tile_of(variant, shares_k=not problem.batch_invariant), speedup)


class CudaScaledFp8(Kernel):
    """x quantized, then multiplied by wgmma from shared memory, W and x both brought by TMA."""

    name = "cuda_sm90_scaled_fp8"
    backend = "cuda"
    operation = "linear"
    scaling = "codes multiplied by the tensor cores; every 128 of K both scales multiply the sum, and fp32 sums are added up"
    default_efficiency = 0.75

    def supports(self, problem: Problem) -> str | None:
        fmt, device = activations_of(problem), problem.device
        if fmt is None:
            return "multiplies quantized activations; none are asked for"
        if fmt.scale.kind != "float" or element_of(fmt) != "e4m3":
            return f"takes other activations than {fmt}"
        refusal = pair_refusal(fmt, problem.format)
        if refusal is not None:
            return refusal
        block = problem.format.block
        if element_of(problem.format) != "e4m3" or (block.rows, block.cols) not in SCALING:
            return f"takes e4m3 weights with scales per 128 x 128, 1 x 128, channel or tensor, not {problem.format}"
        if device.kind != "cuda":
            return "needs a CUDA device"
        if device.capability != 90:
            return f"uses wgmma, which Hopper (sm_90) alone has; {device.name} is {device.arch}"
        return _problem_refusal(problem) or import_failure() or cuda_module.refusal("sm90/scaled_fp8", device.capability)

    def cost(self, problem: Problem) -> float:
        fmt = activations_of(problem)
        if fmt is None:
            return math.inf
        variant, _ = self.plan(problem)
        efficiency = tuned_efficiency(problem.device, self.name, self.default_efficiency)
        return quantize_cost(problem, fmt) + product_cost(problem, variant) / efficiency

    def plan(self, problem: Problem) -> tuple[Variant, Deal]:
        block = problem.format.block
        return plan(problem, instances(cuda_module.module(), (block.rows, block.cols)))

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        (m, k), n = x.shape, weight.shape[0]
        y = x.new_empty(m, n)
        fmt = activations_of(problem)
        if y.numel() == 0 or fmt is None:
            return y
        variant, dealt = self.plan(problem)
        partial, counters = None, None
        if dealt.shared:
            partial, counters = split_workspace(2 * dealt.programs, variant.rows, variant.columns, dealt.blocks, y.device)
        # A column of scales must begin at a multiple of 16 bytes.
        a = quantize_activations(x, fmt, problem.device.capability, by_column=True, rows=-(-m // 4) * 4)
        bias = None if bias is None else bias.to(y.dtype).contiguous()
        with torch.cuda.device(y.device):
            launch = cuda_module.launcher("sm90_scaled_fp8")
            stream = torch.cuda.current_stream(y.device).cuda_stream
            operands = activations_operand(a), weight_operand(weight)
            multiply(cuda_module.module(), launch, variant, *operands, k, bias, y, dealt, partial, counters, stream)
        return y


def _problem_refusal(problem: Problem) -> str | None:
    """What the kernel can't do of a problem of formats and a chip that it knows, or None."""
    fmt = activations_of(problem)
    assert fmt is not None
    if problem.dtype not in (torch.float16, torch.bfloat16):
        dtype = str(problem.dtype).removeprefix("torch.")
        return f"gives fp16 or bf16, not {dtype}: FP8 tensor cores keep fewer bits of a sum"
    if problem.layout != "rows":
        return f"reads the rows layout; the weight lies in {problem.layout!r}"
    columns = (fmt.padded(problem.k), problem.format.padded(problem.k))
    if problem.k == 0 or any(each % CODES_MULTIPLE for each in columns):
        return f"tensor copies need K in multiples of {CODES_MULTIPLE} where scales are of whole rows; K is {problem.k}"
    if problem.batch_invariant and fmt.block.rows is None:
        return f"{fmt} has one scale for the whole batch, and batch_invariant is set"
    return None


register_kernel(CudaScaledFp8())
