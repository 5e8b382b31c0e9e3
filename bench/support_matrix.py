"""The support matrix of the README, made from the kernels' own declarations.

    python -m bench.support_matrix            print it
    python -m bench.support_matrix --update   write it between the markers in README.md

Each cell names the backend that dispatch takes for y = x W^T at M = 1 and M = 512 and for dX. Each column says how far its
code has been proven: measured (ran on such a device and was timed), compiled (compiled for it, run by the interpreter only).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch

from bench.report import updated
from quantlib import dispatch
from quantlib.devices import Device
from quantlib.formats import families
from quantlib.kernels import Problem, get_kernel

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- support matrix: begin -->", "<!-- support matrix: end -->"

PROOF = {"cpu": "measured", "sm_80": "compiled", "sm_89": "compiled", "sm_90": "compiled"}
PROOF |= {"sm_100": "compiled", "sm_103": "compiled", "sm_120": "compiled", "sm_121": "compiled"}
"""How far the code for a device has been proven; raised to "measured" when results of such a device are committed."""

DEVICES = {
    "cpu": Device("cpu", "CPU", "avx2", 8, 50.0, 0.4),
    **{arch: Device("cuda", arch, arch, 100, 2000.0, 400.0) for arch in PROOF if arch != "cpu"},
}


def cell(fmt_name: str, device: Device, dtype: torch.dtype) -> str:
    """The kernels taken at M = 1, M = 512 and for dX, by backend, or one word where they agree."""
    fmt = next(family.build() for family in families() if family.name == fmt_name)

    def backend(operation: str, m: int) -> str:
        problem = Problem(operation, m, 4096, 4096, dtype, fmt, "rows", None, device)  # type: ignore[arg-type]
        best = next(choice for choice in dispatch.choices(problem) if choice.cost is not None)
        return get_kernel(best.kernel).backend

    found = [backend("linear", 1), backend("linear", 512), backend("dgrad", 512)]
    return found[0] if len(set(found)) == 1 else " / ".join(found)


def matrix() -> str:
    """The whole table as Markdown."""
    header = ["format", "bits per weight", *(f"{name} ({PROOF[name]})" for name in DEVICES)]
    rows = [header, ["---"] * len(header)]
    for family in families():
        fmt = family.build()
        bits = f"{fmt.bits_per_weight(4096, 4096):.3f}"
        cells = [cell(family.name, device, torch.bfloat16) for device in DEVICES.values()]
        rows.append([f"`{fmt.name}`", bits, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    """Print the table, or update the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--update", action="store_true", help="write the table into README.md")
    if not parser.parse_args().update:
        print(matrix())
        return
    README.write_text(updated(README.read_text(), matrix(), BEGIN, END))


if __name__ == "__main__":
    main()
