"""Object files, compiled once: again only where the source, a file that it includes, the command or the compiler changed.

Beside NAME.o lies NAME.json: what the object was made from, as hashes, and what the compiler printed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from build_tools import BuildError


@dataclass(frozen=True)
class Unit:
    """One source to compile.

    name        of the object file, without its suffix
    command     compiler and flags; the source, -c, -o and the depfile are added
    version     of the compiler: another one compiles anew
    launcher    what the command runs under, such as ccache; no part of what the object depends on
    """

    source: Path
    name: str
    command: tuple[str, ...]
    version: str
    launcher: tuple[str, ...] = ()


@dataclass(frozen=True)
class Object:
    """A compiled unit: `log` is what the compiler printed, `seconds` what it took when it was compiled."""

    path: Path
    log: str
    seconds: float
    cached: bool


def file_hash(path: Path) -> str:
    """The hash of a file's content; "" where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return ""
    return _content_hash(str(path), stat.st_mtime_ns, stat.st_size)


@cache
def _content_hash(path: str, mtime: int, size: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def dependencies(depfile: str) -> list[str]:
    """The files that a rule written by -MD names, in their order: a backslash continues a line or protects a blank."""
    rule = depfile.replace("\\\r\n", " ").replace("\\\n", " ")
    files = rule.partition(": ")[2] or rule.partition(":")[2]
    return list(dict.fromkeys(re.sub(r"\\(.)", r"\1", word) for word in re.findall(r"(?:\\.|\S)+", files)))


def _compiling(unit: Unit) -> list[str]:
    return [*unit.command, str(unit.source), "-c"]


def object_path(unit: Unit, folder: Path) -> Path:
    """Where a unit's object lies: other flags get another file, so that builds for other targets don't displace each other."""
    key = hashlib.sha256(json.dumps([_compiling(unit), unit.version]).encode()).hexdigest()[:12]
    return folder / f"{unit.name}-{key}.o"


def compile_unit(unit: Unit, folder: Path, root: Path) -> Object:
    """The object of a unit, from `folder` where it is current. The command runs in `root`; raises BuildError where it fails."""
    command, target = _compiling(unit), object_path(unit, folder)
    stamp = target.with_suffix(".json")
    known = _read(stamp)
    if target.exists() and known and all(file_hash(root / path) == found for path, found in known["files"].items()):
        return Object(target, known["log"], known["seconds"], cached=True)
    folder.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(f".{os.getpid()}.o")
    depfile = fresh.with_suffix(".d")
    begun = time.monotonic()
    try:
        log = run([*unit.launcher, *command, "-o", str(fresh), "-MD", "-MF", str(depfile)], root)
        seconds = round(time.monotonic() - begun, 1)
        files = {path: file_hash(root / path) for path in dependencies(depfile.read_text())}
        stamp.unlink(missing_ok=True)
        fresh.replace(target)
        record = fresh.with_suffix(".json")
        record.write_text(json.dumps({"command": command, "log": log, "seconds": seconds, "files": files}))
        record.replace(stamp)
    finally:
        fresh.unlink(missing_ok=True)
        depfile.unlink(missing_ok=True)
    return Object(target, log, seconds, cached=False)


def _read(stamp: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(stamp.read_text()))
    except (OSError, ValueError):
        return {}


def run(command: list[str], folder: Path) -> str:
    """What a command prints; raises BuildError with it where the command fails."""
    try:
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} can't be run: {error}") from None
    if done.returncode != 0:
        # The last lines often follow from the first: show both ends of a long complaint.
        said = done.stdout.strip()
        shown = said if len(said) <= 6000 else f"{said[:4000]}\n[...]\n{said[-2000:]}"
        first = next((line for line in said.splitlines() if "error" in line.lower()), f"ended with {done.returncode}")
        raise BuildError(f"{first}\n{shlex.join(command)}\nended with {done.returncode}:\n{shown}")
    return done.stdout
