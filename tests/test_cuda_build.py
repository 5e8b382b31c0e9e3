"""Building quantlib._cuda: what is found, chosen, compiled again, and explained where it can't be."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import cuda_read, cuda_static
from build_tools import BuildError, cuda, cuda_targets, nvcc, objects, ptxas, schedule

ROOT = Path(__file__).parents[1]
NOWHERE = Path("/nonexistent")

# A stand-in for nvcc: tells a release, writes an "object" that names the target words, a depfile, and what ptxas would say.
FAKE = """#!{python}
import pathlib, sys
arguments = sys.argv[1:]
home = pathlib.Path(sys.argv[0]).resolve().parents[1]
if "--version" in arguments:
    print("Cuda compilation tools, release {release}, V{release}.7")
elif "--list-gpu-code" in arguments:
    print("\\n".join("sm_%d" % arch for arch in {archs}))
elif "--dryrun" in arguments:
    print("#$ TOP=%s" % home, file=sys.stderr)
else:
    with open(home / "calls", "a") as calls:
        print(" ".join(arguments), file=calls)
    source = pathlib.Path(next(word for word in arguments if word.endswith(".cu")))
    if "mistake" in source.read_text():
        print(str(source) + "(1): error: a mistake")
        sys.exit(2)
    at = lambda option: pathlib.Path(arguments[arguments.index(option) + 1])
    at("-o").write_bytes(b"object")
    header = source.parent / "header.h"
    at("-MF").write_text("out.o : %s \\\\\\n %s\\n" % (source, header))
    print("ptxas info    : Compiling entry function '_Z4warpi' for 'sm_80'")
    print("ptxas info    : Function properties for _Z4warpi")
    print("    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads")
    print("ptxas info    : Used 40 registers, used 1 barriers, 256 bytes smem, 360 bytes cmem[0]")
"""

ARCHS = (75, 80, 86, 87, 89, 90, 100, 120)
LATER_ARCHS = (*ARCHS, 88, 103, 110, 121)


def toolkit(folder: Path, release: str = "13.0", archs: tuple[int, ...] = LATER_ARCHS) -> Path:
    """A toolkit's tree with a fake nvcc; returns its root."""
    for name in ("bin", "include", "lib64"):
        (folder / name).mkdir(parents=True)
    (folder / "include" / "cuda_runtime_api.h").touch()
    (folder / "lib64" / "libcudart_static.a").touch()
    program = folder / "bin" / "nvcc"
    program.write_text(FAKE.format(python=sys.executable, release=release, archs=archs))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


def found(environment: dict[str, str], sites: tuple[Path, ...] = (), usual: Path = NOWHERE) -> Path:
    return nvcc.find_nvcc(environment, sites, usual).path


# Finding nvcc and CUTLASS.


def test_every_place_is_looked_at_in_order(tmp_path: Path) -> None:
    home, path, on_path, usual, site = (
        toolkit(tmp_path / name) for name in ("home", "path", "on_path", "usual", "site/nvidia/cu13")
    )
    environment = {"CUDA_HOME": str(home), "CUDA_PATH": str(path), "PATH": str(on_path / "bin")}
    for name, expected in (("CUDA_HOME", home), ("CUDA_PATH", path), ("PATH", on_path)):
        assert found(environment, (tmp_path / "site",), usual) == expected / "bin" / "nvcc"
        del environment[name]
    assert found({}, (tmp_path / "site",), usual) == usual / "bin" / "nvcc"
    assert found({}, (tmp_path / "site",)) == site / "bin" / "nvcc"


def test_no_nvcc_is_explained(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"no nvcc found .*CUDA_HOME.*pip install"):
        found({"PATH": str(tmp_path)})


def test_an_old_or_broken_nvcc_is_passed_over_and_named(tmp_path: Path) -> None:
    old, whole = toolkit(tmp_path / "old", "12.4"), toolkit(tmp_path / "whole")
    assert found({"CUDA_HOME": str(old), "PATH": str(whole / "bin")}) == whole / "bin" / "nvcc"
    with pytest.raises(BuildError, match=r"old/bin/nvcc \(CUDA_HOME\): is release 12\.4\.7; Blackwell needs 12\.8"):
        found({"CUDA_HOME": str(old)})
    for part, words in (("include/cuda_runtime_api.h", "runtime's headers"), ("lib64/libcudart_static.a", "static runtime")):
        broken = toolkit(tmp_path / part.replace("/", "_"))
        (broken / part).unlink()
        with pytest.raises(BuildError, match=words):
            found({"CUDA_PATH": str(broken)})


