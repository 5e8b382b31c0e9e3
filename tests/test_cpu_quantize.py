"""Quantizing in C++ gives torch's bits: every format, shape, dtype, instruction set, number of threads; unpleasant weights."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch

import quantlib
from quantlib.errors import FormatError, QuantlibError, ShapeError
from quantlib.formats import Format, get_format
from quantlib.formats.acceleration import accelerator, plain_torch
from quantlib.formats.block import Block
from quantlib.formats.codecs import Affine, Minifloat, Table
from quantlib.formats.scales import E8M0Scale, FloatScale, SuperScale
from quantlib.formats.search import Search, TorchProblem, tree_sum
from quantlib.kernels import cpu
from quantlib.kernels.cpu_quantize import CpuProblem
from quantlib.testing import assert_same_bits, random_weight

from . import cases

if cpu.unavailable is not None:
    pytest.skip(cpu.unavailable, allow_module_level=True)

CPU = torch.device("cpu")
Parts = dict[str, torch.Tensor]

UNUSUAL: tuple[Format, ...] = (
    Format("table-1", Table((-0.5, 0.75)), Block(1, 16), FloatScale(torch.float16)),
    Format("table-3", Table((-4.0, -1.7, -0.6, 0.0, 0.5, 1.1, 2.3, 5.0)), Block(1, 24), FloatScale(torch.bfloat16)),
    Format("table-5", Table(tuple(i**2 / 100 - 3.3 for i in range(32))), Block(1, 40), E8M0Scale()),
    Format("int5-asym", Affine(5, signed=False), Block(1, 8), FloatScale(torch.float32), zero="integer"),
    Format("int7", Affine(7), Block(1, 48), FloatScale(torch.float16)),
    Format("int1-tiles", Affine(1), Block(3, 16), FloatScale(torch.bfloat16)),
    Format("int6-minimum", Affine(6, signed=False), Block(1, 16), FloatScale(torch.float32, has_minimum=True), zero="minimum"),
    Format("e3m2", Minifloat(3, 2), Block(1, 32), E8M0Scale()),
    Format("e3m2-asym", Minifloat(3, 2), Block(1, 256), FloatScale(torch.float16), zero="integer"),
    Format("super-5", Affine(5, signed=False), Block(1, 32), SuperScale(bits=6, count=8, has_minimum=True), zero="minimum"),
    Format("int4-blocks", Affine(4), Block(1, 1024), FloatScale(torch.float16), divisors=(6.0, 9.0)),
)
"""Every width of code and piece, blocks that sums are not taken over, and the sizes that a block's tree of sums branches at."""

FORMATS: tuple[Format, ...] = (*map(get_format, cases.FORMATS), *UNUSUAL)


def quantized(fmt: Format, weight: torch.Tensor, search: Search = "absmax") -> Parts:
    scales = fmt.fit(weight, search=search)
    return {"codes": fmt.encode(weight, scales), **scales}


def torchs(fmt: Format, weight: torch.Tensor, search: Search) -> Parts | str:
    """Torch's parts, or what it says where a scale can't be stored."""
    try:
        with plain_torch():
            return quantized(fmt, weight, search)
    except FormatError as error:
        return str(error)


def assert_torchs_bits(fmt: Format, weight: torch.Tensor, search: Search, expected: Parts | str | None = None) -> None:
    expected = torchs(fmt, weight, search) if expected is None else expected
    if isinstance(expected, str):
        with pytest.raises(FormatError, match=re.escape(expected)):
            quantized(fmt, weight, search)
        return
    actual = quantized(fmt, weight, search)
    assert list(actual) == list(expected)
    for name, part in expected.items():
        assert_same_bits(actual[name], part)


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_shape_and_dtype_gets_torchs_bits(isa: str, fmt: Format, search: Search) -> None:
    for shape in (*cases.SHAPES, (5, 2048)):
        for dtype in cases.DTYPES:
            assert_torchs_bits(fmt, random_weight(*shape, dtype), search)


def taken_over(fmt: Format, weight: torch.Tensor, search: Search) -> tuple[bool, bool]:
    own = accelerator(CPU)
    assert own is not None
    problem = own.problem(fmt, weight, None, fmt.fit_shared(weight), search)
    return problem is not None, own.encode(fmt, weight, fmt.effective(fmt.fit(weight))) is not None


def test_every_registered_format_is_taken_over() -> None:
    weight = random_weight(128, 512, torch.bfloat16)
    for name in cases.FORMATS:
        fmt = get_format(name)
        assert taken_over(fmt, weight, "absmax") == (True, True), name
        assert taken_over(fmt, weight, "mse") == (fmt.block.rows == 1, True), name


