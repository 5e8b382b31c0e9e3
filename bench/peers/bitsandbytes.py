"""bitsandbytes: NF4 and FP4 in blocks of 64."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bench.contestants import Prepared
from bench.data import DTYPE, Material
from bench.peers.base import Peer


class BitsAndBytes(Peer):
    name = "bitsandbytes"
    distribution = module = "bitsandbytes"
    tried = "0.50.2"
    formats = {"nf4": "nf4", "fp4": "fp4"}  # noqa: RUF012
    needs_cuda = False

    def prepare(self, material: Material) -> Prepared:
        import bitsandbytes
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        codes, state = quantize_4bit(material.weight, blocksize=64, quant_type=self.formats[material.case.format])

        def call(packed: Any, x: Tensor) -> Tensor:
            result: Tensor = bitsandbytes.matmul_4bit(x, packed[0], packed[1])
            return result

        return Prepared((codes, state), call, codes.nbytes + state.absmax.nbytes, dequantize_4bit(codes, state).to(DTYPE))
