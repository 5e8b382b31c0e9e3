"""Scale kinds: how one scale (and, where a format has one, one minimum) per block is stored, rounded and read back.

Every kind works on a grid fp32 [R, G], one entry per block. `from_absmax` is the scale that the absmax rule wants,
already rounded to what the kind can hold; `store` turns a grid into the stored parts; `load` reads the parts back as
the fp32 multiplier that decoding uses. What belongs to the whole tensor (NVFP4's global scale) is `shared`: fitted once,
passed to every later call, so that a tensor may be quantized in slabs of rows or of columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.formats.codecs import E4M3, Table, decode
from quantlib.formats.packing import pack, packed_width, unpack

Parts: TypeAlias = dict[str, Tensor]


def divided(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, rounded once on every device. (Given a plain number, torch multiplies by its reciprocal on a GPU.)"""
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)


@dataclass(frozen=True)
class PartSpec:
    """Shape and dtype of one stored part, and whether its first dimension follows the rows of the weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    by_row: bool = True

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@runtime_checkable
class Scale(Protocol):
    """What every scale kind offers; `kind` is what kernels declare. `continuous`: nearly any scale can be stored, so that a
    search may solve for the best one."""

    kind: ClassVar[str]
    continuous: ClassVar[bool]

    @property
    def has_minimum(self) -> bool: ...

    @property
    def count(self) -> int:
        """Blocks of a row that share a second-level scale; a row holds a multiple of them."""
        ...

    def specs(self, down: int, across: int) -> dict[str, PartSpec]: ...

    def fit_shared(self, absmax: Tensor, divisor: float) -> Parts: ...

    def from_absmax(self, absmax: Tensor, divisor: float, shared: Parts) -> Tensor: ...

    def candidates(self, scale: Tensor, factors: tuple[float, ...], shared: Parts) -> list[Tensor]:
        """Scales around `scale` that a search should try: its multiples, or its neighbours among those that can be stored."""
        ...

    def round(self, scale: Tensor, shared: Parts) -> Tensor: ...

    def store(self, scale: Tensor, minimum: Tensor | None, shared: Parts) -> Parts: ...

    def load(self, parts: Parts) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class FloatScale:
    """One float per block; with `minimum`, a second one: w = value * scale - minimum."""

    dtype: torch.dtype = torch.float16
    has_minimum: bool = False
    kind: ClassVar[str] = "float"
    continuous: ClassVar[bool] = True
    count: ClassVar[int] = 1

    def specs(self, down: int, across: int) -> dict[str, PartSpec]:
        spec = PartSpec((down, across), self.dtype)
        return {"scales": spec, "minima": spec} if self.has_minimum else {"scales": spec}

    def fit_shared(self, absmax: Tensor, divisor: float) -> Parts:
        limit = torch.finfo(self.dtype).max
        if float(absmax) / divisor > limit:
            raise FormatError(
                f"scale {float(absmax) / divisor:.3g} does not fit {str(self.dtype).removeprefix('torch.')} (max {limit:.3g}); "
                "choose a format with bf16 or fp32 scales"
            )
        return {}

    def from_absmax(self, absmax: Tensor, divisor: float, shared: Parts) -> Tensor:
        """Rounded toward zero: on a symmetric integer grid absmax lies half a step outside, an exact tie that rounds outward.
        Rounding the scale up breaks the tie inward, by a coin's toss per block (demo model, int4-g64: 22.35 against 21.81)."""
        exact = divided(absmax, divisor)
        stored = exact.to(self.dtype)
        # A positive float's bits count upward with its value, so one less is the next float below; the smallest stays.
        bits = stored.view(torch.int32 if self.dtype == torch.float32 else torch.int16)
        above = (stored.to(torch.float32) > exact) & (bits > 1)
        return (bits - above.to(bits.dtype)).view(self.dtype).to(torch.float32)

    def candidates(self, scale: Tensor, factors: tuple[float, ...], shared: Parts) -> list[Tensor]:
        return [self.round(scale * factor, shared) for factor in factors]

    def round(self, scale: Tensor, shared: Parts) -> Tensor:
        return scale.to(self.dtype).to(torch.float32)

    def store(self, scale: Tensor, minimum: Tensor | None, shared: Parts) -> Parts:
        parts = {"scales": scale.to(self.dtype)}
        if minimum is not None:
            parts["minima"] = minimum.to(self.dtype)
        if not all(bool(torch.isfinite(part).all()) for part in parts.values()):
            raise FormatError(
                f"a scale does not fit {str(self.dtype).removeprefix('torch.')} (max {torch.finfo(self.dtype).max:.3g}); "
                "choose a format with bf16 or fp32 scales"
            )
        return parts

    def load(self, parts: Parts) -> tuple[Tensor, Tensor | None]:
        minima = parts["minima"].to(torch.float32) if self.has_minimum else None
        return parts["scales"].to(torch.float32), minima


