"""llama.cpp's mixes by name: "q4_k_m" is no format but a choice of one for every layer, as a plan is.

A mix has a format for most layers, and better ones for those that lose most: values, what leads out of attention and out of the
feed-forward part. A format whose blocks don't divide a layer's columns gives way to one with blocks of 32, as in llama.cpp. Its
exceptions for single models and for experts are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from quantlib.errors import FormatError
from quantlib.formats import Format, get_format

FALLBACKS = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""What takes the place of a K-quant where a row is no multiple of its 256 weights."""

ROLES = {
    "value": ("v_proj", "value"),
    "joined": ("qkv_proj", "query_key_value", "Wqkv"),
    "attention_out": ("o_proj", "out_proj", "dense"),
    "down": ("down_proj", "fc2", "dense_4h_to_h"),
    "head": ("lm_head", "embed_out"),
}
"""What a layer does -> the last part of its name in common models."""


@dataclass(frozen=True)
class Layer:
    """A layer in its model: what it does ("" where that doesn't matter), which of how many blocks it stands in, and how many
    heads of queries share one of values."""

    role: str
    block: int
    blocks: int
    sharing: int

    @property
    def first_or_last(self) -> bool:
        """In the first or the last eighth of the blocks, or in every third between them."""
        eighth = self.blocks // 8
        return self.block < eighth or self.block >= 7 * self.blocks // 8 or (self.block - eighth) % 3 == 2


def _medium(base: str, joined: str, layer: Layer) -> str:
    if layer.role in ("value", "down") and layer.first_or_last:
        return "q6_k"
    return joined if layer.role == "joined" else base


def _q4_k_s(layer: Layer) -> str:
    better = (layer.role == "value" and layer.block < 4) or (layer.role == "down" and layer.block < layer.blocks // 8)
    return "q5_k" if better else "q4_k"


def _q3_k_m(layer: Layer) -> str:
    if (layer.role == "value" and layer.block < 2) or (layer.role == "down" and layer.block < layer.blocks // 16):
        return "q5_k"
    return "q4_k" if layer.role in ("value", "down", "attention_out", "joined") else "q3_k"


def _q2_k_m(layer: Layer) -> str:
    if layer.role == "value":
        return "q4_k" if layer.sharing >= 4 else "q3_k"
    return "q3_k" if layer.role in ("down", "attention_out") else "q2_k"


PRESETS: dict[str, Callable[[Layer], str]] = {
    "q5_k_m": partial(_medium, "q5_k", "q6_k"),
    "q4_k_m": partial(_medium, "q4_k", "q5_k"),
    "q4_k_s": _q4_k_s,
    "q3_k_m": _q3_k_m,
    "q2_k_m": _q2_k_m,
}
"""Name -> the format of a layer. llama.cpp calls the last one Q2_K, which is a format's name too."""


def is_preset(name: str) -> bool:
    """Whether a mix has this name, in any case of letters."""
    return name.strip().lower() in PRESETS


def canonical_spec(spec: str) -> str:
    """The name of a mix or of a format. Raises FormatError where it is neither."""
    return spec.strip().lower() if is_preset(spec) else get_format(spec).name


def formats_by_layer(spec: str | Format, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Format]:
    """The format of every layer under one format or a mix. Raises FormatError where `spec` is neither."""
    if isinstance(spec, str) and is_preset(spec):
        return {layer: get_format(name) for layer, name in preset(spec, shapes).items()}
    return dict.fromkeys(shapes, get_format(spec))


def preset(name: str, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Layer -> spec string, for layers of these names and shapes (N, K). An output head gets q6_k.

    Raises FormatError for an unknown mix.
    """
    choose = PRESETS.get(name.strip().lower())
    if choose is None:
        raise FormatError(f"unknown mix {name!r}: expected one of {', '.join(PRESETS)}")
    chosen = {}
    blocks = 1 + max((_block(layer) or 0 for layer in shapes), default=0)
    for layer, (_, k) in shapes.items():
        placed = _placed(layer, shapes, blocks)
        spec = "q6_k" if placed.role == "head" else choose(placed)
        chosen[layer] = spec if k % get_format(spec).column_multiple == 0 else FALLBACKS[spec]
    return chosen


def _placed(name: str, shapes: Mapping[str, tuple[int, int]], blocks: int) -> Layer:
    parent, _, leaf = name.rpartition(".")
    role = next((role for role, leaves in ROLES.items() if leaf in leaves), "")
    queries = shapes.get(f"{parent}.q_proj" if parent else "q_proj", shapes[name])
    return Layer(role, _block(name) or 0, blocks, queries[0] // max(shapes[name][0], 1))


def _block(name: str) -> int | None:
    """The number in a name: model.layers.3.mlp.up_proj stands in block 3."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return None if found is None else int(found[1])
