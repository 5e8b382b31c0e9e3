"""GGUF's K-quants: integer scales (and minima) per 16 or 32 weights under fp16 super-scales per 256.

q4_k   4-bit codes, 8 blocks of 32, 6-bit scales and minima:  w = code * (d * sc) - dmin * m          4.5 bits per weight
q6_k   6-bit codes, 16 blocks of 16, signed 8-bit scales:     w = (code - 32) * (d * sc)              6.5625 bits per weight

The parts hold exactly the bytes of a GGUF block, column by column instead of block by block; see quantlib.checkpoints.gguf.
Definition of the blocks: ggml-common.h and the `gguf` Python package.
"""

from __future__ import annotations

from quantlib.formats.base import Format
from quantlib.formats.block import Block
from quantlib.formats.codecs import Affine
from quantlib.formats.registry import Family
from quantlib.formats.scales import SuperScale

Q4_K = Format("q4_k", Affine(4, signed=False), Block(1, 32), SuperScale(bits=6, count=8, has_minimum=True), zero="minimum")
Q6_K = Format("q6_k", Affine(6, signed=True), Block(1, 16), SuperScale(bits=8, count=16, signed=True))

FAMILIES = (
    Family("q4_k", lambda: Q4_K, summary="GGUF Q4_K"),
    Family("q6_k", lambda: Q6_K, summary="GGUF Q6_K"),
)
