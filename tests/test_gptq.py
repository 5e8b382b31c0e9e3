"""GPTQ against the textbook in fp64, and what it promises for every format."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import quantlib
from quantlib.algorithms import GPTQ, RTN, Algorithm, InputStatistics
from quantlib.formats.packing import unpack
from quantlib.formats.search import TorchProblem
from quantlib.kernels import cpu
from tests.cases import FORMATS


def inputs_of(x: Tensor) -> InputStatistics:
    found = InputStatistics.empty(x.shape[1], "hessian")
    found.add(x)
    return found


def correlated(tokens: int, k: int, seed: int = 0) -> Tensor:
    """Inputs [tokens, k] whose columns depend on each other and differ in size, as those of language models do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    sizes = torch.rand(k, generator=generator).mul(3).sub(2).exp()
    return torch.randn(tokens, k, generator=generator) @ mix * sizes


def output_error(weight: Tensor, x: Tensor, quantized: quantlib.QuantizedTensor) -> float:
    error = (quantized.dequantize(torch.float32) - weight).double()
    return float((x.double() @ error.T).norm() / (x.double() @ weight.double().T).norm())


def gain(algorithm: Algorithm, spec: str, tokens: int, n: int, k: int) -> float:
    """The output error of a random weight over that of a search with importance."""
    torch.manual_seed(1)
    fmt = quantlib.get_format(spec)
    x, weight = correlated(tokens, k), torch.randn(n, k) * 0.05
    statistics = inputs_of(x)
    guided = output_error(weight, x, RTN("mse", importance=True).quantize(weight, fmt, statistics))
    found = algorithm.quantize(weight, fmt, statistics)
    fmt.check(found.parts, n, k)
    return output_error(weight, x, found) / guided


def assert_names_what_is_missing(algorithm: Algorithm) -> None:
    """Without statistics, without a Hessian, and with statistics of other inputs."""
    fmt = quantlib.get_format("int4-g32")
    with pytest.raises(quantlib.QuantlibError, match=f"down: {algorithm.name} needs calibration data"):
        algorithm.quantize(torch.randn(8, 64), fmt, None, "down")
    with pytest.raises(quantlib.ShapeError, match=r"down: statistics of 32 inputs don't fit a weight \[8, 64\]"):
        algorithm.quantize(torch.randn(8, 64), fmt, inputs_of(torch.randn(9, 32)), "down")
    moments = InputStatistics.empty(64, "moments")
    moments.add(torch.randn(9, 64))
    with pytest.raises(quantlib.QuantlibError, match="moments only"):
        algorithm.quantize(torch.randn(8, 64), fmt, moments, "down")


