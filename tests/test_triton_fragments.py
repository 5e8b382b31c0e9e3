"""The Triton kernels of the fragments layout decode by the law and multiply within the limits of their dtype, for every kind of
format.

Without a GPU they run in Triton's interpreter, which conftest.py asks for before Triton is imported.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantlib.devices import Device, device_facts
from quantlib.dispatch import choices, problem_of, run
from quantlib.errors import KernelError
from quantlib.formats import Format, get_format
from quantlib.formats.block import Block
from quantlib.formats.codecs import Affine, Minifloat, Table
from quantlib.formats.scales import E4M3GlobalScale, E8M0Scale, FloatScale, SuperScale
from quantlib.kernels import fragments_launch, get_kernel
from quantlib.kernels.triton_launch import Tile
from quantlib.kernels.workspace import split_workspace
from quantlib.tensor import QuantizedTensor
from quantlib.testing import assert_close, assert_same_bits, assert_within_ulps, random_weight
from tests.cases import DTYPES, FORMATS, MS, SHAPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LINEAR = ("triton_gemv", "triton_skinny", "triton_gemm")


def quantized(fmt: Format, n: int, k: int) -> QuantizedTensor:
    weight = random_weight(n, k)
    parts = fmt.fit(weight)
    rows = QuantizedTensor(fmt, (n, k), {"codes": fmt.encode(weight, parts), **parts})
    return rows.to_layout("fragments").to(DEVICE)


def activations(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def most_rows(kernel: str, m: int, dtype: torch.dtype) -> int:
    """How many of m rows of x the kernel takes at once; 0 where it doesn't take the dtype."""
    if kernel == "triton_gemv":
        return 0 if dtype == torch.float32 else min(m, 8)
    return min(m, 256)


def declared_ulps(fmt: Format) -> int:
    """NVFP4's multiplier is applied to fp32 sums: one rounding in another place than the law's."""
    return 1 if fmt.scale.kind == "e4m3_global" else 0


def assert_decodes(weight: QuantizedTensor, dtype: torch.dtype, rows: int) -> None:
    """x = rows of the identity gives columns of the decoded weight; adding zero folds -0, which no sum keeps."""
    n, k = weight.shape
    law, ulps = weight.dequantize(dtype), declared_ulps(weight.format)
    empty = torch.empty(0, dtype=dtype, device=DEVICE)
    assert_same_bits(run("dequantize", empty, weight, kernel="triton_dequantize"), law)
    drawn = torch.randperm(k, generator=torch.Generator().manual_seed(k))
    for kernel in LINEAR:
        some = drawn[: most_rows(kernel, min(rows, k), dtype)].to(DEVICE)
        if len(some):
            y = run("linear", torch.eye(k, dtype=dtype, device=DEVICE)[some], weight, kernel=kernel)
            assert_within_ulps(y.T.contiguous(), law[:, some] + 0.0, ulps)
    dx = run("dgrad", torch.eye(n, dtype=dtype, device=DEVICE), weight, kernel="triton_dgrad")
    assert_within_ulps(dx, law + 0.0, ulps)


@pytest.mark.parametrize("spec", FORMATS)
def test_identity_gives_the_decoded_weight(spec: str) -> None:
    weight = quantized(get_format(spec), 20, 144)
    for dtype in (torch.bfloat16, torch.float16):
        assert_decodes(weight, dtype, rows=144)
    assert_decodes(weight, torch.float32, rows=16)


@pytest.mark.parametrize(("n", "k"), [(1, 16), (3, 7), (33, 130), (5, 576)])
@pytest.mark.parametrize("spec", ["int3-g64-asym", "nf4-dq", "fp8-e4m3-block128", "nvfp4", "q4_k"])
def test_identity_off_the_tiles(spec: str, n: int, k: int) -> None:
    assert_decodes(quantized(get_format(spec), n, k), torch.bfloat16, rows=16)


CUSTOM = (
    Format("three-values", Table((-1.5, -0.25, 0.5, 3.0)), Block(1, 32), FloatScale(torch.bfloat16)),
    Format("table256", Table(tuple((i - 100) / 7 for i in range(256))), Block(1, None), FloatScale(torch.float32)),
    Format("int5", Affine(5), Block(1, 16), FloatScale(torch.float16)),
    Format("int5-fp32", Affine(5), Block(1, 16), FloatScale(torch.float32)),
    Format("int7-minimum", Affine(7, signed=False), Block(1, 32), FloatScale(torch.float16, has_minimum=True), zero="minimum"),
    Format("int1", Affine(1), Block(1, 64), FloatScale(torch.float16)),
    Format("e3m2", Minifloat(3, 2), Block(1, 32), E8M0Scale()),
    Format("e3m0", Minifloat(3, 0), Block(1, 16), E4M3GlobalScale()),
    Format("e1m2", Minifloat(1, 2), Block(1, 32), E8M0Scale()),
    Format("grid", Affine(4), Block(32, 128), FloatScale(torch.float32)),
    Format("columns2d", Affine(8), Block(None, 128), FloatScale(torch.float32)),
    Format("super5", Affine(2), Block(1, 16), SuperScale(bits=5, count=8, signed=True)),
)
"""Values of the known kinds that no registered format has: odd widths, other tables, float minima, 2-D blocks."""


