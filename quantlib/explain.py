"""explain: which kernel runs a layer at each batch size, and why not the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import nn

from quantlib import dispatch
from quantlib.errors import QuantlibError
from quantlib.nn import QuantLinear


@dataclass(frozen=True)
class Explanation:
    """Per distinct layer (shape, format, device) and M: every kernel's cost or refusal, the one taken first."""

    rows: tuple[tuple[str, int, tuple[dispatch.Choice, ...]], ...]

    def taken(self, m: int) -> list[str]:
        """The kernels taken at this M, one per distinct layer."""
        return [found[0].kernel for _, batch, found in self.rows if batch == m]

    def table(self) -> Table:
        table = Table(title="kernels, the one taken first", title_justify="left")
        for header in ("layer", "M", "kernel", "predicted us", "why not"):
            table.add_column(header, justify="right" if header in ("M", "predicted us") else "left")
        for label, m, found in self.rows:
            for place, choice in enumerate(found):
                name = f"[bold]{choice.kernel}[/bold]" if place == 0 else choice.kernel
                cost = "" if choice.cost is None else f"{choice.cost:.1f}"
                table.add_row(label if place == 0 else "", str(m) if place == 0 else "", name, cost, choice.refusal or "")
            table.add_section()
        return table

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Table]:
        yield self.table()

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def explain(layer_or_model: nn.Module, batch: tuple[int, ...] = (1, 16, 512)) -> Explanation:
    """For each M in `batch`, the kernel that runs each distinct quantized layer, and every other one's cost or reason.

    Prints as a table. Raises QuantlibError where there is no QuantLinear.
    """
    layers = [(name, module) for name, module in layer_or_model.named_modules() if isinstance(module, QuantLinear)]
    if not layers:
        raise QuantlibError("nothing to explain: no QuantLinear found; call quantlib.patch(model, spec) first")
    rows, seen = [], set()
    for name, layer in layers:
        weight = layer.qweight
        key = (weight.shape, weight.format, weight.device, layer.dtype, layer.activations, layer.kernel)
        if key in seen:
            continue
        seen.add(key)
        n, k = weight.shape
        label = f"{name or 'layer'} {weight.format} [{n}, {k}] {str(layer.dtype).removeprefix('torch.')}"
        for m in batch:
            found = dispatch.choices(dispatch.problem_of("linear", m, weight, layer.dtype, layer.activations))
            if layer.kernel is not None:
                found.sort(key=lambda choice, forced=layer.kernel: choice.kernel != forced)  # type: ignore[misc]
            rows.append((label, m, tuple(found)))
    return Explanation(tuple(rows))
