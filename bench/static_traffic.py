"""What a loop reads and writes: its memory instructions' addresses, executed for all threads of one CTA."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from bench.sass import Code, Instruction, Loop, is_address
from bench.static_addresses import Threads

ROUNDS = 6
"""Iterations that are executed: more than stages, so that every buffer of a ring was filled in the loop."""

SHARED_LOADS = ("LDS", "LDSM", "ATOMS")
SHARED_STORES = ("STS", "STSM", "LDGSTS")

TERABYTE = 40


@dataclass(frozen=True)
class Argument:
    """An argument in constant bank 0, `offset` bytes in; `value` is None for a pointer."""

    name: str
    offset: int
    bytes: int
    value: int | None


@dataclass(frozen=True)
class Facts:
    """What the analysis is told about a launch. `codes`, `x`: the arguments that point to packed weights and to activations."""

    arguments: tuple[Argument, ...]
    threads: int
    shared: int
    bits: int
    codes: tuple[str, ...] = ("codes", "codes1", "codes2")
    x: tuple[str, ...] = ("x",)


@dataclass
class Traffic:
    """What executing addresses showed. Instructions are named by their addresses in the code.

    path       the instructions from the kernel's entry to the loop
    body       those of one iteration; of the whole kernel where it has no loop
    writers    shared load -> the stores whose bytes it reads, -1 for none
    touched    global load -> bytes of global memory, for all threads, in the round where they were most
    pointers   global load -> numbers of the arguments that its addresses come from, from 1
    unknown    instructions whose addresses in shared memory, or in global memory, couldn't be computed
    """

    path: list[Instruction]
    body: list[Instruction]
    writers: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    touched: dict[int, np.ndarray] = field(default_factory=dict)
    pointers: dict[int, set[int]] = field(default_factory=dict)
    unknown_shared: set[int] = field(default_factory=set)
    unknown_global: set[int] = field(default_factory=set)


def observe(code: Code, loop: Loop | None, facts: Facts) -> Traffic:
    """Execute from the kernel's entry through some iterations of the loop; the whole kernel once where there is none."""
    threads = Threads(facts.threads, facts.shared, _constants(facts.arguments))
    traffic = Traffic([], code.body(loop) if loop else list(code.instructions))
    if loop:
        _enter(code, loop.header, threads, traffic)
    for _ in range(ROUNDS if loop else 1):
        for found in traffic.body:
            _execute(found, threads, traffic)
    return traffic


def _constants(arguments: Iterable[Argument]) -> dict[int, int]:
    """The words of constant bank 0. Every pointer gets a terabyte of its own."""
    words = {}
    for number, argument in enumerate(arguments, start=1):
        value = number << TERABYTE if argument.value is None else argument.value
        for byte in range(0, argument.bytes, 4):
            words[argument.offset + byte] = (value >> (8 * byte)) & 0xFFFFFFFF
    return words


def _enter(code: Code, header: int, threads: Threads, traffic: Traffic) -> None:
    """Execute from the entry to the loop's header, where branches aren't known through what lies first."""
    reaching, visited, number = _reaching(code, header), set[int](), 0
    while number != header:
        visited.add(number)
        block = code.blocks[number]
        for found in code.instructions[block.start : block.stop]:
            _execute(found, threads, traffic)
            traffic.path.append(found)
        candidates = [following for following in block.successors if following in reaching and following not in visited]
        if not candidates:
            return
        number = candidates[-1 if _taken(code.instructions[block.stop - 1], threads) else 0]


def _reaching(code: Code, header: int) -> set[int]:
    """The blocks from which the loop can be reached."""
    before = defaultdict(list)
    for number, block in enumerate(code.blocks):
        for following in block.successors:
            before[following].append(number)
    found, todo = {header}, [header]
    while todo:
        for number in before[todo.pop()]:
            if number not in found:
                found.add(number)
                todo.append(number)
    return found


def _taken(branch: Instruction, threads: Threads) -> bool:
    """Whether a branch is known to be taken by all threads."""
    conditions = [threads.read(text) for text in (branch.guard, *branch.operands[:-1]) if text]
    return all(condition is not None and bool(condition.all()) for condition in conditions)


def _execute(found: Instruction, threads: Threads, traffic: Traffic) -> None:
    """One instruction for all threads; memory instructions leave their addresses in `traffic`."""
    if found.never:
        return
    guard = threads.read(found.guard) if found.guard else None
    if found.base == "LDGSTS" and len(found.operands) > 2:
        guard = threads.read(found.operands[2])
    places = [operand for operand in found.operands if is_address(operand)]
    if found.base in SHARED_STORES or found.base in SHARED_LOADS:
        touched = threads.shared_bytes(found, places[0], guard)
        if touched is None:
            traffic.unknown_shared.add(found.address)
        elif found.base in SHARED_STORES:
            threads.writers[touched] = found.address
        else:
            traffic.writers[found.address] |= set(np.unique(threads.writers[touched]).tolist())
    if found.base in ("LDG", "LDGSTS"):
        at = threads.address(places[-1])
        if at is None:
            traffic.unknown_global.add(found.address)
        else:
            traffic.pointers[found.address] = set(np.unique(at >> TERABYTE).tolist())
            touched = np.unique((at if guard is None else at[guard])[:, None] + np.arange(found.bytes))
            if len(touched) >= len(traffic.touched.get(found.address, ())):
                traffic.touched[found.address] = touched
    threads.execute(found)