@pytest.mark.parametrize("fmt", CUSTOM, ids=str)
def test_a_format_of_known_kinds_needs_no_kernel(fmt: Format) -> None:
    weight = quantized(fmt, 34, 200)
    for dtype in (torch.bfloat16, torch.float16):
        assert_decodes(weight, dtype, rows=24)
    assert_decodes(weight, torch.float32, rows=8)


def product(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ weight.dequantize(x.dtype).double().T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("spec", FORMATS)
def test_products_of_every_format(spec: str) -> None:
    weight = quantized(get_format(spec), 33, 130)
    for kernel, m in (("triton_gemv", 3), ("triton_skinny", 9), ("triton_gemm", 9)):
        x, bias = activations(m, 130, torch.float16), activations(1, 33, torch.float16, seed=1)[0]
        assert_close(run("linear", x, weight, bias, kernel=kernel), product(x, weight, bias))
    dy = activations(9, 33, torch.float16, seed=2)
    assert_close(run("dgrad", dy, weight, kernel="triton_dgrad"), dy.double() @ weight.dequantize(dy.dtype).double())


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("kernel", LINEAR)
def test_products_of_every_shape_and_batch(kernel: str, n: int, k: int) -> None:
    weight = quantized(get_format("int4-g32-asym"), n, k)
    for m in MS:
        if most_rows(kernel, m, torch.bfloat16) == m:
            x = activations(m, k, torch.bfloat16, seed=m)
            y = run("linear", x, weight, kernel=kernel)
            assert y.shape == (m, n)
            assert_close(y, product(x, weight))


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_dgrad_is_autograd_through_the_decoded_weight(n: int, k: int) -> None:
    weight = quantized(get_format("nf4"), n, k)
    decoded = weight.dequantize(torch.bfloat16).double()
    for m in MS:
        x = torch.zeros(m, k, dtype=torch.float64, device=DEVICE, requires_grad=True)
        dy = activations(m, n, torch.bfloat16, seed=m)
        torch.nn.functional.linear(x, decoded).backward(dy.double())
        assert x.grad is not None
        assert_close(run("dgrad", dy, weight, kernel="triton_dgrad"), x.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [*LINEAR, "triton_dgrad"])
def test_strides_do_not_matter(kernel: str, dtype: torch.dtype) -> None:
    if most_rows(kernel, 3, dtype) == 0:
        pytest.skip("gemv multiplies in 16 bits")
    weight = quantized(get_format("int4-g32-asym"), 72, 72)
    operation = "dgrad" if kernel == "triton_dgrad" else "linear"
    wide = activations(6, 145, dtype)
    for x in (wide[:3, 1:145:2], wide[::2, :72], wide[:3, 73:], wide[:, :3].T.repeat(1, 12), wide[:1, :72].expand(3, 72)):
        assert_same_bits(
            run(operation, x, weight, kernel=kernel), run(operation, x.clone().contiguous(), weight, kernel=kernel)
        )


@pytest.mark.parametrize("kernel", LINEAR)
def test_numbers_outside_of_k_do_not_leak_in(kernel: str) -> None:
    """A NaN that lies right behind a row of x, where a masked lane would read it, changes nothing."""
    for k in (40, 41):
        weight = quantized(get_format("int4-g32-asym"), 9, k)
        storage = torch.full((4, 64), float("nan"), device=DEVICE, dtype=torch.bfloat16)
        storage[:, :k] = activations(4, k, torch.bfloat16)
        assert_close(run("linear", storage[:, :k], weight, kernel=kernel), product(storage[:, :k], weight))


def splitting_launch(kernel: str, x: Tensor, weight: QuantizedTensor, y: Tensor, splits: int) -> None:
    n, m = weight.shape[0], x.shape[0]
    partial, counters = split_workspace(splits, m, n, -(-n // 16), weight.device)
    bias, residual = activations(1, n, x.dtype, seed=7)[0], activations(m, n, x.dtype, seed=8)
    if kernel == "gemv":
        tile = Tile(8, 16, 0, 2, 1, splits=splits)
        fragments_launch.gemv_launch(x, weight, bias, residual, y, partial, counters, tile).run(weight.device)
    else:
        tile = Tile(16, 32, 0, 2, 2, splits=splits)
        x = fragments_launch.whole_columns(x, 128)
        fragments_launch.skinny_launch(x, weight, bias, residual, y, partial, counters, tile, 0).run(weight.device)
    if counters is not None:
        assert int(counters.abs().sum()) == 0, "counters must be zero again"


@pytest.mark.parametrize("kernel", ["gemv", "skinny"])
@pytest.mark.parametrize("k", [64, 400, 640])
def test_splits_of_k_change_nothing_but_the_order_of_sums(kernel: str, k: int) -> None:
    weight = quantized(get_format("nvfp4"), 37, k)
    x = activations(3, k, torch.bfloat16)
    bias, residual = activations(1, 37, x.dtype, seed=7)[0], activations(3, 37, x.dtype, seed=8)
    for splits in (1, 2, 4):
        y = torch.empty(3, 37, dtype=x.dtype, device=DEVICE)
        splitting_launch(kernel, x, weight, y, splits)
        assert_close(y, product(x, weight, bias) + residual.double())
        again = torch.empty_like(y)
        splitting_launch(kernel, x, weight, again, splits)
        assert_same_bits(again, y)


def test_a_persistent_program_takes_every_block() -> None:
    """One program for many blocks of y, in groups with a ragged end."""
    weight = quantized(get_format("int4-g32-asym"), 70, 64)
    x, bias, residual = (
        activations(50, 64, torch.bfloat16),
        activations(1, 70, torch.bfloat16)[0],
        activations(50, 70, torch.bfloat16),
    )
    y = torch.full((50, 70), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    whole = fragments_launch.whole_columns(x, 128)
    fragments_launch.gemm_launch(whole, weight, bias, residual, y, Tile(16, 16, 0, 1, 2), units=1, capability=0).run(
        weight.device
    )
    assert_close(y, product(x, weight, bias) + residual.double())


def test_batch_invariant_rows_do_not_depend_on_the_batch() -> None:
    weight = quantized(get_format("nf4"), 20, 96)
    x = activations(70, 96, torch.bfloat16)
    whole = run("linear", x, weight, kernel="triton_gemm", batch_invariant=True)
    assert_close(whole, product(x, weight))
    for rows in (slice(0, 1), slice(3, 20)):
        assert_same_bits(run("linear", x[rows], weight, kernel="triton_gemm", batch_invariant=True), whole[rows])
    for kernel in ("triton_gemv", "triton_skinny"):
        with pytest.raises(KernelError, match="batch_invariant"):
            run("linear", x[:1], weight, kernel=kernel, batch_invariant=True)


def test_decoding_once_and_the_library_agree_with_the_fused_kernels() -> None:
    weight = quantized(get_format("mxfp4"), 24, 80)
    x, dy = activations(5, 80, torch.bfloat16), activations(5, 24, torch.bfloat16)
    assert_close(run("linear", x, weight, kernel="triton_decoded_linear"), product(x, weight))
    expected = dy.double() @ weight.dequantize(torch.bfloat16).double()
    assert_close(run("dgrad", dy, weight, kernel="triton_decoded_dgrad"), expected)


H100 = Device("cuda", "NVIDIA H100 80GB HBM3", "sm_90", 132, 3350.0, 989.0)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs as on a GPU: the interpreter's kernels never cost less than infinity."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("m", "expected"), [(1, "triton_gemv"), (4, "triton_gemv"), (16, "triton_skinny"), (64, "triton_skinny")]
)
def test_few_rows_take_the_kernels_that_stream_the_weight(m: int, expected: str) -> None:
    weight = quantized(get_format("int4-g128"), 16, 128)
    for n, k in ((4096, 4096), (28672, 4096), (8192, 28672)):
        problem = replace(problem_of("linear", m, weight, torch.bfloat16), n=n, k=k, device=H100)
        taken = next(choice for choice in choices(problem) if choice.backend == "triton")
        assert taken.kernel == expected
        floor = max(problem.format.nbytes(n, k) / H100.bandwidth / 1e3, 2 * m * n * k / H100.peak_tflops / 1e6)
        assert taken.cost is not None
        assert floor < taken.cost < 4 * floor + 5


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("spec", FORMATS)
def test_a_gpu_lays_every_format_in_fragments(spec: str) -> None:
    fmt = get_format(spec)
    problem = replace(problem_of("linear", 1, quantized(fmt, 16, 256), torch.bfloat16), n=4096, k=4096, device=H100)
    fragment = choices(problem)[0].cost
    rows = choices(replace(problem, layout="rows"))[0].cost
    assert fragment is not None
    assert rows is not None
    assert fragment < rows


@pytest.mark.usefixtures("on_a_gpu")
def test_tiles_keep_a_chip_supplied() -> None:
    """Few rows of x: enough warps on every SM to have its share of bytes under way, or no K left to split."""
    weight = quantized(get_format("int4-g128"), 16, 128)
    for n in (1024, 4096, 8192, 28672):
        for k in (1024, 4096, 14336):
            problem = replace(problem_of("linear", 1, weight, torch.bfloat16), n=n, k=k, device=H100)
            kernel = get_kernel("triton_gemv")
            tile = kernel.tile(problem)  # type: ignore[attr-defined]
            warps = -(-n // 16) * tile.splits * tile.warps
            assert warps >= 12 * H100.units or k // 64 < 4 * tile.warps * tile.splits


def test_refusals_say_why() -> None:
    weight = quantized(get_format("int4-g32-asym"), 16, 64)
    for m, dtype, kernel, words in (
        (9, torch.bfloat16, "triton_gemv", "up to 8 rows"),
        (1, torch.float32, "triton_gemv", "fp16 or bf16"),
        (257, torch.bfloat16, "triton_skinny", "up to 256 rows"),
        (1, torch.float64, "triton_gemm", "not in float64"),
    ):
        with pytest.raises(KernelError, match=words):
            run("linear", torch.zeros(m, 64, dtype=dtype, device=DEVICE), weight, kernel=kernel)
    with pytest.raises(KernelError, match="layout"):
        run("linear", torch.zeros(1, 64, device=DEVICE), weight.to_layout("rows"), kernel="triton_gemm")


@pytest.mark.usefixtures("on_a_gpu")
def test_devices_without_the_instructions_are_refused() -> None:
    weight = quantized(get_format("int4-g32-asym"), 16, 64)
    old = Device("cuda", "an old GPU", "sm_75", 40, 300.0, 60.0)
    for device, words in ((device_facts("cpu"), "needs a CUDA device"), (old, "8.0 or newer")):
        for operation in ("linear", "dgrad", "dequantize"):
            problem = replace(problem_of(operation, 1, weight, torch.bfloat16), device=device)
            fragments = [choice for choice in choices(problem) if get_kernel(choice.kernel).layout == "fragments"]
            assert all(choice.refusal is not None for choice in fragments)
            found = [choice for choice in fragments if choice.backend == "triton"]
            assert found
            assert all(words in str(choice.refusal) for choice in found)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", FORMATS)
def test_products_at_real_size_on_a_gpu(spec: str) -> None:
    weight = quantized(get_format(spec), 1024, 1536)
    for m in (1, 3, 8, 16, 33, 64, 200, 512):
        for dtype in DTYPES:
            x = activations(m, 1536, dtype, seed=m)
            for kernel in LINEAR:
                if most_rows(kernel, m, dtype) == m:
                    assert_close(run("linear", x, weight, kernel=kernel), product(x, weight))
            dy = activations(m, 1024, dtype, seed=m)
            expected = dy.double() @ weight.dequantize(dtype).double()
            assert_close(run("dgrad", dy, weight, kernel="triton_dgrad"), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", FORMATS)
def test_identity_at_real_size_on_a_gpu(spec: str) -> None:
    weight = quantized(get_format(spec), 777, 1160)
    for dtype in DTYPES:
        assert_decodes(weight, dtype, rows=256)


@pytest.mark.gpu
def test_results_do_not_depend_on_the_run_on_a_gpu() -> None:
    weight = quantized(get_format("nvfp4"), 1024, 4096)
    for m, kernel in ((1, "triton_gemv"), (16, "triton_skinny"), (512, "triton_gemm")):
        x = activations(m, 4096, torch.bfloat16)
        first = run("linear", x, weight, kernel=kernel)
        for _ in range(20):
            assert_same_bits(run("linear", x, weight, kernel=kernel), first)


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_products_on_a_gpu() -> None:
    weight = quantized(get_format("nvfp4"), 1024, 4096)
    for m in (1, 16, 512):
        x = activations(m, 4096, torch.bfloat16)
        expected = run("linear", x, weight)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run("linear", x, weight)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = run("linear", x, weight)
        x.copy_(activations(m, 4096, torch.bfloat16, seed=1))
        graph.replay()
        assert_same_bits(y, run("linear", x, weight))
        assert not torch.equal(y, expected)
