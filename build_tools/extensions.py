"""setuptools' build_ext, with a recipe of our own for each extension."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

from build_tools import BuildError, cpu, cuda
from build_tools.host import ROOT

EXTENSIONS = [
    Extension("quantlib._cpu", sources=[str(cpu.SOURCES / "kernels.cpp")], optional=True),
    Extension("quantlib._cuda", sources=[str(cuda.SOURCES / "bindings.cpp")], optional=True),
]


class BuildKernels(build_ext):
    """Builds each extension by its recipe; records facts and failures in _build.json instead of failing the installation."""

    def run(self) -> None:
        self.facts: dict[str, dict[str, Any]] = {}
        try:
            self.cuda = cuda.mode(os.environ)
        except BuildError as error:
            raise OptionError(str(error)) from None
        super().run()

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        facts: dict[str, Any] = {"built": False}
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            {"_cpu": self.build_cpu, "_cuda": self.build_cuda}[name](target, facts)
            facts["built"] = True
        except BuildError as error:
            target.unlink(missing_ok=True)
            if name == "_cuda" and self.cuda == "1":
                ext.optional = False  # setuptools turns the errors of an optional extension into a warning
                raise CompileError(f"QUANTLIB_CUDA=1 demands {ext.name}, which can't be built: {error}") from None
            facts["why"] = str(error)
            print(f"\n*** {ext.name} was not built; quantlib works without it, by other kernels.\n{error}\n", flush=True)
        self.facts[name] = facts
        self.write_facts(target.parent)

    def build_cpu(self, target: Path, facts: dict[str, Any]) -> None:
        cpu.build(target, facts, list(self.include_dirs))

    def build_cuda(self, target: Path, facts: dict[str, Any]) -> None:
        """As QUANTLIB_CUDA says: not at all, as far as it goes, or whole or not at all."""
        if self.cuda == "0":
            raise BuildError("QUANTLIB_CUDA=0 asked for a build without it")
        cuda.build(target, facts, os.environ, list(self.include_dirs), whole=self.cuda == "1")

    def copy_extensions_to_source(self) -> None:
        """For an editable installation: quantlib/ gets what was built, and keeps no older build of what was not."""
        for ext in self.extensions:
            if not Path(self.get_ext_fullpath(ext.name)).exists():
                (ROOT / "quantlib" / Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        self.write_facts(ROOT / "quantlib")

    def write_facts(self, folder: Path) -> None:
        (folder / "_build.json").write_text(json.dumps(self.facts, indent=1) + "\n")
