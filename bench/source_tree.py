"""Where the source tree keeps the packages that an installation puts under quantlib.

pyproject.toml's package-dir maps `quantlib.triton_kernels` and `quantlib.tuned` to folders beside `quantlib`. Without an
installation Python does not know that map. `register` adds it to the ways in which Python looks for modules: last, so that an
installed package stays what it was. `python -m bench.X` and `pytest -p bench` do that by importing bench.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"quantlib.triton_kernels": ROOT / "triton_kernels", "quantlib.tuned": ROOT / "bench" / "tuned"}


class SourceTree(MetaPathFinder):
    """Finds the packages of `FOLDERS`, and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder = FOLDERS.get(fullname)
        if folder is None:
            return None
        return spec_from_file_location(fullname, folder / "__init__.py", submodule_search_locations=[str(folder)])


def register() -> None:
    """Let this process import the source tree's packages. Calling it again changes nothing."""
    if not any(isinstance(finder, SourceTree) for finder in sys.meta_path):
        sys.meta_path.append(SourceTree())
