"""Humming: kernels compiled by NVRTC at their first use. It quantizes in its own way."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bench.contestants import Prepared
from bench.data import DTYPE, Material
from bench.peers.base import Peer, multiples
from bench.protocol import Case

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "int4-g128": {"dtype": "int4", "group_size": 128},
    "int8-channel": {"dtype": "int8"},
    "int3-g128": {"dtype": "int3", "group_size": 128},
    "int2-g64": {"dtype": "int2", "group_size": 64},
    "fp8-e4m3": {"dtype": "float8e4m3"},
    "mxfp4": {"dtype": "float4e2m1", "group_size": 32, "scale_dtype": "float8e8m0"},
    "nvfp4": {"dtype": "float4e2m1", "group_size": 16, "scale_dtype": "float8e4m3", "scale_2_type": "tensor"},
}


class Humming(Peer):
    name = "humming"
    distribution = "humming-kernels"
    module = "humming"
    tried = "0.1.19"
    formats = {spec: str(words["dtype"]) for spec, words in CONFIGURATIONS.items()}  # noqa: RUF012

    def shape_refusal(self, case: Case) -> str | None:
        return multiples(case, 64, 128)

    def prepare(self, material: Material) -> Prepared:
        from humming.layer import HummingLayer

        n, k = material.weight.shape
        config = dict(CONFIGURATIONS[material.case.format])
        layer: Any = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=DTYPE).to(material.device)
        layer.load_from_unquantized(material.weight)
        layer.transform()
        nbytes = sum(parameter.nbytes for parameter in layer.parameters())

        def call(state: Any, x: Tensor) -> Tensor:
            result: Tensor = state(x)
            return result

        return Prepared(layer, call, nbytes)
