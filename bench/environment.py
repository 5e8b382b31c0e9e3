"""What a result depends on beside the code: device, driver, versions, commit."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

import quantlib
from quantlib.devices import device_facts

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Environment:
    """The first fields of every row."""

    device: str
    arch: str
    driver: str
    torch: str
    triton: str
    quantlib: str
    commit: str
    date: str


def describe(device: torch.device) -> Environment:
    """The environment of this process. `commit` comes from QUANTLIB_COMMIT where the tree has no git."""
    facts = device_facts(device)
    return Environment(
        device=facts.name,
        arch=facts.arch,
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if facts.kind == "cuda" else "",
        torch=torch.__version__,
        triton=version("triton") or "",
        quantlib=quantlib.__version__,
        commit=_commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if not head:
        return os.environ.get("QUANTLIB_COMMIT", "unknown")
    return head + ("-dirty" if _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no") else "")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""
