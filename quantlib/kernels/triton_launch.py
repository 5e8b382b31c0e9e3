"""How the Triton kernels are launched: what they are told about a weight, and tiles. Tests, launches and the compile check
(bench/static.py) all build their arguments here, so that what is compiled is what runs.

Triton is imported at the first use of a kernel, never by `import quantlib`.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quantlib.formats.base import Format
from quantlib.formats.codecs import Affine, Minifloat, Table
from quantlib.formats.packing import planes
from quantlib.formats.scales import DYNAMIC_MAP, DoubleQuantScale, SuperScale
from quantlib.tensor import QuantizedTensor

CODEC_KINDS = ("affine", "table", "minifloat")
SCALE_KINDS = ("float", "e4m3_global", "e8m0", "double", "super")


def interpreting() -> bool:
    """Whether TRITON_INTERPRET asks for Triton's interpreter (read by Triton when kernels are first imported)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@lru_cache(maxsize=1)
def import_failure() -> str | None:
    """None where Triton and the kernels can be imported; otherwise the reason."""
    try:
        import quantlib.triton_kernels.rows  # noqa: F401
    except Exception as error:  # a broken Triton raises anything, from ImportError to RuntimeError
        return f"Triton can't be used: {type(error).__name__}: {error}"
    return None


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel: `arguments` by name (tensors, integers and constexprs), `options` of Triton's compiler."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self, device: torch.device) -> None:
        """Run on `device`'s current stream, by way of Triton's own argument binding."""
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.options)

    def compile(self) -> Any:
        """Triton's compiled kernel for its active driver's target, without running it; tensors may be on `meta`."""
        return self.kernel.warmup(grid=self.grid, **self.arguments, **self.options)


class BoundLaunch:
    """A launch that is repeated with other activations: everything but the arguments named at each call stays as it was bound.

    The first call compiles; later ones hand the arguments to the compiled kernel. Binding them anew would cost more host time
    than a small kernel takes. What Triton specializes a kernel on (dtypes, pointers aligned to 16 bytes, integers that are 1,
    divisible by 16 or wider than 32 bits) must be alike in all calls of one object: `alike` makes the part of a key that says
    so."""

    def __init__(self, launch: Launch, device: torch.device) -> None:
        self.kernel = launch.kernel
        self.options = launch.options
        self.device = device
        self.names = {name: place for place, name in enumerate(launch.kernel.arg_names)}
        self.values = [launch.arguments[name] for name in self.names]
        self.compiled: Any = None

    def __call__(self, grid: tuple[int, int, int], **changed: Any) -> None:
        """Run on the device's current stream."""
        values = self.values.copy()
        for name, value in changed.items():
            values[self.names[name]] = value
            # The launch's own x and y must not live as long as the weight.
            self.values[self.names[name]] = None
        if self.compiled is not None and torch.cuda.current_device() == self.device.index:
            self.compiled[grid](*values)
            return
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            compiled = self.kernel[grid](**dict(zip(self.names, values, strict=True)), **self.options)
        if self.device.type == "cuda":
            self.compiled = compiled


def alike(*arguments: Tensor | int | None) -> tuple[Any, ...]:
    """What Triton specializes a kernel on, of some arguments."""
    return tuple(
        (argument.dtype, argument.data_ptr() % 16 == 0)
        if isinstance(argument, Tensor)
        else argument is None or (argument == 1, argument % 16 == 0, argument >= 1 << 31)
        for argument in arguments
    )


