"""Pictures of a run: a roofline, and a heat map of ratios. Equal rows give equal bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.data import problem_bytes
from bench.results import Row
from quantlib.evaluation.plots import COLORS, MARKERS, import_pyplot


def write_plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """roofline.png and ratios.png in `folder`, each only where rows hold what it shows; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, picture in (("roofline.png", roofline(rows)), ("ratios.png", ratios(rows))):
        if picture is not None:
            (folder / name).write_bytes(picture)
            written.append(folder / name)
    return written


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    import_pyplot().close(figure)
    return buffer.getvalue()


def roofline(rows: Sequence[Row]) -> bytes | None:
    """PNG: flops per byte (x) against TFLOP/s (y) of what quantlib takes, under the ceilings measured in the same run."""
    shown = [row for row in rows if row.taken and row.us is not None and row.tflops and row.operation in ("linear", "dgrad")]
    if not shown:
        return None
    figure, axis = import_pyplot().subplots(figsize=(7.6, 5.0), layout="constrained")
    kinds = list(dict.fromkeys((row.operation, row.format) for row in shown))
    for place, (operation, fmt) in enumerate(kinds):
        points = [(_intensity(row), row.tflops) for row in shown if (row.operation, row.format) == (operation, fmt)]
        style = {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)]}
        label = fmt if operation == "linear" else f"{fmt}, dX"
        axis.plot(*zip(*sorted(points), strict=True), linestyle="none", markersize=6, label=label, **style)
    _draw_roof(axis, shown)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel("flops per byte of the problem")
    axis.set_ylabel("TFLOP/s")
    devices = ", ".join(dict.fromkeys(row.device for row in shown))
    axis.set_title(f"What quantlib takes, under what the device reaches\n{devices}", loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=9)
    return _png(figure)


def _intensity(row: Row) -> float:
    return row.case.flops / problem_bytes(row.case)


def _draw_roof(axis: Any, rows: Sequence[Row]) -> None:
    row = next((row for row in rows if row.copy_gbps and row.matmul_tflops), None)
    if row is None or row.copy_gbps is None or row.matmul_tflops is None:
        return
    span = [_intensity(entry) for entry in rows]
    ridge = row.matmul_tflops * 1e3 / row.copy_gbps
    xs = sorted([min(*span, ridge) / 2, ridge, max(*span, ridge) * 2])
    ys = [min(x * row.copy_gbps / 1e3, row.matmul_tflops) for x in xs]
    label = f"measured: {row.copy_gbps:.0f} GB/s, {row.matmul_tflops:.3g} TFLOP/s"
    axis.plot(xs, ys, color="#444444", linewidth=1.2, label=label)


def ratios(rows: Sequence[Row]) -> bytes | None:
    """PNG: per format and shape (down) and M (across), the fastest peer's time over quantlib's; above 1 quantlib leads."""
    cells = {
        (f"{row.format} {row.n}x{row.k}" + (" dX" if row.operation == "dgrad" else ""), row.m): min(row.ratios.values())
        for row in rows
        if row.taken and row.ratios and row.operation in ("linear", "dgrad") and row.activations is None
    }
    if not cells:
        return None
    names = sorted({name for name, _ in cells}, key=lambda name: (name.endswith(" dX"), name))
    ms = sorted({m for _, m in cells})
    grid = [[cells.get((name, m), math.nan) for m in ms] for name in names]
    size = (2.8 + 0.75 * len(ms), 1.3 + 0.34 * len(names))
    figure, axis = import_pyplot().subplots(figsize=size, layout="constrained")
    shades = [[math.log2(value) if value == value else math.nan for value in line] for line in grid]
    axis.imshow(shades, cmap="RdBu", vmin=-2.2, vmax=2.2, aspect="auto")
    for down, line in enumerate(grid):
        for across, value in enumerate(line):
            if value == value:
                axis.text(across, down, f"{value:.2f}", ha="center", va="center", fontsize=8)
    axis.set_xticks(range(len(ms)), [str(m) for m in ms])
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xlabel("M")
    axis.set_title("Fastest peer's time over quantlib's: above 1 quantlib leads", loc="left", fontsize=10)
    return _png(figure)


def cpu_picture(rows: Sequence[Row]) -> bytes | None:
    """PNG of runs of bench.cpu: per M everyone's speed over torch's bf16 product, and tokens per second over torch's."""
    base = {row.m: row.us for row in rows if row.operation == "linear" and row.contestant == "torch_bf16" and row.us}
    lines: dict[tuple[str, bool], list[tuple[int, float]]] = {}
    for row in rows:
        if row.operation == "linear" and row.us and row.m in base and row.contestant != "torch_bf16":
            name = f"quantlib {row.numbers}" if row.ours else row.contestant
            lines.setdefault((name, row.ours), []).append((row.m, (base[row.m] or 0.0) / row.us))
    spoken = {row.contestant: row.us for row in rows if row.operation == "generate" and row.us}
    bars = {name: spoken["torch bf16"] / us for name, us in spoken.items()} if "torch bf16" in spoken else {}
    if not lines or not bars:
        return None
    figure, (left, right) = import_pyplot().subplots(1, 2, figsize=(13.0, 5.4), layout="constrained")
    for place, ((name, ours), points) in enumerate(sorted(lines.items(), key=lambda item: not item[0][1])):
        style = {"color": COLORS[place % len(COLORS)], "linestyle": "-" if ours else "--"}
        left.plot(*zip(*sorted(points), strict=True), marker=MARKERS[place % len(MARKERS)], markersize=4, label=name, **style)
    left.axhline(1.0, color="#444444", linewidth=0.8)
    left.set_xscale("log", base=2)
    left.set_xticks(sorted(base), [str(m) for m in sorted(base)])
    left.set_yscale("log")
    left.set_xlabel("M")
    left.set_title("A layer: speed over torch's bf16 product", loc="left", fontsize=10)
    left.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
    left.legend(frameon=False, fontsize=7, ncols=2)
    names = sorted(bars, key=lambda name: bars[name])
    right.barh(
        names, [bars[name] for name in names], color=[COLORS[0] if name.startswith("quantlib") else COLORS[7] for name in names]
    )
    right.tick_params(axis="y", labelsize=7)
    right.set_title("The demo model: tokens per second over torch's in bf16", loc="left", fontsize=10)
    return _png(figure)
