"""Run every Triton kernel once on small, odd shapes: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m bench.sanitize
    python -m bench.sanitize --formats nf4,nvfp4

Shapes lie off every tile and block, so that each mask is needed. Results are checked against the law as well.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from bench.contestants import Contestant, kernel_contestants
from bench.data import Material
from bench.gate import judge
from bench.guard import Failure, attempt
from bench.protocol import Case
from bench.quantizer import Quantizer, parts_of

FORMATS = (
    "int4-g128", "nvfp4", "nf4", "int8-channel", "mxfp4", "fp8-e4m3", "q4_k",
    "int3-g64-asym", "nf4-dq", "mxfp8", "fp8-e4m3-block128", "q6_k",
)  # fmt: skip
"""Every codec kind, scale kind, zero kind and number of bit planes."""
ACTIVATIONS = {"fp8-e4m3": "fp8-e4m3", "int8-channel": "int8-channel", "nvfp4": "nvfp4", "mxfp4": "mxfp8", "mxfp8": "mxfp8"}
"""Weights that are also multiplied by quantized activations, and the format of those."""
SHAPES = ((33, 130), (129, 264))
MS = (1, 3, 17, 65)


def launches(formats: Sequence[str]) -> Iterator[tuple[Contestant, Case]]:
    """Every Triton kernel on every format and shape, at each M; kernels vary before shapes, in case time runs out."""
    kernels: list[tuple[str, Contestant]] = [
        (operation, contestant)
        for operation in ("linear", "dgrad", "dequantize")
        for contestant in kernel_contestants(operation)
        if contestant.backend == "triton"
    ]
    for (n, k), fmt in product(SHAPES, formats):
        for operation, contestant in (*kernels, ("quantize", Quantizer())):
            for m in (0,) if operation == "dequantize" else MS:
                case = Case(operation, fmt, 0 if operation == "quantize" else n, k, m)
                yield contestant, case
                if operation == "linear" and fmt in ACTIVATIONS:
                    yield contestant, replace(case, activations=ACTIVATIONS[fmt])


def run(formats: Sequence[str], device: torch.device, seconds: float = math.inf) -> tuple[int, list[str]]:
    """How many launches ran within `seconds`, and what was wrong.

    All but the launches happens on the CPU: under a sanitizer every other kernel of torch's would cost seconds.
    """
    ran, wrong, begin = 0, [], time.monotonic()
    materials: dict[Case, Material] = {}
    for contestant, case in launches(formats):
        if time.monotonic() - begin > seconds:
            break
        if contestant.why_not(case, device) is not None:
            continue
        material = materials.setdefault(case.weight, Material(case.weight, torch.device("cpu")))
        found = attempt(partial(_launch, contestant, case, material, device), seconds=120)
        reason = found.reason if isinstance(found, Failure) else found
        ran += 1
        if reason is not None:
            wrong.append(f"{contestant.name}, {case.label}: {reason}")
    return ran, wrong


def _launch(contestant: Contestant, case: Case, material: Material, device: torch.device) -> str | None:
    """Launch once on the device; the gate's verdict, found on the CPU."""
    x, prepared = material.inputs(case), contestant.prepare(material)
    state = None if prepared.state is None else prepared.state.to(device)
    y = prepared.call(state, x.to(device))
    y = y.cpu() if isinstance(y, Tensor) else {name: part.cpu() for name, part in parts_of(y).items()}
    return judge(contestant, prepared, material, case, x, y).reason


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; 1 where something failed or nothing ran."""
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description="Every Triton kernel once, on odd shapes.")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no launch after this time")
    options = parser.parse_args(arguments)
    with torch.no_grad():
        ran, wrong = run(options.formats.split(","), torch.device(options.device), options.seconds)
    print("\n".join(wrong))
    print(f"{ran} launches, {len(wrong)} wrong")
    return 0 if ran and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
