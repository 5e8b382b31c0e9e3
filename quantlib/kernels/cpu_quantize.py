"""Quantizing on the CPU in C++ (csrc/cpu/{extremes,encode,search}.h): what quantlib.formats asks for weights on the CPU.

It takes fp32, bf16 and fp16 weights with contiguous columns and finite values, integer codes, code books of up to 16 values and
small floats; sums (searches, several divisors) also need blocks of one row and of a power of two of columns. To anything else
it answers None, and torch goes on with the same result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quantlib.formats.acceleration import register_accelerator
from quantlib.formats.base import Format
from quantlib.formats.codecs import E4M3, E5M2, Affine, Minifloat, Table, sorted_midpoints
from quantlib.formats.effective import Effective
from quantlib.formats.packing import packed_width
from quantlib.formats.scales import DoubleQuantScale, E4M3GlobalScale, E8M0Scale, FloatScale, Parts, SuperScale
from quantlib.formats.search import Moments, Search
from quantlib.kernels.cpu import DTYPES, _cpu, unavailable

LANE_COLUMNS = 1 << 14
"""Blocks of more columns would fill the second-level cache with sixteen of them."""


def _scale_words(fmt: Format) -> tuple[str, str] | None:
    """How a solved scale is rounded, in the extension's words: kind and dtype."""
    scale = fmt.scale
    if type(scale) is FloatScale:
        return ("float", DTYPES[scale.dtype]) if scale.dtype in DTYPES else None
    if type(scale) is E4M3GlobalScale or type(scale) is E8M0Scale:
        return scale.kind, "float32"
    return ("exact", "float32") if type(scale) in (DoubleQuantScale, SuperScale) else None


def _set_codec(native: Any, fmt: Format) -> bool:
    """Tell the extension how codes are chosen; False: it can't choose such codes."""
    codec = fmt.codec
    if type(codec) is Affine:
        native.affine(codec.offset)
    elif type(codec) is Table and len(codec.entries) <= 16:
        order, midpoints = sorted_midpoints(codec.entries)
        ranked = [codec.entries[code] for code in order]
        spare = 16 - len(order)
        native.table(
            bounds=[*midpoints, *[math.inf] * (spare + 1)],
            ranked=ranked + ranked[-1:] * spare,
            order=[*order, *order[-1:] * spare],
        )
    elif type(codec) is Minifloat and codec.exponent_bits > 1 and codec.mantissa_bits > 0:
        native.minifloat(
            mantissa_bits=codec.mantissa_bits,
            smallest=2.0 ** (1 - codec.bias),
            largest=codec.divisor,
            signed_zero=codec in (E4M3, E5M2),
        )
    else:
        return False
    return True


@lru_cache(maxsize=1024)
def coding_of(fmt: Format, k: int) -> Any | None:
    """The extension's description of a weight of k columns, or None where it can't choose such codes."""
    cols, words = fmt.block.cols, _scale_words(fmt)
    if (cols or 0) % 8 or words is None:
        return None
    native = _cpu.Coding(
        k=k,
        padded_k=fmt.padded(k),
        bits=fmt.codec.bits,
        block_rows=fmt.block.rows or 0,
        block_cols=cols or 0,
        blocks_across=fmt.grid(1, k)[1],
        reciprocal=fmt.reciprocal,
        has_zero=fmt.zero == "integer",
        has_minimum=fmt.zero == "minimum",
        scale=words[0],
        scale_dtype=words[1],
    )
    return native if _set_codec(native, fmt) else None


@lru_cache(maxsize=256)
def _rows_coding(k: int) -> Any:
    """A description whose blocks are whole rows, for extremes alone."""
    return _cpu.Coding(
        k=k,
        padded_k=k,
        bits=8,
        block_rows=1,
        block_cols=0,
        blocks_across=1,
        reciprocal=False,
        has_zero=False,
        has_minimum=False,
        scale="float",
        scale_dtype="float32",
    )


def _readable(weight: Tensor) -> bool:
    """Whether the extension can read a tensor's memory: plain, of a dtype that it knows, columns side by side."""
    plain = type(weight) in (Tensor, torch.nn.Parameter) and weight.layout is torch.strided and weight.dim() == 2
    return plain and weight.dtype in DTYPES and weight.numel() > 0 and (weight.stride(1) == 1 or weight.shape[1] == 1)


def _native(weight: Tensor) -> Any:
    return _cpu.Weight(weight.data_ptr(), DTYPES[weight.dtype], weight.shape[0], weight.stride(0))


def _row_extremes(coding: Any, weight: Tensor, across: int) -> tuple[Tensor, Tensor] | None:
    """fp32 [n, across], blocks being taken as if they had one row; None where the weight is not finite."""
    low, high = (torch.empty(weight.shape[0], across) for _ in range(2))
    done = _cpu.extremes(coding, _native(weight), low.data_ptr(), high.data_ptr(), torch.get_num_threads())
    return (low, high) if done else None


def _over_rows(rows: Tensor, fmt: Format, padding: int) -> Tensor:
    """Extremes [n, G] of single rows, with zeros for rows of padding, as [R, G, rows of a block]."""
    if padding:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, padding))
    return rows.view(-1, fmt.block.rows or len(rows), rows.shape[1]).transpose(1, 2)


