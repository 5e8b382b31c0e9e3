"""Machine code as nvdisasm lists it: instructions with what they read and write, basic blocks, loops.

No knowledge of any kernel lives here. Registers are named as in the listing, one name per 32 bits ("R4", "UR6", "P0", "UP1");
a wider operand stands for its whole group (R4.64 is R4 and R5).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P(?:T|\d+))\s+)?([A-Z][\w.]*)\s*(.*?)\s*(?:[&?]\w+[^;]*)?;")
"""What may follow operands after & or ? is the schedule, which some disassemblers list."""

_LABEL = re.compile(r"^\s*(\.L_x_\d+):", re.MULTILINE)
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_REGISTER = re.compile(r"(?<![\w.])(UR|UP|R|P)(\d+)(\.64)?")
_PREDICATE = re.compile(r"!?U?P(?:T|\d+)$")
_PLAIN = re.compile(r"U?R(?:Z|\d+)(?:\.\w+)*$")

MULTIPLY = re.compile(r"(?:UTC)?[A-Z]*MMA$")
"""Tensor-core instructions: HMMA, IMMA, QMMA, OMMA, HGMMA, QGMMA, UTCHMMA, UTCQMMA, UTCOMMA ..."""

WIDE = ("IADD", "IADD3", "IMNMX", "ISETP", "MOV", "SEL")
"""Integer instructions that also exist for pairs of registers."""

_WITHOUT_RESULT = re.compile(
    r"ST|RED|BAR|BRA|BRX|EXIT|DEPBAR|LDGDEPBAR|LDGSTS|MEMBAR|FENCE|NOP|WARPSYNC|WARPGROUP|BSSY|BSYNC|UTC|CCTL|UTMA|UBLK|YIELD"
    r"|ERRBAR|CALL|RET|JMP|UCGABAR|PREEXIT|ACQBULK|NANOSLEEP|BREAK|KILL|ARRIVES|UVIRTCOUNT|SYNCS\.(?:EXCH|CCTL|ARRIVE)|BPT|USETMAXREG"
)


class SassError(Exception):
    """A listing that can't be read, or code without what is looked for."""


def _split(text: str) -> tuple[str, ...]:
    """Operands: split at commas outside brackets."""
    found, depth, start = [], 0, 0
    for at, character in enumerate(text):
        if character in "[(":
            depth += 1
        elif character in "])":
            depth -= 1
        elif character == "," and depth == 0:
            found.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return (*found, last) if last else tuple(found)


def is_predicate(operand: str) -> bool:
    """Whether an operand is a predicate, PT included."""
    return _PREDICATE.match(operand) is not None


def is_address(operand: str) -> bool:
    """Whether an operand is an address in memory (constant banks are not)."""
    return "[" in operand and not operand.lstrip("-~|+").startswith(("c[", "cx["))


def registers(operand: str, width: int = 1) -> tuple[str, ...]:
    """The registers that an operand names; `width` registers from each one outside an address, two from those marked .64."""
    found: list[str] = []
    text = re.sub(r"^desc\[UR\d+\]", "", operand)
    descriptor = text.startswith("gdesc")
    for kind, number, wide in _REGISTER.findall(text):
        if kind in ("P", "UP"):
            found.append(kind + number)
            continue
        count = 4 if descriptor else 2 if wide else 1 if "[" in text else width
        found += [f"{kind}{int(number) + i}" for i in range(count)]
    return tuple(found)


