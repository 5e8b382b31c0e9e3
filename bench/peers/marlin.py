"""Marlin, as gptqmodel builds it (with nvcc, at its first use), fed with quantlib's own symmetric integer codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.contestants import Prepared
from bench.data import DTYPE, Material
from bench.peers.base import Peer, multiples
from bench.protocol import Case


def pack_gptq(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K] -> int32 [K * bits / 32, N], the first row of K lowest: the layout of GPTQ checkpoints."""
    per_word = 32 // bits
    rows = codes.T.reshape(-1, per_word, codes.shape[0]).to(torch.int64)
    shifts = torch.arange(0, 32, bits, device=codes.device).view(1, -1, 1)
    words = (rows << shifts).sum(dim=1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


class Marlin(Peer):
    name = "marlin"
    distribution = module = "gptqmodel"
    tried = "7.0.0"
    formats = {"int4-g128": "4 bit, group 128", "int8-channel": "8 bit, per channel"}  # noqa: RUF012

    def shape_refusal(self, case: Case) -> str | None:
        return multiples(case, 64, 128)

    def prepare(self, material: Material) -> Prepared:
        from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear

        bits = material.format.codec.bits
        codes, scales = material.integer_codes()
        n, k = codes.shape
        group = k // scales.shape[1]
        layer: Any = MarlinLinear(
            bits=bits,
            group_size=group if group < k else -1,
            desc_act=False,
            sym=True,
            in_features=k,
            out_features=n,
            dtype=DTYPE,
        )
        layer = layer.to(codes.device)
        layer.qweight.data = pack_gptq(codes, bits)
        layer.scales.data = scales.T.contiguous()
        layer.post_init()
        nbytes = layer.qweight.nbytes + layer.scales.nbytes
        return Prepared(layer, lambda state, x: state(x), nbytes)
