"""Decoder: the tokens and logits of the model's own forward pass, from a program of calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import quantlib
from quantlib.errors import KernelError, QuantlibError
from quantlib.integrations.decoding import Decoder
from quantlib.kernels import cpu
from quantlib.kernels.cpu_program import Program
from quantlib.testing import assert_same_bits

from . import models

if cpu.unavailable is not None:
    pytest.skip(cpu.unavailable, allow_module_level=True)

PROMPT = torch.tensor([[3, 17, 99, 4, 56]])
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative error of logits: sums in another order, and what the dtype makes of it between layers."""


def family(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A small model of a class, its norms' weights random too."""
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(
        hidden_size=96, intermediate_size=224, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
        vocab_size=160, **options,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def errors_of_steps(model: Any, steps: int = 12) -> list[float]:
    """Of the logits of prefill and of steps, relative to the model's, for the model's own greedy tokens."""
    decoder, errors = Decoder(model, 32), []
    ids = PROMPT
    logits = decoder.prefill(ids)
    for _ in range(steps):
        with torch.inference_mode():
            wanted = model(ids).logits[0, -1]
        errors.append(relative(logits, wanted))
        token = int(wanted.argmax())
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
        logits = decoder.step(token)
    return errors


def assert_follows(model: Any, limit: float) -> None:
    assert max(errors_of_steps(model)) <= limit


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("spec", ["none", "int4-g32", "nvfp4", "q4_k", "int8"])
def test_logits_are_the_models(spec: str, dtype: torch.dtype, isa: str) -> None:
    model = models.llama(dtype=dtype, hidden_size=256, intermediate_size=512)
    if spec != "none":
        quantlib.patch(model, spec, progress=False)
    assert_follows(model, LIMITS[dtype])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
        ("Mistral", {"sliding_window": 64}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {}),
    ],
)
@pytest.mark.parametrize("spec", [None, {"lm_head": "int8", "*": "int4-g32"}])
def test_families_of_models(name: str, options: dict[str, Any], spec: dict[str, str] | None) -> None:
    model = family(name, **options)
    if spec is not None:
        quantlib.patch(model, spec, skip=(), progress=False)
    assert_follows(model, LIMITS[torch.float32])


@pytest.mark.parametrize("spec", ["int4-g32", "nf4", "q4_k"])
def test_activations_in_int8_are_rounded_at_each_step(spec: str, isa: str) -> None:
    """Steps follow the model to the last places until a scale is almost a tie in fp16 and falls on the other side: then all
    codes of a row differ, and what they leave in the cache."""
    plain = models.llama(hidden_size=256, intermediate_size=512)
    rounding = models.llama(hidden_size=256, intermediate_size=512)
    quantlib.patch(plain, spec, progress=False)
    quantlib.patch(rounding, spec, activations="int8", progress=False)
    errors = errors_of_steps(rounding)
    assert max(errors[:3]) < 1e-5
    assert max(errors) < 0.02
    decoders = [Decoder(model, 32) for model in (plain, rounding)]
    for decoder in decoders:
        decoder.prefill(PROMPT)
    without, with_rounding = (decoder.step(3).clone() for decoder in decoders)
    assert relative(with_rounding, without) > 3e-3


def test_generates_what_the_model_generates() -> None:
    model = family("Llama")
    quantlib.patch(model, "nvfp4", progress=False)
    wanted = model.generate(PROMPT, max_new_tokens=20, do_sample=False, pad_token_id=0)
    found = Decoder(model, 25).generate(PROMPT, 20)
    assert_same_bits(found, wanted)


def test_stops_behind_the_end_of_text() -> None:
    model = family("Llama")
    decoder = Decoder(model, 64)
    tokens = list(decoder.stream(PROMPT, 20))
    model.generation_config.eos_token_id = [tokens[6]]
    assert list(decoder.stream(PROMPT, 20)) == tokens[: tokens.index(tokens[6]) + 1]


def test_picks_as_it_is_told() -> None:
    tokens = list(Decoder(family("Llama")).stream(PROMPT, 4, pick=lambda logits: int(logits.argmin())))
    assert tokens[0] == int(Decoder(family("Llama")).prefill(PROMPT).argmin())
    assert len(tokens) == 4


def test_a_prompt_in_pieces_is_the_same_prompt() -> None:
    model = family("Qwen3")
    whole, pieces = Decoder(model, 16), Decoder(model, 16)
    pieces.prefill(PROMPT[:, :2])
    pieces.step(int(PROMPT[0, 2]))
    assert relative(pieces.prefill(PROMPT[:, 3:]), whole.prefill(PROMPT)) < 2e-6
    assert pieces.position == whole.position == 5
    assert relative(pieces.step(7), whole.step(7).clone()) < 2e-6


