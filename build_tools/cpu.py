"""quantlib._cpu: csrc/cpu, the kernels once per instruction set, one file that dispatches and one that binds."""

from __future__ import annotations

import json
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_tools import BuildError
from build_tools.host import OBJECTS, ROOT, Compiler, pybind11_include
from build_tools.objects import Unit, compile_unit
from build_tools.schedule import worker_count

SOURCES = Path("csrc/cpu")
X86 = platform.machine().lower() in ("x86_64", "amd64", "i686", "i386")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
BF16 = ["-mavx512bf16", "-mavx512vbmi", "-mavx512vnni"]
ISA_FLAGS: dict[str, list[str]] = {
    "scalar": [],
    "avx2": AVX2,
    "avx512": [*AVX2, *AVX512],
    "avx512_bf16": [*AVX2, *AVX512, *BF16],
    "amx": [*AVX2, *AVX512, *BF16, "-mamx-tile", "-mamx-bf16"],
}
"""Instruction sets in the order of QUANTLIB_ISA_LEVEL (csrc/cpu/simd.h)."""

# The law rounds (value - zero) * scale - minimum after each operation; where sums may be fused, we say so.
EXACT_FLAGS = ("-ffp-contract=off",)
# gcc 12 and 13 take the deliberately undefined registers of their own AVX-512 headers for a mistake (gcc bug 105593).
QUIET_FLAGS = ("-Wno-maybe-uninitialized", "-Wno-uninitialized")


@dataclass(frozen=True)
class Variant:
    """How a build for tests differs from the one that is installed.

    flags       after those of every file, and for linking
    isas        to compile; others are left out
    kernels     what is compiled in place of csrc/cpu/kernels.cpp
    lookup      the same for csrc/cpu/lookup.cpp, which kernels.cpp names; None where `kernels` does not
    """

    flags: tuple[str, ...] = ()
    isas: tuple[str, ...] = tuple(ISA_FLAGS)
    kernels: Path = SOURCES / "kernels.cpp"
    lookup: Path | None = SOURCES / "lookup.cpp"


def units(
    compiler: Compiler, include: tuple[str, ...], openmp: bool, facts: dict[str, Any], variant: Variant = Variant()
) -> list[Unit]:
    """What to compile; instruction sets that are left out are explained in `facts`."""
    threads = ("-fopenmp",) if openmp else ()
    built, left_out = [], {}
    for isa, flags in ISA_FLAGS.items():
        if isa not in variant.isas:
            left_out[isa] = "not asked for"
        elif isa != "scalar" and not X86:
            left_out[isa] = f"not an instruction set of {platform.machine()}"
        elif not compiler.accepts(flags):
            left_out[isa] = f"{compiler.version} does not take {' '.join(flags) or '-std=c++17'}"
        else:
            built.append(isa)
    if "scalar" not in built:
        raise BuildError(f"{compiler.version} does not compile C++17")
    facts |= {"isas": built, "left_out": left_out, "openmp": openmp, "compiler": compiler.version}

    def unit(source: Path, name: str, *flags: str) -> Unit:
        command = compiler.compiling(*EXACT_FLAGS, *QUIET_FLAGS, *flags, *variant.flags)
        return Unit(source, name, command, compiler.version)

    levels = list(ISA_FLAGS)

    def kernels(source: Path, name: str, isa: str) -> Unit:
        return unit(source, name, *ISA_FLAGS[isa], f"-DQUANTLIB_ISA_LEVEL={levels.index(isa)}", *threads)

    lookup = [kernels(variant.lookup, "lookup", "avx2")] if variant.lookup is not None and "avx2" in built else []
    has = (f"-DQUANTLIB_HAS_{isa.upper()}" for isa in built if isa != "scalar")
    compiled_by = f"-DQUANTLIB_COMPILER={json.dumps(compiler.version)}"
    return [
        *(kernels(variant.kernels, isa, isa) for isa in built),
        *lookup,
        unit(SOURCES / "dispatch.cpp", "dispatch", *has),
        unit(SOURCES / "features.cpp", "features"),
        unit(SOURCES / "bindings.cpp", "bindings", *include, compiled_by, *threads),
        unit(SOURCES / "bindings_quantize.cpp", "bindings_quantize", *include),
        unit(SOURCES / "bindings_program.cpp", "bindings_program", *include),
        unit(SOURCES / "program.cpp", "program"),
    ]


def build(target: Path, facts: dict[str, Any], python_include: list[str], variant: Variant = Variant()) -> None:
    """Make the module `target` and fill in `facts`; raises BuildError."""
    include = pybind11_include(python_include)
    compiler = Compiler()
    openmp = compiler.accepts(["-fopenmp"])
    if not openmp:
        facts["openmp_left_out"] = f"{compiler.version} does not link with -fopenmp; kernels run on one thread"
    todo = units(compiler, include, openmp, facts, variant)
    with ThreadPoolExecutor(max_workers=worker_count()) as pool:
        objects = list(pool.map(lambda unit: compile_unit(unit, OBJECTS / "cpu", ROOT), todo))
    for made in objects:
        if made.log.strip() and not made.cached:
            print(made.log.strip(), flush=True)
    compiler.link([made.path for made in objects], target, *variant.flags, *(["-fopenmp"] if openmp else []))
