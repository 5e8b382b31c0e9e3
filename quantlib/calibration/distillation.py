"""tune_scales: scales (and minima) of a quantized model, trained until it answers as the original does; codes stay as they are.

    tokens --original--> log p --+
                                 +--> KL(p || q) --backward--> d/d(decoded weight) --sums per block--> d/d(scale), d/d(minimum)
    tokens --quantized--> log q -+

A scale is trained as a factor of what it was. The model always runs with scales as they are stored: rounding to what the format
can hold is part of the forward pass, and gradients pass it as if it weren't there. Works after any algorithm, for every format.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantlib import dispatch
from quantlib.calibration.walk import check_tokens
from quantlib.errors import QuantlibError
from quantlib.formats.scales import Parts
from quantlib.nn import QuantLinear
from quantlib.running import evaluating, logits_of, tracked
from quantlib.tensor import QuantizedTensor

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises; from then on it falls to nothing, by a cosine."""


@dataclass(frozen=True)
class ScaleTuning:
    """What tuning did: KL(original || model) in nats per token on the held-out samples before and after, and the mean over the
    samples of each step. `kept`: whether the new scales were better there, and so stayed."""

    before: float
    after: float
    losses: tuple[float, ...]
    seconds: float
    kept: bool

    def __str__(self) -> str:
        fate = "" if self.kept else "; no better, so the scales stay as they were"
        return f"KL {self.before:.4f} -> {self.after:.4f} in {len(self.losses)} steps, {self.seconds:.0f} s{fate}"


def tune_scales(
    model: nn.Module,
    reference: nn.Module,
    tokens: Tensor,
    *,
    learning_rate: float = 2e-3,
    batch_size: int = 1,
    held_out: int = 8,
    progress: bool = True,
) -> ScaleTuning:
    """Train the scales of every QuantLinear on KL(reference || model), one pass over the samples, in place.

    model, reference   the quantized model and the original, called with ids [B, T]; logits [B, T, V] or an object's `.logits`
    tokens             int64 [samples, T]; the last `held_out` of them aren't trained on, but say whether training helped
    learning_rate      Adam's, for factors that start at 1
    batch_size         samples per step, run one after another

    Without improvement on the held-out samples the scales stay as they were. Raises QuantlibError where nothing is quantized,
    there are too few samples, or the loss is no number.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    if not layers:
        raise QuantlibError("tune_scales finds no QuantLinear in the model; call quantlib.patch first")
    if held_out < 1 or batch_size < 1 or len(tokens) < held_out + batch_size:
        raise QuantlibError(
            f"{len(tokens)} samples are too few for steps of {batch_size} and {held_out} held-out samples (at least one): "
            "give more, or lower held_out"
        )
    if not 0 < learning_rate < math.inf:
        raise QuantlibError(f"learning_rate={learning_rate} must be a number above zero")
    check_tokens(model, tokens)
    started = time.perf_counter()
    training, judging = tokens[:-held_out], tokens[-held_out:]
    tuned = [_Tuned(layer) for layer in layers]
    with _frozen(model), _frozen(reference):
        before = _mean_kl(model, reference, judging)
        losses = list(_train(model, reference, training, tuned, learning_rate, batch_size, progress))
        for one in tuned:
            one.finish()
        after = _mean_kl(model, reference, judging)
    kept = after < before
    if not kept:
        for one in tuned:
            one.restore()
    return ScaleTuning(before, after if kept else before, tuple(losses), time.perf_counter() - started, kept)


class _Tuned:
    """A layer whose scales are trained: factors of its scales, and shifts of its minima in units of the scale."""

    def __init__(self, layer: QuantLinear) -> None:
        self.layer = layer
        self.original = layer.qweight
        rows = self.original.to_layout("rows")
        self.format, self.shape, self.rows = rows.format, rows.shape, rows.parts
        numbers = self.format.effective(self.rows)
        self.scale, self.minimum = numbers.scale, numbers.minimum
        self.factor = torch.ones_like(self.scale, requires_grad=True)
        self.shift = None if self.minimum is None else torch.zeros_like(self.scale, requires_grad=True)
        self.shared: Parts = {key: part for key, part in self.rows.items() if key == "global_scale"}
        self.kept = [name for name in self.rows if name in ("codes", "zeros")]

    @property
    def parameters(self) -> list[Tensor]:
        return [self.factor] + ([] if self.shift is None else [self.shift])

    def weight(self) -> QuantizedTensor:
        """The weight under the present scales, as stored."""
        with torch.no_grad():
            minimum = None
            if self.shift is not None and self.minimum is not None:
                minimum = (self.minimum + self.scale.abs() * self.shift).clamp(min=0)
            found = self.format.scale.store(self.scale * self.factor, minimum, self.shared)
            parts = {**{name: self.rows[name] for name in self.kept}, **found}
            specs = self.format.specs(*self.shape)
            parts = {name: parts[name].contiguous() for name in specs}
        return QuantizedTensor(self.format, self.shape, parts)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.layer.bias
        shift = torch.empty(0) if self.shift is None else self.shift
        y: Tensor = _TunedLinear.apply(x, self.factor, shift, self)
        return y if bias is None else y + bias.to(y.dtype)

    def gradients(self, dw: Tensor, weight: QuantizedTensor) -> tuple[Tensor, Tensor | None]:
        """d loss / d decoded weight [N, K] -> d loss / d factors and shifts, through w = units * scale - minimum."""
        numbers = self.format.effective(weight.parts)
        decoded = dispatch.run("dequantize", torch.empty(0, device=dw.device), weight).to(torch.float32)
        block, more = self.format.block, self.format.padded(self.shape[1]) - self.shape[1]
        dw, decoded = (nn.functional.pad(part, (0, more)) for part in (dw, decoded))
        sums = block.split(dw * decoded).sum(-1)
        scale = torch.where(numbers.scale == 0, 1.0, numbers.scale)
        if self.shift is None or numbers.minimum is None:
            return sums * (self.scale / scale), None
        plain = block.split(dw).sum(-1)
        return (sums + numbers.minimum * plain) * (self.scale / scale), -plain * self.scale.abs()

    def finish(self) -> None:
        """Put the trained scales into the layer."""
        self._put(self.weight())

    def restore(self) -> None:
        self._put(self.original)

    def _put(self, weight: QuantizedTensor) -> None:
        layout = self.original.layout
        self.layer._set_parts(weight.to_layout(layout).parts, layout)


class _TunedLinear(torch.autograd.Function):
    """y = x W^T under scales that are being trained; backward by the same packed weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, shift: Tensor, tuned: _Tuned) -> Tensor:  # noqa: ARG004 for backward
        weight = tuned.weight()
        ctx.tuned, ctx.weight = tuned, weight
        ctx.save_for_backward(x)
        y = dispatch.run("linear", x.reshape(-1, x.shape[-1]), weight, None, None, None, False)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])
        dx = dispatch.run("dgrad", flat, ctx.weight).view(x.shape) if ctx.needs_input_grad[0] else None
        dw = flat.T.to(torch.float32) @ x.reshape(-1, x.shape[-1]).to(torch.float32)
        dfactor, dshift = ctx.tuned.gradients(dw, ctx.weight)
        return dx, dfactor, dshift, None


