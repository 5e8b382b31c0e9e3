"""save and load: bit-exact, mapped, atomic, and clear about what does not fit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import quantlib
from quantlib import dispatch
from quantlib.checkpoints import native
from quantlib.testing import assert_same_bits

from . import cases
from .models import Block, block, llama


@pytest.mark.parametrize("spec", cases.FORMATS)
def test_round_trip_is_bit_exact(spec: str, tmp_path: Path) -> None:
    model, x = block(), torch.randn(3, 48)
    quantlib.patch(model, spec, progress=False)
    quantlib.save(model, tmp_path / "saved")
    loaded = quantlib.load(tmp_path / "saved", model=block(seed=1))
    state, again = model.state_dict(), loaded.state_dict()
    assert list(state) == list(again)
    for name in state:
        assert_same_bits(again[name], state[name])
    with torch.no_grad():
        assert_same_bits(loaded(x), model(x))
    assert loaded.again is loaded.shared


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformers_model_is_rebuilt_from_its_directory(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model, ids = llama(tied, dtype), torch.arange(9)[None]
    quantlib.patch(model, {"re:.*mlp.*": "q4_k", "self_attn": "nf4-dq"}, progress=False)
    quantlib.save(model, tmp_path / "saved")
    loaded = quantlib.load(tmp_path / "saved")
    assert type(loaded) is type(model)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    with torch.no_grad():
        assert_same_bits(loaded(ids).logits, model(ids).logits)


def test_what_is_written(tmp_path: Path) -> None:
    model = llama()
    quantlib.patch(model, "nvfp4", progress=False)
    quantlib.save(model, tmp_path / "deep" / "saved")
    assert {"config.json", "model.safetensors", "quantlib.json"} <= {p.name for p in (tmp_path / "deep" / "saved").iterdir()}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["saved"]
    manifest = json.loads((tmp_path / "deep" / "saved" / "quantlib.json").read_text())
    assert manifest["layers"]["model.layers.0.mlp.up_proj"]["format"] == "nvfp4"
    packed = sum(p.numel() * p.element_size() for p in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    assert (tmp_path / "deep" / "saved" / "model.safetensors").stat().st_size < packed + 20_000


def test_tensors_are_mapped_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they stay as files hold them: another layout is a copy."""
    monkeypatch.setattr(dispatch, "best_layout", lambda *arguments, **options: "rows")
    model = block()
    quantlib.patch(model, "int8", progress=False)
    path = quantlib.save(model, tmp_path / "saved")
    loaded = quantlib.load(path, model=block())
    pointers = [buffer.data_ptr() for buffer in loaded.buffers() if buffer.numel() > 100]
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(path / native.TENSORS) in line:
            low, high = line.split()[0].split("-")
            ranges.append((int(low, 16), int(high, 16)))
    assert pointers
    assert all(any(low <= pointer < high for low, high in ranges) for pointer in pointers)


def test_saving_again_replaces_the_earlier_checkpoint(tmp_path: Path) -> None:
    for spec in ("nf4", "int8"):
        model = block()
        quantlib.patch(model, spec, progress=False)
        quantlib.save(model, tmp_path / "saved")
    assert quantlib.load(tmp_path / "saved", model=block()).up_proj.format.name == "int8-channel"
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_crash_while_writing_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = block()
    quantlib.patch(model, "nf4", progress=False)
    quantlib.save(model, tmp_path / "saved")
    before = (tmp_path / "saved" / "model.safetensors").read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native, "save_file", full_disk)
    with pytest.raises(quantlib.CheckpointError, match="No space left"):
        quantlib.save(model, tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == before
    monkeypatch.setattr(native, "_sync", full_disk)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    model = block()
    quantlib.patch(model, "nf4", progress=False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(quantlib.CheckpointError, match="no quantlib checkpoint"):
        quantlib.save(model, tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]
    with pytest.raises(quantlib.CheckpointError, match="no QuantLinear"):
        quantlib.save(block(), tmp_path / "x")
    with pytest.raises(quantlib.CheckpointError, match="can't be written"):
        quantlib.save(model, tmp_path / "x", format="gguf")


def saved(tmp_path: Path, spec: str = "nvfp4") -> Path:
    model = block()
    quantlib.patch(model, spec, progress=False)
    return quantlib.save(model, tmp_path / "saved")


def test_a_damaged_or_foreign_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(quantlib.CheckpointError, match=r"no quantlib.json"):
        quantlib.load(tmp_path, model=block())
    path = saved(tmp_path)
    with pytest.raises(quantlib.CheckpointError, match=r"no config.json"):
        quantlib.load(path)
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(quantlib.CheckpointError, match="can't be read"):
        quantlib.load(path, model=block())
    (path / "quantlib.json").write_text("{")
    with pytest.raises(quantlib.CheckpointError, match="no JSON"):
        quantlib.load(path, model=block())
    (path / "quantlib.json").write_text('{"version": 99}')
    with pytest.raises(quantlib.CheckpointError, match="version 99"):
        quantlib.load(path, model=block())


def test_a_model_of_another_shape_is_refused_and_untouched(tmp_path: Path) -> None:
    path = saved(tmp_path)
    for other in (Block(width=64), nn.Sequential(nn.Linear(48, 72))):
        with pytest.raises(quantlib.CheckpointError, match=r"the model"):
            quantlib.load(path, model=other)
        assert not any(isinstance(module, quantlib.QuantLinear) for module in other.modules())


def test_a_format_that_is_not_registered_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    text = (path / "quantlib.json").read_text()
    (path / "quantlib.json").write_text(text.replace('"nvfp4"', '"mine4"'))
    with pytest.raises(quantlib.FormatError, match="unknown format 'mine4'"):
        quantlib.load(path, model=block())


def test_parts_that_do_not_fit_the_format_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path, "int4-g32")
    text = (path / "quantlib.json").read_text()
    (path / "quantlib.json").write_text(text.replace('"int4-g32"', '"int4-g16"'))
    with pytest.raises(quantlib.ShapeError, match=r"up_proj.codes: int4-g16 of \[72, 48\] needs"):
        quantlib.load(path, model=block())
