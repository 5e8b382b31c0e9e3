"""A HuggingFace Llama as a GGUF file, for llama.cpp to read: the same numbers under its names, queries and keys in its order.

Only what a comparison needs: the llama architecture without biases or scaled rotations, fp32 weights, token numbers instead of
a vocabulary. Names and keys: the `gguf` package; the order of rows: `permuted`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor

from quantlib.errors import CheckpointError

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""HuggingFace's name within a layer -> llama.cpp's."""


def permuted(weight: Tensor, heads: int) -> Tensor:
    """W [heads * size, K] of queries or keys, rows of each head from halves (0, size/2, ...) to neighbours (0, 1, ...).

    HuggingFace rotates row i with row i + size/2, llama.cpp row 2i with row 2i + 1.
    """
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def why_not(config: Any) -> str | None:
    """Why a model of this configuration can't be written, or None."""
    if config.model_type != "llama":
        return f"writes the llama architecture, not {config.model_type!r}"
    if config.attention_bias or config.mlp_bias:
        return "writes layers without biases"
    if rope(config).get("rope_type", "default") != "default":
        return f"writes plain rotations, not {rope(config)['rope_type']!r}"
    return None


def rope(config: Any) -> dict[str, Any]:
    """The rotation's parameters."""
    return dict(config.rope_parameters)


def tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(llama.cpp's name, fp32 tensor) of every weight of a LlamaForCausalLM; a tied output matrix once, as the embedding."""
    config, own = model.config, model.state_dict()
    yield "token_embd.weight", own["model.embed_tokens.weight"].float()
    for layer in range(config.num_hidden_layers):
        for theirs, name in LAYER_NAMES.items():
            weight = own[f"model.layers.{layer}.{theirs}.weight"].float()
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name)
            yield f"blk.{layer}.{name}.weight", weight if heads is None else permuted(weight, heads)
    yield "output_norm.weight", own["model.norm.weight"].float()
    if not config.tie_word_embeddings:
        yield "output.weight", own["lm_head.weight"].float()


def write_gguf(model: Any, path: Path) -> None:
    """Write a LlamaForCausalLM in fp32. Raises CheckpointError where the model is of another kind."""
    import gguf

    config, refusal = model.config, why_not(model.config)
    if refusal is not None:
        raise CheckpointError(f"{type(model).__name__}: {refusal}")
    head = config.head_dim
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope(config)["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, tensor in tensors(model):
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_types(path: Path) -> dict[str, int]:
    """Type -> how many matrices of a GGUF file have it; what llama.cpp made of rows that don't fit shows here."""
    import gguf

    counts: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) == 2:
            name = tensor.tensor_type.name.lower()
            counts[name] = counts.get(name, 0) + 1
    return counts


def read_nbytes(path: Path) -> int:
    """Bytes of all tensors of a GGUF file."""
    import gguf

    return sum(int(numpy.asarray(tensor.data).nbytes) for tensor in gguf.GGUFReader(path).tensors)