@dataclass(frozen=True)
class E4M3GlobalScale:
    """An E4M3 code per block times one fp32 multiplier per tensor (NVFP4).

    `top` is the E4M3 value that the largest block's scale takes: 448, or 256 where scales must leave room to grow by 1.5
    (four-over-six). A scale never rounds to zero: the smallest is 2^-9, so no block divides by it.
    """

    top: float = 448.0
    has_minimum: bool = False
    kind: ClassVar[str] = "e4m3_global"
    continuous: ClassVar[bool] = False
    count: ClassVar[int] = 1
    SMALLEST: ClassVar[float] = 2.0**-9

    def specs(self, down: int, across: int) -> dict[str, PartSpec]:
        return {
            "scales": PartSpec((down, across), torch.uint8),
            "global_scale": PartSpec((), torch.float32, by_row=False),
        }

    def fit_shared(self, absmax: Tensor, divisor: float) -> Parts:
        scale = divided(absmax.to(torch.float32), divisor * self.top)
        return {"global_scale": torch.where(scale > 0, scale, torch.ones_like(scale))}

    def _codes(self, ratio: Tensor) -> Tensor:
        return E4M3.encode(ratio.clamp(min=self.SMALLEST))

    def from_absmax(self, absmax: Tensor, divisor: float, shared: Parts) -> Tensor:
        return decode(E4M3, self._codes(absmax / (divisor * shared["global_scale"]))) * shared["global_scale"]

    def candidates(self, scale: Tensor, factors: tuple[float, ...], shared: Parts) -> list[Tensor]:
        codes = self._codes(scale / shared["global_scale"]).to(torch.int16)
        around = [(codes + step).clamp(1, 126).to(torch.uint8) for step in range(-6, 7)]
        return [decode(E4M3, near) * shared["global_scale"] for near in around]

    def round(self, scale: Tensor, shared: Parts) -> Tensor:
        return decode(E4M3, self._codes(scale / shared["global_scale"])) * shared["global_scale"]

    def store(self, scale: Tensor, minimum: Tensor | None, shared: Parts) -> Parts:
        return {"scales": self._codes(scale / shared["global_scale"]), "global_scale": shared["global_scale"]}

    def load(self, parts: Parts) -> tuple[Tensor, Tensor | None]:
        return decode(E4M3, parts["scales"]) * parts["global_scale"], None


@dataclass(frozen=True)
class E8M0Scale:
    """A power of two per block, 2^(code - 127) (OCP MX v1.0).

    `rule` picks the exponent from absmax: "floor" takes floor(log2(absmax)) - floor(log2(divisor)), as the OCP text does, and
    saturates the largest weights; "ceil" takes the smallest power of two for which nothing saturates.
    """

    rule: str = "floor"
    has_minimum: bool = False
    kind: ClassVar[str] = "e8m0"
    continuous: ClassVar[bool] = False
    count: ClassVar[int] = 1

    def specs(self, down: int, across: int) -> dict[str, PartSpec]:
        return {"scales": PartSpec((down, across), torch.uint8)}

    def fit_shared(self, absmax: Tensor, divisor: float) -> Parts:
        return {}

    @staticmethod
    def _value(codes: Tensor) -> Tensor:
        bits = codes.to(torch.int32) << 23
        bits = torch.where(codes == 0, torch.full_like(bits, 1 << 22), bits)
        return torch.where(codes == 255, torch.full_like(bits, 0x7FC00000), bits).view(torch.float32)

    def _codes(self, scale: Tensor) -> Tensor:
        """Nearest power of two in the exponent's sense, decided by the mantissa: no logarithm rounds near the middle."""
        mantissa, exponent = torch.frexp(scale.clamp(min=2.0**-127))
        # The largest fp32 number below the root of 1/2; a mantissa in [1/2, 1) above it is nearer to 1.
        exponent = exponent - 1 + (mantissa > 0.7071067690849304).to(exponent.dtype)
        return (exponent + 127).clamp(0, 254).to(torch.uint8)

    def from_absmax(self, absmax: Tensor, divisor: float, shared: Parts) -> Tensor:
        if self.rule == "floor":
            exponent = torch.frexp(absmax)[1] - 1 - (math.frexp(divisor)[1] - 1)
        else:
            mantissa, exponent = torch.frexp(divided(absmax, divisor))
            exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
            exponent = torch.where(mantissa > 0, exponent, torch.full_like(exponent, -127))
        exponent = torch.where(absmax > 0, exponent, torch.full_like(exponent, -127))
        return self._value((exponent + 127).clamp(0, 254).to(torch.uint8))

    def candidates(self, scale: Tensor, factors: tuple[float, ...], shared: Parts) -> list[Tensor]:
        codes = self._codes(scale).to(torch.int16)
        return [self._value((codes + step).clamp(0, 254).to(torch.uint8)) for step in (0, -1, 1)]

    def round(self, scale: Tensor, shared: Parts) -> Tensor:
        return self._value(self._codes(scale))

    def store(self, scale: Tensor, minimum: Tensor | None, shared: Parts) -> Parts:
        return {"scales": self._codes(scale)}

    def load(self, parts: Parts) -> tuple[Tensor, Tensor | None]:
        return self._value(parts["scales"]), None


