"""FP8 formats: E4M3 or E5M2 codes under one fp32 scale per row, per tensor, per 128 x 128 block or per 128 of a row (g128)."""

from __future__ import annotations

from typing import Literal

import torch

from quantlib.errors import FormatError
from quantlib.formats.base import Format
from quantlib.formats.block import Block
from quantlib.formats.codecs import E4M3, E5M2
from quantlib.formats.registry import Family, Word
from quantlib.formats.scales import FloatScale

_BLOCKS = {"channel": Block(1, None), "tensor": Block(None, None), "block128": Block(128, 128), "g128": Block(1, 128)}


def fp8_format(
    element: Literal["e4m3", "e5m2"] = "e4m3", granularity: Literal["channel", "tensor", "block128", "g128"] = "channel"
) -> Format:
    """w = code * scale with scale = absmax / 448 (e4m3) or absmax / 57344 (e5m2).

    As a format of activations, "channel" is one scale per token, and "g128" goes with weights in 128 x 128 blocks.
    """
    if element not in ("e4m3", "e5m2"):
        raise FormatError(f"fp8: element={element!r} is unknown; expected 'e4m3' or 'e5m2'")
    if granularity not in _BLOCKS:
        raise FormatError(f"fp8: granularity={granularity!r} is unknown; expected one of {', '.join(_BLOCKS)}")
    words = ["fp8", element] + [granularity] * (granularity != "channel")
    return Format(
        name="-".join(words),
        codec=E4M3 if element == "e4m3" else E5M2,
        block=_BLOCKS[granularity],
        scale=FloatScale(torch.float32),
    )


FAMILIES = (
    Family(
        "fp8",
        fp8_format,
        (
            Word("e4m3|e5m2", "element", lambda match: match.group(0), "e4m3"),
            Word("channel|tensor|block128|g128", "granularity", lambda match: match.group(0), "channel"),
        ),
        "8-bit floats, per channel, tensor, 128x128 block or 128 of a row",
    ),
)
