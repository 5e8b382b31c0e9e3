"""GGUF's K-quants: integer scales (and minima) per 16 or 32 weights under fp16 super-scales per 256.

q2_k   2-bit codes, 16 blocks of 16, 4-bit scales and minima:  w = code * (d * sc) - dmin * m         2.625 bits per weight
q3_k   3-bit codes, 16 blocks of 16, signed 6-bit scales:      w = (code - 4) * (d * sc)              3.4375
q4_k   4-bit codes, 8 blocks of 32, 6-bit scales and minima:   w = code * (d * sc) - dmin * m         4.5
q5_k   5-bit codes, as q4_k                                                                           5.5
q6_k   6-bit codes, 16 blocks of 16, signed 8-bit scales:      w = (code - 32) * (d * sc)             6.5625

The parts hold exactly the bytes of a GGUF block, column by column instead of block by block; see quantlib.checkpoints.gguf.
Definition of the blocks: ggml-common.h and the `gguf` Python package.
"""

from __future__ import annotations

from quantlib.formats.base import Format
from quantlib.formats.block import Block
from quantlib.formats.codecs import Affine
from quantlib.formats.registry import single
from quantlib.formats.scales import SuperScale

Q2_K = Format("q2_k", Affine(2, signed=False), Block(1, 16), SuperScale(bits=4, count=16, has_minimum=True), zero="minimum")
Q3_K = Format("q3_k", Affine(3, signed=True), Block(1, 16), SuperScale(bits=6, count=16, signed=True))
Q4_K = Format("q4_k", Affine(4, signed=False), Block(1, 32), SuperScale(bits=6, count=8, has_minimum=True), zero="minimum")
Q5_K = Format("q5_k", Affine(5, signed=False), Block(1, 32), SuperScale(bits=6, count=8, has_minimum=True), zero="minimum")
Q6_K = Format("q6_k", Affine(6, signed=True), Block(1, 16), SuperScale(bits=8, count=16, signed=True))

FAMILIES = tuple(single(fmt, f"GGUF {fmt.name.upper()}") for fmt in (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K))
