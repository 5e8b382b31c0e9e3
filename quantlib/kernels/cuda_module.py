"""The compiled CUDA kernels, `quantlib._cuda`: loaded when a CUDA device is first used, and in words why they can't be.

Importing this file loads nothing. Kernels ask `refusal` whether their sources were built for a GPU, and call what `launcher`
returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from importlib import import_module
from typing import Any

from quantlib.errors import KernelError
from quantlib.kernels.build_record import build_record

ADVICE = {
    35: "install a driver for this CUDA, or build quantlib with an older CUDA",
    100: "no GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES",
    209: "quantlib._cuda holds no code for this GPU: build it again without QUANTLIB_CUDA_ARCHS",
} | dict.fromkeys(
    (700, 714, 715, 716, 717, 718, 719),
    "the fault can be an earlier kernel's: CUDA_LAUNCH_BLOCKING=1 reports it where it arises",
)
"""The runtime's number of an error -> what to do."""


@lru_cache(maxsize=1)
def _load() -> tuple[Any, str | None]:
    """The module, or None and the reason why there is none."""
    try:
        return import_module("quantlib._cuda"), None
    except ModuleNotFoundError as error:
        why = build_record("_cuda").get("why")
        reason = f"was not built ({why.splitlines()[0]})" if why else f"can't be loaded ({error})"
    except Exception as error:  # a library of another version may raise anything
        reason = f"can't be loaded ({type(error).__name__}: {error})"
    return None, f"the CUDA extension quantlib._cuda {reason}"


def unavailable() -> str | None:
    """Why quantlib._cuda can't be used, or None. Loads it."""
    return _load()[1]


def module() -> Any:
    """quantlib._cuda; raises KernelError where it can't be used."""
    loaded, reason = _load()
    if loaded is None:
        raise KernelError(f"{reason}; `quantlib doctor` tells more, docs/building.md says how to build it")
    return loaded


@lru_cache(maxsize=1)
def facts() -> dict[str, Any]:
    """What was built, as build_tools/cuda.py wrote it: nvcc, families, sources, kernels. Of a module that can't be loaded: what
    setup.py recorded."""
    return build_record("_cuda") if unavailable() else dict(module().facts())


@lru_cache(maxsize=256)
def refusal(sources: str, capability: int) -> str | None:
    """Why kernels can't run on a GPU of this compute capability (90 for 9.0), or None.

    sources     a folder under csrc/cuda, or one file of it without its suffix: "sm80", "common/quantize"
    """
    reason = unavailable()
    if reason is not None:
        return reason
    known = facts()
    found = [source for name, source in known["sources"].items() if name == f"{sources}.cu" or name.startswith(f"{sources}/")]
    if not found:
        family = sources.partition("/")[0]
        unasked = "QUANTLIB_CUDA_ARCHS asked for other chips" if family in known["not_asked_for"] else "there were no sources"
        why = known["left_out"].get(family, unasked).splitlines()[0]
        return f"quantlib._cuda was built without {sources} ({why})"
    for source in found:
        if capability not in source["chips"] and (source["ptx"] is None or capability < source["ptx"]):
            return f"quantlib._cuda holds {sources} for {', '.join(source['targets'])}, nothing for sm_{capability}"
    return None


@lru_cache(maxsize=128)
def launcher(name: str) -> Callable[..., Any]:
    """A launcher of quantlib._cuda. What CUDA refuses in it is raised as KernelError, with kernel, shape and what to do."""
    loaded = module()
    function = getattr(loaded, name, None)
    if function is None:
        raise KernelError(f"quantlib._cuda has no launcher {name!r}: it was built from other sources; run `make build`")
    cuda_error = loaded.CudaError

    @wraps(function)
    def launch(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except cuda_error as error:
            advice = ADVICE.get(error.code)
            raise KernelError(f"{error}; {advice}" if advice else str(error)) from error

    return launch


@dataclass(frozen=True)
class Chip:
    """Sizes of a GPU, as its driver tells them; memory in bytes. `shared_per_block`: what one block can ask for at most."""

    capability: int
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    registers_per_multiprocessor: int
    threads_per_multiprocessor: int
    l2_bytes: int


@lru_cache(maxsize=64)
def chip(index: int) -> Chip:
    """The facts of the GPU `index`; raises KernelError where there is none."""
    found = launcher("device_properties")(index)
    return Chip(capability=found.pop("major") * 10 + found.pop("minor"), **found)
