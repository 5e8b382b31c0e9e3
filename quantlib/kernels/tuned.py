"""Tuned tables: what was measured on a device, as data. bench/tuned/<device>.json, installed as `quantlib.tuned`:

    {"device": name, "triton": version, "created": date, "efficiency": {kernel: share},
     "tiles": {kernel: {tile key: {"m": .., "n": .., "k": .., "warps": .., "stages": .., "splits": .., "registers": ..}}}}

`quantlib bench --tune` writes one. Where a table says nothing, kernels follow their own rule and costs their default.
"""

from __future__ import annotations

import json
import os
import re
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from quantlib.devices import Device
from quantlib.kernels.base import Problem
from quantlib.kernels.triton_launch import Tile

DIRECTORY = "QUANTLIB_TUNED"
"""Environment variable: a folder whose tables stand before the installed ones."""


def slug(device: Device) -> str:
    """The name of a device's table, without its ending: nvidia-h100-80gb-hbm3."""
    name = device.arch if device.kind == "cpu" else device.name
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@lru_cache(maxsize=32)
def _table(name: str, folder: str | None) -> dict[str, Any]:
    if folder is not None and (path := Path(folder) / f"{name}.json").exists():
        return dict(json.loads(path.read_text()))
    try:
        text = resources.files("quantlib.tuned").joinpath(f"{name}.json").read_text()
    except (ModuleNotFoundError, FileNotFoundError):
        return {}
    return dict(json.loads(text))


def table(device: Device) -> dict[str, Any]:
    """The device's table; empty where there is none."""
    return _table(slug(device), os.environ.get(DIRECTORY))


def tuned_efficiency(device: Device, kernel: str, default: float) -> float:
    """The share of the model's speed that `kernel` was measured to reach on this device, or the default."""
    return float(table(device).get("efficiency", {}).get(kernel, default))


def bucket(m: int) -> int:
    """M as tiles are tuned for: the next power of two."""
    return 1 << max(0, m - 1).bit_length()


def tile_key(problem: Problem) -> str:
    """What a tile is tuned for: format, dtype, N, K and the power of two above M."""
    dtype = str(problem.dtype).removeprefix("torch.")
    return f"{problem.format.name} {dtype} {problem.n}x{problem.k} m{bucket(problem.m)}"


def tuned_tile(device: Device, kernel: str, problem: Problem) -> Tile | None:
    """The tile measured as the fastest for the problem, or None."""
    tiles = table(device).get("tiles", {}).get(kernel)
    found = tiles.get(tile_key(problem)) if tiles else None
    return None if found is None else Tile(**found)
