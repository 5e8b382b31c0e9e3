"""What is inside a module of CUDA kernels, as cuobjdump lists it: instructions, registers and stack on every target.

cuobjdump is CUDA's, or the one that comes with Triton.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.sass import MULTIPLY


@dataclass(frozen=True)
class Row:
    """One kernel on one target.

    instructions        the multiply instructions of tensor cores: opcodes in machine code, names in PTX
    registers, stack    per thread; bytes of stack hold arrays that are indexed at run time
    spills              bytes stored and loaded because registers ran out
    shared              bytes of static shared memory of a block
    None                where PTX doesn't say
    """

    instructions: tuple[str, ...]
    registers: int | None = None
    stack: int | None = None
    spills: int | None = None
    shared: int | None = None


Table = dict[str, dict[str, dict[str, Row]]]
"""source -> kernel -> target -> row."""


def tool_folder() -> Path:
    """Where cuobjdump and nvdisasm lie."""
    found = shutil.which("cuobjdump")
    if found and shutil.which("nvdisasm"):
        return Path(found).parent
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _listing(module: Path, option: str) -> Iterator[str]:
    """The lines that cuobjdump prints."""
    folder = tool_folder()
    # cuobjdump calls nvdisasm by its name.
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [str(folder / "cuobjdump"), option, str(module)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")


_ARCH = re.compile(r"^arch = (sm_\w+)")
_FUNCTION = re.compile(r"^\s*Function\s*:?\s*([\w$.]+?):?\s*$")
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][\w.]*)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)")
_TARGET = re.compile(r"^\.target (sm_\w+)")
_PTX_MULTIPLY = re.compile(r"\b((?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*)")


def opcodes(listing: Iterable[str]) -> dict[tuple[str, str], set[str]]:
    """(target, symbol) -> its multiply opcodes, of what `cuobjdump -sass` prints."""
    found: dict[tuple[str, str], set[str]] = {}
    target, symbol = "", ""
    for line in listing:
        if arch := _ARCH.match(line):
            target = arch[1]
        elif "Function" in line and (function := _FUNCTION.match(line)):
            symbol = function[1]
            found.setdefault((target, symbol), set())
        elif "MMA" in line and (opcode := _OPCODE.search(line)) and MULTIPLY.match(opcode[1].partition(".")[0]):
            found[target, symbol].add(opcode[1])
    return found


def resources(listing: Iterable[str]) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(target, symbol) -> registers, bytes of stack and of static shared memory, of what `cuobjdump -res-usage` prints."""
    found = {}
    target, symbol = "", ""
    for line in listing:
        if arch := _ARCH.match(line):
            target = arch[1]
        elif usage := _RESOURCES.search(line):
            registers, stack, shared, local = map(int, usage.groups())
            found[target, symbol] = (registers, stack + local, shared)
        elif function := _FUNCTION.match(line):
            symbol = function[1]
    return found


def ptx_multiplies(listing: Iterable[str]) -> dict[tuple[str, str], set[str]]:
    """(target, symbol) -> its multiply instructions, of what `cuobjdump -ptx` prints; targets are named compute_80."""
    found: dict[tuple[str, str], set[str]] = {}
    target, symbol = "", ""
    for line in listing:
        if made_for := _TARGET.match(line):
            target = made_for[1].replace("sm_", "compute_")
        elif entry := _ENTRY.search(line):
            symbol = entry[1]
            found.setdefault((target, symbol), set())
        elif symbol and (multiply := _PTX_MULTIPLY.search(line)):
            found[target, symbol].add(multiply[1])
    return found


def read_module(path: Path, kernels: Iterable[dict[str, Any]]) -> Table:
    """The table of a module; `kernels` as the module itself lists them."""
    sass, usage, ptx = (
        opcodes(_listing(path, "-sass")),
        resources(_listing(path, "-res-usage")),
        ptx_multiplies(_listing(path, "-ptx")),
    )
    table: Table = {}
    for kernel in kernels:
        rows = table.setdefault(kernel["source"], {}).setdefault(kernel["name"], {})
        for target, reported in kernel["targets"].items():
            key = target, kernel["symbol"]
            # The static shared memory that cuobjdump names includes what the system keeps for itself from Hopper on.
            registers, stack, _ = usage[key]
            spills = reported["spill_stores"] + reported["spill_loads"]
            rows[target] = Row(tuple(sorted(sass[key])), registers, stack, spills, reported["shared"])
        for (target, symbol), multiplies in ptx.items():
            if symbol == kernel["symbol"]:
                rows[target] = Row(tuple(sorted(multiplies)))
    return table