def test_a_wrapper_leads_to_its_toolkit(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "home")
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    chosen = nvcc.find_nvcc({"PATH": f"{wrapper.parent}:/bin:/usr/bin"}, (), NOWHERE)
    assert chosen.path == wrapper
    assert chosen.cudart == home / "lib64" / "libcudart_static.a"
    assert chosen.include == (home / "include",)


def cutlass_tree(root: Path, major: int, minor: int) -> Path:
    folder = root / "include" / "cutlass"
    folder.mkdir(parents=True)
    numbers = {"MAJOR": major, "MINOR": minor, "PATCH": 1}
    (folder / "version.h").write_text("".join(f"#define CUTLASS_{part} {number}\n" for part, number in numbers.items()))
    return root


def test_cutlass_comes_from_the_environment_or_its_package(tmp_path: Path) -> None:
    package = cutlass_tree(tmp_path / "site" / "cutlass_library" / "source", 4, 2)
    checkout = cutlass_tree(tmp_path / "checkout", 4, 5)
    assert nvcc.find_cutlass({}, [tmp_path / "site"]) == nvcc.Cutlass(
        "4.2.1", (package / "include", package / "tools" / "util" / "include")
    )
    assert nvcc.find_cutlass({"CUTLASS_PATH": str(checkout)}, [tmp_path / "site"]).version == "4.5.1"
    with pytest.raises(BuildError, match=r"CUTLASS_PATH is .*empty.*pip install"):
        nvcc.find_cutlass({"CUTLASS_PATH": str(tmp_path / "empty")}, [tmp_path / "site"])
    with pytest.raises(BuildError, match=r"is CUTLASS 3\.8\.1; 4\.2 or later"):
        nvcc.find_cutlass({"CUTLASS_PATH": str(cutlass_tree(tmp_path / "old", 3, 8))})


# Which targets.


def names(pattern: str, chips: str = "", archs: tuple[int, ...] = LATER_ARCHS, families: bool = True) -> list[str]:
    row = cuda_targets.row_of(pattern)
    return [made.name for made in cuda_targets.targets_of(row, cuda_targets.chips_of(chips), archs, families)]


def test_each_folder_has_its_targets() -> None:
    every = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "compute_80"]
    assert names("sm80/gemv.cu") == names("common/other.cu") == every
    assert names("sm90/linear_tile.cu") == ["sm_90a"]
    assert names("sm100/fp4.cu") == ["sm_100f"]
    assert names("sm120/fp4.cu") == ["sm_120f"]


def gencodes(source: str, chips: str = "", archs: tuple[int, ...] = LATER_ARCHS, families: bool = True) -> list[str]:
    row = cuda_targets.row_of(source)
    return cuda_targets.gencodes(row, cuda_targets.targets_of(row, cuda_targets.chips_of(chips), archs, families))


def test_plain_targets_share_the_ptx_of_the_oldest() -> None:
    assert gencodes("sm80/gemv.cu") == ["arch=compute_80,code=[sm_80,sm_89,sm_90,sm_100,sm_120,compute_80]"]
    assert gencodes("sm80/gemv.cu", "90") == ["arch=compute_80,code=[sm_90]"]
    assert gencodes("sm90/linear_tile.cu") == ["arch=compute_90a,code=sm_90a"]
    assert gencodes("common/quantize.cu") == ["arch=compute_100f,code=sm_100f", "arch=compute_120f,code=sm_120f"]
    assert gencodes("sm100/fp4.cu", families=False) == ["arch=compute_100a,code=sm_100a", "arch=compute_103a,code=sm_103a"]


def test_an_nvcc_without_family_targets_makes_each_chip_its_own() -> None:
    assert names("sm100/fp4.cu", families=False) == ["sm_100a", "sm_103a"]
    assert names("sm120/fp4.cu", families=False) == ["sm_120a", "sm_121a"]
    assert names("sm120/fp4.cu", archs=ARCHS, families=False) == ["sm_120a"]  # 12.8 doesn't know sm_121
    assert names("sm80/gemv.cu", families=False) == names("sm80/gemv.cu")


