"""The C++ compiler of this machine."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from build_tools import BuildError
from build_tools.objects import run

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = ROOT / "build" / "objects"
"""Not setuptools' build_temp, which pip makes anew for every editable installation."""

COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


class Compiler:
    """The C++ compiler that CXX names, or c++ / g++ / clang++, with CXXFLAGS."""

    def __init__(self) -> None:
        candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        for candidate in candidates:
            self.command = shlex.split(candidate)
            try:
                found = subprocess.run([*self.command, "--version"], capture_output=True, text=True, check=True)
            except (OSError, subprocess.CalledProcessError):
                continue
            self.version = found.stdout.splitlines()[0]
            self.extra = shlex.split(os.environ.get("CXXFLAGS", ""))
            return
        raise BuildError(f"no C++ compiler found (tried {', '.join(candidates)}): install g++ or clang++, or set CXX")

    @property
    def binary(self) -> str:
        """The program itself, for nvcc; CXX may name a launcher before it."""
        return next((word for word in self.command if Path(word).name not in ("ccache", "sccache", "distcc")), self.command[0])

    def compiling(self, *flags: str) -> tuple[str, ...]:
        """The command that compiles with these flags besides those of every file."""
        return (*self.command, *COMMON_FLAGS, *self.extra, *flags)

    def link(self, objects: list[Path], target: Path, *flags: str) -> None:
        """Make a shared library; raises BuildError."""
        said = run([*self.command, *self.extra, "-shared", *map(str, objects), "-o", str(target), *flags], ROOT).strip()
        if said:
            print(said, flush=True)

    def accepts(self, flags: list[str]) -> bool:
        """Whether the compiler compiles and links a C++17 program with these flags."""
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.cpp"
            probe.write_text("#include <cstdint>\nint main() { if constexpr (sizeof(int64_t) == 8) return 0; }\n")
            try:
                run([*self.compiling(*flags), str(probe), "-o", str(Path(folder) / "probe")], ROOT)
            except BuildError:
                return False
            return True


def pybind11_include(python_include: list[str]) -> tuple[str, ...]:
    """Flags for the headers of pybind11 and Python. Raises BuildError where pybind11 is missing."""
    try:
        import pybind11
    except ImportError as error:
        raise BuildError(f"pybind11 is not installed ({error}): pip install pybind11") from None
    return (f"-I{pybind11.get_include()}", *(f"-I{path}" for path in python_include))
