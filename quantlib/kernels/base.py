"""What a kernel is, what it is asked (Problem), and the table of all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quantlib.devices import Device
from quantlib.errors import KernelError
from quantlib.formats.base import Format
from quantlib.tensor import QuantizedTensor

Operation = Literal["linear", "dgrad", "dequantize"]
Backend = Literal["reference", "cpu", "triton", "cuda", "torch"]


@dataclass(frozen=True)
class Problem:
    """One multiplication as dispatch sees it.

    operation    "linear" y[M,N] = x[M,K] W^T + bias; "dgrad" dx[M,K] = dy[M,N] W; "dequantize" W[N,K]
    m, n, k      W is [n, k]; m is the number of rows of x or dy (0 for dequantize)
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


class Kernel(ABC):
    """One way to run one operation. Instances are registered with `register_kernel` in the file that launches them.

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

    @abstractmethod
    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        """linear: x [M, K] -> y [M, N]. dgrad: x is dy [M, N] -> dx [M, K]. dequantize: x is an empty tensor of the wanted
        dtype -> W [N, K]. x may have any strides; the result is new, contiguous, of x's dtype. M may be 0."""


_KERNELS: dict[str, Kernel] = {}


def register_kernel(kernel: Kernel) -> None:
    """Add a kernel to the table. Raises KernelError where its name is taken."""
    if kernel.name in _KERNELS:
        raise KernelError(f"kernel {kernel.name!r} is registered already")
    _KERNELS[kernel.name] = kernel


def unregister_kernel(name: str) -> None:
    """Take a kernel out again (for tests)."""
    _KERNELS.pop(name, None)


def list_kernels(operation: str | None = None) -> list[Kernel]:
    """Every registered kernel, or those of one operation."""
    return [kernel for kernel in _KERNELS.values() if operation is None or kernel.operation == operation]


def get_kernel(name: str) -> Kernel:
    """The kernel of that name. Raises KernelError naming the known ones."""
    if name not in _KERNELS:
        raise KernelError(f"unknown kernel {name!r}; known: {', '.join(_KERNELS)}")
    return _KERNELS[name]
