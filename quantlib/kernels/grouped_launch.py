"""How the grouped kernels are launched. Tests, launches and the static check build their arguments here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlib.experts import QuantizedExperts
from quantlib.formats.base import Format
from quantlib.kernels.fragments_launch import fragment_arguments
from quantlib.kernels.fragments_tiles import by_warp
from quantlib.kernels.triton_launch import Launch, Tile
from quantlib.layouts import fragments

GROUP = 8
"""Blocks of rows that follow each other: those of one expert then meet its weights in the second-level cache."""


def _block_rows(total: int, experts: int, widest: int) -> int:
    """Rows of one block: an expert's share of them, were they spread evenly, up to a power of two from 16 to `widest`."""
    share = _ceil(total, max(1, experts))
    return min(max(16, 1 << (share - 1).bit_length()), widest)


def _short_of_registers(fmt: Format, capability: int) -> bool:
    """Whether mma.sync, which keeps a decoded tile of 128 columns in registers, leaves too few of them for 128 x 128 sums."""
    return fragments.tile_columns(fmt) == 128 and by_warp(capability)


def grouped_tile(total: int, experts: int, fmt: Format, dtype: torch.dtype, capability: int) -> Tile:
    """The tile of `grouped`; `capability` is 0 for a CPU."""
    if dtype == torch.float32:
        return Tile(16, 32, 0, 2, 2, registers=255)
    rows = _block_rows(total, experts, 128)
    if rows <= 64:
        return Tile(rows, 64, 0, 4, 3)
    if _short_of_registers(fmt, capability):
        roomy = capability == 80 or fmt.scale.kind != "double"
        return Tile(64, 128, 0, 8, 3 if roomy else 2, registers=255)
    return Tile(rows, 128, 0, 8, 3)


def grouped_dgrad_tile(total: int, experts: int, fmt: Format, dtype: torch.dtype, capability: int) -> Tile:
    """The tile of `grouped_dgrad`; `capability` is 0 for a CPU."""
    if dtype == torch.float32:
        return Tile(16, 16, 0, 1, 1, registers=255)
    short = _short_of_registers(fmt, capability)
    # Triton 3.6 unrolls the loop there, and two levels of scales take the registers of half the accumulators.
    double = short and fmt.scale.kind == "double" and 0 < capability < 90
    rows = _block_rows(total, experts, 32 if double else 64 if short else 128)
    if rows <= 32:
        registers = (168 if rows == 16 else 255) if double else (128 if rows == 16 else 168)
        return Tile(rows, 64, 0, 4, 3, registers=registers)
    return Tile(rows, 64, 0, 8 if short or rows == 128 else 4, 3)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _slots(total: int, experts: int, block_m: int) -> dict[str, Any]:
    """How many blocks of rows there can be, and how programs find theirs (triton_kernels/grouped.py)."""
    blocks = total // block_m + experts + 1
    return {"slots": min(total, blocks), "BY_ROW": total <= blocks, "EXPERTS": 1 << experts.bit_length(), "GROUP": GROUP}


def _expert_arguments(weight: QuantizedExperts, dtype: torch.dtype, kernel: str) -> dict[str, Any]:
    """The first expert's weight as single kernels receive it, and the way from one expert to the next."""
    arguments = fragment_arguments(weight.expert(0), dtype, kernel)
    strides = {}
    for name in ("codes", "codes1", "codes2", "scales", "zeros", "outer", "inner"):
        part = arguments[name]
        strides[f"{name}_expert"] = 0 if part is None else part.numel()
    return {**arguments, **strides}


def grouped_launch(
    x: Tensor,
    weight: QuantizedExperts,
    offsets: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    y: Tensor,
    tile: Tile,
    capability: int,
) -> Launch:
    """x [M, K] (`whole_columns` of the layout's tile), gathered by rows [T], times the experts' W^T -> y [T, N], contiguous.

    tile.m rows of y and 16 * tile.warps of W a program; T > 0; the arguments are those of `quantlib.grouped_linear`.
    """
    from quantlib.triton_kernels.grouped import grouped_kernel

    experts, n, k = weight.shape
    # Narrow blocks can afford scales in their accumulators.
    arguments = _expert_arguments(weight, x.dtype, "skinny" if tile.m <= 64 else "gemm")
    slots = _slots(y.shape[0], experts, tile.m)
    tensors = {"x": x, "y": y, "bias": bias, "offsets": offsets, "rows": rows, "row_scale": row_scale}
    sizes = {"total": y.shape[0], "experts": experts, "M": x.shape[0], "N": n, "K": k, "x_stride": x.stride(0)}
    constants = {"BLOCK_M": tile.m, "WARPS": tile.warps, "STAGES": tile.stages, "BY_WARP": by_warp(capability)}
    grid = (_ceil(n, 16 * tile.warps) * slots["slots"],)
    return Launch(grouped_kernel, grid, {**tensors, **sizes, **slots, **arguments, **constants}, tile.options)


def grouped_dgrad_launch(
    dy: Tensor, weight: QuantizedExperts, offsets: Tensor, row_scale: Tensor | None, dx: Tensor, tile: Tile
) -> Launch:
    """dy [T, N] (`whole_columns` of tile.n) times the experts' W -> dx [T, K], contiguous; T > 0; tile as in `dgrad_launch`."""
    from quantlib.triton_kernels.grouped import grouped_dgrad_kernel

    experts, n, k = weight.shape
    arguments = _expert_arguments(weight, dy.dtype, "dgrad")
    slots = _slots(dy.shape[0], experts, tile.m)
    down, across = tile.n // 16, tile.warps * 16 // tile.n
    tensors = {"dy": dy, "dx": dx, "offsets": offsets, "row_scale": row_scale}
    sizes = {"total": dy.shape[0], "experts": experts, "N": n, "K": k, "dy_stride": dy.stride(0)}
    constants = {"BLOCK_M": tile.m, "DOWN": down, "ACROSS": across, "STAGES": tile.stages}
    grid = (_ceil(k, arguments["spec"].tile_columns * across) * slots["slots"],)
    return Launch(grouped_dgrad_kernel, grid, {**tensors, **sizes, **slots, **arguments, **constants}, tile.options)