def unpleasant_weights() -> dict[str, torch.Tensor]:
    generator, shape = torch.Generator().manual_seed(5), (16, 264)
    gaussian = torch.randn(shape, generator=generator)
    halves = torch.randint(-40, 41, shape, generator=generator) / 8
    signs = torch.where(gaussian > 0, 0.0, -0.0)
    sparse = torch.where(torch.rand(shape, generator=generator) < 0.02, gaussian, signs)
    mixed = gaussian * torch.exp2(torch.randint(-40, 10, shape, generator=generator).float())
    blocks = gaussian * torch.exp2(torch.randint(-24, 8, (16, 33), generator=generator).float()).repeat_interleave(8, dim=1)
    return {
        "zeros": torch.zeros(shape),
        "zeros of both signs": signs,
        "nearly all zero": sparse,
        "many ties": halves,
        "many ties, no sign": halves.abs(),
        "all alike": torch.full(shape, -0.375),
        "below fp32's normal numbers": gaussian * 1e-39,
        "the least numbers": torch.randint(-3, 4, shape, generator=generator) * 2.0**-149,
        "scales near 2^-127": gaussian * 2.0**-125,
        "wide range": mixed,
        "blocks of every size": blocks,
        "large": gaussian * 3000,
        "near fp32's largest": gaussian.clamp(-3, 3) * 1e38,
    }


UNPLEASANT = unpleasant_weights()


@cache
def torchs_unpleasant(fmt: Format, name: str, dtype: torch.dtype, search: Search) -> Parts | str:
    return torchs(fmt, UNPLEASANT[name].to(dtype), search)


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("name", list(UNPLEASANT))
def test_unpleasant_weights_get_torchs_bits_or_torchs_error(isa: str, name: str, search: Search) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = UNPLEASANT[name].to(dtype)
        for fmt in FORMATS:
            assert_torchs_bits(fmt, weight, search, torchs_unpleasant(fmt, name, dtype, search))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_ties_between_every_pair_of_codes_go_where_torch_sends_them(isa: str, fmt: Format) -> None:
    values = torch.tensor(sorted({v for v in fmt.codec.entries if v == v}))
    middle = (values[:-1] + values[1:]) / 2
    points = torch.cat([values, middle, torch.nextafter(middle, values[:-1]), torch.nextafter(middle, values[1:])])
    width = (fmt.block.cols or 8) * fmt.scale.count
    top = values.abs().max()
    for factor in (1.0, 0.3, 2.0**-20, -1.0):
        # Every block holds the extreme, so that its scale is a plain one.
        rows = torch.nn.functional.pad(points, (0, -len(points) % (width // 2))).view(-1, width // 2) * factor
        assert_torchs_bits(fmt, torch.cat([rows, torch.full_like(rows, float(top * factor))], dim=1), "absmax")


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_change_nothing(threads: int) -> None:
    before = torch.get_num_threads()
    weight = random_weight(1030, 1024, torch.bfloat16)
    try:
        for fmt in map(get_format, ("nvfp4", "nf4-dq", "int4-g32-asym", "q4_k", "fp8-e4m3-block128", "nvfp4-46")):
            for search in ("absmax", "mse") if fmt.block.rows == 1 else ("absmax",):
                torch.set_num_threads(1)
                expected = quantized(fmt, weight, search)  # type: ignore[arg-type]
                torch.set_num_threads(threads)
                actual = quantized(fmt, weight, search)  # type: ignore[arg-type]
                for name, part in expected.items():
                    assert_same_bits(actual[name], part)
    finally:
        torch.set_num_threads(before)


def test_strides_of_any_kind_give_the_same_bits() -> None:
    weight = random_weight(96, 512)
    views = {
        "columns of a wider matrix": torch.cat([weight, weight], dim=1)[:, 512:],
        "every other row": weight.repeat_interleave(2, dim=0)[::2],
        "transposed": weight.t().contiguous().t(),
        "one row for all": weight[:1].expand(96, 512),
    }
    for fmt in map(get_format, ("nvfp4", "int4-g32-asym", "nf4-dq", "fp8-e4m3-block128")):
        for view in views.values():
            actual, expected = quantized(fmt, view), quantized(fmt, view.contiguous())
            for name, part in expected.items():
                assert_same_bits(actual[name], part)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0)])
def test_empty_weights_are_left_to_torch(fmt: Format, shape: tuple[int, int]) -> None:
    assert_torchs_bits(fmt, torch.zeros(shape), "absmax")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_what_is_not_finite_is_refused_by_name_as_before(isa: str, bad: float, dtype: torch.dtype) -> None:
    for at in ((0, 0), (7, 69), (3, 33)):
        weight = random_weight(8, 70, dtype)
        weight[at] = bad
        for spec in ("nvfp4", "nf4", "int4-g128", "fp8-e4m3-tensor"):
            with pytest.raises(ShapeError, match=r"layer: 1 of 560 weights are NaN or infinite"):
                quantlib.quantize(weight, spec, name="layer")
            own, fmt = accelerator(CPU), get_format(spec)
            assert own is not None
            assert own.extremes(weight) is None
            assert own.problem(fmt, weight, None, {}, "absmax") is None
            assert own.encode(fmt, weight, fmt.effective(fmt.fit(random_weight(8, 70, dtype)))) is None
    with pytest.raises(QuantlibError):
        quantlib.quantize(torch.zeros(4, 8, dtype=torch.int32), "nvfp4")


