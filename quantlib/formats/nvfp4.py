"""NVFP4: E2M1 codes, an E4M3 scale per 16 weights of a row, one fp32 multiplier per tensor.

global_scale = absmax(tensor) / (6 * 448), scales = e4m3(absmax(block) / (6 * global_scale)), w = e2m1 * scale * global_scale.
The rule "46" (four-over-six, arXiv 2512.02010) also tries to map a block's absmax to 4, where E2M1 is denser below, and keeps
the better; its global scale uses 256 in place of 448 so that a block's scale can grow by half.
"""

from __future__ import annotations

from typing import Literal

from quantlib.errors import FormatError
from quantlib.formats.base import Format
from quantlib.formats.block import Block
from quantlib.formats.codecs import E2M1
from quantlib.formats.registry import Family, Word
from quantlib.formats.scales import E4M3GlobalScale


def nvfp4_format(scale_rule: Literal["6", "46"] = "6") -> Format:
    """NVFP4; scale_rule "6" maps each block's absmax to 6, "46" to 6 or 4, whichever leaves the smaller error."""
    if scale_rule not in ("6", "46"):
        raise FormatError(f"nvfp4: scale_rule={scale_rule!r} is unknown; expected '6' or '46'")
    if scale_rule == "46":
        return Format("nvfp4-46", E2M1, Block(1, 16), E4M3GlobalScale(top=256.0), divisors=(4.0,))
    return Format("nvfp4", E2M1, Block(1, 16), E4M3GlobalScale())


FAMILIES = (Family("nvfp4", nvfp4_format, (Word("46", "scale_rule", "46", "46"),), "NVIDIA's 4-bit float, E4M3 scales per 16"),)
