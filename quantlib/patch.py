"""patch: nn.Linear -> QuantLinear, in place, layer by layer; unpatch: the way back."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlib import dispatch
from quantlib.algorithms import Algorithm, InputStatistics, Scaling, get_algorithm, validate_weight
from quantlib.calibration.journal import Journal, digest_model, digest_tensor
from quantlib.calibration.sequential import Quantized, quantize_in_sequence
from quantlib.calibration.statistics import Statistics
from quantlib.errors import KernelError, QuantlibError, ShapeError
from quantlib.formats import get_format
from quantlib.formats.base import Format
from quantlib.kernels import get_kernel
from quantlib.nn import QuantLinear, replace_module
from quantlib.report import LayerReport, PatchReport
from quantlib.running import return_freed_memory
from quantlib.selection import DEFAULT_SKIP, Spec, linear_layers, select_formats, stacked_weights
from quantlib.tensor import QuantizedTensor


def patch(
    model: nn.Module,
    spec: Spec,
    *,
    skip: Iterable[str] = DEFAULT_SKIP,
    algorithm: str | Algorithm = "rtn",
    calibration: Tensor | Statistics | None = None,
    activations: str | None = "auto",
    device: torch.device | str | None = None,
    kernel: str | None = None,
    journal: str | Path | None = None,
    progress: bool = True,
) -> PatchReport:
    """Quantize a model's linear layers in place.

    spec         a spec string or Format for all layers, a mix by name ("q4_k_m"), or {pattern: spec}: globs over the full
                 name, "re:..." or a plain layer name; the first match wins, None leaves a layer as it is
    skip         patterns of layers to leave (default: the output head)
    algorithm    a name ("rtn", "gptq", "awq") or an object that chooses scales and codes, `GPTQ(damp_percent=0.02)`
    calibration  for algorithms that need data: token windows [samples, length] (see `calibration_tokens`), with which each
                 layer is calibrated behind the layers quantized before; or what `calibrate` returned
    activations  None (weights only), a format that the inputs are rounded to, or "auto": what the device computes best in
    device       where to quantize and leave the model; default: where each weight lies
    kernel       force one kernel for every layer
    journal      with calibration tokens: a directory that keeps each layer as it is done; the same call on the same model goes
                 on where an earlier one was killed, and ends with the same bits

    Experts that lie in one parameter [E, N, K] are left as they are and named in the report's `skipped`: `QuantExperts` takes
    them.

    Peak memory is the model and about one layer. Everything that can be known beforehand (names, formats, values, kernel) is
    checked before the first layer is touched. Raises QuantlibError; FormatError and ShapeError name the layer. An interrupt in
    the middle leaves the layers done so far quantized, and says so in a note on the exception.
    """
    started = time.perf_counter()
    chosen = _plan(model, spec, skip)
    method = get_algorithm(algorithm)
    _check_calibration(method, calibration, journal)
    resolved = _resolve_activations(activations)
    _validate(model, chosen, device, kernel, resolved)
    skipped = (*(name for name in linear_layers(model) if name not in chosen), *stacked_weights(model))
    training = {name: model.get_submodule(name).training for name in chosen}  # calibration evaluates
    rows: list[LayerReport] = []
    try:
        with (
            _progress(len(chosen), progress) as (watch, advance),
            closing(_quantized(model, chosen, method, calibration, device, journal, watch)) as layers,
        ):
            for found in layers:
                rows.append(_install(model, found, training[found.name], resolved, device, kernel))
                advance()
    except BaseException as error:
        rest = "call again with the same journal" if journal is not None else "reload the model before patching again"
        error.add_note(f"quantlib.patch stopped after {len(rows)} of {len(chosen)} layers; {rest}")
        raise
    if device is not None:
        model.to(device)
    return_freed_memory()
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return PatchReport(tuple(rows), skipped, method.name, time.perf_counter() - started, size)


def _plan(model: nn.Module, spec: Spec, skip: Iterable[str]) -> dict[str, Format]:
    if isinstance(model, nn.Linear):
        raise QuantlibError("patch replaces the layers inside a module; for a single layer use QuantLinear.from_linear")
    patched = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    if patched:
        raise QuantlibError(
            f"the model is patched already ({len(patched)} layers, e.g. {patched[0]}: "
            f"{model.get_submodule(patched[0]).format}); call quantlib.unpatch(model) first, or pass one {{pattern: spec}}"
        )
    return select_formats(linear_layers(model), spec, skip)


def _resolve_activations(activations: str | None) -> str | None:
    """ "auto" is weights-only until a device has a kernel that computes in low precision."""
    if activations is None or activations == "auto":
        return None
    return get_format(activations).name


def _validate(
    model: nn.Module, chosen: dict[str, Format], device: torch.device | str | None, kernel: str | None, activations: str | None
) -> None:
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise QuantlibError(f"device {device!r} can't be used: {error}") from None
    for name, fmt in chosen.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        validate_weight(layer.weight, fmt, name)
        if kernel is not None:
            _check_kernel(kernel, name, layer, fmt, device, activations)


def _check_kernel(
    kernel: str, name: str, layer: nn.Linear, fmt: Format, device: torch.device | str | None, activations: str | None
) -> None:
    shape = (layer.out_features, layer.in_features)
    where = layer.weight.device if device is None else torch.device(device)
    if get_kernel(kernel).operation != "linear":
        raise KernelError(f"kernel {kernel!r} does {get_kernel(kernel).operation}; a layer needs one that does linear")
    layout = dispatch.best_layout(fmt, shape, where, layer.weight.dtype, kernel)
    weight = QuantizedTensor(fmt, shape, {"codes": layer.weight}, layout)
    problem = dispatch.problem_of("linear", 1, weight, layer.weight.dtype, activations, where)
    refusal = get_kernel(kernel).supports(problem)
    if refusal is not None:
        raise KernelError(f"{name}: kernel {kernel!r} can't run {fmt} {list(shape)}: {refusal}")


def _check_calibration(
    method: Algorithm, calibration: Tensor | Statistics | None, journal: str | Path | None
) -> None:  # fmt: skip
    if calibration is None and method.needs != "nothing":
        raise QuantlibError(
            f"algorithm {method.name!r} needs calibration data: pass "
            "calibration=quantlib.calibration_tokens(tokenizer=tokenizer), or token windows of your own"
        )
    if isinstance(calibration, Statistics) and isinstance(method, Scaling):
        raise QuantlibError(
            f"algorithm {method.name!r} scales what comes before a layer and tries it on text: pass calibration=tokens, "
            "not statistics"
        )
    if calibration is not None and method.needs == "nothing":
        raise QuantlibError(f"algorithm {method.name!r} takes no calibration data")
    if isinstance(calibration, Tensor) and (calibration.dim() != 2 or calibration.is_floating_point()):
        found = f"{calibration.dtype} {list(calibration.shape)}"
        raise ShapeError(f"calibration takes token windows, integers [samples, length], found {found}")
    if journal is not None and not isinstance(calibration, Tensor):
        raise QuantlibError("a journal belongs to a run over calibration tokens; drop journal=, or pass calibration=tokens")


def _quantized(
    model: nn.Module,
    chosen: dict[str, Format],
    method: Algorithm,
    calibration: Tensor | Statistics | None,
    device: torch.device | str | None,
    journal: str | Path | None,
    watch: Callable[[str], None],
) -> Generator[Quantized]:
    """Every chosen layer's packed weight; the next one is made when the last is in its place."""
    if isinstance(calibration, Tensor):
        kept = None if journal is None else Journal(journal, _identity(model, chosen, method, calibration))
        yield from quantize_in_sequence(model, chosen, method, calibration, device=device, journal=kept, watch=watch)
        return
    for name, fmt in chosen.items():
        watch(name)
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        source = weight.detach() if device is None else weight.detach().to(device)
        inputs = None if calibration is None else calibration.get(name)
        yield Quantized(name, method.quantize(source, fmt, inputs, name), method.name, inputs)


