"""How the Triton kernels of low-precision activations are launched: quantizers, and the product of two quantized operands.

Tests, launches and the compile check all build their arguments here, so that what is compiled is what runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quantlib.formats.base import Format
from quantlib.formats.codecs import E2M1, E4M3, E5M2, Affine
from quantlib.formats.scales import E4M3GlobalScale, E8M0Scale, FloatScale
from quantlib.kernels.triton_launch import Launch, Tile, interpreting
from quantlib.layouts.swizzled import swizzled_grid, swizzled_size
from quantlib.tensor import QuantizedTensor

WHOLE_ROW = 16384
"""The longest row that one program keeps in registers: 32 elements a thread of 16 warps."""

MOST_PEAKS = 512
"""Parts of the largest magnitude: enough programs to fill a chip, few enough for every program of the next kernel to read."""

LONGEST_INT8_ROW = 1 << 16
"""K up to which an int32 sum of int8 products can't overflow, with a factor of two to spare."""

_ELEMENTS = {E2M1: "e2m1", E4M3: "e4m3", E5M2: "e5m2", Affine(8, signed=True): "int8"}


@lru_cache(maxsize=1)
def import_failure() -> str | None:
    """None where Triton and these kernels can be imported; otherwise the reason."""
    try:
        import quantlib.triton_kernels.quantize
        import quantlib.triton_kernels.scaled_gemm  # noqa: F401
    except Exception as error:  # a broken Triton raises anything, from ImportError to RuntimeError
        return f"Triton can't be used: {type(error).__name__}: {error}"
    return None


# formats


def element_of(fmt: Format) -> str | None:
    """The kernels' word for a format's codes, or None where they have none."""
    return _ELEMENTS.get(fmt.codec)


def quantizer_refusal(fmt: Format) -> str | None:
    """Why no kernel quantizes activations to the format, or None."""
    element, block = element_of(fmt), (fmt.block.rows, fmt.block.cols)
    if element is None or fmt.zero != "none" or fmt.rule != "absmax" or fmt.divisors:
        return f"no kernel quantizes activations to {fmt}; there are kernels for fp8, fp8-g128, int8, nvfp4, mxfp8 and mxfp4"
    if isinstance(fmt.scale, FloatScale):
        if block in ((1, None), (None, None)) and element in ("e4m3", "int8"):
            return None
        if block == (1, 128) and element == "e4m3" and fmt.scale.dtype == torch.float32:
            return None
        return f"no kernel quantizes activations to {fmt}: float scales are per token or tensor, or per 1x128 for fp8"
    if isinstance(fmt.scale, (E4M3GlobalScale, E8M0Scale)) and block in ((1, 16), (1, 32)):
        return None
    return f"no kernel quantizes activations to {fmt}: its blocks or scales are of another kind"


def pair_refusal(activations: Format, weight: Format) -> str | None:
    """Why no kernel multiplies activations with weights of these formats, both quantized, or None."""
    refusal = quantizer_refusal(activations)
    if refusal is not None:
        return refusal
    element, scale = element_of(weight), weight.scale.kind
    words = f"activations in {activations} are multiplied with"
    if activations.scale.kind == "e4m3_global":
        fits = element == "e2m1" and scale == "e4m3_global" and weight.block.cols == activations.block.cols
        return None if fits else f"{words} nvfp4 weights, not with {weight}"
    if activations.scale.kind == "e8m0":
        fits = element in ("e2m1", "e4m3", "e5m2") and scale == "e8m0" and weight.block.cols == activations.block.cols
        return None if fits else f"{words} mxfp4 and mxfp8 weights, not with {weight}"
    whole = weight.block.cols is None and weight.block.rows in (1, None)
    if element_of(activations) == "int8":
        fits = element == "int8" and scale == "float" and whole and weight.zero == "none"
        return None if fits else f"{words} int8 weights of one scale per channel or tensor, not with {weight}"
    fits = element in ("e4m3", "e5m2") and scale == "float" and (whole or weight.block.cols == 128)
    return None if fits else f"{words} fp8 weights, not with {weight}"


