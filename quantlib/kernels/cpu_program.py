"""A forward pass for one token as a list of calls into the C++ extension (csrc/cpu/program.h), made once and run often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

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


Weight = TypeVar("Weight", Tensor, QuantizedTensor)


@dataclass(frozen=True)
class Term(Generic[Weight]):
    """One product of a step: y [N] = weight [N, K] x + bias."""

    weight: Weight
    bias: Tensor | None
    y: Tensor


def _check_shapes(x: Tensor, terms: Sequence[Term[Any]], gated: bool) -> None:
    heights = [term.y.numel() for term in terms]
    if gated and (len(heights) != 2 or heights[0] != heights[1]):
        raise KernelError(f"a gate takes two products of one height, not of {heights}")
    for term in terms:
        n, k = term.weight.shape
        if (k, n) != (x.numel(), term.y.numel()):
            raise KernelError(f"a weight {n} x {k} doesn't take {x.numel()} numbers to {term.y.numel()}")


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

    def product(self, function: str, x: Tensor, terms: Sequence[Term[QuantizedTensor]], gated: bool = False) -> None:
        """The terms' y = W x + bias, by the extension's product of that name (`function_of`), in one step: the weights have one
        format and width. `gated`: there are two, of one N, and the first's y becomes silu(y) times the second's."""
        _check_shapes(x, terms, gated)
        if len({term.weight.format for term in terms}) > 1:
            raise KernelError(f"one step multiplies one format, not {', '.join(str(term.weight.format) for term in terms)}")
        if len({term.weight.layout for term in terms}) > 1:
            layouts = ", ".join(term.weight.layout for term in terms)
            raise KernelError(f"one step multiplies weights of one layout, not of {layouts}: to_layout brings them into one")
        calls = []
        for term in terms:
            packed = Packed.of(term.weight)
            self._kept.append(packed)
            bias = None if term.bias is None else term.bias.detach().to(torch.float32).contiguous()
            at = 0 if bias is None else self._at(bias, torch.float32)
            calls.append((packed.plan.native, packed.native, at, self._at(term.y)))
        self._native.product(function, tuple(calls), DTYPES[self.dtype], self._at(x), gated, self.threads)

    def dense(self, x: Tensor, terms: Sequence[Term[Tensor]], gated: bool = False) -> None:
        """The same with weights of the program's dtype."""
        _check_shapes(x, terms, gated)
        calls = tuple(
            (self._at(term.weight), 0 if term.bias is None else self._at(term.bias), self._at(term.y), term.weight.shape[0])
            for term in terms
        )
        self._native.dense(calls, DTYPES[self.dtype], self._at(x), x.numel(), gated, self.threads)

    def norm(self, x: Tensor, weight: Tensor, y: Tensor, epsilon: float) -> None:
        """y = weight * x / sqrt(mean(x^2) + epsilon), over runs of the weight's length."""
        width = weight.numel()
        self._native.norm(DTYPES[self.dtype], self._at(x), self._at(weight), self._at(y), x.numel() // width, width, epsilon)

    def round(self, x: Tensor, y: Tensor) -> None:
        """y = x rounded to the format int8 and back."""
        self._native.round(DTYPES[self.dtype], self._at(x), self._at(y), x.numel())

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
