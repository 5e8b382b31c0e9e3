"""The CUDA kernels of the fragments layout, run by the emulator (tests/simt): decoded weights bit by bit, products within the
limits of their dtype, for every codec, dtype and tile, and any way of dealing out the work."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from quantlib.dispatch import run
from quantlib.formats import Format, get_format
from quantlib.kernels import cuda_fragments_launch as launches
from quantlib.kernels.cuda_fragments_launch import Variant
from quantlib.tensor import QuantizedTensor
from quantlib.testing import assert_close, assert_same_bits, assert_within_ulps, random_weight
from tests.cases import FORMATS
from tests.simt.build import build
from tests.simt.memory import SimtError, allowed, block_order

SOURCES = Path(__file__).parent / "simt"
KERNELS = Path(__file__).parent.parent / "csrc" / "cuda" / "sm80"
GEMV, LINEAR, DGRAD = "sm80_gemv", "sm80_linear_frag", "sm80_dgrad_frag"
BOTH = (torch.bfloat16, torch.float16)
SERVED = tuple(spec for spec in FORMATS if not isinstance(launches.arithmetic(get_format(spec), torch.bfloat16), str))


@cache
def emulator() -> ModuleType:
    return build("simt_fragments", [SOURCES / "fragments.cpp", *sorted(KERNELS.glob("*.cu"))], ["-x", "c++"])


def quantized(spec: str, n: int, k: int, seed: int = 0) -> QuantizedTensor:
    fmt = get_format(spec)
    weight = random_weight(n, k, seed=seed)
    parts = fmt.fit(weight)
    return QuantizedTensor(fmt, (n, k), {"codes": fmt.encode(weight, parts), **parts}).to_layout("fragments")


def variants_of(module: ModuleType, kernel: str, fmt: Format, dtype: torch.dtype) -> list[Variant]:
    arithmetic = launches.arithmetic(fmt, dtype)
    return [
        variant
        for variant in launches.variants(module, kernel)
        if (variant.codec, variant.scaling) == arithmetic and variant.dtype == launches.DTYPES[dtype]
    ]


def linear(
    module: ModuleType,
    weight: QuantizedTensor,
    x: Tensor,
    variant: Variant,
    programs: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    order: str = "forward",
    kernel: str = LINEAR,
) -> Tensor:
    """y by the emulated kernel, which may touch nothing but its arguments; NaN where it wrote nothing."""
    n, k = weight.shape
    x = launches.aligned_rows(x, 128 if kernel == GEMV else 8)
    y = torch.full((x.shape[0], n), float("nan"), dtype=x.dtype)
    dealt = launches.deal(x.shape[0], n, k, variant, programs)
    partial = torch.full((2 * dealt.programs * variant.rows * variant.columns,), float("nan"))
    counters = torch.zeros(dealt.blocks, dtype=torch.int32)
    tensors = launches.weight_tensors(weight)
    reads = (
        {"x": x, **tensors} | ({} if bias is None else {"bias": bias}) | ({} if residual is None else {"residual": residual})
    )
    with allowed(module, reads, {"y": y, "partial": partial, "counters": counters}), block_order(module, order, seed=1):
        argument, launch = launches.weight_argument(module, weight), getattr(module, kernel)
        launches.launch_linear(
            module, launch, variant, argument, x, n, bias, residual, y, dealt, partial, counters, 0
        )  # fmt: skip
    assert int(counters.abs().sum()) == 0
    return y


def dgrad(
    module: ModuleType, weight: QuantizedTensor, dy: Tensor, variant: Variant, programs: int, order: str = "forward"
) -> Tensor:
    """dx, likewise."""
    n, k = weight.shape
    dy = launches.aligned_rows(dy)
    dx = torch.full((dy.shape[0], k), float("nan"), dtype=dy.dtype)
    dealt = launches.deal(dy.shape[0], k, n, variant, programs)
    partial = torch.full((2 * dealt.programs * variant.rows * variant.columns,), float("nan"))
    counters = torch.zeros(dealt.blocks, dtype=torch.int32)
    reads = {"dy": dy, **launches.weight_tensors(weight)}
    argument = launches.weight_argument(module, weight)
    with allowed(module, reads, {"dx": dx, "partial": partial, "counters": counters}), block_order(module, order, seed=1):
        launches.launch_dgrad(module, getattr(module, DGRAD), variant, argument, dy, dx, dealt, partial, counters, 0)
    assert int(counters.abs().sum()) == 0
    return dx


def declared_ulps(fmt: Format) -> int:
    """Tables are rounded before their scale; NVFP4's multiplier is applied to sums: one rounding in another place than the
    law's."""
    return 1 if fmt.codec.kind == "table" or fmt.scale.kind == "e4m3_global" else 0


