"""quantlib.grouped_linear: every row by its own expert's weight, whatever the counts; kernels, gradients, and what torch sees.

Without a GPU the Triton kernels run in Triton's interpreter, which conftest.py asks for before Triton is imported.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import quantlib
from quantlib import QuantizedExperts, QuantizedTensor, grouped_linear
from quantlib.devices import device_facts
from quantlib.dispatch import choices, choose
from quantlib.formats import get_format
from quantlib.grouped_dispatch import best_layout, run
from quantlib.kernels.base import Grouping, Problem, get_declaration, list_grouped_kernels
from quantlib.kernels.fragments_launch import arithmetic, whole_columns
from quantlib.kernels.grouped_launch import grouped_dgrad_launch, grouped_launch, grouped_tile
from quantlib.kernels.triton_launch import Tile
from quantlib.layouts import get_layout
from quantlib.testing import assert_close, assert_same_bits, assert_within_ulps, random_weight
from tests.cases import DTYPES, FORMATS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAID_OUT = [spec for spec in FORMATS if get_layout("fragments").supports(get_format(spec)) is None]
"""The formats that the Triton kernels take."""

COUNTS = (
    (1,), (0,), (5,), (33,),
    (2, 0, 3), (0, 0, 7), (7, 0, 0), (0, 0, 0), (1, 1, 1), (17, 1, 16),
    (0, 4, 0, 0, 1, 0, 0, 0, 2),
)  # fmt: skip
"""Rows per expert: none, one, uneven ones, each side of a block of 16."""


def experts(spec: str, count: int, n: int, k: int, layout: str = "rows") -> QuantizedExperts:
    weights = [quantlib.quantize(random_weight(n, k, seed=seed), spec) for seed in range(count)]
    return QuantizedExperts.stack(weights).to_layout(layout).to(DEVICE)


def offsets_of(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=DEVICE)


@dataclass(frozen=True)
class Case:
    """Random operands for `counts` rows of each expert, and `unowned` rows behind them."""

    weight: QuantizedExperts
    x: Tensor
    offsets: Tensor
    bias: Tensor
    rows: Tensor
    row_scale: Tensor

    @classmethod
    def make(cls, weight: QuantizedExperts, counts: Sequence[int], dtype: torch.dtype, unowned: int = 0, seed: int = 0) -> Case:
        generator = torch.Generator().manual_seed(seed)
        count, n, k = weight.shape
        total = sum(counts) + unowned
        x = torch.randn(6, k, generator=generator).to(DEVICE, dtype)
        bias = torch.randn(count, n, generator=generator).to(DEVICE, dtype)
        rows = torch.randint(0, 6, (total,), generator=generator, dtype=torch.int32).to(DEVICE)
        return cls(weight, x, offsets_of(counts), bias, rows, torch.rand(total, generator=generator).to(DEVICE))

    @property
    def total(self) -> int:
        return self.rows.shape[0]

    def expected(self, x: Tensor | None = None, bias: Tensor | None = None, row_scale: Tensor | None = None) -> Tensor:
        """A loop over experts with the decoded weights, in fp64; the gathered rows of x unless they are given."""
        decoded = self.weight.dequantize(self.x.dtype).double()
        x = self.x[self.rows] if x is None else x
        y = torch.zeros(self.total, decoded.shape[1], dtype=torch.float64, device=DEVICE)
        for expert, weight in enumerate(decoded):
            own = slice(int(self.offsets[expert]), int(self.offsets[expert + 1]))
            product = x[own].double() @ weight.T
            y[own] = product if bias is None else product + bias[expert].double()
        return y if row_scale is None else y * row_scale.double()[:, None]

    def expected_dgrad(self, dy: Tensor, row_scale: Tensor | None = None) -> Tensor:
        """dx of `expected`, row by row."""
        x = self.x[self.rows].double().requires_grad_()
        self.expected(x, None, row_scale).backward(dy.double())
        assert x.grad is not None
        return x.grad


# The stack


@pytest.mark.parametrize("spec", FORMATS)
def test_a_stack_gives_every_expert_back_bit_for_bit(spec: str) -> None:
    weights = [quantlib.quantize(random_weight(20, 72, seed=seed), spec) for seed in range(3)]
    stacked = QuantizedExperts.stack(weights)
    assert stacked.shape == (3, 20, 72)
    assert stacked.nbytes == sum(weight.nbytes for weight in weights)
    for layout in ("rows", "fragments") if spec in LAID_OUT else ("rows",):
        moved = stacked.to_layout(layout)
        assert moved.layout == layout
        for weight, found in zip(weights, moved.to_layout("rows").unstack(), strict=True):
            assert (found.format, found.shape, found.layout) == (weight.format, weight.shape, "rows")
            for name, part in weight.parts.items():
                assert_same_bits(found.parts[name], part)
    assert_same_bits(stacked.dequantize(), torch.stack([weight.dequantize() for weight in weights]))


def test_experts_that_differ_are_named() -> None:
    first, other = (quantlib.quantize(random_weight(16, 64), spec) for spec in ("nf4", "int8"))
    with pytest.raises(quantlib.ShapeError, match=r"expert 1 is .*int8"):
        QuantizedExperts.stack([first, other])
    with pytest.raises(quantlib.ShapeError, match="no experts"):
        QuantizedExperts.stack([])


# The Triton kernels


def forced(case: Case, **given: Tensor | None) -> Tensor:
    return grouped_linear(case.x, case.weight, case.offsets, rows=case.rows, kernel="triton_grouped", **given)  # type: ignore[arg-type]


def dgrad(case: Case, dy: Tensor, row_scale: Tensor | None = None) -> Tensor:
    grouping = Grouping(case.offsets, None, row_scale)
    return run("grouped_dgrad", dy, case.weight, grouping, kernel="triton_grouped_dgrad")


def is_exact(spec: str, dtype: torch.dtype, kernel: str) -> bool:
    """Whether x = eye gives the law's own bits: weights made by the law, or scaled to them without rounding."""
    values, at = arithmetic(get_format(spec), dtype, kernel)
    return values in ("law", "affine") or (values == "float" and at == "weight")


