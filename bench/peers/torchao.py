"""torchao's quantized linear layers. Its int4 kernel is tinygemm, which takes part under its own name."""

from __future__ import annotations

from typing import Any

import torch

from bench.contestants import Prepared
from bench.data import DTYPE, Material
from bench.peers.base import Peer
from bench.protocol import Case


class TorchAo(Peer):
    name = "torchao"
    distribution = module = "torchao"
    tried = "0.18.0"
    formats = {  # noqa: RUF012
        "int8-channel": "Int8WeightOnlyConfig",
        "fp8-e4m3": "Float8DynamicActivationFloat8WeightConfig, per row",
    }
    activations = (None, "fp8-e4m3")
    limit = 0.05

    def why_not(self, case: Case, device: torch.device) -> str | None:
        refusal = super().why_not(case, device)
        if refusal is None and (case.format == "fp8-e4m3") != (case.activations == "fp8-e4m3"):
            return "multiplies FP8 by FP8, and int8 by 16-bit x"
        return refusal

    def prepare(self, material: Material) -> Prepared:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int8WeightOnlyConfig, PerRow, quantize_

        n, k = material.weight.shape
        layer: Any = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False, dtype=DTYPE, device=material.device))
        layer[0].weight.data = material.weight
        layer.requires_grad_(False)
        fp8 = material.case.format == "fp8-e4m3"
        quantize_(layer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()) if fp8 else Int8WeightOnlyConfig())
        return Prepared(layer, lambda state, x: state(x), n * k)
