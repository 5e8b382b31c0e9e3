"""C++ kernels of bf16 pairs and tile registers: the identity gives back the decoded weight; threads and batch don't matter."""

from __future__ import annotations

import pytest
import torch

import quantlib
from quantlib import dispatch
from quantlib.dispatch import choices, problem_of, select
from quantlib.errors import KernelError
from quantlib.formats import Format, get_format
from quantlib.formats.block import Block
from quantlib.formats.codecs import Affine, Table
from quantlib.formats.scales import E8M0Scale, FloatScale, SuperScale
from quantlib.kernels import cpu, cpu_pairs, get_kernel
from quantlib.kernels.cpu_program import Program, Term
from quantlib.layouts.strips import whole_words
from quantlib.testing import assert_close, assert_same_bits, assert_within_ulps, random_weight

from . import cases
from .conftest import running
from .test_cpu_kernels import UNUSUAL, for_numbers_of_threads, fp64_product, quantized, random_x, run

if cpu.unavailable is not None:
    pytest.skip(cpu.unavailable, allow_module_level=True)
if not cpu.has_pairs():
    pytest.skip(f"this CPU multiplies no bf16 pairs; it runs {cpu.isa()}", allow_module_level=True)

DOTS = ("cpu_pairs_dot", "cpu_pairs_strip", *(["cpu_amx_strip"] if cpu.has_tiles() else []))
TILES = ("cpu_pairs_strip_tile", "cpu_pairs_tile", *(["cpu_amx_linear"] if cpu.has_tiles() else []))
DGRADS = ("cpu_pairs_dgrad", *(["cpu_amx_dgrad"] if cpu.has_tiles() else []))
"""By operation and by how they round; all of an operation take bf16 x, the first two of DOTS other dtypes too."""

TAKEN: tuple[Format, ...] = tuple(
    fmt for fmt in (*map(get_format, cases.FORMATS), *UNUSUAL) if fmt.codec.bits in cpu_pairs.CODE_BITS
)
NAMES = [fmt.name for fmt in TAKEN]
SHAPES = (*cases.SHAPES, (37, 2300), (5, 4500))
"""With rows over several blocks of columns, and a last span that is not whole."""


pytestmark = pytest.mark.usefixtures("unusual_formats")


def exact(fmt: Format) -> bool:
    return cpu_pairs.exact_in_bf16(fmt)


def expected_refusal(name: str, fmt: Format, k: int) -> str:
    """A word of why a kernel doesn't take a format of TAKEN; empty where it does."""
    if (get_kernel(name).layout == "cpu_rows" or name in ("cpu_amx_linear", "cpu_amx_dgrad")) and not whole_words(fmt, k):
        return "whole 32-bit words"
    rounds = name in ("cpu_pairs_strip_tile", "cpu_amx_linear", "cpu_amx_dgrad")
    return "values that bf16 holds" if rounds and fmt.codec.bits != 4 and not exact(fmt) else ""