class _Addresses:
    """The fp32 numbers of a fit as the extension takes them. Holds the tensors that the addresses belong to."""

    def __init__(self, fit: Effective) -> None:
        present = (fit.scale, fit.zero, fit.minimum)
        self.tensors = [None if t is None else t.detach().to(torch.float32).contiguous() for t in present]
        self.at = [0 if t is None else t.data_ptr() for t in self.tensors]


def _importance(importance: Tensor | None) -> tuple[int, int]:
    """The address of importances and how far a row is from the next, as the extension takes them."""
    if importance is None:
        return 0, 0
    return importance.data_ptr(), importance.stride(0) if importance.dim() == 2 else 0


class CpuProblem:
    """The blocks of a weight [n, k] (quantlib.formats.search.Problem), each sum and each search being one pass over it.

    importance: [k] or [n, k] fp32 with contiguous columns, or None
    """

    def __init__(
        self,
        fmt: Format,
        weight: Tensor,
        importance: Tensor | None,
        shared: Parts,
        coding: Any,
        extremes: tuple[Tensor, Tensor],
    ) -> None:
        self.fmt, self.shared = fmt, shared
        self._weight, self._coding, self._extremes = weight, coding, extremes
        self._importance = _importance(importance)
        self._kept = importance  # for the address

    def extremes(self) -> tuple[Tensor, Tensor]:
        return self._extremes

    def true_error(self, fit: Effective) -> Tensor:
        numbers, error = _Addresses(fit), torch.empty_like(fit.scale)
        self._sum(numbers, error.data_ptr(), [0] * 6)
        return error

    def moments(self, fit: Effective) -> Moments:
        numbers = _Addresses(fit)
        wanted = [torch.empty_like(fit.scale) for _ in range(6 if self.fmt.zero == "minimum" else 3)]
        self._sum(numbers, 0, [part.data_ptr() for part in wanted] + [0] * (6 - len(wanted)))
        return Moments(*wanted)

    def _sum(self, numbers: _Addresses, error: int, moments: list[int]) -> None:
        weight = _native(self._weight)
        _cpu.sums(self._coding, weight, self._importance, numbers.at, error, moments, torch.get_num_threads())

    def descend(self, first: Effective, candidates: Sequence[Effective], steps: int) -> Effective:
        fits = [_Addresses(fit) for fit in (first, *candidates)]
        found = Effective(*(None if t is None else torch.empty_like(t) for t in (first.scale, first.zero, first.minimum)))  # type: ignore[arg-type]
        result = _Addresses(found)
        shared = self.shared.get("global_scale")
        _cpu.search(
            self._coding,
            _native(self._weight),
            self._importance,
            [fit.at for fit in fits],
            steps,
            1.0 if shared is None else float(shared),
            result.at,
            torch.get_num_threads(),
        )
        return found


class CpuAccelerator:
    """See the module."""

    def extremes(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        if not _readable(weight):
            return None
        found = _row_extremes(_rows_coding(weight.shape[1]), weight, 1)
        return None if found is None else (found[0].amin(), found[1].amax())

    def problem(
        self, fmt: Format, weight: Tensor, importance: Tensor | None, shared: Parts, search: Search
    ) -> CpuProblem | None:
        if not _readable(weight):
            return None
        if importance is not None:
            importance = importance.to(device=weight.device, dtype=torch.float32)
            if importance.stride(-1) != 1 and importance.shape[-1] > 1:
                importance = importance.contiguous()
        coding = coding_of(fmt, weight.shape[1])
        if coding is None or ((search == "mse" or fmt.divisors) and not self._sums(fmt, weight.shape[1])):
            return None
        down, across = fmt.grid(*weight.shape)
        found = _row_extremes(coding, weight, across)
        if found is None:
            return None
        low, high = found
        if fmt.block.rows != 1:
            padding = down * (fmt.block.rows or len(weight)) - len(weight)
            low, high = _over_rows(low, fmt, padding).amin(dim=-1), _over_rows(high, fmt, padding).amax(dim=-1)
        return CpuProblem(fmt, weight, importance, shared, coding, (low.reshape(-1), high.reshape(-1)))

    @staticmethod
    def _sums(fmt: Format, k: int) -> bool:
        columns = fmt.block.cols or fmt.padded(k)
        return fmt.block.rows == 1 and 8 <= columns <= LANE_COLUMNS and columns.bit_count() == 1

    def encode(self, fmt: Format, weight: Tensor, numbers: Effective) -> Tensor | None:
        coding = coding_of(fmt, weight.shape[1]) if _readable(weight) else None
        if coding is None:
            return None
        n, k = weight.shape
        codes = torch.empty(n, packed_width(fmt.padded(k), fmt.codec.bits), dtype=torch.uint8)
        addresses = _Addresses(numbers)
        done = _cpu.encode(coding, _native(weight), addresses.at, codes.data_ptr(), torch.get_num_threads())
        return codes if done else None


if unavailable is None:
    register_accelerator("cpu", CpuAccelerator())
