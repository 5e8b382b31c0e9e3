"""The `cpu_rows` layout: codes of sixteen rows side by side, so that a vector of a CPU is one place of sixteen rows.

A strip is 16 rows of W; the last one has what is left. A strip's bytes are those of its rows in `rows`, ordered by words:

    rows        row 0: word 0, word 1, ...   row 1: word 0, word 1, ...   ...
    cpu_rows    word 0: row 0, row 1, ...    word 1: row 0, row 1, ...    ...

A word is 32 bits, or less where the bytes of a row are no multiple of four: the widest of 4, 2, 1 bytes that divides them. It
never mixes two planes of a code (quantlib.formats.packing) where each plane's bytes are whole words. Scales, zeros and minima
lie likewise where each row has its own, in whole words: those of blocks of one row and up to 1024 columns, but for scales that
are quantized themselves (double quantization, K-quants). Shapes and sizes stay as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantlib.formats.base import Format
from quantlib.formats.packing import planes
from quantlib.formats.scales import Parts

STRIP = 16
WORD_BYTES = 4
WIDEST_BLOCK = 1024
COLUMNS = 8
"""That kernels take together: a word of four bits."""
_WORDS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}


def whole_words(fmt: Format, k: int) -> bool:
    """Whether a row's codes are whole runs of COLUMNS, and each plane of them whole 32-bit words."""
    columns = fmt.padded(k)
    return columns % COLUMNS == 0 and all(columns * width % (8 * WORD_BYTES) == 0 for width in planes(fmt.codec.bits))


def _exchange(codes: Tensor, back: bool) -> Tensor:
    """Rows and words of every strip change places; `back`: from words to rows."""
    rows, width = codes.shape
    word = math.gcd(width, WORD_BYTES)
    codes = codes.contiguous() if codes.storage_offset() % word == 0 else codes.clone()
    words = codes.view(-1).view(_WORDS[word]).view(rows, width // word)
    out = torch.empty_like(words)
    whole = rows - rows % STRIP
    for start, stop in ((0, whole), (whole, rows)):
        if start < stop and width:
            height = min(STRIP, stop - start)
            shape = (-1, width // word, height) if back else (-1, height, width // word)
            moved = words[start:stop].reshape(shape).transpose(1, 2)
            out[start:stop].view(moved.shape).copy_(moved)
    return out.view(-1).view(torch.uint8).view(rows, width)


def moved(fmt: Format, n: int, k: int) -> tuple[str, ...]:
    """The parts of a weight [n, k] that lie in strips; `codes` first."""
    names = ["codes"]
    own = fmt.block.rows == 1 and fmt.block.cols is not None and fmt.block.cols <= WIDEST_BLOCK
    if own and fmt.scale.kind not in ("double", "super"):
        for name, spec in fmt.specs(n, k).items():
            if name != "codes" and len(spec.shape) == 2 and spec.shape[1] * spec.dtype.itemsize % WORD_BYTES == 0:
                names.append(name)
    return tuple(names)


def _turn(fmt: Format, n: int, k: int, parts: Parts, back: bool) -> Parts:
    turned = {}
    for name in moved(fmt, n, k):
        part = parts[name].contiguous()
        rows = part.reshape(-1).view(torch.uint8).view(n, -1) if part.numel() else part
        turned[name] = _exchange(rows, back).view(-1).view(part.dtype).view(part.shape) if part.numel() else part.clone()
    return {**parts, **turned}


def forward(fmt: Format, n: int, k: int, parts: Parts) -> Parts:
    """Parts of the rows layout -> the same shapes, in the order above."""
    return _turn(fmt, n, k, parts, back=False)


def inverse(fmt: Format, n: int, k: int, parts: Parts) -> Parts:
    """The exact way back."""
    return _turn(fmt, n, k, parts, back=True)
