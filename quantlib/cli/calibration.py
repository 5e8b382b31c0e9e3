"""Options of commands that calibrate: where sample text comes from, and how much of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantlib.errors import QuantlibError

if TYPE_CHECKING:
    from torch import Tensor

    from quantlib.algorithms import Algorithm

ALGORITHM_HELP = (
    "How scales and codes are chosen: rtn, rtn-mse, hqq; with sample text rtn-importance, gptq, awq, awq+gptq, autoround."
)

Calibration = Annotated[
    str | None,
    typer.Option(
        help="Sample text: a UTF-8 file, 'wikitext2', 'c4' or 'REPOSITORY:CONFIG:SPLIT:COLUMN'. "
        "Default: the part of pydoc's topics that is not evaluated."
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Windows of sample text.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of each.")]
Seed = Annotated[int, typer.Option(help="Which windows are drawn.")]
SAMPLES, LENGTH = 128, 512


def check_calibration(method: Algorithm, calibration: str | None) -> None:
    """Raise QuantlibError where sample text is named that the algorithm doesn't read, or a file that isn't there."""
    if calibration is None:
        return
    if method.needs == "nothing":
        raise QuantlibError(f"--calibration: algorithm {method.name!r} takes no sample text; drop it, or take gptq")
    if _is_path(calibration) and not Path(calibration).is_file():
        raise QuantlibError(f"--calibration {calibration}: no such file, and no data set's name")


def read_calibration(
    method: Algorithm, tokenizer: Any, calibration: str | None, samples: int, length: int, seed: int
) -> Tensor | None:
    """Token windows for an algorithm that needs them, else None."""
    from quantlib.calibration import calibration_tokens

    if method.needs == "nothing":
        return None
    data = calibration
    if calibration is not None and Path(calibration).is_file():
        try:
            data = Path(calibration).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise QuantlibError(f"--calibration {calibration} can't be read as UTF-8 text: {error}") from error
    return calibration_tokens(data, tokenizer, samples=samples, length=length, seed=seed)


def _is_path(calibration: str) -> bool:
    from quantlib.calibration.tokens import DATASETS

    return calibration not in DATASETS and calibration.count(":") != 3
