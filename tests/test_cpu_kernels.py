"""The C++ kernels: the identity gives back the decoded weight bit by bit, on every instruction set, format, dtype and shape."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TypeVar

import pytest
import torch
from torch.nn import functional

import quantlib
from quantlib.devices import device_facts
from quantlib.dispatch import problem_of, select
from quantlib.errors import KernelError, ShapeError
from quantlib.formats import Format, get_format, register, unregister
from quantlib.formats.block import Block
from quantlib.formats.codecs import Affine, Minifloat, Table
from quantlib.formats.packing import packed_width
from quantlib.formats.scales import E4M3GlobalScale, E8M0Scale, FloatScale, SuperScale
from quantlib.kernels import cpu, get_kernel
from quantlib.kernels.base import Operation
from quantlib.layouts.strips import whole_words
from quantlib.testing import assert_close, assert_same_bits, random_weight

from . import cases
from .conftest import instruction_sets

if cpu.unavailable is not None:
    pytest.skip(cpu.unavailable, allow_module_level=True)

T = TypeVar("T")
ISAS: tuple[str, ...] = tuple(instruction_sets())
UNUSUAL: tuple[Format, ...] = (
    Format("table-1", Table((-0.5, 0.75)), Block(1, 16), FloatScale(torch.float16)),
    Format("table-3", Table((-4.0, -1.7, -0.6, 0.0, 0.5, 1.1, 2.3, 5.0)), Block(1, 24), FloatScale(torch.bfloat16)),
    Format("table-5", Table(tuple(i**2 / 100 - 3.3 for i in range(32))), Block(1, 40), E8M0Scale()),
    Format(
        "table-8", Table(tuple(-(((i * 37) % 256) ** 1.1) + 100 for i in range(256))), Block(1, 8), FloatScale(torch.float32)
    ),
    Format("int5-asym", Affine(5, signed=False), Block(1, 8), FloatScale(torch.float32), zero="integer"),
    Format("int7", Affine(7), Block(1, 48), FloatScale(torch.float16)),
    Format("int1-tiles", Affine(1), Block(3, 16), FloatScale(torch.bfloat16)),
    Format("int4-8-asym", Affine(4, signed=False), Block(1, 8), FloatScale(torch.bfloat16), zero="integer"),
    Format("int6-minimum", Affine(6, signed=False), Block(1, 16), FloatScale(torch.float32, has_minimum=True), zero="minimum"),
    Format("e3m2", Minifloat(3, 2), Block(1, 32), E8M0Scale()),
    Format("e4m3-scales", Affine(4), Block(1, 16), E4M3GlobalScale()),
    Format("super-3", Affine(3, signed=True), Block(1, 16), SuperScale(bits=6, count=16, signed=True)),
    Format("super-5", Affine(5, signed=False), Block(1, 32), SuperScale(bits=6, count=8, has_minimum=True), zero="minimum"),
    Format("super-signed", Affine(4, signed=True), Block(1, 32), SuperScale(bits=6, count=8, signed=True)),
    Format("super-4", Affine(4, signed=False), Block(1, 16), SuperScale(bits=4, count=16, has_minimum=True), zero="minimum"),
)
"""What no family builds: every width, blocks that no vector fits, tables that lie in any order, small super-scales."""


pytestmark = pytest.mark.usefixtures("unusual_formats")


@cache
def quantized(spec: str, n: int, k: int) -> quantlib.QuantizedTensor:
    fmt = get_format(spec)
    if fmt.name not in {unusual.name for unusual in UNUSUAL}:
        return quantlib.quantize(random_weight(n, k), fmt)
    # Random parts reach every code, zero and scale, which quantizing a weight does not.
    generator = torch.Generator().manual_seed(n * 1000 + k)
    parts = {}
    for name, part in fmt.specs(n, k).items():
        if part.dtype == torch.uint8:
            low, high = (100, 140) if fmt.scale.kind == "e8m0" and name == "scales" else (0, 256)
            parts[name] = torch.randint(low, high, part.shape, generator=generator, dtype=torch.uint8)
            if fmt.scale.kind == "e4m3_global" and name == "scales":
                parts[name][(parts[name] & 0x7F) == 0x7F] = 0  # but for NaN
        else:
            parts[name] = torch.randn(part.shape, generator=generator).to(part.dtype)
    assert parts["codes"].shape == (n, packed_width(fmt.padded(k), fmt.codec.bits))
    return quantlib.QuantizedTensor(fmt, (n, k), parts)


def run(
    name: str,
    x: torch.Tensor,
    weight: quantlib.QuantizedTensor,
    bias: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """The kernel of that name, having agreed to the problem, with the weight in the kernel's layout."""
    kernel = get_kernel(name)
    if kernel.layout != "any":
        weight = weight.to_layout(kernel.layout)
    m = 0 if kernel.operation == "dequantize" else x.shape[0]
    problem = problem_of(kernel.operation, m, weight, x.dtype, batch_invariant=batch_invariant)
    assert kernel.supports(problem) is None, kernel.supports(problem)
    return kernel.run(problem, x, weight, bias)