def operand_spec(fmt: Format, two_complement: bool = False) -> Any:
    """The compile-time facts (triton_kernels.scaled_gemm.OperandSpec) of an operand; `two_complement`: of int8 codes."""
    from quantlib.triton_kernels.scaled_gemm import OperandSpec

    element = element_of(fmt)
    offset = 128 if element == "int8" and not two_complement else 0
    return OperandSpec(element, fmt.scale.kind, fmt.block.rows or 0, fmt.block.cols or 0, offset)


# quantizers


@dataclass(frozen=True)
class Activations:
    """x [M, K] in a format: the parts of its rows layout, in the forms that kernels read.

    codes         as the rows layout has them; int8 codes in two's complement (the rows layout's less 128), dtype int8
    scales        [M, K / block] of any strides, or `swizzled`: flat, in the 128x4 order
    global_scale  fp32, one (nvfp4), else None
    """

    format: Format
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    global_scale: Tensor | None = None
    swizzled: bool = False


def empty_activations(
    fmt: Format, m: int, k: int, device: torch.device | str, swizzled: bool = False, by_column: bool = False
) -> Activations:
    """Uninitialised activations [m, k]. swizzled: scales of NVFP4 and MX in the 128x4 order; by_column: scales with the rows
    contiguous, as torch's blockwise product reads them."""
    specs = fmt.specs(m, k)
    codes = torch.empty(specs["codes"].shape, dtype=torch.int8 if element_of(fmt) == "int8" else torch.uint8, device=device)
    rows, across = specs["scales"].shape
    if swizzled:
        scales = torch.empty(swizzled_size(rows, across), dtype=specs["scales"].dtype, device=device)
    elif by_column:
        scales = torch.empty(across, rows, dtype=specs["scales"].dtype, device=device).T
    else:
        scales = torch.empty(rows, across, dtype=specs["scales"].dtype, device=device)
    has_global = "global_scale" in specs
    global_scale = torch.empty((), dtype=torch.float32, device=device) if has_global else None
    return Activations(fmt, (m, k), codes, scales, global_scale, swizzled)


