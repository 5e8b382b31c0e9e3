"""torch's view of the grouped multiplication: library ops with fake implementations and autograd, and the functional form.

As in ops.py, inference in eager mode calls dispatch directly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlib import grouped_dispatch
from quantlib.errors import ShapeError
from quantlib.experts import QuantizedExperts
from quantlib.formats import get_format
from quantlib.kernels.base import Grouping
from quantlib.ops import DTYPES


def _experts(parts: list[Tensor], names: str, fmt: str, shape: list[int], layout: str) -> QuantizedExperts:
    experts, n, k = shape
    return QuantizedExperts(get_format(fmt), (experts, n, k), dict(zip(names.split(","), parts, strict=True)), layout)


@torch.library.custom_op("quantlib::grouped_linear", mutates_args=())
def grouped_linear_op(
    x: Tensor,
    parts: list[Tensor],
    offsets: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    row_scale: Tensor | None,
    names: str,
    fmt: str,
    shape: list[int],
    layout: str,
    kernel: str | None,
) -> Tensor:
    """x [M, K] -> [T, N] of x's dtype; `parts` in the order of the comma-separated `names`, shape (E, N, K)."""
    weight = _experts(parts, names, fmt, shape, layout)
    return grouped_dispatch.run("grouped", x, weight, Grouping(offsets, rows, row_scale), bias, kernel)


@grouped_linear_op.register_fake
def _(
    x: Tensor,
    parts: list[Tensor],
    offsets: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    row_scale: Tensor | None,
    names: str,
    fmt: str,
    shape: list[int],
    layout: str,
    kernel: str | None,
) -> Tensor:
    return x.new_empty(x.shape[0] if rows is None else rows.shape[0], shape[1])


@torch.library.custom_op("quantlib::grouped_linear_dgrad", mutates_args=())
def grouped_dgrad_op(
    dy: Tensor,
    parts: list[Tensor],
    offsets: Tensor,
    row_scale: Tensor | None,
    names: str,
    fmt: str,
    shape: list[int],
    layout: str,
) -> Tensor:
    """dy [T, N] -> row_scale * dy W[expert] [T, K], from the same packed parts as the forward pass."""
    weight = _experts(parts, names, fmt, shape, layout)
    return grouped_dispatch.run("grouped_dgrad", dy, weight, Grouping(offsets, None, row_scale))


@grouped_dgrad_op.register_fake
def _(
    dy: Tensor,
    parts: list[Tensor],
    offsets: Tensor,
    row_scale: Tensor | None,
    names: str,
    fmt: str,
    shape: list[int],
    layout: str,
) -> Tensor:
    return dy.new_empty(dy.shape[0], shape[2])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _times(tensor: Tensor, row_scale: Tensor | None) -> Tensor:
    """Each row times its scale, rounded once to the tensor's dtype."""
    return tensor if row_scale is None else (_wide(tensor) * _wide(row_scale)[:, None]).to(tensor.dtype)


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each row of a with that of b: [T], fp32 or wider."""
    return (_wide(a) * _wide(b)).sum(-1)


def _sum_of_experts(tensor: Tensor, offsets: Tensor) -> Tensor:
    """[T, N] -> [E, N]: the sum over each expert's rows, in the order of the rows, fp32 or wider."""
    # `unsafe` leaves out a check that waits for the GPU.
    return torch.segment_reduce(_wide(tensor), "sum", offsets=offsets, axis=0, unsafe=True, initial=0)


