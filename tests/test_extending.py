"""What a newcomer adds in a few lines works everywhere: a format, a layout with a kernel, an algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import quantlib
from quantlib.algorithms import RTN
from quantlib.formats import Format, register, unregister
from quantlib.formats.block import Block
from quantlib.formats.codecs import Table
from quantlib.formats.scales import FloatScale, Parts
from quantlib.kernels import Kernel, Problem, list_kernels, register_kernel, unregister_kernel
from quantlib.layouts import Layout, list_layouts, register_layout, unregister_layout
from quantlib.testing import assert_close, assert_same_bits, random_weight

from . import cases
from .models import block


@pytest.fixture
def mine() -> Iterator[Format]:
    """An 8-entry code book under fp16 scales: all that a new format takes."""
    table = Table((-1.0, -0.55, -0.27, -0.05, 0.13, 0.36, 0.64, 1.0))
    fmt = Format("mine3", codec=table, block=Block(1, 32), scale=FloatScale(torch.float16))
    register(fmt)
    yield fmt
    unregister("mine3")


def test_a_new_table_format_gets_everything(mine: Format, tmp_path: Path) -> None:
    assert "mine3" in quantlib.list_formats()
    weight = random_weight(20, 90)
    packed = quantlib.quantize(weight, "mine3")
    assert packed.nbytes == mine.nbytes(20, 90)
    assert mine.bits_per_weight(64, 4096) == 3 + 16 / 32
    searched = RTN("mse").quantize(weight, mine)
    assert (searched.dequantize() - weight).norm() < (packed.dequantize() - weight).norm()
    x = torch.randn(5, 90, requires_grad=True)
    expected = torch.nn.functional.linear(x.detach().double(), packed.dequantize().double())
    ran = set()
    for kernel in list_kernels("linear"):
        try:
            assert_close(quantlib.linear(x.detach(), packed, kernel=kernel.name), expected)
        except quantlib.KernelError:
            continue
        ran.add(kernel.backend)
    assert {"reference", "cpu", "triton"} <= ran
    (dx,) = torch.autograd.grad(quantlib.linear(x, packed).sum(), x)
    assert_close(dx, torch.ones(5, 20).double() @ packed.dequantize().double())
    model = block()
    quantlib.patch(model, "mine3", progress=False)
    quantlib.save(model, tmp_path / "saved")
    loaded = quantlib.load(tmp_path / "saved", model=block())
    inputs = torch.randn(2, 48)
    with torch.no_grad():
        assert_same_bits(loaded(inputs), model(inputs))


REVERSED = Layout(
    "reversed",
    forward=lambda fmt, n, k, parts: {"codes": parts["codes"].flip(1), "rest": _join(parts)},
    inverse=lambda fmt, n, k, parts: {"codes": parts["codes"].flip(1), **_split(fmt, n, k, parts["rest"])},
    supports=lambda fmt: None if fmt.zero == "none" else "zeros are not permuted",
)


def _join(parts: Parts) -> Tensor:
    return torch.cat([part.reshape(-1).view(torch.uint8) for name, part in parts.items() if name != "codes"])


def _split(fmt: Format, n: int, k: int, flat: Tensor) -> Parts:
    parts, start = {}, 0
    for name, spec in fmt.specs(n, k).items():
        if name != "codes":
            part = flat[start : start + spec.nbytes].clone().view(spec.dtype)
            parts[name] = part.view(spec.shape)
            start += spec.nbytes
    return parts


class ReversedLinear(Kernel):
    name = "reversed_linear"
    backend = "cpu"
    operation = "linear"
    layout = "reversed"

    def supports(self, problem: Problem) -> str | None:
        return None if problem.activations is None else "takes no activations"

    def cost(self, problem: Problem) -> float:
        return 0.0

    def run(self, problem: Problem, x: Tensor, weight: quantlib.QuantizedTensor, bias: Tensor | None) -> Tensor:
        assert weight.layout == "reversed"
        return torch.nn.functional.linear(x, weight.dequantize(x.dtype), bias)


@pytest.fixture
def reversed_kernel() -> Iterator[None]:
    register_layout(REVERSED)
    register_kernel(ReversedLinear())
    yield
    unregister_kernel("reversed_linear")
    unregister_layout("reversed")


@pytest.mark.usefixtures("reversed_kernel")
def test_a_new_layout_is_chosen_run_and_saved_as_rows(tmp_path: Path) -> None:
    model, plain = block(), block()
    quantlib.patch(plain, "nvfp4", kernel="reference_linear", progress=False)
    report = quantlib.patch(model, "nvfp4", progress=False)
    assert {kernel for row in report.layers for kernel in row.kernels.values()} == {"reversed_linear"}
    assert model.up_proj.layout == "reversed"
    x = torch.randn(2, 48)
    with torch.no_grad():
        assert_same_bits(model(x), plain(x))
    for name, tensor in plain.state_dict().items():
        assert_same_bits(model.state_dict()[name], tensor)
    assert model.up_proj.layout == "reversed"
    model.load_state_dict(plain.state_dict())
    assert model.up_proj.layout == "reversed"
    quantlib.save(model, tmp_path / "saved")
    with torch.no_grad():
        assert_same_bits(quantlib.load(tmp_path / "saved", model=block())(x), plain(x))
    asymmetric = quantlib.QuantLinear.from_linear(torch.nn.Linear(64, 8), "int4-g32-asym").prepare()
    assert asymmetric.layout != "reversed"


@pytest.mark.usefixtures("reversed_kernel")
@pytest.mark.parametrize("spec", cases.FORMATS)
def test_every_layout_is_exactly_reversible(spec: str) -> None:
    for layout in list_layouts():
        for n, k in cases.SHAPES:
            rows = quantlib.quantize(random_weight(n, k), spec)
            refusal = layout.supports(rows.format)
            if refusal is not None:
                with pytest.raises(quantlib.ShapeError, match=refusal):
                    rows.to_layout(layout.name)
                continue
            back = rows.to_layout(layout.name).to_layout("rows")
            assert list(back.parts) == list(rows.parts)
            for name, part in rows.parts.items():
                assert_same_bits(back.parts[name], part)


def test_names_are_taken_once() -> None:
    with pytest.raises(quantlib.FormatError, match="registered already"):
        register(quantlib.get_format("nvfp4"))
    with pytest.raises(quantlib.KernelError, match="registered already"):
        register_kernel(list_kernels("linear")[0])
    with pytest.raises(quantlib.ShapeError, match="registered already"):
        register_layout(list_layouts()[0])
