"""Which instruction set runs: a function of what the machine has, looked at over everything that a machine may have."""

from __future__ import annotations

import itertools
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from build_tools import BuildError
from build_tools.cpu import ISA_FLAGS
from build_tools.host import Compiler
from quantlib.kernels import cpu

if cpu.unavailable is not None:
    pytest.skip(cpu.unavailable, allow_module_level=True)

native = cpu.native()
ORDER = tuple(ISA_FLAGS)
FEATURES: tuple[str, ...] = tuple(native.FEATURES)
NEEDS: dict[str, frozenset[str]] = {isa: frozenset(native.needs_of(isa)) for isa in ORDER}
COMPILED: tuple[str, ...] = tuple(native.isas_for(FEATURES))

MACROS = {
    "sse3": "__SSE3__",
    "ssse3": "__SSSE3__",
    "sse4_1": "__SSE4_1__",
    "sse4_2": "__SSE4_2__",
    "popcnt": "__POPCNT__",
    "avx": "__AVX__",
    "f16c": "__F16C__",
    "fma": "__FMA__",
    "avx2": "__AVX2__",
    "avx512f": "__AVX512F__",
    "avx512bw": "__AVX512BW__",
    "avx512vl": "__AVX512VL__",
    "avx512dq": "__AVX512DQ__",
    "avx512_bf16": "__AVX512BF16__",
    "avx512vbmi": "__AVX512VBMI__",
    "avx512_vnni": "__AVX512VNNI__",
    "amx_tile": "__AMX_TILE__",
    "amx_bf16": "__AMX_BF16__",
}
"""By what a compiler tells a program that it takes a feature for granted."""
IMPLIED = {"__CRC32__", "__XSAVE__"}
"""Part of SSE4.2; asked by os_ymm."""
NO_FEATURE = ("__FP_FAST_", "__BIGGEST_ALIGNMENT__", "__GCC_HAVE_", "__SSE_MATH__", "__SSE2_MATH__", "__EVEX", "__AVX10")
"""Consequences of features."""


def feature_sets() -> Iterator[frozenset[str]]:
    return (frozenset(each) for size in range(len(FEATURES) + 1) for each in itertools.combinations(FEATURES, size))


def expected(features: frozenset[str]) -> list[str]:
    return [isa for isa in COMPILED if NEEDS[isa] <= features]


def test_the_build_has_the_sets_that_the_record_names() -> None:
    assert list(COMPILED) == cpu.build_record("_cpu")["isas"]
    assert COMPILED[0] == "scalar"


def test_each_set_needs_what_the_one_before_it_needs_and_scalar_nothing() -> None:
    assert NEEDS["scalar"] == frozenset()
    for lower, higher in itertools.pairwise(ORDER):
        assert NEEDS[lower] < NEEDS[higher]
    assert frozenset().union(*NEEDS.values()) == frozenset(FEATURES)
    with pytest.raises(ValueError, match="no instruction set"):
        native.needs_of("sse9")


def test_over_every_set_of_features_exactly_the_sets_whose_needs_are_met_may_run() -> None:
    """All 2^21. So what runs needs nothing that is missing, and with one need gone the set is gone."""
    for features in feature_sets():
        assert native.isas_for(list(features)) == expected(features), sorted(features)


def test_without_one_of_its_needs_a_set_and_all_above_it_are_gone() -> None:
    for isa in COMPILED:
        assert native.isas_for(list(NEEDS[isa]))[-1] == isa
        for lost in NEEDS[isa]:
            lower = COMPILED[: COMPILED.index(isa)]
            left = native.isas_for([feature for feature in FEATURES if feature != lost])
            assert set(left) <= set(lower), (isa, lost)
    assert native.isas_for([]) == ["scalar"]


@pytest.mark.parametrize("limit", ["", *ORDER])
def test_a_limit_lowers_and_never_raises(limit: str) -> None:
    """Over machines that lack one or two features, and those that have only what a set needs."""
    machines = [frozenset(FEATURES) - set(lost) for size in (0, 1, 2) for lost in itertools.combinations(FEATURES, size)]
    for features in (*machines, *NEEDS.values()):
        allowed = expected(features)
        if limit:
            allowed = [isa for isa in allowed if ORDER.index(isa) <= ORDER.index(limit)]
        assert native.isa_for(list(features), limit) == allowed[-1], sorted(features)


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="QUANTLIB_CPU_ISA=sse9 is unknown: expected one of scalar, avx2, avx512"):
        native.isa_for([], "sse9")
    with pytest.raises(ValueError, match="unknown CPU feature avx9"):
        native.isas_for(["avx9"])


