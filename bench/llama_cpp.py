"""llama.cpp as a peer on whole models: files quantized by its own code, prompts and tokens by its own decoder.

Through llama-cpp-python's thin bindings: no tokenizer, no sampler, the largest logit is taken here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy
import torch
from torch import Tensor

from bench.environment import version

DISTRIBUTION, TRIED = "llama-cpp-python", "0.3.36"
INSTALL = f'CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=OFF" pip install {DISTRIBUTION}=={TRIED}'
P = ParamSpec("P")
R = TypeVar("R")
FILE_TYPES = {"q4_0": 2, "q4_1": 3, "q4_k": 14, "q8_0": 7}
"""Type of most matrices -> llama.cpp's number for such files (q4_k: Q4_K_S)."""


class LlamaCppError(Exception):
    """llama.cpp refused; its own log says why."""


_own_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llama.cpp")


def in_own_thread(function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
    """What a function that computes returns. llama.cpp shapes a thread's tile registers (AMX) once and for all; torch and
    quantlib give theirs back after every product, and its next one on that thread would be an illegal instruction."""
    return _own_thread.submit(function, *arguments, **options).result()


def absent() -> str | None:
    """None where llama.cpp can be used; otherwise the reason, and what to do."""
    try:
        library()
    except ModuleNotFoundError:
        return f"not installed: {INSTALL}"
    except Exception as error:
        return f"{DISTRIBUTION} can't be loaded ({error}): {INSTALL}"
    return None


def installed() -> str:
    """The version of the bindings."""
    return version(DISTRIBUTION) or "unknown"


@lru_cache(maxsize=1)
def library() -> Any:
    """The bindings, initialized and silent. Raises ImportError where they are missing."""
    bindings = import_module("llama_cpp.llama_cpp")
    bindings.llama_log_set(_silence(bindings), ctypes.c_void_p(0))
    bindings.llama_backend_init()
    return bindings


@lru_cache(maxsize=1)
def _silence(bindings: Any) -> Any:
    """A log that drops what it is told; kept, because the library keeps its address."""
    return bindings.llama_log_callback(lambda level, text, data: None)


def system_info() -> str:
    """The instruction sets that the library was compiled for, in its own words."""
    return str(library().llama_print_system_info().decode())


def quantize_file(source: Path, target: Path, kind: str, threads: int) -> None:
    """Write `source`, of fp32 weights, with most matrices in `kind`; what doesn't fit falls back as llama.cpp decides."""
    bindings = library()
    parameters = bindings.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = FILE_TYPES[kind], threads
    if bindings.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)):
        raise LlamaCppError(f"llama.cpp could not quantize {source.name} to {kind}")


class LlamaCppModel:
    """A GGUF file, loaded, with a context of `context` tokens. `close` frees it."""

    def __init__(self, path: Path, threads: int, context: int = 1024) -> None:
        self._bindings = bindings = library()
        parameters = bindings.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = bindings.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise LlamaCppError(f"llama.cpp could not load {path.name}")
        settings = bindings.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = threads
        self._context = bindings.llama_init_from_model(self._model, settings)
        if not self._context:
            raise LlamaCppError(f"llama.cpp could not make a context of {context} tokens for {path.name}")
        vocabulary = bindings.llama_model_get_vocab(self._model)
        self.vocabulary_size = int(bindings.llama_vocab_n_tokens(vocabulary))

    def forget(self) -> None:
        """Begin again at the first position."""
        self._bindings.llama_memory_clear(self._bindings.llama_get_memory(self._context), False)

    def logits(self, tokens: Sequence[int]) -> Any:
        """Append tokens; the last one's logits, numpy fp32 [vocabulary], valid until the next call."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if self._bindings.llama_decode(self._context, self._bindings.llama_batch_get_one(array, len(tokens))):
            raise LlamaCppError(f"llama.cpp could not decode {len(tokens)} tokens")
        pointer = self._bindings.llama_get_logits_ith(self._context, -1)
        return numpy.ctypeslib.as_array(pointer, shape=(self.vocabulary_size,))

    def prefill(self, ids: Tensor) -> Tensor:
        """The logits [vocabulary] after a prompt of tokens [length]."""
        self.forget()
        return torch.from_numpy(in_own_thread(self.logits, ids.tolist()).copy())

    def generate(self, ids: Tensor, new_tokens: int) -> list[int]:
        """The `new_tokens` likeliest tokens, one after the other, after a prompt [length]."""
        self.forget()
        return in_own_thread(self._generate, ids, new_tokens)

    def _generate(self, ids: Tensor, new_tokens: int) -> list[int]:
        found = [int(self.logits(ids.tolist()).argmax())]
        while len(found) < new_tokens:
            found.append(int(self.logits(found[-1:]).argmax()))
        return found

    def close(self) -> None:
        self._bindings.llama_free(self._context)
        self._bindings.llama_model_free(self._model)
