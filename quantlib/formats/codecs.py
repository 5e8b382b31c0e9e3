"""Codecs: how a code of 1 to 8 bits becomes a number, and which code is nearest to a number.

A codec knows neither scale nor block. Its `values` table, indexed by code, is the whole truth: kernels may compute
the same values with bit tricks, but `decode` is what they are compared with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Codec(Protocol):
    """What every codec offers. `kind` is what kernels declare: "affine", "table" or "minifloat"."""

    kind: ClassVar[str]

    @property
    def bits(self) -> int: ...

    @property
    def divisor(self) -> float:
        """The code-domain magnitude that a block's absmax is mapped to by the absmax rule."""
        ...

    @property
    def entries(self) -> tuple[float, ...]:
        """The decoded value of every code, in code order; NaN where a code means none."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """The nearest code (uint8) of every element of x (fp32, already divided by the scale); saturates."""
        ...


@lru_cache(maxsize=64)
def _table(entries: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(entries, dtype=torch.float32, device=device)


def decode(codec: Codec, codes: Tensor) -> Tensor:
    """codes (uint8, any shape) -> fp32 values of the same shape, before any scale."""
    if isinstance(codec, Affine):
        return codes.to(torch.float32).sub_(codec.offset)
    if isinstance(codec, Minifloat) and codec.torch_dtype is not None:
        return codes.view(codec.torch_dtype).to(torch.float32)
    return _table(codec.entries, codes.device).index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)


def nearest(codec: Codec, x: Tensor) -> Tensor:
    """The value of the code nearest to every element of x (fp32): decode(encode(x)) without the code, for searches."""
    if isinstance(codec, Affine):
        return x.round().clamp_(-codec.offset, (1 << codec.bits) - 1 - codec.offset)
    if isinstance(codec, Minifloat):
        # The step between neighbours is a power of two that x's own exponent gives; rounding half to even on a multiple of the
        # step is rounding to the even code.
        binade = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
        step = binade.clamp_(min=2.0 ** (1 - codec.bias)).mul_(2.0**-codec.mantissa_bits)
        return (x / step).round_().mul_(step).clamp_(-codec.divisor, codec.divisor)
    return decode(codec, codec.encode(x))


@dataclass(frozen=True)
class Affine:
    """Integers: value = code - offset, where offset is 2**(bits-1) for a signed grid and 0 for an unsigned one."""

    bits: int
    signed: bool = True
    kind: ClassVar[str] = "affine"

    @property
    def offset(self) -> int:
        return 1 << (self.bits - 1) if self.signed else 0

    @property
    def divisor(self) -> float:
        """Half the grid's length: absmax lands half a step outside its ends, which minimises the mean error."""
        return ((1 << self.bits) - 1) / 2 if self.signed else float((1 << self.bits) - 1)

    @property
    def entries(self) -> tuple[float, ...]:
        return tuple(float(code - self.offset) for code in range(1 << self.bits))

    def encode(self, x: Tensor) -> Tensor:
        return x.round().add_(self.offset).clamp_(0, (1 << self.bits) - 1).to(torch.uint8)


@dataclass(frozen=True)
class Table:
    """A code book: value = entries[code]. The entries may stand in any order; their number is a power of two."""

    entries: tuple[float, ...]
    kind: ClassVar[str] = "table"

    @property
    def bits(self) -> int:
        return (len(self.entries) - 1).bit_length()

    @property
    def divisor(self) -> float:
        return max(abs(value) for value in self.entries)

    def encode(self, x: Tensor) -> Tensor:
        order, midpoints = sorted_midpoints(self.entries)
        rank = _rank(x, midpoints)
        if order != tuple(range(len(order))):
            rank = _order(order, x.device).index_select(0, rank)
        return rank.to(torch.uint8).view(x.shape)