def _sum_of_sources(tensor: Tensor, rows: Tensor, count: int) -> Tensor:
    """[T, K] -> [count, K]: the sum of the rows that read the same row of x, the same on every run."""
    out = tensor.new_zeros(count, tensor.shape[1])
    if tensor.device.type == "cpu":
        return out.index_add(0, rows, tensor)
    # On a GPU index_add is atomic; this one sorts.
    return out.index_put((rows,), tensor, accumulate=True)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, parts, offsets, bias, rows, row_scale, *ctx.weight, _ = inputs
    ctx.parts = len(parts)
    ctx.rows_of_x = x.shape[0]
    ctx.bias_dtype = None if bias is None else bias.dtype
    # The scales' gradient alone needs x and the bias. (needs_input_grad counts the parts one by one here, and not in backward.)
    learned = row_scale is not None and row_scale.requires_grad
    ctx.save_for_backward(*parts, offsets, rows, row_scale, x if learned else None, bias if learned else None)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    parts = list(ctx.saved_tensors[: ctx.parts])
    offsets, rows, row_scale, x, bias = ctx.saved_tensors[ctx.parts :]
    learned = x is not None
    dx: Tensor | None = None
    dbias: Tensor | None = None
    dscale: Tensor | None = None
    if ctx.needs_input_grad[0] or learned:
        by_row = grouped_dgrad_op(dy, parts, offsets, None if learned else row_scale, *ctx.weight)
        if learned:
            dscale = _scale_gradient(by_row, dy, x if rows is None else x[rows], bias, offsets).to(row_scale.dtype)
            by_row = _times(by_row, row_scale)
        if ctx.needs_input_grad[0]:
            dx = by_row if rows is None else _sum_of_sources(by_row, rows, ctx.rows_of_x)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        scaled = _wide(dy) if row_scale is None else _wide(dy) * _wide(row_scale)[:, None]
        dbias = _sum_of_experts(scaled, offsets).to(ctx.bias_dtype)
    return dx, [None] * len(parts), None, dbias, None, dscale, *[None] * 5


def _scale_gradient(dx: Tensor, dy: Tensor, x: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """[T]: <dy, x W^T + bias>, row by row; the product isn't at hand, but <dy, x W^T> is <dy W, x>."""
    found = _row_products(dx, x)
    if bias is None:
        return found
    # Rows without an expert have no bias either.
    owned = torch.arange(dy.shape[0], device=dy.device) < offsets[-1]
    return found + torch.where(owned, _row_products(dy, bias[_expert_of(offsets, dy.shape[0])]), 0)


def _expert_of(offsets: Tensor, total: int) -> Tensor:
    """[T]: each row's expert; the last one for rows that have none."""
    row = torch.arange(total, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:], row, right=True).clamp(max=offsets.shape[0] - 2)


grouped_linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)


def _dgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, parts, offsets, row_scale, *ctx.weight = inputs
    ctx.parts = len(parts)
    learned = row_scale is not None and row_scale.requires_grad
    ctx.save_for_backward(*parts, offsets, row_scale, dy if learned else None)


def _dgrad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    parts = list(ctx.saved_tensors[: ctx.parts])
    offsets, row_scale, dy = ctx.saved_tensors[ctx.parts :]
    ddy = grouped_linear_op(ddx, parts, offsets, None, None, None if dy is not None else row_scale, *ctx.weight, None)
    dscale = None
    if dy is not None:
        dscale = _row_products(ddy, dy).to(row_scale.dtype)
        ddy = _times(ddy, row_scale)
    return ddy, [None] * len(parts), None, dscale, *[None] * 4


grouped_dgrad_op.register_autograd(_dgrad_backward, setup_context=_dgrad_setup)


def _check_index(name: str, tensor: Tensor, length: int | None, device: torch.device, meaning: str) -> None:
    if tensor.dtype != torch.int32 or tensor.dim() != 1 or (length is not None and tensor.shape[0] != length):
        wanted = "[T]" if length is None else f"[{length}]"
        raise ShapeError(f"{name} is {tensor.dtype} {list(tensor.shape)}; expected torch.int32 {wanted}: {meaning}")
    if tensor.device != device:
        raise ShapeError(f"{name} is on {tensor.device}, x on {device}; move one of them")


