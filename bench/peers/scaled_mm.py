"""torch._scaled_mm: FP8 weights and FP8 activations with a scale per row, x quantized by plain torch operations in the call."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.contestants import Prepared
from bench.data import DTYPE, Material
from bench.peers.base import Peer, multiples
from bench.protocol import Case

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> FP8 [M, K] and fp32 scales [M, 1]."""
    scale = (x.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=1e-12)
    return (x.float() / scale).to(FP8), scale


class ScaledMm(Peer):
    name = "torch_scaled_mm"
    distribution = module = "torch"
    tried = "2.11"
    formats = {"fp8-e4m3": "e4m3, a scale per row"}  # noqa: RUF012
    activations = ("fp8-e4m3",)
    limit = 0.05

    def version(self) -> str:
        return torch.__version__

    def shape_refusal(self, case: Case) -> str | None:
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
            return "needs compute capability 8.9 or newer"
        return multiples(case, 16, 16)

    def prepare(self, material: Material) -> Prepared:
        weight, scale = quantize_rows(material.weight)

        def call(state: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
            rows, row_scale = quantize_rows(x)
            return torch._scaled_mm(rows, state[0].t(), row_scale, state[1].t(), out_dtype=DTYPE)

        decoded = (weight.float() * scale).to(DTYPE)
        return Prepared((weight, scale), call, weight.nbytes, decoded)
