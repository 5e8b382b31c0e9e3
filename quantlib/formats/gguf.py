"""GGUF's plain blocks of 32 weights: one fp16 scale each, and for q4_1 and q5_1 one fp16 offset.

q4_0, q5_0   w = (code - 8) * d, (code - 16) * d     the extreme weight takes the lowest code, so d has a sign    4.5, 5.5 bits
q4_1, q5_1   w = code * d - minimum                  GGUF adds m = -minimum                                       5, 6 bits
q8_0         w = (code - 128) * d                    GGUF keeps code - 128                                        8.5 bits
iq4_nl       w = IQ4_NL_VALUES[code] * d                                                                          4.5 bits

llama.cpp falls back on them where rows don't divide by a K-quant's 256. Definition of the blocks: ggml-common.h and the `gguf`
Python package; their bytes: quantlib.checkpoints.gguf.
"""

from __future__ import annotations

from quantlib.formats.base import Format
from quantlib.formats.block import Block
from quantlib.formats.codecs import Affine, Table
from quantlib.formats.registry import single
from quantlib.formats.scales import FloatScale

IQ4_NL_VALUES = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)

BLOCK = Block(1, 32)

Q4_0 = Format("q4_0", Affine(4), BLOCK, FloatScale(), rule="fullrange")
Q4_1 = Format("q4_1", Affine(4, signed=False), BLOCK, FloatScale(has_minimum=True), zero="minimum")
Q5_0 = Format("q5_0", Affine(5), BLOCK, FloatScale(), rule="fullrange")
Q5_1 = Format("q5_1", Affine(5, signed=False), BLOCK, FloatScale(has_minimum=True), zero="minimum")
Q8_0 = Format("q8_0", Affine(8), BLOCK, FloatScale())
IQ4_NL = Format("iq4_nl", Table(IQ4_NL_VALUES), BLOCK, FloatScale(), rule="fullrange")


FAMILIES = tuple(single(fmt, f"GGUF {fmt.name.upper()}") for fmt in (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL))
