"""tune_scales: gradients of scales and minima, what may change and what may not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import quantlib
from quantlib.calibration.distillation import _Tuned
from quantlib.testing import assert_same_bits
from tests.cases import FORMATS
from tests.models import llama
from tests.test_calibration import tokens


@pytest.mark.parametrize("spec", ["int4-g32", "int4-g32-asym", "nf4", "nvfp4", "q4_k", "q6_k", "fp8-e4m3", "int4-g64-full"])
def test_gradients_are_those_of_the_law(spec: str) -> None:
    """Against autograd through w = units * scale - minimum in fp64."""
    torch.manual_seed(0)
    n, k = 24, 256
    fmt = quantlib.get_format(spec)
    layer = quantlib.QuantLinear.from_linear(nn.Linear(k, n), fmt)
    tuned = _Tuned(layer)
    x, dy = torch.randn(3, 5, k, requires_grad=True), torch.randn(3, 5, n)
    tuned.forward(x).backward(dy)

    numbers = fmt.effective(tuned.rows)
    decoded = fmt.block.split(layer.weight.double())
    minimum = torch.zeros_like(numbers.scale) if numbers.minimum is None else numbers.minimum
    units = (decoded + minimum.double()[..., None]) / numbers.scale.double()[..., None]
    factor = torch.ones_like(numbers.scale, dtype=torch.float64, requires_grad=True)
    shift = torch.zeros_like(factor, requires_grad=True)
    scale = numbers.scale.double()
    blocks = units * (scale * factor)[..., None] - (minimum.double() + scale.abs() * shift)[..., None]
    weight = fmt.block.merge(blocks, n, k)
    (x.detach().double() @ weight.T).backward(dy.double())
    assert factor.grad is not None
    assert shift.grad is not None
    assert tuned.factor.grad is not None
    torch.testing.assert_close(tuned.factor.grad.double(), factor.grad, rtol=1e-3, atol=1e-3)
    if tuned.shift is not None:
        assert tuned.shift.grad is not None
        torch.testing.assert_close(tuned.shift.grad.double(), shift.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(x.grad, (dy @ layer.weight), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spec", FORMATS)
def test_every_format_keeps_its_codes_and_never_gets_worse(spec: str) -> None:
    original, model = llama(), llama()
    quantlib.patch(model, spec, progress=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = quantlib.tune_scales(model, original, tokens(10), held_out=2, progress=False)
    assert len(result.losses) == 8
    assert result.after <= result.before
    assert result.kept == (result.after < result.before)
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        if not result.kept or name.endswith((".codes", ".zeros", "norm.weight", "embed_tokens.weight", "lm_head.weight")):
            assert_same_bits(after[name], tensor)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("spec", ["int4-g32", "int2-g32-asym", "nf4", "nvfp4", "q4_k"])
def test_tuning_lowers_the_divergence(spec: str) -> None:
    original, model = llama(), llama()
    quantlib.patch(model, spec, progress=False)
    result = quantlib.tune_scales(model, original, tokens(72), learning_rate=5e-3, progress=False)
    assert result.kept


def test_what_cannot_be_tuned_is_named() -> None:
    original = llama()
    with pytest.raises(quantlib.QuantlibError, match=r"finds no QuantLinear .*quantlib.patch"):
        quantlib.tune_scales(llama(), original, tokens(), progress=False)
    model = llama()
    quantlib.patch(model, "nf4", progress=False)
    with pytest.raises(quantlib.QuantlibError, match="3 samples are too few for steps of 1 and 3 held-out"):
        quantlib.tune_scales(model, original, tokens(3), held_out=3, progress=False)
    with pytest.raises(quantlib.ShapeError, match="outside the model's vocabulary"):
        quantlib.tune_scales(model, original, torch.full((12, 4), 500), progress=False)
    before: dict[str, Tensor] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(quantlib.QuantlibError, match="learning_rate=nan must be a number above zero"):
        quantlib.tune_scales(model, original, tokens(12), learning_rate=float("nan"), progress=False)
    with pytest.raises(quantlib.QuantlibError, match=r"(the loss of|after) step \d+ .*lower learning_rate"):
        quantlib.tune_scales(model, original, tokens(12), learning_rate=1e36, progress=False)
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[name])
