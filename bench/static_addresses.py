"""Which addresses a kernel's threads use: integer machine code, executed for one CTA at once on the CPU.

Tensor-core kernels move packed weights, decoded weights and activations through the same shared memory, and one thread reads
what another one wrote. Only addresses tell them apart, so the integer arithmetic that makes addresses is executed here, for all
threads, from the kernel's real arguments. Whatever was loaded or converted is unknown, and so is what is computed from it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np

from bench.sass import Instruction, is_predicate

Value = np.ndarray | None
"""One 32-bit number (int64, 0 .. 2^32 - 1) or truth value per thread; None is unknown."""

MASK = 0xFFFFFFFF
_NAME = re.compile(r"(-|~|!)?\|?(U?R|U?P)(Z|T|\d+)")
_CONSTANT = re.compile(r"(-|~)?c\[0x0\]\[(0x[0-9a-f]+)\]")
_TERM = re.compile(r"(-?0x[0-9a-f]+)|(U?R(?:Z|\d+))((?:\.\w+)*)")


def _signed(value: np.ndarray) -> np.ndarray:
    return np.where(value & 0x80000000, value - (1 << 32), value)


@lru_cache(maxsize=4096)
def _parsed(operand: str) -> tuple[str, str, str]:
    """(kind, name, sign) of an operand; kind: register, predicate, constant, number, special, other."""
    found = _NAME.match(operand)
    if found:
        kind = "predicate" if found[2].endswith("P") else "register"
        name = "" if found[3] in "ZT" else found[2] + found[3]
        return kind, name, found[1] or ""
    found = _CONSTANT.match(operand)
    if found:
        return "constant", found[2], found[1] or ""
    if re.fullmatch(r"-?(?:0x[0-9a-f]+|\d+)", operand):
        return "number", operand, ""
    return ("special", operand, "") if operand.startswith("SR") else ("other", operand, "")


class Threads:
    """The registers of all threads of one CTA, and who wrote which byte of shared memory last.

    constants   byte offset in constant bank 0 -> 32-bit word: the launch's arguments and dimensions
    writers     shared memory: byte -> number of the last instruction that wrote it, -1 for none
    """

    def __init__(self, threads: int, shared: int, constants: dict[int, int]) -> None:
        self.threads = threads
        self.constants = constants
        self.values: dict[str, Value] = {}
        # The first bytes are kept free by drivers on some chips: static addresses begin at 0x400 there.
        self.writers = np.full(shared + 4096, -1, dtype=np.int32)

    def constant(self, number: int) -> np.ndarray:
        return np.full(self.threads, number & MASK, dtype=np.int64)

    def read(self, operand: str) -> Value:
        """An operand's value."""
        kind, name, sign = _parsed(operand)
        value: Value
        if kind == "predicate":
            value = self.values.get(name) if name else np.full(self.threads, True)
            return value if value is None or not sign else ~value
        if kind == "register":
            value = self.values.get(name) if name else self.constant(0)
        elif kind == "constant":
            word = self.constants.get(int(name, 16))
            value = None if word is None else self.constant(word)
        elif kind == "number":
            value = self.constant(int(name, 0))
        elif kind == "special":
            value = self._special(name)
        else:
            value = None
        if value is None or not sign:
            return value
        return -value & MASK if sign == "-" else ~value & MASK

    def _special(self, name: str) -> Value:
        if name == "SR_TID.X":
            return np.arange(self.threads, dtype=np.int64)
        if name == "SR_LANEID":
            return np.arange(self.threads, dtype=np.int64) % 32
        # The first CTA of the grid, whose thread blocks are one-dimensional.
        zero = ("SR_CTAID", "SR_TID", "SR_CgaCtaId", "SR_CgaSize", "SR_CLUSTER", "SRZ")
        return self.constant(0) if name.startswith(zero) else None

    def read64(self, operand: str) -> Value:
        """A register pair, or two words of the constant bank."""
        kind, name, sign = _parsed(operand)
        if kind == "number":
            return np.full(self.threads, int(name, 0), dtype=np.int64)
        low = self.read(operand.lstrip("-~"))
        if kind == "constant":
            high = self.read(f"c[0x0][{int(name, 16) + 4:#x}]")
        elif name:
            prefix = name.rstrip("0123456789")
            high = self.read(f"{prefix}{int(name[len(prefix) :]) + 1}")
        else:
            high = self.constant(0)
        if low is None or high is None:
            return None
        value: np.ndarray = low | (high << 32)
        return -value if sign == "-" else ~value if sign else value

    def write(self, name: str, value: Value) -> None:
        self.values[name] = value

    def address(self, operand: str) -> Value:
        """The address of every thread: the sum of an operand's registers and offset."""
        text = re.sub(r"^desc\[UR\d+\]", "", operand)
        total = np.zeros(self.threads, dtype=np.int64)
        for number, name, suffix in _TERM.findall(text):
            if number:
                total = total + int(number, 16)
                continue
            value = self.read64(name) if ".64" in suffix else self.read(name)
            if value is None:
                return None
            scale = re.search(r"\.X(\d+)", suffix)
            total = total + (value * int(scale[1]) if scale else value)
        return total

    def shared_bytes(self, instruction: Instruction, operand: str, guard: Value) -> np.ndarray | None:
        """The bytes of shared memory that the threads under `guard` (all for None) touch; None where an address is unknown."""
        at = self.address(operand)
        if at is None:
            return None
        # The window's base is (CTA in cluster) << 24 on chips with clusters.
        at = at & 0xFFFFFF
        if instruction.base in ("LDSM", "STSM"):
            # Lane 8i + j gives the address of row j of matrix i.
            found = at[np.arange(self.threads) % 32 < 8 * instruction.words][:, None] + np.arange(16)
        else:
            found = (at if guard is None else at[guard])[:, None] + np.arange(instruction.bytes)
        found = np.unique(found)
        return found[(found >= 0) & (found < len(self.writers))]

    def execute(self, instruction: Instruction) -> None:
        """One instruction for all threads. Results that aren't understood become unknown."""
        if instruction.never:
            return
        guard = self.read(instruction.guard) if instruction.guard else None
        results: tuple[Value, ...]
        try:
            rule = _RULES.get(instruction.base.removeprefix("U")) or _RULES.get(instruction.base)
            results = rule(self, instruction) if rule else ()
        except (_UnknownError, IndexError, ValueError):  # an unknown value, or operands that the rule doesn't expect
            results = ()
        names = instruction.writes
        for number, name in enumerate(names):
            value = results[number] if number < len(results) else None
            if instruction.guard and guard is not None:
                before = self.values.get(name)
                value = None if value is None or before is None else np.where(guard, value, before)
            self.write(name, value)