def _identity(model: nn.Module, chosen: dict[str, Format], method: Algorithm, tokens: Tensor) -> dict[str, Any]:
    return {
        "model": digest_model(model),
        "formats": {name: fmt.name for name, fmt in chosen.items()},
        "algorithm": repr(method),
        "tokens": digest_tensor(tokens),
        "samples": list(tokens.shape),
    }


def _install(
    model: nn.Module,
    found: Quantized,
    training: bool,
    activations: str | None,
    device: torch.device | str | None,
    kernel: str | None,
) -> LayerReport:
    name, weight = found.name, found.weight
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    source = old.weight.detach() if device is None else old.weight.detach().to(device)
    if weight.device != source.device:
        weight = weight.to(source.device)
    error, output_error = _errors(source, weight, found.inputs)
    new = QuantLinear.from_quantized(weight, old.bias, old.weight.dtype, activations, kernel).train(training).prepare()
    _take_hooks(old, new)
    replace_module(model, old, new)
    return LayerReport(
        name=name,
        shape=weight.shape,
        format=weight.format.name,
        bits_per_weight=weight.bits_per_weight,
        nbytes=weight.nbytes,
        original_nbytes=source.numel() * old.weight.element_size(),
        error=error,
        activations=activations,
        kernels=_kernels(new),
        algorithm=found.algorithm,
        output_error=output_error,
        note=found.note,
    )


