"""A whole model on a CPU: greedy tokens and a prompt, by quantlib, by torch alone and by llama.cpp, in turns in one process.

The model is that of `quantlib demo`. llama.cpp reads the same weights from a GGUF file written here; its logits are compared
with HuggingFace's first, so that nothing is timed that computes something else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor

import quantlib
from bench import llama_cpp
from bench.cpu_layers import IN_INT8
from bench.gguf_export import read_nbytes, read_types, write_gguf
from quantlib.integrations.decoding import Decoder
from quantlib.running import structural_copy
from quantlib.testing import relative_error
from quantlib.timing import NoTiming, Timing, in_turns

PROMPT_TOKENS, NEW_TOKENS, PREFILL_TOKENS = 16, 128, 600
EXPORT_LIMIT = 1e-3
"""Relative error of llama.cpp's logits, from fp32 weights, to HuggingFace's: its attention keeps keys and values in fp16."""


@dataclass(frozen=True)
class Variant:
    """How quantlib or torch runs the model.

    spec, head   of the layers and of the output head; None: as they are
    dtype        of everything that is not quantized
    decoder      whether tokens come from quantlib's Decoder; otherwise from transformers' generate
    activations  what x is rounded to before quantized layers
    """

    spec: str | None
    head: str | None = None
    dtype: torch.dtype = torch.bfloat16
    decoder: bool = False
    activations: str | None = None

    @property
    def name(self) -> str:
        dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]
        if self.spec is None:
            return f"torch {dtype}"
        path = "" if self.decoder else ", transformers' generate"
        rounded = "" if self.activations is None else f" in {self.activations}"
        return f"quantlib {self.spec}, x {dtype}{rounded}, head {self.head or dtype}{path}"


HEAD = "int8-channel"
SPECS = ("int4-g32", "int4-g32-asym", "int4-g128", "nvfp4", "q4_k", "int8-channel")
VARIANTS = (
    Variant(None),
    Variant(None, dtype=torch.float32),
    *(Variant(spec, HEAD, decoder=True) for spec in SPECS),
    *(Variant(spec, HEAD, decoder=True, activations="int8") for spec in IN_INT8),
    Variant("int4-g32", decoder=True),
    Variant("int4-g32", HEAD, torch.float32, decoder=True),
    Variant("int4-g32", HEAD),
)
"""llama.cpp quantizes the output head too, to 8 bits, as most of these do, and rounds x to 8 bits, as those of IN_INT8 do."""
KINDS = ("q4_0", "q4_1", "q4_k", "q8_0")
LLAMA = "llama.cpp "
"""What the names of llama.cpp's entries begin with."""


class Speaker(Protocol):
    """A model that is ready: both calls are greedy, of batch 1, and begin with an empty cache.

    nbytes    of all weights
    matrices  how many of each type, in words
    """

    @property
    def nbytes(self) -> int: ...

    @property
    def matrices(self) -> str: ...

    def generate(self, ids: Tensor, new_tokens: int) -> list[int]:
        """The `new_tokens` likeliest tokens, one after the other, after a prompt [length]."""
        ...

    def prefill(self, ids: Tensor) -> Tensor:
        """The logits [vocabulary] after a prompt [length]."""
        ...


@dataclass(frozen=True)
class TorchSpeaker:
    """A HuggingFace model, patched or not, through transformers."""

    model: Any
    nbytes: int = 0
    matrices: str = ""

    def generate(self, ids: Tensor, new_tokens: int) -> list[int]:
        found = self.model.generate(ids[None], max_new_tokens=new_tokens, do_sample=False)
        tokens: list[int] = found[0, len(ids) :].tolist()
        return tokens

    def prefill(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids[None], logits_to_keep=1).logits[0, -1]
        return logits


class DecoderSpeaker(TorchSpeaker):
    """A patched model through quantlib's own way of generating."""

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.model, max_length=2 * (PREFILL_TOKENS + NEW_TOKENS))

    def generate(self, ids: Tensor, new_tokens: int) -> list[int]:
        tokens: list[int] = self._decoder.generate(ids, new_tokens)[0, len(ids) :].tolist()
        return tokens

    def prefill(self, ids: Tensor) -> Tensor:
        self._decoder.reset()
        return self._decoder.prefill(ids)


def prepare(model: Any, variant: Variant) -> TorchSpeaker:
    """The variant of an fp32 model, which is left as it is."""
    # Converting a dtype changes parameters in place; only replacing modules may share them.
    own = structural_copy(model) if variant.dtype is torch.float32 else deepcopy(model).to(variant.dtype)
    if variant.spec is not None:
        quantlib.patch(
            own, {"lm_head": variant.head, "*": variant.spec}, skip=(), activations=variant.activations, progress=False
        )
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in (*own.parameters(), *own.buffers()))
    kind = DecoderSpeaker if variant.decoder else TorchSpeaker
    return kind(own, nbytes, variant.spec or "")