class _UnknownError(Exception):
    """A value that isn't known is needed."""


def _known(value: Value) -> np.ndarray:
    if value is None:
        raise _UnknownError
    return value


def _named(instruction: Instruction, names: Iterable[str], values: Iterable[Value]) -> tuple[Value, ...]:
    """Results in the order of `instruction.writes`: those named PT, RZ are not among them."""
    return tuple(value for name, value in zip(names, values, strict=False) if name[-1].isdigit())


def _halves(value: np.ndarray) -> tuple[Value, ...]:
    return value & MASK, value >> 32 & MASK


def _operands(threads: Threads, instruction: Instruction) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
    """(results' operands, numbers, truth values) of an instruction whose sources are all of one width."""
    results = list(instruction.operands[: len(instruction.operands) - len(instruction.sources)])
    read = threads.read64 if instruction.wide else threads.read
    numbers = [_known(read(text)) for text in instruction.sources if not is_predicate(text)]
    truths = [_known(threads.read(text)) for text in instruction.sources if is_predicate(text)]
    return results, numbers, truths


def _move(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    if instruction.wide:
        return _halves(_known(threads.read64(instruction.sources[0])))
    return (threads.read(instruction.sources[0]),)


def _constants(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    found = _CONSTANT.match(instruction.sources[0])
    if not found:
        raise _UnknownError
    start = int(found[2], 16)
    return tuple(threads.read(f"c[0x0][{start + 4 * number:#x}]") for number in range(instruction.words))


def _special(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    value = threads.read(instruction.sources[0])
    return (value,) * len(instruction.writes) if instruction.sources[0] == "SRZ" else (value,)


def _carry_in(truths: list[np.ndarray], instruction: Instruction) -> np.ndarray:
    # !PT stands for "no carry".
    carries = truths if "X" in instruction.modifiers else []
    return sum((truth.astype(np.int64) for truth in carries), start=np.zeros(1, dtype=np.int64))


def _add(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    results, numbers, truths = _operands(threads, instruction)
    if instruction.wide:
        return _halves(sum(numbers[1:], start=numbers[0]))
    total = np.zeros(threads.threads, dtype=np.int64) + _carry_in(truths, instruction)
    for text in instruction.sources:
        if is_predicate(text):
            continue
        value = _known(threads.read(text.lstrip("-") if text.startswith("-") and not text.startswith("-0x") else text))
        negative = text.startswith("-") and not text.startswith("-0x")
        total = total + ((~value & MASK) + 1 if negative else value)
    carries = (total >> 32) >= 1, (total >> 32) >= 2
    return _named(instruction, results, (total & MASK, *carries))


def _multiply_add(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    modifiers = instruction.modifiers
    texts = [text for text in instruction.sources if not is_predicate(text)]
    results = list(instruction.operands[: len(instruction.operands) - len(instruction.sources)])
    a, b = (_known(threads.read(text)) for text in texts[:2])
    if "WIDE" in modifiers or "HI" in modifiers:
        if "U32" not in modifiers:
            a, b = _signed(a), _signed(b)
        total = a * b + _known(threads.read64(texts[2]))
        if "HI" in modifiers:
            return _named(instruction, results, (total >> 32 & MASK,))
        return _halves(total)
    truths = [_known(threads.read(text)) for text in instruction.sources if is_predicate(text)]
    total = a * b + _known(threads.read(texts[2])) + _carry_in(truths, instruction)
    return _named(instruction, results, (total & MASK,))


def _shifted_add(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    results, numbers, truths = _operands(threads, instruction)
    modifiers = instruction.modifiers
    a, b, shift = numbers[0], numbers[1], int(numbers[-1][0])
    carry = _carry_in(truths, instruction)
    if "HI" in modifiers:
        upper = np.where(a & 0x80000000, MASK, 0) if "SX32" in modifiers else numbers[2]
        moved = ((a | (upper << 32)) << shift >> 32) & MASK
    else:
        moved = (a << shift) & MASK
    total = moved + b + carry
    return _named(instruction, results, (total & MASK, total >> 32 >= 1))


def _shift(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    _, (low, amount, high), _ = _operands(threads, instruction)
    modifiers = instruction.modifiers
    if instruction.base in ("SHL", "SHR"):
        raise _UnknownError
    wide = "U64" in modifiers or "S64" in modifiers
    amount = amount & (31 if "W" in modifiers else MASK)
    amount = np.minimum(amount, 63 if wide else 32)
    signed = "S32" in modifiers or "S64" in modifiers
    both = low | ((_signed(high) if signed else high) << 32)
    if "L" in modifiers:
        return ((both << amount >> 32) & MASK if "HI" in modifiers else (low << amount) & MASK,)
    if "HI" in modifiers and not wide:
        return ((_signed(high) if signed else high) >> amount & MASK,)
    return ((both >> amount >> (32 if "HI" in modifiers else 0)) & MASK,)


def _lookup(numbers: list[np.ndarray], table: int, full: int) -> np.ndarray:
    a, b, c = numbers
    found = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            found = found | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
    return found & full


def _logic(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    results, numbers, _ = _operands(threads, instruction)
    value = _lookup(numbers[:3], int(numbers[3][0]), MASK)
    if is_predicate(results[0]):
        return _named(instruction, results, (value != 0, value))
    return _named(instruction, results, (value, value != 0))


def _predicate_logic(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    truths = [_known(threads.read(text)).astype(np.int64) for text in instruction.sources[:3]]
    value = _lookup(truths, int(instruction.sources[3], 16), 1) != 0
    return _named(instruction, instruction.operands[:2], (value, None))


def _extend(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    _, (value, width), _ = _operands(threads, instruction)
    bits = int(width[0])
    value = value & ((1 << bits) - 1)
    if "U32" not in instruction.modifiers:
        value = np.where(value >> (bits - 1) & 1, value - (1 << bits), value) & MASK
    return (value,)


def _permute(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    _, (a, selector, b), _ = _operands(threads, instruction)
    if instruction.modifiers:
        raise _UnknownError
    both, found = a | (b << 32), np.zeros_like(a)
    for byte in range(4):
        nibble = selector >> (4 * byte) & 15
        value = both >> (8 * (nibble & 7)) & 0xFF
        value = np.where(nibble & 8, np.where(value & 0x80, 0xFF, 0), value)
        found = found | value << (8 * byte)
    return (found,)


def _select(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    _, (a, b), (truth,) = _operands(threads, instruction)
    chosen = np.where(truth, a, b)
    return _halves(chosen) if instruction.wide else (chosen,)


_COMPARE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip


def _compare(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    """ISETP.<comparison>[.U32].<AND|OR>[.EX]: .EX compares upper words, where equal the lower ones' truth value decides."""
    modifiers = instruction.modifiers
    _, (a, b), truths = _operands(threads, instruction)
    if "U64" in modifiers:
        a, b = a.view(np.uint64), b.view(np.uint64)
    elif "U32" not in modifiers and not instruction.wide:
        a, b = _signed(a), _signed(b)
    name = next(token for token in modifiers if token in _COMPARE)
    value = _COMPARE[name](a, b)
    if "EX" in modifiers:
        strict = {"LE": "LT", "GE": "GT"}.get(name, name)
        lower = truths[1]
        value = {"EQ": (a == b) & lower, "NE": (a != b) | lower}.get(name, _COMPARE[strict](a, b) | ((a == b) & lower))
    other = truths[0] if truths else np.full(threads.threads, True)
    results = instruction.operands[:2]
    combine = {"AND": operator.and_, "OR": operator.or_, "XOR": operator.xor}
    how = combine[next((token for token in modifiers if token in combine), "AND")]
    return _named(instruction, results, (how(value, other), how(~value, other)))


def _extremum(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    _, numbers, truths = _operands(threads, instruction)
    if instruction.base == "VIADDMNMX":
        numbers = [(numbers[0] + numbers[1]) & MASK, *numbers[2:]]
    if len(numbers) != 2 or not truths or "U64" in instruction.modifiers or "RELU" in instruction.modifiers:
        raise _UnknownError
    a, b = numbers
    if instruction.wide:
        return _halves(np.where(truths[0], np.minimum(a, b), np.maximum(a, b)))
    first, second = (a, b) if "U32" in instruction.modifiers else (_signed(a), _signed(b))
    return (np.where(truths[0], np.minimum(first, second), np.maximum(first, second)) & MASK,)


def _shuffle(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    value, lane = (_known(threads.read(text)) for text in instruction.sources[:2])
    if "IDX" not in instruction.modifiers:
        raise _UnknownError
    source = np.arange(threads.threads) // 32 * 32 + (lane & 31)
    return _named(instruction, instruction.operands[:2], (None, value[source]))


# Division of integers: a reciprocal in fp32, which integer steps then correct.


def _floats(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint32).view(np.float32)


def _bits(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).view(np.uint32).astype(np.int64)


def _half_constant(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    """HFMA2 R, -RZ, RZ, high, low: how the compiler moves a constant by the units of fp16."""
    a, b, *halves = instruction.sources
    if "BF16_V2" in instruction.modifiers or not {a, b} <= {"-RZ", "RZ"}:
        raise _UnknownError
    high, low = (int(np.float16(float(text)).view(np.uint16)) for text in halves)
    return (threads.constant(high << 16 | low),)


def _magnitude(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    return (np.abs(_signed(_known(threads.read(instruction.sources[0])))),)


def _to_float(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    value = _known(threads.read(instruction.sources[0]))
    return (_bits(value if "U32" in instruction.modifiers else _signed(value)),)


def _to_integer(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    value = np.trunc(_floats(_known(threads.read(instruction.sources[0]))).astype(np.float64))
    if "TRUNC" not in instruction.modifiers or not np.isfinite(value).all():
        raise _UnknownError
    return (value.astype(np.int64) & MASK,)


def _reciprocal(threads: Threads, instruction: Instruction) -> tuple[Value, ...]:
    value = _floats(_known(threads.read(instruction.sources[0])))
    if "RCP" not in instruction.modifiers or (value == 0).any():
        raise _UnknownError
    return (_bits(1 / value),)


_RULES: dict[str, Callable[[Threads, Instruction], tuple[Value, ...]]] = {
    "MOV": _move, "R2UR": _move, "S2R": _special, "S2UR": _special, "CS2R": _special,
    "LDC": _constants, "LDCU": _constants, "ULDC": _constants,
    "IADD3": _add, "IADD": _add, "VIADD": _add, "IMAD": _multiply_add, "LEA": _shifted_add, "SHF": _shift,
    "LOP3": _logic, "PLOP3": _predicate_logic, "SGXT": _extend, "PRMT": _permute, "SEL": _select, "ISETP": _compare,
    "IMNMX": _extremum, "VIMNMX": _extremum, "VIADDMNMX": _extremum, "SHFL": _shuffle,
    "IABS": _magnitude, "I2F": _to_float, "I2FP": _to_float, "F2I": _to_integer, "MUFU": _reciprocal,
    "HFMA2": _half_constant,
}  # fmt: skip
"""Opcode (without the U of the uniform datapath) -> its results, in the order of Instruction.writes."""
