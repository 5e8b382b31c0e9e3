"""Experts quantized by what the router sends them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

import quantlib
from quantlib import QuantExperts
from quantlib.algorithms import GPTQ, RTN, InputStatistics
from tests.test_gptq import correlated

EXPERTS, HIDDEN, INNER = 4, 64, 32


@pytest.fixture(scope="module")
def sample() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gate_up, down, hidden and indices; the last expert is sent nothing."""
    generator = torch.Generator().manual_seed(3)
    gate_up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) * 0.2
    down = torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) * 0.2
    hidden = correlated(600, HIDDEN)
    indices = torch.rand(600, EXPERTS - 1, generator=generator).topk(2).indices
    return gate_up, down, hidden, indices


def answer(gate_up: Tensor, down: Tensor, hidden: Tensor, indices: Tensor) -> Tensor:
    out = torch.zeros(hidden.shape)
    for e in range(EXPERTS):
        rows = (indices == e).any(dim=1)
        gate, up = (hidden[rows] @ gate_up[e].T).chunk(2, dim=1)
        out[rows] += silu(gate) * up @ down[e].T
    return out


@pytest.mark.parametrize("spec", ["int4-g32", "nvfp4", "q4_0"])
def test_each_expert_learns_from_its_own_tokens(sample: tuple[Tensor, Tensor, Tensor, Tensor], spec: str) -> None:
    gate_up, down, hidden, indices = sample
    wanted = answer(gate_up, down, hidden, indices)
    layers = [
        QuantExperts.from_weights(gate_up, down, spec),
        QuantExperts.from_weights(gate_up, down, spec, "rtn-importance", calibration=(hidden, indices)),
        QuantExperts.from_weights(gate_up, down, spec, "gptq", calibration=(hidden, indices)),
    ]
    errors = [
        float((answer(layer.gate_up.qexperts.dequantize(), layer.down.qexperts.dequantize(), hidden, indices) - wanted).norm())
        for layer in layers
    ]
    assert errors[2] < errors[1] < errors[0]
    fmt, last = quantlib.get_format(spec), layers[2].gate_up.qexperts.expert(EXPERTS - 1)
    assert torch.equal(last.dequantize(), RTN().quantize(gate_up[-1], fmt).dequantize()), "sent nothing: rounded to nearest"


def test_an_expert_is_quantized_as_a_layer_with_its_tokens(sample: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    gate_up, down, hidden, indices = sample
    layer = QuantExperts.from_weights(gate_up, down, "int4-g32", "gptq", calibration=(hidden, indices))
    fmt, seen = quantlib.get_format("int4-g32"), hidden[(indices == 1).any(dim=1)]
    for weight, stack in ((gate_up[1], layer.gate_up), (down[1], layer.down)):
        inputs = InputStatistics.empty(weight.shape[1], "hessian")
        inputs.add(seen)
        expected = GPTQ().quantize(weight, fmt, inputs)
        found = stack.qexperts.expert(1)
        assert all(torch.equal(part, found.parts[name]) for name, part in expected.parts.items())
        gate, up = (seen @ expected.dequantize().T).chunk(2, dim=1)
        seen = silu(gate) * up


def test_what_does_not_fit_is_named(sample: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    gate_up, down, hidden, indices = sample

    def refused(words: str, algorithm: str, calibration: tuple[Tensor, Tensor] | None) -> None:
        with pytest.raises(quantlib.QuantlibError, match=words):
            QuantExperts.from_weights(gate_up, down, "int4-g32", algorithm, calibration=calibration)

    refused(r"gate_up\[0\]: gptq needs calibration data", "gptq", None)
    refused("'rtn' takes no calibration data", "rtn", (hidden, indices))
    refused("'awq' scales what comes before", "awq", (hidden, indices))
    refused(r"expected hidden \[T, 64\]", "gptq", (hidden[:, :5], indices))
    refused(r"expected hidden \[T, 64\] and indices", "gptq", (hidden, indices[:5]))
    refused("there are 4 experts", "gptq", (hidden, indices + 2))
    with pytest.raises(quantlib.ShapeError, match=r"expected \[E, 2 I, H\]"):
        QuantExperts.from_weights(gate_up, down[:2], "int4-g32")