def _casts(element: str, capability: int) -> bool:
    """Whether the chip converts fp32 to the element; Triton's interpreter rounds otherwise than the instruction."""
    needed = {"e4m3": 89, "e2m1": 100}.get(element)
    return needed is not None and capability >= needed and not interpreting()


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def rows_tile(columns: int) -> Tile:
    """The tile of `quantize_rows`: a whole row where it fits, about 32 elements a thread."""
    block = max(128, _power_of_two(columns)) if columns <= WHOLE_ROW else 8192
    return Tile(1, 0, block, min(max(block // 1024, 1), 16), 1)


def blocks_tile(m: int, columns: int, group: int) -> Tile:
    """The tile of `quantize_blocks`: up to 1024 columns, and so many rows that a thread has about 32 elements."""
    block_k = min(max(_power_of_two(columns), 4 * group), 1024)
    return Tile(min(_power_of_two(m), 4096 // block_k), 0, block_k, 4, 1)


def absmax_launch(x: Tensor, peaks: Tensor) -> Launch:
    """The bits of the largest magnitude of x [M, K] (unit column stride) in parts -> peaks int32."""
    from quantlib.triton_kernels.quantize import absmax_kernel

    m, k = x.shape
    tile = Tile(1, 0, min(max(_power_of_two(k), 128), 4096), 4, 1)
    arguments = {"x": x, "peaks": peaks, "M": m, "K": k, "x_stride": x.stride(0), "BLOCK_K": tile.k}
    return Launch(absmax_kernel, (peaks.numel(),), arguments, tile.options)


def empty_peaks(x: Tensor) -> Tensor:
    """Room for the parts of the largest magnitude of x [M, K]."""
    m, k = x.shape
    return torch.empty(min(m * -(-k // 4096), MOST_PEAKS), dtype=torch.int32, device=x.device)


def _peak_arguments(peaks: Tensor | None) -> dict[str, int]:
    count = 0 if peaks is None else peaks.numel()
    return {"PEAKS": count, "BLOCK_PEAKS": _power_of_two(count)}


def rows_launch(x: Tensor, out: Activations, peaks: Tensor | None, capability: int) -> Launch:
    """x [M, K] (unit column stride) -> codes and one scale per row; with `peaks`, one scale for all."""
    from quantlib.triton_kernels.quantize import quantize_rows_kernel

    m, k = x.shape
    columns = out.codes.shape[1]
    element = element_of(out.format) or ""
    tile = rows_tile(columns)
    arguments = {
        "x": x,
        "codes": out.codes.view(torch.uint8),
        "scales": out.scales,
        "peaks": peaks,
        "K": k,
        "columns": columns,
        "x_stride": x.stride(0),
        "DIVISOR": out.format.codec.divisor,
        "ELEMENT": element,
        "CAST": _casts(element, capability),
        "WHOLE": columns <= tile.k,
        **_peak_arguments(peaks),
        "BLOCK_K": tile.k,
    }
    return Launch(quantize_rows_kernel, (m,), arguments, tile.options)


def blocks_launch(x: Tensor, out: Activations, peaks: Tensor | None, capability: int) -> Launch:
    """x [M, K] (unit column stride) -> codes and block scales. With `peaks` the global scale is made from them and written;
    without, it is read from `out`."""
    from quantlib.triton_kernels.quantize import quantize_blocks_kernel

    m, k = x.shape
    fmt = out.format
    element, group, columns = element_of(fmt) or "", fmt.block.cols or 1, fmt.padded(k)
    across = columns // group
    rows, places = swizzled_grid(m, across) if out.swizzled else (m, across)
    tile = blocks_tile(m, columns, group)
    arguments = {
        "x": x,
        "codes": out.codes,
        "scales": out.scales,
        "peaks": peaks,
        "global_scale": out.global_scale,
        "M": m,
        "K": k,
        "columns": columns,
        "across": across,
        "x_stride": x.stride(0),
        "scale_row_stride": 0 if out.swizzled else out.scales.stride(0),
        "scale_column_stride": 0 if out.swizzled else out.scales.stride(1),
        "DIVISOR": fmt.codec.divisor,
        "TOP": fmt.codec.divisor * fmt.scale.top if isinstance(fmt.scale, E4M3GlobalScale) else 0.0,
        "ELEMENT": element,
        "SCALE": fmt.scale.kind,
        "CEIL": isinstance(fmt.scale, E8M0Scale) and fmt.scale.rule == "ceil",
        "GROUP": group,
        "SWIZZLED": out.swizzled,
        "CAST": _casts(element, capability),
        **_peak_arguments(peaks),
        "BLOCK_M": tile.m,
        "BLOCK_K": tile.k,
    }
    grid = (-(-rows // tile.m), -(-places * group // tile.k))
    return Launch(quantize_blocks_kernel, grid, arguments, tile.options)


def quantize_launches(x: Tensor, out: Activations, dynamic: bool, capability: int) -> list[Launch]:
    """The launches, in order, that quantize x [M, K] (M > 0, unit column stride) into `out`.

    dynamic: nvfp4's global scale is taken from x and written to `out`; otherwise `out` holds it already.
    """
    by_row = out.format.scale.kind == "float" and out.format.block.cols is None
    whole = out.format.block.rows is None or (out.global_scale is not None and dynamic)
    peaks = empty_peaks(x) if whole else None
    launches = [] if peaks is None else [absmax_launch(x, peaks)]
    return [*launches, rows_launch(x, out, peaks, capability) if by_row else blocks_launch(x, out, peaks, capability)]


# the product


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, int]:
    """(major, minor) of the installed Triton; (0, 0) without one."""
    try:
        import triton
    except Exception:  # a broken Triton raises anything
        return 0, 0
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def block_scaled_natively(capability: int) -> bool:
    """Whether Triton multiplies block-scaled operands by the chip's own instruction: sm_100, 103, 120, and 121 since 3.8."""
    return capability in (100, 103, 120) or (capability == 121 and triton_version() >= (3, 8))


def math_of(activations: Format, dtype: torch.dtype, capability: int) -> tuple[str, torch.dtype]:
    """(MATH, COMPUTE) of scaled_gemm for x of `dtype`: native where the chip has the instruction, else decoded to 16 bits.

    fp32 results are multiplied in fp32: FP8 instructions sum with fewer bits. Triton's interpreter (capability 0) knows none.
    """
    if element_of(activations) == "int8":
        return "int8", torch.float32
    if dtype == torch.float32 or capability == 0:
        return "decode", torch.float32
    if activations.scale.kind == "float":
        return ("fp8" if capability >= 89 else "decode"), torch.float16
    return ("scaled" if block_scaled_natively(capability) else "decode"), torch.bfloat16


def gemm_tile(m: int, math: str, compute: torch.dtype, deep: bool, stepped: bool, capability: int) -> Tile:
    """The tile of `scaled_gemm`. deep: 4-bit codes in whole steps of 256; stepped: float scales change along K.

    Where registers are bounded, ptxas left alone spills single values to reach a higher occupancy.
    """
    if math == "decode" and compute == torch.float32:
        return Tile(16 if m <= 16 else 32, 32, 64, 4, 2, registers=255)
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    warps = 4 if block_m < 128 else 8
    if math == "decode":
        return Tile(block_m, 128 if block_m == 128 else 64, 64, warps, 3, registers=255 if block_m == 64 else None)
    if math == "scaled":
        # mma.sync holds operands in registers, tcgen05 doesn't.
        warps = 8 if block_m >= 64 and capability >= 120 else warps
        return Tile(block_m, 128, 256 if deep else 128, warps, 3, registers=None if block_m == 128 else 255)
    stages = 2 if capability in (89, 120, 121) else 4
    if stepped and capability >= 100:
        # Two accumulators and the scales of a row of the tile share the registers.
        return Tile(min(block_m, 64), 128, 128, 4 if block_m < 64 else 8, stages)
    return Tile(block_m, 128, 128, warps, stages)


_TRITON_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_CODE_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def _native_codes(codes: Tensor, fmt: Format, math: str) -> Tensor:
    """Codes with the dtype that the instruction expects; decoding and E2M1 take bytes."""
    return codes.view(_CODE_DTYPES.get(element_of(fmt) or "", codes.dtype)) if math in ("fp8", "scaled") else codes


def _native_scales(scales: Tensor, fmt: Format, math: str) -> Tensor:
    return scales.view(torch.float8_e4m3fn) if math == "scaled" and fmt.scale.kind == "e4m3_global" else scales


def gemm_launch(
    a: Activations,
    weight: QuantizedTensor,
    bias: Tensor | None,
    y: Tensor,
    capability: int,
    residual: Tensor | None = None,
    batch_invariant: bool = False,
) -> Launch:
    """a [M, K] times W^T plus bias [N] and residual [M, N] -> y [M, N], contiguous; a's scales plain and contiguous."""
    import triton.language as tl

    from quantlib.triton_kernels.scaled_gemm import scaled_gemm_kernel

    (m, k), n = a.shape, weight.shape[0]
    math, compute = math_of(a.format, y.dtype, capability)
    columns = min(a.format.padded(k), weight.format.padded(k))
    elements = {element_of(a.format), element_of(weight.format)}
    deep = elements == {"e2m1"} and columns % 256 == 0
    stepped = a.format.scale.kind == "float" and (a.format.block.cols or weight.format.block.cols) is not None
    tile = gemm_tile(1 if batch_invariant else m, math, compute, deep, stepped, capability)
    codes, scales = weight.parts["codes"], weight.parts["scales"]
    arguments = {
        "a": _native_codes(a.codes, a.format, math),
        "a_scales": _native_scales(a.scales, a.format, math),
        "a_global": a.global_scale,
        "w": _native_codes(codes, weight.format, math),
        "w_scales": _native_scales(scales, weight.format, math),
        "w_global": weight.parts.get("global_scale"),
        "bias": bias,
        "residual": residual,
        "y": y,
        "M": m,
        "N": n,
        "columns": columns,
        "a_stride": a.codes.shape[1],
        "w_stride": codes.shape[1],
        "a_across": a.scales.shape[1],
        "w_across": scales.shape[1],
        "a_spec": operand_spec(a.format, two_complement=True),
        "w_spec": operand_spec(weight.format),
        "MATH": math,
        "COMPUTE": getattr(tl, _TRITON_DTYPES[compute]),
        "EXPAND": math == "scaled" and capability >= 120 and len(elements) > 1 and "e2m1" in elements,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "EVEN_K": columns % tile.k == 0,
    }
    return Launch(scaled_gemm_kernel, (-(-m // tile.m) * -(-n // tile.n),), arguments, tile.options)
