"""What tests and benches share: the error measure, its limits per dtype, and random weights worth quantizing."""

from __future__ import annotations

import torch
from torch import Tensor

LIMITS: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 1.0e-3,
    torch.bfloat16: 8.0e-3,
}
"""Largest ||y - ref|| / ||ref|| of a product whose inputs and output have this dtype, accumulated in fp32, against fp64."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in fp64; 0 for two empty tensors, inf where one holds a NaN or shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    norm = torch.linalg.vector_norm(expected.double())
    error = float(difference / norm) if norm > 0 else float(difference)
    return error if error == error else float("inf")


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Fail unless the relative error stays within the limit of `dtype` (default: actual's)."""
    limit = LIMITS[dtype or actual.dtype]
    error = relative_error(actual, expected)
    assert error <= limit, (
        f"relative error {error:.3e} exceeds {limit:.1e} for {dtype or actual.dtype}, shape {list(actual.shape)}"
    )


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Fail unless shape, dtype and every bit agree (-0 differs from 0; NaNs agree where their bits do)."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)} instead of {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype} instead of {expected.dtype}"
    same = _bytes(actual) == _bytes(expected)
    wrong = int((~same).view(actual.numel(), -1).any(dim=1).sum()) if actual.numel() else 0
    assert wrong == 0, f"{wrong} of {actual.numel()} elements differ in their bits"


def ulps_between(actual: Tensor, expected: Tensor) -> int:
    """How many numbers of their dtype (fp16, bf16 or fp32) lie between two tensors, at the place where most do; +0 and -0 are
    one."""
    ordered = []
    for tensor in (actual, expected):
        bits = tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).to(torch.int64)
        magnitude = bits & (0x7FFFFFFF if tensor.dtype == torch.float32 else 0x7FFF)
        ordered.append(torch.where(bits < 0, -magnitude, magnitude))
    return int((ordered[0] - ordered[1]).abs().max()) if actual.numel() else 0


def assert_within_ulps(actual: Tensor, expected: Tensor, ulps: int) -> None:
    """Fail unless shape and dtype agree and no two elements are more than `ulps` numbers of their dtype apart."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)} instead of {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype} instead of {expected.dtype}"
    assert not bool(actual.isnan().any()), "the result holds NaN"
    found = ulps_between(actual, expected)
    assert found <= ulps, f"{found} ulp apart, {ulps} allowed"


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, flat. A clone has plain strides; `contiguous` keeps odd ones of dimensions of size 1."""
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def random_weight(n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A weight [n, k] like a trained layer's: Gaussian, rows of different scale, a few outlying columns; never zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * torch.empty(n, 1).uniform_(0.01, 0.05, generator=generator)
    outliers = torch.rand(k, generator=generator) < 0.02
    return (weight * torch.where(outliers, 6.0, 1.0)).to(dtype)
