"""A launch bound once and repeated: the same arguments as Triton would bind anew, one compilation per specialization."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantlib import QuantLinear, dispatch
from quantlib.formats import get_format
from quantlib.kernels import fragments_launch, register_kernel, unregister_kernel
from quantlib.kernels.base import Kernel, Problem
from quantlib.kernels.triton_launch import BoundLaunch, Launch, Tile, alike
from quantlib.kernels.workspace import split_workspace
from quantlib.tensor import QuantizedTensor
from quantlib.testing import assert_same_bits, random_weight

ROOT = Path(__file__).resolve().parent.parent


def quantized(n: int = 32, k: int = 64) -> QuantizedTensor:
    fmt = get_format("int4-g32-asym")
    weight = random_weight(n, k)
    parts = fmt.fit(weight)
    return QuantizedTensor(fmt, (n, k), {"codes": fmt.encode(weight, parts), **parts}).to_layout("fragments")


def gemv(x: Tensor, weight: QuantizedTensor, y: Tensor) -> Launch:
    return fragments_launch.gemv_launch(x, weight, None, None, y, None, None, Tile(8, 16, 0, 1, 1))


class FakeCompiled:
    """Stands for a compiled kernel: notes what it is launched with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *values: self.calls.append((grid, values))


class FakeKernel:
    """Stands for a JIT function on a GPU."""

    def __init__(self, names: list[str]) -> None:
        self.arg_names = names
        self.bound: list[tuple[Any, dict[str, Any]]] = []
        self.compiled = FakeCompiled()

    def __getitem__(self, grid: Any) -> Any:
        def run(**arguments: Any) -> FakeCompiled:
            self.bound.append((grid, arguments))
            return self.compiled

        return run


def test_a_bound_launch_binds_once_and_then_calls_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    kernel = FakeKernel(["x", "w", "y", "M", "WARPS"])
    launch = Launch(kernel, (1, 1, 1), {"M": 1, "x": "x0", "w": "weight", "y": "y0", "WARPS": 4}, {"num_warps": 4})
    bound = BoundLaunch(launch, torch.device("cuda", 0))
    bound((5, 2, 1), x="x1", y="y1", M=3)
    bound((6, 1, 1), x="x2", y="y2", M=4)
    assert kernel.bound == [((5, 2, 1), {"x": "x1", "w": "weight", "y": "y1", "M": 3, "WARPS": 4, "num_warps": 4})]
    # In the order of the kernel's parameters, constants included, as Triton's own launch passes them.
    assert kernel.compiled.calls == [((6, 1, 1), ("x2", "weight", "y2", 4, 4))]


def test_a_bound_launch_gives_what_a_fresh_one_gives() -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter's path; the GPU's is tested by every product on a GPU")
    weight = quantized()
    first, second = (torch.randn(m, 64, generator=torch.Generator().manual_seed(m)).bfloat16() for m in (2, 3))
    ys = [torch.empty(len(x), 32, dtype=torch.bfloat16) for x in (first, second)]
    bound = BoundLaunch(gemv(first, weight, ys[0]), torch.device("cpu"))
    for x, y in zip((first, second), ys, strict=True):
        bound(fragments_launch.gemv_grid(32, Tile(8, 16, 0, 1, 1)), x=x, y=y, M=len(x), x_stride=x.stride(0))
        fresh = torch.empty_like(y)
        gemv(x, weight, fresh).run(torch.device("cpu"))
        assert_same_bits(y, fresh)


def test_what_triton_specializes_on_tells_launches_apart() -> None:
    storage = torch.zeros(64, dtype=torch.bfloat16)
    aligned, odd = storage[:32], storage[1:33]
    assert alike(aligned, 32, None) == alike(storage, 48, None)
    different = [alike(odd, 32, None), alike(aligned.float(), 32, None), alike(aligned, 33, None), alike(aligned, 32, odd)]
    assert all(found != alike(aligned, 32, None) for found in different)
    assert alike(1) != alike(17)
    assert alike(16) != alike(1 << 31)