def test_every_codec_has_instances_for_both_dtypes() -> None:
    module = emulator()
    served = {launches.arithmetic(get_format(spec), dtype) for spec in SERVED for dtype in BOTH}
    for dtype in BOTH:
        instances = {(v.codec, v.scaling) for v in launches.variants(module, LINEAR) if v.dtype == launches.DTYPES[dtype]}
        assert instances == served


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("spec", SERVED)
def test_identity_gives_the_decoded_weight(spec: str, dtype: torch.dtype) -> None:
    weight = quantized(spec, 35, 208)
    law, ulps = weight.dequantize(dtype), declared_ulps(weight.format)
    for variant in variants_of(emulator(), LINEAR, weight.format, dtype):
        some = torch.randperm(208, generator=torch.Generator().manual_seed(1))[: variant.rows + 3]
        y = linear(emulator(), weight, torch.eye(208, dtype=dtype)[some], variant, programs=2)
        assert_within_ulps(y.T.contiguous(), law[:, some] + 0.0, ulps)
    (variant,) = variants_of(emulator(), GEMV, weight.format, dtype)
    some = torch.randperm(208, generator=torch.Generator().manual_seed(2))[:8]
    y = linear(emulator(), weight, torch.eye(208, dtype=dtype)[some], variant, programs=2, kernel=GEMV)
    assert_within_ulps(y.T.contiguous(), law[:, some] + 0.0, ulps)
    for variant in variants_of(emulator(), DGRAD, weight.format, dtype):
        dx = dgrad(emulator(), weight, torch.eye(35, dtype=dtype), variant, programs=2)
        assert_within_ulps(dx, law + 0.0, 1 if weight.format.scale.kind == "e4m3_global" else 0)


@pytest.mark.parametrize(("n", "k"), [(1, 16), (3, 7), (33, 130), (16, 576), (130, 1000)])
@pytest.mark.parametrize(
    "spec", ["int4-g128", "int4-g32-asym", "int3-g64-asym", "nf4-dq", "nvfp4", "mxfp4", "fp8-e4m3-block128"]
)
def test_any_shape_and_any_number_of_rows(spec: str, n: int, k: int) -> None:
    weight = quantized(spec, n, k)
    law = weight.dequantize(torch.float32).double()
    for dtype, m in ((torch.bfloat16, 1), (torch.float16, 5), (torch.bfloat16, 17), (torch.float16, 64), (torch.bfloat16, 130)):
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        expected = x.double() @ law.to(dtype).double().T
        for variant in variants_of(emulator(), LINEAR, weight.format, dtype):
            if variant.rows >= min(m, 64) or m == 130:
                assert_close(linear(emulator(), weight, x, variant, programs=3), expected)
        if m <= 8:
            (variant,) = variants_of(emulator(), GEMV, weight.format, dtype)
            assert_close(linear(emulator(), weight, x, variant, programs=3, kernel=GEMV), expected)
        dy = torch.randn(m, n, generator=torch.Generator().manual_seed(m)).to(dtype)
        for variant in variants_of(emulator(), DGRAD, weight.format, dtype):
            if variant.rows >= min(m, 64):
                assert_close(dgrad(emulator(), weight, dy, variant, programs=3), dy.double() @ law.to(dtype).double())