def taking(names: tuple[str, ...], weight: quantlib.QuantizedTensor, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """The kernels that take the weight; the others are asked why not."""
    taken = []
    for name in names:
        kernel, word = get_kernel(name), expected_refusal(name, weight.format, weight.shape[1])
        placed = weight if kernel.layout == "any" else weight.to_layout(kernel.layout)
        if word:
            assert word in (kernel.supports(problem_of(kernel.operation, 1, placed, dtype)) or "")
        else:
            taken.append(name)
    return taken


def linear_kernels(weight: quantlib.QuantizedTensor, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    return taking((*DOTS, *TILES) if dtype is torch.bfloat16 else DOTS[:2], weight, dtype)


def identity_holds(y: torch.Tensor, decoded: torch.Tensor, fmt: Format) -> None:
    """Bit for bit, or one ulp where bf16 does not hold the code book's entries. A sum of zeros has no sign."""
    if exact(fmt):
        assert_same_bits(y + 0.0, decoded + 0.0)
    else:
        assert_within_ulps(y, decoded, 1)


@pytest.mark.parametrize("spec", NAMES)
def test_identity_gives_back_the_decoded_weight(spec: str) -> None:
    for n, k in SHAPES:
        weight = quantized(spec, n, k)
        for dtype in cases.DTYPES if exact(weight.format) else (torch.bfloat16,):
            decoded = weight.dequantize(dtype).T.contiguous()
            rows = list(range(k)) if k < 600 else [0, 1, 127, 128, 2047, 2048, k - 1]
            eye = torch.eye(k, dtype=dtype)[rows]
            for name in linear_kernels(weight, dtype):
                identity_holds(run(name, eye, weight), decoded[rows], weight.format)


@pytest.mark.parametrize("spec", NAMES)
def test_identity_through_dgrad_gives_back_the_decoded_weight(spec: str) -> None:
    for n, k in SHAPES:
        weight = quantized(spec, n, k)
        for name in taking(DGRADS, weight):
            dx = run(name, torch.eye(n, dtype=torch.bfloat16), weight)
            identity_holds(dx, weight.dequantize(torch.bfloat16), weight.format)


@pytest.mark.parametrize("spec", cases.FORMATS)
def test_products_are_those_of_the_decoded_weight(spec: str) -> None:
    fmt = get_format(spec)
    for i, (n, k) in enumerate(SHAPES):
        weight = quantized(spec, n, k)
        for dtype in cases.DTYPES if exact(fmt) else (torch.bfloat16,):
            bias = torch.randn(n).to(dtype) if i % 2 else None
            for m in (0, 1, 2, 3, 7, 13, 35):
                x = random_x(m, k, dtype)
                for name in linear_kernels(weight, dtype):
                    assert_close(run(name, x, weight, bias), fp64_product(x, weight, bias))
        for m in (0, 1, 5, 14, 35):
            dy = random_x(m, n, torch.bfloat16)
            for name in taking(DGRADS, weight):
                assert_close(run(name, dy, weight), dy.double() @ weight.dequantize().double())


WIDE: tuple[Format, ...] = (
    Format("super-8-of-128", Affine(4), Block(1, 128), SuperScale(bits=6, count=8, signed=True)),
    Format("super-16-of-64", Affine(4, signed=False), Block(1, 64), SuperScale(4, 16, has_minimum=True), zero="minimum"),
    Format("super-8-of-2048", Affine(4), Block(1, 2048), SuperScale(bits=8, count=8, signed=True)),
    Format("tiles-of-256", Affine(4, signed=False), Block(256, 256), FloatScale(torch.float16), zero="integer"),
    Format("tiles-of-192", Affine(4), Block(128, 192), FloatScale(torch.float32)),
    Format("powers-of-512", Affine(4), Block(1, 512), E8M0Scale()),
)


@pytest.mark.parametrize(
    "spec", ["int4-g1024", "int4-g512-asym", "int4-g96-asym", "int4-g768-bf16", *(fmt.name for fmt in WIDE)]
)
def test_blocks_of_many_columns_keep_the_law(spec: str) -> None:
    """Blocks whose numbers are no whole words of what tiles decode at once, and ones that end far behind column K."""
    fmt = {wide.name: wide for wide in WIDE}.get(spec) or get_format(spec)
    for n, k in ((40, 6144), (17, 384), (16, 4096), (33, 200)):
        parts = {}
        generator = torch.Generator().manual_seed(n + k)
        for name, part in fmt.specs(n, k).items():
            if part.dtype == torch.uint8:
                low, high = (110, 130) if fmt.scale.kind == "e8m0" and name == "scales" else (0, 256)
                parts[name] = torch.randint(low, high, part.shape, generator=generator, dtype=torch.uint8)
            else:
                parts[name] = torch.randn(part.shape, generator=generator).to(part.dtype)
        weight = quantlib.QuantizedTensor(fmt, (n, k), parts)
        if not whole_words(fmt, k):
            continue
        rows = [0, 1, 127, k // 2, k - 1]
        eye = torch.eye(k, dtype=torch.bfloat16)[rows]
        decoded = weight.dequantize(torch.bfloat16).T[rows]
        x = random_x(9, k, torch.bfloat16)
        for name in ("cpu_pairs_strip", "cpu_pairs_strip_tile", "cpu_pairs_tile"):
            identity_holds(run(name, eye, weight), decoded, fmt)
            assert_close(run(name, x, weight), fp64_product(x, weight))


@pytest.mark.parametrize("spec", NAMES)
def test_both_layouts_give_the_same_bits(spec: str) -> None:
    """What decodes blocks reads one layout by way of the other: blocks that begin and end inside a strip, and not."""
    for n, k in ((64, 256), (200, 576), (35, 1920)):
        weight = quantized(spec, n, k)
        if not whole_words(weight.format, k):
            assert k < 1920
            continue
        strips = weight.to_layout("cpu_rows")
        both = [(name, k) for name in TILES if get_kernel(name).layout == "any"] + [(name, n) for name in DGRADS]
        for name, width in both:
            if expected_refusal(name, weight.format, k):
                continue
            x = random_x(7, width, torch.bfloat16)
            results = for_numbers_of_threads(lambda name=name, x=x, strips=strips: run(name, x, strips))  # type: ignore[misc]
            for y in results:
                assert_same_bits(y, run(name, x, weight))


def test_a_kernel_of_another_layout_refuses_in_words() -> None:
    weight = quantized("int4-g128", 64, 256)
    strips, x = weight.to_layout("cpu_rows"), random_x(1, 256, torch.bfloat16)
    y = torch.empty(1, 64, dtype=torch.bfloat16)
    for name in ("pairs_dot", "lookup_dot"):
        if name == "pairs_dot" or cpu.has_lookup():
            with pytest.raises(ValueError, match="reads weights in the layout rows, not in cpu_rows"):
                cpu.Packed.of(strips).product(getattr(cpu.native(), name), x, None, y)
    for name in ("pairs_strip", "pairs_strip_tile", *(["amx_strip"] if cpu.has_tiles() else [])):
        with pytest.raises(ValueError, match="reads weights in the layout cpu_rows, not in rows"):
            cpu.Packed.of(weight).product(getattr(cpu.native(), name), x, None, y)
    program = Program(1, torch.bfloat16, 1)
    with pytest.raises(ValueError, match="reads weights in the layout rows"):
        program.product("pairs_dot", x[0].clone(), [Term(strips, None, y[0].clone())])
    both = [Term(weight, None, y[0].clone()), Term(strips, None, y[0].clone())]
    with pytest.raises(KernelError, match="one layout, not of rows, cpu_rows"):
        program.product("linear", x[0].clone(), both)


def test_one_kernel_serves_batch_invariant_products_of_strips() -> None:
    weight = quantized("nvfp4", 96, 256).to_layout("cpu_rows")
    problems = [problem_of("linear", m, weight, torch.bfloat16, batch_invariant=True) for m in (1, 2, 8, 70, 3000)]
    assert {select(problem).name for problem in problems} == {"cpu_amx_strip" if cpu.has_tiles() else "cpu_pairs_strip"}


def test_no_columns_leave_the_bias() -> None:
    weight, x = quantized("int4-g32", 40, 0), torch.empty(5, 0, dtype=torch.bfloat16)
    bias = torch.arange(40, dtype=torch.bfloat16)
    for name in linear_kernels(weight):
        assert_same_bits(run(name, x, weight, bias), bias.expand(5, 40))


@pytest.mark.parametrize("name", DGRADS)
def test_rows_that_are_not_there_add_nothing(name: str) -> None:
    """Code 0 under the last row's scale is no number here: -128 * 1e37. Rows of W are taken 32 at a time."""
    for spec in ("int8-g32-fp32", "int8-channel-fp32"):
        for n in (17, 16, 33, 5):
            like = quantized(spec, n, 128)
            parts = {"codes": torch.full_like(like.parts["codes"], 129), "scales": torch.full_like(like.parts["scales"], 1e37)}
            weight = quantlib.QuantizedTensor(like.format, like.shape, parts)
            dy = torch.full((3, n), 0.0078125, dtype=torch.bfloat16)
            for placed in (weight, weight.to_layout("cpu_rows")):
                dx = run(name, dy, placed)
                assert_close(dx, dy.double() @ weight.dequantize().double())


@pytest.mark.parametrize("name", [*DOTS, *TILES, *DGRADS])
@pytest.mark.parametrize("spec", ["int4-g32-asym", "nf4-dq", "q6_k", "fp8-e4m3-block128"])
def test_bits_do_not_depend_on_threads_or_batch(spec: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantized(spec, 2050, 576)
    x = random_x(40, 2050 if name in DGRADS else 576, torch.bfloat16)
    results = for_numbers_of_threads(lambda: run(name, x, weight))
    for other in results[1:]:
        assert_same_bits(other, results[0])
    for m in (1, 2, 3, 5, 9, 33):
        assert_same_bits(run(name, x[:m], weight), results[0][:m])
    monkeypatch.setattr(cpu_pairs, "ROWS_AT_ONCE", 5)
    assert_same_bits(run(name, x, weight), results[0])


@pytest.mark.parametrize("name", DOTS)
@pytest.mark.parametrize("columns", [8, 16, 24, 32, 40, 64, 96])
def test_bits_of_narrow_blocks_do_not_depend_on_the_batch(columns: int, name: str) -> None:
    """Of odd and even numbers of tiles of 32 columns, with totals so small that they become 0 or -0."""
    fmt = Format(f"narrow{columns}", Affine(4), Block(1, columns), FloatScale(torch.float32))
    generator = torch.Generator().manual_seed(columns)
    for k in (columns, 3 * columns, 12 * columns, 13 * columns):
        weight = quantlib.quantize(random_weight(20, k, seed=columns), fmt)
        scales = weight.parts["scales"] * 10.0 ** torch.randint(-38, 0, weight.parts["scales"].shape, generator=generator)
        weight = quantlib.QuantizedTensor(fmt, weight.shape, dict(weight.parts) | {"scales": scales})
        x = random_x(40, k, torch.bfloat16) * (10.0 ** torch.randint(-38, 0, (40, 1), generator=generator)).bfloat16()
        y = run(name, x, weight)
        for m in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33):
            assert_same_bits(run(name, x[40 - m :], weight), y[40 - m :])
    minus = torch.full_like(weight.parts["codes"], 0x77)
    tiny = {"codes": minus, "scales": torch.full_like(weight.parts["scales"], 1e-30)}
    weight = quantlib.QuantizedTensor(fmt, weight.shape, dict(weight.parts) | tiny)
    x = torch.full((33, k), 1e-20, dtype=torch.bfloat16)
    y = run(name, x, weight)
    assert not bool(y.any())
    for m in (1, 2, 8, 9):
        assert_same_bits(run(name, x[:m], weight), y[:m])


@pytest.mark.parametrize("name", DOTS)
def test_an_infinite_number_leaves_the_other_blocks_of_32_columns_alone(name: str) -> None:
    fmt = Format("infinite", Table((*(float(i) for i in range(-8, 7)), float("inf"))), Block(1, 32), FloatScale(torch.float32))
    parts = dict(quantlib.quantize(random_weight(16, 96, seed=3), fmt).parts)
    codes = torch.full_like(parts["codes"], 0x33)
    codes.view(16, -1)[0, 0] = 0xFF
    weight = quantlib.QuantizedTensor(fmt, (16, 96), parts | {"codes": codes, "scales": torch.full_like(parts["scales"], 0.01)})
    x = torch.full((17, 96), 1e-3, dtype=torch.bfloat16)
    for m in (1, 4, 8, 9, 17):
        y = run(name, x[:m], weight)
        assert bool((y[:, 0] == float("inf")).all())
        assert bool(y[:, 1:].isfinite().all())


@pytest.mark.parametrize("name", [*DOTS, *TILES, *DGRADS])
def test_strides_of_x_do_not_matter(name: str) -> None:
    weight = quantized("int4-g32-asym", 130, 160)
    base, k = random_x(330, 330, torch.bfloat16), 130 if name in DGRADS else 160
    for m in (1, 19):
        for x in (base[:m, :k], base[:k, :m].T, base[: 2 * m : 2, : 2 * k : 2], base[:1, :k].expand(m, k)):
            assert_same_bits(run(name, x, weight), run(name, x.contiguous(), weight))


def test_fp32_numbers_of_any_size_are_split_without_a_loss() -> None:
    """One column at a time: y is x times a weight of 1, so its bits are x's."""
    weight = quantlib.QuantizedTensor(
        get_format("int8-channel-fp32"), (1, 1), quantlib.quantize(torch.full((1, 1), 127.0), "int8-channel-fp32").parts
    )
    one = float(weight.dequantize())
    eight = quantlib.quantize(torch.full((1, 8), 127.0), "int8-channel-fp32")
    values = torch.tensor([1.0, 3.0000002, -1.7014118e38, 1.1754944e-30, 0.1, -65504.0, 16777215.0])
    x = values.view(-1, 1)
    assert_same_bits(run("cpu_pairs_dot", x, weight), (x.double() * one).float())
    beside = torch.zeros(len(values), 8)
    beside[:, 5] = values
    assert_same_bits(run("cpu_pairs_strip", beside, eight), (x.double() * one).float())
    for odd in (float("inf"), float("-inf"), float("nan")):
        y = run("cpu_pairs_dot", torch.tensor([[odd]]), weight)
        assert torch.equal(y, torch.tensor([[odd]])) or bool(y.isnan().all() and odd != odd)


def test_infinite_and_missing_numbers_reach_every_result_of_their_row() -> None:
    weight = quantized("nvfp4", 64, 256)
    x = torch.ones(2, 256, dtype=torch.bfloat16)
    x[1, 17] = float("nan")
    for name in (*DOTS, *TILES):
        y = run(name, x, weight)
        assert bool(y[1].isnan().all())
        assert not bool(y[0].isnan().any())


@pytest.mark.parametrize("spec", ["int4-g32", "int4-g32-asym", "nvfp4", "mxfp4", "q4_1", "int5-asym"])
def test_numbers_of_the_next_row_do_not_reach_a_row_that_ends_inside_a_span(spec: str) -> None:
    """Rows' scales lie side by side, and a row's last span reads on into the next one's."""
    weight = quantized(spec, 40, 160)
    parts = {name: part.clone() for name, part in weight.parts.items()}
    for name in {"scales", "minima"} & parts.keys():
        parts[name][1::2] = float("nan") if parts[name].is_floating_point() else (0xFF if spec == "mxfp4" else 0x7F)
    broken = quantlib.QuantizedTensor(weight.format, weight.shape, parts)
    for m in (1, 4, 9):
        x = random_x(m, 160, torch.bfloat16)
        for name in (*DOTS, *TILES):
            y, expected = run(name, x, broken), run(name, x, weight)
            assert bool(y[:, 1::2].isnan().all())
            assert_same_bits(y[:, ::2], expected[:, ::2])


def test_dispatch_takes_them_where_they_are_fastest_and_says_why_not_elsewhere() -> None:
    weight = quantized("int4-g128", 64, 256)
    assert select(problem_of("linear", 1, weight, torch.bfloat16)).name == "cpu_pairs_dot"
    assert select(problem_of("linear", 512, weight, torch.bfloat16)).name == TILES[-1]
    strips = weight.to_layout("cpu_rows")
    few, many = ("cpu_amx_strip", "cpu_amx_linear") if cpu.has_tiles() else ("cpu_pairs_strip", "cpu_pairs_strip_tile")
    assert select(problem_of("linear", 1, strips, torch.bfloat16)).name == "cpu_pairs_strip"
    assert {select(problem_of("linear", m, strips, torch.bfloat16)).name for m in (8, 16)} == {few}
    assert select(problem_of("linear", 1, quantized("int4-g128", 4096, 4096).to_layout("cpu_rows"), torch.bfloat16)).name == few
    assert select(problem_of("linear", 512, strips, torch.bfloat16)).name == many
    assert dispatch.best_layout(weight.format, (4096, 4096), "cpu", torch.bfloat16) == "cpu_rows"
    assert select(problem_of("dgrad", 512, weight, torch.bfloat16)).name == DGRADS[-1]
    refusals = {choice.kernel: choice.refusal or "" for choice in choices(problem_of("linear", 1, weight, torch.float16))}
    assert "multiplies bf16; x is float16" in refusals["cpu_pairs_tile"]
    book = quantized("nf4", 64, 256)
    assert "bf16 x alone" in (get_kernel("cpu_pairs_dot").supports(problem_of("linear", 1, book, torch.float32)) or "")


def test_a_lower_instruction_set_refuses_in_words() -> None:
    weight = quantized("int4-g128", 64, 256)
    with running("avx2"):
        answer = get_kernel("cpu_pairs_dot").supports(problem_of("linear", 1, weight, torch.bfloat16))
        assert answer is not None
        assert "AVX-512 BF16" in answer
        assert "avx2" in answer
        with pytest.raises(ValueError, match="no products of bf16 pairs"):
            get_kernel("cpu_pairs_dot").run(
                problem_of("linear", 1, weight, torch.bfloat16), random_x(1, 256, torch.bfloat16), weight, None
            )


@pytest.mark.skipif(not cpu.has_tiles(), reason=f"this CPU has no tile registers; it runs {cpu.isa()}")
def test_without_tile_registers_kernels_refuse_in_words() -> None:
    strips = quantized("int4-g128", 64, 256).to_layout("cpu_rows")
    x = random_x(1, 256, torch.bfloat16)
    with running("avx512_bf16"):
        for name in ("cpu_amx_strip", "cpu_amx_linear"):
            problem = problem_of("linear", 1, strips, torch.bfloat16)
            assert "needs AMX BF16; avx512_bf16 runs here" in (get_kernel(name).supports(problem) or "")
            with pytest.raises(ValueError, match="avx512_bf16 has no tile registers"):
                get_kernel(name).run(problem, x, strips, None)


@pytest.mark.skipif(not cpu.has_tiles(), reason=f"this CPU has no tile registers; it runs {cpu.isa()}")
@pytest.mark.parametrize("name", [name for name in (*DOTS, *TILES, *DGRADS) if "pairs" in name])
def test_products_of_pairs_have_the_same_bits_without_tile_registers(name: str) -> None:
    for spec in ("int4-g128", "nvfp4", "q4_k", "int8-channel"):
        weight = quantized(spec, 200, 512)
        x = random_x(11, 200 if name in DGRADS else 512, torch.bfloat16)
        y = run(name, x, weight)
        with running("avx512_bf16"):
            assert_same_bits(run(name, x, weight), y)


@pytest.mark.skipif(not cpu.has_tiles(), reason=f"this CPU has no tile registers; it runs {cpu.isa()}")
def test_tile_registers_take_bf16_alone() -> None:
    strips, y = quantized("int4-g128", 32, 128).to_layout("cpu_rows"), torch.empty(1, 32)
    x = torch.ones(1, 128)
    with pytest.raises(ValueError, match="multiplies bf16 x alone"):
        cpu.Packed.of(strips).product(cpu.native().amx_strip, x, None, y)
    with pytest.raises(ValueError, match="multiplies bf16 x alone"):
        Program(1, torch.float32, 1).product("amx_strip", x[0], [Term(strips, None, y[0])])


def test_random_codes_of_every_width_keep_the_law() -> None:
    """Weights whose parts hold any bytes, not only what quantizing gives."""
    generator = torch.Generator().manual_seed(3)
    for spec in ("int4-g128", "int8-channel", "int3-g64-asym", "int2-g16-asym", "q4_k", "q6_k"):
        weight = quantlib.quantize(random_weight(40, 512), spec)
        codes = torch.randint(0, 256, weight.parts["codes"].shape, generator=generator, dtype=torch.uint8)
        weight = quantlib.QuantizedTensor(weight.format, weight.shape, weight.parts | {"codes": codes})
        eye = torch.eye(512, dtype=torch.bfloat16)
        for name in linear_kernels(weight):
            identity_holds(run(name, eye, weight), weight.dequantize(torch.bfloat16).T.contiguous(), weight.format)
