"""Builds the compiled kernels. What was built, what was not and why is written to quantlib/_build.json for `quantlib doctor`.

quantlib._cpu   csrc/cpu: the kernels once per instruction set, one file that dispatches and binds. Optional: without a C++
                compiler the package installs and runs on its other kernels.

Environment: CXX and CXXFLAGS as usual. Objects are rebuilt only when a source, a header or a flag changed.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU = Path("csrc/cpu")
X86 = platform.machine().lower() in ("x86_64", "amd64", "i686", "i386")
ISA_FLAGS: dict[str, list[str]] = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
}
"""Instruction sets in the order of QUANTLIB_ISA_LEVEL (csrc/cpu/simd.h)."""

# -ffp-contract=off: the law rounds (value - zero) * scale - minimum after each operation; where sums may be fused, we say so.
COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
# gcc 12 and 13 take the deliberately undefined registers of their own AVX-512 headers for a mistake (gcc bug 105593).
QUIET_FLAGS = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]


class BuildError(Exception):
    """Why an extension was not built, in words for the user."""


@dataclass(frozen=True)
class Unit:
    """One object file: a source under csrc/cpu, a name for the object, and its flags."""

    source: str
    name: str
    flags: tuple[str, ...]


class Compiler:
    """The C++ compiler that CXX names, or c++ / g++ / clang++."""

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

    def run(self, arguments: list[str]) -> None:
        """Run the compiler; raises BuildError with what it printed."""
        done = subprocess.run([*self.command, *arguments], cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(f"{shlex.join([*self.command, *arguments])}\n{done.stderr.strip()[-4000:]}")
        if done.stderr.strip():
            print(done.stderr.strip(), flush=True)

    def accepts(self, flags: list[str]) -> bool:
        """Whether the compiler compiles and links a C++17 program with these flags."""
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.cpp"
            probe.write_text("#include <cstdint>\nint main() { if constexpr (sizeof(int64_t) == 8) return 0; }\n")
            try:
                self.run([*COMMON_FLAGS, *self.extra, *flags, str(probe), "-o", str(Path(folder) / "probe")])
            except BuildError:
                return False
            return True

    def compile(self, unit: Unit, folder: Path, newest_source: float) -> Path:
        """The object file of a unit, compiled where it is older than the sources or its flags changed."""
        target, stamp = folder / f"{unit.name}.o", folder / f"{unit.name}.json"
        arguments = [*COMMON_FLAGS, *QUIET_FLAGS, *self.extra, *unit.flags, "-c", str(CPU / unit.source), "-o", str(target)]
        facts = json.dumps([self.version, arguments])
        current = target.exists() and target.stat().st_mtime > newest_source and stamp.exists()
        if not (current and stamp.read_text() == facts):
            self.run(arguments)
            stamp.write_text(facts)
        return target


def cpu_units(compiler: Compiler, include: list[str], openmp: bool, facts: dict[str, object]) -> list[Unit]:
    """The object files of quantlib._cpu; instruction sets that are left out are explained in `facts`."""
    threads = ("-fopenmp",) if openmp else ()
    built, left_out = [], {}
    for isa, flags in ISA_FLAGS.items():
        if isa != "scalar" and not X86:
            left_out[isa] = f"not an instruction set of {platform.machine()}"
        elif not compiler.accepts(["-std=c++17", *flags]):
            left_out[isa] = f"{compiler.version} does not take {' '.join(flags) or '-std=c++17'}"
        else:
            built.append(isa)
    if "scalar" not in built:
        raise BuildError(f"{compiler.version} does not compile C++17")
    facts |= {"isas": built, "left_out": left_out, "openmp": openmp, "compiler": compiler.version}
    levels = list(ISA_FLAGS)
    units = [
        Unit("kernels.cpp", isa, (*ISA_FLAGS[isa], f"-DQUANTLIB_ISA_LEVEL={levels.index(isa)}", *threads)) for isa in built
    ]
    has = tuple(f"-DQUANTLIB_HAS_{isa.upper()}" for isa in built if isa != "scalar")
    compiled_by = f"-DQUANTLIB_COMPILER={json.dumps(compiler.version)}"
    return [
        *units,
        Unit("dispatch.cpp", "dispatch", has),
        Unit("bindings.cpp", "bindings", (*include, compiled_by, *threads)),
    ]


class BuildKernels(build_ext):
    """Builds each extension by its own recipe, and records facts and failures instead of failing the installation."""

    def run(self) -> None:
        self.facts: dict[str, dict[str, object]] = {}
        super().run()

    def build_extension(self, ext: Extension) -> None:
        facts: dict[str, object] = {"built": False}
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            {"quantlib._cpu": self.build_cpu}[ext.name](target, facts)
            facts["built"] = True
        except BuildError as error:
            target.unlink(missing_ok=True)
            facts["why"] = str(error)
            print(
                f"\n*** {ext.name} was not built; quantlib installs without it and uses slower kernels.\n{error}\n", flush=True
            )
        self.facts[ext.name.rpartition(".")[2]] = facts
        self.write_facts(target.parent)

    def copy_extensions_to_source(self) -> None:
        """For an editable installation: quantlib/ gets what was built, and keeps no older build of what was not."""
        for ext in self.extensions:
            if not Path(self.get_ext_fullpath(ext.name)).exists():
                (ROOT / "quantlib" / Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        self.write_facts(ROOT / "quantlib")

    def write_facts(self, folder: Path) -> None:
        (folder / "_build.json").write_text(json.dumps(self.facts, indent=1) + "\n")

    def build_cpu(self, target: Path, facts: dict[str, object]) -> None:
        """quantlib._cpu from csrc/cpu."""
        try:
            import pybind11
        except ImportError as error:
            raise BuildError(f"pybind11 is not installed ({error}): pip install pybind11") from None
        compiler = Compiler()
        openmp = compiler.accepts(["-fopenmp"])
        if not openmp:
            facts["openmp_left_out"] = f"{compiler.version} does not link with -fopenmp; kernels run on one thread"
        include = [f"-I{pybind11.get_include()}", *(f"-I{path}" for path in self.include_dirs)]
        units = cpu_units(compiler, include, openmp, facts)
        folder = ROOT / "build" / "objects" / "cpu"  # not build_temp, which pip makes anew for every editable installation
        folder.mkdir(parents=True, exist_ok=True)
        newest = max(path.stat().st_mtime for path in (ROOT / CPU).iterdir())
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            objects = list(pool.map(lambda unit: compiler.compile(unit, folder, newest), units))
        link = ["-shared", *(str(path) for path in objects), "-o", str(target), *(["-fopenmp"] if openmp else [])]
        compiler.run([*compiler.extra, *link])


# The CUDA extension (quantlib._cuda: nvcc, csrc/cuda) joins this list with a recipe of its own in BuildKernels.
setup(
    ext_modules=[Extension("quantlib._cpu", sources=[str(CPU / "kernels.cpp")], optional=True)],
    cmdclass={"build_ext": BuildKernels},
)
