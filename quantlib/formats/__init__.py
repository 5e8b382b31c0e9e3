"""Level 0: what the numbers ARE. One file per family; registering its FAMILIES here is all that a new format needs."""

from quantlib.formats import codebook, fp8, gguf, integer, kquants, mx, nvfp4
from quantlib.formats.base import Format
from quantlib.formats.registry import Family, families, get_format, list_formats, register, unregister

for _module in (integer, codebook, fp8, nvfp4, mx, kquants, gguf):
    for _family in _module.FAMILIES:
        register(_family)

__all__ = ["Family", "Format", "families", "get_format", "list_formats", "register", "unregister"]
