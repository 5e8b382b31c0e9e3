"""Where the values in a loop come from: every register labelled with the arguments it was loaded from, or that it points to.

A label is a set of bits: one per pointer ("an address in this argument"), one per pointer ("loaded from this argument, or made
from what was"), and one for results of the multiplication, which swallows the others.
"""

from __future__ import annotations

from collections.abc import Iterable

from bench.sass import Instruction, registers
from bench.static_traffic import SHARED_LOADS, SHARED_STORES, Facts, Traffic

PRODUCTS = ("FFMA", "FMUL", "FFMA2", "FMUL2", "HFMA2", "HMUL2", "IDP", "IDP4A", "IMAD", "DFMA")
"""What multiplies where no tensor core does."""

GLOBAL_LOADS = ("LDG", "LD", "LDGSTS", "ATOMG", "ATOM")


class Labels:
    """The labels in one loop, once nothing changes any more.

    reads      what each instruction of the body reads, addresses and memory included
    origins    global load (by address in the code) -> the label of what it loads, but for what its address was computed from
    computed   global load -> the label of the data that its address was computed from
    tables     shared loads whose address was computed from data
    """

    def __init__(self, traffic: Traffic, facts: Facts) -> None:
        pointers = [argument for argument in facts.arguments if argument.value is None]
        bits = {argument.name: 1 << number for number, argument in enumerate(pointers)}
        self._shift = len(pointers)
        self._numbered = {number: bits.get(argument.name, 0) for number, argument in enumerate(facts.arguments, start=1)}
        self._constants = {argument.offset + word: bits[argument.name] for argument in pointers for word in (0, 4)}
        self._pointers = (1 << self._shift) - 1
        self.data = self._pointers << self._shift
        self.product = 1 << (2 * self._shift)
        self.codes = sum(bits.get(name, 0) for name in facts.codes) << self._shift
        self.x = sum(bits.get(name, 0) for name in facts.x) << self._shift
        self.origins: dict[int, int] = {}
        self.computed: dict[int, int] = {}
        self.tables: set[int] = set()
        self._traffic = traffic
        self._tensor_cores = any(found.multiplies for found in traffic.body)
        self._registers: dict[str, int] = {}
        self._stored: dict[int, int] = {}
        for found in traffic.path:
            self._step(found)
        self.reads: list[int] = []
        while True:
            reads = [self._step(found) for found in traffic.body]
            if reads == self.reads:
                break
            self.reads = reads

    def multiplies(self, found: Instruction, read: int) -> bool:
        """Whether an instruction multiplies weights by activations."""
        if self._tensor_cores:
            return found.multiplies
        return found.base in PRODUCTS and bool(read & self.codes) and bool(read & self.x)

    def looks_up(self, found: Instruction) -> bool:
        """Whether a global load's address is computed from what the loop itself loads."""
        loaded = 0
        for other in self._traffic.body:
            loaded |= self.origins.get(other.address, 0)
        return bool(self.computed.get(found.address, 0) & loaded)

    def _of(self, names: Iterable[str]) -> int:
        label = 0
        for name in names:
            label |= self._registers.get(name, 0)
        return label

    def _of_constants(self, found: Instruction, word: int = 0) -> int:
        """The pointer that an operand in the constant bank is one half of, `word` words behind it."""
        label = 0
        for operand in found.operands:
            start = operand.find("c[0x0][0x")
            if start >= 0:
                offset = int(operand[start + 7 :].partition("]")[0], 16) + 4 * word
                label |= self._constants.get(offset, 0)
        return label

    def _load(self, found: Instruction, address: int) -> int:
        """The label of what is loaded from global memory: from the argument that the executed address is in, if known."""
        executed = 0
        for number in self._traffic.pointers.get(found.address, ()):
            executed |= self._numbered.get(number, 0)
        self.origins[found.address] = (executed or address & self._pointers) << self._shift
        self.computed[found.address] = address & self.data
        return self.origins[found.address] | self.computed[found.address]

    def _load_shared(self, found: Instruction, address: int) -> int:
        label = address & self.data
        for writer in self._traffic.writers.get(found.address, ()):
            label |= self._stored.get(writer, 0)
        if address & self.data:
            # What is looked up in a table was not made from what was stored in the loop.
            self.tables.add(found.address)
        elif found.address in self._traffic.unknown_shared:
            for stored in self._stored.values():
                label |= stored
        return label

    def _step(self, found: Instruction) -> int:
        """Label an instruction's results; returns the label of everything it reads."""
        if found.never:
            return 0
        if found.base in ("LDC", "ULDC", "LDCU") and not found.addresses:
            for word, name in enumerate(found.writes):
                self._write(found, (name,), self._of_constants(found, word))
            return 0
        guard = self._of(found.guards) & self.data
        if found.base == "LDGSTS":
            label = self._load(found, self._of(registers(found.operands[1])) | self._of_constants(found))
            self._store(found, label)
            return label | guard
        address = self._of(found.addresses) | (self._of_constants(found) if found.addresses else 0)
        if found.base in GLOBAL_LOADS:
            read = self._load(found, address) | guard
        elif found.base in SHARED_LOADS:
            read = self._load_shared(found, address) | guard
        elif found.base == "LDTM":
            read = self.product
        else:
            read = self._of(found.data) | self._of_constants(found) | guard | address & self.data
        if found.base in SHARED_STORES:
            self._store(found, read & (self.data | self.product))
        self._write(found, found.writes, self.product if self.multiplies(found, read) or read & self.product else read)
        return read

    def _store(self, found: Instruction, label: int) -> None:
        self._stored[found.address] = self._stored.get(found.address, 0) | label

    def _write(self, found: Instruction, names: Iterable[str], label: int) -> None:
        """What a guarded instruction doesn't write stays."""
        for name in names:
            self._registers[name] = label | (self._registers.get(name, 0) if found.guards else 0)
