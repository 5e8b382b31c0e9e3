"""AWQ: scales that are folded into what comes before, clipping, every format and every base; runs that are gone on with."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantlib
from quantlib.algorithms import AWQ, GPTQ, HQQ, RTN, get_algorithm
from quantlib.calibration.folding import NO_SCALES, Fold, _answer, _apply, _cancels, _suggested, fold_segment
from quantlib.calibration.journal import Journal
from quantlib.calibration.walk import Segment, walk
from quantlib.running import structural_copy
from quantlib.testing import assert_same_bits
from tests.cases import FORMATS
from tests.models import assert_untouched, held, llama, snapshot
from tests.test_calibration import linear_names, tokens
from tests.test_gptq import assert_names_what_is_missing, correlated, inputs_of, output_error

ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."
QKV = (ATTENTION + "q_proj", ATTENTION + "k_proj", ATTENTION + "v_proj")


def outliers(tokens: int, k: int) -> Tensor:
    """Correlated inputs of which some are far larger than the rest."""
    x = correlated(tokens, k)
    x[:, ::37] *= 30
    return x


# one layer


@pytest.mark.parametrize("spec", FORMATS)
def test_clipping_never_raises_the_output_error(spec: str) -> None:
    torch.manual_seed(1)
    fmt = quantlib.get_format(spec)
    for n, k in ((24, 512), (10, 200), (3, 7), (130, 150)):
        weight, x = torch.randn(n, k) * 0.05, correlated(600, k)
        statistics = inputs_of(x)
        found = AWQ().quantize(weight, fmt, statistics)
        fmt.check(found.parts, n, k)
        assert found.dequantize(torch.float32).isfinite().all()
        plain = output_error(weight, x, RTN().quantize(weight, fmt))
        assert output_error(weight, x, found) <= plain * (1 + 1e-5)


def test_clipping_gains_and_leaves_queries_and_keys_alone() -> None:
    torch.manual_seed(2)
    fmt, x, weight = quantlib.get_format("int3-g64"), correlated(600, 256), torch.randn(32, 256) * 0.05
    statistics, plain = inputs_of(x), RTN().quantize(weight, fmt)
    for name, method in (("k_proj", AWQ()), ("up_proj", AWQ(apply_clip=False))):
        assert_same_bits(method.quantize(weight, fmt, statistics, "layers.0." + name).parts["codes"], plain.parts["codes"])
    found = AWQ().quantize(weight, fmt, statistics, "layers.0.up_proj")
    assert output_error(weight, x, found) < 0.9 * output_error(weight, x, plain)


@pytest.mark.parametrize("spec", FORMATS)
def test_scales_lower_the_output_error_of_a_stage(spec: str) -> None:
    """What the scales are chosen by is what a plain computation with scaled inputs and weights gives."""
    torch.manual_seed(3)
    fmt = quantlib.get_format(spec)
    x = outliers(600, 256)
    statistics = inputs_of(x)
    weights = [torch.randn(n, 256) * 0.05 for n in (16, 24)]

    def error(s: Tensor) -> float:
        found = [x / s @ quantlib.quantize(weight * s, fmt).dequantize(torch.float32).T for weight in weights]
        return sum(float((y - x @ weight.T).double().square().sum()) for y, weight in zip(found, weights, strict=True))

    s = AWQ(duo_scaling="both").scales(weights, [fmt, fmt], statistics)
    if s is None:  # a float's steps are relative: nothing is to be gained
        assert fmt.codec.kind == "minifloat"
        assert fmt.codec.bits == 8
        return
    assert s.shape == (256,)
    assert bool((s > 0).all())
    torch.testing.assert_close(s.amax() * s.amin(), torch.tensor(1.0))
    assert error(s) < error(torch.ones(256))
    if fmt.codec.bits <= 4:
        assert error(s) < 0.8 * error(torch.ones(256))


def test_copies_of_one_number_share_a_factor() -> None:
    torch.manual_seed(4)
    fold = Fold("v", ("o",), heads=(8, 3))
    sources = fold.sources(48)
    assert sources is not None
    assert sources.view(2, 3, 8).tolist() == [[list(range(8))] * 3, [list(range(8, 16))] * 3]
    s = AWQ().scales([torch.randn(16, 48)], [quantlib.get_format("int4-g32")], inputs_of(outliers(300, 48)), sources)
    assert s is not None
    assert s.shape == (16,)


def test_statistics_of_divided_inputs() -> None:
    x, s = correlated(300, 64), torch.rand(64) + 0.5
    expected, found = inputs_of(x / s), inputs_of(x).divided(s)
    torch.testing.assert_close(found.hessian, expected.hessian, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mean_abs, expected.mean_abs)
    torch.testing.assert_close(found.mean_square, expected.mean_square)


# folding


def segments(model: nn.Module) -> list[Segment]:
    return list(walk(model, tokens(), [name for name in linear_names(model) if "lm_head" not in name]))


def folds(model: nn.Module, segment: Segment) -> list[Fold]:
    """The first verified suggestion of every stage."""
    plain = _answer(segment)
    found = (
        next((f for f in _suggested(model, stage) if _cancels(model, segment, f, plain)), None) for stage in segment.stages
    )
    return [fold for fold in found if fold is not None]


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (4, 2), (4, 1)])
def test_folding_leaves_the_answers_as_they_were(queries: int, keys: int) -> None:
    """Four stages of a block, with any factors, up to rounding; with powers of two to the last bit."""
    model = llama(num_attention_heads=queries, num_key_value_heads=keys)
    first = segments(model)[0]
    before = {name: tensor.clone() for name, tensor in held(model).items()}
    found = folds(model, first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in held(model).items())
    assert [fold.module for fold in found] == [
        "model.layers.0.input_layernorm", ATTENTION + "v_proj", "model.layers.0.post_attention_layernorm", MLP + "up_proj",
    ]  # fmt: skip
    assert found[1].heads == (None if queries == keys else (16, queries // keys))
    with torch.no_grad():
        wanted = model(tokens()).logits
        for factors, limit in ((lambda p: 2.0 ** (torch.arange(p) % 5 - 2), 0.0), (lambda p: torch.rand(p) * 3 + 0.1, 3e-6)):
            copy = llama(num_attention_heads=queries, num_key_value_heads=keys)
            for fold in found:
                _apply(copy, fold, factors(len(copy.get_submodule(fold.module).weight)))
            changed = [name for name, tensor in held(copy).items() if not torch.equal(tensor, before[name])]
            assert len(changed) == 9
            assert float((copy(tokens()).logits - wanted).norm() / wanted.norm()) <= limit


class Offset(nn.Module):
    """A norm that multiplies by 1 + weight, as Gemma's does."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(len(norm.weight)) - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def test_a_norm_with_an_offset_is_found_out() -> None:
    model = llama()
    model.model.layers[0].input_layernorm = Offset(model.model.layers[0].input_layernorm)
    first = segments(model)[0]
    found = folds(model, first)
    assert [fold.offset for fold in found] == [1.0, 0.0, 0.0, 0.0]
    with torch.no_grad():
        wanted = model(tokens()).logits
        _apply(model, found[0], torch.rand(64) * 3 + 0.1)
        assert float((model(tokens()).logits - wanted).norm() / wanted.norm()) < 3e-6


