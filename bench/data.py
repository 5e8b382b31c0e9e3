"""What contestants multiply: random weights and activations, never zeros, and the weight in the case's format."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

import quantlib
from bench.protocol import Case
from quantlib.formats import get_format
from quantlib.formats.base import Format
from quantlib.formats.packing import unpack
from quantlib.tensor import QuantizedTensor

DTYPE = torch.bfloat16


class Material:
    """The weight of the cases that share one, made on `device` when it is first asked for."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case, self.device = case, device
        self._generator = torch.Generator(device).manual_seed(seed)

    @property
    def format(self) -> Format:
        return get_format(self.case.format)

    def in_format(self, spec: str) -> Material:
        """The same weight, to be quantized to another format."""
        other = Material(replace(self.case, format=spec), self.device)
        other.weight = self.weight
        return other

    @cached_property
    def weight(self) -> Tensor:
        """bf16 [N, K] like a trained layer's: rows of different scale, a few outlying columns."""
        n, k, options = self.case.n, self.case.k, {"generator": self._generator, "device": self.device}
        weight = torch.randn(n, k, **options)  # type: ignore[call-overload]
        weight *= torch.empty(n, 1, device=self.device).uniform_(0.01, 0.05, generator=self._generator)
        outliers = torch.rand(k, **options) < 0.02  # type: ignore[call-overload]
        scaled: Tensor = weight * torch.where(outliers, 6.0, 1.0)
        return scaled.to(DTYPE)

    @cached_property
    def quantized(self) -> QuantizedTensor:
        """The weight in the case's format, rows layout."""
        return quantlib.quantize(self.weight, self.format)

    @cached_property
    def decoded(self) -> Tensor:
        """bf16 [N, K]: the numbers that quantlib's kernels multiply by."""
        return self.quantized.dequantize(DTYPE)

    @cached_property
    def weight_error(self) -> float:
        """What the format itself costs, in the worst row of the weight."""
        return worst_row_error(self.decoded, self.weight)

    def integer_codes(self) -> tuple[Tensor, Tensor]:
        """Codes uint8 [N, K] and scales bf16 [N, groups] of a symmetric integer format, for peers that take them."""
        packed, k = self.quantized, self.case.k
        codes = unpack(packed.parts["codes"], self.format.codec.bits, self.format.padded(k))[:, :k].contiguous()
        return codes, packed.parts["scales"].to(DTYPE)

    def inputs(self, case: Case) -> Tensor:
        """Random bf16 x: [M, K], for dgrad [M, N], for dequantize empty."""
        shape = {"dgrad": (case.m, case.n), "dequantize": (0,)}.get(case.operation, (case.m, case.k))
        return torch.randn(shape, generator=self._generator, device=self.device).to(DTYPE)


def worst_row_error(decoded: Tensor, weight: Tensor) -> float:
    """The largest ||decoded - weight|| / ||weight|| of a row; inf where shapes differ or one holds a NaN."""
    if decoded.shape != weight.shape:
        return float("inf")
    wide = weight.float()
    norms = torch.linalg.vector_norm(wide, dim=1).clamp(min=1e-30)
    error = float((torch.linalg.vector_norm(decoded.float() - wide, dim=1) / norms).max())
    return error if error == error else float("inf")


def problem_bytes(case: Case) -> int:
    """The bytes that the case must move, whoever solves it: the packed weight once, inputs and outputs once."""
    fmt, wide = get_format(case.format), DTYPE.itemsize
    if case.operation == "quantize":
        return case.m * case.k * wide + fmt.nbytes(case.m, case.k)
    if case.operation == "dequantize":
        return fmt.nbytes(case.n, case.k) + case.n * case.k * wide
    return fmt.nbytes(case.n, case.k) + case.m * (case.n + case.k) * wide
