"""Plans: sensitivities, budgets, the choice under one, and that it is never worse than a single format."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path

import pytest
import torch

import quantlib
from quantlib.formats import get_format
from quantlib.plan import GROUPS, Plan, _correct, _groups, budget_bytes, choose, output_weights, plan, plot
from quantlib.running import logits_of, structural_copy
from quantlib.testing import assert_same_bits
from tests.models import held, llama
from tests.test_calibration import tokens

FORMATS = ("int2-g32-asym", "int4-g32", "int8-g32")
SHAPES = {"a": (64, 128), "b": (32, 256)}


def test_budgets_are_read() -> None:
    assert budget_bytes("4.5bpw", SHAPES) == int(4.5 * 2 * 8192 / 8)
    assert budget_bytes("0.5 MB", SHAPES) == 500_000
    assert budget_bytes("same size as nvfp4", SHAPES) == sum(get_format("nvfp4").nbytes(*shape) for shape in SHAPES.values())
    for words in ("4.5", "big", "-3MB", "same size as"):
        with pytest.raises(quantlib.QuantlibError, match=r"can't be read; write '4.5bpw'"):
            budget_bytes(words, SHAPES)


def test_the_choice_is_near_the_best_of_all() -> None:
    """Against every combination, on random sensitivities."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        names, specs = [f"layer{i}" for i in range(6)], ["small", "middle", "large"]
        bytes_of = zip(names, (3, 5, 8, 13, 4, 7), strict=True)
        sizes = {name: dict(zip(specs, (size, 2 * size, 4 * size), strict=True)) for name, size in bytes_of}
        loss = torch.rand(6, 3, generator=generator).sort(dim=1, descending=True).values
        sensitivity = {name: dict(zip(specs, row, strict=False)) for name, row in zip(names, loss.tolist(), strict=False)}
        limit = int(40 + 120 * float(torch.rand((), generator=generator)))
        chosen = choose(sensitivity, sizes, limit)
        assert sum(sizes[name][spec] for name, spec in chosen.items()) <= limit
        found = sum(sensitivity[name][spec] for name, spec in chosen.items())
        fitting = [
            sum(sensitivity[name][spec] for name, spec in zip(names, combination, strict=False))
            for combination in itertools.product(specs, repeat=6)
            if sum(sizes[name][spec] for name, spec in zip(names, combination, strict=False)) <= limit
        ]
        assert found <= min(fitting) + 0.35


def test_output_weights_are_mean_squares_of_gradients() -> None:
    model, sample = llama(), tokens(3)
    name = "model.layers.1.mlp.down_proj"
    found = output_weights(model, sample, [name])[name]
    generator = torch.Generator().manual_seed(0)
    expected = torch.zeros(64, dtype=torch.float64)
    for ids in sample:
        kept: list[torch.Tensor] = []

        def keep(module: object, arguments: object, output: torch.Tensor, kept: list[torch.Tensor] = kept) -> None:
            output.retain_grad()
            kept.append(output)

        handle = model.get_submodule(name).register_forward_hook(keep)
        log_p = torch.log_softmax(model(ids[None]).logits[0], dim=-1)
        handle.remove()
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        log_p.gather(1, drawn).sum().backward()
        assert kept[0].grad is not None
        expected += kept[0].grad[0].double().square().sum(0)
    torch.testing.assert_close(found, expected / sample.numel())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_predictions_follow_what_is_measured() -> None:
    """The KL that quantizing one layer costs, over four orders of magnitude."""
    model, sample = llama(), tokens(48, 32)
    made = plan(model, "4bpw", sample, formats=["int4-g32", "int2-g32-asym"], judged=16)
    predicted, measured = [], []
    for name in made:
        changed = structural_copy(model)
        quantlib.patch(changed, {name: "int2-g32-asym"}, progress=False)
        with torch.no_grad():
            pairs = [(logits_of(model, ids[None])[0], logits_of(changed, ids[None])[0]) for ids in sample[-16:]]
        logs = [(a.log_softmax(-1), b.log_softmax(-1)) for a, b in pairs]
        measured.append(sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in logs) / len(logs))
        predicted.append(made.sensitivity[name]["int2-g32-asym"])
    assert max(measured) > 1000 * min(measured)
    assert float(torch.corrcoef(torch.tensor([predicted, measured]).log())[0, 1]) > 0.98