def fp64_product(x: torch.Tensor, weight: quantlib.QuantizedTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x times the weight as decoded in fp32 and not rounded, in fp64."""
    return functional.linear(x.double(), weight.dequantize().double(), None if bias is None else bias.double())


def for_numbers_of_threads(compute: Callable[[], T]) -> list[T]:
    """What `compute` gives with 1, 2, 3 and 7 threads: 3 and 7 cut rows unevenly."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(compute())
    finally:
        torch.set_num_threads(before)
    return results


def surrounded(weight: quantlib.QuantizedTensor, byte: int) -> quantlib.QuantizedTensor:
    """The same weight, with 64 times `byte` behind each of its parts in memory."""
    parts = {}
    for name, part in weight.parts.items():
        room = torch.full((part.numel() * part.element_size() + 64,), byte, dtype=torch.uint8)
        inside = room[: part.numel() * part.element_size()].view(part.dtype).view(part.shape)
        parts[name] = inside.copy_(part)
    return replace(weight, parts=parts)


def random_x(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m * 1000 + k)).to(dtype)


SPECS = (*cases.FORMATS, *(fmt.name for fmt in UNUSUAL))


@pytest.mark.parametrize("spec", SPECS)
def test_dequantize_has_the_bits_of_the_formats_law(spec: str, isa: str) -> None:
    """Also with more than 64 scales to a row, which are read together."""
    for n, k in (*cases.SHAPES, (3, 2304)):
        weight = quantized(spec, n, k)
        for dtype in cases.DTYPES:
            decoded = weight.format.decode(weight.parts, n, k, dtype)
            assert_same_bits(run("cpu_dequantize", torch.empty(0, dtype=dtype), weight), decoded)


