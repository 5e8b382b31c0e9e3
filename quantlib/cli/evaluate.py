"""`quantlib eval`: perplexity of a model, and what a format costs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from quantlib.cli.calibration import (
    ALGORITHM_HELP,
    LENGTH,
    SAMPLES,
    Calibration,
    Length,
    Samples,
    Seed,
    check_calibration,
    read_calibration,
)
from quantlib.cli.console import note, out
from quantlib.cli.models import MODEL_HELP, Loaded, check_dtype, load_model
from quantlib.cli.quantize import parse_specs
from quantlib.errors import QuantlibError


def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    spec: Annotated[
        list[str] | None,
        typer.Option(
            "--spec",
            "-s",
            help="Quantize to this format or mix first (or PATTERN=FORMAT, several times) and compare with the original.",
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Compare with this model: the original of a quantized checkpoint.")
    ] = None,
    algorithm: Annotated[str, typer.Option(help=f"With --spec. {ALGORITHM_HELP}")] = "rtn",
    calibration: Calibration = None,
    samples: Samples = SAMPLES,
    length: Length = LENGTH,
    seed: Seed = 0,
    protocol: Annotated[
        str, typer.Option(help="A: every position of disjoint windows. B: llama.cpp's, the second half of each.")
    ] = "A",
    window: Annotated[int | None, typer.Option(help="Tokens per window. Default: 2048 (A), 512 (B).")] = None,
    windows: Annotated[int | None, typer.Option(help="Score only the first so many windows.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A UTF-8 text file. Default: pydoc's topics, which every Python has; their first quarter, where the rest "
            "calibrates."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Load in this dtype: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Perplexity under a named protocol; with --spec or --reference also KL and agreement with the original."""
    from quantlib import evaluation
    from quantlib.algorithms import get_algorithm
    from quantlib.patch import patch

    if spec and reference is not None:
        raise QuantlibError("--spec compares with the unquantized model already; drop it or --reference")
    formats = parse_specs(spec) if spec else None
    method = get_algorithm(algorithm)
    check_calibration(method, calibration)
    check_dtype(dtype)
    content = read_text(text, calibrated=formats is not None and method.needs != "nothing")
    loaded = load_model(model, dtype, device)
    cut = evaluation.make_windows(
        content, need_tokenizer(loaded, model), protocol=cast(Any, protocol), window=window, windows=windows
    )
    if formats is None:
        other = None if reference is None else load_model(reference, dtype, device).model
        results = {model: evaluation.evaluate(loaded.model, cut, reference=other)}
    else:
        with evaluation.capture_reference(loaded.model, cut) as original:
            tokens = read_calibration(method, loaded.tokenizer, calibration, samples, length, seed)
            shown = out.is_terminal and not as_json
            patch(loaded.model, formats, algorithm=method, calibration=tokens, progress=shown)
            quantized = evaluation.evaluate(loaded.model, cut, reference=original)
        assert original.evaluation is not None
        results = {model: original.evaluation, f"{model} {' '.join(spec or ())} ({algorithm})": quantized}
    if as_json:
        typer.echo(json.dumps({name: result.to_dict() for name, result in results.items()}, indent=2))
        return
    for name, result in results.items():
        out.print(name, style="bold", highlight=False)
        out.print(result)
    if loaded.caveat:
        note(loaded.caveat)


def read_text(text: Path | None, calibrated: bool) -> str:
    """The text to score; by default pydoc's topics, or the part of them that never calibrates. Raises QuantlibError."""
    from quantlib.evaluation import default_text

    if text is None:
        return default_text("evaluation" if calibrated else "all")
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QuantlibError(f"--text {text} can't be read as UTF-8 text: {error}") from error


def need_tokenizer(loaded: Loaded, name: str) -> Any:
    """The model's tokenizer. Raises QuantlibError where it has none."""
    if loaded.tokenizer is None:
        raise QuantlibError(f"{name} has no tokenizer beside it, and a text can't be evaluated without one: save it there")
    return loaded.tokenizer
