"""AutoRound: the output error that it lowers, for every format, and the gradients that it goes by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantlib
from quantlib.algorithms import RTN, AutoRound, get_algorithm
from quantlib.algorithms.autoround import _Descent, _Ladder
from quantlib.testing import assert_same_bits
from tests.cases import FORMATS
from tests.models import llama
from tests.test_calibration import tokens
from tests.test_gptq import assert_names_what_is_missing, correlated, gain, inputs_of, output_error


@pytest.mark.parametrize("spec", FORMATS)
def test_every_format_gains_on_the_inputs(spec: str) -> None:
    """The output error is below that of a search with importance, by a margin."""
    assert gain(AutoRound(), spec, tokens=1024, n=16, k=256) < 0.9


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("options", [{"enable_minmax_tuning": False}, {"minmax_lr": 0.05}], ids=str)
@pytest.mark.parametrize(("n", "k"), [(10, 200), (3, 7), (1, 16)])
def test_odd_shapes_and_options(spec: str, options: dict[str, Any], n: int, k: int) -> None:
    """Padding inside, few tokens; what is found is never worse than where it starts, whatever the options."""
    torch.manual_seed(2)
    fmt = quantlib.get_format(spec)
    x, weight = correlated(100, k), torch.randn(n, k) * 0.05
    weight[0, : k // 2] = 0
    statistics = inputs_of(x)
    found = AutoRound(iters=12, **options).quantize(weight.to(torch.bfloat16), fmt, statistics)
    fmt.check(found.parts, n, k)
    weight = weight.to(torch.bfloat16).float()
    assert found.dequantize(torch.float32).isfinite().all()
    start = AutoRound(iters=0).quantize(weight, fmt, statistics)
    assert output_error(weight, x, found) <= output_error(weight, x, start) * (1 + 1e-5)


@pytest.mark.parametrize("spec", FORMATS)
def test_without_steps_it_is_the_search(spec: str) -> None:
    torch.manual_seed(3)
    fmt = quantlib.get_format(spec)
    weight, statistics = torch.randn(32, 256) * 0.05, inputs_of(correlated(300, 256))
    found = AutoRound(iters=0).quantize(weight, fmt, statistics)
    expected = RTN("mse", importance=True).quantize(weight, fmt, statistics)
    for part, bits in expected.parts.items():
        if part != "codes":
            assert_same_bits(found.parts[part], bits)
    equal = (found.dequantize(torch.float32) == expected.dequantize(torch.float32)).double().mean()
    assert float(equal) > (0.95 if "dq" in spec.split("-") else 0.999)  # "dq" rounds under scales that aren't stored


@pytest.mark.parametrize("spec", FORMATS)
def test_the_ladder_is_the_codecs_law(spec: str) -> None:
    codec = quantlib.get_format(spec).codec
    ladder = _Ladder(codec, torch.device("cpu"))
    x = torch.randn(4096, generator=torch.Generator().manual_seed(4)) * codec.divisor / 2
    found = ladder.decode(ladder.place(x.clone()).round_())
    expected = torch.tensor(codec.entries)[codec.encode(x).long()]
    assert float((found == expected).double().mean()) > 0.999  # they part at ties and at the last bit of a quotient
    ranks = torch.arange(ladder.top + 1)
    assert torch.equal(torch.tensor(codec.entries)[ladder.codes(ranks.to(torch.uint8)).long()], ladder.values)
    torch.testing.assert_close(ladder.decode(ranks.float()), ladder.values, rtol=0, atol=0)


@pytest.mark.parametrize("spec", ["int4-g32", "int4-g32-asym", "nf4-g32", "q4_k"])
def test_the_gradient_by_an_end_is_that_of_the_error(spec: str) -> None:
    """By autograd in fp64, with codes held fast."""
    torch.manual_seed(5)
    fmt = quantlib.get_format(spec)
    weight, statistics = torch.randn(8, 256) * 0.05, inputs_of(correlated(512, 256))
    start = fmt.fit(weight, statistics.mean_square, "mse")
    descent = _Descent(fmt, weight, statistics.hessian, fmt.fit_shared(weight), start)
    factors = [torch.ones_like(end, dtype=torch.float64, requires_grad=True) for end in descent.ends]
    ends = [end.double() * factor for end, factor in zip(descent.ends, factors, strict=True)]
    values = descent.values.double()
    if len(ends) == 1:
        zero = descent.numbers.zero
        decoded = (values if zero is None else values - zero[..., None]) * ends[0][..., None]
    else:
        share = (values - descent.lowest) / (descent.highest - descent.lowest)
        decoded = ends[0][..., None] + share * (ends[1] - ends[0])[..., None]
    error = fmt.block.merge(decoded, 8, 256) - weight.double()
    ((error @ statistics.hessian.double()) * error).sum().backward()  # type: ignore[no-untyped-call]
    for factor, found in zip(factors, descent._by_ends(), strict=True):
        assert factor.grad is not None
        torch.testing.assert_close(2 * found.double(), factor.grad, rtol=1e-3, atol=1e-5 * float(factor.grad.abs().max()))


class Killed(BaseException):
    pass


def test_a_run_that_was_cut_off_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"algorithm": AutoRound(iters=7), "calibration": tokens(), "progress": False}
    whole = llama()
    quantlib.patch(whole, "int4-g32", **options)
    quantize, done = AutoRound.quantize, []

    def dying(self: AutoRound, *arguments: Any) -> Any:
        if len(done) == 9:
            raise Killed
        done.append(arguments)
        return quantize(self, *arguments)

    monkeypatch.setattr(AutoRound, "quantize", dying)
    with pytest.raises(Killed):
        quantlib.patch(llama(), "int4-g32", journal=tmp_path / "journal", **options)
    monkeypatch.setattr(AutoRound, "quantize", quantize)
    resumed = llama()
    quantlib.patch(resumed, "int4-g32", journal=tmp_path / "journal", **options)
    expected = whole.state_dict()
    for name, tensor in resumed.state_dict().items():
        assert_same_bits(tensor, expected[name])


def test_it_has_a_name_and_names_what_is_missing() -> None:
    assert get_algorithm("autoround") == AutoRound()
    assert_names_what_is_missing(AutoRound())
    with pytest.raises(quantlib.QuantlibError, match="expected iters >= 0 and learning rates above zero"):
        AutoRound(lr=0)
    with pytest.raises(quantlib.QuantlibError, match="learning rates above zero"):
        AutoRound(minmax_lr=float("nan"))