@lru_cache(maxsize=64)
def sorted_midpoints(entries: tuple[float, ...]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The codes in order of value, and the fp32 midpoints between neighbours (a tie takes the lower value)."""
    values = torch.tensor(entries, dtype=torch.float32)
    order = torch.argsort(values, stable=True)
    ranked = values[order]
    return tuple(order.tolist()), tuple(((ranked[:-1] + ranked[1:]) / 2).tolist())


@lru_cache(maxsize=64)
def _order(order: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(order, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class _Cells:
    """bucketize for a short list of midpoints at a fraction of its time: the line is cut into equal cells so narrow that none
    holds two midpoints; a number's rank is that of its cell's lower edge, plus one where it lies above the cell's midpoint.
    Exact, because the cell is a monotonic function of the number, computed alike for the midpoints."""

    low: float
    per_unit: float
    base: Tensor
    bound: Tensor
    COUNT: ClassVar[int] = 1024

    @staticmethod
    def index(x: Tensor, low: float, per_unit: float) -> Tensor:
        position = x.sub(low).mul_(per_unit).clamp_(0, _Cells.COUNT - 1).to(torch.int32)
        # A NaN passes the first clamp and becomes any integer.
        return position.clamp_(0, _Cells.COUNT - 1)

    def rank(self, x: Tensor) -> Tensor:
        """x [n] -> int32 [n]: how many midpoints lie below each element."""
        cell = self.index(x, self.low, self.per_unit)
        return self.base.index_select(0, cell).add_(x > self.bound.index_select(0, cell))


def _rank(x: Tensor, midpoints: tuple[float, ...]) -> Tensor:
    """x fp32, any shape -> int32 [x.numel()]: how many of the ascending midpoints lie below each element."""
    cells = _cells(midpoints, x.device)
    if cells is None:
        return torch.bucketize(x.reshape(-1), _table(midpoints, x.device), out_int32=True)
    return cells.rank(x.reshape(-1))


@lru_cache(maxsize=64)
def _cells(midpoints: tuple[float, ...], device: torch.device) -> _Cells | None:
    """The cells of some ascending midpoints; None where two fall into one cell."""
    low, high = midpoints[0], midpoints[-1]
    if not high > low:
        return None
    per_unit = (_Cells.COUNT - 1) / (high - low)
    ascending = torch.tensor(midpoints, dtype=torch.float32)
    cell = _Cells.index(ascending, low, per_unit).to(torch.int64)
    if len(set(cell.tolist())) < len(midpoints):
        return None
    held = torch.zeros(_Cells.COUNT, dtype=torch.int32)
    held[cell] = 1
    bound = torch.full((_Cells.COUNT,), math.inf)
    bound[cell] = ascending
    base = held.cumsum(0, dtype=torch.int32) - held
    return _Cells(low, per_unit, base.to(device), bound.to(device))


@dataclass(frozen=True)
class Minifloat:
    """A small IEEE-like float: sign, `exponent_bits`, `mantissa_bits`, subnormals, no infinity.

    E2M1 (OCP MX v1.0), E4M3 (`float8_e4m3fn`, max 448) and E5M2 (`float8_e5m2`, max 57344). Rounds to nearest, ties to
    the even code, saturating; the sign of a number that rounds to zero is kept, so code 8 of E2M1 is -0.
    """

    exponent_bits: int
    mantissa_bits: int
    kind: ClassVar[str] = "minifloat"

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def name(self) -> str:
        return f"e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """torch's own dtype of these bits, where it has one."""
        return {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}.get(self.name)

    @property
    def divisor(self) -> float:
        return _minifloat_divisor(self.exponent_bits, self.mantissa_bits)

    @property
    def entries(self) -> tuple[float, ...]:
        half = _minifloat_magnitudes(self.exponent_bits, self.mantissa_bits)
        return half + tuple(-value for value in half)

    def encode(self, x: Tensor) -> Tensor:
        if self.torch_dtype is not None:
            limit = self.divisor
            return x.clamp(-limit, limit).to(self.torch_dtype).view(torch.uint8)
        bounds = _even_tie_bounds(self.exponent_bits, self.mantissa_bits)
        magnitude = _rank(x.abs(), bounds).to(torch.uint8).view(x.shape)
        return magnitude | ((x < 0).to(torch.uint8) << (self.bits - 1))


@lru_cache(maxsize=16)
def _minifloat_divisor(exponent_bits: int, mantissa_bits: int) -> float:
    return max(value for value in _minifloat_magnitudes(exponent_bits, mantissa_bits) if not math.isnan(value))


@lru_cache(maxsize=16)
def _minifloat_magnitudes(exponent_bits: int, mantissa_bits: int) -> tuple[float, ...]:
    """The values of the codes whose sign bit is 0. In 8 bits the top codes are no numbers (E4M3: one, E5M2: four)."""
    bias = (1 << (exponent_bits - 1)) - 1
    steps = 1 << mantissa_bits
    values = []
    for code in range(1 << (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, steps)
        if exponent == 0:
            values.append(math.ldexp(mantissa / steps, 1 - bias))
        else:
            values.append(math.ldexp(1 + mantissa / steps, exponent - bias))
    if (exponent_bits, mantissa_bits) == (4, 3):
        values[-1:] = [math.nan]
    elif (exponent_bits, mantissa_bits) == (5, 2):
        values[-4:] = [math.inf, math.nan, math.nan, math.nan]
    return tuple(math.nan if math.isinf(value) else value for value in values)


@lru_cache(maxsize=16)
def _even_tie_bounds(exponent_bits: int, mantissa_bits: int) -> tuple[float, ...]:
    """Bounds b for bucketize (which takes the lower code at x == b) that make a tie go to the even code:
    the midpoint itself where the lower code is even, the next float below it where the lower code is odd."""
    values = torch.tensor(_minifloat_magnitudes(exponent_bits, mantissa_bits), dtype=torch.float32)
    middle = (values[:-1] + values[1:]) / 2
    below = torch.nextafter(middle, torch.zeros_like(middle))
    odd = torch.arange(len(middle)) % 2 == 1
    return tuple(torch.where(odd, below, middle).tolist())


E2M1 = Minifloat(2, 1)
E4M3 = Minifloat(4, 3)
E5M2 = Minifloat(5, 2)
