"""QuantExperts: the gated feed-forward layers of a mixture of experts, on packed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantlib import grouped_dispatch
from quantlib.algorithms import RTN, Algorithm, InputStatistics, Scaling, get_algorithm
from quantlib.errors import CheckpointError, QuantlibError, ShapeError
from quantlib.experts import QuantizedExperts
from quantlib.formats import get_format
from quantlib.formats.base import Format
from quantlib.grouped_ops import grouped_linear_from_parts
from quantlib.nn.linear import FORMAT_KEY, _move
from quantlib.tensor import QuantizedTensor


class GroupedLinear(nn.Module):
    """Rows sorted by expert times the experts' weights; the packed parts are buffers under their own names.

    As in QuantLinear, a state dict holds the rows layout, and changes of dtype leave the parts' bits alone.
    """

    def __init__(self, weight: QuantizedExperts, bias: Tensor | None = None, kernel: str | None = None) -> None:
        super().__init__()
        self.format = weight.format
        self.shape = weight.shape
        self.kernel = kernel
        self._part_names: tuple[str, ...] = ()
        self._set_parts(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def _set_parts(self, weight: QuantizedExperts) -> None:
        for name in self._part_names:
            del self._buffers[name]
        for name, part in weight.parts.items():
            self.register_buffer(name, part)
        self._part_names = tuple(weight.parts)
        self._joined_names = ",".join(weight.parts)
        self.layout = weight.layout

    @property
    def qexperts(self) -> QuantizedExperts:
        """The packed weights, in the layout that they lie in; their parts are this module's buffers."""
        parts = {name: cast(Tensor, self._buffers[name]) for name in self._part_names}
        return QuantizedExperts(self.format, self.shape, parts, self.layout)

    def prepare(self, dtype: torch.dtype) -> GroupedLinear:
        """Bring the weights into the layout that their device's kernels like best for activations of `dtype`; returns self."""
        device = self.qexperts.device
        self._set_parts(
            self.qexperts.to_layout(grouped_dispatch.best_layout(self.format, self.shape, device, dtype, self.kernel))
        )
        return self

    def forward(self, x: Tensor, offsets: Tensor, rows: Tensor | None = None, row_scale: Tensor | None = None) -> Tensor:
        """As quantlib.grouped_linear."""
        parts = [cast(Tensor, self._buffers[name]) for name in self._part_names]
        return grouped_linear_from_parts(
            x, parts, offsets, self.bias, rows, row_scale, self._joined_names, self.format.name, self.shape, self.layout,
            self.kernel,
        )  # fmt: skip

    def extra_repr(self) -> str:
        experts, n, k = self.shape
        return f"experts={experts}, in_features={k}, out_features={n}, bias={self.bias is not None}, format={self.format}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupedLinear:
        parts = self.qexperts.parts
        for name in self._part_names:
            del self._buffers[name]
        try:
            super()._apply(fn, recurse)
            moved = {name: _move(part, fn) for name, part in parts.items()}
        except BaseException:
            self._buffers.update(parts)
            raise
        self._buffers.update(moved)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        own = self.qexperts
        self._set_parts(own.to_layout("rows"))
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + FORMAT_KEY] = torch.tensor(list(self.format.name.encode()), dtype=torch.uint8)
        self._set_parts(own)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        found = state_dict.pop(prefix + FORMAT_KEY, None)
        if found is not None and bytes(found.tolist()).decode() != self.format.name:
            stored = bytes(found.tolist()).decode()
            raise CheckpointError(
                f"{prefix.rstrip('.') or 'experts'}: the state dict holds {stored}, the layer is {self.format}"
            )
        layout = self.layout
        self._set_parts(self.qexperts.to_layout("rows"))
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._set_parts(self.qexperts.to_layout(layout))


