"""Decoding the `fragments` layout in registers: one tile of 16 * WARPS rows, ready as the A operand of a product.

Every lane loads its own words (16 bytes at once) and decodes its own weights; the tile that comes out is only a name for
registers that already lie as tensor cores want them (quantlib/layouts/fragments.py draws the order). Values are made in
values.py.

A tile is handled word by word, as tensors [T] with one number per lane (T = 32 * WARPS), and joined once at the very end.
Elementwise work behind a join makes Triton choose another order of K for mma.sync, and shuffle every weight into it.

Kernels are launched with enable_fp_fusion=False: where a multiply and an add may become one, `tl.fma` says so.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from .decode import widen
from .entries import double_scale, entry, float_entry, scale_of_code, super_entry, word_of
from .values import decode_pair, float_scale_pair


@dataclass(frozen=True)
class FragmentSpec:
    """What a kernel must know at compile time about a weight in the fragments layout; 0 stands for "none".

    values           "law" | "affine" | "integer" | "float": how the operand's values are made (values.py)
    scale_at         "weight" | "tile" | "end": where scales are multiplied in
    codec, bits, plane0 .. plane2, offset, exponent_bits, mantissa_bits      as in WeightSpec
    tile_columns     K of one tile
    scale            "float" | "e4m3_global" | "e8m0" | "double" | "super"
    scale_home       "strip" (ordered like codes) | "row" | "tensor" | "grid" (2-D blocks of block_rows x block_cols)
    scale_bits       of one stored scale; scale_dtype: "fp16" | "bf16" | "fp32" where scale is "float"
    block_rows, block_cols      the weights that share a scale; 0 is the whole dimension
    zero             "none" | "integer" | "minimum"
    scale_offset     super: integer scale = code - scale_offset
    scale_count      super: blocks under one fp16 unit; double: scales under one absmax
    """

    values: str
    scale_at: str
    codec: str
    bits: int
    plane0: int
    plane1: int
    plane2: int
    offset: int
    exponent_bits: int
    mantissa_bits: int
    tile_columns: int
    scale: str
    scale_home: str
    scale_bits: int
    scale_dtype: str
    block_rows: int
    block_cols: int
    zero: str
    scale_offset: int
    scale_count: int


# Loading: everything of a tile that comes from memory in order, so that it can be fetched ahead of its use.


@triton.jit
def _load_plane(plane, base, BITS: tl.constexpr, STEPS: tl.constexpr, T: tl.constexpr):
    """A lane's words of one plane: int32 [T, STEPS * BITS / 4]; at 8 bits those of g = 0 (the others follow 32 lanes on).

    base: int64 [T], the tile's number strip * tiles + tile.
    """
    lane = tl.arange(0, T) % 32
    WORDS: tl.constexpr = STEPS if BITS == 8 else STEPS * BITS // 4
    start = base * (64 if BITS == 8 else 32) + lane
    if WORDS == 1:
        return tl.load(plane + start)[:, None]
    else:
        return tl.load(plane + (start * WORDS)[:, None] + tl.arange(0, WORDS)[None, :])


@triton.jit
def _load_strip(part, unit, r, BITS: tl.constexpr, COUNT: tl.constexpr, T: tl.constexpr):
    """A lane's words of a strip part, for its rows r and r + 8: int32 [T, words]."""
    WORDS: tl.constexpr = 2 * max(16, COUNT * BITS) // 32
    start = unit * 8 + r
    if WORDS == 1:
        return tl.load(part + start)[:, None]
    else:
        return tl.load(part + (start * WORDS)[:, None] + tl.arange(0, WORDS)[None, :])


@triton.jit
def load_codes(codes, codes1, codes2, strip, tile, tiles, spec: tl.constexpr, WARPS: tl.constexpr):
    """The code words of one tile per warp: (w0, upper, w1, w2), int32 [T, words] each; 0 where the format has no such plane.

    strip, tile      int64 [T]: which tile each lane's warp works on; tiles: how many there are along K
    """
    T: tl.constexpr = 32 * WARPS
    STEPS: tl.constexpr = spec.tile_columns // 16
    base = strip * tiles + tile
    w0 = _load_plane(codes, base, spec.plane0, STEPS, T)
    upper, w1, w2 = 0, 0, 0
    if spec.plane0 == 8:
        upper = _load_plane(codes + 32 * STEPS, base, 8, STEPS, T)
    if spec.plane1 > 0:
        w1 = _load_plane(codes1, base, spec.plane1, STEPS, T)
    if spec.plane2 > 0:
        w2 = _load_plane(codes2, base, spec.plane2, STEPS, T)
    return w0, upper, w1, w2


