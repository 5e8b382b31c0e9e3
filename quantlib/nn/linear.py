"""QuantLinear: nn.Linear whose weight is a QuantizedTensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from quantlib import dispatch
from quantlib.algorithms import Algorithm, get_algorithm
from quantlib.errors import CheckpointError, QuantlibError
from quantlib.formats import get_format
from quantlib.formats.base import Format
from quantlib.ops import linear_from_parts
from quantlib.tensor import QuantizedTensor

FORMAT_KEY = "quant_format"
"""The state dict entry that names the format: its spec string as uint8, so that equal shapes can't be mistaken."""


class QuantLinear(nn.Linear):
    """y = x W^T + bias with a packed weight, wherever an nn.Linear stands.

    The packed parts are buffers under their own names (`codes`, `scales` ...), the bias is an ordinary parameter. A state dict
    always holds the canonical rows layout, whatever layout a kernel has asked for. Moving to a device moves the parts; changing
    the dtype (`.half()`, `.to(torch.bfloat16)`) changes the bias and `dtype`, and never the parts' bits.

    in_features, out_features, bias    as nn.Linear
    format                             a spec string or Format
    device, dtype                      of the parts; of the bias and of the weight that `.weight` decodes
    activations, kernel                as quantlib.linear

    The new layer's weight is zero; use `from_linear` or `from_quantized` to fill it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: str | Format = "nvfp4",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activations: str | None = None,
        kernel: str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.format = get_format(format)
        self.dtype = dtype or torch.get_default_dtype()
        self.activations = activations
        self.kernel = kernel
        self.layout = "rows"
        self._part_names: tuple[str, ...] = ()
        self._qweight: QuantizedTensor | None = None
        specs = self.format.specs(out_features, in_features)
        self._set_parts(
            {name: torch.zeros(spec.shape, dtype=spec.dtype, device=device) for name, spec in specs.items()}, "rows"
        )
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=self.dtype, device=device))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedTensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        activations: str | None = None,
        kernel: str | None = None,
    ) -> QuantLinear:
        """A layer that holds this weight (no copy). dtype: what `.weight` decodes to (default: the bias's or torch's)."""
        n, k = weight.shape
        dtype = dtype or (bias.dtype if bias is not None else None)
        layer = cls(k, n, False, weight.format, "meta", dtype, activations, kernel)
        layer._set_parts(weight.parts, weight.layout)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        format: str | Format = "nvfp4",
        algorithm: str | Algorithm = "rtn",
        activations: str | None = None,
        kernel: str | None = None,
        name: str = "weight",
    ) -> QuantLinear:
        """Quantize a layer; the bias parameter is shared with it. Raises as `quantlib.quantize`."""
        weight = get_algorithm(algorithm).quantize(linear.weight, get_format(format), name=name)
        layer = cls.from_quantized(weight, linear.bias, linear.weight.dtype, activations, kernel)
        return layer.train(linear.training)

    # the packed weight

    def _set_parts(self, parts: dict[str, Tensor], layout: str) -> None:
        for name in self._part_names:
            del self._buffers[name]
        for name, part in parts.items():
            self.register_buffer(name, part)
        self._part_names = tuple(parts)
        self._joined_names = ",".join(parts)
        self.layout = layout
        self._qweight = None

    @property
    def qweight(self) -> QuantizedTensor:
        """The packed weight, in the layout that it lies in; its parts are this module's buffers. The same object as long as
        they are."""
        buffers, kept = self._buffers, self._qweight
        if kept is not None and all(buffers.get(name) is part for name, part in kept.parts.items()):
            return kept
        parts = {name: cast(Tensor, buffers[name]) for name in self._part_names}
        self._qweight = QuantizedTensor(self.format, (self.out_features, self.in_features), parts, self.layout)
        return self._qweight

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The decoded weight [out_features, in_features] in `dtype`; computed at every access."""
        if self.qweight.device.type == "meta":
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        return self.qweight.dequantize(self.dtype)

    def prepare(self) -> QuantLinear:
        """Bring the weight into the layout that its device's kernels like best; returns self."""
        shape = (self.out_features, self.in_features)
        layout = dispatch.best_layout(
            self.format, shape, self.qweight.device, self.dtype, self.kernel, activations=self.activations
        )
        if layout != self.layout:
            self._set_parts(self.qweight.to_layout(layout).parts, layout)
        return self

    def to_linear(self) -> nn.Linear:
        """An nn.Linear with the decoded weight and the same bias parameter."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta", self.dtype)
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] of the input's dtype."""
        parts = [cast(Tensor, self._buffers[name]) for name in self._part_names]
        weight = None if torch.compiler.is_compiling() else self.qweight
        return linear_from_parts(
            input,
            parts,
            self.bias,
            self._joined_names,
            self.format.name,
            self.out_features,
            self.in_features,
            self.layout,
            self.activations,
            self.kernel,
            weight=weight,
        )

    def reset_parameters(self) -> None:
        """A quantized weight isn't initialised at random: does nothing."""

    def extra_repr(self) -> str:
        n, k = self.out_features, self.in_features
        text = f"in_features={k}, out_features={n}, bias={self.bias is not None}, format={self.format}"
        text += f", bits_per_weight={self.format.bits_per_weight(n, k):.3f}"
        return text + (f", activations={self.activations}" if self.activations else "")

    # moving, saving, loading

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        parts = self.qweight.parts
        for name in self._part_names:
            del self._buffers[name]
        try:
            super()._apply(fn, recurse)
            moved = {name: _move(part, fn) for name, part in parts.items()}
            self.dtype = fn(torch.empty(0, dtype=self.dtype, device=parts["codes"].device)).dtype
        except BaseException:
            self._buffers.update(parts)
            raise
        self._buffers.update(moved)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        own, layout = self.qweight.parts, self.layout
        if layout != "rows":
            self._set_parts(self.qweight.to_layout("rows").parts, "rows")
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + FORMAT_KEY] = torch.tensor(list(self.format.name.encode()), dtype=torch.uint8)
        if layout != "rows":
            self._set_parts(own, layout)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        found = state_dict.pop(prefix + FORMAT_KEY, None)
        if found is not None and not found.is_meta:
            stored = bytes(found.tolist()).decode()
            if stored != self.format.name:
                raise CheckpointError(
                    f"{prefix.rstrip('.') or 'layer'}: the state dict holds {stored}, the layer is {self.format}; "
                    "patch the model with the same formats before loading"
                )
        layout = self.layout
        if layout != "rows":
            self._set_parts(self.qweight.to_layout("rows").parts, "rows")
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if layout != "rows":
            self._set_parts(self.qweight.to_layout(layout).parts, layout)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise QuantlibError("a QuantLinear's weight is packed; build a new layer with from_linear or from_quantized")
        super().__setattr__(name, value)


def _move(part: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a device move to a packed part, and undo what a change of dtype would do to its bits."""
    moved = fn(part)
    return moved if moved.dtype == part.dtype else part.to(moved.device)
