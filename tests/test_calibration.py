"""Walking a model's blocks, statistics of inputs, sequential quantization, journals that outlive a crash."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantlib
from quantlib.algorithms import GPTQ
from quantlib.calibration.recording import _Recorder, find_blocks, record
from quantlib.calibration.shelf import Shelf
from quantlib.calibration.walk import walk
from quantlib.testing import assert_same_bits
from tests.models import held, llama

ROOT = Path(__file__).parents[1]


def tokens(samples: int = 9, length: int = 24, vocabulary: int = 128, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed))


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def inputs_by_hooks(model: nn.Module, names: list[str], sample: Tensor) -> dict[str, Tensor]:
    """What each layer reads in one plain run of the whole model."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, arguments, name=name: found.setdefault(name, []).append(arguments[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        model(sample)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


class Unchained(nn.Module):
    """Blocks that are given more than the block before made."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 32)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 128)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids: Tensor) -> Tensor:
        first = hidden = self.embed(ids)
        for block in self.blocks:
            hidden = torch.tanh(block(hidden)) + first
        found: Tensor = self.head(hidden)
        return found


def test_layers_that_read_one_input_are_one_stage() -> None:
    model = llama()
    segments = list(walk(model, tokens(), linear_names(model)))
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    assert [segment.name for segment in segments] == ["model.layers.0", "model.layers.1", ""]
    assert segments[0].stages == [
        (attention + "q_proj", attention + "k_proj", attention + "v_proj"),
        (attention + "o_proj",),
        (mlp + "gate_proj", mlp + "up_proj"),
        (mlp + "down_proj",),
    ]
    assert segments[2].stages == [("lm_head",)]


@pytest.mark.parametrize("build", [llama, Unchained])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_statistics_are_those_of_a_plain_run(build: Any, batch_size: int) -> None:
    model, sample = build(), tokens()
    names = linear_names(model)
    model.train()
    before = {name: tensor.clone() for name, tensor in held(model).items()}
    found = quantlib.calibrate(model, sample, needs="hessian", batch_size=batch_size, progress=False)
    assert model.training
    assert list(found) == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in held(model).items())
    for name, x in inputs_by_hooks(model.eval(), names, sample).items():
        assert found[name].tokens == len(x) == sample.numel()
        outer = found[name].outer
        assert outer is not None
        torch.testing.assert_close(outer, x.T @ x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[name].mean_abs, x.abs().mean(0))


def test_statistics_outlive_their_process(tmp_path: Path) -> None:
    model = llama()
    found = quantlib.calibrate(model, tokens(), progress=False)
    kept = quantlib.Statistics.load(found.save(tmp_path / "statistics"))
    assert list(kept) == list(found)
    names = list(found)
    assert kept[names[0]] is kept[names[1]]
    assert kept[names[0]] is not kept[names[3]]
    for name in names:
        assert kept[name].tokens == found[name].tokens
        assert_same_bits(kept[name].sum_sq, found[name].sum_sq)
    by_statistics = quantlib.patch(llama(), "nvfp4", algorithm="rtn-importance", calibration=kept, progress=False)
    assert all(layer.output_error is not None for layer in by_statistics.layers)


def test_each_layer_is_calibrated_behind_those_already_quantized() -> None:
    """The last layer's codes are those of GPTQ on what reaches it in the quantized model."""
    sample = tokens(40)
    model = llama()
    original = model.get_submodule("model.layers.1.mlp.down_proj").weight.clone()
    quantlib.patch(model, "int4-g32", algorithm="gptq", calibration=sample, progress=False)
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in sample.split(4):
            model(batch)
    handle.remove()
    statistics = quantlib.algorithms.InputStatistics.empty(original.shape[1], "hessian")
    for x in seen:
        statistics.add(x)
    expected = GPTQ().quantize(original, quantlib.get_format("int4-g32"), statistics)
    assert isinstance(layer, quantlib.QuantLinear)
    found = layer.qweight.to_layout("rows").parts["codes"]
    assert float((found == expected.parts["codes"]).double().mean()) > 0.99


def test_shortcuts_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends with a layer isn't run again; the same codes come out where it is."""
    short, long = llama(), llama()
    names = linear_names(short)
    recorded = record(short, [tokens()], names, find_blocks(short, names))
    assert recorded is not None
    endings = recorded[9].endings
    assert {name: ending.module for name, ending in endings.items() if ".0." in name} == {
        "model.layers.0.self_attn.o_proj": "model.layers.0.self_attn",
        "model.layers.0.mlp.down_proj": "model.layers.0.mlp",
    }
    options: dict[str, Any] = {"algorithm": "gptq", "calibration": tokens(), "progress": False}
    quantlib.patch(short, "int4-g32", **options)
    assert not any("forward" in module.__dict__ for module in short.modules())
    monkeypatch.setattr(_Recorder, "_leaving", lambda self, name: lambda *arguments: None)
    quantlib.patch(long, "int4-g32", **options)
    for name, tensor in short.state_dict().items():
        assert_same_bits(long.state_dict()[name], tensor)


