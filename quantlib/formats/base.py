"""Format: what the numbers of a quantized weight ARE. Numerics only: no device, no layout, no kernel.

A format is a codec (how a code becomes a value), a block (which weights share a scale), a scale kind (how scales are stored)
and a zero kind. The law that every kernel is measured against is `decode`, in fp32:

    w = (value[code] - zero) * scale - minimum          each product and each difference rounded once to fp32

Every algorithm is written against `fit`, `encode`, `decode` and nothing else, and so works for every format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantlib.errors import FormatError, ShapeError
from quantlib.formats import search as searching
from quantlib.formats.acceleration import accelerator
from quantlib.formats.block import Block
from quantlib.formats.codecs import Codec, decode
from quantlib.formats.effective import Effective
from quantlib.formats.packing import granule, pack, packed_width, unpack
from quantlib.formats.scales import DoubleQuantScale, Parts, PartSpec, Scale
from quantlib.formats.search import Problem, Search, TorchProblem

Zero = Literal["none", "integer", "minimum"]
SLAB = 1 << 19
"""Weights that torch fits or encodes at once: its temporaries (in a search eight times 4 bytes a weight) stay in the cache."""
OWN_SLAB = 1 << 21
"""Weights that an accelerator fits at once: it has no such temporaries, and torch's work on the grid starts less often."""


