"""ggml's mul_mat, the product inside llama.cpp, on weights that its own code quantizes and, where it would, repacks.

A graph of one product, through the library that llama-cpp-python brings. llama.cpp's activations are fp32; mul_mat rounds them
to 8 bits for itself, within the call that is timed.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bench import llama_cpp
from bench.contestants import Prepared
from bench.data import Material
from bench.peers.base import Peer
from bench.protocol import Case

F32 = 0
CPU_DEVICE = 0
TYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 8, "q4_k": 12, "mxfp4": 39, "nvfp4": 40}
"""ggml's name of a type -> its number."""
BLOCKS = {"q4_k": 256, "nvfp4": 64}
"""Columns of a block, where it has more than 32."""
MOST_GRAPHS = 8


@lru_cache(maxsize=1)
def library() -> Any:
    """ggml's functions, their results typed. Raises ImportError where llama-cpp-python is missing."""
    llama_cpp.library()
    libggml = import_module("llama_cpp._ggml").libggml
    # libggml links the backend's library; asking for the backend's symbols through it finds them.
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    types: dict[str, tuple[Any, list[Any]]] = {
        "ggml_init": (pointer, [InitParams]),
        "ggml_free": (None, [pointer]),
        "ggml_new_tensor_2d": (pointer, [pointer, ctypes.c_int, number, number]),
        "ggml_mul_mat": (pointer, [pointer, pointer, pointer]),
        "ggml_new_graph": (pointer, [pointer]),
        "ggml_build_forward_expand": (None, [pointer, pointer]),
        "ggml_row_size": (size, [ctypes.c_int, number]),
        "ggml_quantize_chunk": (size, [ctypes.c_int, pointer, pointer, number, number, number, pointer]),
        "ggml_get_data": (pointer, [pointer]),
        "ggml_backend_alloc_ctx_tensors_from_buft": (pointer, [pointer, pointer]),
        "ggml_backend_buffer_free": (None, [pointer]),
        "ggml_backend_buft_name": (ctypes.c_char_p, [pointer]),
        "ggml_backend_tensor_set": (None, [pointer, pointer, size, size]),
        "ggml_backend_dev_by_type": (pointer, [ctypes.c_int]),
        "ggml_backend_dev_backend_reg": (pointer, [pointer]),
        "ggml_backend_dev_buffer_type": (pointer, [pointer]),
        "ggml_backend_dev_init": (pointer, [pointer, pointer]),
        "ggml_backend_dev_supports_op": (ctypes.c_bool, [pointer, pointer]),
        "ggml_backend_reg_get_proc_address": (pointer, [pointer, ctypes.c_char_p]),
        "ggml_backend_graph_compute": (ctypes.c_int, [pointer, pointer]),
    }
    for name, (result, arguments) in types.items():
        function = getattr(libggml, name)
        function.restype, function.argtypes = result, arguments
    return libggml


class InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@lru_cache(maxsize=1)
def backend() -> tuple[Any, Any]:
    """(the CPU's device, a backend on it)."""
    device = library().ggml_backend_dev_by_type(CPU_DEVICE)
    return device, library().ggml_backend_dev_init(device, None)


def _procedure(name: bytes, result: Any, *arguments: Any) -> Any:
    """A function that the CPU's backend offers by name."""
    device, _ = backend()
    address = library().ggml_backend_reg_get_proc_address(library().ggml_backend_dev_backend_reg(device), name)
    return ctypes.CFUNCTYPE(result, *arguments)(address)


