"""The machine code of quantlib._cpu: wide instructions stand only in functions that run where the machine has them; memory is
asked ahead.

Two ways to an illegal instruction that no review sees: a function that several objects share (a template of the standard
library, an inline function) is kept once by the linker, maybe the copy that was compiled with wider flags; and what computes a
global variable runs at loading, before anything is chosen.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from build_tools import BuildError
from build_tools.cpu import ISA_FLAGS, units
from build_tools.host import COMMON_FLAGS, OBJECTS, Compiler
from build_tools.objects import object_path
from quantlib.kernels import cpu

if platform.machine() != "x86_64":
    pytest.skip(f"reads the machine code of an x86-64, not of {platform.machine()}", allow_module_level=True)
if shutil.which("objdump") is None or shutil.which("nm") is None:
    pytest.skip("objdump and nm (binutils) are not installed", allow_module_level=True)

LEVELS = tuple(ISA_FLAGS)
NAMESPACE = re.compile(rf"8quantlib3cpu\d+({'|'.join(sorted(LEVELS, key=len, reverse=True))})")
"""In a mangled name: of the function, what it is part of, or what a template is made for; then no other set makes the same."""
AT_LOADING = ("_GLOBAL__", "_Z41__static_initialization_and_destruction")
"""Constructors of global variables, whatever stands in the rest of their names."""

PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
VEX, EVEX = frozenset(b"\xc4\xc5"), 0x62
MASK_REGISTER = re.compile(r"%k[0-7]")
TILE_INSTRUCTION = re.compile(r"ldtilecfg|sttilecfg|tile(?:loaddt?1?|stored|release|zero)|tdp(?:bf16ps|fp16ps|b[su]{2}d)")
BF16_VBMI_AND_VNNI = re.compile(r"vdpbf16ps|vcvtne2?ps2bf16[xy]?|vperm(?:|i2|t2)b|vpmultishiftqb|vpdp(?:bus|wss)ds?")


def level_of_function(name: str) -> str:
    """The set whose machines run a function of that mangled name: all machines where none is named."""
    found = NAMESPACE.search(name)
    return "scalar" if found is None or name.startswith(AT_LOADING) else found[1]


def level_of_instruction(code: bytes, text: str) -> str:
    """The least set that may hold an instruction. In 64-bit mode the bytes C4, C5 (VEX) and 62 (EVEX) begin nothing else."""
    start = next((i for i, byte in enumerate(code) if byte not in PREFIXES), 0)
    if TILE_INSTRUCTION.match(text):
        return "amx"
    if BF16_VBMI_AND_VNNI.match(text):
        return "avx512_bf16"
    if code[start] == EVEX or (code[start] in VEX and MASK_REGISTER.search(text)):
        return "avx512"
    if code[start] in VEX:
        return "avx2"
    # After an optional REX: the three-byte maps (SSSE3 to SSE4.2) and popcnt, which -mavx2 brings along.
    opcode = code[start + (code[start] & 0xF0 == 0x40) :]
    if opcode[:2] in (b"\x0f\x38", b"\x0f\x3a") or (opcode[:2] == b"\x0f\xb8" and 0xF3 in code[:start]):
        return "avx2"
    return "scalar"


def instructions(path: Path) -> Iterator[tuple[str, bytes, str]]:
    """(function, bytes, text) of every instruction."""
    done = subprocess.run(["objdump", "-d", "-w", str(path)], capture_output=True, text=True, check=True)
    function = ""
    for line in done.stdout.splitlines():
        if line.endswith(">:"):
            function = line.partition("<")[2][:-2]
            continue
        fields = line.split("\t")
        if len(fields) == 3:
            yield function, bytes.fromhex(fields[1]), fields[2]


def leaks(path: Path) -> list[str]:
    """Functions that hold an instruction of a higher set than their own, each with one such instruction."""
    found: dict[str, str] = {}
    for function, code, text in instructions(path):
        if function not in found:
            needed, own = level_of_instruction(code, text), level_of_function(function)
            if LEVELS.index(needed) > LEVELS.index(own):
                found[function] = f"{function}: {' '.join(text.split())} needs {needed}, may run on {own}"
    return list(found.values())


def outsiders(path: Path, level: str) -> list[str]:
    """Functions in a set's object that are not the set's own, or that run at loading."""
    done = subprocess.run(["nm", "--defined-only", "--format=posix", str(path)], capture_output=True, text=True, check=True)
    functions = [name for name, kind, *_ in map(str.split, done.stdout.splitlines()) if kind in "tTwWiu"]
    assert functions
    return [name for name in functions if level_of_function(name) != level]


# The built extension


def test_wide_instructions_stand_only_in_functions_of_their_set() -> None:
    if cpu.unavailable is not None:
        pytest.skip(cpu.unavailable)
    path = Path(cpu.native().__file__)
    assert leaks(path) == []
    seen = {level_of_function(function) for function, *_ in instructions(path)}
    if seen == {"scalar"}:
        pytest.skip("the extension was built without other sets, or stripped of its symbols")
    assert seen == set(cpu.build_record("_cpu")["isas"])


@pytest.mark.parametrize("level", LEVELS)
def test_a_sets_object_holds_nothing_that_another_object_may_hold_too(level: str) -> None:
    """Before the linker chooses: that it took the narrow copy of a shared function today says nothing of tomorrow."""
    try:
        compiler = Compiler()
        todo = units(compiler, (), compiler.accepts(["-fopenmp"]), {})
    except BuildError as error:
        pytest.skip(str(error))
    path = next((object_path(unit, OBJECTS / "cpu") for unit in todo if unit.name == level), None)
    if path is None or not path.exists():
        pytest.skip(f"no object of {level} in build/objects")
    assert outsiders(path, level) == []


@pytest.mark.parametrize("level", ["avx2", "avx512_bf16", "amx"])  # avx512 takes avx2's kernels for few rows of x
def test_what_asks_for_the_next_rows_scales_is_called_and_does_so(level: str) -> None:
    """A compiler may drop the calls of a function that only prefetches, and nothing but time tells."""
    if cpu.unavailable is not None:
        pytest.skip(cpu.unavailable)
    if level not in cpu.build_record("_cpu")["isas"]:
        pytest.skip(f"the extension was built without {level}")
    asks, calls = 0, 0
    for function, _, text in instructions(Path(cpu.native().__file__)):
        if level_of_function(function) == level:
            asks += "fetch_rows" in function and text.startswith("prefetch")
            calls += "fetch_rows" in text and text.startswith(("call", "jmp"))
    assert asks >= 4  # scales, their units, zeros, minima
    assert calls >= 1


# Faults that this file is there to find

SHARED = "template <class T> [[gnu::noinline]] void scale(T* x, int n, T by) { for (int i = 0; i < n; ++i) x[i] *= by; }\n"
OPEN = "namespace quantlib::cpu::{level} {{ {body} }}\n"
FAULTS = {
    "a template that two objects share": ("avx2", "avx2", SHARED, "void run(float* x, int n) { scale(x, n, 2.0f); }"),
    "a global variable that is computed at loading": (
        "avx512",
        "avx512",
        "#include <cstdlib>\n",
        "extern float table[64]; float x = [] { for (float& v : table) v = 1.5f; return table[1]; }();",
    ),
    "a function that is compiled too wide": (
        "avx2",
        "avx512",
        "#include <immintrin.h>\n",
        "void run(float* x) { _mm512_storeu_ps(x, _mm512_add_ps(_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16))); }",
    ),
    "a mask register in code for AVX2": (
        "avx2",
        "avx512",
        "#include <immintrin.h>\n",
        "unsigned run(unsigned a, unsigned b) { return _cvtmask32_u32(_kadd_mask32(_cvtu32_mask32(a), _cvtu32_mask32(b))); }",
    ),
    "tile registers in code for AVX-512 BF16": (
        "avx512_bf16",
        "amx",
        "#include <immintrin.h>\n",
        "void run(float* x) { _tile_zero(0); _tile_stored(0, x, 64); }",
    ),
    "BF16 in code for AVX-512": (
        "avx512",
        "avx512_bf16",
        "#include <immintrin.h>\n",
        "void run(float* x, __m512bh a) { _mm512_storeu_ps(x, _mm512_dpbf16_ps(_mm512_loadu_ps(x), a, a)); }",
    ),
}
"""The namespace, the set whose flags compile it, what stands before the namespace and in it."""


def compile_object(folder: Path, name: str, level: str, text: str) -> Path:
    try:
        compiler = Compiler()
    except BuildError as error:
        pytest.skip(str(error))
    if not compiler.accepts(ISA_FLAGS[level]):
        pytest.skip(f"{compiler.version} does not take {' '.join(ISA_FLAGS[level])}")
    source, target = folder / f"{name}.cpp", folder / f"{name}.o"
    source.write_text(text)
    command = [*compiler.command, *COMMON_FLAGS, *ISA_FLAGS[level], "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


@pytest.mark.parametrize("fault", FAULTS)
def test_a_leak_is_found_in_the_object_and_in_what_is_linked(fault: str, tmp_path: Path) -> None:
    namespace, level, before, body = FAULTS[fault]
    wide = compile_object(tmp_path, "wide", level, before + OPEN.format(level=namespace, body=body))
    narrow = compile_object(tmp_path, "narrow", "scalar", SHARED + "float table[64]; void f(float* x) { scale(x, 3, 3.0f); }")
    linked = tmp_path / "linked.so"
    Compiler().link([wide, narrow], linked)
    assert len(leaks(wide)) == 1
    assert len(leaks(linked)) == 1
    if level == namespace:
        assert outsiders(wide, level)


def test_a_healthy_object_has_no_leak(tmp_path: Path) -> None:
    body = "inline float twice(float x) { return x + x; } void run(float* x, int n) { while (n-- > 0) x[n] = twice(x[n]); }"
    for level in LEVELS:
        healthy = compile_object(tmp_path, level, level, OPEN.format(level=level, body=body))
        assert leaks(healthy) == []
        assert outsiders(healthy, level) == []


@pytest.mark.parametrize(
    ("code", "text", "level"),
    [
        ("f3 0f 58 c1", "addss  %xmm1,%xmm0", "scalar"),
        ("2e c5 f8 77", "cs vzeroupper", "avx2"),
        ("c5 f8 77", "vzeroupper", "avx2"),
        ("c4 e2 7d 18 07", "vbroadcastss (%rdi),%ymm0", "avx2"),
        ("66 0f 38 00 c1", "pshufb %xmm1,%xmm0", "avx2"),
        ("f3 48 0f b8 c7", "popcnt %rdi,%rax", "avx2"),
        ("0f b8 c7", "jmpe   0x7", "scalar"),
        ("c5 fb 92 c7", "kmovd  %edi,%k0", "avx512"),
        ("62 f1 7c 48 58 c1", "vaddps %zmm1,%zmm0,%zmm0", "avx512"),
        ("67 62 f1 7c 48 10 00", "vmovups (%eax),%zmm0", "avx512"),
        ("62 f2 75 48 8d c0", "vpermb %zmm0,%zmm1,%zmm0", "avx512_bf16"),
        ("62 f2 76 48 52 c2", "vdpbf16ps %zmm2,%zmm1,%zmm0", "avx512_bf16"),
        ("c4 e2 78 49 44 24 40", "ldtilecfg 0x40(%rsp)", "amx"),
        ("c4 e2 7b 4b 24 0a", "tileloadd (%rdx,%rcx,1),%tmm4", "amx"),
        ("c4 e2 4a 5c c4", "tdpbf16ps %tmm6,%tmm4,%tmm0", "amx"),
        ("48 89 f8", "mov    %rdi,%rax", "scalar"),
    ],
)
def test_an_instructions_set_is_read_from_its_bytes(code: str, text: str, level: str) -> None:
    assert level_of_instruction(bytes.fromhex(code), text) == level
