"""How the Triton kernels of the fragments layout are launched. Tests, launches and the static check build their arguments
here."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from quantlib.formats.base import Format
from quantlib.formats.codecs import Affine, Minifloat, Table
from quantlib.formats.packing import planes
from quantlib.formats.scales import DYNAMIC_MAP, DoubleQuantScale, FloatScale, SuperScale
from quantlib.kernels.fragments_tiles import by_warp
from quantlib.kernels.triton_launch import Launch, Tile, device_table
from quantlib.layouts import fragments
from quantlib.tensor import QuantizedTensor

ScaleAt = Literal["weight", "tile", "end"]

SCALE_PLACES: dict[str, tuple[ScaleAt, ...]] = {
    "gemv": ("end", "tile"),
    "skinny": ("end", "tile"),
    "gemm": ("end",),
    "dgrad": (),
    "dequantize": (),
}
"""Where, besides in the weights, each kernel can multiply scales in: into accumulators at the end, or tile by tile.
Accumulators of many columns are cheaper left alone, and where the sum runs over rows of W scales differ inside it."""


def arithmetic(fmt: Format, dtype: torch.dtype, kernel: str) -> tuple[str, ScaleAt]:
    """(values, scale_at) of FragmentSpec: how `kernel` makes its operand in `dtype`."""
    codec, block, scale = fmt.codec, fmt.block, fmt.scale
    places = SCALE_PLACES[kernel]
    if dtype == torch.float32 or kernel == "dequantize":
        return "law", "weight"
    at: ScaleAt = "weight"
    if scale.kind == "float" and fmt.zero != "minimum":
        if block.cols is None and "end" in places:
            at = "end"
        elif block.cols is not None and block.cols >= fragments.tile_columns(fmt) and "tile" in places:
            at = "tile"
    if isinstance(codec, Affine) and fmt.zero != "minimum" and isinstance(scale, FloatScale):
        narrow = codec.bits < 8
        if at != "weight" and (narrow or (dtype == torch.float16 and fmt.zero == "none")):
            return "integer", at
        if at == "weight" and narrow and scale.dtype != torch.float32:
            return "affine", "weight"
        if narrow or fmt.zero == "none":
            return "law", at
    if isinstance(codec, Minifloat):
        exponent_bits = {torch.bfloat16: 8, torch.float16: 5}[dtype]
        if at != "weight" and codec.exponent_bits <= exponent_bits:
            return "float", at
        if scale.kind == "e4m3_global" and codec.bits <= 4:
            return "float", "weight"
        if scale.kind == "e8m0" and dtype == torch.bfloat16:
            return "float", "weight"
    return "law", "weight"


_INSTRUCTIONS = {"integer": 1.5, "float": 2.8, "affine": 3.5, "table": 3.5, "law": 5.0}
"""Machine instructions per decoded weight on sm_90, rounded from docs/compile-table.md; "table": the law, a book of 16."""


def decode_instructions(fmt: Format, dtype: torch.dtype, kernel: str) -> float:
    """Instructions that `kernel` spends on decoding one weight, as a cost model wants it."""
    values, _ = arithmetic(fmt, dtype, kernel)
    return _INSTRUCTIONS["table" if values == "law" and fmt.codec.kind == "table" and fmt.codec.bits == 4 else values]


_DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@lru_cache(maxsize=1024)
def fragment_spec(fmt: Format, dtype: torch.dtype, kernel: str) -> Any:
    """The compile-time facts (triton_kernels.fragments.FragmentSpec) of a format, from its kinds, never from its name."""
    from quantlib.triton_kernels.fragments import FragmentSpec

    codec, scale, block = fmt.codec, fmt.scale, fmt.block
    values, scale_at = arithmetic(fmt, dtype, kernel)
    widths = (*planes(codec.bits), 0, 0)
    strip = fragments.strip_parts(fmt)
    home = "strip" if strip else "row" if block.rows == 1 else "tensor" if (block.rows, block.cols) == (None, None) else "grid"
    scale_dtype = scale.dtype if isinstance(scale, FloatScale) else torch.float32
    count = scale.count if isinstance(scale, SuperScale) else scale.BLOCK if isinstance(scale, DoubleQuantScale) else 0
    return FragmentSpec(
        values=values,
        scale_at=scale_at,
        codec=codec.kind,
        bits=codec.bits,
        plane0=widths[0],
        plane1=widths[1],
        plane2=widths[2],
        offset=codec.offset if isinstance(codec, Affine) else 0,
        exponent_bits=codec.exponent_bits if isinstance(codec, Minifloat) else 0,
        mantissa_bits=codec.mantissa_bits if isinstance(codec, Minifloat) else 0,
        tile_columns=fragments.tile_columns(fmt),
        scale=scale.kind,
        scale_home=home,
        scale_bits=strip[0].bits if strip else 8 * scale_dtype.itemsize,
        scale_dtype=_DTYPE_NAMES[scale_dtype],
        block_rows=block.rows or 0,
        block_cols=block.cols or 0,
        zero=fmt.zero,
        scale_offset=1 << (scale.bits - 1) if isinstance(scale, SuperScale) and scale.signed else 0,
        scale_count=count,
    )


_OUTER = {"e4m3_global": "global_scale", "double": "scale_absmax", "super": "super_scales"}
_INNER = {"double": "scale_offset", "super": "super_minima"}


def fragment_arguments(weight: QuantizedTensor, dtype: torch.dtype, kernel: str) -> dict[str, Any]:
    """The arguments by which every kernel receives a weight in the fragments layout; None where the format has no such part."""
    fmt, parts = weight.format, weight.parts
    device = weight.device
    scales = parts["scales"]
    strip = bool(fragments.strip_parts(fmt))
    outer, inner = parts.get(_OUTER.get(fmt.scale.kind, "")), parts.get(_INNER.get(fmt.scale.kind, ""))
    return {
        "codes": parts["codes"],
        "codes1": parts.get("codes_plane1"),
        "codes2": parts.get("codes_plane2"),
        "table": device_table(fmt.codec.entries, device) if isinstance(fmt.codec, Table) else None,
        "scales": scales,
        "zeros": parts.get("zeros", parts.get("minima")),
        "outer": outer,
        "inner": inner,
        "scale_map": device_table(DYNAMIC_MAP.entries, device) if fmt.scale.kind == "double" else None,
        "across": fmt.grid(*weight.shape)[1],
        "tiles": parts["codes"].shape[1],
        "unit_stride": scales.shape[1] if strip else 0,
        "outer_stride": outer.shape[1] if fmt.scale.kind == "super" and outer is not None else 0,
        "spec": fragment_spec(fmt, dtype, kernel),
    }


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def whole_columns(x: Tensor, multiple: int) -> Tensor:
    """x [M, C] with unit column stride and C a multiple of `multiple`, zeros behind its columns: kernels then mask nothing, and
    load through asynchronous copies. A copy only where C isn't whole already."""
    m, columns = x.shape
    if columns % multiple == 0:
        return x if x.stride(1) == 1 else x.contiguous()
    whole = x.new_zeros(m, _ceil(columns, multiple) * multiple)
    whole[:, :columns] = x
    return whole