def buffer_types() -> list[Any]:
    """Where weights may lie, in the order of llama.cpp's preference: rearranged for this CPU, then as they are."""
    device, _ = backend()
    listed = _procedure(b"ggml_backend_dev_get_extra_bufts", ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(device)
    found = []
    place = 0
    while listed and listed[place]:
        found.append(listed[place])
        place += 1
    return [*found, library().ggml_backend_dev_buffer_type(device)]


def _context(tensors: int) -> Any:
    """A context for that many tensors and one graph; their data lie elsewhere."""
    return library().ggml_init(InitParams(tensors * 512 + (1 << 20), None, True))


@dataclass
class GgmlWeight:
    """W [n, k] in a type of ggml's, placed as llama.cpp would; graphs per M are made when first asked for, and kept."""

    data: Tensor
    kind: str
    n: int
    k: int
    layout: str = ""
    _graphs: dict[int, tuple[Any, int, int]] = field(default_factory=dict)
    _held: list[tuple[Any, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        lib = library()
        for buffer_type in buffer_types():
            context = _context(1)
            weight = lib.ggml_new_tensor_2d(context, TYPES[self.kind], self.k, self.n)
            buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
            if buffer and self._suits(weight):
                lib.ggml_backend_tensor_set(weight, self.data.data_ptr(), 0, self.data.nbytes)
                self._held.append((context, buffer))
                self._weight, self.layout = weight, lib.ggml_backend_buft_name(buffer_type).decode()
                return
            if buffer:
                lib.ggml_backend_buffer_free(buffer)
            lib.ggml_free(context)
        raise RuntimeError(f"ggml has no product for {self.kind} [{self.n}, {self.k}]")

    def _suits(self, weight: Any) -> bool:
        """Whether the backend multiplies a weight that lies where this one does."""
        lib, context = library(), _context(3)
        product = lib.ggml_mul_mat(context, weight, lib.ggml_new_tensor_2d(context, F32, self.k, 1))
        found = bool(lib.ggml_backend_dev_supports_op(backend()[0], product))
        lib.ggml_free(context)
        return found

    def _graph(self, m: int) -> tuple[Any, int, int]:
        """(graph, address of x, address of y) for m rows."""
        if m not in self._graphs:
            lib, context = library(), _context(8)
            x = lib.ggml_new_tensor_2d(context, F32, self.k, m)
            y = lib.ggml_mul_mat(context, self._weight, x)
            graph = lib.ggml_new_graph(context)
            lib.ggml_build_forward_expand(graph, y)
            self._held.append((context, lib.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_types()[-1])))
            self._graphs[m] = graph, lib.ggml_get_data(x), lib.ggml_get_data(y)
        return self._graphs[m]

    def product(self, x: Tensor, threads: int) -> Tensor:
        """x [M, k] -> fp32 [M, n], in memory that the next product of as many rows writes again. Copying x in is part of it."""
        x = x.float().contiguous()
        graph, source, target = self._graph(x.shape[0])
        ctypes.memmove(source, x.data_ptr(), x.nbytes)
        _set_threads()(backend()[1], threads)
        if llama_cpp.in_own_thread(library().ggml_backend_graph_compute, backend()[1], graph):
            raise RuntimeError("ggml could not compute the product")
        numbers = (ctypes.c_float * (x.shape[0] * self.n)).from_address(target)
        return torch.frombuffer(numbers, dtype=torch.float32).view(x.shape[0], self.n)

    def copy(self) -> GgmlWeight:
        """The same weight in other memory."""
        return GgmlWeight(self.data, self.kind, self.n, self.k)

    def close(self) -> None:
        for context, buffer in self._held:
            library().ggml_backend_buffer_free(buffer)
            library().ggml_free(context)
        self._held, self._graphs = [], {}

    def __del__(self) -> None:
        self.close()


@lru_cache(maxsize=1)
def _set_threads() -> Any:
    return _procedure(b"ggml_backend_set_n_threads", None, ctypes.c_void_p, ctypes.c_int)


def quantize(weight: Tensor, kind: str) -> Tensor:
    """fp32 [N, K], contiguous -> uint8 [N, bytes of a row], by ggml's own rounding."""
    lib, (n, k) = library(), weight.shape
    out = torch.empty(n, lib.ggml_row_size(TYPES[kind], k), dtype=torch.uint8)
    lib.ggml_quantize_chunk(TYPES[kind], weight.data_ptr(), out.data_ptr(), 0, n, k, None)
    return out


def dequantize(data: Tensor, kind: str) -> Tensor:
    """fp32 [N, K] of the bytes of `quantize`, by the gguf package."""
    import gguf
    from gguf.quants import dequantize as decode

    return torch.from_numpy(decode(data.numpy(), gguf.GGMLQuantizationType[kind.upper()]))


class Ggml(Peer):
    """One type of ggml's. `kind` names it."""

    distribution, module, tried = llama_cpp.DISTRIBUTION, "llama_cpp", llama_cpp.TRIED
    formats = {}  # noqa: RUF012
    needs_cuda = False
    limit = 0.05

    def __init__(self, kind: str) -> None:
        self.kind = kind

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"ggml {self.kind}"

    def absent(self) -> str | None:
        return llama_cpp.absent()

    def shape_refusal(self, case: Case) -> str | None:
        block = BLOCKS.get(self.kind, 32)
        return f"needs K a multiple of {block}" if case.k % block else None

    def prepare(self, material: Material) -> Prepared:
        wide = material.weight.float().contiguous()
        data = quantize(wide, self.kind)

        def call(state: GgmlWeight, x: Tensor) -> Tensor:
            return state.product(x, torch.get_num_threads())

        weight = GgmlWeight(data, self.kind, *wide.shape)
        return Prepared(weight, call, data.nbytes, dequantize(data, self.kind), GgmlWeight.copy)
