"""The `fragments` layout: codes in the order in which the lanes of a warp feed tensor cores, so that decoding is lane-local.

A strip is 16 rows of W, a step 16 columns. In a strip x step the lane 4r + q (r 0..7, q 0..3) holds the eight weights

    row 8h + r,  column 8g + 2q + b        g, h, b in {0, 1}

which is the A operand of mma m16n8k16 and of wgmma from registers alike. The weights b = 0, 1 of a (g, h) are a pair: they end
up in the two halves of one 32-bit register. A code plane of `width` bits fills 32-bit words with pairs p = 2g + h in ascending
order,

    bit  31 ....................... 16 15 ........................ 0
         b = 1 of the pairs ... 1 0    b = 0 of the pairs ... 1 0         one field is `width` bits

so that one shift and one mask give both halves of a pair: a word holds 4 steps at width 1, two at 2, one at 4, half a step (one
g) at 8. Codes of a 4-bit float (s = sign, m = magnitude of pair p) are spread in each half, because the sign ends up 7 bits
above the magnitude's upper bit in bf16 and 4 in fp16. So spread, four pairs take five shifts and seven masks in either, the
least sum of both over all places of four magnitudes and four signs:

    bit  15 14 13 12 11 10  9  8  7  6  5  4  3  2  1  0
         s3 s2 s0 s1 m3 m3 m3 m2 m2 m2 m1 m1 m1 m0 m0 m0

Tiles of `tile_columns` columns follow each other along K; in a tile a lane's words of a plane are contiguous (16 bytes at
width 4): planes are int32 [strips, tiles, g-halves, 32 lanes, words].

Scales, zeros and minima of blocks of one row are ordered alike: int32 words [strips, units, 8 (r), words], bytes running over
(h, block), where a unit is the larger of a tile and a block. Narrow packed integers (K-quants) are widened to a byte.
Everything else (one scale per row, per tensor or per 2-D block; second-level scales of double quantization) stays as in `rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from quantlib.errors import FormatError
from quantlib.formats.base import Format
from quantlib.formats.codecs import Minifloat
from quantlib.formats.packing import pack, planes, unpack
from quantlib.formats.scales import FloatScale, Parts, SuperScale

STRIP = 16
STEP = 16
LANES = 32


@dataclass(frozen=True)
class StripPart:
    """A part that is ordered by strips: its entries' bits (8, 16 or 32), and the columns that an entry belongs to."""

    name: str
    bits: int
    columns: int

    def unit(self, tile_columns: int) -> int:
        """Columns of W that one group of words covers."""
        return max(self.columns, tile_columns)

    def entries(self, tile_columns: int) -> int:
        """Entries per row and unit."""
        return self.unit(tile_columns) // self.columns

    def row_bytes(self, tile_columns: int) -> int:
        """Bytes per row and unit; a single byte is stored twice, so that two rows fill a word."""
        return max(2, self.entries(tile_columns) * self.bits // 8)


def strip_parts(fmt: Format) -> tuple[StripPart, ...]:
    """The parts besides codes that the layout reorders."""
    if fmt.block.rows != 1 or fmt.block.cols is None:
        return ()
    cols = fmt.block.cols
    if isinstance(fmt.scale, SuperScale):
        parts = [StripPart("scales", 8, cols), StripPart("super_scales", 16, cols * fmt.scale.count)]
        if fmt.scale.has_minimum:
            parts += [StripPart("minima", 8, cols), StripPart("super_minima", 16, cols * fmt.scale.count)]
        return tuple(parts)
    bits = 8 * fmt.scale.dtype.itemsize if isinstance(fmt.scale, FloatScale) else 8
    parts = [StripPart("scales", bits, cols)]
    if fmt.zero == "integer":
        parts.append(StripPart("zeros", 8, cols))
    if fmt.zero == "minimum":
        parts.append(StripPart("minima", bits, cols))
    return tuple(parts)


@lru_cache(maxsize=256)
def tile_columns(fmt: Format) -> int:
    """64, or 128 where that makes a lane's words of a narrow plane 16 bytes, or lets bytes of two rows fill a word."""
    narrow = min(planes(fmt.codec.bits)) < 4
    halves = any(part.columns == 64 and part.bits == 8 for part in strip_parts(fmt))
    return 128 if narrow or halves else 64


def supports(fmt: Format) -> str | None:
    """None, or why the format's blocks don't fit tiles of whole steps."""
    rows, cols = fmt.block.rows, fmt.block.cols
    width = tile_columns(fmt)
    if cols is not None and (cols % STEP or (width % cols and cols % width)):
        return f"blocks of {cols} columns don't divide tiles of {width} columns, nor are they multiples of one"
    if rows is not None and rows != 1 and rows % STRIP:
        return f"blocks of {rows} rows are not whole strips of {STRIP} rows"
    if cols is not None and rows != 1 and cols % width:
        return f"2-D blocks of {cols} columns are not whole tiles of {width} columns"
    if rows != 1 and fmt.zero != "none":
        return "zeros and minima of 2-D blocks are not supported"
    if cols is None and fmt.zero != "none":
        return "zeros and minima of whole rows are not supported"
    return None


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def tiles(fmt: Format, k: int) -> int:
    """Tiles along a row of k columns, the format's own padding included."""
    return _ceil(fmt.padded(k), tile_columns(fmt))


_SPREAD = (0, 1, 2, 13, 3, 4, 5, 12, 6, 7, 8, 14, 9, 10, 11, 15)
"""Where bit i of four packed 4-bit floats goes."""


def _is_spread(fmt: Format) -> bool:
    return isinstance(fmt.codec, Minifloat) and fmt.codec.bits == 4


def _move_bits(words: Tensor, target: tuple[int, ...]) -> Tensor:
    """int32 words with bit i of each 16-bit half moved to bit target[i] of that half."""
    halves = words.contiguous().view(torch.int16).to(torch.int32)
    moved = torch.zeros_like(halves)
    for source, place in enumerate(target):
        moved |= ((halves >> source) & 1) << place
    return moved.to(torch.int16).view(torch.int32)


def _codes_forward(fmt: Format, n: int, k: int, codes: Tensor) -> list[Tensor]:
    """Packed rows -> one int32 [strips, tiles, halves, 32, words] per plane."""
    width = tile_columns(fmt)
    strips, count = _ceil(n, STRIP), tiles(fmt, k)
    unpacked = unpack(codes, fmt.codec.bits, fmt.padded(k))
    padded = unpacked.new_zeros(strips * STRIP, count * width)
    columns = min(count * width, unpacked.shape[1])
    padded[:n, :columns] = unpacked[:, :columns]
    # [strip, h, r, tile, step, g, q, b] -> [strip, tile, r, q, step, g, h, b]
    lanes = padded.view(strips, 2, 8, count, width // STEP, 2, 4, 2).permute(0, 3, 2, 6, 4, 5, 1, 7)
    found, shift = [], 0
    for bits in planes(fmt.codec.bits):
        plane = (lanes >> shift) & ((1 << bits) - 1)
        words = _plane_words(plane, bits)
        found.append(_move_bits(words, _SPREAD) if _is_spread(fmt) else words)
        shift += bits
    return found


def _plane_words(plane: Tensor, bits: int) -> Tensor:
    """uint8 [strip, tile, r, q, step, g, h, b] -> int32 [strip, tile, halves, lane, words]."""
    strips, count, steps = plane.shape[0], plane.shape[1], plane.shape[4]
    halves = 2 if bits == 8 else 1
    if bits == 8:
        ordered = plane.permute(0, 1, 5, 2, 3, 4, 7, 6)  # strip, tile, g, r, q, step, b, h
    else:
        ordered = plane.permute(0, 1, 2, 3, 4, 7, 5, 6)  # strip, tile, r, q, step, b, g, h
        per_word = 4 // bits  # steps
        ordered = ordered.reshape(strips, count, 8, 4, steps // per_word, per_word, 2, 4).transpose(5, 6)
    # Runs of 16 / bits fields fill a 16-bit half, low first; b = 0 is the low half.
    packed = pack(ordered.reshape(strips, count, halves, LANES, -1), bits)
    return packed.contiguous().view(torch.int32)


def _codes_inverse(fmt: Format, n: int, k: int, words: list[Tensor]) -> Tensor:
    """The inverse of `_codes_forward`; columns that the format pads to whole blocks come back as they were or as zeros."""
    width = tile_columns(fmt)
    strips, count = _ceil(n, STRIP), tiles(fmt, k)
    steps = width // STEP
    lanes, shift = None, 0
    if _is_spread(fmt):
        words = [_move_bits(words[0], tuple(_SPREAD.index(bit) for bit in range(16)))]
    for bits, plane in zip(planes(fmt.codec.bits), words, strict=True):
        fields = unpack(plane.contiguous().view(torch.uint8), bits, plane.shape[-1] * 32 // bits)
        if bits == 8:
            ordered = fields.view(strips, count, 2, 8, 4, steps, 2, 2).permute(0, 1, 3, 4, 5, 2, 7, 6)
        else:
            per_word = 4 // bits
            ordered = fields.view(strips, count, 8, 4, steps // per_word, 2, per_word, 4).transpose(5, 6)
            ordered = ordered.reshape(strips, count, 8, 4, steps, 2, 2, 2).permute(0, 1, 2, 3, 4, 6, 7, 5)
        lanes = ordered << shift if lanes is None else lanes | (ordered << shift)
        shift += bits
    assert lanes is not None
    padded = lanes.permute(0, 6, 2, 1, 4, 5, 3, 7).reshape(strips * STRIP, count * width)
    columns = fmt.padded(k)
    unpacked = padded.new_zeros(n, columns)
    kept = min(columns, count * width)
    unpacked[:, :kept] = padded[:n, :kept]
    return pack(unpacked, fmt.codec.bits)


def _entries(fmt: Format, n: int, k: int, name: str, part: Tensor) -> Tensor:
    """A strip part of the rows layout with one entry per block: unpacked where it is packed."""
    if isinstance(fmt.scale, SuperScale) and name in ("scales", "minima"):
        return unpack(part, fmt.scale.bits, fmt.grid(n, k)[1])
    return part


def _strip_forward(fmt: Format, n: int, k: int, spec: StripPart, part: Tensor) -> Tensor:
    width = tile_columns(fmt)
    entries = _entries(fmt, n, k, spec.name, part)
    strips, units = _ceil(n, STRIP), _ceil(tiles(fmt, k) * width, spec.unit(width))
    per_unit = spec.entries(width)
    padded = entries.new_zeros(strips * STRIP, units * per_unit)
    across = min(units * per_unit, entries.shape[1])
    padded[:n, :across] = entries[:, :across]
    # [strip, h, r, unit, entry] -> [strip, unit, r, h, entry]
    ordered = padded.view(strips, 2, 8, units, per_unit).permute(0, 3, 2, 1, 4).contiguous()
    found = ordered.view(torch.uint8)
    if per_unit * spec.bits == 8:
        found = found.expand(*found.shape[:-1], 2).contiguous()
    return found.view(strips, units, 8, -1).view(torch.int32)


def _strip_inverse(fmt: Format, n: int, k: int, spec: StripPart, words: Tensor, dtype: torch.dtype, across: int) -> Tensor:
    width = tile_columns(fmt)
    strips, units = words.shape[:2]
    per_unit = spec.entries(width)
    found = words.contiguous().view(torch.uint8).view(strips, units, 8, 2, -1)
    if per_unit * spec.bits == 8:
        found = found[..., :1].contiguous()
    ordered = found.view(dtype).permute(0, 3, 2, 1, 4).reshape(strips * STRIP, units * per_unit)
    entries = ordered.new_zeros(n, across)
    kept = min(across, units * per_unit)
    entries[:, :kept] = ordered[:n, :kept]
    if isinstance(fmt.scale, SuperScale) and spec.name in ("scales", "minima"):
        return pack(entries, fmt.scale.bits)
    return entries


def plane_names(fmt: Format) -> tuple[str, ...]:
    """The parts that hold the code planes, low bits first."""
    return ("codes", "codes_plane1", "codes_plane2")[: len(planes(fmt.codec.bits))]


def _refuse_nan(fmt: Format, parts: Parts) -> None:
    """Codes that mean NaN or infinity would decode to numbers: the kernels leave the test out."""
    if parts["codes"].is_meta:
        return
    codec = fmt.codec
    if isinstance(codec, Minifloat) and codec.bits == 8:
        magnitudes = torch.tensor(codec.entries, device=parts["codes"].device)
        codes = parts["codes"].flatten().to(torch.int64)
        if bool(torch.isnan(magnitudes)[codes].any()):
            raise FormatError(f"{fmt}: the weight holds codes that mean NaN or infinity; the checkpoint is damaged")
    top = {"e4m3_global": 0x7F, "e8m0": 0xFF}.get(fmt.scale.kind)
    if top is not None and bool(((parts["scales"] & top) == top).any()):
        raise FormatError(f"{fmt}: the weight holds a block scale that is NaN; the checkpoint is damaged")


def forward(fmt: Format, n: int, k: int, parts: Parts) -> Parts:
    """rows -> fragments. Raises FormatError for a weight that holds NaN or infinity."""
    _refuse_nan(fmt, parts)
    found = dict(zip(plane_names(fmt), _codes_forward(fmt, n, k, parts["codes"]), strict=True))
    strip = {spec.name: spec for spec in strip_parts(fmt)}
    for name, part in parts.items():
        if name != "codes":
            found[name] = _strip_forward(fmt, n, k, strip[name], part) if name in strip else part
    return found


def inverse(fmt: Format, n: int, k: int, parts: Parts) -> Parts:
    """fragments -> rows, exactly."""
    names, specs = plane_names(fmt), fmt.specs(n, k)
    strip = {spec.name: spec for spec in strip_parts(fmt)}
    found = {"codes": _codes_inverse(fmt, n, k, [parts[name] for name in names])}
    for name, spec in specs.items():
        if name == "codes":
            continue
        if name not in strip:
            found[name] = parts[name]
            continue
        across = spec.shape[1]
        if isinstance(fmt.scale, SuperScale) and name in ("scales", "minima"):
            across = fmt.grid(n, k)[1]
        found[name] = _strip_inverse(fmt, n, k, strip[name], parts[name], spec.dtype, across)
    return found
