"""PNG pictures of a comparison: size against KL, and the weight error of every layer. Needs the extra `report` (matplotlib)."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantlib.errors import QuantlibError

if TYPE_CHECKING:
    from quantlib.evaluation.comparison import Variant

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5b4b8a", "#7a7a7a", "#8c510a", "#1b1b1b")
"""Okabe and Ito's palette, distinct for the colour-blind, and four more. A format has one colour in all pictures."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")


def import_pyplot() -> Any:
    """matplotlib.pyplot, drawing to memory. Raises QuantlibError naming the extra to install."""
    try:
        import matplotlib
    except ImportError as error:
        raise QuantlibError("plots need matplotlib: pip install 'quantlib-kernels[report]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def png(figure: Any) -> bytes:
    """A figure as the bytes of a PNG; closes it."""
    buffer = io.BytesIO()
    # The default metadata name the version of matplotlib; without them equal pictures are equal bytes.
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    import_pyplot().close(figure)
    return buffer.getvalue()


def axes(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """(figure, its axes side by side) in this package's look; sizes in inches."""
    options = {"sharey": columns > 1, "squeeze": False, "layout": "constrained"}
    figure, grid = import_pyplot().subplots(1, columns, figsize=(width, height), **options)
    for axis in grid[0]:
        axis.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, grid[0]


def size_against_kl(variants: Sequence[Variant], subtitle: str) -> bytes:
    """PNG: megabytes of the quantized layers (x) against mean KL to the original (y, logarithmic), with standard errors.

    Variants without a divergence are left out; raises QuantlibError where none is left.
    """
    shown = [variant for variant in variants if variant.evaluation.divergence is not None]
    if not shown:
        raise QuantlibError("nothing to plot: no variant was evaluated against a reference")
    figure, (axis,) = axes(7.2, 4.6)
    import matplotlib.ticker

    for place, variant in enumerate(shown):
        divergence = variant.evaluation.divergence
        assert divergence is not None
        x, color = variant.layers_nbytes / 1e6, COLORS[place % len(COLORS)]
        marker = MARKERS[place % len(MARKERS)]
        axis.errorbar(
            x, divergence.kl, divergence.kl_error, fmt=marker, color=color, markersize=8, capsize=3, label=variant.name
        )
        side = {"xytext": (9, 0), "textcoords": "offset points", "va": "center", "fontsize": 9, "color": color}
        axis.annotate(variant.name, (x, divergence.kl), **side)
    axis.set_yscale("log")
    axis.margins(0.2, 0.15)
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    axis.set_xlabel("MB of the quantized layers")
    axis.set_ylabel("mean KL(original || quantized), nats per token")
    axis.set_title(f"Size against divergence: lower left is better\n{subtitle}", loc="left", fontsize=10)
    return png(figure)


def layer_errors(errors: Mapping[str, Mapping[str, float]], of: str = "weight") -> bytes:
    """PNG: relative errors, by depth (left) and by kind of layer (right).

    errors: format -> layer name -> error. The first number in a layer's name is its depth, the last word its kind.
    of: what they are errors of, in a word.
    Raises QuantlibError where there is none.
    """
    if not any(errors.values()):
        raise QuantlibError("nothing to plot: no layer was quantized")
    figure, (by_depth, by_kind) = axes(11, 4.4, columns=2)
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for layers in errors.values() for name in layers))
    for place, (fmt, layers) in enumerate(errors.items()):
        style = {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)], "markersize": 4}
        depths = _mean_by(layers, _depth)
        by_depth.plot(list(depths), list(depths.values()), linewidth=1.2, label=fmt, **style)
        means = _mean_by(layers, lambda name: name.rsplit(".", 1)[-1])
        # Side by side within a kind: formats of about the same error would hide one another.
        shift = (place - (len(errors) - 1) / 2) * 0.7 / len(errors)
        positions = [kinds.index(kind) + shift for kind in means]
        by_kind.plot(positions, list(means.values()), linestyle="none", **style | {"markersize": 6})
    by_depth.set_xlabel("block")
    by_depth.set_ylabel(f"relative {of} error")
    by_depth.set_ylim(bottom=0)
    by_depth.set_title("By depth, mean over a block's layers", loc="left", fontsize=10)
    by_kind.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
    by_kind.set_title("By kind of layer, mean over blocks", loc="left", fontsize=10)
    figure.legend(*by_depth.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    return png(figure)


def _depth(name: str) -> int:
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else 0


def _mean_by(layers: Mapping[str, float], key: Any) -> dict[Any, float]:
    groups: dict[Any, list[float]] = defaultdict(list)
    for name, error in layers.items():
        groups[key(name)].append(error)
    return {group: sum(values) / len(values) for group, values in groups.items()}
