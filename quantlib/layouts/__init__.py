"""Level 1: where the bits LIE. A layout is a named, exactly reversible permutation of a QuantizedTensor's parts.

`rows` is the canonical layout: what formats define, what is saved, tested and exchanged. A kernel that wants another order
declares a Layout; `forward` and `inverse` stand side by side and are property-tested against each other for every format
that `supports` admits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantlib.errors import ShapeError
from quantlib.formats.base import Format
from quantlib.formats.scales import Parts
from quantlib.layouts import fragments, strips


@dataclass(frozen=True)
class Layout:
    """forward: rows parts -> own parts; inverse: the exact way back; supports: None, or why this format can't lie so.

    Both functions take (format, n, k, parts) and return new parts; they never write to what they are given.
    """

    name: str
    forward: Callable[[Format, int, int, Parts], Parts]
    inverse: Callable[[Format, int, int, Parts], Parts]
    supports: Callable[[Format], str | None] = lambda fmt: None


def _identity(fmt: Format, n: int, k: int, parts: Parts) -> Parts:
    return dict(parts)


ROWS = Layout("rows", _identity, _identity)

_LAYOUTS: dict[str, Layout] = {}


def register_layout(layout: Layout) -> None:
    """Make a layout known by its name. Raises ShapeError where the name is taken."""
    if layout.name in _LAYOUTS:
        raise ShapeError(f"layout {layout.name!r} is registered already")
    _LAYOUTS[layout.name] = layout


def unregister_layout(name: str) -> None:
    """Take a layout out again (for tests)."""
    _LAYOUTS.pop(name, None)


def get_layout(name: str) -> Layout:
    """The layout of that name. Raises ShapeError naming the known ones."""
    if name not in _LAYOUTS:
        raise ShapeError(f"unknown layout {name!r}; known: {', '.join(_LAYOUTS)}")
    return _LAYOUTS[name]


def list_layouts() -> list[Layout]:
    """Every registered layout, `rows` first."""
    return list(_LAYOUTS.values())


FRAGMENTS = Layout("fragments", fragments.forward, fragments.inverse, fragments.supports)

CPU_ROWS = Layout("cpu_rows", strips.forward, strips.inverse)

register_layout(ROWS)
register_layout(FRAGMENTS)
register_layout(CPU_ROWS)