def test_what_runs_here_is_what_the_function_says_of_this_machine() -> None:
    assert native.available_isas() == native.isas_for(native.features())
    assert native.isa() in native.available_isas()
    for isa in set(ORDER) - set(native.available_isas()):
        with pytest.raises(ValueError, match="not available"):
            native.set_isa(isa)


CPUID = ("leaf1_ecx", "leaf7_ebx", "leaf7_ecx", "leaf7_edx", "leaf7_1_eax")
SAVED = {"os_ymm": "avx", "os_zmm": "avx512f", "os_tiles": "amx_tile"}
"""What an operating system saves, and what its kernel lists then."""
EVERYTHING = 0x600E7
"""XCR0 of a machine that saves all of it."""


def registers(**changed: int) -> dict[str, int]:
    """A machine with everything."""
    return dict.fromkeys(CPUID, 0xFFFFFFFF) | {"xcr0": EVERYTHING} | changed


def test_registers_that_the_operating_system_does_not_save_count_for_nothing() -> None:
    def best(xcr0: int, leaf1_ecx: int = 0xFFFFFFFF) -> str:
        return str(native.isas_for(native.features_of(**registers(xcr0=xcr0, leaf1_ecx=leaf1_ecx)))[-1])

    osxsave = 1 << 27
    assert best(EVERYTHING) == COMPILED[-1]
    assert best(EVERYTHING, 0xFFFFFFFF & ~osxsave) == "scalar"
    for xcr0 in (low | tiles << 17 for low in range(256) for tiles in range(4)):
        best_saved = "scalar"
        for isa, needed in (("avx2", 0x06), ("avx512_bf16", 0xE6), ("amx", 0x600E6)):
            if xcr0 & needed == needed:
                best_saved = isa
        assert best(xcr0) == expected(NEEDS[best_saved])[-1], hex(xcr0)


@pytest.mark.parametrize("feature", sorted(set(FEATURES) - SAVED.keys()))
def test_each_feature_is_one_bit_of_cpuid(feature: str) -> None:
    without = {(name, bit): registers(**{name: 0xFFFFFFFF & ~(1 << bit)}) for name in CPUID for bit in range(32)}
    deciding = [bit for bit, lacking in without.items() if feature not in native.features_of(**lacking)]
    assert len(deciding) == 1


def test_the_features_are_those_that_the_operating_system_lists() -> None:
    """/proc/cpuinfo: the kernel reads CPUID itself and leaves out what it does not support."""
    information = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not information.exists():
        pytest.skip("no /proc/cpuinfo of an x86-64 to compare with")
    lines = [line.partition(":")[2].split() for line in information.read_text().splitlines() if line.startswith("flags")]
    flags = {"sse3" if flag == "pni" else flag for flag in lines[0]}
    names = set(FEATURES) - SAVED.keys()
    assert set(native.features()) & names == flags & names
    for saved, listed in SAVED.items():
        assert (saved in native.features()) == (listed in flags)


def granted(compiler: Compiler, flags: list[str]) -> set[str]:
    """The names that a compiler defines under these flags."""
    done = subprocess.run(
        [*compiler.command, *flags, "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True, check=True
    )
    return {line.split()[1] for line in done.stdout.splitlines()}


@pytest.mark.parametrize("name", ORDER[1:])
def test_a_set_asks_for_all_that_its_flags_let_a_compiler_use(name: str) -> None:
    """Such as popcnt, which no one writes and -mavx2 allows."""
    try:
        compiler = Compiler()
    except BuildError as error:
        pytest.skip(str(error))
    if not compiler.accepts(ISA_FLAGS[name]):
        pytest.skip(f"{compiler.version} does not take {' '.join(ISA_FLAGS[name])}")
    added = granted(compiler, ISA_FLAGS[name]) - granted(compiler, [])
    features = {macro for macro in added if not macro.startswith(NO_FEATURE)} - IMPLIED
    assert features == {MACROS[feature] for feature in NEEDS[name] - SAVED.keys()}