def test_groups_hold_every_layer_once_and_are_corrected_to_what_was_measured() -> None:
    costs = {f"layers.{i}": {"nf4": float((7 * i) % 30 + 1), "int8": 0.5} for i in range(30)}
    groups = _groups(costs, "nf4")
    assert sorted(name for group in groups for name in group) == sorted(costs)
    assert len(groups) == GROUPS
    sizes = [costs[name]["nf4"] for group in groups for name in group]
    assert sizes == sorted(sizes)
    assert len(_groups(dict(list(costs.items())[:5]), "nf4")) == 5
    rows = [{"nf4": 1.0, "int8": 0.5}, {"nf4": 3.0, "int8": 0.0}]
    _correct(rows, "nf4", 2.0)
    assert rows == [{"nf4": 0.5, "int8": 0.25}, {"nf4": 1.5, "int8": 0.0}]
    _correct(rows, "int8", 1.0, only=True)
    assert rows == [{"nf4": 0.5, "int8": 1.0}, {"nf4": 1.5, "int8": 0.0}]
    _correct(rows, "nf4", 0.0)
    assert rows[0]["nf4"] == 0.5


@pytest.mark.parametrize("budget", ["3.5bpw", "5.5bpw", "same size as int4-g32", "0.06MB"])
def test_a_plan_fits_and_is_never_worse_than_one_format(budget: str) -> None:
    model = llama()
    before = {name: tensor.clone() for name, tensor in held(model).items()}
    made = plan(model, budget, tokens(24), formats=FORMATS)
    shapes = {name: (model.get_submodule(name).out_features, model.get_submodule(name).in_features) for name in made}
    limit = budget_bytes(budget, shapes)
    assert made.nbytes == sum(get_format(spec).nbytes(*shapes[name]) for name, spec in made.items()) <= limit
    own, *uniform = made.measured
    assert own.name == "plan"
    assert own.nbytes == made.nbytes
    assert [found.name for found in uniform] == list(FORMATS)
    assert own.kl <= min(found.kl for found in uniform if found.nbytes <= limit)
    assert "lm_head" not in made
    assert len(made) == 14
    for name, tensor in held(model).items():
        assert_same_bits(tensor, before[name])
    report = quantlib.patch(model, made, progress=False)
    assert {layer.name: layer.format for layer in report.layers} == dict(made)


def test_a_disk_without_room_costs_time_and_no_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the original's logits can't be kept, the original runs again for each candidate."""
    kept = plan(llama(), "5bpw", tokens(12), formats=FORMATS, judged=2)

    def full(*arguments: object, **options: object) -> None:
        raise quantlib.QuantlibError("the reference's logits need 1.00 GB of disk")

    monkeypatch.setattr(importlib.import_module("quantlib.plan"), "capture_reference", full)
    with pytest.warns(UserWarning, match=r"runs beside every candidate: .* 1\.00 GB of disk"):
        made = plan(llama(), "5bpw", tokens(12), formats=FORMATS, judged=2)
    assert dict(made) == dict(kept)
    assert made.measured == kept.measured


def test_a_plan_outlives_its_process(tmp_path: Path) -> None:
    made = plan(llama(), "5bpw", tokens(12), formats=FORMATS, judged=2)
    kept = Plan.load(made.save(tmp_path / "plan.json"))
    assert dict(kept) == dict(made)
    assert str(kept) == str(made)
    assert kept.sensitivity == made.sensitivity
    assert kept.measured == made.measured
    assert plot(kept).startswith(b"\x89PNG")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(quantlib.CheckpointError, match="is no plan that quantlib wrote"):
        Plan.load(tmp_path / "other.json")
    facts = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(facts | {"version": 9}))
    with pytest.raises(quantlib.CheckpointError, match="has version 9"):
        Plan.load(tmp_path / "plan.json")


def test_budgets_that_nothing_fits_are_refused() -> None:
    with pytest.raises(quantlib.QuantlibError, match="the smallest format, int2-g32-asym, takes"):
        plan(llama(), "1bpw", tokens(), formats=FORMATS, judged=2)
    with pytest.raises(quantlib.QuantlibError, match="9 calibration samples are too few to judge by 9"):
        plan(llama(), "4bpw", tokens(), formats=FORMATS, judged=9)