def _train(
    model: nn.Module,
    reference: nn.Module,
    tokens: Tensor,
    tuned: list[_Tuned],
    learning_rate: float,
    batch_size: int,
    progress: bool,
) -> Iterator[float]:
    optimizer = torch.optim.Adam([part for one in tuned for part in one.parameters], lr=learning_rate, betas=(0.9, 0.95))
    batches = tokens[: len(tokens) // batch_size * batch_size].split(batch_size)
    for number, batch in enumerate(tracked(batches, progress, "tuning scales")):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule((number + 1) / len(batches))
        total = 0.0
        with _replaced(tuned):
            for ids in batch:
                loss = _kl(model, reference, ids[None]) / len(batch)
                loss.backward()
                total += float(loss.detach())
        if not math.isfinite(total):
            raise QuantlibError(f"the loss of step {number} is {total}: lower learning_rate, or look for NaN weights")
        optimizer.step()
        if not all(bool(torch.isfinite(part).all()) for one in tuned for part in one.parameters):
            raise QuantlibError(f"after step {number} scales are no numbers any more: lower learning_rate={learning_rate}")
        optimizer.zero_grad(set_to_none=True)
        yield total


def _schedule(done: float) -> float:
    return done / WARM_UP if done < WARM_UP else 0.5 + 0.5 * math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))


def _kl(model: nn.Module, reference: nn.Module, ids: Tensor) -> Tensor:
    """Mean KL(reference || model) per position, in fp32."""
    with torch.no_grad():
        wanted = torch.log_softmax(logits_of(reference, ids).float(), dim=-1)
    found = torch.log_softmax(logits_of(model, ids).float(), dim=-1)
    return nn.functional.kl_div(found.flatten(0, -2), wanted.flatten(0, -2), log_target=True, reduction="batchmean")


@torch.no_grad()
def _mean_kl(model: nn.Module, reference: nn.Module, tokens: Tensor) -> float:
    return sum(float(_kl(model, reference, ids[None])) for ids in tokens) / len(tokens)


@contextmanager
def _replaced(tuned: list[_Tuned]) -> Iterator[None]:
    """Layers run with the scales in training."""
    for one in tuned:
        one.layer.forward = one.forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for one in tuned:
            one.layer.__dict__.pop("forward", None)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and nothing of the model's own learns; both as before afterwards."""
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in learning:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter, wanted in learning:
            parameter.requires_grad_(wanted)
