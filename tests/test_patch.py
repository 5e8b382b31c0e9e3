"""patch and unpatch: what is replaced, what is left, what is refused, and that a refusal touches nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantlib
import quantlib.dispatch
import quantlib.kernels
from quantlib.formats import get_format
from quantlib.testing import assert_close, assert_same_bits

from . import cases
from .models import Block, assert_untouched, block, llama, snapshot


def formats(model: nn.Module) -> dict[str, str]:
    return {name: m.format.name for name, m in model.named_modules() if isinstance(m, quantlib.QuantLinear)}


@pytest.mark.parametrize("spec", cases.FORMATS)
def test_every_format_patches_a_transformers_model(spec: str) -> None:
    model, ids = llama(), torch.arange(12)[None]
    report = quantlib.patch(model, spec, progress=False)
    assert len(report.layers) == 14
    assert set(formats(model).values()) == {get_format(spec).name}
    assert type(model.lm_head) is nn.Linear
    with torch.no_grad():
        quantized = model(ids).logits
    quantlib.unpatch(model)
    with torch.no_grad():
        assert_close(quantized, model(ids).logits.double(), torch.float16)


def test_report_says_what_was_done() -> None:
    model = llama()
    originals = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    report = quantlib.patch(model, "nvfp4", progress=False)
    assert report.skipped == ("lm_head",)
    assert report.nbytes == sum(layer.nbytes for layer in report.layers) < 0.16 * report.original_nbytes
    for row in report.layers:
        layer = model.get_submodule(row.name)
        assert row.shape == (layer.out_features, layer.in_features)
        assert row.nbytes == layer.qweight.nbytes == get_format(row.format).nbytes(*row.shape)
        assert row.bits_per_weight == pytest.approx(8 * row.nbytes / (row.shape[0] * row.shape[1]))
        difference = layer.weight - originals[row.name]
        assert row.error == pytest.approx(float(difference.norm() / originals[row.name].norm()), rel=1e-4)
        for m, kernel in row.kernels.items():
            problem = quantlib.dispatch.problem_of("linear", m, layer.qweight, layer.dtype)
            assert quantlib.dispatch.select(problem).name == kernel
    text = str(report)
    assert "nvfp4" in text
    assert "self_attn.q_proj" in text
    assert report.to_dict()["bits_per_weight"] == report.bits_per_weight


def test_the_report_names_experts_in_one_parameter() -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4}
    model = nn.ModuleDict({"lm": Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads)), "convolution": nn.Conv1d(8, 8, 3)})
    report = quantlib.patch(model, "int4-g32", progress=False)
    experts = "lm.model.layers.0.mlp.experts"
    assert report.skipped == ("lm.lm_head", f"{experts}.gate_up_proj", f"{experts}.down_proj")
    assert f"{experts}.down_proj" in str(report)


def test_patterns_first_match_wins_and_none_leaves() -> None:
    model = block()
    quantlib.patch(model, {"up_proj": "nf4", "re:^(up|down)_proj$": "int8", "*shared*": None}, progress=False)
    assert formats(model) == {"up_proj": "nf4", "down_proj": "int8-channel"}
    model = llama()
    quantlib.patch(model, {"*.mlp.*": "q4_k", "model.layers.1": "fp8", "self_attn": "nvfp4"}, progress=False)
    found = formats(model)
    assert found["model.layers.1.mlp.up_proj"] == "q4_k"
    assert found["model.layers.1.self_attn.q_proj"] == "fp8-e4m3"
    assert found["model.layers.0.self_attn.q_proj"] == "nvfp4"


def test_skip_and_a_head_named_in_full() -> None:
    model = block()
    quantlib.patch(model, "nf4", skip=("lm_head", "*down*"), progress=False)
    assert set(formats(model)) == {"up_proj", "shared", "again"} - {"again"}
    model = block()
    quantlib.patch(model, {"lm_head": "q6_k", "*": "nf4"}, progress=False)
    assert formats(model)["lm_head"] == "q6_k"
    model = block()
    quantlib.patch(model, "nf4", skip=(), progress=False)
    assert "lm_head" in formats(model)


def test_a_layer_that_stands_in_two_places_is_replaced_in_both() -> None:
    model = block()
    quantlib.patch(model, "int8", progress=False)
    assert isinstance(model.again, quantlib.QuantLinear)
    assert model.again is model.shared


def test_hooks_and_mode_survive() -> None:
    model, seen = block().train(), []
    model.up_proj.register_forward_hook(lambda *_: seen.append(1))
    quantlib.patch(model, "int8", progress=False)
    model(torch.randn(2, 48))
    assert seen == [1]
    assert model.up_proj.training


def test_unpatch_restores_plain_layers_that_compute_the_same() -> None:
    model, x = block(), torch.randn(3, 48)
    quantlib.patch(model, "nvfp4", progress=False)
    with torch.no_grad():
        quantized = model(x)
    assert sorted(quantlib.unpatch(model)) == ["down_proj", "shared", "up_proj"]
    assert formats(model) == {}
    with torch.no_grad():
        assert_close(model(x), quantized.double(), torch.float16)
    with pytest.raises(quantlib.QuantlibError, match="no QuantLinear"):
        quantlib.unpatch(model)


REFUSALS = {
    "a pattern that matches nothing": ({"spec": {"gate*": "nvfp4"}}, r"'gate\*' matches none .* nearest names"),
    "one that matches nothing beside one that does": ({"spec": {"up_proj": "nf4", "re:^zap": "nf4"}}, "matches none"),
    "no regular expression": ({"spec": {"re:(": "nf4"}}, "no regular expression"),
    "an unknown format": ({"spec": "nvpf4"}, "did you mean 'nvfp4'"),
    "an unknown format in a pattern": ({"spec": {"up_proj": "nf4", "down_proj": "int5"}}, "unknown format 'int5'"),
    "a group size that can't be": ({"spec": "int4-g7"}, "positive multiple of 8"),
    "a negative group size": ({"spec": "int4-g-16"}, "positive multiple of 8|unknown word"),
    "a skip entry that matches nothing": ({"spec": "nf4", "skip": ("zap",)}, "skip entry 'zap'"),
    "everything skipped": ({"spec": "nf4", "skip": ("*",)}, "nothing is left"),
    "an unknown algorithm": ({"spec": "nf4", "algorithm": "rtm"}, "did you mean 'rtn'"),
    "an unknown kernel": ({"spec": "nf4", "kernel": "marlin"}, "unknown kernel 'marlin'"),
    "a kernel that can't": ({"spec": "nf4", "kernel": "reference_dgrad"}, "reference_dgrad"),
    "unknown activations": ({"spec": "nf4", "activations": "fp9"}, "unknown format 'fp9'"),
    "an impossible device": ({"spec": "nf4", "device": "cuda:99"}, "cuda:99"),
    "calibration for rtn": ({"spec": "nf4", "calibration": "text"}, "takes no calibration"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_leave_the_model_untouched(name: str) -> None:
    arguments, message = REFUSALS[name]
    model = block()
    before = snapshot(model)
    with pytest.raises(quantlib.QuantlibError, match=message):
        quantlib.patch(model, progress=False, **arguments)  # type: ignore[arg-type]
    assert_untouched(model, before)
    assert type(model.up_proj) is nn.Linear


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named_before_anything_is_touched(value: float) -> None:
    model = block()
    model.down_proj.weight.data[3, 5] = value
    before = snapshot(model)
    with pytest.raises(quantlib.ShapeError, match=r"down_proj: 1 of 3456 weights are NaN or infinite"):
        quantlib.patch(model, "nvfp4", progress=False)
    assert_untouched(model, before)


def test_a_scale_out_of_range_is_named_before_anything_is_touched() -> None:
    model = block()
    model.down_proj.weight.data[3, 5] = 3e6
    before = snapshot(model)
    with pytest.raises(quantlib.FormatError, match=r"down_proj: scale .* does not fit float16"):
        quantlib.patch(model, "int4", progress=False)
    assert_untouched(model, before)
    quantlib.patch(model, "int4-bf16", progress=False)


def test_a_second_patch_is_refused() -> None:
    model = block()
    quantlib.patch(model, "nvfp4", progress=False)
    before = snapshot(model)
    with pytest.raises(quantlib.QuantlibError, match=r"patched already .*unpatch"):
        quantlib.patch(model, "nf4", progress=False)
    assert_untouched(model, before)


def test_meta_weights_and_bare_layers_are_refused() -> None:
    with torch.device("meta"):
        model = Block()
    with pytest.raises(quantlib.ShapeError, match="meta device"):
        quantlib.patch(model, "nf4", progress=False)
    with pytest.raises(quantlib.QuantlibError, match="from_linear"):
        quantlib.patch(nn.Linear(8, 8), "nf4")
    with pytest.raises(quantlib.QuantlibError, match=r"no torch.nn.Linear"):
        quantlib.patch(nn.Sequential(nn.ReLU()), "nf4")


def test_an_interrupt_says_how_far_it_came() -> None:
    class Interrupted:
        name = "interrupted"
        needs = "nothing"
        calls = 0

        def quantize(self, weight: torch.Tensor, fmt: quantlib.Format, inputs: object = None, name: str = "") -> object:
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return quantlib.quantize(weight, fmt, name=name)

    with pytest.raises(KeyboardInterrupt) as caught:
        quantlib.patch(block(), "nf4", algorithm=Interrupted(), progress=False)  # type: ignore[arg-type]
    assert "1 of 3 layers" in caught.value.__notes__[0]


def test_search_is_an_algorithm_and_lowers_the_weight_error() -> None:
    plain = quantlib.patch(block(), "nvfp4", progress=False)
    searched = quantlib.patch(block(), "nvfp4", algorithm="rtn-mse", progress=False)
    assert searched.error < plain.error
    assert searched.algorithm == "rtn-mse"


def test_progress_shows_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    quantlib.patch(block(), "nf4")
    assert "3/3" in capsys.readouterr().out


def test_attention_projection_read_by_its_parent_is_left_alone() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    quantlib.patch(model, "int8", skip=(), progress=False)
    assert set(formats(model)) == {"linear1", "linear2"}
    assert torch.isfinite(model(torch.randn(1, 3, 16))).all()


def test_explain_names_the_kernel_taken_and_why_the_others_are_not() -> None:
    model = block()
    quantlib.patch(model, "nvfp4", progress=False)
    explanation = quantlib.explain(model, batch=(1, 512))
    for _, m, found in explanation.rows:
        problem = quantlib.dispatch.problem_of("linear", m, model.up_proj.qweight, torch.float32)
        names = {choice.kernel for choice in found}
        assert names == {kernel.name for kernel in quantlib.kernels.list_kernels("linear")}
        assert found[0].cost is not None
        assert all(choice.refusal or choice.cost is not None for choice in found)
        assert found[0].kernel == quantlib.dispatch.select(problem).name
    assert found[0].kernel in str(explanation)
    with pytest.raises(quantlib.QuantlibError, match="no QuantLinear"):
        quantlib.explain(block())


def test_generation_is_deterministic_and_uses_the_cache() -> None:
    model = llama()
    quantlib.patch(model, "int4-g32", progress=False)
    ids = torch.arange(5)[None]
    first = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert_same_bits(first, model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0))
