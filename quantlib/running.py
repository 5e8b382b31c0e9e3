"""Running somebody's model: where it lies, how it is called, and its modes and the process's memory as they were afterwards."""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def place_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor lies; the CPU for a model without any."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def call(model: nn.Module, ids: Tensor) -> Any:
    """The model's answer to ids [B, T], computed where it lies, without the cache that transformers' models would fill."""
    extra = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    return model(ids.to(place_of(model)), **extra)


def logits_of(model: nn.Module, ids: Tensor) -> Any:
    """The logits of the model's answer: its attribute of this name, or the answer itself."""
    output = call(model, ids)
    return getattr(output, "logits", output)


def vocabulary_of(model: nn.Module) -> int | None:
    """The number of rows of the input embedding, where the model names one."""
    get: Callable[[], object] | None = getattr(model, "get_input_embeddings", None)
    size = getattr(get(), "num_embeddings", None) if callable(get) else None
    return size if isinstance(size, int) else None


def structural_copy(model: Model) -> Model:
    """A copy whose modules are new and whose tensors are the model's own: patch replaces modules and changes no tensor."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, the modes of all modules as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def tracked(items: Sequence[Tensor], shown: bool, title: str) -> Iterator[Tensor]:
    """The items, behind a progress bar where someone watches: in a log it would only be noise."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield from items
        return
    yield from track(items, description=title, console=console, transient=True)


def return_freed_memory() -> None:
    """glibc keeps freed blocks below 32 MB for itself. After patching, those are most of a model; after a block is calibrated,
    all that its layers read."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
