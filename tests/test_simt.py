"""The emulator on which the CUDA kernels are tested: instructions give what the PTX manual says, mistakes are found."""

from __future__ import annotations

import bisect
import itertools
import math
import platform
import time
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.simt.build import BuildError, build, compile_object
from tests.simt.memory import SimtError, allowed, block_order

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator's fibers are written for x86-64")

PROBES = Path(__file__).parent / "simt" / "probes.cpp"
DTYPES = {"half": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def probes() -> ModuleType:
    return build("simt_probes", [PROBES])


def pairs(low: list[int], high: list[int]) -> torch.Tensor:
    """Bit patterns of 16 bits, two in an int32."""
    return torch.tensor([a | b << 16 for a, b in zip(low, high, strict=True)], dtype=torch.uint32).view(torch.int32)


def halves(words: torch.Tensor) -> list[int]:
    """The low patterns, then the high ones."""
    patterns = [word & 0xFFFFFFFF for word in words.tolist()]
    return [p & 0xFFFF for p in patterns] + [p >> 16 for p in patterns]


def test_objects_are_made_anew_when_a_header_changes(tmp_path: Path) -> None:
    source, header = tmp_path / "source.cpp", tmp_path / "header.h"
    source.write_text('#include "header.h"\nint number() { return NUMBER; }\n')
    header.write_text("#define NUMBER 1\n")
    first = compile_object(source, [])
    compiled_at = first.stat().st_mtime_ns
    assert compile_object(source, []) == first
    assert first.stat().st_mtime_ns == compiled_at
    assert compile_object(source, ["-DOTHER"]) != first
    header.write_text("#define NUMBER 2\n")
    assert compile_object(source, []) != first
    header.write_text("#define NUMBER\n")
    with pytest.raises(BuildError, match="number"):
        compile_object(source, [])


# ------------------------------------------------------------------------------------------------------------------ arithmetic


class Exact:
    """A 16-bit number type by its table of values: every finite pattern as a fraction, in order."""

    def __init__(self, dtype: torch.dtype) -> None:
        patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
        self.floats = patterns.view(dtype).to(torch.float64).tolist()
        self.positive = [Fraction(v) for v in self.floats[:32768] if math.isfinite(v)]
        self.step_at_top = self.positive[-1] - self.positive[-2]

    def nearest(self, value: Fraction, negative: bool) -> int:
        """The pattern nearest to `value`, ties to the even pattern; `negative` is the sign of a zero."""
        sign = 0x8000 if value < 0 or (value == 0 and negative) else 0
        size = abs(value)
        if size >= self.positive[-1] + self.step_at_top / 2:
            return sign | len(self.positive)
        above = bisect.bisect_left(self.positive, size)
        if above == len(self.positive):
            return sign | above - 1
        if above == 0 or self.positive[above] == size:
            return sign | above
        middle = (self.positive[above - 1] + self.positive[above]) / 2
        upper = size > middle or (size == middle and above % 2 == 0)
        return sign | (above if upper else above - 1)

    def fma(self, a: int, b: int, c: int) -> int:
        x, y, z = (self.floats[p] for p in (a, b, c))
        if not all(map(math.isfinite, (x, y, z))):
            result = x * y + z
            return 0x7FFF if math.isnan(result) else (0x8000 if result < 0 else 0) | len(self.positive)
        negative_zero = math.copysign(1, x) * math.copysign(1, y) < 0 and math.copysign(1, z) < 0
        return self.nearest(Fraction(x) * Fraction(y) + Fraction(z), negative_zero and (x * y == 0 or z == 0))


SPECIAL = [
    0x0000,
    0x0001,
    0x03FF,
    0x0400,
    0x007F,
    0x0080,
    0x3C00,
    0x3F80,
    0x7BFF,
    0x7C00,
    0x7F7F,
    0x7F80,
    0x7C01,
    0x3555,
    0x1234,
]
SPECIAL += [0x8000, 0x8001, 0xBF80, 0xFBFF, 0xFC00, 0xFF80, 0x7FFF]


def operands() -> tuple[list[int], list[int], list[int]]:
    """Patterns for three operands: specials with each other, random ones, and sums that nearly cancel."""
    generator = torch.Generator().manual_seed(1)
    a, b, c = (torch.randint(0, 65536, (4000,), generator=generator).tolist() for _ in range(3))
    close = torch.randint(0x3800, 0x4200, (3, 2000), generator=generator).tolist()
    for triple in itertools.product(SPECIAL, SPECIAL, SPECIAL[::3]):
        for into, pattern in zip((a, b, c), triple, strict=True):
            into.append(pattern)
    for into, patterns, sign in zip((a, b, c), close, (0, 0, 0x8000), strict=True):
        into += [p | sign for p in patterns]
    return (a + a[:1], b + b[:1], c + c[:1]) if len(a) % 2 else (a, b, c)


def arithmetic(probes: ModuleType, name: str, kind: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(a)
    with allowed(probes, {"a": a, "b": b, "c": c}, {"out": out}):
        probes.arithmetic(name, kind == "half", a.data_ptr(), b.data_ptr(), c.data_ptr(), out.data_ptr(), a.numel())
    return out


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", ["fma2", "mul2", "add2", "sub2"])
def test_sixteen_bit_arithmetic_rounds_the_exact_result_once(probes: ModuleType, name: str, kind: str) -> None:
    exact = Exact(DTYPES[kind])
    one = exact.floats.index(1.0)
    a, b, c = operands()
    expected = {
        "fma2": lambda x, y, z: exact.fma(x, y, z),
        "mul2": lambda x, y, z: exact.fma(x, y, 0x8000),
        "add2": lambda x, y, z: exact.fma(x, one, y),
        "sub2": lambda x, y, z: exact.fma(y, one | 0x8000, x),
    }[name]
    half = len(a) // 2
    words = [pairs(each[:half], each[half:]) for each in (a, b, c)]
    found = halves(arithmetic(probes, name, kind, *words))
    wrong = [(hex(x), hex(y), hex(z)) for x, y, z, f in zip(a, b, c, found, strict=True) if expected(x, y, z) != f]
    assert not wrong, f"{len(wrong)} of {len(found)} differ, for example {wrong[:3]}"


@pytest.mark.parametrize("kind", DTYPES)
def test_conversions_agree_with_torch(probes: ModuleType, kind: str) -> None:
    dtype = DTYPES[kind]
    generator = torch.Generator().manual_seed(2)
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=generator).to(torch.int32)
    numbers = torch.cat([bits.view(torch.float32), torch.randn(20000, generator=generator) * 1e-5, torch.tensor([0.0, -0.0])])
    words = numbers.view(torch.int32)
    packed = arithmetic(probes, "pack2", kind, words, words.flip(0), words)
    found = torch.tensor(halves(packed), dtype=torch.int32).to(torch.uint16).view(dtype).float()
    expected = torch.cat([numbers, numbers.flip(0)]).to(dtype).float()
    assert torch.equal(found.nan_to_num(1.5), expected.nan_to_num(1.5))
    assert torch.equal(found.isnan(), expected.isnan())
    for name, place in (("low", slice(0, len(numbers))), ("high", slice(len(numbers), None))):
        widened = arithmetic(probes, name, kind, packed, packed, packed).view(torch.float32)
        assert torch.equal(widened.nan_to_num(1.5), expected[place].nan_to_num(1.5))


def test_bit_instructions(probes: ModuleType) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b, c = (torch.randint(-(2**31), 2**31, (5000,), generator=generator).to(torch.int32) for _ in range(3))
    assert torch.equal(arithmetic(probes, "lop3_and_or", "half", a, b, c), (a & b) | c)
    assert torch.equal(arithmetic(probes, "lop3_xor", "half", a, b, c), a ^ b ^ c)
    found = arithmetic(probes, "prmt", "half", a, b, c)
    for x, y, selector, f in zip(a.tolist(), b.tolist(), c.tolist(), found.tolist(), strict=True):
        source = (x & 0xFFFFFFFF).to_bytes(4, "little") + (y & 0xFFFFFFFF).to_bytes(4, "little")
        digits = [selector >> 4 * i & 15 for i in range(4)]
        picked = [source[d & 7] if d < 8 else 0xFF * (source[d & 7] >> 7) for d in digits]
        assert bytes(picked) == (f & 0xFFFFFFFF).to_bytes(4, "little")


# ------------------------------------------------------------------------------------------------------------------ fragments
# The formulae of the PTX manual, "Matrix Fragments for mma.m16n8k16 with floating point type" and "ldmatrix".


def a_place(lane: int, i: int) -> tuple[int, int]:
    row = lane >> 2 if i in (0, 1, 4, 5) else (lane >> 2) + 8
    return row, (lane % 4) * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_place(lane: int, i: int) -> tuple[int, int]:
    return (lane % 4) * 2 + (i & 1) + (8 if i >= 2 else 0), lane >> 2


def c_place(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + (8 if i >= 2 else 0), (lane % 4) * 2 + (i & 1)


def fragments(matrix: torch.Tensor, place: object, count: int) -> torch.Tensor:
    """[32, count]: what each lane holds of the matrix."""
    assert callable(place)
    return torch.stack([torch.stack([matrix[place(lane, i)] for i in range(count)]) for lane in range(32)])


@pytest.mark.parametrize("kind", DTYPES)
def test_mma_multiplies_by_the_manuals_fragments(probes: ModuleType, kind: str) -> None:
    generator = torch.Generator().manual_seed(4)
    a, b, c = (torch.randint(-9, 10, shape, generator=generator).float() for shape in ((16, 16), (16, 8), (16, 8)))
    a_words = fragments(a.to(DTYPES[kind]), a_place, 8).view(torch.int32)
    b_words = fragments(b.to(DTYPES[kind]), b_place, 4).view(torch.int32)
    d = fragments(c, c_place, 4)
    with allowed(probes, {"a": a_words, "b": b_words}, {"d": d}):
        probes.mma(kind == "half", a_words.data_ptr(), b_words.data_ptr(), d.data_ptr())
    assert torch.equal(d, fragments(a @ b + c, c_place, 4))


@pytest.mark.parametrize(("name", "count", "trans"), [("x4", 4, 0), ("x2", 2, 0), ("trans_x4", 4, 1), ("trans_x2", 2, 1)])
def test_load_matrix_gives_each_lane_its_pair(probes: ModuleType, name: str, count: int, trans: int) -> None:
    rows = torch.arange(32 * 8, dtype=torch.int16).view(32, 8)
    out = torch.zeros(32, 8, dtype=torch.int16)
    with allowed(probes, {"rows": rows}, {"out": out}):
        probes.load_matrix(name, rows.data_ptr(), out.data_ptr())
    for lane, m, i in itertools.product(range(32), range(count), range(2)):
        row, column = lane // 4, 2 * (lane % 4) + i
        if trans:
            row, column = column, row
        assert out[lane, 2 * m + i] == rows[8 * m + row, column]


def test_shuffles(probes: ModuleType) -> None:
    out = torch.zeros(64, 2)
    with allowed(probes, {}, {"out": out}):
        probes.shuffles(out.data_ptr())
    lane, first = torch.arange(64) % 32, torch.arange(64) // 32 * 32
    assert torch.equal(out, torch.stack([first + (lane + 1) % 32, first + (lane ^ 5)], 1).float())


def meet(probes: ModuleType, mistake: str = "") -> torch.Tensor:
    """Eight blocks meet: the sum, and which was last."""
    counter, partial, out = (torch.zeros(n, dtype=torch.int32) for n in (1, 512, 2))
    with allowed(probes, {}, {"counter": counter, "partial": partial, "out": out}):
        probes.meeting(counter.data_ptr(), partial.data_ptr(), out.data_ptr(), 8, mistake)
    assert counter.item() == 8
    return out


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_blocks_meet_in_any_order(probes: ModuleType, order: str) -> None:
    lasts = set()
    for seed in range(8):
        with block_order(probes, order, seed):
            out = meet(probes)
        assert out[0] == 64 * 255
        lasts.add(out[1].item())
    assert lasts == {"forward": {7}, "reverse": {0}}.get(order, lasts)
    assert order != "random" or len(lasts) > 2


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        ("no barrier before the counter", "race: read of byte .* of partial, which thread .* of block"),
        ("no barrier after the counter", "race: read of byte .* of partial, which thread .* of block"),
        ("no counter", "race: read of byte .* of partial, which thread .* of block"),
        ("by the constant path", "load_stream of byte 0 of partial, which block 0 wrote in this launch"),
    ],
)
def test_blocks_that_meet_need_counter_and_barriers(probes: ModuleType, mistake: str, found: str, order: str) -> None:
    with block_order(probes, order), pytest.raises(SimtError, match=found):
        meet(probes, mistake)


