"""Small models that tests patch."""

from __future__ import annotations

import torch
from torch import nn

from quantlib.testing import assert_same_bits


class Block(nn.Module):
    """An MLP with a shared layer, a bias-free layer and an output head."""

    def __init__(self, width: int = 48, hidden: int = 72, classes: int = 11) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, hidden)
        self.shared = nn.Linear(hidden, hidden, bias=False)
        self.again = self.shared
        self.down_proj = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, classes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.silu(self.up_proj(x))
        result: torch.Tensor = self.lm_head(self.norm(self.down_proj(self.again(self.shared(hidden)))))
        return result


def block(seed: int = 0, dtype: torch.dtype = torch.float32) -> Block:
    """A Block with reproducible weights."""
    torch.manual_seed(seed)
    return Block().to(dtype).eval()


def llama(tied: bool = True, dtype: torch.dtype = torch.float32, **sizes: int):  # type: ignore[no-untyped-def]
    """A randomly initialised two-layer Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    defaults = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**(defaults | {"num_key_value_heads": 2, "vocab_size": 128} | sizes), tie_word_embeddings=tied)
    return LlamaForCausalLM(config).to(dtype).eval()


def snapshot(model: nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    """Every tensor's identity and a copy of its bits: what "untouched" is checked against."""
    return {name: (tensor.data_ptr(), tensor.detach().clone()) for name, tensor in held(model).items()}


def held(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_untouched(model: nn.Module, before: dict[str, tuple[int, torch.Tensor]]) -> None:
    """Fail unless the model holds the same tensors with the same bits, and the same kinds of layers."""
    after = held(model)
    assert set(after) == set(before)
    for name, (pointer, bits) in before.items():
        assert after[name].data_ptr() == pointer, name
        assert_same_bits(after[name].detach(), bits)
