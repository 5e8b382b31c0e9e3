"""What an evaluation found: perplexity with its standard error, and how far a model's predictions lie from a reference's."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantlib.errors import QuantlibError

if TYPE_CHECKING:
    from rich.table import Table


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of fp64 values [P] and its standard error (0 for a single value)."""
    mean = float(values.mean())
    return mean, float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Ratio:
    """ln(perplexity / reference's perplexity) with the standard error of the PAIRED differences: both models saw the same
    tokens, so most of the text's own variance cancels."""

    ln_ratio: float
    ln_ratio_error: float

    @property
    def ratio(self) -> float:
        return math.exp(self.ln_ratio)


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) in nats over the scored positions, and what else says how much predictions moved.

    top1          share of positions whose most probable token is the reference's
    delta_p_rms   root mean square of the change of the right token's probability, delta_p_mean its mean
    """

    kl: float
    kl_error: float
    kl_median: float
    kl_p999: float
    kl_p99: float
    kl_p10: float
    kl_p1: float
    kl_max: float
    top1: float
    top1_error: float
    delta_p_rms: float
    delta_p_mean: float
    reference_perplexity: float
    ln_ratio: float
    ln_ratio_error: float

    @classmethod
    def from_samples(cls, kl: Tensor, same_top: Tensor, nll: Tensor, reference_nll: Tensor) -> Divergence:
        """From one value per scored position, all [P]: KL, whether the top token agrees, and both negative log-likelihoods."""
        kl, nll, reference_nll = kl.double(), nll.double(), reference_nll.double()
        points = torch.tensor([0.5, 0.999, 0.99, 0.10, 0.01], dtype=torch.float64)
        median, p999, p99, p10, p1 = torch.quantile(kl, points).tolist()
        delta_p = (-nll).exp() - (-reference_nll).exp()
        return cls(
            *mean_and_error(kl),
            *(median, p999, p99, p10, p1, float(kl.max())),
            *mean_and_error(same_top.double()),
            float(delta_p.square().mean().sqrt()),
            float(delta_p.mean()),
            math.exp(float(reference_nll.mean())),
            *mean_and_error(nll - reference_nll),
        )


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The score of one model on one set of windows.

    protocol, window, windows, tokens    how it was taken: name, tokens per window, windows, tokens scored
    digest       names the token ids and positions; evaluations with different digests can't be compared
    nll          fp32 [tokens], the negative log-likelihood of each scored token in nats
    divergence   against the reference model, where one was given
    seconds      wall time
    """

    protocol: str
    window: int
    windows: int
    tokens: int
    digest: str
    nll: Tensor = field(repr=False)
    divergence: Divergence | None = None
    seconds: float = 0.0

    @property
    def cross_entropy(self) -> float:
        """Mean negative log-likelihood in nats per token."""
        return float(self.nll.double().mean())

    @property
    def perplexity(self) -> float:
        return math.exp(self.cross_entropy)

    @property
    def perplexity_error(self) -> float:
        """Standard error of the perplexity (first order)."""
        return self.perplexity * mean_and_error(self.nll.double())[1]

    @property
    def protocol_text(self) -> str:
        """The protocol in words, e.g. "protocol A, 16 windows of 512, 8176 tokens scored"."""
        return f"protocol {self.protocol}, {self.windows} windows of {self.window}, {self.tokens} tokens scored"

    def ratio_to(self, reference: Evaluation) -> Ratio:
        """ln of the perplexities' ratio with its paired standard error.

        Raises QuantlibError where the two were not taken on the same tokens under the same protocol.
        """
        if (self.protocol, self.window) != (reference.protocol, reference.window):
            raise QuantlibError(
                f"evaluations can't be compared across protocols: {self.protocol_text} against {reference.protocol_text}; "
                "evaluate both models in the same way"
            )
        if self.digest != reference.digest:
            raise QuantlibError(
                f"evaluations can't be compared: their tokens differ (digests {self.digest} and {reference.digest}); "
                "evaluate both models on the same text with the same tokenizer"
            )
        return Ratio(*mean_and_error(self.nll.double() - reference.nll.double()))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the per-token values, as plain numbers and strings."""
        return {
            "protocol": self.protocol,
            "window": self.window,
            "windows": self.windows,
            "tokens": self.tokens,
            "digest": self.digest,
            "perplexity": self.perplexity,
            "perplexity_error": self.perplexity_error,
            "cross_entropy": self.cross_entropy,
            "seconds": self.seconds,
            "divergence": None if self.divergence is None else asdict(self.divergence),
        }

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        text = f"perplexity {self.perplexity:.4f} ± {self.perplexity_error:.4f} ({self.protocol_text})"
        if self.divergence is None:
            return text
        d = self.divergence
        return f"{text}; KL {d.kl:.5f} ± {d.kl_error:.5f}, same top token {d.top1:.2%}"

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table("", "value", title=self.protocol_text, title_justify="left", show_header=False)
        for name, value in _lines(self):
            table.add_row(name, value)
        return table


def _lines(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The rows of the printed table."""
    lines = [
        ("perplexity", f"{evaluation.perplexity:.4f} ± {evaluation.perplexity_error:.4f}"),
        ("cross entropy", f"{evaluation.cross_entropy:.5f} nats per token"),
    ]
    d = evaluation.divergence
    if d is not None:
        lines += [
            ("reference perplexity", f"{d.reference_perplexity:.4f}"),
            ("ln(perplexity ratio)", f"{d.ln_ratio:.5f} ± {d.ln_ratio_error:.5f} (paired)"),
            ("KL, mean", f"{d.kl:.5f} ± {d.kl_error:.5f} nats"),
            ("KL, median", f"{d.kl_median:.5f}"),
            ("KL, 99.9% / 99%", f"{d.kl_p999:.4f} / {d.kl_p99:.4f} (maximum {d.kl_max:.4f})"),
            ("KL, 10% / 1%", f"{d.kl_p10:.6f} / {d.kl_p1:.6f}"),
            ("same top token", f"{d.top1:.3%} ± {d.top1_error:.3%}"),
            ("RMS change of p", f"{d.delta_p_rms:.3%} (mean {d.delta_p_mean:+.3%})"),
        ]
    return [*lines, ("token digest", evaluation.digest), ("time", f"{evaluation.seconds:.1f} s")]