def test_a_weight_beside_an_empty_block_is_still_looked_at(isa: str) -> None:
    """A block whose scale is 0 encodes 0, but not where the weight itself is no number."""
    fmt, weight = get_format("nf4"), random_weight(2, 128)
    parts = fmt.fit(weight)
    parts["scales"][0, 0] = 0.0
    own = accelerator(CPU)
    assert own is not None
    with plain_torch():
        expected = fmt.encode(weight, parts)
    assert_same_bits(fmt.encode(weight, parts), expected)
    weight[0, 5] = float("nan")
    assert own.encode(fmt, weight, fmt.effective(parts)) is None


def importance_of(*shape: int) -> torch.Tensor:
    """Positive numbers of very different size; some inputs are never read."""
    generator = torch.Generator().manual_seed(1)
    importance = torch.randn(*shape, generator=generator).mul(2).exp()
    return importance * (torch.rand(shape, generator=generator) > 0.1)


@pytest.mark.parametrize("weighted", [False, True])
def test_errors_and_moments_are_torchs(isa: str, weighted: bool) -> None:
    for fmt in FORMATS:
        weight = random_weight(40, 512, torch.bfloat16)
        importance = importance_of(40, 512) if weighted else None
        own = accelerator(CPU)
        assert own is not None
        problem = own.problem(fmt, weight, importance, fmt.fit_shared(weight), "mse")
        if problem is None:
            continue
        assert isinstance(problem, CpuProblem)
        fit = fmt.effective(fmt.fit(weight))
        fit = fit.reshape(fit.scale.numel())
        blocks = fmt.block.split(weight.float()).flatten(0, 1)
        weights = None if importance is None else fmt.block.split(importance).flatten(0, 1)
        plain = TorchProblem(fmt, blocks, weights, problem.shared)
        assert_same_bits(problem.true_error(fit), plain.true_error(fit))
        actual, expected = problem.moments(fit), plain.moments(fit)
        for field in ("vv", "vw", "ww", "v", "w", "one"):
            one, other = getattr(actual, field), getattr(expected, field)
            assert (one is None) == (other is None)
            if other is not None:
                assert_same_bits(one, other)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 13, 64, 130])
def test_a_tree_sum_adds_the_upper_half_to_the_lower(size: int) -> None:
    terms = torch.randn(7, size, generator=torch.Generator().manual_seed(size))
    length = 1 << (size - 1).bit_length()
    rows = [row + [0.0] * (length - size) for row in terms.tolist()]
    expected = []
    for row in rows:
        while len(row) > 1:
            half = len(row) // 2
            row = (torch.tensor(row[:half]) + torch.tensor(row[half:])).tolist()
        expected.append(row[0])
    assert_same_bits(tree_sum(terms.clone()), torch.tensor(expected))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_searches_with_importance_get_torchs_bits(isa: str, fmt: Format) -> None:
    """One row of importances for all, one for each, and one that isn't contiguous; a width that fills no last block."""
    for n, k in ((1, 8), (17, 264), (40, 512)):
        weight, whole = random_weight(n, k, torch.bfloat16), importance_of(n, 2 * k)
        for importance in (whole[0, :k], whole[:, :k], whole[:, ::2], whole[0, :k].double()):
            with plain_torch():
                expected = fmt.fit(weight, importance, "mse")
            for name, part in fmt.fit(weight, importance, "mse").items():
                assert_same_bits(part, expected[name])


def test_the_extension_refuses_what_its_sums_are_not_made_for() -> None:
    from quantlib.kernels.cpu_quantize import coding_of

    weight = random_weight(4, 96)
    native = cpu._cpu.Weight(weight.data_ptr(), "float32", 4, 96)
    for fmt in (get_format("fp8-e4m3-tensor"), next(fmt for fmt in UNUSUAL if fmt.name == "int7")):
        with pytest.raises(ValueError, match="power of two"):
            cpu._cpu.sums(coding_of(fmt, 96), native, (0, 0), [0, 0, 0], 0, [0] * 6, 1)
    with pytest.raises(ValueError, match="unknown kind float64"):
        cpu._cpu.extremes(coding_of(get_format("nf4"), 96), cpu._cpu.Weight(0, "float64", 4, 96), 0, 0, 1)
