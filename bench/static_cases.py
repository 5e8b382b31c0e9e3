"""What `python -m bench.static` knows of a compiled case: Case, Sweep, Family, and tensors without storage.

The families of all kernels stand in static_families.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from quantlib.formats import get_format
from quantlib.formats.base import Format
from quantlib.kernels.triton_launch import Launch
from quantlib.layouts import fragments
from quantlib.tensor import QuantizedTensor

ARCHS = (80, 89, 90, 100, 103, 120, 121)
SIBLINGS = {89: 80, 103: 100, 121: 120}
"""Architectures that differ from another one only in ways most kernels don't use: fewer cases are compiled for them."""

N, K, UNEVEN_K = 4096, 4096, 4088

FORMATS = (
    "int4-g128", "int4-g32-asym", "int3-g64-asym", "int8-channel", "nf4", "nf4-dq", "fp8-e4m3-block128", "fp8-e5m2",
    "nvfp4", "mxfp4", "mxfp8", "q4_k", "q5_k", "q6_k",
)  # fmt: skip
"""Every codec kind, scale kind, zero kind and number of bit planes."""

GROUPED_FORMATS = ("int4-g128", "nf4", "nf4-dq", "nvfp4", "mxfp8", "fp8-e4m3-block128", "q4_k")
"""For several experts, whose kernels decode as those of one do."""
SIBLING_FORMATS = ("int4-g128", "nf4-dq", "nvfp4")
DETAILED_FORMATS = ("int4-g128", "nf4-dq", "q4_k")
"""Formats compiled for every tile and dtype: the plainest, the one with most shared memory, the one with most decoding."""

TENSOR_CORE = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 103: "tcgen05.mma"} | dict.fromkeys(
    (120, 121), "mma.sync"
)


@dataclass(frozen=True, order=True)
class Case:
    """One launch of one kernel: m rows of x (0 where there is no x) of `dtype` times a weight [4096, k].

    activations: the format that x is quantized to, "" where it isn't
    """

    kernel: str
    format: str
    dtype: str
    m: int
    k: int = K
    activations: str = ""

    @property
    def name(self) -> str:
        rows = f" M={self.m}" if self.m else ""
        operands = f"{self.activations} x {self.format}" if self.activations else self.format
        return f"{self.kernel}{rows} {operands} {self.dtype}" + (f" K={self.k}" if self.k != K else "")

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


@dataclass(frozen=True)
class Sweep:
    """Cases: every format with every dtype and M. `everywhere`: on sibling architectures too, with SIBLING_FORMATS alone.

    `machine_code`: whether the code is disassembled, which takes nearly as long as compiling it.
    """

    formats: tuple[str, ...]
    ms: tuple[int, ...]
    dtypes: tuple[str, ...] = ("bfloat16",)
    k: int = K
    activations: str = ""
    everywhere: bool = False
    machine_code: bool = True


@dataclass(frozen=True)
class Work:
    """What a case must do at least: bytes of main memory, flops on tensor cores, weights to decode."""

    bytes: int
    flops: int
    weights: int


def product_work(case: Case) -> Work:
    """A weight read once, x read and y written."""
    size = case.torch_dtype.itemsize
    moved = get_format(case.format).nbytes(N, case.k) + case.m * (N + case.k) * size
    return Work(moved, 2 * case.m * N * case.k, N * case.k)


def dequantize_work(case: Case) -> Work:
    """A weight read, and written in 16 or 32 bits."""
    moved = get_format(case.format).nbytes(N, case.k) + N * case.k * case.torch_dtype.itemsize
    return Work(moved, 0, N * case.k)


def fma(arch: int, case: Case) -> str:
    """fp32 on the ordinary units."""
    return "fma.rn.f32"


def tensor_core(arch: int, case: Case) -> str:
    """Tensor cores for 16-bit activations; none multiplies fp32 without TF32's rounding."""
    return fma(arch, case) if case.dtype == "float32" else TENSOR_CORE[arch]


def warp_level(arch: int, case: Case) -> str:
    """Tensor cores of one warp, on every architecture."""
    return "mma.sync"


def by_rows(arch: int, case: Case) -> str:
    """As `tensor_core` where x or dY is on the wide side of the instruction: few rows are for one warp's."""
    return warp_level(arch, case) if case.m < 64 and case.dtype != "float32" else tensor_core(arch, case)


def version_number(text: str) -> tuple[int, ...]:
    """A version, to be compared."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def nothing(arch: int, case: Case) -> str:
    """No product at all."""
    return "none"


@dataclass(frozen=True)
class Family:
    """One kernel.

    launch       (arch, case) -> the launch, on `meta` tensors
    sweeps       what is compiled
    instruction  (arch, case) -> how the PTX name of the multiply instruction must begin
    codes, x     the kernel's arguments that point to packed weights, and to activations; none where it reads no weight
    work         case -> what it must do at least
    max_decode   (arch, format, the most decode instructions per weight); a format's variants included
    min_load     bytes that every load of codes must have at least (the widest, of codes in several planes); 0 for no limit
    exact        where no FFMA may be, because the decoding law rounds every product and difference: "never" (nowhere), "tensor"
                 (nowhere in a kernel that multiplies on tensor cores), "decode" (not in the main loop's decoding), "free"
    """

    name: str
    launch: Callable[[int, Case], Launch]
    sweeps: tuple[Sweep, ...]
    instruction: Callable[[int, Case], str] = tensor_core
    codes: tuple[str, ...] = ("codes", "codes1", "codes2")
    x: tuple[str, ...] = ("x",)
    work: Callable[[Case], Work] = product_work
    max_decode: tuple[tuple[int, str, float], ...] = ()
    min_load: int = 0
    exact: str = "tensor"

    def limit(self, arch: int, case: Case) -> float | None:
        """The most decode instructions per weight that the case may take."""
        found = [most for at, fmt, most in self.max_decode if at == arch and (case.format + "-").startswith(fmt + "-")]
        return found[0] if found else None


# Tensors without storage.


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rows_weight(fmt: Format, k: int) -> QuantizedTensor:
    """A weight [4096, k] in the rows layout."""
    parts = {name: meta(*spec.shape, dtype=spec.dtype) for name, spec in fmt.specs(N, k).items()}
    return QuantizedTensor(fmt, (N, k), parts)


@lru_cache(maxsize=64)
def fragments_weight(fmt: Format, k: int) -> QuantizedTensor:
    """A weight [4096, k] in the fragments layout."""
    stored = {name: meta(*spec.shape, dtype=spec.dtype) for name, spec in fmt.specs(N, k).items()}
    parts = fragments.forward(fmt, N, k, stored)
    return QuantizedTensor(fmt, (N, k), parts, "fragments")


def weight_of(case: Case, layout: Callable[[Format, int], QuantizedTensor]) -> QuantizedTensor:
    """The case's weight in a layout."""
    return layout(get_format(case.format), case.k)


def operands(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K], y [M, N], bias [N]."""
    dtype = case.torch_dtype
    return meta(case.m, case.k, dtype=dtype), meta(case.m, N, dtype=dtype), meta(N, dtype=dtype)
