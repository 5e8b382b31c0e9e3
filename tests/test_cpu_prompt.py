"""Between the products of a prompt: attention against fp64, small steps against torch, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from quantlib.errors import KernelError, ShapeError
from quantlib.kernels import cpu
from quantlib.kernels.cpu_prompt import prompt_attention, prompt_gate, prompt_norm, prompt_rotate
from quantlib.testing import assert_same_bits, relative_error

from .conftest import instruction_sets
from .test_cpu_kernels import for_numbers_of_threads

if cpu.unavailable is not None:
    pytest.skip(cpu.unavailable, allow_module_level=True)

RUNS_IN = instruction_sets()
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = (
    (1, 1, 1, 1, 16), (2, 2, 1, 5, 64), (9, 3, 77, 77, 64), (4, 2, 7, 530, 80), (3, 1, 40, 1100, 128), (2, 1, 515, 515, 32),
)  # fmt: skip
"""heads, key heads, positions, positions with those before, width: several blocks of keys, tiles that are not whole."""


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    heads, key_heads, m, positions, width = shape
    torch.manual_seed(m)
    q, keys, values = (
        torch.randn(count, rows, width) for count, rows in ((heads, m), (key_heads, positions), (key_heads, positions))
    )
    return (2 * q).to(dtype), keys.to(dtype), values.to(dtype)


def exact(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """[M, heads, width] in fp64."""
    m, positions = q.shape[1], keys.shape[1]
    seen = torch.ones(m, positions, dtype=torch.bool).tril(positions - m)
    repeats = len(q) // len(keys)
    keys, values = (tensor.double().repeat_interleave(repeats, dim=0) for tensor in (keys, values))
    scores = (scale * q.double() @ keys.transpose(1, 2)).masked_fill(~seen, float("-inf"))
    return (scores.softmax(dim=2) @ values).transpose(0, 1)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_that_of_fp64(shape: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    q, keys, values = inputs(shape, dtype)
    y = prompt_attention(q, keys, values, 0.17)
    assert y.shape == (shape[2], shape[0], shape[4])
    assert y.dtype == dtype
    assert relative_error(y, exact(q, keys, values, 0.17)) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS)
def test_attention_sees_nothing_that_comes_later(dtype: torch.dtype, isa: str) -> None:
    """A query's bits are its own: neither later keys reach it, nor queries beside it, nor the number of threads."""
    q, keys, values = inputs((6, 2, 540, 560, 64), dtype)
    results = for_numbers_of_threads(lambda: prompt_attention(q, keys, values, 0.125))
    for other in results[1:]:
        assert_same_bits(other, results[0])
    for m in (1, 6, 8, 491, 492, 493):
        assert_same_bits(prompt_attention(q[:, :m], keys[:, : 20 + m], values[:, : 20 + m], 0.125), results[0][:m])


def test_attention_of_large_scores_stays_finite(isa: str) -> None:
    q, keys, values = inputs((2, 1, 530, 530, 32), torch.float32)
    y = prompt_attention(100 * q, keys, values, 1.0)
    assert relative_error(y, exact(100 * q, keys, values, 1.0)) < 1e-4  # scores of 1000 have five places behind the point


def test_strides_do_not_matter(isa: str) -> None:
    q, keys, values = inputs((4, 2, 9, 33, 16), torch.bfloat16)
    y = prompt_attention(q, keys, values, 0.25)
    turned = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (q, keys, values)]
    assert_same_bits(prompt_attention(*turned, 0.25), y)
    assert_same_bits(
        prompt_attention(*(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, keys, values)), 0.25), y
    )


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("rows", [0, 1, 700])
def test_small_steps_are_torchs(rows: int, dtype: torch.dtype, isa: str) -> None:
    torch.manual_seed(rows)
    x, up = torch.randn(rows, 240).to(dtype), torch.randn(rows, 240).to(dtype)
    found = for_numbers_of_threads(lambda: prompt_gate(x, up))
    assert relative_error(found[0], functional.silu(x.double()) * up.double()) < LIMITS[dtype]
    weight = torch.randn(80).to(dtype)
    normed = for_numbers_of_threads(lambda: prompt_norm(x, weight, 1e-5))
    wide = x.double().view(rows, 3, 80)
    wanted = weight.double() * wide * torch.rsqrt(wide.square().mean(dim=2, keepdim=True) + 1e-5)
    assert relative_error(normed[0], wanted.view(rows, 240)) < LIMITS[dtype]
    cosine, sine = torch.randn(rows, 80).to(dtype), torch.randn(rows, 80).to(dtype)
    cache = torch.zeros(3, 1000, 80, dtype=dtype)

    def rotated() -> Tensor:
        prompt_rotate(x, (cosine, sine), cache[:, 200 : 200 + rows])
        return cache.clone()

    turned = for_numbers_of_threads(rotated)
    heads = x.view(rows, 3, 80)
    other = torch.cat([-heads[..., 40:], heads[..., :40]], dim=2)
    assert_same_bits(turned[0][:, 200 : 200 + rows], (heads * cosine[:, None] + other * sine[:, None]).transpose(0, 1))
    assert not turned[0][:, :200].any()
    assert not turned[0][:, 200 + rows :].any()
    prompt_rotate(x, None, cache[:, :rows])
    assert_same_bits(cache[:, :rows], heads.transpose(0, 1))
    for results in (found, normed, turned):
        for each in results[1:]:
            assert_same_bits(each, results[0])


def test_what_does_not_fit_is_named() -> None:
    q, keys, values = inputs((4, 2, 3, 5, 16), torch.float32)
    with pytest.raises(ShapeError, match=r"\[4, 3, 16\], \[2, 5, 16\] and \[2, 4, 16\]"):
        prompt_attention(q, keys, values[:, :4], 1.0)
    with pytest.raises(ShapeError, match="at least M"):
        prompt_attention(q, keys[:, :2], values[:, :2], 1.0)
    with pytest.raises(ShapeError, match="a multiple of those"):
        prompt_attention(q[:3], keys, values, 1.0)
    with pytest.raises(KernelError, match=r"one dtype; found torch\.float32 on cpu, torch\.bfloat16"):
        prompt_attention(q, keys.bfloat16(), values, 1.0)
    with pytest.raises(KernelError, match=r"torch\.float64"):
        prompt_norm(torch.ones(2, 4, dtype=torch.float64), torch.ones(4), 1e-5)
    with pytest.raises(ShapeError, match="two tensors of one shape"):
        prompt_gate(torch.ones(2, 4), torch.ones(2, 5))
    with pytest.raises(ShapeError, match=r"found \[\[2, 30\], \[4, 2, 16\]\]"):
        prompt_rotate(torch.ones(2, 30), None, torch.ones(4, 2, 16))
