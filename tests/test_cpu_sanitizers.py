"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: no access beyond an array, nothing undefined.

Tests of the kernels run once more, with an extension of the same sources and flags, but watched. Tensors are allocated one by
one, so that a byte read behind the last row of any of them is found; shapes have rows and columns off every block. What a
sanitizer does not see: loads that are instructions of their own: gathers, whose indices the tests of results cover, and masked.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from build_tools import BuildError
from build_tools.cpu import SOURCES, Variant
from build_tools.host import ROOT, Compiler
from quantlib.kernels import cpu

from . import sanitized
from .sanitized import FAULT_STATUS, Outcome

if cpu.unavailable is not None:
    pytest.skip(cpu.unavailable, allow_module_level=True)

ISAS: tuple[str, ...] = tuple(cpu.native().available_isas())
FILES = tuple(
    f"tests/test_{name}.py"
    for name in ("cpu_kernels", "cpu_lookup", "cpu_pairs", "cpu_int8", "cpu_quantize", "cpu_prompt", "decoding")
)
LEFT_OUT = (
    "environment or unknown_instruction or on_record",  # about processes and builds, not kernels
    "unpleasant and mse",  # torch's half of these takes a minute
    "every_shape and mse and not (nvfp4-46 or nf4-dq or mxfp4-ceil or int4-g32-asym or fp8-e4m3-g128 or q4_k or int4-blocks)",
)
LEAST_PASSED = dict(zip(FILES, (150, 70, 90, 8, 100, 20, 10), strict=True))
"""Of each file, whatever the number of instruction sets."""
ONLY_IN = {"int8": ("avx512_bf16", "amx"), "lookup": ("avx2", "avx512"), "pairs": ("avx512_bf16", "amx"), "amx": ("amx",)}
"""How names of kernels begin that not every instruction set has."""


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    try:
        found = Compiler()
    except BuildError as error:
        pytest.skip(str(error))
    why = sanitized.why_not(found)
    if why is not None:
        pytest.skip(why)
    return found


def assert_clean(outcome: Outcome) -> None:
    assert outcome.status == 0, outcome.output
    for word in ("AddressSanitizer", "runtime error:"):
        assert word not in outcome.output, outcome.output


@pytest.mark.slow
def test_kernels_stay_within_their_arrays_and_the_language(compiler: Compiler, tmp_path: Path) -> None:
    module, report = sanitized.build("_cpu", Variant(isas=ISAS)), tmp_path / "report.json"
    chosen = ["-k", " and ".join(f"not ({part})" for part in LEFT_OUT)]
    quiet = ["-q", "-p", "no:cacheprovider"]
    assert_clean(sanitized.run(compiler, ISAS, "-m", "tests.sanitized", str(module), str(report), *FILES, *chosen, *quiet))

    found = json.loads(report.read_text())
    passed, calls = Counter(found["passed"]), Counter(found["calls"])
    assert {file: passed[file] for file in FILES if passed[file] < LEAST_PASSED[file]}.keys() <= (
        set() if cpu.has_pairs() else {"tests/test_cpu_pairs.py"}
    )
    # Every kernel in every instruction set; on one thread, and on several in one set at least.
    native = cpu.native()
    for name in sanitized.kernel_names(native):
        having = [isa for isa in ISAS if isa in ONLY_IN.get(name.partition("_")[0], ISAS)]
        for isa in having:
            assert calls[f"{name} {isa} one"] + calls[f"{name} {isa} several"] > 0, (name, isa)
        for threads in ("one", "several"):
            assert not having or any(calls[f"{name} {isa} {threads}"] for isa in having), (name, threads)


# Faults that must be found

KERNELS = """
#include "extremes.h"

namespace quantlib::cpu::QUANTLIB_ISA {

constexpr Kernels extremes_alone() {
    Kernels all = {};
    all.extremes = extremes;
    return all;
}
extern const Kernels kernels;
const Kernels kernels = extremes_alone();

}  // namespace quantlib::cpu::QUANTLIB_ISA
"""
EDITS = {
    "extremes.h": ("i + LANES <= count", "i < count"),
    "simd_scalar.h": (
        "const uint32_t sign = (half & 0x8000u) << 16",
        "const uint32_t sign = uint32_t(int(half & 0x8000u) << 17)",
    ),
    "convert.h": ("return load(static_cast<const float*>(from))", "return *static_cast<const Floats*>(from)"),
}
"""Header, what stands there, once, and what stands there instead: a vector that reaches beyond a row's end, a shift beyond an
int's bits, a load from where no vector may lie."""
PROGRAM = """
import sys, torch
from tests.sanitized import put_in_place
put_in_place(sys.argv[1]).set_isa(sys.argv[2])
from quantlib.formats.acceleration import accelerator
print("found", accelerator(torch.device("cpu")).extremes({weight}))
"""
BEYOND, SHIFT, MISALIGNED = "heap-buffer-overflow", "left shift of 32768 by 17 places", "load of misaligned address"
WEIGHTS = {
    BEYOND: "torch.ones(3, 17, dtype=torch.bfloat16)",
    SHIFT: "-torch.ones(1, 8, dtype=torch.float16)",
    MISALIGNED: "torch.ones(1, 9)[:, 1:]",
}
"""What a sanitizer says of each edit, and the weight whose extremes bring it about."""


@pytest.fixture(scope="module")
def extremes_of(compiler: Compiler) -> Callable[[str, str, bool], Outcome]:
    """Runs PROGRAM with a weight, an instruction set and an extension of one kernel, from sources with or without EDITS."""

    def build(edited: bool) -> Path:
        # At a place of its own under build/, so that its objects are found again.
        name = "edited" if edited else "unedited"
        folder = sanitized.OUTPUT / name
        with sanitized.locked(folder.with_suffix(".lock")):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for header in (ROOT / SOURCES).glob("*.h"):
                text = header.read_text()
                right, wrong = EDITS.get(header.name, ("", ""))
                assert not right or text.count(right) == 1, (header.name, right)
                (folder / header.name).write_text(text.replace(right, wrong) if edited and right else text)
            (folder / "kernels.cpp").write_text(KERNELS)
            return sanitized.build(f"_cpu_{name}", Variant(isas=ISAS, kernels=folder / "kernels.cpp", lookup=None))

    modules = {edited: build(edited) for edited in (True, False)}

    def run(weight: str, isa: str, edited: bool) -> Outcome:
        return sanitized.run(compiler, ISAS, "-c", PROGRAM.format(weight=weight), str(modules[edited]), isa)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("said", "level"), [*((BEYOND, isa) for isa in ISAS), (SHIFT, "scalar"), (MISALIGNED, "scalar")])
def test_a_fault_is_found(said: str, level: str, extremes_of: Callable[[str, str, bool], Outcome]) -> None:
    outcome = extremes_of(WEIGHTS[said], level, True)
    assert said in outcome.output
    assert "build/sanitized/edited/" in outcome.output
    assert outcome.status == FAULT_STATUS
    assert "found" not in outcome.output


@pytest.mark.slow
def test_without_a_fault_nothing_is_found(extremes_of: Callable[[str, str, bool], Outcome]) -> None:
    for said, isa in ((BEYOND, ISAS[-1]), (SHIFT, "scalar"), (MISALIGNED, "scalar")):
        outcome = extremes_of(WEIGHTS[said], isa, False)
        assert_clean(outcome)
        assert "found (tensor(" in outcome.output
