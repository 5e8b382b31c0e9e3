"""The cases that tests run over. tests/test_cases.py fails where a registered format is not covered here."""

from __future__ import annotations

import torch

FORMATS: tuple[str, ...] = (
    "int4-g128",
    "int4-g32-asym",
    "int4-g64-full",
    "int4-channel-bf16",
    "int8-channel",
    "int8-g64-asym-fp32",
    "int3-g128",
    "int3-g64-asym",
    "int2-g64",
    "int2-g32-asym",
    "nf4",
    "nf4-dq",
    "nf4-g128",
    "fp4",
    "fp4-dq",
    "fp8-e4m3",
    "fp8-e5m2",
    "fp8-e4m3-tensor",
    "fp8-e4m3-block128",
    "fp8-e4m3-g128",
    "nvfp4",
    "nvfp4-46",
    "mxfp4",
    "mxfp4-ceil",
    "mxfp8",
    "mxfp8-e5m2",
    "q4_k",
    "q6_k",
    "q2_k",
    "q3_k",
    "q5_k",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "iq4_nl",
)
"""At least one format per family, codec kind, scale kind and zero kind; one row per new format."""

SHAPES: tuple[tuple[int, int], ...] = ((64, 256), (33, 130), (1, 16), (257, 64), (16, 576), (3, 7))
"""(N, K): aligned; odd N and K off every block; one row; one row over a tile; the demo model's width; less than any block."""

MS: tuple[int, ...] = (0, 1, 2, 5, 16, 17, 33)
"""Rows of x: none; each side of every change of kernel."""

DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