def test_bits_do_not_depend_on_threads() -> None:
    model, found = family("Llama", torch.bfloat16), []
    quantlib.patch(model, "int4-g32", progress=False)
    before = torch.get_num_threads()
    decoder = Decoder(model, 600)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            decoder.reset()
            torch.manual_seed(0)
            for cache in decoder.caches:
                for part in cache:
                    part.copy_(torch.randn_like(part))
            decoder.position = 500  # enough keys that attention takes several threads
            found.append(decoder.step(5).clone())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same_bits(other, found[0])


def test_changed_weights_are_seen() -> None:
    model = family("Llama")
    decoder = Decoder(model, 16)
    decoder.prefill(PROMPT)
    decoder.step(1)
    quantlib.patch(model, "int8", progress=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.5)
    ids = torch.cat([PROMPT, torch.tensor([[9]])], 1)
    decoder.reset()
    decoder.prefill(PROMPT)
    assert relative(decoder.step(9), model(ids).logits[0, -1]) < 2e-6


def test_a_full_cache_is_an_error() -> None:
    decoder = Decoder(family("Llama"), 6)
    decoder.prefill(PROMPT)
    decoder.step(1)
    with pytest.raises(QuantlibError, match="max_length"):
        decoder.step(1)
    with pytest.raises(QuantlibError, match="max_length"):
        decoder.generate(PROMPT, 3)
    assert decoder.generate(PROMPT, 2).shape == (1, 7)


@pytest.mark.parametrize("token", [-1, 160])
def test_a_token_outside_the_vocabulary_is_an_error(token: int) -> None:
    decoder = Decoder(family("Llama"))
    with pytest.raises(KernelError, match="vocabulary of 160"):
        decoder.step(token)
    assert decoder.position == 0


def test_what_a_decoder_cannot_run_it_names() -> None:
    with pytest.raises(QuantlibError, match="this is a Block"):
        Decoder(models.block())
    with pytest.raises(QuantlibError, match="looks 8 positions back"):
        Decoder(family("Mistral", sliding_window=8), 16)
    with pytest.raises(QuantlibError, match="training mode"):
        Decoder(family("Llama").train())
    with pytest.raises(QuantlibError, match="gelu"):
        Decoder(family("Llama", hidden_act="gelu"))
    with pytest.raises(QuantlibError, match="one sequence"):
        Decoder(family("Llama")).generate(PROMPT.expand(2, -1), 3)
    with pytest.raises(QuantlibError, match="at least one token"):
        Decoder(family("Llama")).generate(PROMPT[:, :0], 3)


def test_layers_that_are_more_than_products_are_named() -> None:
    model = family("Llama")
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, y: y + 1)
    with pytest.raises(QuantlibError, match=r"model\.layers\.1\.mlp\.up_proj has hooks"):
        Decoder(model).step(1)
    rounded = family("Llama")
    quantlib.patch(rounded, "int8", activations="fp8", progress=False)
    with pytest.raises(QuantlibError, match=r"q_proj .*activations=fp8"):
        Decoder(rounded).step(1)


def test_a_program_takes_tensors_of_its_own_dtype() -> None:
    program = Program(4, torch.bfloat16, 1)
    with pytest.raises(KernelError, match=r"torch\.bfloat16"):
        program.add(torch.zeros(8), torch.zeros(8))
    with pytest.raises(KernelError, match="fp32, bf16 or fp16"):
        Program(4, torch.float64, 1)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("count", [1, 31, 32, 100])
def test_small_steps_round_as_torch_does(isa: str, dtype: torch.dtype, count: int) -> None:
    torch.manual_seed(count)
    gate, up, weight, y = (torch.randn(count).mul(4).to(dtype) for _ in range(4))
    gated, normed, added = torch.empty_like(y), torch.empty_like(y), y.clone()
    program = Program(1, dtype, 1)
    program.gate(gate, up, gated)
    program.norm(gate, weight, normed, 1e-5)
    program.add(up, added)
    program.run(0, 0)
    wide = gate.float()
    wanted = weight * (wide * torch.rsqrt(wide.pow(2).mean() + 1e-5)).to(dtype)
    unit = torch.finfo(dtype).eps
    assert_same_bits(added, y + up)
    torch.testing.assert_close(gated, torch.nn.functional.silu(gate) * up, rtol=4 * unit, atol=1e-6)
    torch.testing.assert_close(normed, wanted, rtol=4 * unit, atol=1e-6)
