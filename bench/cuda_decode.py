"""Decode instructions per weight in the main loop of the CUDA kernels: what lies between a word's load and the multiplication.

Counted is every instruction of the main loop that is executed in each iteration and that an A operand of a tensor-core
instruction is made by: shifts, masks, conversions, look-ups in tables with the address arithmetic that their codes need, and
the scales that are multiplied into weights. Loads of 8 and 16 bytes (words, scales) are where it begins. Scales that multiply
sums come after the multiplication.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bench.cuda_read import tool_folder
from bench.sass import Code, Instruction, Loop, SassError, parse

WEIGHTS = 8
"""Weights of a lane in one A operand of mma m16n8k16."""


@dataclass(frozen=True)
class Decode:
    """One iteration of a main loop, per lane."""

    weights: int
    decode: int
    total: int
    opcodes: Counter[str]
    widths: tuple[int, ...]
    """Bytes of the asynchronous copies, and of the loads from global memory that decoding begins at."""

    @property
    def per_weight(self) -> float:
        """Decode instructions per weight."""
        return self.decode / self.weights


def _main_loop(code: Code) -> Loop:
    """The smallest loop that multiplies."""
    for loop in code.loops:
        if any(each.multiplies for each in code.body(loop)):
            return loop
    raise SassError("no loop multiplies on tensor cores")


def _always(code: Code, loop: Loop) -> list[Instruction]:
    """The loop's instructions that no branch inside it leaves out, in the order of addresses: those of blocks without which its
    header can't be reached again."""
    inside = set(loop.blocks)

    def returns_without(left_out: int) -> bool:
        seen, todo = set(), [block for block in code.blocks[loop.header].successors if block in inside]
        while todo:
            block = todo.pop()
            if block == loop.header:
                return True
            if block != left_out and block not in seen:
                seen.add(block)
                todo += [each for each in code.blocks[block].successors if each in inside]
        return False

    found = []
    for number in loop.blocks:
        if number == loop.header or not returns_without(number):
            block = code.blocks[number]
            found += code.instructions[block.start : block.stop]
    return found


def _wide(instruction: Instruction) -> bool:
    """Whether decoding begins behind this load: words and scales, not the entries of a table."""
    return instruction.base in ("LDG", "LDSM") or (instruction.base == "LDS" and instruction.words > 1)


def analyse(code: Code) -> Decode:
    """Count a kernel's main loop. Raises SassError where it has none."""
    loop = _main_loop(code)
    body = [each for each in _always(code, loop) if not each.never]
    # The last writer of each register before an instruction; the loop's end comes before its beginning.
    writer = {name: number for number, instruction in enumerate(body) for name in instruction.writes}
    makers, operands = [], set()
    for number, instruction in enumerate(body):
        makers.append({writer[name] for name in instruction.reads if name in writer})
        if instruction.multiplies:
            operands.add(tuple(writer.get(name, -1) for name in _group(instruction.sources[0])))
        writer |= dict.fromkeys(instruction.writes, number)
    counted, begun = set[int](), set[int]()
    todo = [number for operand in operands for number in operand if number >= 0]
    while todo:
        number = todo.pop()
        if number in counted or number in begun:
            continue
        if _wide(body[number]) or body[number].multiplies:
            begun.add(number)
            continue
        counted.add(number)
        todo += makers[number]
    copies = [each.bytes for each in code.body(loop) if each.base == "LDGSTS"]
    streamed = [body[number].bytes for number in begun if body[number].base == "LDG"]
    return Decode(
        WEIGHTS * len(operands),
        len(counted),
        len(body),
        Counter(body[number].opcode for number in counted),
        tuple(sorted(set(copies + streamed))),
    )


def _group(operand: str) -> list[str]:
    """The four registers of an A operand."""
    found = re.search(r"R(\d+)", operand)
    if found is None:
        raise SassError(f"{operand} is no register")
    return [f"R{int(found[1]) + i}" for i in range(4)]


def listings(module: Path, target: str) -> dict[str, str]:
    """symbol -> listing of a kernel, of every kernel in a module for one target such as "sm_90"."""
    folder = tool_folder()
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
        subprocess.run(
            [str(folder / "cuobjdump"), "-xelf", f".{target}.", str(module)],
            cwd=scratch, env=environment, check=True, capture_output=True,
        )  # fmt: skip
        for cubin in sorted(Path(scratch).glob("*.cubin")):
            found |= cubin_listings(cubin)
    return found


def cubin_listings(cubin: Path) -> dict[str, str]:
    """symbol -> listing, of a cubin's kernels."""
    command = [str(tool_folder() / "nvdisasm"), "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*\.section\s+\.text\.([\w$.]+),.*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def decode_of(listing: str) -> Decode:
    """The counts of a listed kernel."""
    return analyse(parse(listing))
