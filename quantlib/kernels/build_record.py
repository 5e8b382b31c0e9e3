"""What setup.py wrote about the compiled extensions."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def build_record(extension: str) -> dict[str, Any]:
    """The record of "_cpu" or "_cuda": built, with what and for what, or `why` it was not. Empty where there is none."""
    try:
        records = json.loads(resources.files("quantlib").joinpath("_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return dict(records.get(extension, {}))
