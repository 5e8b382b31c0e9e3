"""MODEL on the command line: "demo", a directory that quantlib.save wrote, or what transformers knows by that name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlib.cli.console import note
from quantlib.errors import CheckpointError, QuantlibError

MODEL_HELP = "'demo', a directory written by quantlib, or a transformers model (directory or hub id)."
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer (None where a checkpoint has none), and what must be said beside its figures."""

    model: Any
    tokenizer: Any
    caveat: str = ""


def check_dtype(dtype: str) -> None:
    """Raise QuantlibError for an unknown --dtype."""
    if dtype not in DTYPES:
        raise QuantlibError(f"--dtype {dtype!r} is unknown; expected one of {', '.join(DTYPES)}")


def load_model(name: str, dtype: str = "auto", device: str = "cpu") -> Loaded:
    """Load a model by the name a user gave. dtype "auto": the checkpoint's own, fp32 for the demo model.

    Raises QuantlibError or CheckpointError, in words, where it can't be loaded.
    """
    import torch

    note(f"loading {name}")
    if name == "demo":
        from quantlib.integrations.demo_model import CAVEAT, load_demo_model

        model, tokenizer = load_demo_model(torch.float32 if dtype == "auto" else getattr(torch, dtype))
        return Loaded(model.to(device), tokenizer, CAVEAT)
    if (Path(name) / "quantlib.json").is_file():
        import quantlib

        return Loaded(quantlib.load(name, device=device), _tokenizer(name))
    return _load_transformers(name, dtype, device)


def _load_transformers(name: str, dtype: str, device: str) -> Loaded:
    from quantlib.integrations.demo_model import import_transformers

    transformers = import_transformers()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name!r} can't be loaded by transformers: {str(error).splitlines()[0]}") from error
    return Loaded(model.to(device).eval(), _tokenizer(name))


def _tokenizer(name: str) -> Any:
    """The tokenizer saved with a model, or None: quantizing needs none, and evaluating says so when it does."""
    from quantlib.integrations.demo_model import import_transformers

    try:
        return import_transformers().AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return None
