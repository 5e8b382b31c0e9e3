"""plan: which layer gets which format, so that a model of a given size answers as much like the original as it can.

calibration --> sensitivity of each layer to each format: half of sum_n G_n sum_k (decoded - weight)_nk^2 E[x_k^2]
                G_n: mean square of d(log-likelihood)/d(output n); by both, the KL that the error costs, to second order
groups of layers of about one sensitivity, in one format --measured KL / predicted--> a factor per group: second order overrates
                large costs, and knows nothing of errors that add up
uniform formats --measured KL / predicted--> a factor per format
budget --Lagrangian: least predicted KL + price * bytes--> formats by layer --measured--> Plan, or the best uniform format
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.algorithms import Algorithm, get_algorithm
from quantlib.algorithms.statistics import InputStatistics
from quantlib.calibration.statistics import Statistics, calibrate
from quantlib.calibration.walk import check_tokens
from quantlib.errors import CheckpointError, QuantlibError
from quantlib.evaluation import ReferenceLogits, capture_reference, evaluate, plots
from quantlib.evaluation.report import write_atomically
from quantlib.evaluation.windows import PROTOCOLS, TokenWindows
from quantlib.formats import get_format
from quantlib.formats.base import Format
from quantlib.patch import patch
from quantlib.presets import formats_by_layer
from quantlib.running import evaluating, logits_of, structural_copy
from quantlib.selection import DEFAULT_SKIP, linear_layers, select_formats

FORMATS = ("int3-g32", "int4-g64", "nvfp4", "q4_k", "q4_1", "q5_k", "q6_k", "int8-g64")
"""What a plan chooses from where the caller names nothing. K-quants are the best of their size where rows are whole blocks of
256 columns, and large where they are padded; so each width has a format of small blocks beside them."""

GROUPS = 12
"""So many groups of layers are measured by themselves."""

VERSION = 1


@dataclass(frozen=True)
class Measured:
    """A choice of formats that was run: mean KL(original || model) in nats, and the bytes of the quantized layers."""

    name: str
    kl: float
    nbytes: int


class Plan(Mapping[str, str]):
    """Layer name -> spec string; `quantlib.patch` takes it as it is.

    budget      the words that it was made for
    nbytes      of the layers; bits_per_weight: their mean
    predicted   KL by the sensitivities
    measured    what was run: the plan itself under the name "plan", uniform formats under theirs, and "mix" where a mixture was
                worse than the uniform format that the plan then is
    sensitivity layer -> format -> predicted KL
    """

    def __init__(
        self,
        formats: Mapping[str, str],
        budget: str,
        nbytes: int,
        bits_per_weight: float,
        predicted: float,
        measured: Iterable[Measured] = (),
        sensitivity: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        self._formats = dict(formats)
        self.budget, self.nbytes, self.bits_per_weight, self.predicted = budget, nbytes, bits_per_weight, predicted
        self.measured = tuple(measured)
        self.sensitivity = {layer: dict(row) for layer, row in (sensitivity or {}).items()}

    def __getitem__(self, name: str) -> str:
        return self._formats[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for spec in self._formats.values():
            counts[spec] = counts.get(spec, 0) + 1
        mix = ", ".join(f"{count} {spec}" for spec, count in sorted(counts.items(), key=lambda item: -item[1]))
        kl = "; ".join(f"{found.name} {found.kl:.4f} ({found.nbytes / 1e6:.1f} MB)" for found in self.measured)
        return f"{self.budget}: {self.bits_per_weight:.3f} bits per weight, {self.nbytes / 1e6:.1f} MB: {mix}. KL: {kl}"

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON; the file appears whole or not at all."""
        facts = {
            "version": VERSION,
            "budget": self.budget,
            "nbytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "predicted": self.predicted,
            "measured": [asdict(found) for found in self.measured],
            "formats": self._formats,
            "sensitivity": self.sensitivity,
        }
        target = Path(path)
        try:
            write_atomically(target, (json.dumps(facts, indent=1) + "\n").encode())
        except OSError as error:
            raise CheckpointError(f"the plan can't be written to {target}: {error}") from error
        return target

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote. Raises CheckpointError for another file, FormatError for an unknown format."""
        try:
            facts = json.loads(Path(path).read_text())
            if facts["version"] != VERSION:
                raise CheckpointError(f"{path} has version {facts['version']!r}; this quantlib reads version {VERSION}")
            formats = {layer: get_format(spec).name for layer, spec in facts["formats"].items()}
            measured = [Measured(**found) for found in facts["measured"]]
            numbers = facts["budget"], facts["nbytes"], facts["bits_per_weight"], facts["predicted"]
            return cls(formats, *numbers, measured, facts["sensitivity"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} is no plan that quantlib wrote: {error}") from error


def plan(
    model: nn.Module,
    budget: str,
    calibration: Tensor,
    *,
    formats: Sequence[str | Format] = FORMATS,
    skip: Iterable[str] = DEFAULT_SKIP,
    algorithm: str | Algorithm = "rtn-importance",
    judged: int = 8,
    watch: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Choose a format for every linear layer under a budget of bytes. The model stays as it is.

    budget       "4.5bpw" (mean bits per weight of the layers), "80MB" (10^6 bytes of the layers) or "same size as nvfp4"
    calibration  int64 [samples, length]; the last `judged` samples are not calibrated on, but measure KL
    formats      to choose from; skip: layers left out, as in `patch`
    algorithm    what quantizes in the measurements, and should quantize later
    watch        is told what is being done

    The result is never worse, as measured, than the best single one of the formats that fits. Raises QuantlibError where no
    format fits the budget, or samples are too few.
    """
    choices = list(dict.fromkeys(get_format(spec).name for spec in formats))
    layers = {name: linear_layers(model)[name] for name in select_formats(linear_layers(model), choices[0], skip)}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    sizes = {name: {spec: get_format(spec).nbytes(*shape) for spec in choices} for name, shape in shapes.items()}
    limit = budget_bytes(budget, shapes)
    uniform = {spec: sum(row[spec] for row in sizes.values()) for spec in choices}
    if min(uniform.values()) > limit:
        smallest = min(uniform, key=lambda spec: uniform[spec])
        raise QuantlibError(
            f"budget {budget!r} is {limit / 1e6:.2f} MB, and the smallest format, {smallest}, takes "
            f"{uniform[smallest] / 1e6:.2f} MB: raise the budget, or name smaller formats"
        )
    if judged < 1 or len(calibration) <= judged:
        raise QuantlibError(
            f"{len(calibration)} calibration samples are too few to judge by {judged} and calibrate on the rest"
        )
    check_tokens(model, calibration)
    method = get_algorithm(algorithm)
    training, judging = calibration[:-judged], calibration[-judged:]
    watch("statistics of inputs")
    statistics = calibrate(model, training, layers=layers, progress=False)
    watch("gradients of outputs")
    weights = output_weights(model, training[: min(len(training), judged)], layers)
    sensitivity = {}
    for name, layer in layers.items():
        watch(f"sensitivity of {name}")
        sensitivity[name] = _sensitivity(layer.weight, choices, statistics[name], weights[name], name)

    measure = _Judge(model, judging, training, statistics, method, skip)
    middle = max((spec for spec in choices if uniform[spec] <= limit), key=lambda spec: uniform[spec])
    for number, group in enumerate(_groups(sensitivity, middle)):
        watch(f"measuring layers in {middle}, group {number + 1}")
        _correct([sensitivity[name] for name in group], middle, measure(dict.fromkeys(group, middle)))
    measured = []
    for spec in choices:
        watch(f"measuring {spec}")
        found = Measured(spec, measure(dict.fromkeys(layers, spec)), uniform[spec])
        measured.append(found)
        _correct(sensitivity.values(), spec, found.kl, only=True)
    chosen = choose(sensitivity, sizes, limit)
    watch("measuring the plan")
    nbytes = sum(sizes[name][spec] for name, spec in chosen.items())
    own = Measured("plan", measure(chosen), nbytes)
    best = min((found for found in measured if found.nbytes <= limit), key=lambda found: found.kl)
    if best.kl < own.kl:
        measured.append(replace(own, name="mix"))
        chosen, nbytes, own = dict.fromkeys(layers, best.name), best.nbytes, Measured("plan", best.kl, best.nbytes)
    bits = 8 * nbytes / sum(n * k for n, k in shapes.values())
    total = sum(sensitivity[name][spec] for name, spec in chosen.items())
    return Plan(chosen, budget, nbytes, bits, total, [own, *measured], sensitivity)


