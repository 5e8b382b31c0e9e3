"""A reference model's logits, kept on disk so that many candidates meet one reference run."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from quantlib.errors import QuantlibError
from quantlib.evaluation.result import Evaluation
from quantlib.evaluation.windows import TokenWindows


class ReferenceLogits:
    """A reference model's logits at every scored position, kept on disk, so that many candidates meet one reference run.

    Exact: they are kept in the dtype that the model gives. The file has no name (it is unlinked as soon as it is open) and so
    disappears with the process, however that ends. Made by `capture_reference`.

    evaluation   the reference's own score
    windows      what was scored
    """

    def __init__(self, windows: TokenWindows, directory: Path | None = None) -> None:
        self.windows = windows
        self.evaluation: Evaluation | None = None
        self._directory = directory
        self._rows: Tensor | None = None

    def write(self, start: int, logits: Tensor) -> None:
        """Keep the logits [P, V] of the scored positions start .. start + P."""
        if self._rows is None:
            self._rows = _mapped((self.windows.scored, logits.shape[1]), logits.dtype, self._directory)
        self._rows[start : start + len(logits)] = logits

    def read(self, start: int, stop: int) -> Tensor:
        """The logits [stop - start, V] of those scored positions."""
        if self._rows is None:
            raise QuantlibError("these reference logits are closed or were never captured; use capture_reference")
        return self._rows[start:stop]

    def close(self) -> None:
        """Give the disk space back."""
        self._rows = None

    def __enter__(self) -> ReferenceLogits:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _mapped(shape: tuple[int, int], dtype: torch.dtype, directory: Path | None) -> Tensor:
    """A tensor on an unnamed temporary file whose space is reserved at once: a full disk is an error now, not a crash later."""
    size = shape[0] * shape[1] * dtype.itemsize
    with tempfile.TemporaryFile(dir=directory) as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            place = directory or tempfile.gettempdir()
            raise QuantlibError(
                f"the reference's logits need {size / 1e9:.2f} GB of disk in {place}: {error.strerror}; "
                "score fewer windows, or set TMPDIR to a place with more room"
            ) from error
        mapped = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(mapped, dtype=dtype).view(shape)
