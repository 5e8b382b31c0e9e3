"""OCP Microscaling formats (MX v1.0): MXFP4 and MXFP8, one power-of-two scale (E8M0) per 32 weights of a row."""

from __future__ import annotations

from typing import Literal

from quantlib.errors import FormatError
from quantlib.formats.base import Format
from quantlib.formats.block import Block
from quantlib.formats.codecs import E2M1, E4M3, E5M2
from quantlib.formats.registry import Family, Word
from quantlib.formats.scales import E8M0Scale

_ELEMENTS = {"e2m1": E2M1, "e4m3": E4M3, "e5m2": E5M2}


def mx_format(
    family: Literal["mxfp4", "mxfp8"],
    element: Literal["e4m3", "e5m2"] = "e4m3",
    scale_rule: Literal["floor", "ceil"] = "floor",
) -> Format:
    """MXFP4 (E2M1) or MXFP8 (E4M3, E5M2); scale_rule says how absmax becomes an exponent (scales.E8M0Scale)."""
    if scale_rule not in ("floor", "ceil"):
        raise FormatError(f"{family}: scale_rule={scale_rule!r} is unknown; expected 'floor' or 'ceil'")
    if element not in ("e4m3", "e5m2"):
        raise FormatError(f"{family}: element={element!r} is unknown; expected 'e4m3' or 'e5m2'")
    codec = E2M1 if family == "mxfp4" else _ELEMENTS[element]
    words = [family] + ["e5m2"] * (codec == E5M2) + ["ceil"] * (scale_rule == "ceil")
    return Format("-".join(words), codec, Block(1, 32), E8M0Scale(scale_rule))


def mxfp4_format(scale_rule: Literal["floor", "ceil"] = "floor") -> Format:
    """MXFP4: E2M1 codes under E8M0 scales."""
    return mx_format("mxfp4", scale_rule=scale_rule)


def mxfp8_format(element: Literal["e4m3", "e5m2"] = "e4m3", scale_rule: Literal["floor", "ceil"] = "floor") -> Format:
    """MXFP8: E4M3 or E5M2 codes under E8M0 scales."""
    return mx_format("mxfp8", element, scale_rule)


_RULE = Word("floor|ceil", "scale_rule", lambda match: match.group(0), "ceil")
_ELEMENT = Word("e4m3|e5m2", "element", lambda match: match.group(0), "e5m2")

FAMILIES = (
    Family("mxfp4", mxfp4_format, (_RULE,), "OCP 4-bit float, E8M0 scales per 32"),
    Family("mxfp8", mxfp8_format, (_ELEMENT, _RULE), "OCP 8-bit float, E8M0 scales per 32"),
)
