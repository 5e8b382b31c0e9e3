"""quantlib._cuda: csrc/cuda, each source for its own chips, and a binding per family of sources.

A family whose sources don't compile, or need headers that aren't there, is left out and explained; the others are built.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from build_tools import BuildError, ptxas
from build_tools.cuda_targets import CHIPS, FAMILIES, Row, Target, chips_of, gencodes, row_of, targets_of
from build_tools.host import ROOT, Compiler, pybind11_include
from build_tools.nvcc import Cutlass, Nvcc, find_cutlass, find_nvcc
from build_tools.objects import Object, Unit, compile_unit
from build_tools.schedule import Task, available_memory, run_all, worker_count

SOURCES = Path("csrc/cuda")
FACTS_HEADER = "quantlib_cuda_facts.h"
BINDING_MEMORY = 1.0
"""GB that a file with pybind11's templates takes to compile."""


def mode(environment: Mapping[str, str]) -> str:
    """What QUANTLIB_CUDA asks for: "0" (not built), "1" (a failure is an error) or "auto" (built where an nvcc is)."""
    asked = environment.get("QUANTLIB_CUDA", "").strip().lower() or "auto"
    if asked not in ("0", "1", "auto"):
        raise BuildError(
            f"QUANTLIB_CUDA must be 0 (don't build quantlib._cuda), 1 (fail where it can't be built) or auto, found {asked!r}"
        )
    return asked


@dataclass(frozen=True)
class Source:
    """A .cu file to compile; `path` as it lies under csrc/cuda."""

    path: str
    row: Row
    targets: tuple[Target, ...]

    @property
    def family(self) -> str:
        return self.path.partition("/")[0]


@dataclass(frozen=True)
class Toolchain:
    """What everything is compiled with. `cutlass` may be the reason why its headers are missing."""

    nvcc: Nvcc
    compiler: Compiler
    cutlass: Cutlass | BuildError
    launcher: tuple[str, ...]
    python_include: tuple[str, ...]

    @property
    def version(self) -> str:
        return f"nvcc {self.nvcc.version} with {self.compiler.version}"


def toolchain(environment: Mapping[str, str], python_include: list[str]) -> Toolchain:
    """The compilers and headers at hand. Raises BuildError where nvcc, a C++ compiler or pybind11 is missing."""
    nvcc = find_nvcc(environment)
    include = pybind11_include(python_include)
    try:
        cutlass: Cutlass | BuildError = find_cutlass(environment)
    except BuildError as error:
        cutlass = error
    ccache = shutil.which("ccache")
    # ccache's other modes preprocess first, for which nvcc takes no depfile.
    return Toolchain(nvcc, Compiler(), cutlass, ("env", "CCACHE_DEPEND=1", ccache) if ccache else (), include)


def nvcc_unit(source: Source, tools: Toolchain) -> Unit:
    """How a source is compiled. Paths of our own are relative, so that every clone makes the same object."""
    include = [SOURCES, *(tools.cutlass.include if source.row.cutlass and isinstance(tools.cutlass, Cutlass) else ())]
    command = (
        str(tools.nvcc.path),
        "-std=c++17",
        "-O3",
        "--expt-relaxed-constexpr",
        "-ccbin",
        tools.compiler.binary,
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden",
        "-Xptxas",
        "-v",
        *(word for flag in source.row.ptxas for word in ("-Xptxas", flag)),
        *(f"-I{path}" for path in include),
        *(word for made in gencodes(source.row, source.targets) for word in ("-gencode", made)),
    )
    return Unit(
        SOURCES / source.path, source.path.replace("/", "-").removesuffix(".cu"), command, tools.version, tools.launcher
    )


def host_unit(source: str, name: str, tools: Toolchain, *flags: str) -> Unit:
    """How a binding is compiled, by the C++ compiler with the CUDA runtime's headers."""
    # -isystem: the toolkit's headers and CUTLASS's are not ours to warn about.
    cuda = (word for path in tools.nvcc.include for word in ("-isystem", str(path)))
    command = tools.compiler.compiling(*flags, f"-I{SOURCES}", *tools.python_include, *cuda)
    return Unit(SOURCES / source, name, command, tools.version, tools.launcher)


