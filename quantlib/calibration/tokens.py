"""Sample text as token windows [samples, length]: from texts, token ids, a data set by name, or text that every Python has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from quantlib.errors import QuantlibError, ShapeError
from quantlib.evaluation.windows import default_text

DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "c4": ("allenai/c4", "en", "train", "text"),
}
"""Names that the `datasets` library resolves: repository, configuration, split, column."""

TEXTS = 4096
"""Texts of a named data set that are read, at most."""


def calibration_tokens(
    data: str | Sequence[str] | Tensor | None = None,
    tokenizer: Any = None,
    *,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
) -> Tensor:
    """Token windows for calibration: int64 [samples, length], drawn at random starts, the same for the same seed.

    data       None: the part of pydoc's topics that `quantlib demo` does not evaluate on (technical English, no network); one
               text or several; "wikitext2", "c4" or "REPOSITORY:CONFIG:SPLIT:COLUMN", read by the library `datasets`; or token
               ids [T]
    tokenizer  the model's own, called without special tokens; several texts are joined by its end-of-text token

    Never calibrate on what is evaluated: it flatters. Raises QuantlibError for data that is empty or shorter than one window, a
    text without a tokenizer, an unknown data set; ShapeError for ids that are no row of integers.
    """
    if samples < 1 or length < 2:
        raise QuantlibError(f"samples={samples}, length={length}: calibration needs a sample, and two tokens in each")
    ids = data if isinstance(data, Tensor) else _tokenize(_texts(data), tokenizer)
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ShapeError(f"calibration token ids are integers [T], found {ids.dtype} {list(ids.shape)}")
    if len(ids) < length:
        raise QuantlibError(
            f"calibration data has {len(ids)} tokens, less than one sample of {length}: give more text, or a smaller length"
        )
    starts = torch.randint(len(ids) - length + 1, (samples,), generator=torch.Generator().manual_seed(seed))
    return ids.cpu().to(torch.int64)[starts[:, None] + torch.arange(length)]


def _texts(data: str | Sequence[str] | None) -> Iterable[str]:
    if data is None:
        return [default_text("calibration")]
    if not isinstance(data, str):
        return data
    if data in DATASETS:
        return _read_dataset(*DATASETS[data])
    if data.count(":") == 3 and not any(character.isspace() for character in data):
        repository, config, split, column = data.split(":")
        return _read_dataset(repository, config, split, column)
    return [data]


def _read_dataset(repository: str, config: str, split: str, column: str) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise QuantlibError("calibration data by name needs `pip install datasets`; or pass a text") from error
    try:
        rows = datasets.load_dataset(repository, config or None, split=split, streaming=True)
        return [str(row[column]) for row in islice(rows, TEXTS)]
    except Exception as error:  # the library's errors have no common class: network, cache, names, columns
        raise QuantlibError(
            f"the data set {repository} ({config}, {split}, column {column}) can't be read: {type(error).__name__}: {error}"
        ) from error


def _tokenize(texts: Iterable[str], tokenizer: Any) -> Tensor:
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise QuantlibError("calibration data holds no text")
    if tokenizer is None:
        raise QuantlibError("a text can't calibrate without its model's tokenizer: pass tokenizer=, or token ids")
    end = getattr(tokenizer, "eos_token_id", None)
    ids: list[int] = []
    for number, text in enumerate(texts):
        if number and end is not None:
            ids.append(end)
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