def _dynamic_map() -> tuple[float, ...]:
    """The 256 values of the signed dynamic data type (Dettmers et al., arXiv 1511.04561 and 2110.02861), ascending: per decade
    10^-6 .. 1 the midpoints of 1, 2, 4 .. 64 equal parts of [0.1, 1], with both signs; and 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        for sign in (1, -1):
            values += (sign * 10 ** (decade - 6) * middles).tolist()
    return tuple(sorted(values))


DYNAMIC_MAP = Table(_dynamic_map())


@lru_cache(maxsize=8)
def _map_steps(device: torch.device) -> Tensor:
    """The code nearest to each of 2^16 equal steps of [-1, 1]."""
    steps = torch.arange(1 << 16, dtype=torch.float64) / 32767.5 - 1
    return DYNAMIC_MAP.encode(steps.to(torch.float32)).to(device)


@dataclass(frozen=True)
class DoubleQuantScale:
    """QLoRA's double quantization (arXiv 2305.14314): scale = map[code] * absmax of 256 scales + offset.

    The scales are numbered along the flattened grid; `offset` is their mean, kept in fp32.
    """

    has_minimum: bool = False
    kind: ClassVar[str] = "double"
    continuous: ClassVar[bool] = True
    count: ClassVar[int] = 1
    BLOCK: ClassVar[int] = 256

    def specs(self, down: int, across: int) -> dict[str, PartSpec]:
        return {
            "scales": PartSpec((down, across), torch.uint8),
            "scale_absmax": PartSpec((math.ceil(down * across / self.BLOCK),), torch.float32, by_row=False),
            "scale_offset": PartSpec((), torch.float32, by_row=False),
        }

    def fit_shared(self, absmax: Tensor, divisor: float) -> Parts:
        return {}

    def from_absmax(self, absmax: Tensor, divisor: float, shared: Parts) -> Tensor:
        return divided(absmax, divisor)

    def candidates(self, scale: Tensor, factors: tuple[float, ...], shared: Parts) -> list[Tensor]:
        return [scale * factor for factor in factors]

    def round(self, scale: Tensor, shared: Parts) -> Tensor:
        return scale

    def _blocks(self, flat: Tensor) -> Tensor:
        return torch.nn.functional.pad(flat, (0, -flat.numel() % self.BLOCK)).view(-1, self.BLOCK)

    def store(self, scale: Tensor, minimum: Tensor | None, shared: Parts) -> Parts:
        flat = scale.reshape(-1)
        offset = flat.mean() if flat.numel() else flat.new_zeros(())
        absmax = self._blocks(flat - offset).abs().amax(dim=1)
        parts = {"scale_absmax": absmax, "scale_offset": offset}
        return {"scales": self._codes(scale, parts), **parts}

    def _codes(self, scale: Tensor, parts: Parts) -> Tensor:
        """The map codes [R, G] of scales, given the second level.

        bitsandbytes' CPU arithmetic: the quotient is snapped to the nearest of 2^16 equal steps of [-1, 1], whose code comes
        from a table; scales that are all equal take code 0.
        """
        blocks = self._blocks(scale.reshape(-1) - parts["scale_offset"])
        quotient = torch.nan_to_num(blocks / parts["scale_absmax"][:, None], nan=-1.0, posinf=1.0, neginf=-1.0)
        step = ((quotient + 1) * 32767.5 + 0.5).to(torch.int32).clamp_(0, (1 << 16) - 1)
        return _map_steps(scale.device)[step].view(-1)[: scale.numel()].view(scale.shape)

    def before_rounding(self, absmax: Tensor, parts: Parts) -> Tensor:
        """The scale [R, G] that codes are chosen against: the block's own absmax where the stored scale is a rounding of it, as
        bitsandbytes does (it quantizes the weights before it quantizes the scales); else the stored scale."""
        stored, _ = self.load(parts)
        return torch.where(self._codes(absmax, parts) == parts["scales"], absmax, stored)

    def load(self, parts: Parts) -> tuple[Tensor, Tensor | None]:
        codes = parts["scales"]
        values = self._blocks(decode(DYNAMIC_MAP, codes.reshape(-1))) * parts["scale_absmax"][:, None]
        return values.view(-1)[: codes.numel()].view(codes.shape) + parts["scale_offset"], None


@dataclass(frozen=True)
class SuperScale:
    """K-quants: an integer scale of `bits` bits per block under one fp16 super-scale per `count` blocks of a row.

    With `has_minimum` every block also has an integer minimum under an fp16 super-minimum: w = value * (d * sc) - dmin * m.
    `signed` scales are stored as code = scale + 2**(bits-1). Codes narrower than a byte are packed along the row.
    """

    bits: int
    count: int
    signed: bool = False
    has_minimum: bool = False
    kind: ClassVar[str] = "super"
    continuous: ClassVar[bool] = True

    def specs(self, down: int, across: int) -> dict[str, PartSpec]:
        codes = PartSpec((down, packed_width(across, self.bits)), torch.uint8)
        supers = PartSpec((down, across // self.count), torch.float16)
        if self.has_minimum:
            return {"scales": codes, "minima": codes, "super_scales": supers, "super_minima": supers}
        return {"scales": codes, "super_scales": supers}

    @property
    def _offset(self) -> int:
        return 1 << (self.bits - 1) if self.signed else 0

    def fit_shared(self, absmax: Tensor, divisor: float) -> Parts:
        return {}

    def from_absmax(self, absmax: Tensor, divisor: float, shared: Parts) -> Tensor:
        return divided(absmax, divisor)

    def candidates(self, scale: Tensor, factors: tuple[float, ...], shared: Parts) -> list[Tensor]:
        return [scale * factor for factor in factors]

    def round(self, scale: Tensor, shared: Parts) -> Tensor:
        return scale

    @property
    def top(self) -> int:
        """The largest integer scale; the largest scale of a super-block takes it."""
        return (1 << self.bits) - 1 - self._offset

    @property
    def lowest(self) -> int:
        """The smallest integer scale in use (a signed scale leaves the lowest code free, so that signs are alike)."""
        return -self.top if self.signed else 0

    def integers(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """grid fp32 [..., G] -> the fp32 value of every entry's fp16 unit, and the entry's integer, both [..., G].

        The entry that defines the unit has the integer `top`, so that the unit can be found again from the products.
        """
        supers = grid.reshape(-1, self.count)
        unit = divided(supers.abs().amax(dim=-1, keepdim=True), self.top).to(torch.float16).to(torch.float32)
        ratio = torch.where(unit == 0, 0.0, supers / unit).round().clamp(self.lowest, self.top)
        return unit.expand_as(supers).reshape(grid.shape), ratio.reshape(grid.shape)

    def _pack(self, integers: Tensor) -> Tensor:
        return pack((integers + self._offset).to(torch.uint8), self.bits)

    def _expand(self, codes: Tensor, units: Tensor) -> Tensor:
        across = units.shape[1] * self.count
        integers = unpack(codes, self.bits, across).to(torch.float32) - self._offset
        return integers * units.to(torch.float32).repeat_interleave(self.count, dim=1)

    def store(self, scale: Tensor, minimum: Tensor | None, shared: Parts) -> Parts:
        parts = dict(zip(("scales", "super_scales"), self._stored(scale), strict=True))
        if minimum is None:
            return parts
        minima, super_minima = self._stored(minimum)
        return {
            "scales": parts["scales"],
            "minima": minima,
            "super_scales": parts["super_scales"],
            "super_minima": super_minima,
        }

    def _stored(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        unit, integers = self.integers(grid)
        units = unit[:, :: self.count].to(torch.float16)
        if not torch.isfinite(units).all():
            largest = float(grid.abs().max())
            raise FormatError(f"scale {largest:.3g} needs an fp16 super-scale above 65504; choose another format")
        return self._pack(integers), units

    def load(self, parts: Parts) -> tuple[Tensor, Tensor | None]:
        minima = self._expand(parts["minima"], parts["super_minima"]) if self.has_minimum else None
        return self._expand(parts["scales"], parts["super_scales"]), minima
