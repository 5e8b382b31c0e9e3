"""torch's own bf16 product (cuBLAS on a GPU), alone and after decoding the packed weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.contestants import Prepared
from bench.data import DTYPE, Material
from bench.peers.base import Peer
from bench.protocol import Case
from quantlib import dispatch


class TorchBf16(Peer):
    """What a model costs that is not quantized; the case's format only names the row."""

    name = "torch_bf16"
    distribution = module = "torch"
    tried = "2.11"
    formats = {}  # noqa: RUF012
    operations = ("linear", "dgrad")
    needs_cuda = False

    def version(self) -> str:
        return torch.__version__

    def why_not(self, case: Case, device: torch.device) -> str | None:
        return None if case.operation in self.operations else f"does {', '.join(self.operations)}"

    def prepare(self, material: Material) -> Prepared:
        calls: dict[str, Callable[[Any, Tensor], Tensor]] = {
            "linear": lambda weight, x: functional.linear(x, weight),
            "dgrad": lambda weight, dy: dy @ weight,
        }
        weight = material.weight
        return Prepared(weight, calls[material.case.operation], weight.nbytes, weight)


class DequantizeCublas(Peer):
    """Decode the whole weight to bf16 by quantlib's own kernel, then cuBLAS: what a fused kernel must beat at large M."""

    name = "dequantize_cublas"
    distribution = module = "torch"
    tried = "2.11"
    formats = {}  # noqa: RUF012
    operations = ("linear", "dgrad")
    needs_cuda = False

    def version(self) -> str:
        return torch.__version__

    def prepare(self, material: Material) -> Prepared:
        packed = material.quantized

        def decode(like: Tensor, state: Any) -> Tensor:
            return dispatch.run("dequantize", torch.empty(0, dtype=DTYPE, device=like.device), state)

        calls: dict[str, Callable[[Any, Tensor], Tensor]] = {
            "linear": lambda state, x: functional.linear(x, decode(x, state)),
            "dgrad": lambda state, dy: dy @ decode(dy, state),
        }
        return Prepared(
            packed, calls[material.case.operation], packed.nbytes, material.decoded, lambda state: state.apply(torch.clone)
        )
