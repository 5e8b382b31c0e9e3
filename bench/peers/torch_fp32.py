"""torch's fp32 product: what a user of a CPU without bf16 instructions multiplies by, where torch's bf16 product is slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional

from bench.contestants import Prepared
from bench.data import Material
from bench.peers.cublas import TorchBf16


class TorchFp32(TorchBf16):
    """The unquantized layer in fp32. Widening x is part of the call; the result stays fp32."""

    name = "torch_fp32"

    def prepare(self, material: Material) -> Prepared:
        calls: dict[str, Callable[[Any, Tensor], Tensor]] = {
            "linear": lambda weight, x: functional.linear(x.float(), weight),
            "dgrad": lambda weight, dy: dy.float() @ weight,
        }
        weight = material.weight.float()
        return Prepared(weight, calls[material.case.operation], weight.nbytes, material.weight)
