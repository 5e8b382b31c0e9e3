"""The typer application. Commands import torch and transformers when they run, not when this module is imported."""

from __future__ import annotations

from typing import Annotated

import typer

from quantlib.cli.bench import bench
from quantlib.cli.compare import compare_methods
from quantlib.cli.console import Commands, out
from quantlib.cli.demo import demo
from quantlib.cli.doctor import doctor
from quantlib.cli.evaluate import evaluate
from quantlib.cli.inspect import inspect
from quantlib.cli.plan import make_plan
from quantlib.cli.quantize import quantize

app = typer.Typer(
    name="quantlib",
    cls=Commands,
    help="Quantize language models, look at the result, and measure what it cost.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(quantize)
app.command(name="eval")(evaluate)
app.command(name="compare")(compare_methods)
app.command(name="plan")(make_plan)
app.command()(inspect)
app.command()(bench)
app.command()(doctor)


def _version(value: bool) -> None:
    if value:
        import quantlib

        out.print(f"quantlib {quantlib.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
