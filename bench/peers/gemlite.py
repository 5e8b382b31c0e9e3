"""gemlite: Triton kernels, tuned at the first call of a shape. Integer formats take quantlib's own codes."""

from __future__ import annotations

from typing import Any

import torch

from bench.contestants import Prepared
from bench.data import DTYPE, Material
from bench.peers.base import Peer, multiples
from bench.protocol import Case


class GemLite(Peer):
    name = "gemlite"
    distribution = module = "gemlite"
    tried = "0.6.0.post2"
    formats = {  # noqa: RUF012
        "int4-g128": "A16W4_HQQ_INT",
        "int2-g64": "A16W2_HQQ_INT",
        "mxfp4": "A16W4_MXFP",
        "nvfp4": "A16W4_NVFP",
        "mxfp8": "A16W8_MXFP",
    }

    def shape_refusal(self, case: Case) -> str | None:
        return multiples(case, 32, 128)

    def prepare(self, material: Material) -> Prepared:
        from gemlite import helper

        name = self.formats[material.case.format]
        processor: Any = getattr(helper, name)(device=material.device, dtype=DTYPE)
        if name.endswith("_INT"):
            codes, scales = material.integer_codes()
            zeros = torch.full_like(scales, 1 << (material.format.codec.bits - 1))
            layer = processor.from_weights(codes, scales, zeros)
        else:
            n, k = material.weight.shape
            linear = torch.nn.Linear(k, n, bias=False, dtype=DTYPE, device=material.device)
            linear.weight.data = material.weight
            layer = processor.from_linear(linear, del_orig=False)
        nbytes = sum(part.nbytes for part in (layer.W_q, layer.scales) if part is not None)
        return Prepared(layer, lambda state, x: state(x), nbytes)