class QuantExperts(nn.Module):
    """y[t] = sum over a token's experts of weight * down_e(activation(gate_e x) * up_e x), as in Mixtral, Qwen and DeepSeek.

    gate_up     packed [E, 2 I, H]: the gate's rows first, then the other ones
    down        packed [E, H, I]
    activation  of the gate
    """

    def __init__(
        self,
        gate_up: QuantizedExperts,
        down: QuantizedExperts,
        activation: Callable[[Tensor], Tensor] = functional.silu,
        kernel: str | None = None,
    ) -> None:
        super().__init__()
        _check_shapes(gate_up.shape, down.shape)
        self.gate_up = GroupedLinear(gate_up, kernel=kernel)
        self.down = GroupedLinear(down, kernel=kernel)
        self.activation = activation

    @classmethod
    def from_weights(
        cls,
        gate_up: Tensor,
        down: Tensor,
        format: str | Format = "nvfp4",
        algorithm: str | Algorithm = "rtn",
        activation: Callable[[Tensor], Tensor] = functional.silu,
        calibration: tuple[Tensor, Tensor] | None = None,
    ) -> QuantExperts:
        """Quantize gate_up [E, 2 I, H] and down [E, H, I], each expert by itself.

        calibration  hidden [T, H] and the router's indices [T, top_k] of sample tokens, for algorithms that know inputs: each
                     expert learns from the tokens sent to it, `down` from what the quantized `gate_up` makes of them. An expert
                     that is sent none is rounded to nearest

        Raises as `quantlib.quantize`; QuantlibError where calibration is missing, needless, or the algorithm scales inputs.
        """
        fmt, method = get_format(format), get_algorithm(algorithm)
        _check_shapes(gate_up.shape, down.shape)
        _check_calibration(method, gate_up.shape, calibration)
        above, below = [], []
        for e, (first, second) in enumerate(zip(gate_up, down, strict=True)):
            x = None if calibration is None else calibration[0][(calibration[1] == e).any(dim=1)]
            above.append(_quantized(first, fmt, method, x, f"gate_up[{e}]"))
            if x is not None:
                gate, up = (x.float() @ above[-1].dequantize(torch.float32).T).chunk(2, dim=-1)
                x = activation(gate) * up
            below.append(_quantized(second, fmt, method, x, f"down[{e}]"))
        return cls(QuantizedExperts.stack(above), QuantizedExperts.stack(below), activation)

    def prepare(self, dtype: torch.dtype) -> QuantExperts:
        """Bring the weights into the layout that their device's kernels like best for activations of `dtype`; returns self."""
        self.gate_up.prepare(dtype)
        self.down.prepare(dtype)
        return self

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """hidden [T, H], the router's indices [T, top_k] (below E) and weights [T, top_k] -> [T, H].

        A GPU's router is never waited for, and each token's experts are added in the order of `indices`.
        """
        top_k = indices.shape[1]
        chosen, order = indices.flatten().sort(stable=True)
        first = torch.arange(self.gate_up.shape[0] + 1, device=chosen.device, dtype=chosen.dtype)
        offsets = torch.searchsorted(chosen, first, out_int32=True)
        gate, up = self.gate_up(hidden, offsets, (order // top_k).to(torch.int32)).chunk(2, dim=-1)
        y = self.down(self.activation(gate) * up, offsets, row_scale=weights.flatten()[order])
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
        return cast(Tensor, y[place].view(*indices.shape, y.shape[1]).sum(1))


def _check_shapes(gate_up: Sequence[int], down: Sequence[int]) -> None:
    if len(gate_up) != 3 or gate_up[1] % 2 or tuple(down) != (gate_up[0], gate_up[2], gate_up[1] // 2):
        raise ShapeError(f"gate_up is {list(gate_up)} and down {list(down)}; expected [E, 2 I, H] and [E, H, I]")


def _check_calibration(method: Algorithm, gate_up: Sequence[int], calibration: tuple[Tensor, Tensor] | None) -> None:
    if isinstance(method, Scaling):
        raise QuantlibError(f"algorithm {method.name!r} scales what comes before a layer, and experts share it: name its base")
    if calibration is None:
        return
    if method.needs == "nothing":
        raise QuantlibError(f"algorithm {method.name!r} takes no calibration data")
    (hidden, indices), (experts, _, width) = calibration, gate_up
    if hidden.dim() != 2 or hidden.shape[1] != width or indices.dim() != 2 or len(indices) != len(hidden):
        raise ShapeError(
            f"calibration is {list(hidden.shape)}, {list(indices.shape)}; expected hidden [T, {width}] and indices [T, top_k]"
        )
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < experts:
        raise ShapeError(
            f"calibration's indices reach from {int(indices.min())} to {int(indices.max())}; there are {experts} experts"
        )


def _quantized(weight: Tensor, fmt: Format, method: Algorithm, x: Tensor | None, name: str) -> QuantizedTensor:
    if x is None:
        return method.quantize(weight, fmt, name=name)
    if not len(x):
        return RTN().quantize(weight, fmt, name=name)
    inputs = InputStatistics.empty(weight.shape[1], method.needs, weight.device)
    inputs.add(x.to(weight.device), name)
    return method.quantize(weight, fmt, inputs, name)