class Sidelong(nn.Module):
    """A norm whose answer is read by something else too."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(x)
        return found + 0.01 * torch.sin(found)


def test_what_cannot_take_scales_up_goes_without_and_is_told() -> None:
    model = llama()
    said: list[str] = []
    model.model.layers[0].post_attention_layernorm = Sidelong(model.model.layers[0].post_attention_layernorm)
    model.model.layers[1].input_layernorm.weight = model.model.layers[0].input_layernorm.weight
    names = [name for name in linear_names(model) if "lm_head" not in name]
    chosen = dict.fromkeys(names, quantlib.get_format("int4-g32"))
    untouched = model.model.layers[0].post_attention_layernorm.weight
    for segment in walk(model, tokens(), names):
        fold_segment(model, segment, chosen, AWQ(n_grid=3), 3, watch=said.append)
    refused = [text for text in said if NO_SCALES in text]
    stages = (0, "q_proj, k_proj, v_proj"), (0, "gate_proj, up_proj"), (1, "q_proj, k_proj, v_proj")
    assert refused == [f"model.layers.{layer}: {NO_SCALES} ({stage})" for layer, stage in stages]
    assert model.model.layers[0].post_attention_layernorm.weight is untouched


def test_the_report_names_what_goes_without_scales_and_the_rest_gains() -> None:
    model = llama()
    model.model.layers[0].post_attention_layernorm = Sidelong(model.model.layers[0].post_attention_layernorm)
    report = quantlib.patch(model, "int4-g32", algorithm="awq", calibration=tokens(), progress=False)
    without = [layer.name for layer in report.layers if layer.note]
    assert without == [MLP + "gate_proj", MLP + "up_proj"]
    assert f"{NO_SCALES}: {', '.join(without)}" in " ".join(str(report).split())


def test_layers_that_share_a_weight_are_left_alone() -> None:
    model = llama()
    model.model.layers[1].self_attn.k_proj.weight = model.model.layers[0].self_attn.k_proj.weight
    names = [name for name in linear_names(model) if "lm_head" not in name]
    for segment in walk(model, tokens(), names):
        left = fold_segment(model, segment, dict.fromkeys(names, quantlib.get_format("int4-g32")), AWQ(n_grid=3), 3)
        assert [name.rpartition(".")[2] for name in left] == ["q_proj", "k_proj", "v_proj"]


def test_a_model_that_shares_its_tensors_stays_as_it_is() -> None:
    model = llama()
    before = snapshot(model)
    quantlib.patch(structural_copy(model), "int4-g32", algorithm="awq", calibration=tokens(), progress=False)
    assert_untouched(model, before)


def test_half_precision_is_folded_exactly_by_powers_of_two() -> None:
    model = llama(dtype=torch.bfloat16)
    assert len(folds(model, segments(model)[0])) == 4


# models


@pytest.mark.parametrize(
    "method", [AWQ(), AWQ(apply_clip=False), AWQ(base=GPTQ()), AWQ(base=RTN("mse", importance=True))], ids=str
)
def test_models_answer_better_than_under_the_base(method: AWQ) -> None:
    with torch.no_grad():
        for parameter in (original := loud()).parameters():
            parameter.requires_grad_(False)
        wanted = original(tokens(seed=7)).logits
    errors = {}
    for algorithm in (method, method.base):
        model = loud()
        needed = tokens(48, 32) if algorithm.needs != "nothing" else None
        report = quantlib.patch(model, "int4-g32", algorithm=algorithm, calibration=needed, progress=False)
        assert {layer.algorithm for layer in report.layers} == {algorithm.name}
        with torch.no_grad():
            errors[algorithm.name] = float((model(tokens(seed=7)).logits - wanted).norm())
    assert errors[method.name] < errors[method.base.name]


def loud() -> Any:
    """A llama with some channels of its norms far larger than the rest, as trained models have them."""
    model = llama()
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[::11] = 12.0
    return model


def test_a_patched_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model = llama()
    quantlib.patch(model, "int4-g32", algorithm="awq", calibration=tokens(), progress=False)
    again = quantlib.load(quantlib.save(model, tmp_path / "model"))
    with torch.no_grad():
        assert_same_bits(again(tokens()).logits, model(tokens()).logits)


class Killed(BaseException):
    pass


RUN: dict[str, Any] = {"algorithm": AWQ(n_grid=3), "calibration": tokens(), "progress": False}


@pytest.fixture(scope="module")
def uncut() -> dict[str, Tensor]:
    """What a run that nothing stops ends with."""
    model = llama()
    quantlib.patch(model, "int4-g32", **RUN)
    return held(model) | model.state_dict()


@pytest.mark.parametrize("survived", [0, 1, 5, 8, 9, 12])
def test_a_run_that_was_cut_off_ends_with_the_same_bits(
    survived: int, uncut: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off before the file number `survived` + 1 of 2 blocks with their scales and 7 layers each."""
    real, written = Journal._write, []

    def dying(self: Journal, name: str, write: Any) -> None:
        if name.endswith(".safetensors"):
            if len(written) == survived:
                raise Killed
            written.append(name)
        real(self, name, write)

    monkeypatch.setattr(Journal, "_write", dying)
    with pytest.raises(Killed):
        quantlib.patch(llama(), "int4-g32", journal=tmp_path / "journal", **RUN)
    if survived:
        assert written[0] == f"{QKV[0]}+scales.safetensors"
    monkeypatch.setattr(Journal, "_write", real)
    resumed = llama()
    quantlib.patch(resumed, "int4-g32", journal=tmp_path / "journal", **RUN)
    for name, tensor in (held(resumed) | resumed.state_dict()).items():
        assert_same_bits(tensor, uncut[name])


