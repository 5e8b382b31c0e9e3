"""The Hopper kernel of the fragments layout, run by the emulator (tests/simt): decoded weights bit by bit, products within the
limits of their dtype, and mistakes in its synchronisation found."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from quantlib.devices import Device
from quantlib.formats import get_format
from quantlib.kernels import cuda_fragments_launch as launches
from quantlib.kernels import cuda_module
from quantlib.kernels.base import Problem
from quantlib.kernels.cuda_sm90 import CudaLinearTile, TileVariant, tile_instances, tile_variants
from quantlib.tensor import QuantizedTensor
from quantlib.testing import assert_close, assert_same_bits, assert_within_ulps, random_weight
from tests.cases import FORMATS
from tests.simt.build import build, build_edited
from tests.simt.memory import SimtError, allowed, block_order

SOURCE = Path(__file__).parent / "simt" / "linear_tile.cpp"
BOTH = (torch.bfloat16, torch.float16)


@cache
def emulator() -> ModuleType:
    return build("simt_linear_tile", [SOURCE])


def quantized(spec: str, n: int, k: int) -> QuantizedTensor:
    fmt = get_format(spec)
    weight = random_weight(n, k, seed=0)
    parts = fmt.fit(weight)
    return QuantizedTensor(fmt, (n, k), {"codes": fmt.encode(weight, parts), **parts}).to_layout("fragments")


SERVED = tuple(spec for spec in FORMATS if not isinstance(launches.arithmetic(get_format(spec), torch.bfloat16), str))


def linear(
    module: ModuleType,
    weight: QuantizedTensor,
    x: Tensor,
    variant: TileVariant,
    programs: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    order: str = "forward",
) -> Tensor:
    """y by the emulated kernel, which may touch nothing but its arguments; NaN where it wrote nothing."""
    n, k = weight.shape
    x = launches.aligned_rows(x)
    y = torch.full((x.shape[0], n), float("nan"), dtype=x.dtype)
    dealt = launches.deal(x.shape[0], n, k, variant, programs)
    partial = torch.full((2 * dealt.programs * variant.rows * variant.columns,), float("nan"))
    counters = torch.zeros(dealt.blocks, dtype=torch.int32)
    reads = {"x": x, **launches.weight_tensors(weight)}
    reads |= {name: part for name, part in (("bias", bias), ("residual", residual)) if part is not None}
    with allowed(module, reads, {"y": y, "partial": partial, "counters": counters}), block_order(module, order, seed=1):
        launches.launch_linear(
            module, module.sm90_linear_tile, variant, launches.weight_argument(module, weight), x, n, bias, residual, y, dealt,
            partial, counters, 0,
        )  # fmt: skip
    assert int(counters.abs().sum()) == 0
    return y


def product(x: Tensor, weight: QuantizedTensor) -> Tensor:
    return x.double() @ weight.dequantize(torch.float32).double().T


def rows(m: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


def test_every_format_has_an_instance_for_each_number_of_rows() -> None:
    for spec in SERVED:
        for dtype in BOTH:
            found = tile_instances(emulator(), get_format(spec), dtype)
            assert [variant.rows for variant in found] == [16, 32, 64, 128], spec
            for variant in found:
                assert variant.shared_bytes + 1024 <= 228 * 1024 // variant.per_unit


def test_sums_are_scaled_as_seldom_as_blocks_allow() -> None:
    for spec, piece in (("int4-g128", 128), ("int4-g32-asym", 32), ("int4-channel-bf16", 0), ("nf4-g128", 64), ("nvfp4", 0)):
        assert {variant.piece for variant in tile_instances(emulator(), get_format(spec), torch.float16)} == {piece}, spec


def test_blocks_grow_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_module, "module", emulator)
    kernel, device = CudaLinearTile(), Device("cuda", "H100", "sm_90", 132, 3350.0, 989.0)
    chosen = []
    for m in (16, 32, 64, 128, 4096):
        problem = Problem("linear", m, 8192, 8192, torch.bfloat16, get_format("int4-g128"), "fragments", None, device)
        chosen.append(kernel.plan(problem)[0].rows)
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (16, 128)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("spec", SERVED)
def test_identity_gives_the_decoded_weight(spec: str, dtype: torch.dtype) -> None:
    """Code books are rounded before their scale, and NVFP4's multiplier is applied to sums: off by a unit in the last place."""
    weight = quantized(spec, 150, 208)
    law = weight.dequantize(dtype)
    ulps = 1 if weight.format.codec.kind == "table" or weight.format.scale.kind == "e4m3_global" else 0
    for variant in tile_instances(emulator(), weight.format, dtype):
        some = torch.randperm(208, generator=torch.Generator().manual_seed(1))[: variant.rows + 3]
        y = linear(emulator(), weight, torch.eye(208, dtype=dtype)[some], variant, programs=2)
        assert_within_ulps(y.T.contiguous(), law[:, some] + 0.0, ulps)