@pytest.mark.parametrize(("blocks", "barrier", "fine"), [(1, True, True), (1, False, False), (2, True, False)])
def test_two_threads_may_not_write_the_same_output(probes: ModuleType, blocks: int, barrier: bool, fine: bool) -> None:
    out = torch.zeros(1, dtype=torch.int32)
    with allowed(probes, {}, {"out": out}):
        if fine:
            probes.double_write(out.data_ptr(), blocks, barrier)
        else:
            with pytest.raises(SimtError, match="race: write of byte 0 of out, which thread 0 of block 0 wrote too"):
                probes.double_write(out.data_ptr(), blocks, barrier)


# ------------------------------------------------------------------------------------------------------------------- mistakes

MISTAKES = {
    "shared beyond the end": "outside the block's 1024 bytes",
    "shared before the start": "outside the block's 1024 bytes",
    "shared misaligned": "misaligned",
    "unwritten": "which nobody wrote",
    "half unwritten": "which nobody wrote",
    "read before barrier": "wrote with no barrier in between|nobody wrote",
    "read after sync_warp of another warp": "race: read|nobody wrote",
    "write before barrier": "race: write .* wrote too",
    "overwrite before barrier": "race: write .* read with no barrier|race: read",
    "matrix before sync_warp": "by the whole warp",
    "matrix in flight": "read of shared byte .* copy is in flight",
    "matrix of nothing": "nobody wrote",
    "matrix misaligned": "misaligned: shared access of 16 bytes at offset 8",
    "matrix beyond the end": "shared access of 16 bytes at offset 1024, outside",
    "global beyond the end": "256 bytes past the start of tensor",
    "global across the end": "248 bytes past the start of tensor",
    "global misaligned": "misaligned: global read .* byte 8 of tensor",
    "global null": "below all known memory",
    "global write": "tensor, which is read only",
    "copy beyond the end": "global read .* past the start of tensor",
    "overwritten in flight": "copy is in flight",
    "two copies in flight": "copy is in flight",
    "uncommitted": "copy is in flight",
    "divergent barriers": "divergent barriers",
    "early end": "threads never come|ends while others wait",
    "late end": "threads never come|ends while others wait",
    "lane missing": "never come|ends while others wait",
    "lane at a barrier": "never come|while others wait",
    "warp torn apart": "deadlock",
    "two collectives": "divergent warp",
    "shuffle from nowhere": "no lane 32",
}


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(probes: ModuleType, name: str, order: str) -> None:
    memory = torch.zeros(64, dtype=torch.int32)
    with (
        allowed(probes, {"tensor": memory}),
        block_order(probes, order),
        pytest.raises(SimtError, match=MISTAKES[name]) as error,
    ):
        probes.mistake(name, memory.data_ptr())
    assert "block (" in str(error.value)
    assert "probes.cpp:" in str(error.value)