@pytest.mark.parametrize("programs", [1, 2, 3, 7, 16, 1000])
def test_sums_meet_wherever_blocks_are_cut(programs: int) -> None:
    """K of 13 turns in 3 blocks: programs begin and end inside blocks, and share one among up to all of them."""
    weight = quantized("int4-g64-full", 150, 128 * 25 + 40)
    x = torch.randn(11, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    variant = variants_of(emulator(), LINEAR, weight.format, torch.bfloat16)[1]
    expected = x.double() @ weight.dequantize(torch.float32).double().T
    found = [linear(emulator(), weight, x, variant, programs, order=order) for order in ("forward", "reverse", "random")]
    assert_close(found[0], expected)
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


@pytest.mark.parametrize("spec", ["int4-g128", "nvfp4", "int8-channel"])
def test_bias_and_residual_are_added_in_fp32(spec: str) -> None:
    weight = quantized(spec, 70, 300)
    generator = torch.Generator().manual_seed(0)
    for dtype in BOTH:
        x, bias, residual = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((9, 300), (70,), (9, 70)))
        expected = x.double() @ weight.dequantize(torch.float32).double().T + bias.double() + residual.double()
        variant = variants_of(emulator(), LINEAR, weight.format, dtype)[1]
        for programs in (1, 4):
            assert_close(linear(emulator(), weight, x, variant, programs, bias, residual), expected)


@pytest.mark.parametrize("spec", SERVED)
def test_the_main_loop_has_no_bank_conflicts_and_copies_16_bytes(spec: str) -> None:
    weight = quantized(spec, 128, 1024)
    for variant in variants_of(emulator(), LINEAR, weight.format, torch.bfloat16):
        x = torch.randn(variant.rows, 1024).to(torch.bfloat16)
        linear(emulator(), weight, x, variant, programs=2)
        counted = emulator().counters()
        assert counted["uncounted"] == 0
        for kind in ("load", "matrix", "copy"):
            assert counted["steady"][kind]["accesses"] > 0
            assert counted["steady"][kind]["conflicts"] == 0, (variant, kind, counted["steady"])


BREAKS = {
    "the wait for a stage's copies": (
        "linear_frag.h",
        "copy_async_wait<STAGES - 2>();\n            sync_threads();",
        "sync_threads();",
    ),
    "one stage less waited for": ("linear_frag.h", "copy_async_wait<STAGES - 2>();", "copy_async_wait<STAGES - 1>();"),
    "the barrier behind the wait": (
        "linear_frag.h",
        "copy_async_wait<STAGES - 2>();\n            sync_threads();",
        "copy_async_wait<STAGES - 2>();",
    ),
    "two fragments swapped": ("linear_frag.h", "b[j][0] = four[0], b[j][1] = four[1]", "b[j][0] = four[1], b[j][1] = four[0]"),
    "a row's scale taken from the other": ("linear_frag.h", "i < 2 ? scale0 : scale1", "i < 2 ? scale1 : scale0"),
    "a matrix that is not turned over": ("dgrad_frag.h", "transpose_matrix(a[2 * g])", "a[2 * g]"),
    "sums that meet without waiting": ("../common/meeting.h", "arrived == share.last - share.first", "arrived == 0"),
}
"""What is broken -> (file, what stands there, what it becomes)."""


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_copy_is_caught(broken: str, tmp_path: Path) -> None:
    copy = tmp_path / "cuda"
    shutil.copytree(KERNELS.parent, copy)
    name, stands, becomes = BREAKS[broken]
    path = copy / "sm80" / name
    text = path.read_text()
    assert text.count(stands) == 1
    path.write_text(text.replace(stands, becomes))
    module = few_instances(tmp_path, f"simt_broken_{list(BREAKS).index(broken)}", [f"-I{copy}"])
    with pytest.raises((SimtError, AssertionError)):
        check_products(module)


def few_instances(folder: Path, name: str, flags: Sequence[str] = ()) -> ModuleType:
    """A module of one instance of linear_frag and one of dgrad_frag. Modules in one process need different names."""
    (folder / "few.cpp").write_text(FEW_INSTANCES.replace("NAME", name))
    return build(name, [folder / "few.cpp"], flags)