@pytest.mark.parametrize(("kept", "batches"), [(0.0, 0), (0.5, 2), (1.0, 4), (2.0, 5), (100.0, 8)])
def test_what_finds_no_room_is_computed_again(kept: float, batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each block's four batches of what o_proj reads, as wide as hidden states, and down_proj, 2.5 times as wide."""
    whole, changed = llama(), llama()
    options: dict[str, Any] = {"algorithm": "gptq", "calibration": tokens(16, 24), "progress": False}
    assert changed.config.intermediate_size == 2.5 * changed.config.hidden_size
    quantlib.patch(whole, "int4-g32", **options)
    monkeypatch.setattr(sys.modules[walk.__module__], "KEPT", kept)
    put: list[int] = []
    keep = Shelf.__setitem__

    def counting(shelf: Shelf, batch: int, x: torch.Tensor) -> None:
        put.append(batch)
        keep(shelf, batch, x)

    monkeypatch.setattr(Shelf, "__setitem__", counting)
    quantlib.patch(changed, "int4-g32", **options)
    assert len(put) == 2 * (4 + batches)  # hidden states before each of two blocks
    for name, tensor in whole.state_dict().items():
        assert_same_bits(changed.state_dict()[name], tensor)


def test_a_shelf_keeps_batches_in_one_allocation() -> None:
    shelf = Shelf(3)
    found = [torch.randn(4, 5), torch.randn(4, 5), torch.randn(2, 5)]
    for batch, tensor in enumerate(found):
        shelf[batch] = tensor
    assert len({shelf[batch].untyped_storage().data_ptr() for batch in range(3)}) == 1
    place = shelf[1].data_ptr()
    shelf[1] = found[1] + 1
    assert shelf[1].data_ptr() == place
    for batch, tensor in enumerate((found[0], found[1] + 1, found[2])):
        assert_same_bits(shelf[batch], tensor)


@pytest.mark.parametrize("changed", [torch.ones(4, 6), torch.ones(4, 5, dtype=torch.bfloat16)], ids=["shape", "dtype"])
def test_a_shelf_takes_what_its_room_does_not_fit(changed: Tensor) -> None:
    shelf = Shelf(2)
    first, second = torch.randn(4, 5), torch.randn(4, 5)
    shelf[0], shelf[1] = first, second
    shelf[0] = changed
    assert_same_bits(shelf[0], changed)
    assert_same_bits(shelf[1], second)
    with pytest.raises(IndexError, match="nothing is kept for batch 1"):
        Shelf(2)[1]


def test_calibrated_layers_answer_better() -> None:
    errors = {}
    original = llama()
    with torch.no_grad():
        wanted = original(tokens(seed=7)).logits
    for algorithm in ("rtn", "gptq", "awq", "autoround"):
        model = llama()
        calibration = None if algorithm == "rtn" else tokens(64)
        report = quantlib.patch(model, "int4-g32", algorithm=algorithm, calibration=calibration, progress=False)
        assert {layer.algorithm for layer in report.layers} == {algorithm}
        with torch.no_grad():
            errors[algorithm] = float((model(tokens(seed=7)).logits - wanted).norm())
    assert all(error < errors["rtn"] for algorithm, error in errors.items() if algorithm != "rtn")


def test_layers_that_no_token_reaches_are_rounded_and_reported() -> None:
    model = Unchained()
    model.spare = nn.Linear(32, 32)
    report = quantlib.patch(model, "int4-g32", algorithm="gptq", calibration=tokens(), skip=(), progress=False)
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["spare"].algorithm == "rtn"
    assert by_name["spare"].output_error is None
    assert by_name["head"].algorithm == "gptq"
    assert by_name["head"].output_error is not None


SHARE = """
import sys, torch, quantlib
from tests.models import llama
from tests.test_calibration import tokens
rank, where, results = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=2)
model = llama()
statistics = quantlib.calibrate(model, tokens(9), needs="hessian", progress=False)
quantlib.patch(model, "int4-g32", algorithm="gptq", calibration=tokens(9), progress=False)
facts = {name: (found.tokens, found.outer) for name, found in statistics.items()}
torch.save((facts, model.state_dict()), f"{results}/{rank}.pt")
"""


def test_processes_share_the_samples_and_agree(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHARE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    where = [str(tmp_path / "meeting"), str(tmp_path)]
    running = [subprocess.Popen([*command, str(rank), *where], cwd=ROOT, env=environment) for rank in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    (facts, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, tensor in first.items():
        assert_same_bits(second[name], tensor)
    alone = quantlib.calibrate(llama(), tokens(9), needs="hessian", progress=False)
    for name, (count, outer) in facts.items():
        assert count == alone[name].tokens
        torch.testing.assert_close(outer, alone[name].outer, rtol=1e-4, atol=1e-4)


# bad data


def test_bad_calibration_data_is_named() -> None:
    model = llama()
    with pytest.raises(quantlib.QuantlibError, match="'gptq' needs calibration data"):
        quantlib.patch(model, "nf4", algorithm="gptq", progress=False)
    with pytest.raises(quantlib.QuantlibError, match="'rtn' takes no calibration data"):
        quantlib.patch(model, "nf4", calibration=tokens(), progress=False)
    with pytest.raises(quantlib.ShapeError, match=r"token windows, integers \[samples, length\], found torch.float32 \[2, 3\]"):
        quantlib.patch(model, "nf4", algorithm="gptq", calibration=torch.ones(2, 3), progress=False)
    with pytest.raises(quantlib.QuantlibError, match=r"calibration data is empty: \[0, 24\]"):
        quantlib.patch(model, "nf4", algorithm="gptq", calibration=tokens(0), progress=False)
    with pytest.raises(quantlib.ShapeError, match="token id 199 is outside the model's vocabulary of 128"):
        quantlib.calibrate(model, torch.full((2, 8), 199), progress=False)
    with pytest.raises(quantlib.QuantlibError, match="journal belongs to a run over calibration tokens"):
        quantlib.patch(model, "nf4", journal="somewhere", progress=False)
    assert not any(isinstance(module, quantlib.QuantLinear) for module in model.modules())


def test_nan_activations_name_the_layer() -> None:
    model = llama()
    model.model.layers[1].input_layernorm.weight.data[3] = torch.nan
    model.train()
    with pytest.raises(quantlib.QuantlibError, match=r"layers\.1\.self_attn\.q_proj: .* calibration activations are NaN"):
        quantlib.calibrate(model, tokens(), progress=False)
    assert all(module.training for module in model.modules())


def test_a_run_that_breaks_off_leaves_modules_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().train()
    broken, quantize = model.get_submodule("model.layers.1.mlp.gate_proj").weight, GPTQ.quantize

    def breaking(self: GPTQ, weight: Tensor, *arguments: Any) -> Any:
        if weight.data_ptr() == broken.data_ptr():
            raise KeyboardInterrupt
        return quantize(self, weight, *arguments)

    monkeypatch.setattr(GPTQ, "quantize", breaking)
    with pytest.raises(KeyboardInterrupt) as caught:
        quantlib.patch(model, "int4-g32", algorithm="gptq", calibration=tokens(), progress=False)
    assert "11 of 14 layers" in caught.value.__notes__[0]
    assert all(module.training for module in model.modules())
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())


class Words:
    """A tokenizer of single letters."""

    eos_token_id = 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 128 for letter in text]}


def test_samples_are_drawn_by_seed() -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 20
    found = quantlib.calibration_tokens(text, Words(), samples=5, length=16, seed=3)
    assert found.shape == (5, 16)
    assert found.dtype == torch.int64
    assert_same_bits(found, quantlib.calibration_tokens(text, Words(), samples=5, length=16, seed=3))
    assert not torch.equal(found, quantlib.calibration_tokens(text, Words(), samples=5, length=16, seed=4))
    assert all("".join(map(chr, row.tolist())) in text for row in found)
    joined = quantlib.calibration_tokens(["ab", "", "cd"], Words(), samples=1, length=5)
    assert joined[0].tolist() == [97, 98, 0, 99, 100]


def test_the_default_text_is_not_what_is_evaluated() -> None:
    from quantlib.evaluation import default_text

    calibration, evaluated = default_text("calibration"), default_text("evaluation")
    assert default_text().startswith(evaluated)
    assert default_text().endswith(calibration)
    assert len(evaluated) + len(calibration) + 2 == len(default_text())
    found = quantlib.calibration_tokens(None, Words(), samples=3, length=64)
    everything = [ord(letter) % 128 for letter in calibration]
    starts = {tuple(everything[at : at + 64]) for at in range(len(everything) - 63)}
    assert all(tuple(row.tolist()) in starts for row in found)


@pytest.mark.parametrize(
    ("data", "tokenizer", "message"),
    [
        ("", Words(), "holds no text"),
        ([], Words(), "holds no text"),
        ("short", Words(), "5 tokens, less than one sample of 512"),
        ("a text", None, "without its model's tokenizer"),
        (torch.zeros(3, 4, dtype=torch.int64), None, r"integers \[T\], found torch.int64 \[3, 4\]"),
        (torch.zeros(3), None, r"integers \[T\], found torch.float32"),
    ],
    ids=["empty", "no text", "short", "no tokenizer", "matrix", "floats"],
)
def test_data_that_gives_no_sample_is_refused(data: Any, tokenizer: Any, message: str) -> None:
    with pytest.raises(quantlib.QuantlibError, match=message):
        quantlib.calibration_tokens(data, tokenizer)


# journals

RUN = """
import sys, torch, quantlib
from tests.models import llama
from tests.test_calibration import tokens
torch.set_num_threads(1)
model = llama(num_hidden_layers=3)
print("ready", flush=True)
quantlib.patch(model, "int4-g32", algorithm="gptq", calibration=tokens(24, 32), journal=sys.argv[1], progress=False, skip=())
torch.save(model.state_dict(), sys.argv[2])
"""


def start(journal: Path, result: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(journal), str(result)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_a_run_killed_ten_times_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole", tmp_path / "whole.pt")
    assert whole.stdout is not None
    assert whole.stdout.readline() == "ready\n"
    begun = time.monotonic()
    assert whole.wait() == 0
    took = time.monotonic() - begun
    chance = random.Random(0)
    kills = 0
    while kills < 10:
        running = start(tmp_path / "killed", tmp_path / "killed.pt")
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0, took / 3))
        if running.poll() is not None:  # it came to its end before the kill: begin anew, so that ten kills are ten kills
            (tmp_path / "killed").rename(tmp_path / f"ended-{kills}-{time.monotonic_ns()}")
            continue
        running.send_signal(signal.SIGKILL)
        running.wait()
        kills += 1
    running = start(tmp_path / "killed", tmp_path / "killed.pt")
    assert running.wait() == 0
    expected, found = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "killed.pt")
    assert list(expected) == list(found)
    for name, tensor in expected.items():
        assert_same_bits(found[name], tensor)


