"""What a kernel's main loop does per weight: which instructions lie between a packed weight's load and its use.

Decoding is

    every instruction that reads something made from codes, stores and lookups included, up to the multiplication (exclusive),
    and what else such an instruction is given: converted scales, zeros, constants that are made again in every iteration.

Address arithmetic (what only becomes an address or a truth value), loads, activations, accumulators and barriers are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bench.sass import Code, Instruction, SassError
from bench.static_labels import GLOBAL_LOADS, Labels
from bench.static_traffic import SHARED_LOADS, SHARED_STORES, Facts, Traffic, observe

GLOBAL_STORES = ("STG", "ST", "RED")

BY_DESCRIPTOR = ("HGMMA", "QGMMA", "IGMMA", "UTC")
"""Multiplications that may read shared or tensor memory by themselves; DESCRIBED: the stores that put operands there."""

DESCRIBED = ("STS", "STSM", "STTM")

SYNCHRONIZE = (
    "BAR", "DEPBAR", "LDGDEPBAR", "MEMBAR", "FENCE", "WARPSYNC", "WARPGROUP", "SYNCS", "NOP", "BSSY", "BSYNC", "UTCBAR",
    "ERRBAR", "CCTL", "ARRIVES",
)  # fmt: skip


@dataclass(frozen=True)
class Decode:
    """Counts of one iteration of the main loop (of the whole kernel where it has no loop).

    weights        packed weights that one CTA loads per iteration, each counted once
    decode, total  instructions per thread
    loads          bytes of each load of codes, widest first
    roles          instruction address -> load w, decode, use, load, x, scale, acc, store, sync, address or branch
    doubts         what could not be followed
    """

    body: tuple[Instruction, ...]
    threads: int
    weights: float
    decode: int
    total: int
    loads: tuple[int, ...]
    roles: dict[int, str]
    opcodes: Counter[str]
    doubts: tuple[str, ...]

    @property
    def per_weight(self) -> float:
        """Decode instructions per weight."""
        return self.decode * self.threads / self.weights

    @property
    def total_per_weight(self) -> float:
        """All the loop's instructions per weight."""
        return self.total * self.threads / self.weights


def analyse(code: Code, facts: Facts) -> Decode:
    """Count the main loop's decoding. Raises SassError where no codes are loaded there."""
    found = _main_loop(code, facts)
    if not any(found.loads):
        raise SassError("the main loop loads no codes")
    decoding = found.decoding()
    body = found.body
    return Decode(
        body=tuple(body),
        threads=facts.threads,
        weights=8 * found.unique_bytes(facts.threads) / facts.bits,
        decode=len(decoding),
        total=len(body),
        loads=tuple(sorted((load.bytes for load, codes in zip(body, found.loads, strict=True) if codes), reverse=True)),
        roles={instruction.address: found.role(number, decoding) for number, instruction in enumerate(body)},
        opcodes=Counter(body[number].base for number in decoding),
        doubts=tuple(found.doubts()),
    )


def _main_loop(code: Code, facts: Facts) -> _Labelled:
    """The innermost loop with most tensor-core instructions; else that with most products and loads of codes; else all code."""
    multiplying = [loop for loop in code.loops if any(found.multiplies for found in code.body(loop))]
    innermost = [loop for loop in multiplying if not any(set(other.blocks) < set(loop.blocks) for other in multiplying)]
    if innermost:
        most = max(innermost, key=lambda loop: sum(found.multiplies for found in code.body(loop)))
        return _Labelled(observe(code, most, facts), facts)
    labelled = [_Labelled(observe(code, loop, facts), facts) for loop in code.loops]
    best = max(labelled, key=_Labelled.score, default=None)
    return best if best is not None and best.score() else _Labelled(observe(code, None, facts), facts)