def test_errors_leave_the_emulator_usable(probes: ModuleType) -> None:
    for _ in range(3):
        with pytest.raises(SimtError):
            probes.mistake("divergent barriers", 0)
        test_shuffles(probes)


def test_unknown_memory_is_refused_when_nothing_is_known(probes: ModuleType) -> None:
    memory = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(SimtError, match="below all known memory"):
        probes.mistake("global misaligned", memory.data_ptr())


# (last, waits, meets, step of the reader), what is found
PIPELINES = [
    ((0, True, True, 1), None),
    ((0, True, False, 0), None),
    ((0, False, True, 0), "copy is in flight: thread"),
    ((1, True, True, 1), "copy is in flight"),
    ((1, True, False, 0), "read of shared byte (1024|2032), to which a copy is in flight"),
    ((0, True, False, 1), "race: read|in flight|nobody wrote"),
]


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(("case", "found"), PIPELINES)
def test_copies_need_their_wait_and_then_a_barrier(
    probes: ModuleType, case: tuple[int, bool, bool, int], found: str | None, order: str
) -> None:
    source = torch.arange(512, dtype=torch.int32)
    target = torch.zeros_like(source)
    with allowed(probes, {"source": source}, {"target": target}), block_order(probes, order):
        if found is None:
            probes.pipeline(source.data_ptr(), target.data_ptr(), *case)
            assert torch.equal(source, target)
        else:
            with pytest.raises(SimtError, match=found):
                probes.pipeline(source.data_ptr(), target.data_ptr(), *case)


