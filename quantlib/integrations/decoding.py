"""Generating text on a CPU, one token after another, without torch between the products.

A forward pass for one token of a small model takes transformers longer than the multiplications themselves: some forty calls
per layer. A Decoder lists them once (quantlib/kernels/cpu_program.py); from then on a token is one call. For a prompt the
model's layers are called one by one, and the extension does what lies between (quantlib/kernels/cpu_prompt.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantlib import dispatch
from quantlib.errors import KernelError, QuantlibError
from quantlib.formats.base import Format
from quantlib.kernels.base import get_declaration
from quantlib.kernels.cpu import in_int8
from quantlib.kernels.cpu_program import Program, Term, function_of
from quantlib.kernels.cpu_prompt import prompt_attention, prompt_gate, prompt_norm, prompt_rotate
from quantlib.nn import QuantLinear
from quantlib.tensor import QuantizedTensor

MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Models whose forward pass is the one that `_Builder` lists."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone."""

Pick = Callable[[Tensor], int]
"""Logits [vocabulary] -> a token."""


def greedy(logits: Tensor) -> int:
    """The likeliest token."""
    return int(logits.argmax())


class Decoder:
    """Generates with a causal language model of transformers on the CPU, batch 1, quantized layers and plain ones alike.

    model        one of MODELS, in evaluation mode, on the CPU, in fp32, bf16 or fp16
    max_length   positions that the cache holds: prompt and answer together

    The decoder reads the model's weights where they lie. Results agree with the model's own to the rounding of sums. Raises
    QuantlibError naming what in the model it can't run; `model.generate` runs everything.
    """

    def __init__(self, model: Any, max_length: int = 2048) -> None:
        _check(model, max_length)
        self.model, self.max_length = model, max_length
        self.position = 0
        config = model.config
        shape = (config.num_key_value_heads, max_length, _head_width(config))
        dtype = model.model.embed_tokens.weight.dtype
        self.caches = [
            (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(config.num_hidden_layers)
        ]
        self._program: Program | None = None
        self._built_for: tuple[Any, ...] = ()
        self._looked = False
        self._logits = torch.empty(0)

    def reset(self) -> None:
        """Forget every position. Here and before a prompt the decoder looks whether a weight lies elsewhere than before."""
        self.position = 0
        self._looked = False

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Add tokens [T] behind the present position; returns the logits [vocabulary] behind the last of them."""
        ids = ids.reshape(-1)
        self._check_room(ids.numel())
        _check_ids(self.model, ids)
        self._looked = False
        hidden = _Prompt(self.model, self.caches, self.position, ids).hidden()
        self.position += ids.numel()
        logits: Tensor = self.model.lm_head(hidden)[0]
        return logits

    def step(self, token: int) -> Tensor:
        """Add one token; returns the logits [vocabulary] behind it, in a tensor that the next step overwrites."""
        self._check_room(1)
        self._prepared().run(token, self.position)
        self.position += 1
        return self._logits

    def stream(self, ids: Tensor, max_new_tokens: int, pick: Pick = greedy) -> Iterator[int]:
        """Tokens as they come, from a fresh start, up to the end-of-text token (which comes last) or `max_new_tokens`."""
        self.reset()
        ids = ids.reshape(-1)
        self._check_room(ids.numel() + max(0, max_new_tokens - 1))
        ends = self.model.generation_config.eos_token_id
        stops = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        logits = self.prefill(ids)
        for count in range(1, max_new_tokens + 1):
            token = pick(logits)
            yield token
            if token in stops or count == max_new_tokens:
                return
            logits = self.step(token)

    def generate(self, input_ids: Tensor, max_new_tokens: int, pick: Pick = greedy) -> Tensor:
        """[1, T] or [T] -> [1, T + new tokens], as `model.generate` without sampling; `pick` chooses otherwise."""
        if input_ids.dim() > 2 or (input_ids.dim() == 2 and input_ids.shape[0] != 1):
            raise QuantlibError(f"a Decoder generates for one sequence; input_ids has the shape {list(input_ids.shape)}")
        prompt = input_ids.reshape(-1)
        new = list(self.stream(prompt, max_new_tokens, pick))
        return torch.cat([prompt, torch.tensor(new, dtype=prompt.dtype)])[None]

    def _check_room(self, count: int) -> None:
        if count < 1:
            raise QuantlibError("a Decoder needs at least one token to go on from")
        if self.position + count > self.max_length:
            raise QuantlibError(
                f"{self.position} + {count} positions don't fit into the cache of {self.max_length}; "
                "build the Decoder with a larger max_length, or call reset()"
            )

    def _prepared(self) -> Program:
        """The program, made anew where a weight, or the number of threads, is another. Asking for every tensor of a model takes
        longer than some of its layers: once per prompt, not per token."""
        if self._program is not None and self._looked:
            return self._program
        wanted = (torch.get_num_threads(), *(tensor.data_ptr() for tensor in _tensors(self.model)))
        if self._program is None or wanted != self._built_for:
            self._program, self._logits = _Builder(self.model, self.caches, self.max_length).build()
            self._built_for = wanted
        self._looked = True
        return self._program


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _head_width(config: Any) -> int:
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


def _check(model: Any, max_length: int) -> None:
    """Raise QuantlibError where the model is not one that the program expresses."""
    kind, config = type(model).__name__, getattr(model, "config", None)
    if kind not in MODELS or config is None:
        raise QuantlibError(f"a Decoder runs {', '.join(MODELS)}; this is a {kind}: use model.generate")
    if max_length < 1:
        raise QuantlibError(f"max_length must be at least 1, found {max_length}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    reach = int(window or max_length)
    reasons = {
        f"its activation function is {config.hidden_act}, not silu": config.hidden_act != "silu",
        f"its rotary embedding is {rope!r}, not one of {', '.join(ROPE_TYPES)}": rope not in ROPE_TYPES,
        f"its attention looks {reach} positions back, less than max_length {max_length}": reach < max_length,
        f"its heads are {_head_width(config)} wide, not a multiple of 16": _head_width(config) % 16 != 0,
        "it is in training mode; call model.eval()": model.training,
    }
    for reason, holds in reasons.items():
        if holds:
            raise QuantlibError(f"a Decoder can't run this {kind}: {reason}. Use model.generate")
    dtypes = {tensor.dtype for tensor in model.parameters()}
    places = {tensor.device.type for tensor in _tensors(model)}
    if len(dtypes) != 1 or places != {"cpu"}:
        raise QuantlibError(
            f"a Decoder can't run this {kind}: its parameters are {', '.join(sorted(map(str, dtypes)))} on "
            f"{', '.join(sorted(places))}; expected one dtype, on the CPU"
        )


def _check_ids(model: Any, ids: Tensor) -> None:
    size = model.model.embed_tokens.num_embeddings
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise KernelError(f"token {low if low < 0 else high} lies outside the vocabulary of {size}")


class _Prompt:
    """One forward pass over many positions: the products by the model's own layers, what lies between them by the extension."""

    def __init__(self, model: Any, caches: list[tuple[Tensor, Tensor]], position: int, ids: Tensor) -> None:
        self.base, self.caches, self.ids = model.model, caches, ids
        self.width = _head_width(model.config)
        self.start, self.stop = position, position + ids.numel()
        cosine, sine = self.base.rotary_emb(caches[0][0], torch.arange(self.start, self.stop)[None])
        self.angles = cosine[0], sine[0]

    def hidden(self) -> Tensor:
        """[1, hidden size]: what the output head reads behind the last position."""
        hidden = self.base.embed_tokens(self.ids)
        for layer, cache in zip(self.base.layers, self.caches, strict=True):
            hidden += self._attention(layer.self_attn, _normed(layer.input_layernorm, hidden), cache)
            mlp, x = layer.mlp, _normed(layer.post_attention_layernorm, hidden)
            hidden += mlp.down_proj(prompt_gate(mlp.gate_proj(x), mlp.up_proj(x)))
        return _normed(self.base.norm, hidden[-1:])

    def _attention(self, module: Any, x: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
        if hasattr(module, "q_norm"):
            q, k = _normed(module.q_norm, q), _normed(module.k_norm, k)
        keys, values = cache
        turned = torch.empty_like(q).view(len(q), -1, self.width).transpose(0, 1)
        prompt_rotate(q, self.angles, turned)
        prompt_rotate(k, self.angles, keys[:, self.start : self.stop])
        prompt_rotate(v, None, values[:, self.start : self.stop])
        y = prompt_attention(turned, keys[:, : self.stop], values[:, : self.stop], module.scaling)
        answer: Tensor = module.o_proj(y.view(len(q), -1))
        return answer


def _normed(module: Any, x: Tensor) -> Tensor:
    return prompt_norm(x, module.weight, module.variance_epsilon)


class _Builder:
    """Lists one model's calls."""

    def __init__(self, model: Any, caches: list[tuple[Tensor, Tensor]], max_length: int) -> None:
        self.model, self.config, self.caches = model, model.config, caches
        self.width = _head_width(model.config)
        self.dtype = caches[0][0].dtype
        self.program = Program(max_length, self.dtype, torch.get_num_threads())
        self.angles = self._angles(max_length)

    def _angles(self, max_length: int) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            x = torch.empty(0, dtype=self.dtype)
            cosine, sine = self.model.model.rotary_emb(x, torch.arange(max_length)[None])
        if cosine.shape[-1] != self.width:
            raise QuantlibError(
                f"a Decoder rotates whole heads; this model rotates {cosine.shape[-1]} of {self.width}: use model.generate"
            )
        return cosine[0].contiguous(), sine[0].contiguous()

    def _new(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=self.dtype)

    def build(self) -> tuple[Program, Tensor]:
        """(program, logits [vocabulary])."""
        base = self.model.model
        hidden, normed = self._new(self.config.hidden_size), self._new(self.config.hidden_size)
        self.program.embed(base.embed_tokens.weight.detach(), hidden)
        for index, layer in enumerate(base.layers):
            self._norm(layer.input_layernorm, hidden, normed)
            self.program.add(self._attention(f"model.layers.{index}.self_attn", layer.self_attn, normed, index), hidden)
            self._norm(layer.post_attention_layernorm, hidden, normed)
            self.program.add(self._feed_forward(f"model.layers.{index}.mlp", layer.mlp, normed), hidden)
        self._norm(base.norm, hidden, normed)
        (logits,) = self._linears(normed, {"lm_head": self.model.lm_head})
        return self.program, logits

    def _norm(self, module: Any, x: Tensor, y: Tensor) -> None:
        self.program.norm(x, module.weight.detach(), y, module.variance_epsilon)

    def _attention(self, name: str, module: Any, x: Tensor, index: int) -> Tensor:
        q, k, v = self._parts(name, module, ("q_proj", "k_proj", "v_proj"), x)
        keys, values = self.caches[index]
        for norm, heads in (("q_norm", q), ("k_norm", k)):
            if hasattr(module, norm):
                self._norm(getattr(module, norm), heads, heads)
        self.program.rotate(q, self.width, self.angles, None)
        self.program.rotate(k, self.width, self.angles, keys)
        self.program.rotate(v, self.width, None, values)
        y = self._new(q.numel())
        self.program.attention(q, keys, values, y, module.scaling)
        return self._parts(name, module, ("o_proj",), y)[0]

    def _feed_forward(self, name: str, module: Any, x: Tensor) -> Tensor:
        gated, _ = self._parts(name, module, ("gate_proj", "up_proj"), x, gated=True)
        return self._parts(name, module, ("down_proj",), gated)[0]

    def _parts(self, name: str, module: Any, parts: Sequence[str], x: Tensor, gated: bool = False) -> list[Tensor]:
        return self._linears(x, {f"{name}.{part}": getattr(module, part) for part in parts}, gated)

    def _linears(self, x: Tensor, modules: dict[str, nn.Module], gated: bool = False) -> list[Tensor]:
        """The products of layers that read the same x, into new tensors: one step for those of one kernel, format and layout.
        `gated`: of two layers, and the first tensor becomes silu of it times the second."""
        quantized: dict[tuple[str, Format, str, bool], list[Term[QuantizedTensor]]] = {}
        plain: list[Term[Tensor]] = []
        ys = []
        for name, module in modules.items():
            if module._forward_hooks or module._forward_pre_hooks or type(module) not in (QuantLinear, nn.Linear):
                what = "has hooks" if type(module) in (QuantLinear, nn.Linear) else f"is a {type(module).__name__}"
                raise QuantlibError(f"a Decoder calls plain linear layers; {name} {what}: use model.generate")
            assert isinstance(module, nn.Linear)
            ys.append(self._new(module.out_features))
            bias = None if module.bias is None else module.bias.detach()
            if isinstance(module, QuantLinear):
                weight = module.qweight
                key = self._function(name, module), weight.format, weight.layout, module.activations is not None
                quantized.setdefault(key, []).append(Term(weight, bias, ys[-1]))
            else:
                plain.append(Term(module.weight.detach(), bias, ys[-1]))
        in_step = gated and len(quantized) + bool(plain) == 1
        rounded = self._rounded(x) if any(rounds for *_, rounds in quantized) else x
        for (function, *_, rounds), terms in quantized.items():
            self.program.product(function, rounded if rounds else x, terms, in_step)
        if plain:
            self.program.dense(x, plain, in_step)
        if gated and not in_step:
            self.program.gate(ys[0], ys[1], ys[0])
        return ys

    def _rounded(self, x: Tensor) -> Tensor:
        y = self._new(x.numel())
        self.program.round(x, y)
        return y

    def _function(self, name: str, layer: QuantLinear) -> str:
        """The cheapest product that a program can hold, or the one that the layer is bound to."""
        problem = dispatch.problem_of("linear", 1, layer.qweight, self.dtype, layer.activations)
        names = [choice.kernel for choice in dispatch.choices(problem) if choice.cost is not None]
        for kernel in names if layer.kernel is None else [name for name in names if name == layer.kernel]:
            function = function_of(get_declaration(kernel))
            if function is not None and (layer.activations is None or in_int8(layer.activations)):
                return function
        raise QuantlibError(
            f"a Decoder can't call the kernel of {name} ({layer.format}, activations={layer.activations}, "
            f"kernel={layer.kernel}): use model.generate"
        )
