"""How the CUDA kernels of the fragments layout are launched: which instance serves a format, and its arguments.

`module` is quantlib._cuda, or in tests the same functions compiled for the emulator; nothing here loads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quantlib.formats.base import Format
from quantlib.formats.codecs import Affine, Minifloat, Table
from quantlib.formats.scales import DYNAMIC_MAP, FloatScale
from quantlib.kernels.triton_launch import device_table
from quantlib.layouts import fragments
from quantlib.tensor import QuantizedTensor

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
TURN = 128
"""Columns of W that a warp decodes between two barriers."""


@dataclass(frozen=True)
class Variant:
    """One compiled instance (csrc/cuda/sm80/variants.h)."""

    index: int
    codec: str
    scaling: str
    dtype: str
    rows: int
    columns: int
    depth: int
    threads: int
    shared_bytes: int


@lru_cache(maxsize=8)
def variants(module: Any, kernel: str) -> tuple[Variant, ...]:
    """The instances of a kernel ("sm80_linear_frag") in a module."""
    return tuple(Variant(index, **facts) for index, facts in enumerate(getattr(module, f"{kernel}_variants")()))


def _scale_columns(fmt: Format) -> str | None:
    """Why blocks of one row don't fit turns of 128 columns, or None."""
    cols = fmt.block.cols
    fits = cols is None or cols in (32, 64) or (cols % TURN == 0 and (cols // TURN).bit_count() == 1)
    return None if fits else f"takes blocks of 32, 64 or 128 columns times a power of two, not of {cols}"


def arithmetic(fmt: Format, dtype: torch.dtype) -> tuple[str, str] | str:
    """(codec, scaling) of the instances that decode a format, from its kinds alone; or why there are none."""
    codec, scale, block = fmt.codec, fmt.scale, fmt.block
    of_rows = block.rows == 1
    if isinstance(codec, Affine):
        if codec.bits not in (2, 3, 4, 8):
            return f"decodes integers of 2, 3, 4 and 8 bits, not of {codec.bits}"
        if fmt.zero == "minimum":
            return "decodes integers without minima"
        if codec.bits == 8 and (fmt.zero != "none" or not codec.signed):
            return "decodes 8-bit integers without zero points"
        if not isinstance(scale, FloatScale) or (block.cols is not None and scale.dtype == torch.float32):
            return "decodes integers with fp16 or bf16 scales"
        if not of_rows and block.rows is not None:
            return "decodes integers whose blocks are of one row"
        return _scale_columns(fmt) or (f"int{codec.bits}", "half")
    if isinstance(codec, Table):
        if codec.bits != 4 or not of_rows or block.cols is None or block.cols < 64:
            return "decodes code books of 16 numbers with scales by blocks of 64 columns and more"
        if isinstance(scale, FloatScale) and scale.dtype == torch.float32:
            return _scale_columns(fmt) or ("table", "single")
        if scale.kind == "double":
            fits = block.cols in (64, TURN)
            return ("table", "twice") if fits else f"takes doubly quantized scales per 64 or 128 columns, not per {block.cols}"
        return "decodes code books with fp32 or doubly quantized scales"
    if isinstance(codec, Minifloat) and codec.bits == 4:
        if (codec.exponent_bits, codec.mantissa_bits) != (2, 1):
            return "decodes 4-bit floats with two exponent bits"
        if scale.kind == "e4m3_global" and of_rows and block.cols == 16:
            return "float4", "weights"
        if scale.kind == "e8m0" and of_rows and block.cols == 32:
            return "float4", "power"
        return "decodes 4-bit floats with E4M3 scales per 16 or E8M0 scales per 32"
    if isinstance(codec, Minifloat) and (codec.exponent_bits, codec.mantissa_bits) in ((4, 3), (5, 2)):
        if not isinstance(scale, FloatScale):
            return "decodes 8-bit floats with scales that are floats"
        if block.cols is not None and (block.cols != TURN or of_rows):
            return "decodes 8-bit floats with scales per row, per tensor or per 2-D block of 128 columns"
        return f"e{codec.exponent_bits}m{codec.mantissa_bits}", "grid"
    return f"decodes integers, code books of 16 and small floats, not {fmt.codec.kind} of {codec.bits} bits"


_OUTER = {"e4m3_global": "global_scale", "double": "scale_absmax"}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def weight_tensors(weight: QuantizedTensor) -> dict[str, Tensor]:
    """Everything that a kernel reads of a weight: its parts, and the tables of its codec and scales on its device."""
    found = dict(weight.parts)
    if isinstance(weight.format.codec, Table):
        found["table"] = device_table(weight.format.codec.entries, weight.device)
    if weight.format.scale.kind == "double":
        found["scale_map"] = device_table(DYNAMIC_MAP.entries, weight.device)
    return found


def weight_argument(module: Any, weight: QuantizedTensor) -> Any:
    """The module's FragmentWeight; the caller keeps `weight_tensors` alive for as long."""
    fmt, (n, k), parts = weight.format, weight.shape, weight_tensors(weight)
    strip, block = bool(fragments.strip_parts(fmt)), fmt.block
    home = "strip" if strip else "row" if block.rows == 1 else "tensor" if block.rows is None and block.cols is None else "grid"
    width, cols = fragments.tile_columns(fmt), block.cols or 0
    scale_dtype = str(fmt.scale.dtype).removeprefix("torch.") if isinstance(fmt.scale, FloatScale) else "byte"
    return module.FragmentWeight(
        planes=[parts[name].data_ptr() for name in fragments.plane_names(fmt)],
        scales=parts["scales"].data_ptr(),
        zeros=_address(parts.get("zeros")),
        outer=_address(parts.get(_OUTER.get(fmt.scale.kind, ""))),
        inner=_address(parts.get("scale_offset")),
        scale_map=_address(parts.get("scale_map")),
        table=_address(parts.get("table")),
        n=n,
        k=k,
        tiles=parts["codes"].shape[1],
        tile_columns=width,
        group=cols if strip else 0,
        block_rows=block.rows or 0,
        across=fmt.grid(n, k)[1],
        unit_columns=max(cols, width) if strip else TURN,
        units=parts["scales"].shape[1] if strip else 0,
        offset=fmt.codec.offset if isinstance(fmt.codec, Affine) else 0,
        scale_dtype=scale_dtype,
        scale_home=home,
    )


def aligned_rows(x: Tensor, multiple: int = 8) -> Tensor:
    """x [M, C] as asynchronous copies of 16 bytes want it: rows that begin at multiples of 8 elements and end with zeros up to
    `multiple` of them; x itself where it lies so already."""
    m, columns = x.shape
    if columns % multiple == 0 and x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    whole = x.new_zeros(m, -(-columns // multiple) * multiple)
    whole[:, :columns] = x
    return whole


@dataclass(frozen=True)
class Deal:
    """How the work is dealt out: `blocks` of the result, of `turns` turns each, `each` turns to each of `programs`."""

    blocks: int
    turns: int
    each: int
    programs: int

    @property
    def shared(self) -> bool:
        """Whether some block's turns lie with several programs, which then meet."""
        return self.each % self.turns != 0


def deal(m: int, across: int, depth: int, variant: Variant, wanted: int) -> Deal:
    """M rows, `across` columns of the result and `depth` columns of the reduction, for about `wanted` programs.

    Where there are more blocks than programs are wanted, blocks stay whole as long as that leaves no program with a quarter
    more to do than the mean."""
    blocks = -(-m // variant.rows) * -(-across // variant.columns)
    turns = -(-depth // variant.depth)
    total = blocks * turns
    each = -(-total // min(total, wanted))
    whole = -(-each // turns) * turns
    if whole * 4 <= each * 5:
        each = whole
    return Deal(blocks, turns, each, -(-total // each))


def launch_linear(
    module: Any,
    launch: Callable[..., None],
    variant: Variant,
    argument: Any,
    x: Tensor,
    n: int,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    dealt: Deal,
    partial: Tensor | None,
    counters: Tensor | None,
    stream: int,
) -> None:
    """y [M, N] = x [M, K] (`aligned_rows`) W^T plus bias [N] plus residual [M, N]; both of x's dtype, contiguous.

    launch       the module's sm80_linear_frag; or sm80_gemv, whose x has at most 8 rows and zeros up to a multiple of 128

    argument     the module's FragmentWeight
    partial      fp32 [2 * programs * rows * columns]; counters: int32 [blocks], zero before and after; None where not shared
    """
    schedule = module.Schedule(dealt.blocks, dealt.turns, dealt.each, _address(partial), _address(counters))
    launch(
        variant.index, argument, x.data_ptr(), x.stride(0), y.data_ptr(), _address(bias), _address(residual), y.shape[0],
        schedule, dealt.programs, stream,
    )  # fmt: skip


def launch_dgrad(
    module: Any,
    launch: Callable[..., None],
    variant: Variant,
    argument: Any,
    dy: Tensor,
    dx: Tensor,
    dealt: Deal,
    partial: Tensor | None,
    counters: Tensor | None,
    stream: int,
) -> None:
    """dx [M, K] = dy [M, N] (`aligned_rows`) W; the rest as in `launch_linear`."""
    schedule = module.Schedule(dealt.blocks, dealt.turns, dealt.each, _address(partial), _address(counters))
    launch(variant.index, argument, dy.data_ptr(), dy.stride(0), dx.data_ptr(), dx.shape[0], schedule, dealt.programs, stream)
