"""Bit planes: every width survives a round trip, and the bytes lie as the rows layout says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib.errors import ShapeError
from quantlib.formats.packing import granule, pack, packed_width, planes, unpack
from quantlib.testing import assert_same_bits

WIDTHS = tuple(range(1, 9))


def random_codes(bits: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", WIDTHS)
@settings(max_examples=40, deadline=None)
@given(lead=st.lists(st.integers(0, 4), max_size=2), granules=st.integers(0, 9), seed=st.integers(0, 2**31))
def test_every_width_and_shape_survives_packing(bits: int, lead: list[int], granules: int, seed: int) -> None:
    columns = granules * granule(bits)
    codes = random_codes(bits, (*lead, columns), seed)
    packed = pack(codes, bits)
    assert packed.shape == (*lead, packed_width(columns, bits))
    assert packed.dtype == torch.uint8
    assert packed.numel() * 8 == codes.numel() * bits
    assert_same_bits(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@settings(max_examples=20, deadline=None)
@given(granules=st.integers(0, 9), seed=st.integers(0, 2**31))
def test_every_byte_string_is_some_row_of_codes(bits: int, granules: int, seed: int) -> None:
    columns = granules * granule(bits)
    packed = random_codes(8, (2, packed_width(columns, bits)), seed)
    assert_same_bits(pack(unpack(packed, bits, columns), bits), packed)


@pytest.mark.parametrize("bits", WIDTHS)
def test_planes_are_powers_of_two_low_bits_first_and_end_on_bytes(bits: int) -> None:
    assert sum(planes(bits)) == bits
    assert list(planes(bits)) == sorted(planes(bits), reverse=True)
    assert all(width in (1, 2, 4, 8) for width in planes(bits))
    assert granule(bits) * min(planes(bits)) == 8


def test_a_power_of_two_width_packs_low_first() -> None:
    assert pack(torch.tensor([[0x1, 0x2, 0x3, 0xF]], dtype=torch.uint8), 4).tolist() == [[0x21, 0xF3]]
    assert pack(torch.tensor([[3, 0, 1, 2]], dtype=torch.uint8), 2).tolist() == [[0b10_01_00_11]]
    assert pack(torch.tensor([[1, 0, 0, 0, 0, 0, 1, 1]], dtype=torch.uint8), 1).tolist() == [[0b1100_0001]]


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_other_widths_are_the_packed_planes_one_after_the_other(bits: int) -> None:
    codes = random_codes(bits, (3, 24))
    expected, shift = [], 0
    for width in planes(bits):
        expected.append(pack((codes >> shift) & ((1 << width) - 1), width))
        shift += width
    assert_same_bits(pack(codes, bits), torch.cat(expected, dim=-1))


def test_a_six_bit_row_is_low_nibbles_then_high_bit_pairs() -> None:
    codes = torch.tensor([[0b11_0001, 0b00_0010, 0b01_1111, 0b10_0000]], dtype=torch.uint8)
    assert pack(codes, 6).tolist() == [[0x21, 0x0F, 0b10_01_00_11]]


def test_a_row_that_does_not_fill_its_bytes_is_refused() -> None:
    with pytest.raises(ShapeError, match="can't pack 3 codes of 4 bits: a multiple of 2"):
        pack(torch.zeros(1, 3, dtype=torch.uint8), 4)
    with pytest.raises(ShapeError, match="a multiple of 8"):
        pack(torch.zeros(1, 4, dtype=torch.uint8), 3)
    with pytest.raises(ShapeError, match=r"5 bytes can't hold 8 codes of 4 bits \(4 bytes expected\)"):
        unpack(torch.zeros(1, 5, dtype=torch.uint8), 4, 8)


@pytest.mark.parametrize("bits", WIDTHS)
def test_strided_codes_pack_like_contiguous_ones(bits: int) -> None:
    codes = random_codes(bits, (16, 24)).t()[:, ::2]
    assert codes.shape == (24, 8)
    assert_same_bits(pack(codes, bits), pack(codes.contiguous(), bits))
