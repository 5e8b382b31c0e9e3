"""A whole model on a CPU: greedy tokens and a prompt, by quantlib, by torch alone and by llama.cpp, in turns within one process.

The model is that of `quantlib demo`. llama.cpp reads the same weights from a GGUF file written here; its logits are compared with
HuggingFace's first, so that nothing is timed that computes something else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor

import quantlib
from bench import llama_cpp
from bench.gguf_export import read_nbytes, read_types, write_gguf
from quantlib.cli.demo import structural_copy
from quantlib.testing import relative_error

PROMPT_TOKENS, NEW_TOKENS, PREFILL_TOKENS = 16, 128, 600
EXPORT_LIMIT = 1e-3
"""Relative error of llama.cpp's logits, from fp32 weights, to HuggingFace's: its attention keeps keys and values in fp16."""


@dataclass(frozen=True)
class Variant:
    """How quantlib or torch runs the model: `spec` of the layers and of the output head (None: as it is), dtype of x."""

    spec: str | None
    head: str | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]
        if self.spec is None:
            return f"torch {dtype}"
        return f"quantlib {self.spec}, x {dtype}, head {self.head or dtype}"


VARIANTS = (
    Variant(None),
    Variant(None, dtype=torch.float32),
    *(Variant(spec, "int8-channel") for spec in ("int4-g32", "int4-g32-asym", "int4-g128", "nvfp4", "q4_k", "int8-channel")),
    Variant("int4-g32"),
    Variant("int4-g32", "int8-channel", torch.float32),
)


class Speaker(Protocol):
    """A model that is ready: both calls are greedy, of batch 1, and begin with an empty cache. `nbytes` of all weights."""

    nbytes: int

    def generate(self, ids: Tensor, new_tokens: int) -> list[int]: ...

    def prefill(self, ids: Tensor) -> Tensor: ...


def generate(model: Any, ids: Tensor, new_tokens: int) -> list[int]:
    """quantlib's path, and torch's: the `new_tokens` likeliest tokens after a prompt [length], whatever would end it."""
    found = model.generate(ids[None], min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
    tokens: list[int] = found[0, len(ids) :].tolist()
    return tokens


@dataclass(frozen=True)
class TorchSpeaker:
    """A HuggingFace model, patched or not."""

    model: Any
    nbytes: int

    def generate(self, ids: Tensor, new_tokens: int) -> list[int]:
        return generate(self.model, ids, new_tokens)

    def prefill(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids[None], logits_to_keep=1).logits[0, -1]
        return logits


def prepare(model: Any, variant: Variant) -> TorchSpeaker:
    """The variant of an fp32 model, which is left as it is."""
    own = structural_copy(model)
    if variant.dtype is not torch.float32:
        own = own.to(variant.dtype)
    if variant.spec is not None:
        spec = {"lm_head": variant.head, "*": variant.spec}
        quantlib.patch(own, spec, skip=(), progress=False)
    tensors = {id(tensor): tensor for tensor in (*own.parameters(), *own.buffers())}
    return TorchSpeaker(own, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))


class LlamaSpeaker(llama_cpp.LlamaCppModel):
    """The model in one of llama.cpp's types. `types` counts its matrices by type."""

    def __init__(self, path: Path, threads: int, context: int = PREFILL_TOKENS + NEW_TOKENS) -> None:
        super().__init__(path, threads, context)
        self.nbytes, self.types = read_nbytes(path), read_types(path)


def check_export(model: Any, path: Path, ids: Tensor, threads: int) -> float:
    """The relative error of llama.cpp's logits after `ids`, from the exported fp32 file, to HuggingFace's.

    Raises LlamaCppError where it is large: then the file is not the model.
    """
    exported = LlamaSpeaker(path, threads)
    try:
        error = relative_error(exported.prefill(ids), TorchSpeaker(model, 0).prefill(ids))
    finally:
        exported.close()
    if not error <= EXPORT_LIMIT:
        raise llama_cpp.LlamaCppError(f"the exported model's logits differ from HuggingFace's by {error:.3g} ({EXPORT_LIMIT:.3g} allowed)")
    return error


@contextmanager
def llama_speakers(model: Any, kinds: Sequence[str], ids: Tensor, say: Callable[[str], None]) -> Iterator[dict[str, LlamaSpeaker]]:
    """Kind -> the model in llama.cpp's type of that name, from files in a temporary directory. Raises LlamaCppError."""
    threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        source = Path(folder) / "fp32.gguf"
        write_gguf(model, source)
        say(f"llama.cpp's logits agree with HuggingFace's: relative error {check_export(model, source, ids, threads):.1e}")
        found = {}
        for kind in kinds:
            target = Path(folder) / f"{kind}.gguf"
            llama_cpp.quantize_file(source, target, kind, threads)
            found[kind] = LlamaSpeaker(target, threads)
            say(f"llama.cpp {kind}: matrices by type: {found[kind].types}")
        try:
            yield found
        finally:
            for speaker in found.values():
                speaker.close()