def test_a_journal_is_gone_on_with_and_only_by_its_own_run(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    options: dict[str, Any] = {"calibration": tokens(), "journal": journal, "progress": False}
    first, second = llama(), llama()
    quantlib.patch(first, "int4-g32", algorithm="gptq", **options)
    files = {file.name: file.stat().st_mtime_ns for file in journal.iterdir()}
    quantlib.patch(second, "int4-g32", algorithm="gptq", **options)
    assert {file.name: file.stat().st_mtime_ns for file in journal.iterdir()} == files
    for name, tensor in first.state_dict().items():
        assert_same_bits(second.state_dict()[name], tensor)
    with pytest.raises(quantlib.CheckpointError, match="another run: it differs in algorithm"):
        quantlib.patch(llama(), "int4-g32", algorithm=GPTQ(damp_percent=0.02), **options)
    with pytest.raises(quantlib.CheckpointError, match="another run: it differs in formats"):
        quantlib.patch(llama(), "nf4", algorithm="gptq", **options)
    with pytest.raises(quantlib.CheckpointError, match="another run: it differs in tokens"):
        quantlib.patch(llama(), "int4-g32", algorithm="gptq", **options | {"calibration": tokens(seed=1)})
    other = llama()
    other.model.layers[0].mlp.up_proj.weight.data *= 2
    with pytest.raises(quantlib.CheckpointError, match="another run: it differs in model"):
        quantlib.patch(other, "int4-g32", algorithm="gptq", **options)


def test_a_damaged_or_foreign_journal_is_named(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    options: dict[str, Any] = {"algorithm": "gptq", "calibration": tokens(), "progress": False}
    quantlib.patch(llama(), "int4-g32", journal=journal, **options)
    damaged = journal / "model.layers.1.mlp.up_proj.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(quantlib.CheckpointError, match=r"up_proj.safetensors is damaged .* quantized again"):
        quantlib.patch(llama(), "int4-g32", journal=journal, **options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(quantlib.CheckpointError, match="exists and holds no journal"):
        quantlib.patch(llama(), "int4-g32", journal=tmp_path / "full", **options)


def test_a_full_disk_leaves_a_journal_to_go_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantlib.calibration import journal as module

    journal = tmp_path / "journal"
    options: dict[str, Any] = {"algorithm": "gptq", "calibration": tokens(), "journal": journal, "progress": False}
    real, written = module.save_file, []

    def full(*arguments: Any, **keywords: Any) -> None:
        written.append(arguments)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        real(*arguments, **keywords)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(quantlib.CheckpointError, match=r"No space left on device; .* start again") as caught:
        quantlib.patch(llama(), "int4-g32", **options)
    assert "3 of 14 layers; call again with the same journal" in caught.value.__notes__[0]
    assert not [file for file in journal.iterdir() if file.name.startswith(".")]
    monkeypatch.setattr(module, "save_file", real)
    resumed, whole = llama(), llama()
    quantlib.patch(resumed, "int4-g32", **options)
    quantlib.patch(whole, "int4-g32", **options | {"journal": None})
    for name, tensor in whole.state_dict().items():
        assert_same_bits(resumed.state_dict()[name], tensor)
