"""`quantlib quantize`: a model in, a directory of packed weights out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

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
from quantlib.cli.models import MODEL_HELP, check_dtype, load_model
from quantlib.errors import CheckpointError, QuantlibError


def quantize(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write. It appears whole or not at all.")],
    spec: Annotated[
        list[str],
        typer.Option(
            "--spec",
            "-s",
            help="A format ('nvfp4') or mix ('q4_k_m'), several 'PATTERN=FORMAT' ('*.down_proj=int8', '*=nvfp4'; FORMAT may be "
            "'none'), or the JSON file of a plan.",
        ),
    ],
    skip: Annotated[list[str] | None, typer.Option(help="Leave layers that match. Default: lm_head.")] = None,
    algorithm: Annotated[str, typer.Option(help=ALGORITHM_HELP)] = "rtn",
    calibration: Calibration = None,
    samples: Samples = SAMPLES,
    length: Length = LENGTH,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run from its journal, OUTPUT.journal.")] = False,
    dtype: Annotated[str, typer.Option(help="Load in this dtype: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="Where to quantize: cpu, cuda, cuda:1.")] = "cpu",
) -> None:
    """Quantize a model and save it: safetensors and JSON, no pickle."""
    from quantlib.algorithms import get_algorithm
    from quantlib.patch import patch
    from quantlib.selection import DEFAULT_SKIP
    from quantlib.serialization import save

    # Everything that can be refused is refused before the model is read.
    formats = parse_specs(spec)
    method = get_algorithm(algorithm)
    check_calibration(method, calibration)
    check_dtype(dtype)
    _check_output(output)
    journal = _journal(output, method.needs != "nothing", resume)
    loaded = load_model(model, dtype, device)
    tokens = read_calibration(method, loaded.tokenizer, calibration, samples, length, seed)
    left = DEFAULT_SKIP if skip is None else skip
    report = patch(
        loaded.model, formats, algorithm=method, calibration=tokens, skip=left, journal=journal, progress=out.is_terminal
    )
    out.print(report)
    note(f"writing {output}")
    save(loaded.model, output, tokenizer=loaded.tokenizer)
    if journal is not None:
        shutil.rmtree(journal)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    out.print(f"wrote {output} ({size / 1e6:.1f} MB); read it with quantlib.load({str(output)!r})", highlight=False)


def _journal(output: Path, calibrated: bool, resume: bool) -> Path | None:
    """Where a calibrated run keeps what is done, until the output is written. Raises where --resume says otherwise."""
    journal = output.with_name(output.name + ".journal")
    if not calibrated:
        if resume:
            raise QuantlibError("--resume: without sample text there is no journal; run it again without --resume")
        return None
    if journal.exists() and not resume:
        raise CheckpointError(f"{journal} holds what an interrupted run had done: pass --resume to go on, or remove it")
    if resume and not journal.exists():
        raise CheckpointError(f"--resume: there is no {journal} to go on with; run without --resume")
    return journal


def parse_specs(specs: list[str]) -> str | Mapping[str, str | None]:
    """One format or mix; a plan's JSON file; or PATTERN=FORMAT pairs in order (the first match wins, "none" leaves a layer).

    Raises FormatError for an unknown format, QuantlibError for a mixture of the two.
    """
    from quantlib.formats import get_format
    from quantlib.presets import canonical_spec

    if len(specs) == 1 and specs[0].endswith(".json"):
        from quantlib.plan import Plan

        return Plan.load(specs[0])
    if len(specs) == 1 and "=" not in specs[0]:
        return canonical_spec(specs[0])
    formats: dict[str, str | None] = {}
    for entry in specs:
        pattern, equals, spec = entry.rpartition("=")
        if not equals:
            raise QuantlibError(f"--spec {entry!r}: with several, each is PATTERN=FORMAT, e.g. '*.down_proj=int8'")
        if pattern in formats:
            raise QuantlibError(f"--spec names the pattern {pattern!r} twice")
        formats[pattern] = None if spec == "none" else get_format(spec).name
    return formats


def _check_output(output: Path) -> None:
    """quantlib.save refuses the same; saying so before the work is done spares an hour."""
    if output.is_dir() and (not any(output.iterdir()) or (output / "quantlib.json").is_file()):
        return
    if output.exists():
        raise CheckpointError(f"{output} exists and is no quantlib checkpoint; choose another path or remove it")