def _errors(weight: Tensor, quantized: QuantizedTensor, inputs: InputStatistics | None) -> tuple[float, float | None]:
    """The weight's relative error, and the output's where something is known of the inputs."""
    if inputs is None or inputs.tokens == 0:
        return weight_error(weight, quantized), None
    decoded = dispatch.run("dequantize", torch.empty(0, device=weight.device), quantized)
    output_error = inputs.output_error(weight, decoded)
    return _relative(weight, decoded), output_error


def weight_error(weight: torch.Tensor, quantized: QuantizedTensor) -> float:
    """||decoded - weight|| / ||weight||; 0 for a zero weight that stays zero. Decodes by the device's own kernel."""
    decoded = dispatch.run("dequantize", torch.empty(0, device=weight.device), quantized)
    return _relative(weight, decoded)


def _relative(weight: torch.Tensor, decoded: torch.Tensor) -> float:
    """Overwrites `decoded`."""
    norm, difference = _norm(weight), _norm(decoded.sub_(weight))
    return difference / norm if norm else difference


def _norm(matrix: torch.Tensor) -> float:
    """The Frobenius norm, row by row in fp32 and over the rows in fp64."""
    rows = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.promote_types(matrix.dtype, torch.float32))
    return float(torch.linalg.vector_norm(rows.double()))


def _kernels(layer: QuantLinear) -> dict[int, str]:
    weight = layer.qweight
    found = {}
    for m in dispatch.PREPARE_FOR:
        problem = dispatch.problem_of("linear", m, weight, layer.dtype, layer.activations)
        try:
            found[m] = dispatch.select(problem, layer.kernel).name
        except KernelError:
            found[m] = "none"
    return found


def _take_hooks(old: nn.Module, new: nn.Module) -> None:
    for attribute in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(new, attribute).update(getattr(old, attribute))


@contextmanager
def _progress(count: int, shown: bool) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """(say what is being done, say that a layer is done), on a rich progress bar with the time left."""
    if not shown:
        yield (lambda text: None), (lambda: None)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("quantizing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("", total=count)
        yield (lambda text: bar.update(task, description=text)), (lambda: bar.advance(task))
        bar.update(task, description="done")


def unpatch(model: nn.Module) -> list[str]:
    """QuantLinear -> nn.Linear with the decoded weights, in place; returns the names. Raises QuantlibError if there is none."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    if not found:
        raise QuantlibError("the model holds no QuantLinear; it was never patched, or is unpatched already")
    for _, module in found:
        linear: Any = module.to_linear()
        _take_hooks(module, linear)
        replace_module(model, module, linear)
    return [name for name, _ in found]