@dataclass(frozen=True)
class Instruction:
    """One instruction. `guard`: the predicate it is executed under ("P0", "!UP1"), or None; `target`: an address to jump to."""

    address: int
    guard: str | None
    opcode: str
    operands: tuple[str, ...]
    target: int | None = None

    @cached_property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @cached_property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(self.opcode.split(".")[1:])

    @property
    def text(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".rstrip()

    @property
    def never(self) -> bool:
        """Guarded by false: issued, but without effect."""
        return self.guard in ("!PT", "!UPT")

    @property
    def wide(self) -> bool:
        """Whether integers of 64 bits are added, moved or compared."""
        return self.base.removeprefix("U").removeprefix("V") in WIDE and not {"64", "S64", "U64"}.isdisjoint(self.modifiers)

    @cached_property
    def words(self) -> int:
        """Registers that a load, store or conversion moves per thread."""
        for token in self.modifiers:
            if token in ("64", "128", "256"):
                return int(token) // 32
            if re.fullmatch(r"x\d+", token):
                shape = 4 if "dp256bit" in self.opcode else 2 if "dp128bit" in self.opcode else 1
                return int(token[1:]) * shape
        if self.base in ("LDSM", "STSM", "LDMATRIX"):
            return int(self.modifiers[-1]) if self.modifiers[-1] in ("2", "4") else 1
        return 1

    @property
    def bytes(self) -> int:
        """Bytes that a load or store moves per thread."""
        for token, size in (("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)):
            if token in self.modifiers:
                return size
        return 4 * self.words

    @property
    def multiplies(self) -> bool:
        """Whether a tensor core works."""
        return MULTIPLY.match(self.base) is not None

    @cached_property
    def _result_width(self) -> int:
        if self.base in ("HGMMA", "QGMMA", "IGMMA", "BGMMA"):
            columns = next(int(token.split("x")[1]) for token in self.modifiers if re.fullmatch(r"\d+x\d+x\d+", token))
            return columns // 2 if "F32" in self.modifiers or self.base == "IGMMA" else columns // 4
        if self.multiplies:
            return 2 if self.base == "HMMA" and "F32" not in self.modifiers else 4
        if "WIDE" in self.modifiers or self.base in ("FADD2", "FMUL2", "FFMA2", "DADD", "DMUL", "DFMA"):
            return 2
        if self.wide:
            return 2
        if self.base == "CS2R":
            return 1 if "32" in self.modifiers else 2
        return self.words

    @cached_property
    def _results(self) -> int:
        """How many leading operands are written."""
        operands = self.operands
        if not operands or _WITHOUT_RESULT.match(self.opcode):
            return 0
        if self.base in ("VOTE", "VOTEU"):
            return len(operands) - 1
        if is_predicate(operands[0]):
            if len(operands) > 1 and is_predicate(operands[1]):
                # IMNMX.S64 PT, PT, R14, ... of sm_120
                return 3 if self.base.endswith("IMNMX") else 2
            both = self.base in ("LOP3", "ULOP3", "SHFL", "ATOMG", "ATOMS", "ATOM", "R2UR", "MATCH")
            return 2 if both and len(operands) > 1 and _PLAIN.match(operands[1]) else 1
        count = 1
        while count < min(3, len(operands) - 1) and is_predicate(operands[count]):
            count += 1
        return count

    @cached_property
    def writes(self) -> tuple[str, ...]:
        """Registers and predicates that are written."""
        width = self._result_width
        return tuple(name for operand in self.operands[: self._results] for name in registers(operand, width))

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """The operands that are read."""
        return self.operands[self._results :]

    def _source_width(self, position: int) -> int:
        if self.multiplies:
            if self.base.endswith("GMMA"):
                return 4 if position == 0 else self._result_width
            return (4, 2, 4)[position] if position < 3 else 1
        if "WIDE" in self.modifiers or self.opcode.startswith(("IMAD.HI", "UIMAD.HI")):
            return 2 if position == 2 else 1
        if self.base in ("FADD2", "FMUL2", "FFMA2", "DADD", "DMUL", "DFMA"):
            return 2
        return 2 if self.wide else self.words if self.opcode.startswith(("ST", "RED")) else 1

    @cached_property
    def data(self) -> tuple[str, ...]:
        """Registers and predicates read as data: all but addresses and the guard."""
        return tuple(
            name
            for position, operand in enumerate(self.sources)
            if not is_address(operand)
            for name in registers(operand, self._source_width(position))
        )

    @cached_property
    def addresses(self) -> tuple[str, ...]:
        """Registers that address memory."""
        return tuple(name for operand in self.operands if is_address(operand) for name in registers(operand))

    @cached_property
    def guards(self) -> tuple[str, ...]:
        return registers(self.guard) if self.guard else ()

    @property
    def reads(self) -> tuple[str, ...]:
        return self.data + self.addresses + self.guards


@dataclass(frozen=True)
class Block:
    """A basic block: instructions [start, stop) of the listing, and the numbers of the blocks that may follow."""

    start: int
    stop: int
    successors: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """A natural loop: its first block and all its blocks, in the order of addresses."""

    header: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Code:
    """One kernel's code."""

    instructions: tuple[Instruction, ...]
    blocks: tuple[Block, ...]
    loops: tuple[Loop, ...]

    def body(self, loop: Loop) -> list[Instruction]:
        """The instructions of one iteration, in the order of addresses."""
        return [found for number in loop.blocks for found in self._of_block(number)]

    def _of_block(self, number: int) -> tuple[Instruction, ...]:
        block = self.blocks[number]
        return self.instructions[block.start : block.stop]


def parse(listing: str) -> Code:
    """The code of a listing of one kernel. Raises SassError where it can't be read."""
    return parse_all(listing)[0]


def parse_all(listing: str, sizes: Sequence[int] = ()) -> list[Code]:
    """The codes of a listing of several kernels that follow each other, `sizes` bytes each; without sizes it is one kernel.

    Branches go to labels, as nvdisasm lists a kernel, or to addresses, as it lists raw code.
    """
    labels: dict[str, int] = {}
    pending: list[str] = []
    lines: list[tuple[int, str | None, str, str]] = []
    for line in listing.splitlines():
        label = _LABEL.match(line)
        if label:
            pending.append(label.group(1))
            continue
        found = _LINE.search(line)
        if found:
            address = int(found[1], 16)
            labels |= dict.fromkeys(pending, address)
            pending = []
            lines.append((address, found[2], found[3], found[4]))
    codes, start = [], 0
    for size in sizes or (lines[-1][0] + 16 if lines else 0,):
        own = [line for line in lines if start <= line[0] < start + size]
        codes.append(_code(own, labels, start))
        start += size
    return codes


def _code(lines: list[tuple[int, str | None, str, str]], labels: dict[str, int], start: int) -> Code:
    """One kernel's code, with addresses from 0."""
    if not lines:
        raise SassError("the listing holds no instruction")
    addresses = {address for address, *_ in lines}
    instructions = []
    for address, guard, opcode, operands in lines:
        target = _target(opcode, operands, labels)
        if target is not None and target not in addresses:
            raise SassError(f"{opcode} at {address - start:#06x} jumps to {operands}, which the listing doesn't hold")
        split = _split(operands)
        instructions.append(Instruction(address - start, guard, opcode, split, None if target is None else target - start))
    blocks = _blocks(instructions)
    return Code(tuple(instructions), blocks, _loops(blocks))


def _target(opcode: str, operands: str, labels: dict[str, int]) -> int | None:
    """Where a branch goes; None for other instructions, -1 for an unknown label."""
    if not opcode.startswith(("BRA", "JMP")):
        return None
    label = _TARGET.search(operands)
    if label:
        return labels.get(label[1], -1)
    address = re.search(r"(?:^|\s)(0x[0-9a-f]+)$", operands)
    return int(address[1], 16) if address else None


def _leaves(instruction: Instruction) -> bool:
    return instruction.base in ("EXIT", "RET", "KILL")


def _conditional(instruction: Instruction) -> bool:
    return instruction.guard is not None or any(is_predicate(operand) for operand in instruction.operands)


def _blocks(instructions: list[Instruction]) -> tuple[Block, ...]:
    position = {found.address: at for at, found in enumerate(instructions)}
    starts = {0}
    for at, found in enumerate(instructions):
        if found.target is not None:
            starts.add(position[found.target])
        if (found.target is not None or _leaves(found)) and at + 1 < len(instructions):
            starts.add(at + 1)
    ordered = sorted(starts)
    number = {start: index for index, start in enumerate(ordered)}
    blocks = []
    for start, stop in zip(ordered, [*ordered[1:], len(instructions)], strict=True):
        last = instructions[stop - 1]
        following = []
        if stop in number and not ((_leaves(last) or last.base == "BRA") and not _conditional(last)):
            following.append(number[stop])
        if last.target is not None:
            following.append(number[position[last.target]])
        blocks.append(Block(start, stop, tuple(dict.fromkeys(following))))
    return tuple(blocks)


def _dominators(blocks: tuple[Block, ...], before: list[list[int]]) -> list[set[int] | None]:
    """The dominators of every block that can be reached; None for the others."""
    found: list[set[int] | None] = [None] * len(blocks)
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for number in range(1, len(blocks)):
            known = [dominators for dominators in (found[i] for i in before[number]) if dominators is not None]
            if known:
                fresh = set.intersection(*known) | {number}
                if fresh != found[number]:
                    found[number], changed = fresh, True
    return found


def _loops(blocks: tuple[Block, ...]) -> tuple[Loop, ...]:
    """Natural loops, smallest first; those with the same header are one."""
    before: list[list[int]] = [[] for _ in blocks]
    for number, block in enumerate(blocks):
        for following in block.successors:
            before[following].append(number)
    dominators = _dominators(blocks, before)
    bodies: dict[int, set[int]] = {}
    for number, block in enumerate(blocks):
        for header in block.successors:
            if header in (dominators[number] or ()):
                body, todo = bodies.setdefault(header, {header}), [number]
                while todo:
                    inside = todo.pop()
                    if inside not in body:
                        body.add(inside)
                        todo += before[inside]
    found = [Loop(header, tuple(sorted(body))) for header, body in bodies.items()]
    return tuple(sorted(found, key=lambda loop: sum(blocks[i].stop - blocks[i].start for i in loop.blocks)))