@dataclass(frozen=True)
class Tile:
    """Sizes of the block of the problem that one program computes, and how Triton compiles it.

    m, n, k         rows of x, rows of W and columns of W; a kernel ignores what its layout or its warps fix
    splits          shares of K, or of the reduction, that different programs sum
    registers       bounds the registers of a thread. Left alone, ptxas 13 spills single values to reach a higher occupancy.
    per_unit        programs that one SM runs at the same time, for persistent kernels
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    registers: int | None = None
    splits: int = 1
    per_unit: int = 1

    @property
    def options(self) -> dict[str, Any]:
        # The decoding law rounds every product and difference; a fused multiply-add would skip a rounding.
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


@lru_cache(maxsize=256)
def weight_spec(fmt: Format) -> Any:
    """The compile-time facts (triton_kernels.decode.WeightSpec) of a format, from its kinds, never from its name."""
    from quantlib.triton_kernels.decode import WeightSpec

    codec, scale, block = fmt.codec, fmt.scale, fmt.block
    widths = (*planes(codec.bits), 0, 0)
    scale_widths: tuple[int, ...] = (0, 0, 0)
    count = 0
    if isinstance(scale, SuperScale):
        scale_widths, count = (*planes(scale.bits), 0, 0), scale.count
    elif isinstance(scale, DoubleQuantScale):
        count = scale.BLOCK
    return WeightSpec(
        codec=codec.kind,
        bits=codec.bits,
        plane0=widths[0],
        plane1=widths[1],
        plane2=widths[2],
        offset=codec.offset if isinstance(codec, Affine) else 0,
        exponent_bits=codec.exponent_bits if isinstance(codec, Minifloat) else 0,
        mantissa_bits=codec.mantissa_bits if isinstance(codec, Minifloat) else 0,
        block_rows=block.rows or 0,
        block_cols=block.cols or 0,
        scale=scale.kind,
        zero=fmt.zero,
        scale_plane0=scale_widths[0],
        scale_plane1=scale_widths[1],
        scale_plane2=scale_widths[2],
        scale_offset=1 << (scale.bits - 1) if isinstance(scale, SuperScale) and scale.signed else 0,
        scale_count=count,
    )


@lru_cache(maxsize=64)
def device_table(entries: tuple[float, ...], device: torch.device) -> Tensor:
    """A code book in fp32 on `device`, made once."""
    return torch.tensor(entries, dtype=torch.float32, device=device)


_OUTER = {"e4m3_global": "global_scale", "double": "scale_absmax", "super": "super_scales"}
_INNER = {"double": "scale_offset", "super": "super_minima"}


def weight_arguments(weight: QuantizedTensor) -> dict[str, Any]:
    """The arguments by which every kernel receives a weight in the rows layout; None where the format has no such part."""
    fmt, parts = weight.format, weight.parts
    device = weight.device
    return {
        "codes": parts["codes"],
        "table": device_table(fmt.codec.entries, device) if isinstance(fmt.codec, Table) else None,
        "scales": parts["scales"],
        "zeros": parts.get("zeros", parts.get("minima")),
        "outer": parts.get(_OUTER.get(fmt.scale.kind, "")),
        "inner": parts.get(_INNER.get(fmt.scale.kind, "")),
        "scale_map": device_table(DYNAMIC_MAP.entries, device) if fmt.scale.kind == "double" else None,
        "columns": fmt.padded(weight.shape[1]),
        "codes_stride": parts["codes"].shape[1],
        "spec": weight_spec(fmt),
    }


def rows_linear_tile(m: int, k: int, dtype: torch.dtype, capability: int) -> Tile:
    """The tile of `rows_linear`: narrow in M where M is small, so that few lanes multiply padding; `capability` is 0 for a CPU.

    fp32 has no tensor-core instruction without TF32's rounding, so its tile is what fused multiply-adds can hold in registers;
    and it stays below 64 rows of W, from where on Triton 3.6 takes TF32 on sm_100 although IEEE precision is asked for.
    """
    if dtype == torch.float32:
        return Tile(16 if m <= 16 else 32, 32, 32, 4, 2, registers=255)
    if m <= 64:
        return Tile(16 if m <= 16 else 32 if m <= 32 else 64, 64, 64, 4, 3)
    # A deep tile spills where mma.sync makes several warps decode the same weights, and where K needs masks.
    deep = 90 <= capability < 120 and k % 64 == 0
    return Tile(128, 128, 64 if deep else 32, 8, 3)


def rows_dequantize_tile(dtype: torch.dtype) -> Tile:
    """The tile of `rows_dequantize`."""
    return Tile(0, 16, 128, 4, 1)


def _columns_arguments(k: int, tile: Tile) -> dict[str, Any]:
    return {"K": k, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "EVEN_K": k % tile.k == 0}


def rows_dequantize_launch(weight: QuantizedTensor, out: Tensor) -> Launch:
    """W -> out [N, K], contiguous."""
    from quantlib.triton_kernels.rows import rows_dequantize_kernel

    n, k = weight.shape
    tile = rows_dequantize_tile(out.dtype)
    arguments = {"out": out, "N": n, **weight_arguments(weight), **_columns_arguments(k, tile)}
    return Launch(rows_dequantize_kernel, (-(-k // tile.k), -(-n // tile.n)), arguments, tile.options)


def _product_arguments(x: Tensor, weight: QuantizedTensor, bias: Tensor | None, y: Tensor, tile: Tile) -> dict[str, Any]:
    n, k = weight.shape
    return {
        "x": x,
        "y": y,
        "bias": bias,
        "M": x.shape[0],
        "N": n,
        "x_stride": x.stride(0),
        "BLOCK_M": tile.m,
        **weight_arguments(weight),
        **_columns_arguments(k, tile),
    }


def rows_linear_launch(x: Tensor, weight: QuantizedTensor, bias: Tensor | None, y: Tensor, tile: Tile) -> Launch:
    """x [M, K] (unit column stride) times W^T plus bias [N] -> y [M, N], contiguous."""
    from quantlib.triton_kernels.rows import rows_linear_kernel

    grid = (-(-x.shape[0] // tile.m), -(-weight.shape[0] // tile.n))
    return Launch(rows_linear_kernel, grid, _product_arguments(x, weight, bias, y, tile), tile.options)