@dataclass(frozen=True)
class Format:
    """A quantized number format.

    name        the canonical spec string; `get_format(name)` gives this object back
    codec       Affine, Table or Minifloat
    block       which weights share a scale
    scale       how scales are stored
    zero        "none"; "integer" (a uint8 zero point per block: part `zeros`); "minimum" (kept by the scale kind)
    rule        "absmax", or "fullrange": the signed extreme of a block takes the code -2**(bits-1), so scales have a sign
    divisors    further code-domain magnitudes that a block's absmax may be mapped to; the one with the least error is kept
    reciprocal  encode multiplies by 1/scale instead of dividing (bitsandbytes' arithmetic; differs in the last bit)
    """

    name: str
    codec: Codec
    block: Block
    scale: Scale
    zero: Zero = "none"
    rule: Literal["absmax", "fullrange"] = "absmax"
    divisors: tuple[float, ...] = ()
    reciprocal: bool = False

    def __post_init__(self) -> None:
        if (self.zero == "minimum") != self.scale.has_minimum:
            raise FormatError(f"format {self.name!r}: zero={self.zero!r} needs a scale kind that agrees about minima")
        if self.block.rows != 1 and (self.scale.count > 1):
            raise FormatError(f"format {self.name!r}: second-level scales need blocks of one row")

    def __str__(self) -> str:
        return self.name

    # sizes

    @property
    def column_multiple(self) -> int:
        """K is padded inside to a multiple of this: whole blocks, whole super-blocks, whole bytes."""
        return math.lcm((self.block.cols or 1) * self.scale.count, granule(self.codec.bits))

    def padded(self, k: int) -> int:
        """The number of columns that a weight of k columns occupies in the rows layout."""
        return -(-k // self.column_multiple) * self.column_multiple

    def grid(self, n: int, k: int) -> tuple[int, int]:
        """Blocks down and across a weight [n, k]."""
        return self.block.grid(n, self.padded(k))

    def specs(self, n: int, k: int) -> dict[str, PartSpec]:
        """Name, shape and dtype of every part of a weight [n, k] in the rows layout, `codes` first."""
        down, across = self.grid(n, k)
        specs = {"codes": PartSpec((n, packed_width(self.padded(k), self.codec.bits)), torch.uint8)}
        specs |= self.scale.specs(down, across)
        if self.zero == "integer":
            specs["zeros"] = PartSpec((down, across), torch.uint8)
        return specs

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of all parts of a weight [n, k], padding included."""
        return sum(spec.nbytes for spec in self.specs(n, k).values())

    def bits_per_weight(self, n: int, k: int) -> float:
        """8 * nbytes / (n * k)."""
        return 8 * self.nbytes(n, k) / (n * k) if n * k else 0.0

    # fit

    def fit_shared(self, weight: Tensor) -> Parts:
        """What belongs to the whole tensor (NVFP4's global scale), from weight [n, k] of any float dtype.

        Raises FormatError where the largest scale does not fit the scale dtype.
        """
        if weight.numel() == 0:
            absmax = torch.zeros((), device=weight.device)
        else:
            low, high = extremes(weight)
            absmax = torch.maximum(-low, high).abs().to(torch.float32)
        return self.scale.fit_shared(absmax, self.codec.divisor)

    def fit(
        self,
        weight: Tensor,
        importance: Tensor | None = None,
        search: Search = "absmax",
        shared: Parts | None = None,
    ) -> Parts:
        """Choose scales (and zeros, minima) for weight [n, k], float; k is padded with zeros to whole blocks.

        importance: [k] or [n, k] >= 0, the weight of each squared error (for a linear layer: mean x^2 of each input).
        search: "absmax" takes the format's own rule; "mse" tries scales around it and keeps the least (weighted) error.
        shared: what `fit_shared` gave for the whole tensor, where `weight` is a slab of it.

        Returns every part but `codes`, as stored.
        """
        if search not in ("absmax", "mse"):
            raise FormatError(f"search={search!r} is unknown: expected 'absmax' or 'mse'")
        shared = self.fit_shared(weight) if shared is None else shared
        n, k = weight.shape
        fits = [
            self._fit_blocks(slab, None if importance is None else _rows_of(importance, start, stop), search, shared)
            for start, stop, slab in self.slabs(weight, SLAB if accelerator(weight.device) is None else OWN_SLAB)
        ]
        scale = torch.cat([fit.scale for fit in fits]) if fits else weight.new_zeros(self.grid(n, k), dtype=torch.float32)
        zero = _cat([fit.zero for fit in fits]) if self.zero == "integer" else None
        minimum = _cat([fit.minimum for fit in fits]) if self.zero == "minimum" else None
        if not fits and self.zero != "none":
            zero, minimum = (scale, None) if self.zero == "integer" else (None, scale)
        parts = self.store(Effective(scale, zero, minimum), shared)
        # A clone, because `contiguous` leaves odd strides in dimensions of size one, and parts are viewed as bytes.
        return {name: part.clone(memory_format=torch.contiguous_format) for name, part in parts.items()}

    def slabs(self, weight: Tensor, elements: int = SLAB) -> list[tuple[int, int, Tensor]]:
        """(start, stop, weight[start:stop]) over whole block rows, about `elements` weights each: they stay in the cache."""
        n, k = weight.shape
        step = max(n, 1)
        if self.block.rows is not None:
            step = max(self.block.rows, elements // max(k, 1) // self.block.rows * self.block.rows)
        return [(start, min(start + step, n), weight[start : start + step]) for start in range(0, n, step)]

    def _pad(self, weight: Tensor) -> Tensor:
        k = weight.shape[1]
        return weight if self.padded(k) == k else torch.nn.functional.pad(weight, (0, self.padded(k) - k))

    def _fit_blocks(self, slab: Tensor, importance: Tensor | None, search: Search, shared: Parts) -> Effective:
        if search == "absmax":
            importance = None
        fits = [searching.fit(problem, search) for problem in self._problems(slab, importance, shared, search)]
        return Effective.cat(fits).reshape(*self.grid(*slab.shape))

    def _problems(self, slab: Tensor, importance: Tensor | None, shared: Parts, search: Search) -> Iterator[Problem]:
        """The blocks of a slab, in order: at once where the device has code of its own for them, else in chunks in torch."""
        own = accelerator(slab.device)
        problem = None if own is None else own.problem(self, slab, importance, shared, search)
        if problem is not None:
            yield problem
            return
        blocks = self.block.split(self._pad(slab).to(torch.float32)).flatten(0, 1)
        if importance is not None:
            weights = importance.to(device=slab.device, dtype=torch.float32).expand(slab.shape)
            importance = self.block.split(self._pad(weights)).flatten(0, 1)
        step = max(1, SLAB // max(blocks.shape[1] * self.scale.count, 1)) * self.scale.count
        for start in range(0, max(len(blocks), 1), step):
            chunk = None if importance is None else importance[start : start + step]
            yield TorchProblem(self, blocks[start : start + step], chunk, shared)

    # encode, decode

    def effective(self, parts: Parts) -> Effective:
        """The fp32 scale, zero and minimum of every block, from the stored parts."""
        scale, minimum = self.scale.load(parts)
        zero = parts["zeros"].to(torch.float32) if self.zero == "integer" else None
        return Effective(scale, zero, minimum)

    def store(self, numbers: Effective, shared: Parts) -> Parts:
        """Every part but `codes`, from the fp32 numbers [R, G] of every block: what `effective` reads back, rounded.

        Raises FormatError where one is out of range.
        """
        parts = self.scale.store(numbers.scale, numbers.minimum, shared)
        if numbers.zero is not None:
            parts["zeros"] = numbers.zero.to(torch.uint8)
        return parts

    def encode_blocks(self, blocks: Tensor, numbers: Effective) -> Tensor:
        """blocks fp32 [R, G, B] -> codes uint8 [R, G, B]; a block whose scale is zero encodes zero."""
        scale = numbers.scale[..., None]
        if numbers.minimum is not None:
            blocks = blocks + numbers.minimum[..., None]
        nonzero = torch.where(scale == 0, torch.ones_like(scale), scale)
        # A subnormal scale has no finite reciprocal; bitsandbytes bounds it in the same way.
        x = blocks * (1 / nonzero.clamp(min=1e-38)) if self.reciprocal else blocks / nonzero
        if (scale == 0).any():
            x = torch.where(scale == 0, torch.zeros_like(x), x)
        return self.codec.encode(x if numbers.zero is None else x + numbers.zero[..., None])

    def decode_blocks(self, codes: Tensor, numbers: Effective) -> Tensor:
        """codes uint8 [R, G, B] -> fp32 [R, G, B]."""
        values = decode(self.codec, codes)
        if numbers.zero is not None:
            values = values - numbers.zero[..., None]
        values = values * numbers.scale[..., None]
        return values if numbers.minimum is None else values - numbers.minimum[..., None]

    def encode(self, weight: Tensor, parts: Parts) -> Tensor:
        """weight [n, k], float -> packed `codes` uint8 of the rows layout, given the fitted parts."""
        numbers = self.effective(parts)
        if isinstance(self.scale, DoubleQuantScale):
            numbers = Effective(self.scale.before_rounding(self._absmax(weight) / self.codec.divisor, parts))
        return self.encode_under(weight, numbers)

    def encode_under(self, weight: Tensor, numbers: Effective) -> Tensor:
        """weight [n, k], float -> packed `codes` uint8 of the rows layout, nearest under the numbers [R, G] of their blocks."""
        own = accelerator(weight.device)
        codes = None if own is None else own.encode(self, weight, numbers)
        return self._encode(weight, numbers) if codes is None else codes

    def _encode(self, weight: Tensor, numbers: Effective) -> Tensor:
        n, k = weight.shape
        packed = torch.empty(self.specs(n, k)["codes"].shape, dtype=torch.uint8, device=weight.device)
        for start, stop, slab in self.slabs(weight):
            padded = self._pad(slab).to(torch.float32)
            codes = self.encode_blocks(self.block.split(padded), self._block_rows(numbers, start, stop))
            packed[start:stop] = pack(self.block.merge(codes, *padded.shape), self.codec.bits)
        return packed

    def _absmax(self, weight: Tensor) -> Tensor:
        """fp32 [R, G]: the largest magnitude of every block of weight [n, k]."""
        grids = []
        for _, _, slab in self.slabs(weight):
            for problem in self._problems(slab, None, {}, "absmax"):
                low, high = problem.extremes()
                grids.append(torch.maximum(-low, high).abs())
        grid = self.grid(*weight.shape)
        return torch.cat(grids).view(grid) if grids else torch.zeros(grid, device=weight.device)

    def decode_slabs(self, parts: Parts, n: int, k: int) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, fp32 rows start..stop of the weight [n, k]) over slabs that bound memory, from the rows layout."""
        numbers = self.effective(parts)
        for start, stop, packed in self.slabs(parts["codes"]):
            codes = unpack(packed, self.codec.bits, self.padded(k))
            blocks = self.decode_blocks(self.block.split(codes), self._block_rows(numbers, start, stop))
            yield start, stop, self.block.merge(blocks, stop - start, k)

    def decode(self, parts: Parts, n: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """All parts of the rows layout -> weight [n, k]: the law, computed in fp32 and rounded once to `dtype`."""
        out = torch.empty(n, k, dtype=dtype, device=parts["codes"].device)
        for start, stop, weight in self.decode_slabs(parts, n, k):
            out[start:stop] = weight
        return out

    def _block_rows(self, numbers: Effective, start: int, stop: int) -> Effective:
        rows = self.block.rows
        return numbers if rows is None else numbers.rows(start // rows, -(-stop // rows))

    def check(self, parts: Parts, n: int, k: int, name: str = "weight") -> None:
        """Raise ShapeError unless `parts` are exactly the parts of a weight [n, k] in the rows layout."""
        specs = self.specs(n, k)
        if set(parts) != set(specs):
            raise ShapeError(f"{name}: {self.name} has the parts {sorted(specs)}, found {sorted(parts)}")
        for part, spec in specs.items():
            found = parts[part]
            if tuple(found.shape) != spec.shape or found.dtype != spec.dtype:
                raise ShapeError(
                    f"{name}.{part}: {self.name} of [{n}, {k}] needs {spec.dtype} {list(spec.shape)}, "
                    f"found {found.dtype} {list(found.shape)}"
                )


def extremes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest element of a tensor that is not empty, in its dtype or in fp32; NaN where it holds one."""
    own = accelerator(weight.device)
    found = None if own is None else own.extremes(weight)
    return torch.aminmax(weight) if found is None else found


def _rows_of(importance: Tensor, start: int, stop: int) -> Tensor:
    return importance if importance.dim() == 1 else importance[start:stop]


def _cat(tensors: list[Tensor | None]) -> Tensor | None:
    present = [t for t in tensors if t is not None]
    return torch.cat(present) if present else None