@pytest.mark.parametrize(("n", "k"), [(1, 16), (3, 7), (33, 130), (132, 576), (130, 1000)])
@pytest.mark.parametrize(
    "spec", ["int4-g128", "int4-g32-asym", "int3-g64-asym", "nf4-dq", "nvfp4", "mxfp4", "fp8-e4m3-block128"]
)
def test_any_shape_and_any_number_of_rows(spec: str, n: int, k: int) -> None:
    weight = quantized(spec, n, k)
    for dtype, m in ((torch.bfloat16, 1), (torch.float16, 17), (torch.bfloat16, 64), (torch.float16, 200)):
        x = rows(m, k, dtype)
        for variant in tile_instances(emulator(), weight.format, dtype):
            if variant.rows // 4 <= m <= 4 * variant.rows:
                assert_close(linear(emulator(), weight, x, variant, programs=3), product(x, weight))


@pytest.mark.parametrize("programs", [1, 2, 3, 7, 16, 1000])
def test_sums_meet_wherever_blocks_are_cut(programs: int) -> None:
    """K of 16 turns in 2 x 2 blocks: programs begin and end inside blocks, and share one among up to all of them."""
    weight = quantized("int4-g64-full", 150, 128 * 15 + 40)
    x = rows(19, weight.shape[1], torch.bfloat16)
    variant = tile_instances(emulator(), weight.format, torch.bfloat16)[0]
    found = [linear(emulator(), weight, x, variant, programs, order=order) for order in ("forward", "reverse", "random")]
    assert_close(found[0], product(x, weight))
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


@pytest.mark.parametrize("n", [132, 71])
@pytest.mark.parametrize("spec", ["int4-g128", "nvfp4", "int8-channel"])
def test_bias_and_residual_are_added_in_fp32(spec: str, n: int) -> None:
    """Rows of y that begin at multiples of 8 bytes, which are stored in another way, and others."""
    weight = quantized(spec, n, 300)
    generator = torch.Generator().manual_seed(0)
    for dtype in BOTH:
        x, bias, residual = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((37, 300), (n,), (37, n)))
        expected = product(x, weight) + bias.double() + residual.double()
        for variant in tile_instances(emulator(), weight.format, dtype):
            for programs in (1, 4):
                assert_close(linear(emulator(), weight, x, variant, programs, bias, residual), expected)


@pytest.mark.parametrize("spec", SERVED)
def test_the_main_loop_has_no_bank_conflicts(spec: str) -> None:
    """But where each lane looks up its own code in the map of double quantization."""
    weight = quantized(spec, 128, 1024)
    for variant in tile_instances(emulator(), weight.format, torch.bfloat16):
        linear(emulator(), weight, rows(variant.rows, 1024, torch.bfloat16), variant, programs=2)
        counted = emulator().counters()
        assert counted["uncounted"] == 0
        assert counted["steady"]["load"]["accesses"] > 0
        assert counted["steady"]["copy"]["accesses"] == 0
        if variant.scaling != "twice":
            assert counted["steady"]["load"]["conflicts"] == 0, (variant, counted["steady"])


# mistakes


def multiply_with(module: ModuleType) -> tuple[Tensor, Tensor]:
    """12 turns, more than there are stages; two blocks of y."""
    weight = quantized("int4-g128", 140, 128 * 12)
    x = rows(16, weight.shape[1], torch.bfloat16)
    (variant,) = tile_variants(module)
    return linear(module, weight, x, variant, programs=1, order="reverse"), product(x, weight)


def test_a_copy_without_mistakes_works(tmp_path: Path) -> None:
    assert_close(*multiply_with(build_edited(tmp_path, SOURCE)))


MISTAKES = {
    "words_before_they_came": ("tile_consumer.h", "barrier_wait(full(ring.slot), ring.parity);", ""),
    "stage_filled_while_read": ("linear_tile.h", "barrier_wait(empty + ring.slot, ring.parity ^ 1);", ""),
    "stage_freed_too_early": ("tile_consumer.h", "freed = ring.slot;", "freed = -1; barrier_arrive(empty(ring.slot));"),
    "sums_before_they_are_ready": ("tile_consumer.h", "wgmma_wait<0>();\n                    wgmma_hold(part);", ""),
    "operand_overwritten": ("tile_consumer.h", "wgmma_wait<1>();\n                wgmma_hold(operand);", ""),
    "operand_not_fenced": ("tile_consumer.h", "wgmma_fence();", ""),
    "bytes_not_announced": ("tile_producer.h", "if (first == 0) bytes += Config::X_BYTES;", ""),
    "one_warp_not_waited_for": ("linear_tile.h", "empty + s, Config::CONSUMERS / WARP)", "empty + s, 7)"),
}
"""Name -> the file, what stands there, and what stands there instead."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(tmp_path: Path, mistake: str) -> None:
    with pytest.raises(SimtError):
        multiply_with(build_edited(tmp_path, SOURCE, MISTAKES[mistake]))