@triton.jit
def load_strips(scales, zeros, outer, inner, strip, tile, unit_stride, outer_stride, spec: tl.constexpr, WARPS: tl.constexpr):
    """The strip parts' words of one tile per warp: (scale, zero, unit, minimum's unit), int32 [T, words] each; 0 where there is
    none.

    unit_stride, outer_stride      units along K of strip parts, of second-level strip parts
    """
    T: tl.constexpr = 32 * WARPS
    scale, zero, unit0, unit1 = 0, 0, 0, 0
    if spec.scale_home == "strip":
        UNIT: tl.constexpr = max(spec.block_cols, spec.tile_columns)
        COUNT: tl.constexpr = UNIT // spec.block_cols
        r = (tl.arange(0, T) % 32) // 4
        unit = strip * unit_stride + tile * spec.tile_columns // UNIT
        scale = _load_strip(scales, unit, r, spec.scale_bits, COUNT, T)
        if spec.zero == "integer":
            zero = _load_strip(zeros, unit, r, 8, COUNT, T)
        elif spec.zero == "minimum":
            zero = _load_strip(zeros, unit, r, spec.scale_bits, COUNT, T)
        if spec.scale == "super":
            above = strip * outer_stride + tile * spec.tile_columns // (spec.block_cols * spec.scale_count)
            unit0 = _load_strip(outer, above, r, 16, 1, T)
            if spec.zero == "minimum":
                unit1 = _load_strip(inner, above, r, 16, 1, T)
    return scale, zero, unit0, unit1


# Scales.