def textbook(weight: Tensor, hessian: Tensor, group: int, order: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of arXiv 2210.17323 with one column at a time, symmetric 4 bits, a scale per row and group from the absmax of
    the weights as they are when the group begins. Returns the integers -8..7 [n, k] and how near each came to a tie."""
    w = weight.double().clone()
    n, k = w.shape
    h = hessian.double().clone()
    h.diagonal().add_(damp * h.diagonal().mean())
    place = torch.empty_like(order)
    place[order] = torch.arange(k)
    u = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    codes, margins = torch.zeros(n, k, dtype=torch.int64), torch.zeros(n, k, dtype=torch.float64)
    scale = torch.zeros(n, dtype=torch.float64)
    for i in range(k):
        column = int(order[i])
        if i % group == 0:
            first = column // group * group
            absmax = w[:, first : first + group].float().abs().amax(dim=1)
            exact = absmax / torch.tensor(7.5)
            stored = exact.half()
            lower = torch.where(stored.float() > exact, torch.nextafter(stored, torch.zeros_like(stored)), stored)
            scale = lower.double()
        x = w[:, column].float() / scale.float()
        codes[:, column] = x.round().clamp(-8, 7).long()
        margins[:, column] = (x - x.floor() - 0.5).abs().double()
        error = (w[:, column] - codes[:, column] * scale) / u[i, i]
        later = order[i + 1 :]
        w[:, later] -= error[:, None] * u[i, i + 1 :][None, :]
    return codes, margins


def differing_rows(found: Tensor, expected: Tensor, margins: Tensor) -> None:
    """Fail unless the codes agree in every row up to its first tie: what follows a tie taken otherwise may differ."""
    for row in (found != expected).any(dim=1).nonzero()[:, 0].tolist():
        assert float(margins[row][found[row] != expected[row]].min()) < 1e-4 or float(margins[row].min()) < 1e-4, row


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize(("k", "group"), [(256, 64), (384, 128), (160, 32), pytest.param(4096, 128, marks=pytest.mark.slow)])
def test_codes_are_those_of_the_textbook(k: int, group: int, desc_act: bool) -> None:
    """Rows don't know each other: some of them stand for all."""
    torch.manual_seed(k)
    x, weight = correlated(2 * k, k), torch.randn(48, k) * 0.05
    statistics = inputs_of(x)
    method = GPTQ(desc_act=desc_act, search="absmax", block_size=128)
    found = method.quantize(weight, quantlib.get_format("int4", group_size=group), statistics)
    order = torch.arange(k)
    if desc_act:
        diagonal = statistics.hessian.diagonal().view(-1, group)
        inside = diagonal.argsort(dim=1, descending=True, stable=True)
        groups = diagonal.amax(dim=1).argsort(descending=True, stable=True)
        order = (torch.arange(0, k, group)[:, None] + inside)[groups].reshape(-1)
    expected, margins = textbook(weight, statistics.hessian, group, order, 0.01)
    codes = unpack(found.parts["codes"], 4, k).long() - 8
    equal = float((codes == expected).double().mean())
    differing_rows(codes, expected, margins)
    assert equal > 0.995


@pytest.mark.parametrize("spec", FORMATS)
def test_every_format_gains_on_the_inputs(spec: str) -> None:
    """The output error is below that of a search with importance."""
    assert gain(GPTQ(), spec, tokens=2048, n=64, k=768) < 1


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("options", [{"desc_act": False}, {"static_groups": True}, {"sweeps": 1}], ids=str)
def test_options_serve_every_format(spec: str, options: dict[str, Any]) -> None:
    """Odd shapes, padding inside; the parts are what the format asks for, and the decoded weight is near the original."""
    torch.manual_seed(2)
    fmt = quantlib.get_format(spec)
    n, k = 10, 200
    x, weight = correlated(600, k), torch.randn(n, k) * 0.05
    found = GPTQ(**options).quantize(weight, fmt, inputs_of(x))
    fmt.check(found.parts, n, k)
    plain = output_error(weight, x, RTN().quantize(weight, fmt))
    assert output_error(weight, x, found) < 1.05 * plain


def test_descent_never_raises_the_error() -> None:
    torch.manual_seed(3)
    x, weight = correlated(2048, 512), torch.randn(64, 512) * 0.05
    statistics = inputs_of(x)
    for spec in ("int4-g64", "nvfp4", "nf4", "q4_k", "int4-g64-asym", "mxfp4"):
        errors = [
            output_error(weight, x, GPTQ(sweeps=sweeps).quantize(weight, quantlib.get_format(spec), statistics))
            for sweeps in (0, 1, 3)
        ]
        assert errors[2] <= errors[1] * 1.0001 < errors[0] * 1.0001, spec


def test_a_dead_column_costs_nothing_and_harms_nothing() -> None:
    torch.manual_seed(4)
    x, weight = correlated(1024, 256), torch.randn(32, 256) * 0.05
    x[:, 7] = 0
    found = GPTQ().quantize(weight, quantlib.get_format("int4-g64"), inputs_of(x))
    assert torch.isfinite(found.dequantize(torch.float32)).all()
    assert output_error(weight, x, found) < output_error(weight, x, quantlib.quantize(weight, "int4-g64"))


def test_fewer_tokens_than_columns_are_made_up_for_by_damping() -> None:
    torch.manual_seed(5)
    x, weight = correlated(40, 256), torch.randn(32, 256) * 0.05
    found = GPTQ().quantize(weight, quantlib.get_format("nf4"), inputs_of(x))
    assert output_error(weight, x, found) < output_error(weight, x, quantlib.quantize(weight, "nf4"))


def test_a_hessian_beyond_repair_is_an_error() -> None:
    statistics = inputs_of(correlated(100, 64))
    assert statistics.outer is not None
    statistics.outer.fill_diagonal_(-1.0)
    statistics.outer[0, 1] = statistics.outer[1, 0] = math.inf
    with pytest.raises(quantlib.QuantlibError, match=r"mlp.up: the Hessian .* no Cholesky factor .* damp_percent"):
        GPTQ().quantize(torch.randn(8, 64), quantlib.get_format("nf4"), statistics, "mlp.up")


def test_missing_or_unfitting_statistics_are_named() -> None:
    assert_names_what_is_missing(GPTQ())


def test_nan_inputs_are_named() -> None:
    x = torch.randn(9, 64)
    x[3, 5] = math.nan
    with pytest.raises(quantlib.QuantlibError, match="up: 1 of 576 calibration activations are NaN or infinite"):
        InputStatistics.empty(64, "hessian").add(x, "up")


def test_the_outer_product_is_that_of_all_tokens() -> None:
    x = correlated(700, 1100)
    statistics = InputStatistics.empty(1100, "hessian")
    for part in x.view(7, 100, 1100):
        statistics.add(part)
    torch.testing.assert_close(statistics.hessian, 2 / 700 * (x.T @ x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics.mean_square, x.square().mean(0))
    assert replace(statistics, outer=None).output_error(torch.zeros(4, 1100), torch.zeros(4, 1100)) == 0.0


@pytest.mark.skipif(cpu.unavailable is not None, reason=str(cpu.unavailable))
@pytest.mark.parametrize("spec", ["int4-g64", "nvfp4", "nf4", "q4_k"])
def test_scales_of_groups_are_searched_in_c(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group's columns reach the extension in an order that it reads; the search in torch takes several times as long."""

    def refuse(*_: object) -> None:
        raise AssertionError("the search went to torch")

    monkeypatch.setattr(TorchProblem, "__init__", refuse)
    x = correlated(300, 256)
    found = GPTQ().quantize(torch.randn(16, 256), quantlib.get_format(spec), inputs_of(x))
    assert found.shape == (16, 256)
