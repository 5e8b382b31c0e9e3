"""Layouts are exact permutations: every format that fits comes back bit by bit, and lies where the diagrams say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantlib.errors import FormatError, ShapeError
from quantlib.formats import Format, get_format
from quantlib.formats.block import Block
from quantlib.formats.codecs import E2M1, Affine, Minifloat
from quantlib.formats.packing import pack, unpack
from quantlib.formats.scales import E4M3GlobalScale, FloatScale
from quantlib.layouts import fragments, list_layouts, strips
from quantlib.tensor import QuantizedTensor
from quantlib.testing import assert_same_bits, random_weight
from tests.cases import FORMATS, SHAPES


def quantized(fmt: Format, n: int, k: int) -> QuantizedTensor:
    weight = random_weight(n, k)
    parts = fmt.fit(weight)
    return QuantizedTensor(fmt, (n, k), {"codes": fmt.encode(weight, parts), **parts})


def random_codes(weight: QuantizedTensor) -> QuantizedTensor:
    """The same weight with every code random: an encoder may never write some of them."""
    codes = weight.parts["codes"]
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, 256, codes.shape, dtype=torch.uint8, generator=generator)
    if isinstance(weight.format.codec, Minifloat) and weight.format.codec.bits == 8:
        drawn &= 0xBB  # neither exponent is full: no NaN
    return QuantizedTensor(weight.format, weight.shape, {**weight.parts, "codes": drawn})


@pytest.mark.parametrize("spec", FORMATS)
def test_every_layout_comes_back_bit_by_bit(spec: str) -> None:
    fmt = get_format(spec)
    for layout in list_layouts():
        if layout.supports(fmt) is not None:
            continue
        for n, k in SHAPES:
            weight = quantized(fmt, n, k)
            for rows in (weight, random_codes(weight)):
                back = rows.to_layout(layout.name).to_layout("rows")
                assert list(back.parts) == list(rows.parts)
                for name, part in rows.parts.items():
                    # Codes behind K pad whole blocks; the decoded weight doesn't hold them, but they are stored.
                    assert_same_bits(back.parts[name], part)


def test_every_registered_format_fits_the_fragments_layout() -> None:
    refused = {spec: fragments.supports(get_format(spec)) for spec in FORMATS}
    assert {spec for spec, reason in refused.items() if reason is not None} == set()


def lane_words(weight: QuantizedTensor, name: str = "codes") -> Tensor:
    return weight.to_layout("fragments").parts[name]


@pytest.mark.parametrize(("n", "k", "word"), [(40, 48, 4), (19, 36, 2), (3, 18, 1), (16, 8, 4)])
def test_strips_of_rows_lie_where_the_diagram_says(n: int, k: int, word: int) -> None:
    """Each word of each row is found again by the formula of the module's docstring."""
    fmt = Format("plain", Affine(4), Block(1, None), FloatScale(torch.float16))
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    weight = QuantizedTensor(fmt, (n, k), {"codes": codes, "scales": torch.ones(n, 1, dtype=torch.float16)})
    strips = weight.to_layout("cpu_rows")
    flat, width = strips.parts["codes"].view(-1).tolist(), k // 2
    assert strips.parts["codes"].shape == codes.shape
    assert width % word == 0
    for row, byte in torch.cartesian_prod(torch.arange(n), torch.arange(width)).tolist():
        first = row // 16 * 16
        height = min(16, n - first)
        at = first * width + (byte // word * height + row - first) * word + byte % word
        assert flat[at] == codes[row, byte]
    assert_same_bits(strips.parts["scales"], weight.parts["scales"])


@pytest.mark.parametrize(
    ("spec", "k", "names"),
    [
        ("nvfp4", 256, {"codes", "scales"}),
        ("nvfp4", 96, {"codes"}),  # six bytes of scales to a row
        ("int4-g32-asym", 256, {"codes", "scales", "zeros"}),
        ("q4_1", 128, {"codes", "scales", "minima"}),
        ("nf4-dq", 256, {"codes"}),
        ("q4_k", 512, {"codes"}),
        ("fp8-e4m3-block128", 512, {"codes"}),
        ("int8-channel", 64, {"codes"}),
    ],
)
def test_numbers_of_blocks_lie_in_strips_where_rows_have_whole_words_of_them(spec: str, k: int, names: set[str]) -> None:
    fmt, n = get_format(spec), 21
    assert set(strips.moved(fmt, n, k)) == names
    weight = quantized(fmt, n, k)
    there = weight.to_layout("cpu_rows").parts
    for name, part in weight.parts.items():
        rows, flat = part.reshape(-1).view(torch.uint8), there[name].reshape(-1).view(torch.uint8)
        if name not in names:
            assert torch.equal(rows, flat)
            continue
        words, whole = rows.view(n, -1, 4), flat[: 16 * rows.numel() // n].view(-1, 16, 4)
        assert torch.equal(whole, words[:16].transpose(0, 1))
        assert torch.equal(flat[whole.numel() :].view(-1, 5, 4), words[16:].transpose(0, 1))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_lie_where_the_diagram_says(bits: int) -> None:
    """Every code of a random weight is found again by the formula of the module's docstring, written out."""
    fmt = Format("plain", Affine(bits), Block(1, None), FloatScale(torch.float16))
    n, k = 32, 256
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    weight = QuantizedTensor(fmt, (n, k), {"codes": pack(codes, bits), "scales": torch.ones(n, 1, dtype=torch.float16)})
    words = lane_words(weight).to(torch.int64) & 0xFFFFFFFF
    width = fragments.tile_columns(fmt)
    steps_a_word = max(1, 4 // bits)
    for row, column in torch.cartesian_prod(torch.arange(n), torch.arange(k)).tolist():
        strip, h, r = row // 16, row % 16 // 8, row % 8
        tile, step, g, q, b = column // width, column % width // 16, column % 16 // 8, column % 8 // 2, column % 2
        field = step % steps_a_word * 4 + (h if bits == 8 else 2 * g + h)
        half = g if bits == 8 else 0
        word = int(words[strip, tile, half, 4 * r + q, step // steps_a_word])
        assert (word >> (16 * b + bits * field)) & ((1 << bits) - 1) == int(codes[row, column])


def test_small_floats_are_spread_as_the_diagram_says() -> None:
    fmt = get_format("nvfp4")
    weight = random_codes(quantized(fmt, 16, 64))
    codes = unpack(weight.parts["codes"], 4, 64)
    words = lane_words(weight).to(torch.int64) & 0xFFFFFFFF
    places = {0: ((0, 1, 2), 13), 1: ((3, 4, 5), 12), 2: ((6, 7, 8), 14), 3: ((9, 10, 11), 15)}
    for row, column in torch.cartesian_prod(torch.arange(16), torch.arange(64)).tolist():
        pair = 2 * (column % 16 // 8) + row // 8
        half = int(words[0, 0, 0, 4 * (row % 8) + column % 8 // 2, column // 16]) >> (16 * (column % 2)) & 0xFFFF
        magnitude, sign = places[pair]
        code = sum((half >> bit & 1) << i for i, bit in enumerate(magnitude)) | (half >> sign & 1) << 3
        assert code == int(codes[row, column])


@pytest.mark.parametrize(
    ("spec", "part"), [("fp8-e4m3", "codes"), ("fp8-e5m2", "codes"), ("nvfp4", "scales"), ("mxfp4", "scales")]
)
def test_a_damaged_weight_is_refused(spec: str, part: str) -> None:
    weight = quantized(get_format(spec), 8, 64)
    weight.parts[part].view(-1)[0] = 0xFF
    with pytest.raises(FormatError, match="NaN"):
        weight.to_layout("fragments")


@pytest.mark.parametrize(
    ("fmt", "words"),
    [
        (Format("odd", Affine(4), Block(1, 24), FloatScale()), "blocks of 24 columns"),
        (Format("few-rows", Affine(4), Block(8, 64), FloatScale()), "strips of 16"),
        (Format("narrow-grid", Affine(4), Block(16, 32), FloatScale()), "tiles"),
        (Format("grid-zeros", Affine(4, signed=False), Block(16, 64), FloatScale(), zero="integer"), "2-D blocks"),
        (Format("row-zeros", Affine(4, signed=False), Block(1, None), FloatScale(), zero="integer"), "whole rows"),
    ],
    ids=str,
)
def test_a_format_that_does_not_fit_says_why(fmt: Format, words: str) -> None:
    assert words in str(fragments.supports(fmt))
    with pytest.raises(ShapeError, match="fragments"):
        quantized(fmt, 32, 192).to_layout("fragments")


def test_four_bit_floats_of_other_shapes_fit_too() -> None:
    for exponent, mantissa in ((1, 2), (3, 0)):
        fmt = Format(f"e{exponent}m{mantissa}", Minifloat(exponent, mantissa), Block(1, 16), E4M3GlobalScale())
        weight = quantized(fmt, 16, 64)
        assert_same_bits(weight.to_layout("fragments").to_layout("rows").parts["codes"], weight.parts["codes"])
    assert E2M1.bits == 4
