"""Mixes: which layer of a model gets which K-quant, as in llama.cpp, and what takes its place in narrow rows."""

from __future__ import annotations

import collections

import pytest

import quantlib
from quantlib.errors import FormatError, QuantlibError
from quantlib.formats import get_format
from quantlib.plan import budget_bytes
from quantlib.presets import PRESETS, preset
from tests.models import llama
from tests.test_patch import formats


def shapes(blocks: int, width: int = 512, values: int = 512) -> dict[str, tuple[int, int]]:
    found = {}
    for block in range(blocks):
        name = f"model.layers.{block}"
        found |= {f"{name}.self_attn.{part}_proj": (values if part in "kv" else width, width) for part in "qkvo"}
        found |= {f"{name}.mlp.{part}_proj": (1024, width) for part in ("gate", "up")}
        found[f"{name}.mlp.down_proj"] = (width, 1024)
    return found | {"lm_head": (1000, width)}


def blocks_with(chosen: dict[str, str], leaf: str, spec: str) -> list[int]:
    return [int(name.split(".")[2]) for name, found in chosen.items() if name.endswith(leaf) and found == spec]


def test_q4_k_m_gives_half_of_the_sensitive_layers_six_bits() -> None:
    chosen = preset("q4_k_m", shapes(32))
    better = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert blocks_with(chosen, "v_proj", "q6_k") == blocks_with(chosen, "down_proj", "q6_k") == better
    assert blocks_with(chosen, "v_proj", "q4_k") == [block for block in range(32) if block not in better]
    assert {chosen[f"model.layers.0.{part}"] for part in ("self_attn.q_proj", "mlp.up_proj", "self_attn.o_proj")} == {"q4_k"}
    assert chosen["lm_head"] == "q6_k"


def test_smaller_mixes() -> None:
    chosen = preset("Q4_K_S", shapes(32))
    assert blocks_with(chosen, "v_proj", "q5_k") == blocks_with(chosen, "down_proj", "q5_k") == [0, 1, 2, 3]
    assert collections.Counter(chosen.values()) == {"q4_k": 32 * 7 - 8, "q5_k": 8, "q6_k": 1}
    chosen = preset("q3_k_m", shapes(32))
    assert blocks_with(chosen, "v_proj", "q5_k") == blocks_with(chosen, "down_proj", "q5_k") == [0, 1]
    assert collections.Counter(chosen.values()) == {"q3_k": 32 * 4, "q4_k": 30 * 2 + 32, "q5_k": 4, "q6_k": 1}


@pytest.mark.parametrize(("values", "spec"), [(128, "q4_k"), (256, "q3_k"), (512, "q3_k")])
def test_the_smallest_mix_spares_values_that_many_heads_share(values: int, spec: str) -> None:
    chosen = preset("q2_k_m", shapes(8, values=values))
    assert len(blocks_with(chosen, "v_proj", spec)) == 8
    assert len(blocks_with(chosen, "o_proj", "q3_k")) == len(blocks_with(chosen, "down_proj", "q3_k")) == 8
    assert len(blocks_with(chosen, "k_proj", "q2_k")) == 8


def test_joined_projections_and_layers_without_a_place() -> None:
    chosen = preset("q4_k_m", {"h.0.qkv_proj": (1536, 512), "h.0.fc2": (512, 512), "projection": (64, 512)})
    assert chosen == {"h.0.qkv_proj": "q5_k", "h.0.fc2": "q6_k", "projection": "q4_k"}


def test_rows_that_no_super_block_divides_fall_back() -> None:
    """As llama.cpp's quantizer chooses for SmolLM2-135M, of 576 columns, and 1536 in down_proj."""
    chosen = preset("q4_k_m", {name: (n, 576 if k == 512 else 1536) for name, (n, k) in shapes(30).items()})
    assert {spec for name, spec in chosen.items() if "down_proj" not in name} == {"q5_0", "q8_0"}
    assert {spec for name, spec in chosen.items() if "down_proj" in name} == {"q4_k", "q6_k"}
    narrow = {name: (n, 320) for name, (n, _) in shapes(4).items()}
    assert set(preset("q2_k_m", narrow).values()) == {"iq4_nl", "q8_0"}
    assert "q5_1" in preset("q4_k_s", narrow).values()


@pytest.mark.parametrize("name", PRESETS)
def test_patch_takes_a_mix_by_its_name(name: str) -> None:
    model = llama()
    layers = {layer: tuple(module.weight.shape) for layer, module in model.named_modules() if hasattr(module, "in_features")}
    expected = preset(name, layers)
    quantlib.patch(model, name, progress=False)
    del expected["lm_head"]
    assert formats(model) == expected
    assert all(get_format(spec).name == spec for spec in expected.values())


def test_a_budget_may_be_the_size_of_a_mix() -> None:
    found = shapes(32)
    chosen = preset("q4_k_m", found)
    assert budget_bytes("same size as Q4_K_M", found) == sum(get_format(chosen[name]).nbytes(*found[name]) for name in found)


def test_an_unknown_mix_names_the_known_ones() -> None:
    with pytest.raises(FormatError, match=r"q9_k_m.*q5_k_m, q4_k_m"):
        preset("q9_k_m", {})
    with pytest.raises(QuantlibError, match="unknown format 'q9_k_m'"):
        quantlib.patch(llama(), "q9_k_m", progress=False)
