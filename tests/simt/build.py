"""Compiles kernels for the emulator into Python modules under build/simt, anew only when something they include has changed."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).resolve().parents[2]
SIMT = ROOT / "tests" / "simt"
OUTPUT = ROOT / "build" / "simt"
EMULATOR = tuple(f"{part}.cpp" for part in ("banks", "barriers", "block", "fibers", "global", "products", "shared", "warp"))

# -O2: the emulator's speed. -ffp-contract=off: where a kernel wants fused arithmetic it says so.
FLAGS = ["-std=c++20", "-O2", "-ftree-vectorize", "-march=native", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]
FLAGS += ["-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DQUANTLIB_SIMT"]
CUDA = ROOT / "csrc" / "cuda"
INCLUDES = [CUDA / "common", CUDA, SIMT, pybind11.get_include(), sysconfig.get_path("include")]


class BuildError(RuntimeError):
    """The compiler's words."""


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


@functools.cache
def machine() -> str:
    """What -march=native means here: a build folder may travel to another machine."""
    command = [*compiler(), "-march=native", "-Q", "--help=target", "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def file_digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except FileNotFoundError:
        return "missing"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process builds, the others wait for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{result.stderr}")


def compile_object(source: Path, flags: Sequence[str]) -> Path:
    """The object of one source, named by all it was made from: what another process links is never overwritten."""
    command = [*compiler(), *FLAGS, *flags, *(f"-I{each}" for each in INCLUDES), "-c", str(source)]
    name = digest(*command, machine())
    record = OUTPUT / "objects" / f"{source.stem}-{name}.json"
    with locked(record.with_suffix(".lock")):
        if record.exists():
            files: dict[str, str] = json.loads(record.read_text())
            target = record.with_name(f"{source.stem}-{digest(name, *files.values())}.o")
            if target.exists() and all(file_digest(path) == known for path, known in files.items()):
                return target
        started = time.time()
        dependencies, unfinished = record.with_suffix(".d"), record.with_suffix(".unfinished")
        run([*command, "-MMD", "-MF", str(dependencies), "-o", str(unfinished)])
        read = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        files = {path: file_digest(path) for path in sorted(set(read))}
        target = record.with_name(f"{source.stem}-{digest(name, *files.values())}.o")
        unfinished.rename(target)
        # A file that was edited meanwhile may not be what the compiler read: then the next call compiles again.
        if max(Path(path).stat().st_mtime for path in files) < started:
            record.write_text(json.dumps(files))
        else:
            record.unlink(missing_ok=True)
        return target


def build(name: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> ModuleType:
    """Compiles `sources`, one of which holds PYBIND11_MODULE(name, m), together with the emulator, and imports the module."""
    built = [compile_object(source, flags) for source in [*sources, *(SIMT / each for each in EMULATOR)]]
    target = OUTPUT / digest(name, *(each.name for each in built)) / f"{name}.so"
    with locked(target.with_suffix(".lock")):
        if not target.exists():
            unfinished = target.with_suffix(".unfinished")
            run([*compiler(), "-shared", "-o", str(unfinished), *map(str, built)])
            unfinished.rename(target)
    spec = importlib.util.spec_from_file_location(name, target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Edit = tuple[str, str, str]
"""A file of csrc/cuda/sm90, what stands there, once, and what stands there instead."""


def build_edited(folder: Path, source: Path, *edits: Edit) -> ModuleType:
    """The module of `source`, a file that reads ONE_TILE and MODULE, from a copy of the Hopper kernels' headers with edits."""
    for name in ("common", "sm80"):
        (folder / name).symlink_to(CUDA / name)
    (folder / "sm90").mkdir()
    for path in sorted((CUDA / "sm90").glob("*.h")):
        text = path.read_text()
        for file, right, wrong in edits:
            if path.name == file:
                assert text.count(right) == 1, right
                text = text.replace(right, wrong)
        (folder / "sm90" / path.name).write_text(text)
    module = f"simt_{folder.name}"
    edited = folder / f"{module}.cpp"
    edited.write_text(f"#define ONE_TILE\n#define MODULE {module}\n{source.read_text()}")
    return build(module, [edited])
