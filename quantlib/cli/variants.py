"""One model in several formats: quantize a copy, score it against the original, let it speak; what demo and compare share."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlib.cli.calibration import LENGTH, SAMPLES, read_calibration
from quantlib.cli.console import note, out
from quantlib.errors import FormatError, QuantlibError

if TYPE_CHECKING:
    from torch import Tensor

    from quantlib.algorithms import Algorithm
    from quantlib.evaluation import Evaluation, ReferenceLogits, TokenWindows
    from quantlib.evaluation.comparison import Variant
    from quantlib.report import PatchReport

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DEFAULT_FORMATS = ("int4-g128", "int4-g64", "int4-g32")
"""What an algorithm named alone quantizes to: the first whose groups divide every layer's columns."""


@dataclass(frozen=True)
class Method:
    """A column of a comparison: a dtype, or a format with an algorithm. name: as it is printed."""

    name: str
    spec: str
    algorithm: Algorithm | None


def parse_methods(words: Sequence[str], columns: Sequence[int]) -> list[Method]:
    """Methods by name, each once: "bf16"; "nvfp4"; a mix, "q4_k_m"; "nvfp4:gptq"; or an algorithm alone, "gptq", for INT4 in
    groups that divide all of the layers' `columns`. Raises QuantlibError where a word is none of these."""
    methods: dict[str, Method] = {}
    for word in filter(None, (word.strip() for word in words)):
        method = _parse_method(word, columns)
        methods.setdefault(method.name, method)
    if not methods:
        raise QuantlibError("no method is named; give formats, algorithms or both: nvfp4,gptq,nf4:gptq")
    return list(methods.values())


def _parse_method(word: str, columns: Sequence[int]) -> Method:
    from quantlib.algorithms import get_algorithm
    from quantlib.formats import get_format
    from quantlib.presets import canonical_spec

    if word in DTYPES:
        return Method(word, word, None)
    spec, colon, algorithm = word.partition(":")
    if colon:
        chosen = get_algorithm(algorithm)
        return Method(f"{canonical_spec(spec)}:{chosen.name}", canonical_spec(spec), chosen)
    try:
        return Method(canonical_spec(word), canonical_spec(word), get_algorithm("rtn"))
    except FormatError as unknown:
        try:
            chosen = get_algorithm(word)
        except QuantlibError:
            raise QuantlibError(f"method {word!r} is no dtype and no algorithm, and as a format: {unknown}") from None
    groups = {name: get_format(name).block.cols or 1 for name in DEFAULT_FORMATS}
    spec = next((name for name, size in groups.items() if all(k % size == 0 for k in columns)), DEFAULT_FORMATS[-1])
    return Method(f"{spec}:{chosen.name}", spec, chosen)


def compare(
    model: Any,
    tokenizer: Any,
    methods: Sequence[Method],
    windows: TokenWindows,
    output: Path,
    *,
    title: str,
    prompt: str,
    tokens: int,
    caveat: str = "",
    calibration: str | None = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    seed: int = 0,
) -> Path:
    """Measure the model as it is and by every method, saying each as it comes; write the report, print the table.

    The answers to `prompt` are `tokens` long at most. Returns the path of report.html.
    """
    from quantlib.evaluation import capture_reference
    from quantlib.evaluation.comparison import Comparison
    from quantlib.evaluation.report import machine_facts, write_report

    note("evaluating the original")
    with capture_reference(model, windows, directory=output) as reference:
        assert reference.evaluation is not None
        spec = next((method.spec for method in methods if method.algorithm is not None), "int8")
        original = _original(model, tokenizer, spec, reference.evaluation, prompt, tokens)
        _say(original)
        variants = []
        for method in methods:
            note(f"quantizing to {method.name}" if method.algorithm else f"converting to {method.name}")
            if method.algorithm is None:
                variants.append(_converted(model, tokenizer, method.name, reference, prompt, tokens))
            else:
                sample = read_calibration(method.algorithm, tokenizer, calibration, samples, length, seed)
                variants.append(_variant(model, tokenizer, method, sample, reference, prompt, tokens))
            _say(variants[-1])
    comparison = Comparison(
        title=title, original=original, variants=tuple(variants), prompt=prompt, caveat=caveat, facts=machine_facts()
    )
    report = write_report(comparison, output)
    out.print()
    out.print(comparison.table())
    out.print(f"\nreport: {report.resolve()} (with PNG plots and results.json beside it)", highlight=False, soft_wrap=True)
    return report


def check_writable(output: Path) -> None:
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
    from quantlib.selection import linear_layers, select_formats

    layers = [model.get_submodule(name).weight for name in select_formats(linear_layers(model), spec)]
    return _plain(model, tokenizer, str(layers[0].dtype).removeprefix("torch."), layers, evaluation, prompt, tokens)


def _plain(
    model: Any, tokenizer: Any, name: str, layers: Sequence[Tensor], evaluation: Evaluation, prompt: str, tokens: int
) -> Variant:
    from quantlib.evaluation.comparison import Variant

    nbytes = sum(weight.numel() * weight.element_size() for weight in layers)
    text, speed = _generate(model, tokenizer, prompt, tokens)
    return Variant(name, evaluation, 8.0 * layers[0].element_size(), nbytes, _model_bytes(model), text, speed)


def _variant(
    model: Any,
    tokenizer: Any,
    method: Method,
    calibration: Tensor | None,
    reference: ReferenceLogits,
    prompt: str,
    tokens: int,
) -> Variant:
    """Quantize a copy, evaluate it against the original's logits, let it speak."""
    from quantlib.evaluation import evaluate
    from quantlib.evaluation.comparison import Variant
    from quantlib.patch import patch
    from quantlib.running import structural_copy

    assert method.algorithm is not None
    quantized = structural_copy(model)
    report = patch(quantized, method.spec, algorithm=method.algorithm, calibration=calibration, progress=out.is_terminal)
    evaluation = evaluate(quantized, reference.windows, reference=reference)
    text, speed = _generate(quantized, tokenizer, prompt, tokens)
    return Variant(
        method.name,
        evaluation,
        report.bits_per_weight,
        report.nbytes,
        _model_bytes(quantized),
        text,
        speed,
        {layer.name: layer.error for layer in report.layers},
        _kernels(report),
        {layer.name: layer.output_error for layer in report.layers if layer.output_error is not None},
    )


def _converted(model: Any, tokenizer: Any, name: str, reference: ReferenceLogits, prompt: str, tokens: int) -> Variant:
    """The whole model in another dtype."""
    import torch

    from quantlib.evaluation import evaluate
    from quantlib.selection import linear_layers, select_formats

    converted = copy.deepcopy(model).to(getattr(torch, DTYPES[name]))
    layers = [converted.get_submodule(layer).weight for layer in select_formats(linear_layers(converted), "int8")]
    evaluation = evaluate(converted, reference.windows, reference=reference)
    return _plain(converted, tokenizer, name, layers, evaluation, prompt, tokens)


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
