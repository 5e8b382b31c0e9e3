"""QuantLinear stands where an nn.Linear stands: moves, copies, state dicts, pickle-free saving, the meta device."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import quantlib
from quantlib.testing import assert_close, assert_same_bits, random_weight

from . import cases

N, K = 24, 80


def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(K, N, bias).to(dtype)
    layer.weight.data = random_weight(N, K, dtype)
    return layer


@pytest.fixture(params=cases.FORMATS)
def layer(request: pytest.FixtureRequest) -> quantlib.QuantLinear:
    return quantlib.QuantLinear.from_linear(linear(), request.param)


def assert_same_parts(a: quantlib.QuantLinear, b: quantlib.QuantLinear) -> None:
    left, right = a.qweight.to_layout("rows").parts, b.qweight.to_layout("rows").parts
    assert list(left) == list(right)
    for name in left:
        assert_same_bits(left[name], right[name])


def test_is_a_linear_with_a_linears_attributes(layer: quantlib.QuantLinear) -> None:
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (K, N)
    assert layer.weight.shape == (N, K)
    assert layer.weight.dtype == torch.float32
    assert_same_bits(layer.weight, layer.qweight.dequantize())
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert str(layer.format) in repr(layer)
    assert "bits_per_weight" in repr(layer)


def test_forward_is_the_decoded_linear(layer: quantlib.QuantLinear) -> None:
    x = torch.randn(2, 7, K)
    with torch.no_grad():
        expected = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        assert_close(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_changing_dtype_keeps_the_packed_bits(layer: quantlib.QuantLinear, dtype: torch.dtype) -> None:
    before = copy.deepcopy(layer)
    layer.to(dtype)
    assert layer.dtype == layer.bias.dtype == layer.weight.dtype == dtype
    assert_same_parts(layer, before)
    assert_same_parts(layer.float(), before)
    assert layer.half().bias.dtype == torch.float16


def test_moves_between_devices(layer: quantlib.QuantLinear) -> None:
    shadow = copy.deepcopy(layer).to("meta")
    assert all(buffer.is_meta for buffer in shadow.buffers())
    assert shadow.weight.is_meta
    shadow.to_empty(device="cpu")
    shadow.load_state_dict(layer.state_dict())
    assert_same_parts(shadow, layer)


def test_deepcopy_is_independent(layer: quantlib.QuantLinear) -> None:
    twin = copy.deepcopy(layer)
    assert_same_parts(twin, layer)
    twin.codes.zero_()
    assert not torch.equal(twin.codes, layer.codes)


def test_state_dict_round_trips_through_safetensors(layer: quantlib.QuantLinear, tmp_path: Path) -> None:
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    fresh = quantlib.QuantLinear(K, N, format=layer.format)
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"), strict=True)
    assert_same_parts(fresh, layer)
    assert_same_bits(fresh.bias.detach(), layer.bias.detach())
    empty = quantlib.QuantLinear(K, N, format=layer.format, device="meta")
    empty.load_state_dict(load_file(tmp_path / "layer.safetensors"), strict=True, assign=True)
    assert_same_parts(empty, layer)


def test_a_state_dict_of_another_format_is_refused() -> None:
    state = quantlib.QuantLinear.from_linear(linear(), "fp8-e5m2").state_dict()
    layer = quantlib.QuantLinear(K, N, format="fp8-e4m3")
    with pytest.raises(quantlib.CheckpointError, match=r"holds fp8-e5m2, the layer is fp8-e4m3"):
        layer.load_state_dict(state)


def test_loading_reports_missing_and_unexpected_keys_as_torch_does() -> None:
    layer = quantlib.QuantLinear.from_linear(linear(), "nvfp4")
    state = layer.state_dict()
    del state["scales"]
    with pytest.raises(RuntimeError, match="Missing key"):
        quantlib.QuantLinear(K, N, format="nvfp4").load_state_dict(state)


def test_the_state_dict_can_be_loaded_twice() -> None:
    layer = quantlib.QuantLinear.from_linear(linear(), "nvfp4")
    state = layer.state_dict()
    for _ in range(2):
        fresh = quantlib.QuantLinear(K, N, format="nvfp4")
        fresh.load_state_dict(state)
        assert_same_parts(fresh, layer)


def test_sequential_moves_and_loads_with_its_container() -> None:
    model = nn.Sequential(quantlib.QuantLinear.from_linear(linear(), "q6_k"), nn.ReLU(), nn.Linear(N, 3))
    twin = nn.Sequential(quantlib.QuantLinear(K, N, format="q6_k"), nn.ReLU(), nn.Linear(N, 3))
    twin.load_state_dict(model.state_dict())
    x = torch.randn(4, K)
    with torch.no_grad():
        assert_same_bits(twin(x), model(x))
        assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_training_the_bias_and_what_lies_below() -> None:
    model = nn.Sequential(nn.Linear(16, K), quantlib.QuantLinear.from_linear(linear(), "nf4"))
    codes = model[1].codes.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, target = torch.randn(32, 16), torch.randn(32, N)
    losses = []
    for _ in range(40):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(model[1].codes, codes)


def test_no_bias() -> None:
    layer = quantlib.QuantLinear.from_linear(linear(bias=False), "int4")
    assert layer.bias is None
    assert layer(torch.randn(K)).shape == (N,)


def test_bias_of_another_dtype_follows_x() -> None:
    layer = quantlib.QuantLinear.from_linear(linear(), "int4")
    assert layer(torch.randn(2, K, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_packed_weight_cannot_be_overwritten() -> None:
    layer = quantlib.QuantLinear.from_linear(linear(), "int4")
    with pytest.raises(quantlib.QuantlibError, match="from_linear"):
        layer.weight = nn.Parameter(torch.zeros(N, K))


def test_to_linear_gives_back_the_decoded_layer(layer: quantlib.QuantLinear) -> None:
    plain = layer.to_linear()
    assert type(plain) is nn.Linear
    assert_same_bits(plain.weight.detach(), layer.weight)
    assert plain.bias is layer.bias