@dataclass(frozen=True)
class Plan:
    """What to compile: the CUDA sources and bindings of each family.

    left_out    family -> why it can't be built; unwanted: families without code for the chips that were asked for
    """

    sources: list[Source]
    bindings: dict[str, str]
    left_out: dict[str, str]
    unwanted: list[str]


def plan(tools: Toolchain, chips: tuple[int, ...], folder: Path) -> Plan:
    """Look at what lies under `folder`, the absolute path of csrc/cuda. A family without sources isn't named at all."""
    found = Plan([], {}, {}, [])
    for family in FAMILIES:
        paths = [f"{family}/{path.name}" for path in sorted((folder / family).glob("*.cu"))]
        if not paths:
            continue
        rows = {path: row_of(path) for path in paths}
        targets = {path: targets_of(row, chips, tools.nvcc.archs, tools.nvcc.family_targets) for path, row in rows.items()}
        if not any(targets.values()):
            found.unwanted.append(family)
        elif any(row.cutlass for row in rows.values()) and isinstance(tools.cutlass, BuildError):
            found.left_out[family] = str(tools.cutlass)
        elif not (folder / family / "bindings.cpp").is_file():
            found.left_out[family] = f"{SOURCES / family / 'bindings.cpp'} is missing"
        else:
            found.sources.extend(Source(path, rows[path], targets[path]) for path in paths if targets[path])
            found.bindings[family] = f"{family}/bindings.cpp"
    return found


class Progress:
    """A line per file that is done: which, for what, how long."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.begun = total, 0, time.monotonic()

    def line(self, name: str, targets: tuple[Target, ...], made: Object) -> None:
        self.done += 1
        took = "unchanged" if made.cached else f"{made.seconds:.1f} s"
        archs = " ".join(target.name for target in targets)
        print(f"[{self.done}/{self.total}, {time.monotonic() - self.begun:.0f} s] {name}  {archs}  {took}", flush=True)


def compile_all(todo: Plan, tools: Toolchain, objects: Path, root: Path) -> dict[str, list[tuple[Source | None, Object]]]:
    """Family -> its objects (with the source, or None for its binding); families that fail go to the plan's `left_out`."""
    jobs: list[tuple[str, Source | None, Unit, float]] = [
        (source.family, source, nvcc_unit(source, tools), source.row.memory) for source in todo.sources
    ]
    jobs += [
        (family, None, host_unit(path, f"{family}-bindings", tools), BINDING_MEMORY) for family, path in todo.bindings.items()
    ]
    progress = Progress(len(jobs))

    def task(family: str, source: Source | None, unit: Unit, memory: float) -> Task[Object]:
        def compile_one() -> Object:
            made = compile_unit(unit, objects, root)
            progress.line(str(unit.source.relative_to(SOURCES)), source.targets if source else (), made)
            remarks = ptxas.remarks(made.log)
            if remarks and not made.cached:
                print(remarks, flush=True)
            return made

        return Task(unit.name, memory, compile_one)

    results = run_all([task(*job) for job in jobs], available_memory(), worker_count())
    built: dict[str, list[tuple[Source | None, Object]]] = {}
    for (family, source, _, _), result in zip(jobs, results, strict=True):
        if isinstance(result, BuildError):
            earlier = todo.left_out.get(family)
            todo.left_out[family] = f"{earlier}\n{result}" if earlier else str(result)
        else:
            built.setdefault(family, []).append((source, result))
    return {family: made for family, made in built.items() if family not in todo.left_out}


def kernels_of(source: Source, log: str) -> list[dict[str, Any]]:
    """What ptxas said about the kernels of a source, in the order of their symbols; a name that several have is numbered."""
    found, names = [], Counter[str]()
    for symbol, usages in sorted(ptxas.parse(log).items()):
        name = ptxas.kernel_name(symbol)
        names[name] += 1
        found.append(
            {
                "family": source.family,
                "source": source.path,
                "name": name if names[name] == 1 else f"{name} ({names[name]})",
                "symbol": symbol,
                "targets": {target: asdict(usage) for target, usage in usages.items()},
            }
        )
    return found