def check_products(module: ModuleType) -> None:
    """Every instance of a module, against fp64."""
    weight = quantized("int4-g64-full", 70, 128 * 9)
    generator = torch.Generator().manual_seed(0)
    for variant in launches.variants(module, LINEAR):
        x = torch.randn(variant.rows, weight.shape[1], generator=generator).to(torch.bfloat16)
        expected = x.double() @ weight.dequantize(torch.float32).double().T
        assert_close(linear(module, weight, x, variant, programs=4), expected)
    for variant in launches.variants(module, DGRAD):
        dy = torch.randn(20, 70, generator=generator).to(torch.bfloat16)
        expected = dy.double() @ weight.dequantize(torch.bfloat16).double()
        assert_close(dgrad(module, weight, dy, variant, programs=4), expected)


FEW_INSTANCES = """
#include <pybind11/pybind11.h>
#include "bind.h"
#include "sm80/fragment_bindings.h"
#include "sm80/instances.h"

PYBIND11_MODULE(NAME, module) {
    using namespace quantlib::cuda;
    using Int4 = Integer<Bf16, 4>;
    simt::bind(module);
    Instances found;
    found.linear.push_back(linear_variant<LinearConfig<Int4, Bf16, Scaling::half, 16, 4, 2>>("int4", "half"));
    found.dgrad.push_back(dgrad_variant<DgradConfig<Int4, Bf16, Scaling::half, 16>>("int4", "half"));
    bind_fragments(module, found);
}
"""


def test_the_copy_that_is_broken_is_sound_before(tmp_path: Path) -> None:
    check_products(few_instances(tmp_path, "simt_sound"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("spec", SERVED)
def test_a_gpu_gives_the_decoded_weight(spec: str, dtype: torch.dtype) -> None:
    weight = quantized(spec, 130, 1000).to("cuda")
    law, ulps = weight.dequantize(dtype), declared_ulps(weight.format)
    some = torch.randperm(1000, generator=torch.Generator().manual_seed(1)).cuda()
    for kernel, rows in (("cuda_sm80_gemv", 8), *(("cuda_sm80_linear_frag", rows) for rows in (8, 16, 32, 200))):
        y = run("linear", torch.eye(1000, dtype=dtype, device="cuda")[some[:rows]], weight, kernel=kernel)
        assert_within_ulps(y.T.contiguous(), law[:, some[:rows]] + 0.0, ulps)
    for rows in (16, 130):
        dx = run("dgrad", torch.eye(130, dtype=dtype, device="cuda")[:rows], weight, kernel="cuda_sm80_dgrad_frag")
        assert_within_ulps(dx, law[:rows] + 0.0, 1 if weight.format.scale.kind == "e4m3_global" else 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", ["int4-g128", "nf4", "nvfp4", "fp8-e4m3"])
def test_a_gpu_multiplies_within_the_limits_and_repeats_itself(spec: str) -> None:
    weight = quantized(spec, 2050, 4100).to("cuda")
    law = weight.dequantize(torch.bfloat16).double()
    for m in (1, 3, 16, 65, 256):
        x = torch.randn(m, 4100, generator=torch.Generator().manual_seed(m)).to("cuda", torch.bfloat16)
        for kernel in ("cuda_sm80_gemv", "cuda_sm80_linear_frag"):
            if kernel == "cuda_sm80_gemv" and m > 8:
                continue
            y = run("linear", x, weight, kernel=kernel)
            assert_close(y, x.double() @ law.T)
            assert_same_bits(run("linear", x, weight, kernel=kernel), y)
        dy = torch.randn(m, 2050, generator=torch.Generator().manual_seed(m)).to("cuda", torch.bfloat16)
        dx = run("dgrad", dy, weight, kernel="cuda_sm80_dgrad_frag")
        assert_close(dx, dy.double() @ law)
        assert_same_bits(run("dgrad", dy, weight, kernel="cuda_sm80_dgrad_frag"), dx)
