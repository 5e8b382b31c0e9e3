"""Code-book formats of QLoRA and bitsandbytes: NF4 and FP4, with and without double quantization.

NF4 (arXiv 2305.14314) puts its 16 values at quantiles of the normal distribution; FP4 is bitsandbytes' own 4-bit float, whose
codes follow its hardware decoder and not E2M1's order. Blocks are 64 weights of a row, so that for K a multiple of 64 they are
the blocks of the flattened tensor; absmax is kept in fp32, or in 8 bits ("dq": quantlib.formats.scales.DoubleQuantScale).
"""

from __future__ import annotations

from functools import partial

import torch

from quantlib.formats.base import Format
from quantlib.formats.block import Block
from quantlib.formats.codecs import Table
from quantlib.formats.registry import Family, Word, check_group_size, group_word
from quantlib.formats.scales import DoubleQuantScale, FloatScale

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

_FP4_MAGNITUDES = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
# The zero of code 8 is positive, as in bitsandbytes' table.
FP4_VALUES = _FP4_MAGNITUDES + tuple(0.0 - value for value in _FP4_MAGNITUDES)


def codebook_format(name: str, table: Table, group_size: int | None = 64, double_quant: bool = False) -> Format:
    """A code-book format: w = table[code] * absmax, one absmax per `group_size` weights of a row."""
    size = check_group_size(name, group_size)
    words = [name] + (["channel"] if size is None else [f"g{size}"] * (size != 64)) + ["dq"] * double_quant
    return Format(
        name="-".join(words),
        codec=table,
        block=Block(1, size),
        scale=DoubleQuantScale() if double_quant else FloatScale(torch.float32),
        reciprocal=True,
    )


_WORDS = (
    group_word(),
    Word("channel", "group_size", None, "channel"),
    Word("dq", "double_quant", True, "dq"),
)

FAMILIES = (
    Family("nf4", partial(codebook_format, "nf4", Table(NF4_VALUES)), _WORDS, "QLoRA's 4-bit NormalFloat"),
    Family("fp4", partial(codebook_format, "fp4", Table(FP4_VALUES)), _WORDS, "bitsandbytes' 4-bit float"),
)
