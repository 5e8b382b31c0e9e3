"""The report of a comparison: report.html with its pictures inside, the pictures as PNG, and results.json.

Every file appears whole or not at all. Needs the extra `report` (jinja2, matplotlib).
"""

from __future__ import annotations

import base64
import contextlib
import importlib.metadata
import json
import os
import platform
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from quantlib.devices import devices
from quantlib.errors import QuantlibError
from quantlib.evaluation import plots
from quantlib.evaluation.comparison import HEADERS, Comparison

VERSIONS_OF = ("torch", "triton", "transformers", "numpy")


def require_report_extra() -> None:
    """Raise QuantlibError, naming the extra to install, unless a report can be written: to be called before long work."""
    plots.import_pyplot()
    _import_jinja2()


def _import_jinja2() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise QuantlibError("the report needs jinja2: pip install 'quantlib-kernels[report]'") from error
    return jinja2


def machine_facts() -> dict[str, str]:
    """Versions and devices, for the foot of a report."""
    facts = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in VERSIONS_OF:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    for device in devices():
        facts[device.kind if device.kind == "cpu" else device.arch] = f"{device.name}, {device.arch}, {device.units} units"
    facts["threads"] = str(torch.get_num_threads())
    return facts


def write_report(comparison: Comparison, directory: Path) -> Path:
    """Write size_against_kl.png, layer_errors.png, output_errors.png where any variant was calibrated, results.json and, last,
    report.html; returns the path of report.html.

    Raises QuantlibError where the extra is missing or the directory can't be written.
    """
    pictures = {
        "size_against_kl.png": plots.size_against_kl(comparison.variants, comparison.protocol),
        "layer_errors.png": plots.layer_errors({variant.name: variant.layer_errors for variant in comparison.variants}),
    }
    if outputs := {variant.name: variant.output_errors for variant in comparison.variants if variant.output_errors}:
        pictures["output_errors.png"] = plots.layer_errors(outputs, "output")
    page = _render(comparison, pictures)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            write_atomically(directory / name, picture)
        write_atomically(directory / "results.json", (json.dumps(comparison.to_dict(), indent=1) + "\n").encode())
        write_atomically(directory / "report.html", page.encode())
    except OSError as error:
        raise QuantlibError(f"the report can't be written in {directory}: {error}") from error
    return directory / "report.html"


def _render(comparison: Comparison, pictures: dict[str, bytes]) -> str:
    jinja2 = _import_jinja2()
    source = resources.files("quantlib.evaluation").joinpath("report.html").read_text()
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    embedded = {name: base64.b64encode(picture).decode() for name, picture in pictures.items()}
    return str(template.render(comparison=comparison, headers=HEADERS, rows=comparison.rows(), pictures=embedded))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name beside it, sync, rename: a crash leaves the old file or the new one."""
    descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's files are private; a report is an ordinary file.
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
