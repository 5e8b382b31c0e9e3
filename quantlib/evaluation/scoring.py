"""Running a model over windows: negative log-likelihoods, and KL against a reference that runs beside it or has run before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.errors import QuantlibError, ShapeError
from quantlib.evaluation.reference import ReferenceLogits
from quantlib.evaluation.result import Divergence, Evaluation
from quantlib.evaluation.windows import ProtocolName, TokenWindows, make_windows
from quantlib.running import evaluating, logits_of, tracked, vocabulary_of

ROWS = 128
"""Positions per slice of the fp32 softmax: with a vocabulary of 128k one temporary is 64 MB, whatever the window."""


def evaluate(
    model: nn.Module,
    tokens_or_text: str | Tensor | Sequence[int] | TokenWindows,
    tokenizer: Any = None,
    reference: nn.Module | ReferenceLogits | None = None,
    *,
    protocol: ProtocolName = "A",
    window: int | None = None,
    windows: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
) -> Evaluation:
    """Perplexity of a causal language model and, with a reference, KL and agreement with it.

    model           called with token ids [B, T]; returns logits [B, T, V] or an object with `.logits`
    tokens_or_text  a text (needs `tokenizer`), token ids [T], or windows made by `make_windows` (which fix the protocol)
    reference       the original model, run beside this one; or what `capture_reference` kept of it
    protocol        "A": disjoint windows, every position scored; "B": llama.cpp's, the second half of each window scored
    window, windows, batch_size    tokens per window, how many of them, how many at once

    Log-softmax, cross entropy and KL are computed in fp32 and averaged in fp64. The model is left in the mode it was in.

    Raises QuantlibError or ShapeError for a text without tokenizer, too few tokens, ids outside the vocabulary, NaN logits,
    and a reference that was captured on other windows or has another vocabulary.
    """
    cut = _windows(tokens_or_text, tokenizer, protocol, window, windows)
    if isinstance(reference, ReferenceLogits) and reference.windows.digest != cut.digest:
        raise QuantlibError(
            f"the reference's logits belong to other tokens (digest {reference.windows.digest}, here {cut.digest}): "
            "capture them on the same windows"
        )
    return _score(model, cut, reference, batch_size, progress, "evaluating", None)


def capture_reference(
    model: nn.Module,
    tokens_or_text: str | Tensor | Sequence[int] | TokenWindows,
    tokenizer: Any = None,
    *,
    protocol: ProtocolName = "A",
    window: int | None = None,
    windows: int | None = None,
    batch_size: int = 1,
    directory: Path | None = None,
    progress: bool = True,
) -> ReferenceLogits:
    """Score the reference model once and keep its logits for `evaluate(..., reference=...)`.

    Needs scored tokens * vocabulary * bytes per logit of disk in `directory` (default: the system's temporary directory).
    Arguments and errors are those of `evaluate`; QuantlibError also where the disk has no room.
    """
    kept = ReferenceLogits(_windows(tokens_or_text, tokenizer, protocol, window, windows), directory)
    kept.evaluation = _score(model, kept.windows, None, batch_size, progress, "evaluating the reference", kept.write)
    return kept


def _windows(
    data: str | Tensor | Sequence[int] | TokenWindows,
    tokenizer: Any,
    protocol: ProtocolName,
    window: int | None,
    windows: int | None,
) -> TokenWindows:
    if isinstance(data, TokenWindows):
        return data
    return make_windows(data, tokenizer, protocol=protocol, window=window, windows=windows)


def _score(
    model: nn.Module,
    cut: TokenWindows,
    reference: nn.Module | ReferenceLogits | None,
    batch_size: int,
    progress: bool,
    title: str,
    keep: Callable[[int, Tensor], None] | None,
) -> Evaluation:
    """The one loop over windows."""
    _check_ids(cut, vocabulary_of(model))
    started = time.perf_counter()
    samples: list[tuple[Tensor, ...]] = []
    position = 0
    with torch.inference_mode(), evaluating(model), _evaluating(reference):
        for ids in tracked(cut.tokens.split(batch_size), progress, title):
            logits = _scored_logits(model, ids, cut.first)
            _check_ids(cut, logits.shape[1])
            stop = position + len(logits)
            if keep is not None:
                keep(position, logits)
            other = _reference_logits(reference, ids, cut.first, position, stop, logits)
            targets = ids[:, cut.first :].reshape(-1).to(logits.device)
            samples += _score_rows(logits, targets, other, position, cut)
            position = stop
    columns = [torch.cat(column) for column in zip(*samples, strict=True)]
    return Evaluation(
        protocol=cut.protocol.name,
        window=cut.window,
        windows=len(cut.tokens),
        tokens=cut.scored,
        digest=cut.digest,
        nll=columns[0],
        divergence=None if reference is None else Divergence.from_samples(columns[2], columns[3], columns[0], columns[1]),
        seconds=time.perf_counter() - started,
    )


def _score_rows(
    logits: Tensor, targets: Tensor, reference: Tensor | None, position: int, cut: TokenWindows
) -> Iterator[tuple[Tensor, ...]]:
    """Per slice of positions: (nll,) or (nll, reference nll, KL, same top token), each [rows] on the CPU."""
    for start in range(0, len(targets), ROWS):
        rows, wanted = slice(start, start + ROWS), targets[start : start + ROWS, None]
        log_p = torch.log_softmax(logits[rows].float(), dim=-1)
        nll = -log_p.gather(1, wanted)[:, 0]
        _check_finite(nll, position + start, cut, "the model")
        if reference is None:
            yield (nll.cpu(),)
            continue
        log_q = torch.log_softmax(reference[rows].to(logits.device).float(), dim=-1)
        reference_nll = -log_q.gather(1, wanted)[:, 0]
        _check_finite(reference_nll, position + start, cut, "the reference model")
        same_top = log_p.argmax(dim=-1) == log_q.argmax(dim=-1)
        q = log_q.exp()
        # Where the reference gives a token no probability, it adds nothing, even if the model gives it none either (0 * NaN).
        kl = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(dim=-1)
        yield nll.cpu(), reference_nll.cpu(), kl.cpu(), same_top.cpu()


def _check_finite(nll: Tensor, position: int, cut: TokenWindows, who: str) -> None:
    bad = (~torch.isfinite(nll)).nonzero()
    if len(bad):
        window, offset = divmod(position + int(bad[0]), cut.window - cut.first)
        raise ShapeError(
            f"{who} gives NaN or infinite log-probabilities, first at window {window}, token {cut.first + offset}; "
            "a perplexity of such logits means nothing: look for NaN weights or an overflow of fp16"
        )


def _scored_logits(model: nn.Module, ids: Tensor, first: int) -> Tensor:
    """The logits [B * scored, V] that predict ids[:, first:]."""
    logits = logits_of(model, ids)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ShapeError(f"{type(model).__name__} must give logits [{ids.shape[0]}, {ids.shape[1]}, vocabulary], found {found}")
    return logits[:, first - 1 : -1].reshape(-1, logits.shape[-1])


def _reference_logits(
    reference: nn.Module | ReferenceLogits | None, ids: Tensor, first: int, start: int, stop: int, logits: Tensor
) -> Tensor | None:
    if reference is None:
        return None
    if isinstance(reference, ReferenceLogits):
        other = reference.read(start, stop)
    else:
        other = _scored_logits(reference, ids, first)
    if other.shape != logits.shape:
        raise ShapeError(
            f"the reference model has {other.shape[1]} tokens in its vocabulary, the model {logits.shape[1]}: "
            "KL needs two models with one tokenizer"
        )
    return other


def _check_ids(cut: TokenWindows, vocabulary: int | None) -> None:
    """Ids outside the embedding are an IndexError on the CPU and a dead context on a GPU: look before running."""
    low, high = int(cut.tokens.min()), int(cut.tokens.max())
    if low < 0:
        raise ShapeError(f"token id {low} is negative")
    if vocabulary is not None and high >= vocabulary:
        raise ShapeError(
            f"token id {high} is outside the model's vocabulary of {vocabulary}: were the tokens made by its own tokenizer?"
        )


def _evaluating(reference: nn.Module | ReferenceLogits | None) -> AbstractContextManager[None]:
    return evaluating(reference) if isinstance(reference, nn.Module) else nullcontext()
