"""What nvcc made of linear_frag's main loop: how many instructions decode a weight, and how wide its loads are."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from bench.cuda_decode import Decode, decode_of, listings
from quantlib.kernels import cuda_module

LIMITS = {"7IntegerINS0_{}ELi4E": 1.75, "12ScaledFloat4INS0_{}E": 2.25, "5TableINS0_{}E": 3.0}
"""Codec, as it stands in a kernel's symbol -> the most instructions per weight between its load and the multiplication."""

DTYPES = ("4Bf16", "4Half")


def _missing(chip: int) -> str | None:
    return cuda_module.unavailable() or cuda_module.refusal("sm80", chip)


TARGETS = [
    pytest.param(f"sm_{chip}", marks=pytest.mark.skipif(_missing(chip) is not None, reason=f"{_missing(chip)}"))
    for chip in (80, 90)
]


@cache
def counted(target: str) -> dict[str, Decode]:
    found = listings(Path(cuda_module.module().__file__), target)
    return {symbol: decode_of(listing) for symbol, listing in found.items() if "linear_frag_kernel" in symbol}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", LIMITS)
@pytest.mark.parametrize("target", TARGETS)
def test_decoding_stays_within_its_limit(target: str, codec: str, dtype: str) -> None:
    own = {symbol: decode for symbol, decode in counted(target).items() if codec.format(dtype) in symbol}
    assert len(own) >= 4, "instances for 8, 16, 32 and 64 rows"
    for symbol, decode in own.items():
        assert decode.weights == 64, symbol
        assert 0.5 < decode.per_weight <= LIMITS[codec], f"{symbol}: {decode.per_weight:.2f}, {dict(decode.opcodes)}"


@pytest.mark.parametrize("target", TARGETS)
def test_words_and_activations_are_copied_by_16_bytes(target: str) -> None:
    for symbol, decode in counted(target).items():
        assert set(decode.widths) == {16}, symbol
