"""PatchReport: what patch did, layer by layer, and what it came to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    error         ||decoded - weight|| / ||weight||
    output_error  ||x (decoded - weight)^T|| / ||x weight^T|| over the calibration tokens; None without them
    algorithm     what chose its codes: not the one asked for, where no calibration token reached the layer
    note          what couldn't be done as the algorithm does it
    kernels       rows of x -> the kernel that will run
    """

    name: str
    shape: tuple[int, int]
    format: str
    bits_per_weight: float
    nbytes: int
    original_nbytes: int
    error: float
    activations: str | None
    kernels: dict[int, str]
    algorithm: str = "rtn"
    output_error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class PatchReport:
    """Every quantized layer, and totals over them. Prints as a table; `to_dict` gives plain data."""

    layers: tuple[LayerReport, ...]
    skipped: tuple[str, ...]
    algorithm: str
    seconds: float
    model_nbytes: int = field(default=0)

    @property
    def nbytes(self) -> int:
        """Packed bytes of the quantized layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def original_nbytes(self) -> int:
        """Bytes of the same layers before."""
        return sum(layer.original_nbytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Mean over the quantized weights."""
        weights = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        return 8 * self.nbytes / weights if weights else 0.0

    @property
    def error(self) -> float:
        """Root mean square of the layers' relative errors."""
        return (sum(layer.error**2 for layer in self.layers) / len(self.layers)) ** 0.5 if self.layers else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        totals = {"nbytes": self.nbytes, "original_nbytes": self.original_nbytes, "bits_per_weight": self.bits_per_weight}
        return asdict(self) | totals | {"error": self.error}

    def summary(self) -> str:
        """One line."""
        before, after = self.original_nbytes / 1e6, self.nbytes / 1e6
        return (
            f"{len(self.layers)} layers, {self.bits_per_weight:.3f} bits per weight, {before:.1f} -> {after:.1f} MB, "
            f"relative weight error {self.error:.4f}, {self.algorithm}, {self.seconds:.1f} s"
        )

    def table(self) -> Table:
        """Layers that agree in shape, format and kernels share a line."""
        table = Table(title=self.summary(), title_justify="left")
        calibrated = any(layer.output_error is not None for layer in self.layers)
        figures = ("bits/weight", "MB", "error", *(["output error"] if calibrated else []))
        for header in ("layers", "shape", "format", *figures, "kernel per M"):
            table.add_column(header, justify="right" if header in figures else "left")
        for group in self._groups():
            first = group[0]
            names = first.name if len(group) == 1 else f"{first.name} .. {group[-1].name} ({len(group)})"
            error = sum(layer.error for layer in group) / len(group)
            table.add_row(
                names,
                f"{first.shape[0]} x {first.shape[1]}",
                first.format,
                f"{first.bits_per_weight:.3f}",
                f"{sum(layer.nbytes for layer in group) / 1e6:.2f}",
                f"{error:.4f}",
                *([_mean_text([layer.output_error for layer in group])] if calibrated else []),
                _kernels_text(first.kernels),
            )
        remarks = [] if not self.skipped else [f"left as they are: {_listed(self.skipped)}"]
        notes = dict.fromkeys(layer.note for layer in self.layers if layer.note)
        remarks += [f"{note}: {_listed([layer.name for layer in self.layers if layer.note == note])}" for note in notes]
        if remarks:
            table.caption = "\n".join(remarks)
        return table

    def _groups(self) -> list[list[LayerReport]]:
        groups: dict[tuple[Any, ...], list[LayerReport]] = {}
        for layer in self.layers:
            kind = layer.name.rsplit(".", 1)[-1]
            groups.setdefault((kind, layer.shape, layer.format, tuple(layer.kernels.items())), []).append(layer)
        return list(groups.values())

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Table]:
        yield self.table()

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def _mean_text(errors: Sequence[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{sum(known) / len(known):.4f}" if known else "-"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (" ..." if len(names) > 6 else "")


def _kernels_text(kernels: dict[int, str]) -> str:
    if len(set(kernels.values())) == 1:
        return next(iter(kernels.values()))
    return ", ".join(f"{m}: {kernel}" for m, kernel in kernels.items())