# --------------------------------------------------------------------------------------------------------------- bank conflicts

# bytes a lane, stride, lanes that take part: trips to the banks, conflicts
PATTERNS = [
    ((4, 4, 32), (1, 0)),  # neighbours
    ((4, 0, 32), (1, 0)),  # one word for all
    ((4, 8, 32), (2, 1)),
    ((4, 128, 32), (32, 31)),  # one bank
    ((4, 132, 32), (1, 0)),  # padded rows
    ((4, 128, 4), (4, 3)),
    ((1, 1, 32), (1, 0)),  # four lanes share a word
    ((1, 128, 32), (32, 31)),
    ((8, 8, 32), (2, 0)),
    ((8, 16, 32), (4, 2)),
    ((16, 16, 32), (4, 0)),
    ((16, 16, 8), (1, 0)),
    ((16, 32, 32), (8, 4)),
    ((16, 128, 32), (32, 28)),
    ((16, 144, 32), (4, 0)),
]


@pytest.mark.parametrize(("case", "expected"), PATTERNS)
def test_trips_to_the_banks(probes: ModuleType, case: tuple[int, int, int], expected: tuple[int, int]) -> None:
    probes.pattern(*case)
    found = probes.counters()
    assert found["steady"]["load"] == {"accesses": 1, "wavefronts": expected[0], "conflicts": expected[1]}
    assert found["steady"]["store"]["accesses"] == 0
    assert found["all"]["store"] == {"accesses": 128, "wavefronts": 128, "conflicts": 0}
    assert found["uncounted"] == 0


@pytest.mark.parametrize(("stride", "conflicts"), [(16, 0), (32, 4), (128, 28), (144, 0), (64, 12)])
def test_trips_of_load_matrix(probes: ModuleType, stride: int, conflicts: int) -> None:
    probes.matrix_pattern(stride)
    found = probes.counters()["steady"]["matrix"]
    assert found == {"accesses": 1, "wavefronts": 4 + conflicts, "conflicts": conflicts}


def test_accesses_that_could_not_be_compared_are_told(probes: ModuleType) -> None:
    probes.long_run(20000)
    found = probes.counters()
    assert found["all"]["load"]["accesses"] + found["uncounted"] // 32 == 20000
    assert found["uncounted"] > 0


def test_the_emulator_is_fast_enough_for_hundreds_of_launches(probes: ModuleType) -> None:
    started = time.process_time()
    probes.speed(500)
    per_second = probes.counters()["operations"] / (time.process_time() - started)
    assert per_second > 2e6, f"{per_second:.3g} operations a second; 15 million were measured when this was written"