def gemv_grid(n: int, tile: Tile) -> tuple[int, int, int]:
    """Programs of gemv for N rows of W."""
    return _ceil(n, 16), tile.splits, 1


def skinny_grid(m: int, n: int, tile: Tile) -> tuple[int, int, int]:
    """Programs of skinny for M rows of x and N of W."""
    return _ceil(n, 16 * tile.warps), _ceil(m, tile.m), tile.splits


def gemm_grid(m: int, n: int, tile: Tile, units: int) -> tuple[int, int, int]:
    """Programs of gemm: one per block of y, or as many as `units` SMs run at once."""
    return min(_ceil(n, 16 * tile.warps) * _ceil(m, tile.m), units * tile.per_unit), 1, 1


def dgrad_grid(m: int, k: int, width: int, tile: Tile) -> tuple[int, int, int]:
    """Programs of dgrad for M rows of dY and K columns of W, in tiles of `width` columns."""
    return _ceil(k, width * (tile.warps * 16 // tile.n)) * _ceil(m, tile.m), 1, 1


def _linear_arguments(
    x: Tensor, weight: QuantizedTensor, bias: Tensor | None, residual: Tensor | None, y: Tensor, kernel: str
) -> dict[str, Any]:
    n, k = weight.shape
    sizes = {"M": x.shape[0], "N": n, "K": k, "x_stride": x.stride(0)}
    return {"x": x, "y": y, "bias": bias, "residual": residual, **sizes, **fragment_arguments(weight, x.dtype, kernel)}


def gemv_launch(
    x: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    partial: Tensor | None,
    counters: Tensor | None,
    tile: Tile,
) -> Launch:
    """x [M <= 8, K], rows an even number of elements apart, times W^T plus bias [N] plus residual [M, N] -> y [M, N]."""
    from quantlib.triton_kernels.gemv import gemv_kernel

    arguments = _linear_arguments(x, weight, bias, residual, y, "gemv")
    columns = arguments["spec"].tile_columns
    together = tile.warps * tile.splits * columns
    constants = {"WARPS": tile.warps, "SPLITS": tile.splits, "EVEN_K": weight.shape[1] % together == 0}
    grid = gemv_grid(weight.shape[0], tile)
    return Launch(gemv_kernel, grid, {**arguments, "partial": partial, "counters": counters, **constants}, tile.options)


def skinny_launch(
    x: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    partial: Tensor | None,
    counters: Tensor | None,
    tile: Tile,
    capability: int,
) -> Launch:
    """x [M, K] (`whole_columns` of the layout's tile) times W^T plus bias [N] plus residual [M, N] -> y [M, N]; a program takes
    tile.m rows of x and 16 * tile.warps of W. `capability` is 0 for a CPU."""
    from quantlib.triton_kernels.skinny import skinny_kernel

    arguments = _linear_arguments(x, weight, bias, residual, y, "skinny")
    constants = {"BLOCK_M": tile.m, "WARPS": tile.warps, "SPLITS": tile.splits, "STAGES": tile.stages}
    constants["BY_WARP"] = by_warp(capability)
    grid = skinny_grid(x.shape[0], weight.shape[0], tile)
    return Launch(skinny_kernel, grid, {**arguments, "partial": partial, "counters": counters, **constants}, tile.options)


def gemm_launch(
    x: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    tile: Tile,
    units: int,
    capability: int,
) -> Launch:
    """As `skinny_launch`, without splits; `units`: SMs of the chip, each of which runs one persistent program."""
    from quantlib.triton_kernels.gemm import gemm_kernel

    arguments = _linear_arguments(x, weight, bias, residual, y, "gemm")
    constants = {"BLOCK_M": tile.m, "WARPS": tile.warps, "STAGES": tile.stages, "GROUP": 8, "BY_WARP": by_warp(capability)}
    grid = gemm_grid(x.shape[0], weight.shape[0], tile, units)
    return Launch(gemm_kernel, grid, {**arguments, **constants}, tile.options)


def dgrad_launch(dy: Tensor, weight: QuantizedTensor, dx: Tensor, tile: Tile) -> Launch:
    """dy [M, N] (`whole_columns` of tile.n) times W -> dx [M, K], contiguous; tile.n rows and tile.k tiles of W at once."""
    from quantlib.triton_kernels.dgrad import dgrad_kernel

    n, k = weight.shape
    arguments = fragment_arguments(weight, dy.dtype, "dgrad")
    down, across = tile.n // 16, tile.warps * 16 // tile.n
    sizes = {"M": dy.shape[0], "N": n, "K": k, "dy_stride": dy.stride(0)}
    constants = {
        "BLOCK_M": tile.m,
        "DOWN": down,
        "ACROSS": across,
        "STAGES": tile.stages,
        "GROUP": 8,
    }
    grid = dgrad_grid(dy.shape[0], k, arguments["spec"].tile_columns, tile)
    return Launch(dgrad_kernel, grid, {"dy": dy, "dx": dx, **sizes, **arguments, **constants}, tile.options)


def dequantize_launch(weight: QuantizedTensor, out: Tensor) -> Launch:
    """W -> out [N, K], contiguous."""
    from quantlib.triton_kernels.dequantize import dequantize_kernel

    n, k = weight.shape
    arguments = fragment_arguments(weight, out.dtype, "dequantize")
    tile = Tile(0, 64, arguments["spec"].tile_columns, 4, 1)
    grid = (_ceil(k, arguments["spec"].tile_columns), _ceil(n, 64))
    return Launch(dequantize_kernel, grid, {"out": out, "N": n, "K": k, **arguments, "WARPS": 4}, tile.options)