def test_partial_sums_are_the_call_s_own_and_counters_are_kept_at_zero() -> None:
    device = torch.device("cpu")
    assert split_workspace(1, 4, 64, 4, device) == (None, None)
    partial, counters = split_workspace(4, 2, 64, 4, device)
    assert partial is not None
    assert counters is not None
    assert partial.numel() == 4 * 2 * 64
    again, same = split_workspace(4, 2, 64, 4, device)
    assert again is not partial
    assert same is counters
    _, more = split_workspace(2, 2, 64, 1 << 15, device)
    assert more is not None
    assert more.numel() >= 1 << 15
    assert int(more.abs().sum()) == 0


def test_a_bound_launch_keeps_no_activations_alive() -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter's path")
    weight = quantized()
    x, y = torch.ones(2, 64).bfloat16(), torch.empty(2, 32, dtype=torch.bfloat16)
    bound = BoundLaunch(gemv(x, weight, y), torch.device("cpu"))
    bound(fragments_launch.gemv_grid(32, Tile(8, 16, 0, 1, 1)), x=x, y=y, M=2, x_stride=64)
    watched = weakref.ref(x), weakref.ref(y)
    del x, y
    gc.collect()
    assert [reference() for reference in watched] == [None, None]


class Counting(Kernel):
    """A kernel that counts how often it is asked whether it can, and run."""

    name = "counting"
    backend = "reference"
    operation = "linear"
    layout = "any"

    def __init__(self) -> None:
        self.asked = self.ran = 0

    def supports(self, problem: Problem) -> str | None:
        self.asked += 1
        return None

    def cost(self, problem: Problem) -> float:
        return -1.0

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        self.ran += 1
        return x.new_zeros(x.shape[0], weight.shape[0])


def test_a_layer_states_its_problem_once() -> None:
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 32), "int4-g32-asym")
    kernel = Counting()
    with torch.no_grad():
        before = layer(torch.ones(3, 64))
        register_kernel(kernel)
        try:
            for _ in range(5):
                layer(torch.ones(3, 64))
            assert (kernel.asked, kernel.ran) == (1, 5)
            layer(torch.ones(4, 64))
            assert kernel.asked <= 2
        finally:
            unregister_kernel("counting")
        assert_same_bits(layer(torch.ones(3, 64)), before)


def test_replaced_parts_are_noticed() -> None:
    """Offloading and sharding swap a module's buffers behind its back."""
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 32, bias=False), "int4-g32-asym")
    other = QuantLinear.from_linear(torch.nn.Linear(64, 32, bias=False), "int4-g32-asym")
    x = torch.ones(1, 64)
    with torch.no_grad():
        assert layer.qweight is layer.qweight
        assert not torch.equal(layer(x), other(x))
        for name, part in other.qweight.parts.items():
            layer._buffers[name] = part
        assert_same_bits(layer(x), other(x))


def test_the_memo_of_a_weight_is_bounded() -> None:
    weight = quantized().to_layout("rows")
    for m in range(1, 600):
        dispatch.run("linear", torch.ones(m, 64), weight)
    assert len(weight.memo) <= dispatch.MOST_REMEMBERED + 1


COMPILE = """
import json, os, sys
import torch, triton
from bench.static_compile import CompileOnlyDriver
from triton.runtime import driver
from quantlib.formats import get_format
from quantlib.kernels import fragments_launch
from quantlib.kernels.triton_launch import Tile
from quantlib.tensor import QuantizedTensor

hits = []
def listen(**event):
    hits.append(bool(event["cache_hit"]))
triton.knobs.compilation.listener = listen
driver.set_active(CompileOnlyDriver(90))
fmt = get_format("nvfp4")
parts = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in fmt.specs(64, 128).items()}
weight = QuantizedTensor(fmt, (64, 128), parts).to_layout("fragments").to("meta")
x, y = (torch.empty(1, width, dtype=torch.bfloat16, device="meta") for width in (128, 64))
fragments_launch.gemv_launch(x, weight, None, None, y, None, None, Tile(8, 16, 0, 2, 1)).compile()
print(json.dumps(hits))
"""


@pytest.mark.slow
def test_a_second_process_starts_from_the_cache(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    found = [
        subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert [done.returncode for done in found] == [0, 0], found[0].stderr + found[1].stderr
    assert [done.stdout.splitlines()[-1] for done in found] == ["[false]", "[true]"]