class _Labelled:
    """A loop's instructions, each with what it reads: whether it loads codes, whether it uses what was made from them."""

    def __init__(self, traffic: Traffic, facts: Facts) -> None:
        self.traffic = traffic
        self.labels = Labels(traffic, facts)
        self.body, self.reads = traffic.body, self.labels.reads
        codes = self.labels.codes
        pairs = list(zip(self.body, self.reads, strict=True))
        self.uses = [
            self.labels.multiplies(found, read) or (found.base in GLOBAL_STORES and bool(read & codes)) for found, read in pairs
        ]
        self.loads = [
            found.base in ("LDG", "LDGSTS") and bool(self.labels.origins.get(found.address, 0) & codes) for found in self.body
        ]

    def score(self) -> int:
        """How much it looks like the main loop of a kernel without tensor cores."""
        return sum(self.loads) + sum(self.labels.multiplies(*pair) for pair in zip(self.body, self.reads, strict=True))

    def unique_bytes(self, threads: int) -> int:
        """Bytes of codes that one CTA loads per iteration; every thread's own where addresses are unknown."""
        loads = [found for found, codes in zip(self.body, self.loads, strict=True) if codes]
        known = [self.traffic.touched[found.address] for found in loads if found.address in self.traffic.touched]
        unknown = sum(found.bytes for found in loads if found.address not in self.traffic.touched)
        return (len(np.unique(np.concatenate(known))) if known else 0) + unknown * threads

    def decoding(self) -> set[int]:
        """The positions of decoding instructions."""
        labels = self.labels
        found = {
            number
            for number, read in enumerate(self.reads)
            if read & labels.codes and not read & labels.product and not self.uses[number] and not self.loads[number]
        }
        return found | self._given(found)

    def _given(self, decoding: set[int]) -> set[int]:
        """Instructions that make what decoding instructions are given besides codes."""
        found: set[int] = set()
        todo = [(number, name) for number in decoding for name in self.body[number].data]
        while todo:
            reader, name = todo.pop()
            for number in self._makers(reader, name):
                if number in found or number in decoding or self._stops(number):
                    continue
                instruction = self.body[number]
                todo += [(number, inner) for inner in instruction.data]
                if instruction.base in GLOBAL_LOADS:
                    todo += [(number, inner) for inner in instruction.addresses]
                for store in self._stores(instruction):
                    found.add(store)
                    todo += [(store, inner) for inner in self.body[store].data]
                found.add(number)
        return found

    def _stops(self, number: int) -> bool:
        """Whether what decoding is given comes from outside at this instruction: a load, or what is no decoding at all."""
        instruction, read, labels = self.body[number], self.reads[number], self.labels
        if self.uses[number] or read & (labels.product | labels.x):
            return True
        if instruction.base in GLOBAL_LOADS:
            return not labels.looks_up(instruction)
        if instruction.base in SHARED_LOADS:
            return not self._stores(instruction)
        if instruction.base in ("LDC", "LDCU", "ULDC"):
            return True
        return all(name.startswith(("P", "UP")) for name in instruction.writes) and not read & labels.data

    def _stores(self, load: Instruction) -> set[int]:
        """The stores in the loop, copies from global memory aside, whose bytes a load from shared memory reads."""
        writers = self.traffic.writers.get(load.address, ()) if load.base in SHARED_LOADS else ()
        return {
            number
            for number, found in enumerate(self.body)
            if found.address in writers and found.base in SHARED_STORES and found.base != "LDGSTS"
        }

    def _makers(self, reader: int, name: str) -> list[int]:
        """The instructions whose result `name` the reader may see: the last writer before it; before a guarded one, another."""
        found = []
        for step in range(1, len(self.body) + 1):
            number = (reader - step) % len(self.body)
            if name in self.body[number].writes and not self.body[number].never:
                found.append(number)
                if not self.body[number].guard:
                    break
        return found

    def role(self, number: int, decoding: set[int]) -> str:
        """An instruction's role, as it is shown."""
        found, read, labels = self.body[number], self.reads[number], self.labels
        if found.base in SYNCHRONIZE or found.never:
            return "sync"
        if self.loads[number]:
            return "load w"
        if self.uses[number]:
            return "use"
        if number in decoding:
            return "decode"
        if found.base in GLOBAL_LOADS or found.base in SHARED_LOADS:
            return "load"
        if found.base in SHARED_STORES or found.base in GLOBAL_STORES:
            return "store"
        for name, label in (("acc", labels.product), ("x", labels.x), ("scale", labels.data)):
            if read & label:
                return name
        return "branch" if found.target is not None else "address"

    def doubts(self) -> Iterable[str]:
        """What makes the count unsafe, in words."""
        traffic, labels = self.traffic, self.labels
        for found in self.body:
            elsewhere = found.address in traffic.unknown_global and not labels.looks_up(found)
            if elsewhere or found.address in traffic.unknown_shared - labels.tables:
                yield f"the address of {found.text} at {found.address:#06x} was not understood"
        pairs = list(zip(self.body, self.reads, self.uses, strict=True))
        by_descriptor = any(use and found.base.startswith(BY_DESCRIPTOR) for found, _, use in pairs)
        if not any(read & labels.codes and (use or (by_descriptor and found.base in DESCRIBED)) for found, read, use in pairs):
            yield "nothing made from codes reaches the multiplication"