@pytest.mark.parametrize(
    ("chips", "sm80", "sm90", "sm100", "sm120"),
    [
        ("80", ["sm_80", "compute_80"], [], [], []),
        ("86", ["sm_80", "compute_80"], [], [], []),
        ("90a", ["sm_90"], ["sm_90a"], [], []),
        ("sm_90; 89", ["sm_89", "sm_90"], ["sm_90a"], [], []),
        ("103", ["sm_100"], [], ["sm_100f"], []),
        ("110", ["compute_80"], [], [], []),
        ("80,90a,120f", ["sm_80", "sm_90", "sm_120", "compute_80"], ["sm_90a"], [], ["sm_120f"]),
        ("121", ["sm_120"], [], [], ["sm_120f"]),
    ],
)
def test_chips_that_are_asked_for_get_their_best_code(
    chips: str, sm80: list[str], sm90: list[str], sm100: list[str], sm120: list[str]
) -> None:
    assert [names(f"{family}/any.cu", chips) for family in ("sm80", "sm90", "sm100", "sm120")] == [sm80, sm90, sm100, sm120]


@pytest.mark.parametrize("word", ["75", "9.0", "hopper", "80a", "sm_130", "90f", "100g"])
def test_a_word_that_is_no_architecture_is_refused(word: str) -> None:
    with pytest.raises(BuildError, match=f"QUANTLIB_CUDA_ARCHS: '{word}'.*80, 90a or 120f"):
        cuda_targets.chips_of(f"80,{word}")


def test_code_runs_where_cuda_says() -> None:
    runs = {
        word: [chip for chip in cuda_targets.CHIPS if cuda_targets.target(word).runs_on(chip)]
        for word in ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_100f", "sm_103a", "sm_120f", "compute_80")
    }
    assert runs == {
        "sm_80": [80, 86, 87, 88, 89],
        "sm_89": [89],
        "sm_90a": [90],
        "sm_100": [100, 103],
        "sm_100f": [100, 103],
        "sm_103a": [103],
        "sm_120f": [120, 121],
        "compute_80": list(cuda_targets.CHIPS),
    }


# Compiling side by side.


@pytest.mark.parametrize(("memory", "workers"), [(7.0, 4), (4.0, 2), (100.0, 3), (0.5, 8)])
def test_tasks_stay_within_memory_and_workers(memory: float, workers: int) -> None:
    lock, running, seen = threading.Lock(), [], []

    def task(number: int, size: float) -> schedule.Task[int]:
        def run() -> int:
            with lock:
                running.append(size)
                seen.append(list(running))
            time.sleep(0.002)
            with lock:
                running.remove(size)
            return number

        return schedule.Task(str(number), size, run)

    sizes = [1.5, 6.0, 1.5, 6.0, 1.0, 1.5, 1.5]
    results = schedule.run_all([task(*pair) for pair in enumerate(sizes)], memory, workers)
    assert results == list(range(len(sizes)))
    assert seen[0][0] == 6.0  # the largest first
    for together in seen:
        assert len(together) <= workers
        assert sum(together) <= memory or len(together) == 1


