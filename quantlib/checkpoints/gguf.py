"""GGUF blocks <-> the parts of our rows layout, bit for bit in both directions.

A GGUF row is a run of blocks of 256 or 32 weights, each with its own scales inside; the rows layout keeps every kind of number
in a tensor of its own. No value changes on the way: codes, integer scales and fp16 numbers are moved, never recomputed. Where
they lie in a block: quantlib.checkpoints.gguf_blocks. Nothing here needs the `gguf` package.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.checkpoints.gguf_blocks import BLOCK_TYPES, BlockType
from quantlib.errors import CheckpointError
from quantlib.formats.base import Format
from quantlib.formats.scales import Parts


def read_blocks(fmt: Format, data: Tensor, k: int, name: str = "weight") -> Parts:
    """GGUF bytes uint8 [N, blocks * bytes per block] -> the parts of a weight [N, k] in the rows layout.

    Raises CheckpointError where the format has no GGUF blocks, or the bytes are not those of rows of k weights.
    """
    kind = block_type(fmt, name)
    blocks = _blocks_per_row(kind, fmt, k, name)
    if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] != blocks * kind.nbytes:
        raise CheckpointError(
            f"{name}: {kind.name} rows of {k} weights are uint8 [N, {blocks * kind.nbytes}], "
            f"found {str(data.dtype).removeprefix('torch.')} {list(data.shape)}"
        )
    return kind.to_parts(data.contiguous().view(data.shape[0], blocks, kind.nbytes))


def write_blocks(fmt: Format, parts: Parts, n: int, k: int, name: str = "weight") -> Tensor:
    """The parts of a weight [n, k] in the rows layout -> GGUF bytes uint8 [n, blocks * bytes per block]; inverts `read_blocks`.

    Raises CheckpointError where the format has no GGUF blocks or k is no multiple of its blocks, ShapeError for wrong parts.
    """
    kind = block_type(fmt, name)
    blocks = _blocks_per_row(kind, fmt, k, name)
    fmt.check(parts, n, k, name)
    return kind.from_parts(parts, blocks).reshape(n, blocks * kind.nbytes)


def block_type(fmt: Format, name: str = "weight") -> BlockType:
    """The GGUF type that holds a format. Raises CheckpointError where there is none."""
    if fmt.name not in BLOCK_TYPES:
        raise CheckpointError(f"{name}: {fmt.name} has no GGUF blocks; those that have: {', '.join(BLOCK_TYPES)}")
    return BLOCK_TYPES[fmt.name]


def _blocks_per_row(kind: BlockType, fmt: Format, k: int, name: str) -> int:
    if k % kind.weights:
        raise CheckpointError(
            f"{name}: rows of {k} weights can't lie in {fmt.name} blocks of {kind.weights}; choose a format with smaller blocks"
        )
    return k // kind.weights
