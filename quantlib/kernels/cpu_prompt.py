"""What lies between the products of a prompt, in the extension: csrc/cpu/prompt_attention.h, prompt_steps.h.

Tensors are on the CPU, in fp32, bf16 or fp16; all of a call in one dtype. What torch would round between operations is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.errors import KernelError, ShapeError
from quantlib.kernels import cpu
from quantlib.kernels.cpu import DTYPES


def _dtype_of(*tensors: Tensor) -> str:
    """The extension's word for the dtype that they share. Raises KernelError."""
    if cpu.unavailable is not None:
        raise KernelError(f"steps of a prompt run in the C++ extension: {cpu.unavailable}")
    first = tensors[0].dtype
    if first not in DTYPES or any(tensor.dtype is not first or not tensor.is_cpu for tensor in tensors):
        found = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in tensors)
        raise KernelError(f"steps of a prompt take fp32, bf16 or fp16 on the CPU, one dtype; found {found}")
    return DTYPES[first]


def prompt_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + epsilon) over runs of the weight's length, in x's shape."""
    dtype, x, width = _dtype_of(x, weight), x.contiguous(), weight.numel()
    y, weight = torch.empty_like(x), weight.contiguous()
    cpu.native().prompt_norm(
        dtype,
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        x.numel() // max(1, width),
        width,
        epsilon,
        torch.get_num_threads(),
    )
    return y


def prompt_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape."""
    if gate.shape != up.shape:
        raise ShapeError(f"a gate takes two tensors of one shape, found {list(gate.shape)} and {list(up.shape)}")
    dtype, gate, up = _dtype_of(gate, up), gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    cpu.native().prompt_gate(dtype, gate.data_ptr(), up.data_ptr(), y.data_ptr(), y.numel(), torch.get_num_threads())
    return y


def prompt_rotate(x: Tensor, angles: tuple[Tensor, Tensor] | None, y: Tensor) -> None:
    """y [heads, M, width], columns side by side, = x [M, heads * width], rotated by (cosine, sine) [M, width] or as it is."""
    heads, m, width = y.shape
    if x.shape != (m, heads * width) or y.stride(2) != 1 or any(part.shape != (m, width) for part in angles or ()):
        found = [list(tensor.shape) for tensor in (x, *(angles or ()), y)]
        raise ShapeError(f"rotating takes x [M, heads * width], angles [M, width] and y [heads, M, width]; found {found}")
    dtype, x = _dtype_of(x, y, *(angles or ())), x.contiguous()
    parts = [part.contiguous() for part in angles or ()]
    cosine, sine = (part.data_ptr() for part in parts) if parts else (0, 0)
    strides = (y.stride(1), y.stride(0))
    cpu.native().prompt_rotate(
        dtype, x.data_ptr(), cosine, sine, y.data_ptr(), strides, m, heads, width, torch.get_num_threads()
    )


def prompt_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """softmax(scale q K^T) V for the last M of S positions, each of which sees those up to itself.

    q             [heads, M, width] of fp32, bf16 or fp16, in any strides
    keys, values  [key heads, S, width] of the same dtype; heads share keys in runs of heads / key heads

    Returns [M, heads, width]. Sums are fp32. Raises ShapeError where shapes don't fit, KernelError for other dtypes or devices.
    """
    heads, m, width = q.shape
    key_heads, positions, _ = keys.shape
    if keys.shape != values.shape or keys.shape[2] != width or heads % max(1, key_heads) or positions < m:
        raise ShapeError(
            "attention takes q [heads, M, width], keys and values [key heads, at least M, width], heads a multiple of those; "
            f"found {list(q.shape)}, {list(keys.shape)} and {list(values.shape)}"
        )
    dtype = _dtype_of(q, keys, values)
    q, keys, values = (tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (q, keys, values))
    y = torch.empty(m, heads, width, dtype=q.dtype)
    places = [part for tensor in (q, keys, values) for part in (tensor.data_ptr(), (tensor.stride(1), tensor.stride(0)))]
    cpu.native().prompt_attention(
        dtype, *places, y.data_ptr(), m, positions - m, heads, key_heads, width, scale, torch.get_num_threads()
    )
    return y
