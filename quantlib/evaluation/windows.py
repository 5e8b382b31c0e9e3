"""What is scored: protocols, the windows they cut a text into, and the text that is at hand without a network."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from quantlib.errors import QuantlibError, ShapeError

ProtocolName: TypeAlias = Literal["A", "B"]


@dataclass(frozen=True)
class Protocol:
    """How a perplexity is taken. Figures of two protocols (or of two windows of one protocol) can't be compared.

    window     tokens per window where the caller names none
    second_half    score only the second half of each window, every token of it having at least half a window of context
    """

    name: ProtocolName
    window: int
    second_half: bool
    summary: str

    def first_scored(self, window: int) -> int:
        """Index of the first token of a window whose prediction is scored; the last one scored is the window's last."""
        return window // 2 + 1 if self.second_half else 1


PROTOCOLS: dict[str, Protocol] = {
    "A": Protocol("A", 2048, False, "disjoint windows, every position scored (GPTQ, AWQ and most papers)"),
    "B": Protocol("B", 512, True, "disjoint windows, second half scored (llama.cpp's perplexity tool)"),
}


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Token ids cut into windows: the one input that an evaluation needs, and what makes two evaluations comparable.

    tokens   int64 [windows, window], on the CPU
    first    tokens[:, first:] are scored, each predicted from all tokens before it in its window
    """

    protocol: Protocol
    tokens: Tensor
    first: int

    @property
    def window(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def scored(self) -> int:
        """The number of tokens scored."""
        return int(self.tokens.shape[0]) * (self.window - self.first)

    @cached_property
    def digest(self) -> str:
        """16 hex digits that name the token ids and the positions scored."""
        facts = f"{self.window} {self.first} ".encode()
        return hashlib.sha256(facts + self.tokens.numpy().tobytes()).hexdigest()[:16]


def default_text(part: Literal["all", "evaluation", "calibration"] = "all") -> str:
    """Technical prose that every Python has: the topics of pydoc (465 KB), values sorted by key, joined by a blank line.

    part  "evaluation" is its first quarter, "calibration" the rest: no model should be scored on what it was calibrated on

    It differs a little between Python versions; figures of this project are of Python 3.11.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    text = "\n\n".join(topics[key] for key in sorted(topics))
    if part == "all":
        return text
    border = text.index("\n\n", len(text) // 4)
    return text[:border] if part == "evaluation" else text[border + 2 :]


def make_windows(
    data: str | Tensor | Sequence[int],
    tokenizer: Any = None,
    *,
    protocol: ProtocolName = "A",
    window: int | None = None,
    windows: int | None = None,
    bos: int | Literal["auto"] | None = "auto",
) -> TokenWindows:
    """Cut a text or its token ids into windows.

    data      a text (needs `tokenizer`, a transformers tokenizer, called without special tokens), or token ids [T] or [1, T]
    protocol  "A" or "B" (see PROTOCOLS); `window` tokens each (default: the protocol's); the first `windows` of them (default:
              all). A rest shorter than a window is dropped.
    bos       protocol B only: a token id that starts the stream and replaces the first token of every window, as llama.cpp does
              for models that ask for it; None: no such token; "auto": what the tokenizer itself puts before a text.

    Raises QuantlibError for an unknown protocol, a text without tokenizer, or fewer tokens than one window; ShapeError for ids
    that aren't a row of integers.
    """
    if protocol not in PROTOCOLS:
        known = "; ".join(f"{name}: {entry.summary}" for name, entry in PROTOCOLS.items())
        raise QuantlibError(f"unknown protocol {protocol!r}; known are {known}")
    rules = PROTOCOLS[protocol]
    length = rules.window if window is None else window
    if length < 4:
        raise QuantlibError(f"window={length} is too short: a window needs at least 4 tokens")
    if windows is not None and windows < 1:
        raise QuantlibError(f"windows={windows}: at least one window must be scored")
    ids = _token_ids(data, tokenizer)
    start = _bos(tokenizer, bos) if rules.second_half else None
    if start is not None and isinstance(data, str):
        ids = torch.cat([torch.tensor([start]), ids])
    count = len(ids) // length if windows is None else windows
    if count == 0 or len(ids) < count * length:
        raise QuantlibError(
            f"{len(ids)} tokens are too few: {max(count, 1)} windows of {length} need {max(count, 1) * length}; "
            "give more text, fewer windows or a shorter window"
        )
    cut = ids[: count * length].view(count, length).clone()
    if start is not None:
        cut[:, 0] = start
    return TokenWindows(rules, cut, rules.first_scored(length))


def _token_ids(data: str | Tensor | Sequence[int], tokenizer: Any) -> Tensor:
    if isinstance(data, str):
        if tokenizer is None:
            raise QuantlibError("a text can't be evaluated without its model's tokenizer: pass tokenizer=, or token ids")
        data = tokenizer(data, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.as_tensor(data).cpu()
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ShapeError(f"token ids are integers [T] or [1, T], found {ids.dtype} {list(ids.shape)}")
    return ids.to(torch.int64)


def _bos(tokenizer: Any, bos: int | Literal["auto"] | None) -> int | None:
    if bos != "auto":
        return bos
    token = None if tokenizer is None else getattr(tokenizer, "bos_token_id", None)
    return token if token is not None and tokenizer("a")["input_ids"][:1] == [token] else None
