"""torch's int4 kernel ("tinygemm", torch._weight_int4pack_mm), fed with quantlib's own int4 codes."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.contestants import Prepared
from bench.data import Material
from bench.peers.base import Peer, multiples
from bench.protocol import Case

INNER_K_TILES = 8


class TinyGemm(Peer):
    name = "tinygemm"
    distribution = module = "torch"
    tried = "2.11"
    formats = {"int4-g128": "group 128, bf16 scale and zero"}  # noqa: RUF012

    def version(self) -> str:
        return torch.__version__

    def shape_refusal(self, case: Case) -> str | None:
        return multiples(case, 8, 16 * INNER_K_TILES)

    def prepare(self, material: Material) -> Prepared:
        codes, scales = material.integer_codes()
        group = material.case.k // scales.shape[1]
        # Two codes a byte, the even column high; w = (code - 8) * scale + zero, and symmetric grids have no zero.
        packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], INNER_K_TILES)
        scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], dim=2).transpose(0, 1).contiguous()

        def call(state: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
            return torch._weight_int4pack_mm(x, state[0], group, state[1])

        return Prepared((packed, scales_and_zeros), call, packed.nbytes + scales_and_zeros.nbytes)
