"""torch's int4 kernel for CPUs (torch._weight_int4pack_mm_for_cpu), fed with quantlib's own int4 codes."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.contestants import Prepared
from bench.data import Material
from bench.peers.base import Peer, multiples
from bench.protocol import Case


class TorchInt4Cpu(Peer):
    name = "torch_int4"
    distribution = module = "torch"
    tried = "2.11"
    formats = {"int4-g128": "group 128, bf16 scale and zero"}  # noqa: RUF012
    needs_cuda = False

    def version(self) -> str:
        return torch.__version__

    def shape_refusal(self, case: Case) -> str | None:
        return multiples(case, 16, 128)

    def prepare(self, material: Material) -> Prepared:
        codes, scales = material.integer_codes()
        group = material.case.k // scales.shape[1]
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
        # w = (code - 8) * scale + zero, and symmetric grids have no zero.
        scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], dim=2).transpose(0, 1).contiguous()

        def call(state: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
            y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, state[0], group, state[1])
            return y

        return Prepared((packed, scales_and_zeros), call, packed.nbytes + scales_and_zeros.nbytes)
