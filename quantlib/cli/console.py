"""What every command shares: where it prints, and how an error of quantlib's ends it."""

from __future__ import annotations

import sys
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from quantlib.errors import QuantlibError

out = Console(width=None if sys.stdout.isatty() else 120)
"""Results; in a log or a pipe, lines of 120 columns whatever the terminal was."""
err = Console(stderr=True)
"""Progress, notes and errors: `--json` output stays clean."""


class Commands(TyperGroup):
    """A group whose commands end in one red line and exit code 1 where quantlib refuses; other errors keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except QuantlibError as error:
            err.print(Text("error: ", style="bold red") + Text(str(error), style="red"), soft_wrap=True)
            raise typer.Exit(1) from None


def note(text: str) -> None:
    """A line for the person who waits."""
    err.print(Text(text, style="dim"), soft_wrap=True)
