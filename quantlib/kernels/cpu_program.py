"""A forward pass for one token as a list of calls into the C++ extension (csrc/cpu/program.h), made once and run often."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlib.errors import KernelError
from quantlib.kernels import cpu
from quantlib.kernels.base import Declaration
from quantlib.kernels.cpu import DTYPES, Packed
from quantlib.tensor import QuantizedTensor


def function_of(kernel: Declaration) -> str | None:
    """The product of the extension that a kernel calls, where a program can hold it; else None."""
    name = getattr(kernel, "function", None)
    return name if cpu.unavailable is None and name in cpu.native().PRODUCTS else None


class Program:
    """Steps for one token at one position, in the order in which they were added.

    capacity   positions that caches hold
    dtype      of every activation: fp32, bf16 or fp16
    threads    that products and attention may use

    Every tensor is contiguous, on the CPU and stays where it is: the program keeps it, and reads and writes it in place.
    Raises KernelError where the extension was not built, or a tensor is not as it must be.
    """

    def __init__(self, capacity: int, dtype: torch.dtype, threads: int) -> None:
        if cpu.unavailable is not None:
            raise KernelError(f"a program runs in the C++ extension: {cpu.unavailable}")
        if dtype not in DTYPES:
            raise KernelError(f"a program computes in fp32, bf16 or fp16, not in {dtype}")
        self.capacity, self.dtype, self.threads = capacity, dtype, threads
        self._native = cpu.native().Program(capacity)
        self._kept: list[Any] = []

    def _at(self, tensor: Tensor, dtype: torch.dtype | None = None) -> int:
        wanted = dtype or self.dtype
        if tensor.dtype is not wanted or not tensor.is_cpu or not tensor.is_contiguous():
            raise KernelError(
                f"a program takes contiguous {wanted} tensors on the CPU, found {tensor.dtype} on {tensor.device}, "
                f"strides {tuple(tensor.stride())}"
            )
        self._kept.append(tensor)
        return tensor.data_ptr()

    def embed(self, table: Tensor, y: Tensor) -> None:
        """y = table[token]."""
        rows, width = table.shape
        self._native.embed(self._at(table), self._at(y), rows, width * table.element_size())

    def product(self, weight: QuantizedTensor, function: str, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """y [N] = W x + bias, by the extension's product of that name (`function_of`)."""
        packed = Packed.of(weight)
        self._kept.append(packed)
        at = 0 if bias is None else self._at(bias.detach().to(torch.float32).contiguous(), torch.float32)
        native = packed.plan.native
        self._native.product(function, native, packed.native, DTYPES[self.dtype], self._at(x), at, self._at(y), self.threads)

    def dense(self, weight: Tensor, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """y [N] = W x + bias with a weight of the program's dtype."""
        at = 0 if bias is None else self._at(bias)
        n, k = weight.shape
        self._native.dense(DTYPES[self.dtype], self._at(weight), self._at(x), at, self._at(y), n, k, self.threads)

    def norm(self, x: Tensor, weight: Tensor, y: Tensor, epsilon: float) -> None:
        """y = weight * x / sqrt(mean(x^2) + epsilon), over runs of the weight's length."""
        width = weight.numel()
        self._native.norm(DTYPES[self.dtype], self._at(x), self._at(weight), self._at(y), x.numel() // width, width, epsilon)

    def rotate(self, x: Tensor, width: int, angles: tuple[Tensor, Tensor] | None, cache: Tensor | None) -> None:
        """Heads of `width` in x: rotated by the position's row of (cosine, sine) [capacity, width] where they are given, and
        stored in the position's place of a cache [heads, capacity, width], or in x itself."""
        cosine, sine = (0, 0) if angles is None else (self._at(angles[0]), self._at(angles[1]))
        y = x if cache is None else cache
        heads = x.numel() // width
        self._native.rotate(DTYPES[self.dtype], self._at(x), cosine, sine, self._at(y), heads, width, cache is not None)

    def attention(self, q: Tensor, keys: Tensor, values: Tensor, y: Tensor, scale: float) -> None:
        """y = softmax(scale q K^T) V up to the present position; caches [key heads, capacity, width]."""
        key_heads, _, width = keys.shape
        heads = q.numel() // width
        self._native.attention(
            DTYPES[self.dtype], self._at(q), self._at(keys), self._at(values), self._at(y), heads, key_heads, width, scale,
            self.threads,
        )  # fmt: skip

    def gate(self, gate: Tensor, up: Tensor, y: Tensor) -> None:
        """y = silu(gate) * up."""
        self._native.gate(DTYPES[self.dtype], self._at(gate), self._at(up), self._at(y), gate.numel())

    def add(self, x: Tensor, y: Tensor) -> None:
        """y += x."""
        self._native.add(DTYPES[self.dtype], self._at(x), self._at(y), x.numel())

    def run(self, token: int, position: int) -> None:
        """All steps. Raises KernelError for a token or position out of range."""
        try:
            self._native.run(token, position)
        except ValueError as error:
            raise KernelError(str(error)) from None
