"""`quantlib plan`: which layer gets which format under a budget of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantlib.cli.calibration import LENGTH, SAMPLES, Calibration, Length, Samples, Seed, check_calibration, read_calibration
from quantlib.cli.console import err, note, out
from quantlib.cli.evaluate import need_tokenizer
from quantlib.cli.models import MODEL_HELP, check_dtype, load_model
from quantlib.errors import QuantlibError


def make_plan(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    budget: Annotated[str, typer.Option("--budget", "-b", help="'4.5bpw', '80MB', 'same size as nvfp4' (or 'q4_k_m').")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write; a PNG appears beside it.")] = Path(
        "plan.json"
    ),
    formats: Annotated[str | None, typer.Option(help="Formats to choose from, separated by commas.")] = None,
    algorithm: Annotated[str, typer.Option(help="What quantizes in the measurements.")] = "rtn-importance",
    calibration: Calibration = None,
    samples: Samples = SAMPLES,
    length: Length = LENGTH,
    seed: Seed = 0,
    judged: Annotated[int, typer.Option(min=1, help="Of the samples, how many measure KL and calibrate nothing.")] = 8,
    dtype: Annotated[str, typer.Option(help="Load in this dtype: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")] = "cpu",
) -> None:
    """Measure which layers bear which format, and choose under a budget; `quantlib quantize --spec plan.json` follows."""
    from quantlib.algorithms import RTN, get_algorithm
    from quantlib.evaluation.report import require_report_extra, write_atomically
    from quantlib.formats import get_format
    from quantlib.plan import FORMATS, plan, plot

    choices = list(FORMATS) if formats is None else [get_format(spec).name for spec in formats.split(",") if spec.strip()]
    if not choices:
        raise QuantlibError("--formats names no format; give at least two, e.g. --formats int3-g32,nvfp4,int8-g64")
    method = get_algorithm(algorithm)
    reads = RTN("mse", importance=True)  # sensitivities take sample text, whatever quantizes
    check_calibration(reads, calibration)
    check_dtype(dtype)
    require_report_extra()
    loaded = load_model(model, dtype, device)
    tokens = read_calibration(reads, need_tokenizer(loaded, model), calibration, samples, length, seed)
    assert tokens is not None
    with err.status("planning") as status:
        made = plan(loaded.model, budget, tokens, formats=choices, algorithm=method, judged=judged, watch=status.update)
    made.save(output)
    write_atomically(output.with_suffix(".png"), plot(made))
    out.print(str(made), highlight=False)
    out.print(f"wrote {output}; quantize with `quantlib quantize {model} --spec {output} ...`", highlight=False)
    if loaded.caveat:
        note(loaded.caveat)
