"""What a kernel is, what it is asked (Problem), and the table of all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import count
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quantlib.devices import Device
from quantlib.errors import KernelError
from quantlib.experts import QuantizedExperts
from quantlib.formats.base import Format
from quantlib.tensor import QuantizedTensor

Operation = Literal["linear", "dgrad", "dequantize", "grouped", "grouped_dgrad"]
Backend = Literal["reference", "cpu", "triton", "cuda", "torch"]


@dataclass(frozen=True)
class Problem:
    """One multiplication as dispatch sees it.

    operation    "linear" y[M,N] = x[M,K] W^T + bias; "dgrad" dx[M,K] = dy[M,N] W; "dequantize" W[N,K]; "grouped" and
                 "grouped_dgrad" are linear and dgrad with a W for each row, out of `experts`
    m, n, k      W is [n, k]; m is the number of rows of x or dy (0 for dequantize), of y or dx where they are grouped
    dtype        of x and of the result
    activations  None, or the format that x is rounded to before multiplying
    device       facts about where x lies
    deterministic, batch_invariant    what the result must not depend on: the run; the batch
    """

    operation: Operation
    m: int
    n: int
    k: int
    dtype: torch.dtype
    format: Format
    layout: str
    activations: str | None
    device: Device
    deterministic: bool = True
    batch_invariant: bool = False
    experts: int = 1


class Declaration(ABC):
    """What dispatch knows of a kernel. Instances are registered with `register_kernel` in the file that launches them.

    A kernel declares codec and scale KINDS (`fmt.codec.kind`, `fmt.scale.kind`), never formats. `layout` is the one that its
    weights lie in, or "any".
    """

    name: ClassVar[str]
    backend: ClassVar[Backend]
    operation: ClassVar[Operation]
    layout: ClassVar[str] = "rows"
    scaling: ClassVar[str] = "weights decoded in fp32 and rounded once to x's dtype"

    @abstractmethod
    def supports(self, problem: Problem) -> str | None:
        """None where the kernel can run the problem; otherwise why not, in words that a user understands."""

    @abstractmethod
    def cost(self, problem: Problem) -> float:
        """Predicted microseconds."""


class Kernel(Declaration):
    """One way to run an operation with one weight."""

    @abstractmethod
    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        """linear: x [M, K] -> y [M, N]. dgrad: x is dy [M, N] -> dx [M, K]. dequantize: x is an empty tensor of the wanted
        dtype -> W [N, K]. x may have any strides; the result is new, contiguous, of x's dtype. M may be 0."""


@dataclass(frozen=True)
class Grouping:
    """Which expert the rows of y or dx belong to; nothing here is ever read by the host of a GPU.

    offsets      int32 [E + 1], ascending from 0: row t belongs to expert e where offsets[e] <= t < offsets[e + 1]. Rows behind
                 offsets[E] belong to no expert and come out as zeros
    rows         int32 [T]: the row of x that each row of y reads; None where it is its own
    row_scale    float [T]: what each row of the result is multiplied by; or None
    """

    offsets: Tensor
    rows: Tensor | None = None
    row_scale: Tensor | None = None


class GroupedKernel(Declaration):
    """One way to run an operation with the weights of several experts."""

    @abstractmethod
    def run(self, problem: Problem, x: Tensor, weight: QuantizedExperts, grouping: Grouping, bias: Tensor | None) -> Tensor:
        """grouped: x [M, K], bias [E, N] -> y [T, N]. grouped_dgrad: x is dy [T, N], rows and bias are None -> dx [T, K].
        x may have any strides; the result is new, contiguous, of x's dtype. T and E may be 0."""


_KERNELS: dict[str, Declaration] = {}
_changes = count()
_generation = next(_changes)


def generation() -> int:
    """A number that changes whenever the table does: what was chosen from it before may be chosen otherwise now."""
    return _generation


def _changed() -> None:
    global _generation
    _generation = next(_changes)


def register_kernel(kernel: Declaration) -> None:
    """Add a kernel to the table. Raises KernelError where its name is taken."""
    if kernel.name in _KERNELS:
        raise KernelError(f"kernel {kernel.name!r} is registered already")
    _KERNELS[kernel.name] = kernel
    _changed()


def unregister_kernel(name: str) -> None:
    """Take a kernel out again (for tests)."""
    _KERNELS.pop(name, None)
    _changed()


def declarations(operation: str | None = None) -> list[Declaration]:
    """Every registered kernel, or those of one operation."""
    return [kernel for kernel in _KERNELS.values() if operation is None or kernel.operation == operation]


def list_kernels(operation: str | None = None) -> list[Kernel]:
    """Every registered kernel for one weight, or those of one operation."""
    return [kernel for kernel in declarations(operation) if isinstance(kernel, Kernel)]


def list_grouped_kernels(operation: str | None = None) -> list[GroupedKernel]:
    """Every registered kernel for several experts, or those of one operation."""
    return [kernel for kernel in declarations(operation) if isinstance(kernel, GroupedKernel)]


def get_declaration(name: str) -> Declaration:
    """The kernel of that name, whatever it does. Raises KernelError naming the known ones."""
    if name not in _KERNELS:
        raise KernelError(f"unknown kernel {name!r}; known: {', '.join(_KERNELS)}")
    return _KERNELS[name]


def get_kernel(name: str) -> Kernel:
    """The kernel of that name. Raises KernelError naming the known ones, or where it is for several experts."""
    kernel = get_declaration(name)
    if not isinstance(kernel, Kernel):
        raise KernelError(f"kernel {name!r} does {kernel.operation}, with the weights of several experts")
    return kernel


def get_grouped_kernel(name: str) -> GroupedKernel:
    """The kernel of that name. Raises KernelError naming the known ones, or where it is for one weight."""
    kernel = get_declaration(name)
    if not isinstance(kernel, GroupedKernel):
        raise KernelError(f"kernel {name!r} does {kernel.operation}, with one weight")
    return kernel