def _check(x: Tensor, shape: tuple[int, int, int], device: torch.device, grouping: Grouping, bias: Tensor | None) -> None:
    """Everything that can be checked without waiting for a GPU."""
    experts, n, k = shape
    if x.dim() != 2 or x.shape[1] != k:
        raise ShapeError(f"x has the shape {list(x.shape)}; the experts are {list(shape)}, so x must be [rows, {k}]")
    if x.device != device:
        raise ShapeError(f"x is on {x.device}, the experts on {device}; move one of them")
    _check_index(
        "offsets", grouping.offsets, experts + 1, x.device, "where each expert's rows begin, and where the last one's end"
    )
    if grouping.rows is not None:
        _check_index("rows", grouping.rows, None, x.device, "the row of x that each row of the result reads")
    total = x.shape[0] if grouping.rows is None else grouping.rows.shape[0]
    if bias is not None and bias.shape != (experts, n):
        raise ShapeError(f"bias has the shape {list(bias.shape)}; expected [{experts}, {n}], one row per expert")
    scale = grouping.row_scale
    if scale is not None and (scale.shape != (total,) or not scale.is_floating_point()):
        raise ShapeError(
            f"row_scale is {scale.dtype} {list(scale.shape)}; expected floats [{total}], one per row of the result"
        )


def grouped_linear_from_parts(
    x: Tensor,
    parts: list[Tensor],
    offsets: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    row_scale: Tensor | None,
    names: str,
    fmt: str,
    shape: tuple[int, int, int],
    layout: str = "rows",
    kernel: str | None = None,
) -> Tensor:
    """`grouped_linear` for a caller that holds the parts one by one: arguments as in the op `quantlib::grouped_linear`."""
    _check(x, shape, parts[0].device, Grouping(offsets, rows, row_scale), bias)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.dtype not in DTYPES:
        raise ShapeError(f"x has the dtype {x.dtype}; expected fp32, bf16, fp16 or fp64")
    bias = None if bias is None else bias.to(x.dtype)
    offsets, rows = offsets.contiguous(), None if rows is None else rows.contiguous()
    row_scale = None if row_scale is None else row_scale.contiguous()
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, row_scale))
    if wants_grad or torch.compiler.is_compiling():
        result: Tensor = grouped_linear_op(x, parts, offsets, bias, rows, row_scale, names, fmt, list(shape), layout, kernel)
        return result
    weight = _experts(parts, names, fmt, list(shape), layout)
    return grouped_dispatch.run("grouped", x, weight, Grouping(offsets, rows, row_scale), bias, kernel)


def grouped_linear(
    x: Tensor,
    qexperts: QuantizedExperts,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    row_scale: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """y[t] = row_scale[t] * (x[rows[t]] W[e]^T + bias[e]) for the expert e that row t belongs to.

    x          [M, K] fp32, bf16, fp16 or fp64, any strides; y is [T, N] of x's dtype, in the order of the rows t
    qexperts   the quantized W [E, N, K]
    offsets    int32 [E + 1], ascending from 0: row t belongs to e where offsets[e] <= t < offsets[e + 1]; experts may be empty,
               and rows behind offsets[E] belong to none and give zeros
    bias       [E, N] or None
    rows       int32 [T]: which row of x each row of y reads; None where it is its own, and T = M
    row_scale  float [T], a router's weights; None for 1
    kernel     force a kernel by name

    Differentiable in x, bias and row_scale. A GPU's offsets and rows are never read by the host, so nothing waits, and their
    values aren't checked there.

    Raises ShapeError (shapes, dtypes, devices; on a CPU also offsets that don't ascend) and KernelError (a forced kernel that
    can't).
    """
    parts, names = list(qexperts.parts.values()), ",".join(qexperts.parts)
    name, layout = qexperts.format.name, qexperts.layout
    return grouped_linear_from_parts(x, parts, offsets, bias, rows, row_scale, names, name, qexperts.shape, layout, kernel)