class LlamaSpeaker(llama_cpp.LlamaCppModel):
    """A GGUF file in llama.cpp."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        super().__init__(path, threads, context)
        self.nbytes = read_nbytes(path)
        self.matrices = ", ".join(f"{count} {kind}" for kind, count in read_types(path).items())


def check_export(model: Any, path: Path, ids: Tensor, threads: int) -> float:
    """The relative error of llama.cpp's logits after `ids`, from the exported fp32 file, to HuggingFace's.

    Raises LlamaCppError where it is large: then the file is not the model.
    """
    exported = LlamaSpeaker(path, threads, len(ids))
    try:
        error = relative_error(exported.prefill(ids), TorchSpeaker(model).prefill(ids))
    finally:
        exported.close()
    if not error <= EXPORT_LIMIT:
        raise llama_cpp.LlamaCppError(f"the export's logits differ from HuggingFace's by {error:.3g}, above {EXPORT_LIMIT:.3g}")
    return error


@contextmanager
def llama_speakers(
    model: Any, kinds: Sequence[str], ids: Tensor, context: int, say: Callable[[str], None] = print
) -> Iterator[dict[str, LlamaSpeaker]]:
    """Name -> an fp32 model in each of llama.cpp's types, in files of a temporary directory. Raises LlamaCppError."""
    threads = torch.get_num_threads()
    found: dict[str, LlamaSpeaker] = {}
    with TemporaryDirectory() as folder:
        source = Path(folder) / "fp32.gguf"
        write_gguf(model, source)
        error = check_export(model, source, ids, threads)
        say(f"the GGUF export is the model: llama.cpp's logits differ from HuggingFace's by {error:.1e}")
        try:
            for kind in kinds:
                target = Path(folder) / f"{kind}.gguf"
                llama_cpp.quantize_file(source, target, kind, threads)
                found[LLAMA + kind] = speaker = LlamaSpeaker(target, threads, context)
                say(f"{LLAMA}{kind}: {speaker.matrices}")
            yield found
        finally:
            for speaker in found.values():
                speaker.close()


@dataclass(frozen=True)
class Spoken:
    """One speaker's microseconds per token; `error`: of its logits after the long prompt, to those of the fp32 model."""

    name: str
    operation: str
    tokens: int
    timing: Timing | NoTiming
    nbytes: int | None = None
    matrices: str = ""
    error: float | None = None


@dataclass(frozen=True)
class Conversation:
    """What is asked: a short prompt [length] and how many tokens follow, a long prompt, and how often."""

    prompt: Tensor
    new_tokens: int
    long_prompt: Tensor
    rounds: int

    @classmethod
    def random(cls, vocabulary: int, prompt: int, new_tokens: int, long_prompt: int, rounds: int) -> Conversation:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (prompt + long_prompt,), generator=generator)
        return cls(ids[:prompt], new_tokens, ids[prompt:], rounds)

    def hold(
        self, speakers: Mapping[str, Speaker], original: Tensor, read: Callable[[], Any]
    ) -> tuple[list[Spoken], list[Timing]]:
        """Everyone in turns, first generating, then reading the long prompt; and the microseconds that `read` took among them.

        original: the fp32 model's logits [vocabulary] after the long prompt.
        """
        found: list[Spoken] = []
        reads: list[Timing] = []
        logits = {name: speaker.prefill(self.long_prompt).float() for name, speaker in speakers.items()}
        errors = {name: relative_error(own, original) for name, own in logits.items()}
        for operation in ("generate", "prefill"):
            rounds = {name: self._sample(operation, speaker) for name, speaker in speakers.items()}
            timings = in_turns({"read": _sample_of(read), **rounds}, self.rounds, "wall")
            own = timings.pop("read")
            if isinstance(own, Timing):
                reads.append(own)
            tokens = self.new_tokens if operation == "generate" else len(self.long_prompt)
            for name, timing in timings.items():
                speaker = speakers[name]
                found.append(Spoken(name, operation, tokens, timing, speaker.nbytes, speaker.matrices, errors[name]))
        return found, reads

    def _sample(self, operation: str, speaker: Speaker) -> Callable[[], float]:
        """Microseconds per token, after a little of the same that is not counted."""

        def generate() -> float:
            speaker.generate(self.prompt, 2)
            begin = time.perf_counter_ns()
            speaker.generate(self.prompt, self.new_tokens)
            return (time.perf_counter_ns() - begin) / 1e3 / self.new_tokens

        def prefill() -> float:
            speaker.prefill(self.prompt)
            begin = time.perf_counter_ns()
            speaker.prefill(self.long_prompt)
            return (time.perf_counter_ns() - begin) / 1e3 / len(self.long_prompt)

        return generate if operation == "generate" else prefill


def _sample_of(call: Callable[[], Any]) -> Callable[[], float]:
    def sample() -> float:
        begin = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - begin) / 1e3

    return sample
