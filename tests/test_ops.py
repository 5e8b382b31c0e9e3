"""quantlib.linear: every shape, dtype and stride of x, gradients, and what torch's compiler sees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import quantlib
import quantlib.testing
from quantlib.kernels import list_kernels
from quantlib.testing import assert_close, assert_same_bits, random_weight

from . import cases

N, K = 33, 130


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A single output may cancel to nearly nothing; a fixed seed keeps the relative error a property of the code."""
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=["nvfp4", "int4-g32-asym", "nf4-dq", "q4_k", "fp8-e4m3-block128"])
def weight(request: pytest.FixtureRequest) -> quantlib.QuantizedTensor:
    return quantlib.quantize(random_weight(N, K), request.param)


def expected(x: torch.Tensor, weight: quantlib.QuantizedTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    decoded = weight.dequantize(x.dtype).double()
    return functional.linear(x.double(), decoded, None if bias is None else bias.double())


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 5, K), (0, K), (2, 0, K), (1, 1, 1, K), (40, K)])
def test_any_leading_shape(weight: quantlib.QuantizedTensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    y = quantlib.linear(x, weight)
    assert y.shape == (*shape[:-1], N)
    assert y.dtype == dtype
    assert_close(y, expected(x, weight))


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_strided_and_transposed_x(weight: quantlib.QuantizedTensor, dtype: torch.dtype) -> None:
    base = torch.randn(2 * K, 14).to(dtype)
    bias = torch.randn(N).to(dtype)
    for x in (
        base[:K].T,
        base[::2].T,
        base.T[::3, :K],
        base[:K, :1].T,
        base.T[:, 1 : 1 + K].unflatten(0, (2, 7)).transpose(0, 1),
    ):
        assert_close(quantlib.linear(x, weight, bias), expected(x, weight, bias))
        assert_same_bits(quantlib.linear(x, weight, bias), quantlib.linear(x.contiguous(), weight, bias))


@pytest.mark.parametrize("spec", cases.FORMATS)
def test_default_kernels_agree_with_fp64_for_every_format(spec: str) -> None:
    for n, k in cases.SHAPES:
        weight = quantlib.quantize(random_weight(n, k), spec)
        for m in (1, 16, 33):
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
            assert_close(quantlib.linear(x, weight), expected(x, weight))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    m=st.integers(0, 40),
    spec=st.sampled_from(cases.FORMATS),
    dtype=st.sampled_from(cases.DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_n_k_and_m(n: int, k: int, m: int, spec: str, dtype: torch.dtype, seed: int) -> None:
    weight = quantlib.quantize(random_weight(n, k, seed=seed), spec)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert_close(quantlib.linear(x, weight), expected(x, weight), dtype)


@pytest.mark.parametrize("spec", cases.FORMATS)
def test_gradients_are_those_of_the_decoded_weight(spec: str) -> None:
    weight = quantlib.quantize(random_weight(9, 37), spec)
    x = torch.randn(2, 1, 37, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: quantlib.linear(x, weight, bias), (x, bias))


def test_gradients_can_be_differentiated_again(weight: quantlib.QuantizedTensor) -> None:
    x = torch.randn(1, K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: quantlib.linear(x, weight), (x,))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("m", [0, 1, 5, 40])
def test_gradients_in_every_dtype(weight: quantlib.QuantizedTensor, m: int, dtype: torch.dtype) -> None:
    x = torch.randn(m, K).to(dtype).requires_grad_()
    bias = torch.randn(N).to(dtype).requires_grad_()
    dy = torch.randn(m, N).to(dtype)
    quantlib.linear(x, weight, bias).backward(dy)
    assert x.grad is not None
    assert bias.grad is not None
    assert_close(x.grad, dy.double() @ weight.dequantize(dtype).double())
    assert_close(bias.grad, dy.double().sum(0))


def test_backward_reads_the_forward_bits_and_saves_no_activation(weight: quantlib.QuantizedTensor) -> None:
    x = torch.randn(4, K, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        quantlib.linear(x, weight)
    assert {t.data_ptr() for t in saved} == {part.data_ptr() for part in weight.parts.values()}


def op_arguments(weight: quantlib.QuantizedTensor, x: torch.Tensor, bias: torch.Tensor | None) -> tuple[object, ...]:
    names = ",".join(weight.parts)
    return (x, list(weight.parts.values()), bias, names, weight.format.name, *weight.shape, "rows", None, None, False)


def test_opcheck(weight: quantlib.QuantizedTensor) -> None:
    x, bias = torch.randn(3, K, requires_grad=True), torch.randn(N, requires_grad=True)
    torch.library.opcheck(torch.ops.quantlib.linear, op_arguments(weight, x, bias))
    torch.library.opcheck(torch.ops.quantlib.linear, op_arguments(weight, torch.randn(2, 3, K), None))
    names = ",".join(weight.parts)
    dy = torch.randn(3, N, requires_grad=True)
    arguments = (dy, list(weight.parts.values()), names, weight.format.name, N, K, "rows")
    torch.library.opcheck(torch.ops.quantlib.linear_dgrad, arguments)


def test_compiled_fullgraph_equals_eager_for_every_m(weight: quantlib.QuantizedTensor) -> None:
    torch._dynamo.reset()
    layer = quantlib.QuantLinear.from_quantized(weight, torch.randn(N))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (1, 2, 16, 17, 40):
        x = torch.randn(m, K)
        with torch.no_grad():
            assert_same_bits(compiled(x), layer(x))
    x = torch.randn(5, K, requires_grad=True)
    (eager,) = torch.autograd.grad(layer(x).square().sum(), x)
    (traced,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert_same_bits(traced, eager)


def test_compiled_by_inductor_equals_eager() -> None:
    torch._dynamo.reset()
    layer = quantlib.QuantLinear.from_quantized(quantlib.quantize(random_weight(N, K), "nf4"), torch.randn(N))
    x = torch.randn(3, K)
    with torch.no_grad():
        assert_same_bits(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_autocast_decides_the_dtype(weight: quantlib.QuantizedTensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert quantlib.linear(torch.randn(2, K), weight).dtype == torch.bfloat16


def test_activations_are_rounded_to_their_format_first() -> None:
    weight = quantlib.quantize(random_weight(N, K), "nvfp4")
    x = torch.randn(6, K)
    for spec in ("nvfp4", "mxfp8", "fp8", "int8"):
        rounded = quantlib.quantize(x, spec).dequantize()
        assert_close(quantlib.linear(x, weight, activations=spec), expected(rounded, weight))
        assert quantlib.testing.relative_error(quantlib.linear(x, weight, activations=spec), expected(x, weight)) > 1e-3


def test_batch_invariance_gives_each_row_the_bits_it_has_alone(weight: quantlib.QuantizedTensor) -> None:
    x = torch.randn(21, K)
    together = quantlib.linear(x, weight, batch_invariant=True)
    alone = torch.cat([quantlib.linear(row, weight, batch_invariant=True) for row in x.split(1)])
    assert_same_bits(together, alone)


def test_same_bits_on_every_run(weight: quantlib.QuantizedTensor) -> None:
    x = torch.randn(16, K)
    first = quantlib.linear(x, weight)
    for _ in range(3):
        assert_same_bits(quantlib.linear(x, weight), first)


def test_wrong_x_is_named(weight: quantlib.QuantizedTensor) -> None:
    with pytest.raises(quantlib.ShapeError, match=r"last dimension must be 130"):
        quantlib.linear(torch.randn(3, K + 1), weight)
    with pytest.raises(quantlib.ShapeError, match=r"torch.int64"):
        quantlib.linear(torch.ones(3, K, dtype=torch.int64), weight)
    with pytest.raises(quantlib.ShapeError, match=r"x is on meta"):
        quantlib.linear(torch.empty(3, K, device="meta"), weight)


def test_forced_kernels_run_or_say_why_not(weight: quantlib.QuantizedTensor) -> None:
    x = torch.randn(3, K)
    for kernel in list_kernels("linear"):
        try:
            y = quantlib.linear(x, weight, kernel=kernel.name)
        except quantlib.KernelError as error:
            assert len(str(error)) > 20, error  # noqa: PT017
        else:
            assert_close(y, expected(x, weight))
    with pytest.raises(quantlib.KernelError, match="known: "):
        quantlib.linear(x, weight, kernel="no_such_kernel")
    with pytest.raises(quantlib.KernelError, match="does dgrad"):
        quantlib.linear(x, weight, kernel="reference_dgrad")
