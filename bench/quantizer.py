"""quantlib's quantizers of activations as a contestant. They are no entries of the table of kernels: products call them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import quantlib
from bench.contestants import Prepared
from bench.data import Material
from bench.protocol import Case
from quantlib.devices import device_facts
from quantlib.formats import get_format
from quantlib.kernels.triton_launch import interpreting


class Quantizer:
    """x [M, K] -> codes and scales in the case's format, in one call."""

    name = "triton_quantize"
    backend = "triton"
    limit: float | None = None

    def version(self) -> str:
        return quantlib.__version__

    def absent(self) -> str | None:
        return None

    def why_not(self, case: Case, device: torch.device) -> str | None:
        if case.operation != "quantize":
            return "does quantize"
        if device.type != "cuda" and not interpreting():
            return "Triton needs a CUDA device"
        try:
            from quantlib.kernels.activations_launch import import_failure, quantizer_refusal
        except ImportError as error:
            return f"can't be imported: {error}"
        return quantizer_refusal(get_format(case.format)) or import_failure()

    def prepare(self, material: Material) -> Prepared:
        from quantlib.kernels.activations import quantize_activations

        def quantize(state: Any, x: Tensor) -> Any:
            return quantize_activations(x, material.format, 0 if interpreting() else device_facts(x.device).capability)

        return Prepared(None, quantize, nbytes=0)


def parts_of(result: Any) -> dict[str, Tensor]:
    """A quantizer's result as the parts of the rows layout: int8 codes are two's complement there, offset by 128 here."""
    if isinstance(result, Mapping):
        return dict(result)
    codes = result.codes
    if codes.dtype == torch.int8:
        codes = (codes.to(torch.int16) + 128).to(torch.uint8)
    parts = {"codes": codes, "scales": result.scales.contiguous()}
    return parts if result.global_scale is None else parts | {"global_scale": result.global_scale}