def source_facts(source: Source) -> dict[str, Any]:
    """What a source was compiled for: targets, chips that have machine code, and the PTX for later ones."""
    ptx = [target.number for target in source.targets if target.ptx]
    return {
        "targets": [target.name for target in source.targets],
        "chips": [chip for chip in CHIPS if any(target.runs_on(chip) for target in source.targets if not target.ptx)],
        "ptx": max(ptx, default=None),
    }


def build(
    target: Path,
    facts: dict[str, Any],
    environment: Mapping[str, str],
    python_include: list[str],
    whole: bool = False,
    root: Path = ROOT,
) -> None:
    """Make the module `target` from root/csrc/cuda and fill in `facts`.

    Raises BuildError where no family can be built, or not every wanted one and it must be `whole`.
    """
    chips = chips_of(environment.get("QUANTLIB_CUDA_ARCHS", ""))
    tools = toolchain(environment, python_include)
    objects = root / "build" / "objects" / "cuda"
    facts |= {"nvcc": tools.nvcc.version, "compiler": tools.compiler.version}
    if isinstance(tools.cutlass, Cutlass):
        facts["cutlass"] = tools.cutlass.version
    todo = plan(tools, chips, root / SOURCES)
    facts |= {"left_out": todo.left_out, "not_asked_for": todo.unwanted}
    built = compile_all(todo, tools, objects, root)
    if not built or (whole and todo.left_out):
        raise BuildError(_reasons(todo.left_out) or f"{SOURCES} holds no kernel for these chips")
    if todo.left_out:
        print(f"\n*** quantlib._cuda is built without a part: {_reasons(todo.left_out)}\n", flush=True)
    made = [(source, found) for of_family in built.values() for source, found in of_family if source is not None]
    facts["families"] = list(built)
    facts["sources"] = {source.path: source_facts(source) for source, _ in made}
    known = {**facts, "built": True, "kernels": [kernel for source, found in made for kernel in kernels_of(source, found.log)]}
    write_header(objects / FACTS_HEADER, known)
    has = (f"-DQUANTLIB_HAS_{family.upper()}" for family in built)
    unit = host_unit("bindings.cpp", "bindings", tools, f"-I{objects.relative_to(root)}", *has)
    module = compile_unit(unit, objects, root)
    if module.log.strip() and not module.cached:
        print(module.log.strip(), flush=True)
    link([module.path, *(found.path for of_family in built.values() for _, found in of_family)], target, tools)


def _reasons(left_out: dict[str, str]) -> str:
    """Why families are left out: the first line names each, the others go into details."""
    short = "; ".join(f"{family}: {why.splitlines()[0]}" for family, why in left_out.items())
    long = "\n\n".join(f"{family}: {why}" for family, why in left_out.items() if "\n" in why)
    return f"{short}\n\n{long}".strip()


def write_header(path: Path, facts: dict[str, Any]) -> None:
    """The facts as a C++ string. Unchanged facts leave the file alone."""
    text = json.dumps(facts, indent=1)
    content = f'// Written by build_tools/cuda.py.\nstatic const char BUILD_FACTS[] = R"facts({text})facts";\n'
    if not path.is_file() or path.read_text() != content:
        path.write_text(content)


def link(objects: list[Path], target: Path, tools: Toolchain) -> None:
    """Make the module and load it once, in a process of its own, to see that nothing is missing. Raises BuildError."""
    # The runtime inside must not be mixed with torch's own: its symbols stay hidden, and ours are bound to it here.
    hidden = ("-Wl,--exclude-libs,ALL", "-Wl,-Bsymbolic")
    tools.compiler.link(objects, target, str(tools.nvcc.cudart), "-ldl", "-lrt", "-lpthread", *hidden)
    load = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('quantlib._cuda', sys.argv[1]);"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))"
    )
    done = subprocess.run([sys.executable, "-c", load, str(target)], capture_output=True, text=True)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        raise BuildError(f"the module was linked but doesn't load: {said}. {shlex.quote(str(target))} was removed.")
