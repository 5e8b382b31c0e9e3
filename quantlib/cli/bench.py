"""`quantlib bench`: time kernels on this machine, or tune them and write a table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from quantlib.cli.console import note, out
from quantlib.errors import QuantlibError, ShapeError

if TYPE_CHECKING:
    from quantlib.tuning import Measured, Subject

SHAPE = "4096x4096"
MS = "1,16,512"
TUNED_SHAPES = "4096x4096,8192x8192,28672x4096"
TUNED_FORMATS = "int4-g128,nf4,nvfp4"
TUNED_MS = "1,2,4,8,16,32,64,128,256,512,2048"


def bench(
    shape: Annotated[str | None, typer.Option(help=f"Weights NxK (out x in features). Default: {SHAPE}.")] = None,
    spec: Annotated[str | None, typer.Option("--format", "--spec", help="Formats, with commas. Default: nf4.")] = None,
    m: Annotated[str | None, typer.Option("--m", help=f"Batch sizes, with commas. Default: {MS}.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the activations: bfloat16, float16, float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1.")] = "auto",
    operation: Annotated[str, typer.Option(help="linear, or dgrad: the gradient of its input.")] = "linear",
    kernel: Annotated[str | None, typer.Option(help="Only these kernels, with commas.")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Try every tile that the kernels offer, and write a table.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The table of --tune. Default: DEVICE.json; joined with what it holds."),
    ] = None,
) -> None:
    """Time every kernel that runs a shape; with --tune, choose tiles and write them down for dispatch."""
    import torch

    from quantlib.tuning import subject

    shapes = parse_shapes(shape or (TUNED_SHAPES if tune else SHAPE))
    formats = parse_words(spec or (TUNED_FORMATS if tune else "nf4"))
    ms = parse_numbers(m or (TUNED_MS if tune else MS))
    kind = parse_dtype(dtype)
    names = None if kernel is None else set(parse_words(kernel))
    check_kernels(names, operation)
    if output is not None and not tune:
        raise QuantlibError("--output is where --tune writes its table; without --tune nothing is written")
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)

    def subjects() -> Iterator[Subject]:
        for fmt in formats:
            for pair in shapes:
                note(f"quantizing {pair[0]} x {pair[1]} to {fmt}")
                yield subject(fmt, pair, place, kind, operation)  # type: ignore[arg-type]

    with torch.no_grad():
        if tune:
            _tune(subjects(), ms, place, names, output)
        else:
            _time(subjects(), ms, place, names)


def _time(subjects: Iterator[Subject], ms: list[int], device: Any, names: set[str] | None) -> None:
    from quantlib.devices import device_facts
    from quantlib.timing import clock_for
    from quantlib.tuning import measure

    clock, facts = clock_for(device), device_facts(device)
    out.print(
        f"{facts.name}: {facts.arch}, {facts.units} units; clock: {clock.name}; * is what dispatch takes", highlight=False
    )
    for work in subjects:
        n, k = work.shape
        title = f"{work.operation}, {work.fmt}, W {n} x {k}, {str(work.dtype).removeprefix('torch.')}"
        table = Table(title=title, title_justify="left")
        for header in ("M", "kernel", "us", "25% .. 75%", "predicted", "GB/s", "TFLOP/s", "error", "why not"):
            words = header in ("kernel", "why not")
            table.add_column(header, justify="left" if words else "right", no_wrap=header != "why not")
        for m in ms:
            for place, row in enumerate(measure(work, m, clock, names)):
                table.add_row(str(m) if place == 0 else "", *_cells(row))
            table.add_section()
        out.print(table)


def _cells(row: Measured) -> list[str | Text]:
    name = Text(f"{row.kernel} *", style="bold") if row.taken else Text(row.kernel)
    predicted = "" if row.predicted is None or row.predicted == float("inf") else f"{row.predicted:.1f}"
    if row.timing is None:
        return [name, "", "", predicted, "", "", "", Text(row.reason or "")]
    spread = f"{row.timing.q25:.1f} .. {row.timing.q75:.1f}"
    rates = [f"{row.gbps:.3g}", f"{row.tflops:.3g}", f"{row.error:.1e}"]
    return [name, f"{row.timing.median:.1f}", spread, predicted, *rates, ""]


def _tune(subjects: Iterator[Subject], ms: list[int], device: Any, names: set[str] | None, output: Path | None) -> None:
    from quantlib.devices import device_facts
    from quantlib.kernels.tuned import slug
    from quantlib.timing import clock_for
    from quantlib.tuning import Tuner, write_table

    facts = device_facts(device)
    tuner = Tuner(clock_for(device), note)
    for work in subjects:
        tuner.add(work, ms, names)
    table = tuner.table(facts)
    path = output or Path(f"{slug(facts)}.json")
    write_table(table, path)
    summary = Table("kernel", "tiles", "efficiency", title=f"{facts.name}: {path}", title_justify="left")
    for name, tiles in table["tiles"].items():
        share = table["efficiency"].get(name)
        summary.add_row(name, str(len(tiles)), "" if share is None else f"{share:.2f}")
    out.print(summary)


def parse_words(text: str) -> list[str]:
    """Words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """ "8192x8192,33x16" -> [(8192, 8192), (33, 16)]. Raises ShapeError."""
    pairs = []
    for word in parse_words(text):
        match = re.fullmatch(r"(\d+)\s*[x×]\s*(\d+)", word)
        if match is None or not (int(match[1]) and int(match[2])):
            raise ShapeError(f"--shape {word!r} is no NxK, e.g. 4096x4096")
        pairs.append((int(match[1]), int(match[2])))
    return pairs


def parse_numbers(text: str) -> list[int]:
    """ "1,16" -> [1, 16]. Raises QuantlibError."""
    words = parse_words(text)
    if not words or not all(word.isdigit() and int(word) for word in words):
        raise QuantlibError(f"--m {text!r} is no list of batch sizes, e.g. 1,16,512")
    return [int(word) for word in words]


def parse_dtype(text: str) -> Any:
    """The torch dtype of that name. Raises QuantlibError."""
    import torch

    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if text not in known:
        raise QuantlibError(f"--dtype {text!r} is unknown; expected one of {', '.join(known)}")
    return known[text]


def check_kernels(names: set[str] | None, operation: str) -> None:
    """Raise QuantlibError for an operation that can't be timed, or a kernel that does not do it."""
    from quantlib.kernels import list_kernels

    if operation not in ("linear", "dgrad"):
        raise QuantlibError(f"--operation {operation!r} can't be timed; expected linear or dgrad")
    known = {kernel.name for kernel in list_kernels(operation)}
    unknown = sorted((names or set()) - known)
    if unknown:
        raise QuantlibError(f"--kernel {', '.join(unknown)}: no kernel of {operation}; there are {', '.join(sorted(known))}")