def budget_bytes(budget: str, shapes: Mapping[str, tuple[int, int]]) -> int:
    """The bytes that a budget's words allow layers of these shapes. Raises QuantlibError for other words."""
    text = budget.strip()
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*bpw", text, re.IGNORECASE):
        return math.floor(float(found[1]) * sum(n * k for n, k in shapes.values()) / 8)
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", text, re.IGNORECASE):
        return math.floor(float(found[1]) * {"KB": 1e3, "MB": 1e6, "GB": 1e9}[found[2].upper()])
    if found := re.fullmatch(r"same size as (\S+)", text, re.IGNORECASE):
        return sum(fmt.nbytes(*shapes[name]) for name, fmt in formats_by_layer(found[1], shapes).items())
    raise QuantlibError(f"budget {budget!r} can't be read; write '4.5bpw', '80MB', 'same size as nvfp4' or '... as q4_k_m'")


def output_weights(model: nn.Module, tokens: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
    """G [N] of every layer: the mean square, over positions, of d(sum of log-likelihoods)/d(its outputs), for tokens drawn from
    the model's own predictions (the diagonal of Fisher's information). Zero for a layer that wasn't reached."""
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            def add(gradient: Tensor) -> None:
                sums[name] = sums.get(name, 0) + gradient.double().square().flatten(0, -2).sum(0)

            output.register_hook(add)

        return hook

    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with ExitStack() as stack, evaluating(model):
        for name in layers:
            handle = model.get_submodule(name).register_forward_hook(watch(name))
            stack.callback(handle.remove)
        for parameter, wanted in learning:
            stack.callback(parameter.requires_grad_, wanted)
            parameter.requires_grad_(False)
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        stack.callback(embedding.register_forward_hook(lambda module, arguments, output: output.requires_grad_()).remove)
        with torch.enable_grad():
            for ids in tokens:
                log_p = torch.log_softmax(logits_of(model, ids[None]).float()[0], dim=-1)
                drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
                log_p.gather(1, drawn).sum().backward()
    linear = linear_layers(model)
    return {
        name: sums[name].cpu() / tokens.numel() if name in sums else torch.zeros(linear[name].out_features, dtype=torch.float64)
        for name in layers
    }


def _sensitivity(
    weight: Tensor, choices: Sequence[str], inputs: InputStatistics, outputs: Tensor, name: str
) -> dict[str, float]:
    """Format -> the KL that it costs in this layer, to second order, errors of weights taken as independent."""
    method = get_algorithm("rtn-importance" if inputs.tokens else "rtn")
    weight = weight.detach()
    importance, rows = inputs.mean_square.double().to(weight.device), outputs.to(weight.device)
    found = {}
    for spec in choices:
        decoded = method.quantize(weight, get_format(spec), inputs, name).dequantize(torch.float32)
        error = (decoded - weight).double().square() @ importance
        found[spec] = 0.5 * float(error @ rows)
    return found


def _groups(sensitivity: Mapping[str, Mapping[str, float]], spec: str) -> list[list[str]]:
    """Layers by their cost in one format, in groups of about as many."""
    names = sorted(sensitivity, key=lambda name: sensitivity[name][spec])
    count = min(GROUPS, len(names))
    return [names[len(names) * i // count : len(names) * (i + 1) // count] for i in range(count)]


def _correct(rows: Collection[dict[str, float]], spec: str, kl: float, only: bool = False) -> None:
    """Scale what the rows predict for all formats, or for `only` this one, so that the sum of one format's is `kl`."""
    predicted = sum(row[spec] for row in rows)
    if kl <= 0 or predicted <= 0:
        return
    for row in rows:
        for changed in (spec,) if only else tuple(row):
            row[changed] *= kl / predicted


class _Judge:
    """Formats by layer -> mean KL(original || model) over the judging samples. The original runs once, if there is room for its
    logits."""

    def __init__(
        self,
        model: nn.Module,
        judging: Tensor,
        training: Tensor,
        statistics: Statistics,
        method: Algorithm,
        skip: Iterable[str],
    ) -> None:
        self.model, self.method, self.skip = model, method, tuple(skip)
        self.windows = TokenWindows(PROTOCOLS["A"], judging.cpu(), first=1)
        self.reference: nn.Module | ReferenceLogits = model
        try:
            self.reference = capture_reference(model, self.windows, progress=False)
        except QuantlibError as error:
            warnings.warn(f"the original runs beside every candidate: {error}", stacklevel=3)
        self.calibration = {"nothing": None, "moments": statistics, "hessian": training}[method.needs]

    def __call__(self, formats: Mapping[str, str]) -> float:
        quantized = structural_copy(self.model)
        patch(quantized, formats, skip=self.skip, algorithm=self.method, calibration=self.calibration, progress=False)
        found = evaluate(quantized, self.windows, reference=self.reference, progress=False).divergence
        assert found is not None
        return found.kl


def choose(
    sensitivity: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Mapping[str, int]], limit: int
) -> dict[str, str]:
    """Layer -> format of the least total sensitivity whose bytes stay within `limit`: by a price per byte, found by bisection,
    and what is left is spent where it gains most per byte. The cheapest formats must fit."""

    def at(price: float) -> dict[str, str]:
        return {
            name: min(row, key=lambda spec, name=name: (row[spec] + price * sizes[name][spec], sizes[name][spec]))  # type: ignore[misc]
            for name, row in sensitivity.items()
        }

    def total(chosen: Mapping[str, str]) -> int:
        return sum(sizes[name][spec] for name, spec in chosen.items())

    if total(at(0.0)) <= limit:
        return at(0.0)
    low, high = 0.0, 1.0
    while total(at(high)) > limit and high < 1e30:
        high *= 16
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if total(at(middle)) <= limit else (middle, high)
    chosen = at(high)
    while True:
        room = limit - total(chosen)
        steps = [
            ((row[chosen[name]] - row[spec]) / (sizes[name][spec] - sizes[name][chosen[name]]), name, spec)
            for name, row in sensitivity.items()
            for spec in row
            if 0 < sizes[name][spec] - sizes[name][chosen[name]] <= room and row[spec] < row[chosen[name]]
        ]
        if not steps:
            return chosen
        _, name, spec = max(steps)
        chosen[name] = spec


def plot(made: Plan) -> bytes:
    """PNG: bytes against measured KL, of the plan and of each uniform format. Needs the extra `report` (matplotlib)."""
    figure, (axis,) = plots.axes(7.2, 4.6)
    for place, found in enumerate(made.measured):
        color, marker = plots.COLORS[place % len(plots.COLORS)], plots.MARKERS[place % len(plots.MARKERS)]
        axis.plot(found.nbytes / 1e6, found.kl, marker, color=color, markersize=9 if found.name == "plan" else 7)
        side = {"xytext": (9, 0), "textcoords": "offset points", "va": "center", "fontsize": 9, "color": color}
        axis.annotate(found.name, (found.nbytes / 1e6, found.kl), **side)
    axis.set_yscale("log")
    axis.margins(0.2, 0.15)
    axis.set_xlabel("MB of the quantized layers")
    axis.set_ylabel("mean KL(original || quantized), nats per token")
    axis.set_title(f"A plan for {made.budget}, and uniform formats", loc="left", fontsize=10)
    return plots.png(figure)
