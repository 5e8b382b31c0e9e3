"""What `ptxas -v` says about each kernel, and kernels' names as people write them."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass, field
from functools import lru_cache


@dataclass
class Usage:
    """What one kernel takes on one target: per thread registers and bytes of stack and of spills; per block bytes of static
    shared memory, and barriers. `notes`: what ptxas advises, such as serialized wgmma."""

    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    barriers: int = 0
    notes: list[str] = field(default_factory=list)


_ENTRY = re.compile(r"ptxas info\s*: Compiling entry function '([^']+)' for '([^']+)'")
_PROPERTIES = re.compile(r"ptxas info\s*: Function properties for (\S+)")
_FRAME = re.compile(r"^\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"ptxas info\s*: Used (\d+) registers")
_BARRIERS = re.compile(r"used (\d+) barriers")
_SHARED = re.compile(r"(\d+) bytes smem")
_STACK = re.compile(r"(\d+) bytes cumulative stack size")
_NOTE = re.compile(r"ptxas (?:info|warning)\s*: \(C\d+\) (.*)")
_SUBJECT = re.compile(r"in (?:the )?(?:function )?'([^']+)'")
_CHATTER = re.compile(r"ptxas info\s*: (?:Compiling entry|Function properties|Used \d+|Compile time|\d+ bytes gmem|Overriding)")


def parse(log: str) -> dict[str, dict[str, Usage]]:
    """Symbol of a kernel -> target ("sm_90a") -> usage, of all kernels of a log.

    A note stands before or after the kernel that it names, and names no target: it is given to all of the kernel's.
    """
    found: dict[str, dict[str, Usage]] = {}
    notes: list[tuple[str, str]] = []
    kernel, about, current = "", "", Usage()
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            kernel = entry[1]
            current = found.setdefault(kernel, {}).setdefault(entry[2], Usage())
        elif properties := _PROPERTIES.search(line):
            about = properties[1]
        elif (frame := _FRAME.match(line)) and about == kernel:
            # Functions that were not inlined report too; their frames are in their callers' cumulative stack size.
            current.stack, current.spill_stores, current.spill_loads = map(int, frame.groups())
        elif used := _USED.search(line):
            current.registers = int(used[1])
            current.barriers, current.shared = _number(_BARRIERS, line), _number(_SHARED, line)
            current.stack = max(current.stack, _number(_STACK, line))
        elif (note := _NOTE.search(line)) and (subject := _SUBJECT.search(note[1])):
            notes.append((subject[1], note[1].replace(f" in the function '{subject[1]}'", "")))
    for symbol, words in notes:
        for usage in found.get(symbol, {}).values():
            if words not in usage.notes:
                usage.notes.append(words)
    return found


def _number(pattern: re.Pattern[str], line: str) -> int:
    value = pattern.search(line)
    return int(value[1]) if value else 0


def remarks(log: str) -> str:
    """What is left of a log without the figures: warnings of the compiler."""
    lines = [line for line in log.splitlines() if not (_CHATTER.match(line) or _FRAME.match(line))]
    return "\n".join(lines).strip()


@lru_cache(maxsize=1)
def _demangler() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        library.__cxa_demangle.restype = ctypes.c_void_p
        ctypes.CDLL(None).free.argtypes = [ctypes.c_void_p]
    except (OSError, AttributeError):
        return None
    return library


def demangle(symbol: str) -> str:
    """A symbol's C++ name; the symbol itself where it has none."""
    library = _demangler()
    if library is None:
        return symbol
    status = ctypes.c_int()
    address = library.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(status))
    if not address:
        return symbol
    name = ctypes.string_at(address).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(address))
    return name


LONGEST = 100
_ELEMENT = re.compile(r"float_(u?e\dm\d)_t")


def kernel_name(symbol: str) -> str:
    """A kernel's name for people: without return type, our namespaces and parameters.

    Of template arguments that fill more than a line only the element types of CUTLASS stay: device_kernel<e2m1 ue4m3>.
    """
    name = demangle(symbol)
    if name == symbol:
        # Beyond some nesting libstdc++ gives up. The outermost names stand in front, each behind its length.
        name = "::".join(_outermost(symbol)) + "<" + "." * LONGEST if symbol.startswith("_ZN") else symbol
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|quantlib::(?:cuda::)?", "", name)
    name = name[: _parameters(name)]
    head, bracket, arguments = name.partition("<")
    head = head.rpartition(" ")[2]
    if len(head) + len(arguments) > LONGEST:
        elements = dict.fromkeys(_ELEMENT.findall(symbol))
        return f"{head}<{' '.join(elements) or '...'}>"
    return head + bracket + arguments


def _parameters(name: str) -> int:
    """Where a function's parameter list begins."""
    depth = 0
    for at in range(len(name) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(name[at], 0)
        if depth == 0:
            return at if name[at] == "(" else len(name)
    return len(name)


def _outermost(symbol: str) -> list[str]:
    """["cutlass", "device_kernel"] of _ZN7cutlass13device_kernelI..."""
    found, at = [], len("_ZN")
    while length := re.match(r"\d+", symbol[at:]):
        start = at + length.end()
        at = start + int(length[0])
        found.append(symbol[start:at])
    return found