def test_damaged_scales_are_named(tmp_path: Path) -> None:
    options: dict[str, Any] = {"algorithm": "awq", "calibration": tokens(), "journal": tmp_path / "journal", "progress": False}
    quantlib.patch(llama(), "int4-g32", **options)
    damaged = tmp_path / "journal" / f"{QKV[0]}+scales.safetensors"
    os.truncate(damaged, 100)
    with pytest.raises(quantlib.CheckpointError, match=r"q_proj\+scales.safetensors is damaged"):
        quantlib.patch(llama(), "int4-g32", **options)
    shutil.rmtree(tmp_path / "journal")


def test_it_has_a_name_and_names_what_is_missing() -> None:
    assert get_algorithm("awq") == AWQ()
    assert get_algorithm("awq+gptq") == AWQ(base="gptq") == AWQ(base=GPTQ())
    assert AWQ(base="gptq").name == "awq+gptq"
    assert AWQ(base=HQQ()).name == "awq+hqq"
    assert_names_what_is_missing(AWQ())
    with pytest.raises(quantlib.QuantlibError, match="expected at least one exponent"):
        AWQ(n_grid=0)
    with pytest.raises(quantlib.QuantlibError, match="expected True, False or 'both'"):
        AWQ(duo_scaling="sometimes")  # type: ignore[arg-type]
    with pytest.raises(quantlib.QuantlibError, match="doesn't scale inputs itself"):
        AWQ(base="awq")
    with pytest.raises(quantlib.QuantlibError, match="unknown algorithm 'gtpq'; did you mean 'gptq'"):
        AWQ(base="gtpq")
    model = llama()
    statistics = quantlib.calibrate(model, tokens(), needs="hessian", progress=False)
    with pytest.raises(quantlib.QuantlibError, match=r"'awq' scales what comes before .* calibration=tokens, not statistics"):
        quantlib.patch(model, "nf4", algorithm="awq", calibration=statistics, progress=False)
