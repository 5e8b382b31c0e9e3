"""The CUDA C++ kernels of the fragments layout (csrc/cuda/sm80): gemv, linear_frag and dgrad_frag, for every chip since sm_80.

They read the same packed weight as the Triton kernels and compete with them in the same table. Status: run by the emulator,
bit for bit where a kernel says so, and compiled; never run on a GPU so far.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quantlib.kernels import cuda_module
from quantlib.kernels.base import Kernel, Problem, register_kernel
from quantlib.kernels.costs import Schedule, modelled, round_trip_cost, tuned_efficiency
from quantlib.kernels.cuda_fragments_launch import (
    DTYPES,
    Deal,
    Variant,
    aligned_rows,
    arithmetic,
    deal,
    launch_dgrad,
    launch_linear,
    variants,
    weight_argument,
    weight_tensors,
)
from quantlib.kernels.triton import activation_rows
from quantlib.kernels.workspace import split_workspace
from quantlib.layouts import fragments
from quantlib.tensor import QuantizedTensor

GEMV_ROWS = 8
LINEAR_ROWS = 256
PEAK_SHARE = {8: 0.15, 16: 0.25, 32: 0.4, 64: 0.6}
"""Rows of x or dY in a block -> the share of the matrix peak that its instructions reach (estimates)."""
INSTRUCTIONS = {"int4": 1.4, "table": 2.0, "float4": 2.1}
"""Codec -> machine instructions per decoded weight, counted by bench/cuda_decode.py; others take about OTHER_INSTRUCTIONS."""
OTHER_INSTRUCTIONS = 2.5


@lru_cache(maxsize=256)
def instances(kernel: str, codec: str, scaling: str, dtype: torch.dtype) -> tuple[Variant, ...]:
    """The built instances that decode a format; loads quantlib._cuda."""
    found = variants(cuda_module.module(), kernel)
    return tuple(each for each in found if (each.codec, each.scaling, each.dtype) == (codec, scaling, DTYPES[dtype]))


SHARED_KB = {80: 164, 90: 228, 100: 228, 103: 228}
"""Compute capability -> shared memory of one multiprocessor; the others have 100 KB."""


def programs_per_unit(variant: Variant, capability: int) -> int:
    """How many programs one multiprocessor holds: __launch_bounds__ leaves registers for two of up to 16 rows."""
    by_shared = SHARED_KB.get(capability, 100) * 1024 // (variant.shared_bytes + 1024)
    return max(1, min(by_shared, 2 if variant.rows <= 16 else 1))


class CudaFragmentKernel(Kernel):
    """What these kernels share: who they refuse, their instances, what they cost, how they are launched."""

    backend = "cuda"
    layout = "fragments"
    default_efficiency = 0.65

    @abstractmethod
    def most_rows(self) -> int | None:
        """Rows of x or dY up to which the kernel is offered; None: any number."""

    def supports(self, problem: Problem) -> str | None:
        most = self.most_rows()
        if problem.device.kind != "cuda":
            return "needs a CUDA device"
        if problem.device.capability < 80:
            return f"these kernels need compute capability 8.0 or newer; {problem.device.name} is {problem.device.arch}"
        if problem.layout != self.layout:
            return f"reads the {self.layout} layout; the weight lies in {problem.layout!r}"
        if problem.dtype not in DTYPES:
            return f"multiplies in fp16 or bf16, not in {str(problem.dtype).removeprefix('torch.')}"
        if most is not None and problem.m > most:
            return f"multiplies up to {most} rows; the batch has {problem.m}"
        if problem.batch_invariant:
            return "its tile and its shares of the sum follow the batch, and batch_invariant is set"
        found = arithmetic(problem.format, problem.dtype)
        if isinstance(found, str):
            return found
        return fragments.supports(problem.format) or cuda_module.refusal("sm80", problem.device.capability)

    def reduction(self, problem: Problem) -> tuple[int, int]:
        """(columns of the result, depth of the sum)."""
        return problem.n, problem.k

    def instances(self, problem: Problem) -> tuple[Variant, ...]:
        found = arithmetic(problem.format, problem.dtype)
        assert not isinstance(found, str)
        return instances(self.name.removeprefix("cuda_"), *found, problem.dtype)

    def plan(self, problem: Problem) -> tuple[Variant, Deal]:
        """The instance with the least predicted cost, and how its work is dealt out."""
        across, depth = self.reduction(problem)
        device = problem.device
        plans = [
            (each, deal(problem.m, across, depth, each, device.units * programs_per_unit(each, device.capability)))
            for each in self.instances(problem)
        ]
        return min(plans, key=lambda plan: self.plan_cost(problem, *plan))

    def plan_cost(self, problem: Problem, variant: Variant, dealt: Deal) -> float:
        """Predicted microseconds of an instance."""
        stage = variant.shared_bytes * 2 // 3  # of three stages, two are under way
        instructions = INSTRUCTIONS.get(variant.codec, OTHER_INSTRUCTIONS)
        blocks_m = -(-problem.m // variant.rows)
        per_unit = programs_per_unit(variant, problem.device.capability)
        schedule = Schedule(dealt.programs, per_unit, stage, blocks_m, instructions)
        sums = 2 * dealt.programs * variant.rows * variant.columns if dealt.shared else 0
        efficiency = tuned_efficiency(problem.device, self.name, self.default_efficiency)
        return modelled(problem, schedule, PEAK_SHARE[variant.rows], efficiency, sums)

    def cost(self, problem: Problem) -> float:
        if problem.m == 0:
            return 0.0
        return self.plan_cost(problem, *self.plan(problem)) + round_trip_cost(problem)

    def prepared(self, problem: Problem, weight: QuantizedTensor) -> tuple[Any, Variant, Deal]:
        """The weight's argument and the plan, kept with the weight."""
        key = (self.name, problem.m, problem.dtype)
        found = weight.memo.get(key)
        if found is None:
            # weight_tensors go along: the argument holds their addresses only.
            argument = (weight_argument(cuda_module.module(), weight), weight_tensors(weight))
            found = weight.memo[key] = (argument, *self.plan(problem))
        (argument, _), variant, dealt = found
        return argument, variant, dealt

    def workspace(self, variant: Variant, dealt: Deal, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        if not dealt.shared:
            return None, None
        return split_workspace(2 * dealt.programs, variant.rows, variant.columns, dealt.blocks, device)


class CudaLinear(CudaFragmentKernel):
    """What gemv and linear_frag share; `columns`: x is whole up to a multiple of them."""

    operation = "linear"
    scaling = (
        "numbers exact in 16 bits times x (code books rounded to 16 bits), scales applied to fp32 sums; NVFP4's in the weight"
    )
    columns = 8

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        n = weight.shape[0]
        y = x.new_empty(x.shape[0], n)
        if y.numel() == 0:
            return y
        argument, variant, dealt = self.prepared(problem, weight)
        rows = aligned_rows(activation_rows(problem, x), self.columns)
        partial, counters = self.workspace(variant, dealt, y.device)
        with torch.cuda.device(y.device):
            launch = cuda_module.launcher(self.name.removeprefix("cuda_"))
            stream = torch.cuda.current_stream(y.device).cuda_stream
            bias = None if bias is None else bias.contiguous()
            launch_linear(
                cuda_module.module(), launch, variant, argument, rows, n, bias, None, y, dealt, partial, counters, stream
            )
        return y


class CudaGemv(CudaLinear):
    name = "cuda_sm80_gemv"
    columns = 128

    def most_rows(self) -> int | None:
        return GEMV_ROWS


class CudaLinearFrag(CudaLinear):
    name = "cuda_sm80_linear_frag"

    def most_rows(self) -> int | None:
        return LINEAR_ROWS


class CudaDgradFrag(CudaFragmentKernel):
    """dx = dy W from the forward pass's packed weight."""

    name = "cuda_sm80_dgrad_frag"
    operation = "dgrad"
    scaling = "weights as the law, or exact in 16 bits (NVFP4)"

    def most_rows(self) -> int | None:
        return None

    def reduction(self, problem: Problem) -> tuple[int, int]:
        return problem.k, problem.n

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        dx = x.new_empty(x.shape[0], weight.shape[1])
        if dx.numel() == 0:
            return dx
        argument, variant, dealt = self.prepared(problem, weight)
        dy = aligned_rows(x)
        partial, counters = self.workspace(variant, dealt, dx.device)
        with torch.cuda.device(dx.device):
            launch = cuda_module.launcher(self.name.removeprefix("cuda_"))
            stream = torch.cuda.current_stream(dx.device).cuda_stream
            launch_dgrad(cuda_module.module(), launch, variant, argument, dy, dx, dealt, partial, counters, stream)
        return dx


for _kernel in (CudaGemv(), CudaLinearFrag(), CudaDgradFrag()):
    register_kernel(_kernel)
