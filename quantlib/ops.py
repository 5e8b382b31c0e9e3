"""torch's view of the multiplication: library ops with fake implementations and autograd, and the functional form.

Inference in eager mode calls dispatch directly; the library ops are taken where torch must see them (compilation, autograd).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlib import dispatch
from quantlib.errors import ShapeError
from quantlib.formats import get_format
from quantlib.tensor import QuantizedTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _weight(parts: list[Tensor], names: str, fmt: str, n: int, k: int, layout: str) -> QuantizedTensor:
    return QuantizedTensor(get_format(fmt), (n, k), dict(zip(names.split(","), parts, strict=True)), layout)


@torch.library.custom_op("quantlib::linear", mutates_args=())
def linear_op(
    x: Tensor,
    parts: list[Tensor],
    bias: Tensor | None,
    names: str,
    fmt: str,
    n: int,
    k: int,
    layout: str,
    activations: str | None,
    kernel: str | None,
    batch_invariant: bool,
) -> Tensor:
    """x [..., k] -> [..., n] of x's dtype; `parts` in the order of the comma-separated `names`."""
    weight = _weight(parts, names, fmt, n, k, layout)
    y = dispatch.run("linear", x.reshape(-1, k), weight, bias, activations, kernel, batch_invariant)
    return y.view(*x.shape[:-1], n)


@linear_op.register_fake
def _(
    x: Tensor,
    parts: list[Tensor],
    bias: Tensor | None,
    names: str,
    fmt: str,
    n: int,
    k: int,
    layout: str,
    activations: str | None,
    kernel: str | None,
    batch_invariant: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


@torch.library.custom_op("quantlib::linear_dgrad", mutates_args=())
def dgrad_op(dy: Tensor, parts: list[Tensor], names: str, fmt: str, n: int, k: int, layout: str) -> Tensor:
    """dy [..., n] -> dx [..., k]: dy times the decoded weight, from the same packed parts as the forward pass."""
    weight = _weight(parts, names, fmt, n, k, layout)
    return dispatch.run("dgrad", dy.reshape(-1, n), weight).view(*dy.shape[:-1], k)


@dgrad_op.register_fake
def _(dy: Tensor, parts: list[Tensor], names: str, fmt: str, n: int, k: int, layout: str) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], k)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, parts, bias, *ctx.weight, _, _, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*parts)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    parts = list(ctx.saved_tensors)
    dx = dgrad_op(dy, parts, *ctx.weight) if ctx.needs_input_grad[0] else None
    dbias = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
    return dx, [None] * len(parts), dbias, *[None] * 8


linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)


def _dgrad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, parts, *ctx.weight = inputs
    ctx.save_for_backward(*parts)


def _dgrad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    parts = list(ctx.saved_tensors)
    return linear_op(ddx, parts, None, *ctx.weight, None, None, False), [None] * len(parts), *[None] * 5


dgrad_op.register_autograd(_dgrad_backward, setup_context=_dgrad_setup)


def linear_from_parts(
    x: Tensor,
    parts: list[Tensor],
    bias: Tensor | None,
    names: str,
    fmt: str,
    n: int,
    k: int,
    layout: str = "rows",
    activations: str | None = None,
    kernel: str | None = None,
    batch_invariant: bool = False,
    weight: QuantizedTensor | None = None,
) -> Tensor:
    """`linear` for a caller that holds the parts one by one (QuantLinear): arguments as in the op `quantlib::linear`, and the
    same parts as one object where the caller keeps one, so that what kernels remember with it is found again.

    Raises ShapeError for an x whose last dimension is not k, or whose dtype or device does not fit.
    """
    if x.shape[-1:] != (k,):
        raise ShapeError(f"x has the shape {list(x.shape)}; the weight is [{n}, {k}], so x's last dimension must be {k}")
    if x.device != parts[0].device:
        raise ShapeError(f"x is on {x.device}, the weight on {parts[0].device}; move one of them")
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.dtype not in DTYPES:
        raise ShapeError(f"x has the dtype {x.dtype}; expected fp32, bf16, fp16 or fp64")
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if wants_grad or torch.compiler.is_compiling():
        result: Tensor = linear_op(x, parts, bias, names, fmt, n, k, layout, activations, kernel, batch_invariant)
        return result
    if weight is None:
        weight = _weight(parts, names, fmt, n, k, layout)
    if x.dim() == 2:
        return dispatch.run("linear", x, weight, bias, activations, kernel, batch_invariant)
    y = dispatch.run("linear", x.reshape(-1, k), weight, bias, activations, kernel, batch_invariant)
    return y.view(*x.shape[:-1], n)


def linear(
    x: Tensor,
    qweight: QuantizedTensor,
    bias: Tensor | None = None,
    activations: str | None = None,
    *,
    kernel: str | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """y = x W^T + bias with a quantized W [N, K]; differentiable in x and bias.

    x            [..., K] fp32, bf16, fp16 or fp64, any strides; y is [..., N] of x's dtype
    bias         [N] or None
    activations  None (weights only) or the format that x is rounded to first, with the same result on every device
    kernel       force a kernel by name; batch_invariant: bit-equal rows whatever the batch

    Raises ShapeError (shapes, dtype, device) and KernelError (a forced kernel that can't).
    """
    parts, names = list(qweight.parts.values()), ",".join(qweight.parts)
    n, k = qweight.shape
    name = qweight.format.name
    return linear_from_parts(x, parts, bias, names, name, n, k, qweight.layout, activations, kernel, batch_invariant, qweight)