@triton.jit
def grid_scale(scales, strip, tile, r, last_row, across, spec: tl.constexpr, H: tl.constexpr):
    """A scale that is not ordered by strips (per row, per tensor, 2-D blocks): fp32 [T], for the lanes' row r + 8 H."""
    if spec.scale_home == "row":
        return widen(tl.load(scales + tl.minimum(strip * 16 + r + 8 * H, last_row)))
    elif spec.scale_home == "tensor":
        return widen(tl.load(scales + r * 0))
    else:
        down = (tl.minimum(strip * 16, last_row) // spec.block_rows) if spec.block_rows > 0 else strip * 0
        column = tile * spec.tile_columns // spec.block_cols if spec.block_cols > 0 else strip * 0
        return widen(tl.load(scales + down * across + tl.minimum(column, across - 1)))


@triton.jit
def tile_scale(
    scale, unit, scales, outer, inner, scale_map, strip, tile, last_row, across,
    spec: tl.constexpr, H: tl.constexpr, E: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The fp32 scale [T] of block E of a tile, in the lanes' row r + 8 H; `scale`, `unit`: words from load_strips."""
    r = (tl.arange(0, T) % 32) // 4
    if spec.scale_home != "strip":
        return grid_scale(scales, strip, tile, r, last_row, across, spec, H)
    else:
        COUNT: tl.constexpr = max(spec.block_cols, spec.tile_columns) // spec.block_cols
        # Triton 3.6 passes no plain string to another function.
        DTYPE: tl.constexpr = spec.scale_dtype
        if spec.scale == "float":
            return float_entry(scale, H, E, spec.scale_bits, COUNT, DTYPE, T)
        elif spec.scale == "super":
            return super_entry(scale, unit, H, E, COUNT, spec.scale_offset, T)
        elif spec.scale == "double":
            row = tl.minimum(strip * 16 + r + 8 * H, last_row)
            group = tl.minimum(tile * spec.tile_columns // spec.block_cols + E, across - 1)
            absmax = tl.load(outer + (row * across + group) // spec.scale_count)
            return double_scale(entry(scale, H, E, 8, COUNT, T), absmax, inner, scale_map)
        else:
            return scale_of_code(entry(scale, H, E, 8, COUNT, T), outer, spec)


# Decoding.


@triton.jit
def _step(
    w0, upper, w1, w2, scale, zero, unit0, unit1, scales, outer, inner, scale_map, table, lane_entry, strip, tile, last_row,
    across, dtype: tl.constexpr, spec: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The eight weights of every lane in step S of its tile, even columns and odd ones: `dtype` [T, 2 (h), 2 (g)] each."""
    # Blocks shorter than a tile: several scales in it, one of them this step's. (Triton 3.6 takes no chained comparison.)
    SEVERAL: tl.constexpr = spec.block_cols > 0 and spec.block_cols < spec.tile_columns
    E: tl.constexpr = S * 16 // spec.block_cols if SEVERAL else 0
    COUNT: tl.constexpr = spec.tile_columns // spec.block_cols if SEVERAL else 1
    word0 = word_of(w0, S * spec.plane0 // 4 if spec.plane0 < 8 else S, T)
    above, word1, word2 = word0, word0, word0
    if spec.plane0 == 8:
        above = word_of(upper, S, T)
    if spec.plane1 > 0:
        word1 = word_of(w1, S * spec.plane1 // 4, T)
    if spec.plane2 > 0:
        word2 = word_of(w2, S * spec.plane2 // 4, T)

    hidden = last_row >> 31
    scale0, scale1, zero0, zero1 = 0.0, 0.0, 0, 0
    if spec.values == "float" and spec.scale_at == "weight":
        scale0 = float_scale_pair(scale, 0, E, COUNT, dtype, spec, T)
        scale1 = float_scale_pair(scale, 1, E, COUNT, dtype, spec, T)
    elif spec.scale_at == "weight":
        scale0 = tile_scale(scale, unit0, scales, outer, inner, scale_map, strip, tile, last_row, across, spec, 0, E, T)
        scale1 = tile_scale(scale, unit0, scales, outer, inner, scale_map, strip, tile, last_row, across, spec, 1, E, T)
    if spec.zero == "integer":
        zero0, zero1 = entry(zero, 0, E, 8, COUNT, T), entry(zero, 1, E, 8, COUNT, T)
    elif spec.zero == "minimum":
        if spec.scale == "super":
            zero0, zero1 = super_entry(zero, unit1, 0, E, COUNT, 0, T), super_entry(zero, unit1, 1, E, COUNT, 0, T)
        else:
            DTYPE: tl.constexpr = spec.scale_dtype
            zero0 = float_entry(zero, 0, E, spec.scale_bits, COUNT, DTYPE, T)
            zero1 = float_entry(zero, 1, E, spec.scale_bits, COUNT, DTYPE, T)

    v0, v1 = decode_pair(word0, above, word1, word2, scale0, zero0, table, lane_entry, hidden, dtype, spec, 0, S)
    v2, v3 = decode_pair(word0, above, word1, word2, scale1, zero1, table, lane_entry, hidden, dtype, spec, 1, S)
    v4, v5 = decode_pair(word0, above, word1, word2, scale0, zero0, table, lane_entry, hidden, dtype, spec, 2, S)
    v6, v7 = decode_pair(word0, above, word1, word2, scale1, zero1, table, lane_entry, hidden, dtype, spec, 3, S)
    return tl.join(tl.join(v0, v2), tl.join(v4, v6)), tl.join(tl.join(v1, v3), tl.join(v5, v7))


@triton.jit
def decode_fragments(
    w0, upper, w1, w2, scale, zero, unit0, unit1, scales, outer, inner, scale_map, table, strip, tile, last_row, across,
    dtype: tl.constexpr, spec: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Words from `load_codes` and `load_strips` -> one tile of W per warp, in `dtype`, as registers: [T, 2 (h), 2 (g), steps
    ..., 2 (b)]; to be arranged by `stacked` or `beside`.

    last_row, across      N - 1; blocks along a row
    """
    T: tl.constexpr = 32 * WARPS
    lane_entry = 0.0
    if spec.codec == "table" and spec.bits == 4:
        lane_entry = tl.load(table + tl.arange(0, T) % 16)
    a0, b0 = _step(
        w0, upper, w1, w2, scale, zero, unit0, unit1, scales, outer, inner, scale_map, table, lane_entry, strip, tile, last_row,
        across, dtype, spec, 0, T,
    )  # fmt: skip
    a1, b1 = _step(
        w0, upper, w1, w2, scale, zero, unit0, unit1, scales, outer, inner, scale_map, table, lane_entry, strip, tile, last_row,
        across, dtype, spec, 1, T,
    )  # fmt: skip
    a2, b2 = _step(
        w0, upper, w1, w2, scale, zero, unit0, unit1, scales, outer, inner, scale_map, table, lane_entry, strip, tile, last_row,
        across, dtype, spec, 2, T,
    )  # fmt: skip
    a3, b3 = _step(
        w0, upper, w1, w2, scale, zero, unit0, unit1, scales, outer, inner, scale_map, table, lane_entry, strip, tile, last_row,
        across, dtype, spec, 3, T,
    )  # fmt: skip
    even = tl.join(tl.join(a0, a1), tl.join(a2, a3))
    odd = tl.join(tl.join(b0, b1), tl.join(b2, b3))
    if spec.tile_columns == 128:
        a4, b4 = _step(
            w0, upper, w1, w2, scale, zero, unit0, unit1, scales, outer, inner, scale_map, table, lane_entry, strip, tile,
            last_row, across, dtype, spec, 4, T,
        )  # fmt: skip
        a5, b5 = _step(
            w0, upper, w1, w2, scale, zero, unit0, unit1, scales, outer, inner, scale_map, table, lane_entry, strip, tile,
            last_row, across, dtype, spec, 5, T,
        )  # fmt: skip
        a6, b6 = _step(
            w0, upper, w1, w2, scale, zero, unit0, unit1, scales, outer, inner, scale_map, table, lane_entry, strip, tile,
            last_row, across, dtype, spec, 6, T,
        )  # fmt: skip
        a7, b7 = _step(
            w0, upper, w1, w2, scale, zero, unit0, unit1, scales, outer, inner, scale_map, table, lane_entry, strip, tile,
            last_row, across, dtype, spec, 7, T,
        )  # fmt: skip
        even = tl.join(even, tl.join(tl.join(a4, a5), tl.join(a6, a7)))
        odd = tl.join(odd, tl.join(tl.join(b4, b5), tl.join(b6, b7)))
    return tl.join(even, odd)


@triton.jit
def tiles_of(leaves, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """Leaves of `decode_fragments` -> one tile per warp: [WARPS, 16, COLUMNS]."""
    if COLUMNS == 64:
        lanes = tl.reshape(leaves, (WARPS, 8, 4, 2, 2, 2, 2, 2))  # warp, r, q, h, g, step low, step high, b
        tile = tl.permute(lanes, (0, 3, 1, 6, 5, 4, 2, 7))  # warp, h, r, step high, step low, g, q, b
    else:
        lanes = tl.reshape(leaves, (WARPS, 8, 4, 2, 2, 2, 2, 2, 2))
        tile = tl.permute(lanes, (0, 3, 1, 7, 6, 5, 4, 2, 8))
    return tl.reshape(tile, (WARPS, 16, COLUMNS))


@triton.jit
def stacked(leaves, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """Leaves of `decode_fragments`, whose warps have consecutive strips of one tile -> [16 * WARPS, COLUMNS]."""
    return tl.reshape(tiles_of(leaves, COLUMNS, WARPS), (16 * WARPS, COLUMNS))


@triton.jit
def beside(leaves, COLUMNS: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr):
    """Leaves of DOWN * ACROSS warps, ACROSS consecutive tiles of each of DOWN strips -> [16 * DOWN, COLUMNS * ACROSS]."""
    tiles = tl.reshape(tiles_of(leaves, COLUMNS, DOWN * ACROSS), (DOWN, ACROSS, 16, COLUMNS))
    return tl.reshape(tl.permute(tiles, (0, 2, 1, 3)), (16 * DOWN, ACROSS * COLUMNS))


# Accumulators.


@triton.jit
def by_row(scale0, scale1, WARPS: tl.constexpr):
    """One number per lane for its rows r and r + 8, [T] each -> [WARPS, 8 (r), 4 (q), 2 (h), 1, 1], to meet `lanes_of`."""
    return tl.reshape(tl.join(scale0, scale1), (WARPS, 8, 4, 2))[:, :, :, :, None, None]


@triton.jit
def lanes_of(acc, WARPS: tl.constexpr, COLUMNS: tl.constexpr):
    """acc [.., COLUMNS] of WARPS * 16 rows -> [WARPS, 8 (r), 4 (q), 2 (h), COLUMNS / 8, 2], as its registers lie: nothing
    moves."""
    return tl.permute(tl.reshape(acc, (WARPS, 2, 8, COLUMNS // 8, 4, 2)), (0, 2, 4, 1, 3, 5))


@triton.jit
def rows_of(lanes):
    """The inverse of `lanes_of`, up to the shape: [WARPS, 2, 8, COLUMNS / 8, 4, 2]."""
    return tl.permute(lanes, (0, 3, 1, 4, 2, 5))