@pytest.mark.parametrize("spec", LAID_OUT)
def test_identity_gives_the_decoded_weights_and_products_stay_within_the_limit(spec: str) -> None:
    """One block holds both: eight rows of the identity, which single out columns of W, and three random ones."""
    n, k, dtype = 20, 40, torch.bfloat16
    weight = experts(spec, 2, n, k, "fragments")
    law = weight.dequantize(dtype)[1]
    grouping = Grouping(offsets_of((0, 11)), None, torch.tensor([1.0] * 8 + [0.5, 3.0, -1.25], device=DEVICE))
    scale = grouping.row_scale
    assert scale is not None
    generator = torch.Generator().manual_seed(0)
    picked = torch.tensor([0, 1, 8, 15, 16, 23, 31, 39], device=DEVICE)
    x = torch.cat([torch.eye(k)[picked.cpu()], torch.randn(3, k, generator=generator)]).to(DEVICE, dtype)
    y = run("grouped", x, weight, grouping, kernel="triton_grouped")
    assert_within_ulps(y[:8], law[:, picked].T.contiguous() + 0.0, 0 if is_exact(spec, dtype, "skinny") else 1)
    assert_close(y[8:], (x[8:].double() @ law.double().T) * scale[8:, None].double())
    picked = torch.tensor([0, 1, 7, 8, 9, 15, 16, 19], device=DEVICE)
    dy = torch.cat([torch.eye(n)[picked.cpu()], torch.randn(3, n, generator=generator)]).to(DEVICE, dtype)
    dx = run("grouped_dgrad", dy, weight, grouping, kernel="triton_grouped_dgrad")
    assert_within_ulps(dx[:8], law[picked] + 0.0, 0 if is_exact(spec, dtype, "dgrad") else 1)
    assert_close(dx[8:], (dy[8:].double() @ law.double()) * scale[8:, None].double())


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        ("int4-g32-asym", torch.float16),
        ("int4-g32-asym", torch.float32),
        ("int8-channel", torch.float16),
        ("nf4-dq", torch.float32),
        ("nvfp4", torch.float16),
        ("q4_k", torch.float32),
    ],
    ids=str,
)
def test_triton_products_in_every_dtype_off_the_tiles(spec: str, dtype: torch.dtype) -> None:
    case = Case.make(experts(spec, 2, 18, 72, "fragments"), (2, 1), dtype)
    assert_close(forced(case, bias=case.bias, row_scale=case.row_scale), case.expected(None, case.bias, case.row_scale))
    dy = torch.randn(case.total, 18, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    assert_close(dgrad(case, dy), case.expected_dgrad(dy))


@pytest.mark.parametrize("unowned", [0, 3])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_triton_finds_every_row_whatever_the_counts(counts: tuple[int, ...], unowned: int) -> None:
    case = Case.make(experts("int4-g128", len(counts), 16, 16, "fragments"), counts, torch.float16, unowned)
    assert_close(forced(case, bias=case.bias), case.expected(None, case.bias))
    dy = torch.randn(case.total, 16, generator=torch.Generator().manual_seed(3)).to(DEVICE, torch.float16)
    assert_close(dgrad(case, dy), case.expected_dgrad(dy))


@pytest.mark.parametrize("tile", [Tile(16, 128, 0, 8, 2), Tile(64, 64, 0, 4, 3), Tile(128, 32, 0, 2, 2)], ids=str)
def test_triton_results_do_not_depend_on_the_tile(tile: Tile) -> None:
    """Neither on how many slots there are, nor on whether slots are rows."""
    case = Case.make(experts("int4-g128", 3, 20, 24, "fragments"), (30, 0, 20), torch.bfloat16, unowned=2)
    y = torch.full((case.total, 20), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    grouped_launch(whole_columns(case.x, 64), case.weight, case.offsets, case.rows, case.bias, None, y, tile, 0).run(y.device)
    assert_close(y, case.expected(None, case.bias))
    dy = torch.randn(case.total, 20, generator=torch.Generator().manual_seed(4)).to(DEVICE, torch.bfloat16)
    dx = torch.full((case.total, 24), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    down = Tile(tile.m, 32, 0, tile.warps, tile.stages)
    grouped_dgrad_launch(whole_columns(dy, 32), case.weight, case.offsets, None, dx, down).run(dx.device)
    assert_close(dx, case.expected_dgrad(dy))


def test_slots_hold_every_block_for_all_counts() -> None:
    """The bound that the kernels' grid rests on (triton_kernels/grouped.py), for every offset and count up to three blocks."""
    block = 8
    for begin in range(3 * block):
        for count in range(3 * block):
            assert -(-count // block) <= (begin + count) // block - begin // block + 1


def test_triton_takes_strided_x_and_neither_reads_nor_writes_past_its_rows() -> None:
    weight = experts("int4-g128", 2, 20, 72, "fragments")
    case = Case.make(weight, (3, 2), torch.bfloat16)
    storage = torch.full((12, 100), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    storage[::2, :72] = case.x
    strided = storage[::2, :72]
    expected = forced(case)
    assert_same_bits(grouped_linear(strided, weight, case.offsets, rows=case.rows, kernel="triton_grouped"), expected)
    y = torch.full((9, 20), 7.0, dtype=torch.bfloat16, device=DEVICE)
    grouped_launch(
        whole_columns(strided, 64), weight, case.offsets, case.rows, None, None, y[2:7], Tile(16, 64, 0, 4, 3), 0
    ).run(y.device)
    assert_same_bits(y[2:7], expected)
    assert bool((y[:2] == 7).all())
    assert bool((y[7:] == 7).all())


def test_tiles_follow_the_rows_per_expert() -> None:
    fmt = get_format("nvfp4")
    widths = [grouped_tile(total, 8, fmt, torch.bfloat16, 90).m for total in (1, 128, 129, 512, 4096)]
    assert widths == [16, 16, 32, 64, 128]


# Dispatch


@pytest.mark.parametrize("kernel", ["reference_grouped", "loop_grouped", None])
@pytest.mark.parametrize("spec", FORMATS)
def test_loops_agree_with_fp64(spec: str, kernel: str | None) -> None:
    case = Case.make(experts(spec, 3, 33, 130), (3, 0, 20), torch.float32, unowned=2)
    y = grouped_linear(case.x, case.weight, case.offsets, case.bias, rows=case.rows, row_scale=case.row_scale, kernel=kernel)
    assert_close(y, case.expected(None, case.bias, case.row_scale))
    dy = torch.randn(case.total, 33, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    dgrad_kernel = None if kernel is None else f"{kernel}_dgrad"
    dx = run("grouped_dgrad", dy, case.weight, Grouping(case.offsets, None, case.row_scale), kernel=dgrad_kernel)
    assert_close(dx, case.expected_dgrad(dy, case.row_scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_any_counts_and_dtype(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case.make(experts("nf4", len(counts), 17, 40), counts, dtype, unowned=1)
    y = grouped_linear(case.x, case.weight, case.offsets, case.bias, rows=case.rows)
    assert y.dtype == dtype
    assert_close(y, case.expected(None, case.bias))
    own = case.x[case.rows]
    assert_same_bits(grouped_linear(own, case.weight, case.offsets, case.bias), y)


@pytest.mark.parametrize("kernel", [kernel.name for kernel in list_grouped_kernels("grouped")])
def test_no_rows_give_no_result(kernel: str) -> None:
    weight = experts("nf4", 2, 12, 64, "fragments" if kernel.startswith("triton") else "rows")
    y = grouped_linear(torch.empty(0, 64, dtype=torch.bfloat16, device=DEVICE), weight, offsets_of((0, 0)), kernel=kernel)
    assert y.shape == (0, 12)
    assert y.dtype == torch.bfloat16


def grouped_problem(layout: str = "fragments", device: str = "cuda", total: int = 64) -> Problem:
    facts = device_facts("cpu")
    if device == "cuda":
        facts = type(facts)("cuda", "a GPU", "sm_90", 132, 3350.0, 989.0)
    return Problem("grouped", total, 4096, 4096, torch.bfloat16, get_format("nvfp4"), layout, None, facts, experts=8)


def test_a_gpu_takes_the_grouped_kernel_and_a_cpu_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = {choice.kernel: choice for choice in choices(grouped_problem())}
    assert choose(grouped_problem()) == "triton_grouped"
    assert set(found) == {"triton_grouped", "loop_grouped", "reference_grouped"}
    assert choose(grouped_problem("rows")) == "loop_grouped"
    assert choose(grouped_problem("rows", "cpu")) == "loop_grouped"
    refusals = {choice.kernel: choice.refusal for choice in choices(grouped_problem("rows"))}
    assert "the weight lies in 'rows'" in str(refusals["triton_grouped"])
    assert get_declaration("triton_grouped").cost(grouped_problem(total=8)) < get_declaration("triton_grouped").cost(
        grouped_problem(total=8192)
    )


def test_the_layout_is_the_one_that_the_device_multiplies_fastest() -> None:
    assert best_layout(get_format("nf4"), (4, 64, 64), "cpu", torch.float32) == "rows"
    assert best_layout(get_format("nf4"), (4, 64, 64), "cpu", torch.float32, kernel="triton_grouped") == "fragments"


def test_forced_kernels_say_why_not() -> None:
    case = Case.make(experts("nf4", 2, 12, 64), (1, 2), torch.float32)
    with pytest.raises(quantlib.KernelError, match="fragments"):
        grouped_linear(case.x[:3], case.weight, case.offsets, kernel="triton_grouped")
    with pytest.raises(quantlib.KernelError, match="does linear, asked for grouped"):
        grouped_linear(case.x[:3], case.weight, case.offsets, kernel="reference_linear")
    with pytest.raises(quantlib.KernelError, match="does grouped, asked for linear"):
        quantlib.linear(case.x, case.weight.expert(0), kernel="loop_grouped")


# Gradients


@pytest.fixture(scope="module", params=["nvfp4", "int4-g32-asym", "nf4-dq"])
def weight(request: pytest.FixtureRequest) -> QuantizedExperts:
    return experts(request.param, 3, 9, 37)


def leaves(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, bias and row_scale as leaves that want gradients."""
    return tuple(t.to(dtype).detach().clone().requires_grad_() for t in (case.x, case.bias, case.row_scale))  # type: ignore[return-value]


def test_gradients_are_those_of_the_decoded_weights(weight: QuantizedExperts) -> None:
    case = Case.make(weight, (2, 0, 3), torch.float64, unowned=1)
    x, bias, row_scale = leaves(case, torch.float64)

    def product(x: Tensor, bias: Tensor, row_scale: Tensor) -> Tensor:
        return grouped_linear(x, weight, case.offsets, bias, rows=case.rows, row_scale=row_scale)

    assert torch.autograd.gradcheck(product, (x, bias, row_scale))
    assert torch.autograd.gradcheck(lambda x: product(x, case.bias, case.row_scale.double()), (x,))
    own = case.x[case.rows].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grouped_linear(x, weight, case.offsets), (own,))
    assert torch.autograd.gradgradcheck(lambda x: grouped_linear(x, weight, case.offsets, row_scale=row_scale.detach()), (own,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [(0, 0, 0), (2, 0, 3), (1, 20, 0)], ids=str)
def test_gradients_in_every_dtype(weight: QuantizedExperts, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case.make(weight, counts, dtype, unowned=1)
    x, bias, row_scale = leaves(case, dtype)
    dy = torch.randn(case.total, 9, generator=torch.Generator().manual_seed(6)).to(DEVICE, dtype)
    grouped_linear(x, weight, case.offsets, bias, rows=case.rows, row_scale=row_scale).backward(dy)
    wide = [t.detach().double().requires_grad_() for t in (x, bias, row_scale)]
    case.expected(wide[0][case.rows], wide[1], wide[2]).backward(dy.double())
    for found, expected in zip((x, bias, row_scale), wide, strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        assert_close(found.grad, expected.grad)


def test_backward_saves_the_packed_parts_and_no_activation(weight: QuantizedExperts) -> None:
    case = Case.make(weight, (2, 1, 3), torch.float32)
    x = case.x.clone().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        grouped_linear(x, weight, case.offsets, case.bias, rows=case.rows, row_scale=case.row_scale)
    kept = {t.data_ptr() for t in saved}
    assert kept == {part.data_ptr() for part in weight.parts.values()} | {
        t.data_ptr() for t in (case.offsets, case.rows, case.row_scale)
    }


def test_same_bits_on_every_run(weight: QuantizedExperts) -> None:
    case = Case.make(weight, (9, 0, 30), torch.bfloat16)
    found = []
    for _ in range(3):
        x = case.x.clone().requires_grad_()
        y = grouped_linear(x, weight, case.offsets, case.bias, rows=case.rows, row_scale=case.row_scale)
        y.square().sum().backward()
        assert x.grad is not None
        found.append((y.detach(), x.grad))
    for y, grad in found[1:]:
        assert_same_bits(y, found[0][0])
        assert_same_bits(grad, found[0][1])


# What torch sees


def test_opcheck(weight: QuantizedExperts) -> None:
    case = Case.make(weight, (2, 0, 3), torch.float32)
    x, bias, row_scale = leaves(case, torch.float32)
    parts, names = list(weight.parts.values()), ",".join(weight.parts)
    described = (names, weight.format.name, list(weight.shape), "rows")
    arguments = (x, parts, case.offsets, bias, case.rows, row_scale, *described, None)
    torch.library.opcheck(torch.ops.quantlib.grouped_linear, arguments)
    own = case.x[case.rows]
    torch.library.opcheck(torch.ops.quantlib.grouped_linear, (own, parts, case.offsets, None, None, None, *described, None))
    dy = torch.randn(case.total, 9, requires_grad=True, device=DEVICE)
    torch.library.opcheck(torch.ops.quantlib.grouped_linear_dgrad, (dy, parts, case.offsets, row_scale, *described))


def test_compiled_fullgraph_equals_eager_for_every_number_of_rows(weight: QuantizedExperts) -> None:
    torch._dynamo.reset()

    def product(x: Tensor, offsets: Tensor, rows: Tensor, row_scale: Tensor) -> Tensor:
        return grouped_linear(x, weight, offsets, rows=rows, row_scale=row_scale)

    compiled = torch.compile(product, fullgraph=True, dynamic=True, backend="aot_eager")
    for counts in ((2, 0, 3), (7, 2, 4), (0, 0, 33)):
        case = Case.make(weight, counts, torch.float32)
        x, _, row_scale = leaves(case, torch.float32)
        arguments = (x, case.offsets, case.rows, row_scale)
        assert_same_bits(compiled(*arguments).detach(), product(*arguments).detach())
        eager = torch.autograd.grad(product(*arguments).square().sum(), (x, row_scale))
        traced = torch.autograd.grad(compiled(*arguments).square().sum(), (x, row_scale))
        for found, expected in zip(traced, eager, strict=True):
            assert_same_bits(found, expected)


def test_autocast_decides_the_dtype(weight: QuantizedExperts) -> None:
    case = Case.make(weight, (2, 0, 3), torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert grouped_linear(case.x, weight, case.offsets, case.bias, rows=case.rows).dtype == torch.bfloat16


def test_wrong_arguments_are_named(weight: QuantizedExperts) -> None:
    case = Case.make(weight, (2, 1, 3), torch.float32)
    x, offsets = case.x, case.offsets
    wrong: list[tuple[str, tuple[Tensor, ...], dict[str, Tensor]]] = [
        (r"x must be \[rows, 37\]", (x[:, :36], offsets), {}),
        (r"x must be \[rows, 37\]", (x[None], offsets), {}),
        (r"offsets is torch.int64 \[4\]; expected torch.int32 \[4\]", (x, offsets.long()), {}),
        (r"offsets is torch.int32 \[3\]; expected torch.int32 \[4\]", (x, offsets[:3]), {}),
        (r"rows is torch.int64", (x, offsets), {"rows": case.rows.long()}),
        (r"rows is torch.int32 \[1, 6\]", (x, offsets), {"rows": case.rows[None]}),
        (r"bias has the shape \[9\]; expected \[3, 9\]", (x, offsets, case.bias[0]), {}),
        (r"row_scale is torch.float32 \[5\]; expected floats \[6\]", (x, offsets), {"row_scale": case.row_scale[:5]}),
        (r"row_scale is torch.int32 \[6\]", (x, offsets), {"row_scale": case.rows}),
        (r"the dtype torch.int64", (torch.ones_like(x, dtype=torch.int64), offsets), {}),
        (r"x is on meta", (x.to("meta"), offsets), {}),
        (r"offsets is on meta", (x, offsets.to("meta")), {}),
    ]
    if DEVICE == "cpu":
        wrong += [
            (r"offsets are \[0, 2, 3, 7\]; .* number of rows, 6", (x, torch.tensor([0, 2, 3, 7], dtype=torch.int32)), {}),
            (r"must ascend from 0", (x, torch.tensor([0, 3, 2, 6], dtype=torch.int32)), {}),
            (r"must ascend from 0", (x, torch.tensor([1, 2, 3, 6], dtype=torch.int32)), {}),
        ]
    for message, (first, second, *others), options in wrong:
        with pytest.raises(quantlib.ShapeError, match=message):
            grouped_linear(first, weight, second, *others, **options)


def test_an_expert_is_an_ordinary_weight(weight: QuantizedExperts) -> None:
    one = weight.expert(1)
    assert isinstance(one, QuantizedTensor)
    x = torch.randn(4, 37, device=DEVICE)
    assert_same_bits(quantlib.linear(x, one), grouped_linear(x, weight, offsets_of((0, 4, 0))))


# The layer


def feed_forward(
    layer: quantlib.QuantExperts, hidden: Tensor, chosen: Tensor, scores: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The layer token by token, with decoded weights."""
    gate_up, down = (stack.qexperts.dequantize().to(dtype) for stack in (layer.gate_up, layer.down))
    rows = []
    for token, experts_of, weights in zip(hidden.to(dtype), chosen, scores.to(dtype), strict=True):
        row = torch.zeros_like(token)
        for expert, weight in zip(experts_of, weights, strict=True):
            gate, up = (gate_up[expert] @ token).chunk(2)
            row = row + weight * (down[expert] @ (torch.nn.functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def make_layer() -> tuple[quantlib.QuantExperts, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    gate_up = torch.stack([random_weight(24, 40, seed=seed) for seed in range(5)])
    down = torch.stack([random_weight(40, 12, seed=seed) for seed in range(5)])
    layer = quantlib.QuantExperts.from_weights(gate_up, down, "int4-g32-asym").to(DEVICE)
    hidden = torch.randn(7, 40, generator=generator).to(DEVICE)
    scores, chosen = torch.randn(7, 5, generator=generator).softmax(-1).to(DEVICE).topk(2)
    return layer, hidden, chosen, scores


def test_the_layer_is_every_tokens_experts_weighted() -> None:
    layer, hidden, chosen, scores = make_layer()
    y = layer(hidden, chosen, scores)
    assert_close(y, feed_forward(layer, hidden, chosen, scores))
    assert_same_bits(layer(hidden, chosen, scores), y)
    assert layer(hidden[:0], chosen[:0], scores[:0]).shape == (0, 40)
    leaves = [hidden.clone().requires_grad_(), scores.clone().requires_grad_()]
    layer(leaves[0], chosen, leaves[1]).square().sum().backward()
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    feed_forward(layer, wide[0], chosen, wide[1]).square().sum().backward()
    for found, expected in zip(leaves, wide, strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        assert_close(found.grad, expected.grad)


def test_the_layer_keeps_its_bits_through_dtypes_layouts_and_state_dicts() -> None:
    layer, hidden, chosen, scores = make_layer()
    y = layer.prepare(torch.float32)(hidden, chosen, scores)
    saved = {name: part.clone() for name, part in layer.state_dict().items()}
    layer.to(torch.float16)
    layer.gate_up._set_parts(layer.gate_up.qexperts.to_layout("fragments"))
    for name, part in layer.state_dict().items():
        assert_same_bits(part, saved[name])
    other, *_ = make_layer()
    for part in other.gate_up.buffers():
        part.zero_()
    other.load_state_dict(saved)
    assert_same_bits(other.prepare(torch.float32)(hidden, chosen, scores), y)
    gate_up, down = (stack.qexperts for stack in (layer.gate_up, layer.down))
    nf4 = quantlib.QuantExperts.from_weights(gate_up.dequantize(), down.dequantize(), "nf4")
    with pytest.raises(quantlib.CheckpointError, match="the state dict holds int4-g32-asym, the layer is nf4"):
        nf4.load_state_dict(saved)
    with pytest.raises(quantlib.ShapeError, match=r"expected \[E, 2 I, H\]"):
        quantlib.QuantExperts(down, gate_up)


def test_the_layer_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    layer, hidden, chosen, scores = make_layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for count in (7, 3):
            arguments = (hidden[:count], chosen[:count], scores[:count])
            assert_same_bits(compiled(*arguments), layer(*arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("spec", LAID_OUT)
def test_products_at_real_size_on_a_gpu(spec: str) -> None:
    weight = experts(spec, 6, 512, 768, "fragments")
    for counts in ((1, 0, 1, 0, 0, 2), (40, 3, 0, 17, 64, 9), (700, 0, 33, 1, 500, 128)):
        for dtype in DTYPES:
            case = Case.make(weight, counts, dtype, unowned=5)
            assert_close(forced(case, bias=case.bias, row_scale=case.row_scale), case.expected(None, case.bias, case.row_scale))
            dy = torch.randn(case.total, 512, generator=torch.Generator().manual_seed(7)).to(DEVICE, dtype)
            assert_close(dgrad(case, dy, case.row_scale), case.expected_dgrad(dy, case.row_scale))


@pytest.mark.gpu
def test_a_cuda_graph_follows_new_offsets() -> None:
    """Nothing about the counts is baked in: the grid covers them all."""
    weight = experts("nvfp4", 4, 128, 256, "fragments")
    first, second = Case.make(weight, (30, 0, 2, 8), torch.bfloat16), Case.make(weight, (0, 25, 15, 0), torch.bfloat16, seed=1)
    x, offsets, rows = first.x.clone(), first.offsets.clone(), first.rows.clone()
    grouped_linear(x, weight, offsets, rows=rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = grouped_linear(x, weight, offsets, rows=rows)
    for case in (first, second):
        x.copy_(case.x)
        offsets.copy_(case.offsets)
        rows.copy_(case.rows)
        graph.replay()
        assert_close(y, case.expected())