@pytest.mark.parametrize("spec", SPECS)
def test_identity_gives_back_the_decoded_weight_bit_by_bit(spec: str, isa: str) -> None:
    """Every row of the identity alone (M = 1) and in batches of 16. A sum of zeros has no sign: both sides get + 0."""
    for n, k in cases.SHAPES:
        weight = quantized(spec, n, k)
        for dtype in cases.DTYPES:
            eye = torch.eye(k, dtype=dtype)
            decoded = weight.dequantize(dtype).T.contiguous() + 0.0
            assert_same_bits(run("cpu_linear", eye, weight, batch_invariant=True) + 0.0, decoded)
            for column in {0, k // 2, k - 1}:
                row = run("cpu_linear", eye[column : column + 1], weight)
                assert_same_bits(row + 0.0, decoded[column : column + 1])


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("spec", cases.FORMATS)
def test_products_are_those_of_the_decoded_weight(spec: str, dtype: torch.dtype, isa: str) -> None:
    """Every other M of each shape, in turns: M = 1, 5, 17 and M = 0, 2, 16, 33."""
    for i, (n, k) in enumerate(cases.SHAPES):
        weight = quantized(spec, n, k)
        bias = torch.randn(n).to(dtype) if i % 3 else None
        for m in cases.MS[i % 2 :: 2]:
            x = random_x(m, k, dtype)
            name = "cpu_linear" if m <= cpu.LINEAR_ROWS else "cpu_decode_matmul"
            y = run(name, x, weight, bias)
            assert y.shape == (m, n)
            assert y.dtype == dtype
            assert y.is_contiguous()
            assert_close(y, fp64_product(x, weight, bias))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("spec", ["int4-g32-asym", "int3-g128", "nf4-dq", "nvfp4", "q4_k", "fp8-e4m3-block128"])
def test_decode_and_matmul_in_several_blocks(spec: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "DECODED_BYTES", 1)
    weight = quantized(spec, 257, 64)
    bias = torch.randn(257).to(dtype)
    for m in (1, 40):
        x = random_x(m, 64, dtype)
        assert_close(run("cpu_decode_matmul", x, weight, bias), fp64_product(x, weight, bias))


@pytest.mark.parametrize("spec", cases.FORMATS)
def test_dgrad_is_the_product_with_the_decoded_weight(spec: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block and in blocks of 64 columns, the last of them narrow."""
    for i, (n, k) in enumerate(cases.SHAPES):
        monkeypatch.setattr(cpu, "DECODED_BYTES", 1 if i % 2 else 4 << 20)
        weight = quantized(spec, n, k)
        for m, dtype in zip((0, 1, 33), cases.DTYPES[i % 3 :] + cases.DTYPES[: i % 3], strict=True):
            dy = random_x(m, n, dtype)
            dx = run("cpu_dgrad", dy, weight)
            assert dx.dtype == dtype
            assert dx.is_contiguous()
            assert_close(dx, dy.double() @ weight.dequantize().double())


@pytest.mark.parametrize("spec", SPECS)
def test_any_rectangle_can_be_decoded(spec: str, isa: str) -> None:
    weight = quantized(spec, 33, 130)
    packed = cpu.Packed.of(weight)
    for dtype in cases.DTYPES:
        decoded = weight.dequantize(dtype)
        for rows, columns in (((0, 33), (32, 96)), ((5, 18), (64, 130)), ((32, 33), (128, 129)), ((7, 7), (0, 130))):
            out = torch.empty(rows[1] - rows[0], columns[1] - columns[0], dtype=dtype)
            packed.decode(rows, columns, out)
            assert_same_bits(out, decoded[slice(*rows), slice(*columns)])
    for rows, columns in (((0, 34), (0, 130)), ((-1, 3), (0, 130)), ((0, 33), (8, 130)), ((0, 33), (0, 131))):
        with pytest.raises(ValueError, match="out of range"):
            packed.decode(rows, columns, torch.empty(0))


@pytest.mark.parametrize("spec", SPECS)
def test_both_layouts_give_the_same_bits(spec: str, isa: str) -> None:
    """Rows of whole 32-bit words, as 1920 columns are in every format: strips that are whole and not. Others are refused."""
    taken = []
    for n, k in (*cases.SHAPES, (35, 1920)):
        weight = quantized(spec, n, k)
        strips = weight.to_layout("cpu_rows")
        if not whole_words(weight.format, k):
            problem = problem_of("linear", 1, strips, torch.float32)
            assert "whole 32-bit words" in (get_kernel("cpu_linear").supports(problem) or "")
            with pytest.raises(ValueError, match="strips take rows of whole runs of eight columns"):
                cpu.Packed.of(strips)
            continue
        taken.append(k)
        assert_same_bits(run("cpu_dequantize", torch.empty(0), strips), run("cpu_dequantize", torch.empty(0), weight))
        x = random_x(6, k, torch.float32)
        for m in (1, 6):
            assert_same_bits(run("cpu_linear", x[:m], strips), run("cpu_linear", x[:m], weight))
        part, whole = torch.empty(max(0, n - 5), k), run("cpu_dequantize", torch.empty(0), weight)
        cpu.Packed.of(strips).decode((n - len(part), n), (0, k), part)
        assert_same_bits(part, whole[n - len(part) :])
    assert 1920 in taken


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("m", [1, 19])
def test_strides_of_x_do_not_matter(m: int, dtype: torch.dtype, isa: str) -> None:
    weight = quantized("int4-g32-asym", 33, 130)
    base = random_x(300, 300, dtype)
    for x in (base[:m, :130], base[:130, :m].T, base[: 2 * m : 2, :260:2], base[:1, :130].expand(m, 130)):
        y = run("cpu_linear", x, weight, batch_invariant=True)
        assert_same_bits(y, run("cpu_linear", x.contiguous(), weight, batch_invariant=True))
        assert_close(run("cpu_decode_matmul", x, weight), fp64_product(x, weight))
        dy = x[:, :33]
        assert_close(run("cpu_dgrad", dy, weight), dy.double() @ weight.dequantize().double())


@pytest.mark.parametrize("spec", ["nvfp4", "nf4-dq", "q6_k", "fp8-e4m3-block128"])
def test_bits_do_not_depend_on_threads_or_batch(spec: str, isa: str) -> None:
    """Large enough for several threads to get rows; 3 and 7 cut them unevenly."""
    weight = quantized(spec, 2050, 576)
    x = random_x(16, 576, torch.float32)
    results = for_numbers_of_threads(lambda: (run("cpu_linear", x, weight), run("cpu_dequantize", torch.empty(0), weight)))
    for y, decoded in results[1:]:
        assert_same_bits(y, results[0][0])
        assert_same_bits(decoded, results[0][1])
    for m in (1, 2, 3, 5):
        assert_same_bits(run("cpu_linear", x[:m], weight), results[0][0][:m])
    batch = random_x(70, 576, torch.float32)
    batch[37] = x[4]
    assert_same_bits(run("cpu_linear", batch, weight, batch_invariant=True)[37], results[0][0][4])


def test_what_lies_behind_the_parts_does_not_matter(isa: str) -> None:
    """What lies behind the parts in memory has no part in the result."""
    weight = quantized("int8-channel", 3, 7)
    outputs = []
    for neighbour in (0, 255):
        moved = surrounded(weight, neighbour)
        outputs.append((run("cpu_linear", torch.ones(2, 7), moved), run("cpu_dequantize", torch.empty(0), moved)))
    assert_same_bits(outputs[0][0], outputs[1][0])
    assert_same_bits(outputs[0][1], outputs[1][1])


def test_a_new_table_format_needs_no_edit() -> None:
    fmt = Format("user-table", Table(tuple(float(i) ** 3 / 50 for i in range(-4, 4))), Block(1, 32), FloatScale(torch.float16))
    register(fmt)
    try:
        weight = quantlib.quantize(random_weight(40, 96), "user-table")
        for m, name in ((1, "cpu_linear"), (16, "cpu_linear"), (17, "cpu_decode_matmul")):
            x = random_x(m, 96, torch.float32)
            assert select(problem_of("linear", m, weight, torch.float32)).backend == "cpu"
            assert_close(run(name, x, weight), fp64_product(x, weight))
    finally:
        unregister("user-table")


def test_low_precision_activations_are_those_of_the_reference() -> None:
    weight = quantized("nvfp4", 64, 256)
    x = random_x(5, 256, torch.float32)
    problem = problem_of("linear", 5, weight, torch.float32, activations="nvfp4")
    expected = get_kernel("reference_linear").run(problem, x, weight, None)
    for name in ("cpu_linear", "cpu_decode_matmul"):
        assert_close(get_kernel(name).run(problem, x, weight, None), expected.double())


@pytest.mark.parametrize("operation", ["linear", "dgrad", "dequantize"])
def test_dispatch_prefers_these_kernels_on_a_cpu(operation: Operation) -> None:
    for m in (0,) if operation == "dequantize" else (1, 16, 17, 512, 4096):
        for dtype in cases.DTYPES:
            assert select(problem_of(operation, m, quantized("nf4", 64, 256), dtype)).backend == "cpu"


def test_refusals_say_why() -> None:
    weight = quantized("nf4", 64, 256)
    problem = problem_of("linear", 1, weight, torch.float32)
    linear, matmul = get_kernel("cpu_linear"), get_kernel("cpu_decode_matmul")
    cuda = replace(device_facts("cpu"), kind="cuda", arch="sm_90", name="H100")
    odd = replace(weight.format, name="odd", block=Block(1, 12))
    refusals = {
        "H100": replace(problem, device=cuda),
        "float64": replace(problem, dtype=torch.float64),
        "layout": replace(problem, layout="fragments"),
        "up to 16 rows": replace(problem, m=17),
        "multiple of 8 columns": replace(problem, format=odd),
        "float64)": replace(problem, format=replace(weight.format, scale=FloatScale(torch.float64))),
    }
    for words, refused in refusals.items():
        answer = linear.supports(refused)
        assert answer is not None
        assert words.rstrip(")") in answer
    assert linear.supports(replace(problem, m=17, batch_invariant=True)) is None
    assert "batch_invariant" in (matmul.supports(replace(problem, batch_invariant=True)) or "")
    assert select(problem_of("linear", 1, weight, torch.float64)).name == "reference_linear"


def test_parts_that_do_not_fit_are_refused_before_any_address_is_read() -> None:
    weight = quantized("nf4", 64, 256)
    x = torch.ones(1, 256)
    short = replace(weight, parts=weight.parts | {"codes": weight.parts["codes"][:32]})
    with pytest.raises(ShapeError, match="codes"):
        run("cpu_linear", x, short)
    lost = replace(weight, parts={"codes": weight.parts["codes"]})
    with pytest.raises(ShapeError, match="scales"):
        run("cpu_linear", x, lost)
    meta = replace(weight, parts=weight.parts | {"scales": weight.parts["scales"].to("meta")})
    with pytest.raises(KernelError, match="meta"):
        run("cpu_linear", x, meta)


def test_parts_of_any_strides_are_taken() -> None:
    weight = quantized("nf4", 64, 256)
    strided = weight.apply(lambda part: torch.stack([part, part], dim=-1)[..., 0])
    assert not strided.parts["codes"].is_contiguous()
    x = random_x(3, 256, torch.float32)
    assert_same_bits(run("cpu_linear", x, strided), run("cpu_linear", x, weight))


def in_new_process(code: str, isa_limit: str) -> str:
    environment = os.environ | {"QUANTLIB_CPU_ISA": isa_limit}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("limit", ["scalar", "avx2", "avx512", "avx512_bf16", "amx"])
def test_the_environment_can_only_lower_the_instruction_set(limit: str) -> None:
    order = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
    expected = max((isa for isa in ISAS if order.index(isa) <= order.index(limit)), key=order.index)
    assert in_new_process("from quantlib import _cpu; print(_cpu.isa())", limit) == expected


def test_an_unknown_instruction_set_is_a_refusal_in_words() -> None:
    code = (
        "import torch, quantlib\n"
        "from quantlib.kernels import cpu\n"
        "print(cpu.unavailable)\n"
        "print(quantlib.linear(torch.ones(1, 64), quantlib.quantize(torch.ones(8, 64), 'nf4')).shape)"
    )
    said = in_new_process(code, "sse9")
    assert "QUANTLIB_CPU_ISA=sse9" in said
    assert "avx512" in said
    assert "torch.Size([1, 8])" in said
    with pytest.raises(ValueError, match="not available"):
        cpu._cpu.set_isa("sse9")


def test_without_the_extension_the_reason_is_told_and_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "unavailable", "the C++ extension quantlib._cpu was not built (no C++ compiler found)")
    weight = quantized("nf4", 33, 130)
    problem = problem_of("linear", 3, weight, torch.bfloat16)
    for name in ("cpu_linear", "cpu_decode_matmul"):
        assert "no C++ compiler" in (get_kernel(name).supports(problem) or "")


def test_the_build_is_on_record() -> None:
    record, info = cpu.build_record("_cpu"), cpu._cpu.build_info()
    assert record["built"] is True
    assert set(info["isas"]) <= set(record["isas"])
    assert set(record["isas"]) | set(record["left_out"]) == {"scalar", "avx2", "avx512", "avx512_bf16", "amx"}
    assert info["compiler"] == record["compiler"]
