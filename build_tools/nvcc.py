"""Finding nvcc and the CUTLASS headers. `python -m build_tools.nvcc` says what is found, and ends with 1 where no nvcc is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from build_tools import BuildError

OLDEST = (12, 8)
"""The first release that compiles for Blackwell."""

FAMILIES_FROM = (12, 9)
"""The first release with family targets (compute_100f, compute_120f)."""

OLDEST_CUTLASS = (4, 2)
USUAL = Path("/usr/local/cuda")


@dataclass(frozen=True)
class Nvcc:
    """An nvcc that can be used.

    archs       numbers that it compiles for; `family_targets`: whether it knows those with the suffix f
    include     folders of the CUDA runtime's headers; `cudart`: the static runtime library
    """

    path: Path
    version: str
    archs: frozenset[int]
    include: tuple[Path, ...]
    cudart: Path

    @property
    def family_targets(self) -> bool:
        return release(self.version) >= FAMILIES_FROM


@dataclass(frozen=True)
class Cutlass:
    """The headers of CUTLASS."""

    version: str
    include: tuple[Path, ...]


def release(version: str) -> tuple[int, ...]:
    """(13, 0) of "13.0.88"."""
    return tuple(int(part) for part in version.split(".")[:2])


def site_folders() -> list[Path]:
    """Where packages lie: on the path, and in this interpreter's own site-packages, which an isolated build hides."""
    paths = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return [Path(path) for path in dict.fromkeys(paths) if path and Path(path).is_dir()]


def candidates(environment: Mapping[str, str], sites: Iterable[Path], usual: Path = USUAL) -> list[tuple[str, Path]]:
    """(where it was looked, path) of every nvcc, in the order in which they are tried."""
    named = [(name, Path(environment[name]) / "bin" / "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    on_path = shutil.which("nvcc", path=environment.get("PATH", ""))
    found = [*named, *([("PATH", Path(on_path))] if on_path else []), (str(usual), usual / "bin" / "nvcc")]
    for site in sites:
        found += [("the nvidia-cuda-nvcc package", path) for path in sorted(site.glob("nvidia/*/bin/nvcc"))]
    return [(place, path) for place, path in found if path.is_file()]


def find_nvcc(environment: Mapping[str, str], sites: Iterable[Path] | None = None, usual: Path = USUAL) -> Nvcc:
    """The first nvcc that is recent enough and whole. Raises BuildError, with what is wrong with each."""
    refused = []
    for place, path in candidates(environment, site_folders() if sites is None else sites, usual):
        try:
            return inspect(path)
        except BuildError as error:
            refused.append(f"{path} ({place}): {error}")
    if refused:
        raise BuildError("no usable nvcc: " + "; ".join(refused))
    raise BuildError(
        f"no nvcc found (looked at CUDA_HOME, CUDA_PATH, PATH, {usual} and the packages of this Python): install CUDA "
        f"{'.'.join(map(str, OLDEST))} or later, or pip install 'quantlib-kernels[cuda-nvcc]'"
    )


def _ask(path: Path, *arguments: str) -> str:
    try:
        done = subprocess.run([str(path), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"doesn't run: {error}") from None
    if done.returncode != 0:
        raise BuildError(f"{' '.join(arguments)} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout + done.stderr


def inspect(path: Path) -> Nvcc:
    """What an nvcc is and where its toolkit lies. Raises BuildError where it is too old or parts are missing."""
    found = re.search(r"release \d+\.\d+, V(\d+\.\d+\.\d+)", _ask(path, "--version"))
    if found is None:
        raise BuildError("--version names no release")
    version = found[1]
    if release(version) < OLDEST:
        raise BuildError(f"is release {version}; Blackwell needs {'.'.join(map(str, OLDEST))} or later")
    archs = frozenset(int(number) for number in re.findall(r"sm_(\d+)\b", _ask(path, "--list-gpu-code")))
    # A wrapper may stand where nvcc is called; nvcc itself tells where its toolkit is. The source needn't exist.
    plan = _ask(path, "--dryrun", "-x", "cu", "-c", "quantlib.cu")
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    home = Path(os.path.normpath(top[1].strip())) if top else path.resolve().parents[1]
    flags = " ".join(re.findall(r"^#\$ (?:SYSTEM_)?INCLUDES=(.+)$", plan, re.MULTILINE))
    named = re.findall(r'-(?:I|isystem)"?\s*"?([^"\s]+)', flags)
    include = [Path(os.path.normpath(folder)) for folder in named] + [home / "include", home / "include" / "cccl"]
    include = [folder for folder in dict.fromkeys(include) if folder.is_dir()]
    if not any((folder / "cuda_runtime_api.h").is_file() for folder in include):
        raise BuildError(f"{home} lacks the runtime's headers (cuda_runtime_api.h)")
    libraries = [home / name for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")]
    cudart = next((folder / "libcudart_static.a" for folder in libraries if (folder / "libcudart_static.a").is_file()), None)
    if cudart is None:
        raise BuildError(f"{home} lacks the static runtime (libcudart_static.a)")
    return Nvcc(path, version, archs, tuple(include), cudart)


def find_cutlass(environment: Mapping[str, str], sites: Iterable[Path] | None = None) -> Cutlass:
    """The headers that CUTLASS_PATH names, or those of the nvidia-cutlass package. Raises BuildError where there are none."""
    if environment.get("CUTLASS_PATH"):
        roots = [Path(environment["CUTLASS_PATH"])]
    else:
        folders = site_folders() if sites is None else sites
        roots = [folder / "cutlass_library" / "source" for folder in folders]
    for root in roots:
        version = root / "include" / "cutlass" / "version.h"
        if not version.is_file():
            continue
        numbers = [re.search(rf"#define CUTLASS_{part} (\d+)", version.read_text()) for part in ("MAJOR", "MINOR", "PATCH")]
        found = ".".join(number[1] for number in numbers if number)
        if release(found) < OLDEST_CUTLASS:
            raise BuildError(f"{root} is CUTLASS {found}; {'.'.join(map(str, OLDEST_CUTLASS))} or later is needed")
        return Cutlass(found, (root / "include", root / "tools" / "util" / "include"))
    where = f"CUTLASS_PATH is {roots[0]}" if environment.get("CUTLASS_PATH") else "CUTLASS_PATH is not set"
    raise BuildError(f"no CUTLASS headers ({where}): pip install --no-deps nvidia-cutlass, or set CUTLASS_PATH to a checkout")


def main() -> int:
    """Print what is found."""
    try:
        found = find_nvcc(os.environ)
    except BuildError as error:
        print(error)
        return 1
    print(f"nvcc {found.version}: {found.path}")
    try:
        cutlass = find_cutlass(os.environ)
    except BuildError as error:
        print(error)
    else:
        print(f"CUTLASS {cutlass.version}: {cutlass.include[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