def test_a_failure_is_its_tasks_result_and_a_bug_is_raised() -> None:
    def fail() -> int:
        raise BuildError("no")

    results = schedule.run_all([schedule.Task("a", 1, fail), schedule.Task("b", 1, lambda: 5)], 10, 2)
    assert isinstance(results[0], BuildError)
    assert results[1] == 5
    with pytest.raises(ZeroDivisionError):
        schedule.run_all([schedule.Task("c", 1, lambda: 1 // 0)], 10, 2)


def test_memory_and_workers_are_what_the_machine_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       24000000 kB\nMemAvailable:   14500000 kB\n")
    assert schedule.available_memory(meminfo) == 14.5
    assert schedule.available_memory(tmp_path / "none") == float("inf")
    monkeypatch.setenv("MAX_JOBS", "3")
    assert schedule.worker_count() == 3
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(BuildError, match="MAX_JOBS"):
        schedule.worker_count()


# Compiling again only what changed.


@pytest.fixture
def unit(tmp_path: Path) -> objects.Unit:
    program = toolkit(tmp_path / "toolkit") / "bin" / "nvcc"
    (tmp_path / "kernel.cu").write_text("kernel")
    (tmp_path / "header.h").write_text("header")
    return objects.Unit(tmp_path / "kernel.cu", "kernel", (str(program), "-O3"), "nvcc 13")


def test_an_object_is_made_again_where_something_in_it_changed(unit: objects.Unit, tmp_path: Path) -> None:
    def cached(changed: objects.Unit = unit) -> bool:
        made = objects.compile_unit(changed, tmp_path / "objects", tmp_path)
        assert made.path.read_bytes() == b"object"
        assert "Used 40 registers" in made.log  # kept with the object
        return made.cached

    assert [cached(), cached()] == [False, True]
    os.utime(tmp_path / "header.h", (1, 1))  # a date is no change
    assert cached()
    for name in ("kernel.cu", "header.h"):
        (tmp_path / name).write_text(f"another {name}")
        assert [cached(), cached()] == [False, True]
    for changed in (replace(unit, command=(*unit.command, "-g")), replace(unit, version="nvcc 14")):
        assert [cached(changed), cached(changed)] == [False, True]
        assert cached(unit)  # both stay
    assert cached(replace(unit, launcher=("env", "CCACHE_DEPEND=1")))  # what it runs under changes no object
    (tmp_path / "header.h").unlink()
    assert not cached()


def test_a_failed_object_leaves_nothing_and_the_first_error_leads(unit: objects.Unit, tmp_path: Path) -> None:
    unit.source.write_text("mistake")
    with pytest.raises(BuildError) as caught:
        objects.compile_unit(unit, tmp_path / "objects", tmp_path)
    assert str(caught.value).splitlines()[0].endswith("error: a mistake")
    assert list((tmp_path / "objects").iterdir()) == []


def test_depfiles_with_continued_lines_and_blanks_are_read() -> None:
    assert objects.dependencies("out.o : a.cu \\\n /usr/b.h \\\n  my\\ file.h c.h a.cu\n") == [
        "a.cu",
        "/usr/b.h",
        "my file.h",
        "c.h",
    ]


# What ptxas says.

PTXAS = """\
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register \
resources for the wgmma pipeline in the function '_Z4gemmv'
ptxas info    : 8 bytes gmem
ptxas info    : Compiling entry function '_Z4gemmv' for 'sm_90a'
ptxas info    : Function properties for _Z4gemmv
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 7 barriers, 16 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compile time = 17.2 ms
ptxas info    : Function properties for _Z6helperf
    800 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Z4gemvv' for 'sm_80'
ptxas info    : Function properties for _Z4gemvv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 22 registers, used 0 barriers, 376 bytes cmem[0]
kernel.cu(3): warning #177-D: variable "x" was declared but never referenced
"""


def test_registers_spills_and_notes_are_read_per_kernel_and_target() -> None:
    usages = ptxas.parse(PTXAS)
    assert set(usages) == {"_Z4gemmv", "_Z4gemvv"}
    (note,) = usages["_Z4gemmv"]["sm_90a"].notes
    assert "serialized" in note
    assert usages["_Z4gemmv"] == {"sm_90a": ptxas.Usage(168, 16, 8, 12, 1024, 7, [note])}
    assert usages["_Z4gemvv"] == {"sm_80": ptxas.Usage(22)}
    remarks = ptxas.remarks(PTXAS).splitlines()
    assert len(remarks) == 2  # the note, and the warning
    assert "never referenced" in remarks[1]


def test_kernels_have_names_for_people() -> None:
    for symbol, name in {
        "_ZN8quantlib4cuda5scaleILi128EEEvPfi": "scale<128>",
        "_ZN8quantlib4cuda3fooEv": "foo",
        "_ZN36_GLOBAL__N__98df35d7_4_w_cu_ed1312cf4anonEPf": "anon",
        "plain_c": "plain_c",
    }.items():
        assert ptxas.kernel_name(symbol) == name
    assert ptxas.kernel_name(f"_ZN7cutlass13device_kernelI120{'a' * 120}EEvv") == "cutlass::device_kernel<...>"
    nested = "_ZN7cutlass13device_kernelI" + "N3abcI" * 3000 + "NS_12float_e2m1_tENS_13float_ue4m3_tE" + "EE" * 3000 + "EvT_"
    assert ptxas.kernel_name(nested) == "cutlass::device_kernel<e2m1 ue4m3>"


# What QUANTLIB_CUDA asks for.


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what setup.py needs, with one CUDA source and its binding."""
    root = tmp_path / "tree"
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "build_tools", root / "build_tools", ignore=ignore)
    for package in ("quantlib", "csrc/cuda/common", "csrc/cuda/sm80", "csrc/cpu"):
        (root / package).mkdir(parents=True)
    for name in ("bindings.cpp", "bindings.h", "common/check.h"):
        shutil.copy(ROOT / "csrc" / "cuda" / name, root / "csrc" / "cuda" / name)
    (root / "quantlib" / "__init__.py").touch()
    (root / "csrc/cuda/sm80/scale.cu").write_text(SCALE)
    (root / "csrc/cuda/sm80/bindings.cpp").write_text(SCALE_BINDINGS)
    return root


SCALE = """\
#include <cstdint>

#include "common/check.h"

namespace quantlib::cuda {

template <int THREADS>
__global__ void scale_kernel(float* x, int n) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i < n) x[i] *= 2;
}

void scale(std::uintptr_t x, int n, std::uintptr_t stream) {
    scale_kernel<128><<<(n + 127) / 128, 128, 0, reinterpret_cast<cudaStream_t>(stream)>>>(reinterpret_cast<float*>(x), n);
    check_launch("sm80_scale", {{"N", n}});
}

}  // namespace quantlib::cuda
"""

SCALE_BINDINGS = """\
#include "bindings.h"

#include <cstdint>

namespace quantlib::cuda {

void scale(std::uintptr_t x, int n, std::uintptr_t stream);

void bind_sm80(pybind11::module_& module) { module.def("sm80_scale", &scale); }

}  // namespace quantlib::cuda
"""


def setup_extensions(tree: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run setup.py for the CUDA extension alone; what it printed, and the record it wrote."""
    code = (
        "import sys; sys.argv = ['setup.py', '-q', 'build_ext', '--inplace']; import build_tools.extensions as made;"
        "made.EXTENSIONS[:] = made.EXTENSIONS[1:]; __file__ = 'setup.py'; exec(open('setup.py').read())"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("QUANTLIB_", "CUDA_", "CUTLASS_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, env={**inherited, **environment}
    )
    record = tree / "quantlib" / "_build.json"
    return done, json.loads(record.read_text())["_cuda"] if record.exists() else {}


def test_a_build_without_cuda_says_so(tree: Path) -> None:
    done, record = setup_extensions(tree, QUANTLIB_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert record == {"built": False, "why": "QUANTLIB_CUDA=0 asked for a build without it"}


def test_an_unknown_wish_is_refused(tree: Path) -> None:
    done, record = setup_extensions(tree, QUANTLIB_CUDA="yes")
    assert done.returncode != 0
    assert "QUANTLIB_CUDA must be 0" in done.stderr
    assert record == {}


@pytest.fixture
def mistaken(tree: Path) -> Path:
    """The tree with a source that doesn't compile."""
    (tree / "csrc/cuda/sm80/scale.cu").write_text("mistake\n")
    (tree / "csrc/cuda/sm80/bindings.cpp").write_text("")
    return tree


def test_a_failure_is_recorded_where_cuda_is_not_demanded(mistaken: Path) -> None:
    home = str(toolkit(mistaken.parent / "toolkit"))
    for wish in ({}, {"QUANTLIB_CUDA": "auto"}):
        done, record = setup_extensions(mistaken, CUDA_HOME=home, **wish)
        assert done.returncode == 0, done.stderr
        assert record["built"] is False
        assert record["why"].splitlines()[0] == "sm80: csrc/cuda/sm80/scale.cu(1): error: a mistake"
        assert "quantlib._cuda was not built" in done.stdout


def test_a_failure_is_an_error_where_cuda_is_demanded(mistaken: Path) -> None:
    done, _ = setup_extensions(mistaken, CUDA_HOME=str(toolkit(mistaken.parent / "toolkit")), QUANTLIB_CUDA="1")
    assert done.returncode != 0
    assert "QUANTLIB_CUDA=1 demands quantlib._cuda" in done.stderr
    assert "error: a mistake" in done.stderr
    assert "Traceback" not in done.stderr


def test_architectures_without_any_source_are_explained(tree: Path) -> None:
    home = str(toolkit(tree.parent / "toolkit", archs=(75,)))
    _, record = setup_extensions(tree, CUDA_HOME=home)
    assert record["why"] == "csrc/cuda holds no kernel for these chips"
    assert record["not_asked_for"] == ["sm80"]
    _, record = setup_extensions(tree, CUDA_HOME=home, QUANTLIB_CUDA_ARCHS="7.5")
    assert record["why"].startswith("QUANTLIB_CUDA_ARCHS: '7.5'")


def planned(tree: Path, cutlass: nvcc.Cutlass | BuildError) -> cuda.Plan:
    compiler = nvcc.Nvcc(Path("nvcc"), "13.0.7", frozenset(LATER_ARCHS), (), Path("libcudart_static.a"))
    tools = cuda.Toolchain(compiler, None, cutlass, (), ())  # type: ignore[arg-type]
    return cuda.plan(tools, cuda_targets.CHIPS, tree / "csrc" / "cuda")


def test_a_family_that_lacks_something_is_left_out_alone(tree: Path) -> None:
    for family in ("sm90", "sm100"):
        (tree / "csrc/cuda" / family).mkdir()
        (tree / "csrc/cuda" / family / "kernel.cu").touch()
    (tree / "csrc/cuda/sm100/bindings.cpp").touch()
    without = planned(tree, BuildError("no CUTLASS headers"))
    assert [source.path for source in without.sources] == ["sm80/scale.cu"]
    assert without.left_out == {"sm90": "csrc/cuda/sm90/bindings.cpp is missing", "sm100": "no CUTLASS headers"}
    whole = planned(tree, nvcc.Cutlass("4.2.0", ()))
    assert [source.path for source in whole.sources] == ["sm80/scale.cu", "sm100/kernel.cu"]
    assert set(whole.bindings) == {"sm80", "sm100"}
    assert [source.row.memory for source in whole.sources] == [1.5, 7.5]


def test_every_source_has_a_row_and_every_family_its_binding() -> None:
    for path in (ROOT / "csrc" / "cuda").glob("*/*.cu"):
        source = f"{path.parent.name}/{path.name}"
        assert path.parent.name in cuda_targets.FAMILIES
        assert cuda_targets.row_of(source).targets
        assert cuda_static.intent_of(source, "any")
    declared = (ROOT / "csrc" / "cuda" / "bindings.h").read_text()
    called = (ROOT / "csrc" / "cuda" / "bindings.cpp").read_text()
    for family in cuda_targets.FAMILIES:
        assert f"void bind_{family}(" in declared
        assert f"#ifdef QUANTLIB_HAS_{family.upper()}\n    bind_{family}(module);" in called


# A real nvcc.


def real_nvcc() -> str | None:
    try:
        nvcc.find_nvcc(os.environ)
    except BuildError as error:
        return str(error)
    return None


needs_nvcc = pytest.mark.skipif(real_nvcc() is not None, reason=f"nvcc: {real_nvcc()}")


@needs_nvcc
@pytest.mark.slow
def test_a_module_is_built_loads_and_raises_what_cuda_refuses(tree: Path) -> None:
    target = tree / "_cuda.so"
    facts: dict[str, Any] = {}
    environment = {**os.environ, "QUANTLIB_CUDA_ARCHS": "80,90"}
    cuda.build(target, facts, environment, [sysconfig.get_path("include")], whole=True, root=tree)
    assert facts["sources"] == {
        "sm80/scale.cu": {"targets": ["sm_80", "sm_90", "compute_80"], "chips": [80, 86, 87, 88, 89, 90], "ptx": 80}
    }
    code = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("quantlib._cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
try:
    module.sm80_scale(0, 1 << 30, 0)
    raised = None
except module.CudaError as error:
    raised = [str(error), error.kernel, error.shape, error.reason, error.code, isinstance(error, RuntimeError)]
print(json.dumps([module.facts(), module.kernels(), raised]))
"""
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True, env=hidden, check=True)
    inside, kernels, raised = json.loads(done.stdout)
    assert {name: inside[name] for name in facts} == facts
    (kernel,) = kernels
    assert (kernel["name"], kernel["source"]) == ("scale_kernel<128>", "sm80/scale.cu")
    assert set(kernel["targets"]) == {"sm_80", "sm_90"}
    assert kernel["targets"]["sm_80"]["registers"] > 0
    message, name, shape, reason, number, runtime = raised
    assert (name, shape, runtime) == ("sm80_scale", f"N={1 << 30}", True)
    assert message == f"{name}({shape}): {reason}"
    assert number > 0
    table = cuda_read.read_module(target, kernels)
    assert set(table["sm80/scale.cu"]["scale_kernel<128>"]) == {"sm_80", "sm_90", "compute_80"}
    assert any("HMMA.16816 was intended" in fault for fault in cuda_static.faults(table))
