"""A comparison of one model in several formats: what was measured of each, and the table of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantlib.evaluation.result import Evaluation

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Variant:
    """The model in one format.

    name                 the format's spec string, or what the original is in
    evaluation           its score; with a divergence unless it is the original
    bits_per_weight      of the quantized layers (of the same layers, for the original)
    layers_nbytes        bytes of those layers' weights; nbytes: of the whole model, embedding included
    text                 what it generated, greedily; tokens_per_second: how fast, prompt included, on this machine
    layer_errors         layer -> relative weight error; output_errors: -> relative error of its output on the calibration
                         tokens, as it was when the layer was quantized, where there were any
    kernels              rows of x -> names of the kernels that ran
    """

    name: str
    evaluation: Evaluation
    bits_per_weight: float
    layers_nbytes: int
    nbytes: int
    text: str
    tokens_per_second: float
    layer_errors: dict[str, float] = field(default_factory=dict)
    kernels: dict[int, list[str]] = field(default_factory=dict)
    output_errors: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "name": self.name,
            "bits_per_weight": self.bits_per_weight,
            "layers_nbytes": self.layers_nbytes,
            "nbytes": self.nbytes,
            "tokens_per_second": self.tokens_per_second,
            "text": self.text,
            "evaluation": self.evaluation.to_dict(),
            "kernels": {str(m): names for m, names in self.kernels.items()},
            "layer_errors": self.layer_errors,
            "output_errors": self.output_errors,
        }


@dataclass(frozen=True)
class Comparison:
    """The original and its quantized variants.

    title    what was compared
    caveat   what the reader must know about the model before believing the figures
    prompt   what the texts answer
    facts    versions and machine
    """

    title: str
    original: Variant
    variants: tuple[Variant, ...]
    prompt: str
    caveat: str = ""
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def protocol(self) -> str:
        return self.original.evaluation.protocol_text

    def rows(self) -> list[dict[str, str]]:
        """One row of printed figures per variant, the original first; HEADERS names the columns."""
        return [self._row(variant) for variant in (self.original, *self.variants)]

    def _row(self, variant: Variant) -> dict[str, str]:
        divergence = variant.evaluation.divergence
        speed, base = variant.tokens_per_second, self.original.tokens_per_second
        cells = (
            variant.name,
            f"{variant.bits_per_weight:.3f}",
            f"{variant.layers_nbytes / 1e6:.1f}",
            f"{variant.nbytes / 1e6:.1f}",
            f"{variant.evaluation.perplexity:.3f}",
            "-" if divergence is None else f"{divergence.kl:.4f}",
            "-" if divergence is None else f"{divergence.top1:.1%}",
            f"{speed:.1f}",
            f"{speed / base:.2f}x",
        )
        return dict(zip(HEADERS, cells, strict=True))

    def table(self) -> Table:
        """The figures as a rich table that fits 80 columns."""
        from rich import box
        from rich.table import Table

        table = Table(title=f"{self.title}\n{self.protocol}", caption=self.caveat, box=box.SIMPLE_HEAD)
        table.padding, table.pad_edge = (0, 1, 0, 0), False
        table.title_justify = table.caption_justify = "left"
        for header in HEADERS:
            words = header.replace("/", "/\n").replace(" ", "\n")
            table.add_column(words, justify="left" if header == HEADERS[0] else "right", no_wrap=True)
        for row in self.rows():
            table.add_row(*row.values())
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "title": self.title,
            "protocol": self.protocol,
            "caveat": self.caveat,
            "prompt": self.prompt,
            "facts": self.facts,
            "original": self.original.to_dict(),
            "variants": [variant.to_dict() for variant in self.variants],
        }


HEADERS = ("format", "bits/weight", "MB layers", "MB model", "perplexity", "KL", "top-1", "tok/s", "speed")
