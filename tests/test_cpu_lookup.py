"""The C++ kernels of byte look-ups: the identity gives back the decoded weight, and nothing depends on threads or batch."""

from __future__ import annotations

import pytest
import torch

import quantlib
from quantlib.dispatch import problem_of, select
from quantlib.formats import Format, get_format
from quantlib.kernels import cpu, cpu_lookup, get_kernel
from quantlib.kernels.cpu_pairs import exact_in_bf16
from quantlib.testing import assert_close, assert_same_bits, assert_within_ulps, random_weight

from . import cases
from .conftest import instruction_sets, running
from .test_cpu_kernels import UNUSUAL, for_numbers_of_threads, fp64_product, quantized, random_x, run, surrounded

if cpu.unavailable is not None:
    pytest.skip(cpu.unavailable, allow_module_level=True)
RUNS_IN = [name for name in instruction_sets() if name in ("avx2", "avx512")]
if not RUNS_IN:
    pytest.skip(f"no instruction set with look-ups runs here, only {', '.join(instruction_sets())}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("unusual_formats")
SHAPES = (*cases.SHAPES, (37, 2300))
"""With rows over several blocks of columns, and a last span that is not whole."""
NAMES = ("cpu_lookup_dot", "cpu_lookup_tile")


def taken(fmt: Format) -> bool:
    """What supports() has to accept: a list of its own, so that a format can't be lost."""
    narrow = 2 <= fmt.codec.bits <= 4
    wide = 5 <= fmt.codec.bits <= 8 and (fmt.codec.kind == "affine" or getattr(fmt.codec, "name", "") in ("e4m3", "e5m2"))
    return (narrow or wide) and (fmt.block.cols or 0) % (32 if fmt.codec.bits == 8 else 16) == 0


ALL: tuple[Format, ...] = (*map(get_format, cases.FORMATS), *UNUSUAL)
TAKEN = [fmt.name for fmt in ALL if taken(fmt)]


def product(name: str, x: torch.Tensor, weight: quantlib.QuantizedTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """run(), in calls of as many rows as the kernel takes."""
    step = cpu_lookup.DOT_ROWS if name == "cpu_lookup_dot" else max(1, x.shape[0])
    return torch.cat([run(name, x[i : i + step], weight, bias) for i in range(0, max(1, x.shape[0]), step)])


def test_every_format_is_taken_or_refused_for_its_bits_table_or_blocks(isa: str) -> None:
    for fmt in ALL:
        for name in NAMES:
            why = get_kernel(name).supports(problem_of("linear", 1, quantized(fmt.name, 33, 130), torch.bfloat16))
            assert (why is None) == taken(fmt)
            assert why is None or any(word in why for word in ("bits", "entries", "multiple of"))
    assert {get_format(spec).name for spec in cases.FORMATS} <= set(TAKEN)


@pytest.mark.parametrize("spec", TAKEN)
def test_identity_gives_back_the_decoded_weight(spec: str, isa: str) -> None:
    """Bit for bit; within one ulp where bf16 doesn't hold a code book's entries. A sum of zeros has no sign."""
    for n, k in SHAPES:
        weight = quantized(spec, n, k)
        for dtype in cases.DTYPES:
            decoded = weight.dequantize(dtype).T.contiguous()
            rows = list(range(k)) if k < 200 else sorted({*range(0, k, 7), *range(256, k, 511), k - 1})
            eye, expected = torch.eye(k, dtype=dtype)[rows], decoded[rows] + 0.0
            assert_same_bits(run("cpu_lookup_tile", eye, weight) + 0.0, expected)
            y = product("cpu_lookup_dot", eye, weight) + 0.0
            if dtype is torch.bfloat16 and not exact_in_bf16(weight.format):
                assert_within_ulps(y, expected, 1)
            else:
                assert_same_bits(y, expected)


@pytest.mark.parametrize("spec", cases.FORMATS)
def test_products_are_those_of_the_decoded_weight(spec: str, isa: str) -> None:
    for i, (n, k) in enumerate(SHAPES):
        weight = quantized(spec, n, k)
        for dtype in cases.DTYPES:
            bias = torch.randn(n).to(dtype) if i % 2 else None
            for m in (0, 1, 2, 7, 13, 100):
                x = random_x(m, k, dtype)
                assert_close(run("cpu_lookup_tile", x, weight, bias), fp64_product(x, weight, bias))
                if m <= cpu_lookup.DOT_ROWS:
                    assert_close(run("cpu_lookup_dot", x, weight, bias), fp64_product(x, weight, bias))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", ["int4-g32-asym", "nf4-dq", "q4_k", "q6_k", "fp8-e4m3-block128"])
def test_bits_do_not_depend_on_threads_or_batch(spec: str, name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every M from 1 to 40 of the tile kernel, which serves batch_invariant."""
    weight = quantized(spec, 2050, 576)
    x = random_x(100, 576, torch.bfloat16)
    results = for_numbers_of_threads(lambda: product(name, x, weight))
    for other in results[1:]:
        assert_same_bits(other, results[0])
    for m in range(1, 41 if name == "cpu_lookup_tile" else cpu_lookup.DOT_ROWS + 1):
        assert_same_bits(run(name, x[:m], weight), results[0][:m])
    monkeypatch.setattr(cpu_lookup, "ROWS_AT_ONCE", 5)
    assert_same_bits(product(name, x, weight), results[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_strides_of_x_do_not_matter(name: str, dtype: torch.dtype, isa: str) -> None:
    weight = quantized("int4-g32-asym", 130, 130)
    base = random_x(300, 300, dtype)
    for m in (1, 19):
        for x in (base[:m, :130], base[:130, :m].T, base[: 2 * m : 2, :260:2], base[:1, :130].expand(m, 130)):
            assert_same_bits(product(name, x, weight), product(name, x.contiguous(), weight))


@pytest.mark.parametrize("name", NAMES)
def test_random_codes_of_every_width_keep_the_law(name: str, isa: str) -> None:
    """Weights whose parts hold any bytes, not only what quantizing gives."""
    generator = torch.Generator().manual_seed(3)
    for spec in ("int4-g128", "int8-channel", "int3-g64-asym", "q6_k", "nvfp4", "fp8-e5m2"):
        weight = quantlib.quantize(random_weight(40, 512), spec)
        codes = torch.randint(0, 256, weight.parts["codes"].shape, generator=generator, dtype=torch.uint8)
        if spec == "fp8-e5m2":
            codes[(codes & 0x7F) >= 0x7C] = 0x3C
        weight = quantlib.QuantizedTensor(weight.format, weight.shape, weight.parts | {"codes": codes})
        y = product(name, torch.eye(512), weight)
        assert_same_bits(y + 0.0, weight.dequantize().T.contiguous() + 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_number_reaches_every_result_of_its_row(name: str, isa: str) -> None:
    weight = quantized("nvfp4", 64, 256)
    x = torch.ones(2, 256)
    x[1, 17] = float("nan")
    y = run(name, x, weight)
    assert bool(y[1].isnan().all())
    assert not bool(y[0].isnan().any())
    small = quantlib.quantize(random_weight(5, 200), "fp8-e4m3")
    for code in (0x7F, 0xFF):
        codes = small.parts["codes"].clone()
        codes[3, 130] = code
        broken = quantlib.QuantizedTensor(small.format, small.shape, small.parts | {"codes": codes})
        y = run(name, random_x(2, 200, torch.float32), broken)
        assert bool(y[:, 3].isnan().all())
        assert not bool(y[:, [0, 1, 2, 4]].isnan().any())


@pytest.mark.parametrize("name", NAMES)
def test_what_lies_behind_the_parts_does_not_matter(name: str, isa: str) -> None:
    weight = quantized("int8-channel", 3, 7)
    outputs = [run(name, torch.ones(2, 7), surrounded(weight, neighbour)) for neighbour in (0, 255)]
    assert_same_bits(outputs[0], outputs[1])


def test_one_kernel_serves_every_batch_where_batches_must_not_matter(isa: str) -> None:
    for spec in cases.FORMATS:
        for dtype in cases.DTYPES:
            weight = quantized(spec, 64, 256)
            chosen = {
                select(problem_of("linear", m, weight, dtype, batch_invariant=True)).name
                for m in (*range(1, 20), 64, 500, 4000)
            }
            assert chosen == {"cpu_lookup_tile" if isa == "avx2" else "cpu_linear"}


def test_dispatch_takes_dots_for_few_rows_tiles_for_more_and_torch_for_many(isa: str) -> None:
    weight = quantized("int4-g128", 1024, 1024)
    for dtype in cases.DTYPES:
        assert select(problem_of("linear", 1, weight, dtype)).name == "cpu_lookup_dot"
        assert select(problem_of("linear", 16, weight, dtype)).name == "cpu_lookup_tile"
    for m, name in ((256, "cpu_lookup_tile"), (2048, "cpu_decode_matmul")):
        assert select(problem_of("linear", m, weight, torch.float32)).name == name


def test_the_scalar_set_refuses_in_words() -> None:
    weight = quantized("int4-g128", 64, 256)
    with running("scalar"):
        problem = problem_of("linear", 1, weight, torch.bfloat16)
        for name in NAMES:
            assert "AVX2" in (get_kernel(name).supports(problem) or "")
            with pytest.raises(ValueError, match="no look-ups"):
                get_kernel(name).run(problem, random_x(1, 256, torch.bfloat16), weight, None)
