"""Integer formats: int2, int3, int4, int8; symmetric, full-range or asymmetric; group-wise or per output channel.

Parts (rows layout): codes, scales [N, K/g], and for asymmetric grids zeros uint8 [N, K/g].
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch

from quantlib.errors import FormatError
from quantlib.formats.base import Format
from quantlib.formats.block import Block
from quantlib.formats.codecs import Affine
from quantlib.formats.registry import Family, Word, check_group_size, group_word
from quantlib.formats.scales import FloatScale

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_DEFAULT_GROUP = {2: 64, 3: 128, 4: 128, 8: None}


def integer_format(
    bits: int,
    group_size: int | Literal["default"] | None = "default",
    symmetric: bool = True,
    full_range: bool = False,
    scale_dtype: Literal["fp16", "bf16", "fp32"] = "fp16",
) -> Format:
    """An integer format of `bits` bits.

    group_size   weights of a row that share a scale, a multiple of 8; None: one scale per output channel
    symmetric    w = (code - 2**(bits-1)) * scale with scale = 2*absmax/(2**bits - 1); else w = (code - zero) * scale, and the
                 grid spans the block's extremes and zero
    full_range   symmetric only: the signed extreme takes the lowest code, so that every code is used and scales have a sign
    """
    family = f"int{bits}"
    size = check_group_size(family, _DEFAULT_GROUP[bits] if group_size == "default" else group_size)
    if full_range and not symmetric:
        raise FormatError(f"{family}: full_range belongs to symmetric grids; drop it or asym")
    if scale_dtype not in _DTYPES:
        raise FormatError(f"{family}: scale_dtype={scale_dtype!r} is unknown; expected one of {', '.join(_DTYPES)}")
    words = [family, "channel" if size is None else f"g{size}"]
    words += ["asym"] * (not symmetric) + ["full"] * full_range + [scale_dtype] * (scale_dtype != "fp16")
    return Format(
        name="-".join(words),
        codec=Affine(bits, signed=symmetric),
        block=Block(1, size),
        scale=FloatScale(_DTYPES[scale_dtype]),
        zero="none" if symmetric else "integer",
        rule="fullrange" if full_range else "absmax",
    )


_WORDS = (
    group_word(),
    Word("channel", "group_size", None, "channel"),
    Word("sym", "symmetric", True, "sym"),
    Word("asym", "symmetric", False, "asym"),
    Word("full", "full_range", True, "full"),
    Word("fp16|bf16|fp32", "scale_dtype", lambda match: match.group(0), "bf16"),
)

FAMILIES = tuple(
    Family(f"int{bits}", partial(integer_format, bits), _WORDS, f"{bits}-bit integers, group-wise or per channel")
    for bits in (4, 8, 3, 2)
)
