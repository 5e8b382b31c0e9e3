"""`quantlib compare`: any model by several methods, in one table: perplexity, KL, size, speed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from quantlib.cli.calibration import LENGTH, SAMPLES, Calibration, Length, Samples, Seed
from quantlib.cli.console import note
from quantlib.cli.demo import PROMPT
from quantlib.cli.evaluate import need_tokenizer, read_text
from quantlib.cli.models import MODEL_HELP, check_dtype, load_model
from quantlib.cli.variants import check_writable, compare, parse_methods

METHODS = "bf16,fp8,nvfp4,nf4,int4-g64,gptq,nvfp4:gptq"


def compare_methods(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    methods: Annotated[
        str,
        typer.Option(
            help="Separated by commas: a dtype (bf16), a format (nvfp4), FORMAT:ALGORITHM (nf4:gptq), or an algorithm alone "
            "(gptq), which quantizes to INT4."
        ),
    ] = METHODS,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for report.html, the plots and results.json.")
    ] = Path("comparison"),
    protocol: Annotated[str, typer.Option(help="A or B, see `quantlib eval`.")] = "A",
    window: Annotated[int | None, typer.Option(help="Tokens per window. Default: 2048 (A), 512 (B).")] = None,
    windows: Annotated[int | None, typer.Option(help="Score only the first so many windows.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text to score. Default: the first quarter of pydoc's topics.")
    ] = None,
    calibration: Calibration = None,
    samples: Samples = SAMPLES,
    length: Length = LENGTH,
    seed: Seed = 0,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 40,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = PROMPT,
    dtype: Annotated[str, typer.Option(help="Load in this dtype: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")] = "cpu",
) -> None:
    """A table of methods for one model: size, perplexity, KL to the original, agreement, speed; and a report with plots."""
    from quantlib.evaluation import make_windows
    from quantlib.evaluation.report import require_report_extra
    from quantlib.selection import linear_layers

    words = methods.split(",")
    parse_methods(words, ())
    check_dtype(dtype)
    require_report_extra()
    content = read_text(text, calibrated=True)
    check_writable(output)
    started = time.perf_counter()
    loaded = load_model(model, dtype, device)
    tokenizer = need_tokenizer(loaded, model)
    cut = make_windows(content, tokenizer, protocol=cast(Any, protocol), window=window, windows=windows)
    columns = [layer.in_features for name, layer in linear_layers(loaded.model).items() if name != "lm_head"]
    compare(
        loaded.model,
        tokenizer,
        parse_methods(words, columns),
        cut,
        output,
        title=f"{model}, by method",
        prompt=prompt,
        tokens=tokens,
        caveat=loaded.caveat,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
    )
    note(f"took {time.perf_counter() - started:.0f} s")
