"""FP8 times FP8 on Hopper, run by the emulator (tests/simt): decoded weights bit by bit, products within the limits of their
dtype, mistakes found; who may run it, at what predicted cost; and, where there is one, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from quantlib.devices import Device, device_facts
from quantlib.dispatch import choices, problem_of
from quantlib.formats import get_format
from quantlib.kernels import cuda_module, cuda_sm90_fp8, get_kernel
from quantlib.kernels.activations_launch import Activations
from quantlib.kernels.base import Problem
from quantlib.kernels.cuda_fragments_launch import Deal, Variant, deal
from quantlib.tensor import QuantizedTensor
from quantlib.testing import assert_close, assert_same_bits, random_weight
from tests.simt.build import Edit, build, build_edited
from tests.simt.memory import SimtError, allowed, block_order

SOURCE = Path(__file__).parent / "simt" / "scaled_fp8.cpp"
H100 = Device("cuda", "NVIDIA H100", "sm_90", 132, 3350.0, 989.0)
TYPES = (torch.bfloat16, torch.float16, torch.float32)
ACTIVATIONS = ("fp8-g128", "fp8", "fp8-e4m3-tensor")
WEIGHTS = ("fp8-block128", "fp8-g128", "fp8", "fp8-e4m3-tensor")
ORDERS = ("forward", "reverse", "random")


@cache
def emulator() -> ModuleType:
    return build("simt_scaled_fp8", [SOURCE])


def law(x: Tensor, spec: str) -> dict[str, Tensor]:
    fmt = get_format(spec)
    parts = fmt.fit(x)
    return {"codes": fmt.encode(x, parts), **parts}


def quantized(spec: str, n: int, k: int) -> QuantizedTensor:
    return QuantizedTensor(get_format(spec), (n, k), law(random_weight(n, k), spec))


def rows(m: int, k: int) -> Tensor:
    """Of different size, and with outliers: neighbouring scales differ."""
    return random_weight(m, k, seed=m + 1) * torch.logspace(-2, 2, m)[:, None]


def activations(x: Tensor, spec: str) -> Activations:
    """x by the law, as `quantize_activations` leaves it: rows come in fours, and those behind M hold junk."""
    fmt, (m, k), parts = get_format(spec), x.shape, law(x, spec)
    room = -(-m // 4) * 4
    codes = torch.full((room, fmt.padded(k)), 0x7F, dtype=torch.uint8)
    codes[:m] = parts["codes"]
    scales = parts["scales"]
    if fmt.block.rows == 1:
        scales = torch.full((scales.shape[1], room), float("nan")).T
        scales[:m] = parts["scales"]
    return Activations(fmt, (room, k), codes, scales)


def instances(spec: str) -> tuple[Variant, ...]:
    block = get_format(spec).block
    return cuda_sm90_fp8.instances(emulator(), (block.rows, block.cols))


def linear(
    module: ModuleType,
    m: int,
    a: Activations,
    weight: QuantizedTensor,
    variant: Variant,
    dealt: Deal | int,
    dtype: torch.dtype = torch.bfloat16,
    bias: Tensor | None = None,
    order: str = "forward",
) -> Tensor:
    """y by the emulated kernel, which may touch nothing but its arguments; NaN where it wrote nothing. dealt: or programs."""
    n, k = weight.shape
    y = torch.full((m, n), float("nan"), dtype=dtype)
    dealt = dealt if isinstance(dealt, Deal) else deal(m, n, k, variant, dealt)
    partial = torch.full((2 * dealt.programs * variant.rows * variant.columns,), float("nan"))
    counters = torch.zeros(dealt.blocks, dtype=torch.int32)
    x, w = cuda_sm90_fp8.activations_operand(a), cuda_sm90_fp8.weight_operand(weight)
    reads = {"x": x.codes, "x_scales": x.scales, "w": w.codes, "w_scales": w.scales} | ({} if bias is None else {"bias": bias})
    with allowed(module, reads, {"y": y, "partial": partial, "counters": counters}), block_order(module, order, seed=1):
        cuda_sm90_fp8.multiply(module, module.sm90_scaled_fp8, variant, x, w, k, bias, y, dealt, partial, counters, 0)
    assert int(counters.abs().sum()) == 0
    return y


def product(x: Tensor, spec: str, weight: QuantizedTensor) -> Tensor:
    """What the reference kernel computes, in fp64."""
    decoded = get_format(spec).decode(law(x, spec), *x.shape, torch.float32)
    return decoded.double() @ weight.dequantize(torch.float32).double().T


def assert_as_good_as_fp8(y: Tensor, expected: Tensor) -> None:
    """Within the limit of y's dtype, of fp16's where y is fp32: sums of 128 products have 13 bits after the point."""
    assert_close(y, expected, torch.float16 if y.dtype == torch.float32 else None)


# the numbers


def test_every_weight_has_an_instance_for_each_number_of_rows() -> None:
    for spec in WEIGHTS:
        found = instances(spec)
        assert [variant.rows for variant in found] == [16, 32, 64, 128, 256]
        assert all(variant.shared_bytes <= 227 * 1024 and variant.columns == 128 for variant in found)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("spec", WEIGHTS)
def test_identity_gives_the_decoded_weight(spec: str, dtype: torch.dtype) -> None:
    """Rows of the identity as codes of one under scales of one."""
    n, k = 150, 208
    weight, fmt = quantized(spec, n, k), get_format("fp8-g128")
    law_weight = weight.dequantize(dtype)
    for variant in instances(spec):
        some = torch.randperm(k, generator=torch.Generator().manual_seed(1))[: variant.rows + 3]
        m, room = len(some), -(-len(some) // 4) * 4
        codes = torch.zeros(room, fmt.padded(k), dtype=torch.uint8)
        codes[torch.arange(m), some] = 0x38
        a = Activations(fmt, (room, k), codes, torch.ones(2, room).T)
        y = linear(emulator(), m, a, weight, variant, 2, dtype)
        assert_same_bits(y.T.contiguous(), law_weight[:, some] + 0.0)


@pytest.mark.parametrize("weight_spec", WEIGHTS)
@pytest.mark.parametrize("spec", ACTIVATIONS)
def test_every_pair_of_scales(spec: str, weight_spec: str) -> None:
    weight = quantized(weight_spec, 260, 400)
    for index, variant in enumerate(instances(weight_spec)):
        x = rows(variant.rows - 3, 400)
        for dtype in (TYPES[index % 3], TYPES[(index + 1) % 3]):
            y = linear(emulator(), len(x), activations(x, spec), weight, variant, 3, dtype)
            assert_as_good_as_fp8(y, product(x, spec, weight))


@pytest.mark.parametrize(("n", "k"), [(1, 128), (131, 336), (384, 640), (77, 1024)])
@pytest.mark.parametrize(("weight_spec", "spec"), [("fp8-block128", "fp8-g128"), ("fp8", "fp8")])
def test_any_number_of_rows_and_columns(weight_spec: str, spec: str, n: int, k: int) -> None:
    weight, offered = quantized(weight_spec, n, k), {variant.rows: variant for variant in instances(weight_spec)}
    for m, block in ((1, 16), (7, 16), (16, 16), (17, 32), (33, 32), (64, 64), (65, 64), (1, 128), (130, 128), (130, 256)):
        x = rows(m, k)
        assert_close(linear(emulator(), m, activations(x, spec), weight, offered[block], 2), product(x, spec, weight))


@pytest.mark.parametrize("k", [1, 100, 129])
def test_k_off_every_multiple_where_formats_pad(k: int) -> None:
    weight, x = quantized("fp8-g128", 37, k), rows(9, k)
    y = linear(emulator(), 9, activations(x, "fp8-g128"), weight, instances("fp8-g128")[0], 2, torch.float16)
    assert_close(y, product(x, "fp8-g128", weight))


@pytest.mark.parametrize("programs", [1, 2, 3, 7, 16, 1000])
def test_sums_meet_wherever_blocks_are_cut(programs: int) -> None:
    """K of 8 turns in 2 x 2 blocks: programs begin and end inside blocks, and share one among up to all of them."""
    weight = quantized("fp8-block128", 150, 1024)
    for variant in instances("fp8-block128")[:4:3]:
        x = rows(variant.rows + 3, 1024)
        a = activations(x, "fp8-g128")
        found = [linear(emulator(), len(x), a, weight, variant, programs, order=order) for order in ORDERS]
        assert_close(found[0], product(x, "fp8-g128", weight))
        assert_same_bits(found[1], found[0])
        assert_same_bits(found[2], found[0])


@pytest.mark.parametrize("programs", [1, 3, 4, 40])
def test_whole_blocks_are_taken_in_turns(programs: int) -> None:
    """20 x 2 blocks, more than one band of 16, each computed once: what nobody wrote would be NaN. The same bits however many
    programs share them."""
    weight, x = quantized("fp8-block128", 20 * 128 - 5, 128), rows(17, 128)
    variant, a = instances("fp8-block128")[0], activations(x, "fp8-g128")
    each = -(-40 // programs)
    y = linear(emulator(), 17, a, weight, variant, Deal(40, 1, each, -(-40 // each)))
    assert_close(y, product(x, "fp8-g128", weight))
    assert_same_bits(y, linear(emulator(), 17, a, weight, variant, Deal(40, 1, 40, 1), order="random"))


@pytest.mark.parametrize("n", [132, 71])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_bias_is_added_in_fp32(dtype: torch.dtype, n: int) -> None:
    """Rows of y that begin at multiples of 8 bytes, which are stored in another way, and others."""
    weight, x = quantized("fp8-g128", n, 256), rows(37, 256)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = product(x, "fp8-g128", weight) + bias.double()
    for variant in instances("fp8-g128"):
        for programs in (1, 3):
            y = linear(emulator(), 37, activations(x, "fp8-g128"), weight, variant, programs, dtype, bias)
            assert_as_good_as_fp8(y, expected)


def test_an_fp32_result_is_exact_where_its_sums_are() -> None:
    """Products of whole numbers whose sums 13 bits hold; scales are powers of two."""
    generator = torch.Generator().manual_seed(2)
    x, w = (torch.randint(-3, 4, shape, generator=generator).float() for shape in ((50, 384), (140, 384)))
    x[:, ::128], w[:, ::128] = 7.0, 7.0
    weight = QuantizedTensor(get_format("fp8-g128"), (140, 384), law(w * 64, "fp8-g128"))
    for variant in instances("fp8-g128"):
        y = linear(emulator(), 50, activations(x * 64, "fp8-g128"), weight, variant, 2, torch.float32)
        assert_same_bits(y, 4096 * (x @ w.T))


def test_long_sums_are_as_good_as_short_ones() -> None:
    """Tensor cores cut sums to 13 bits after the point at every step: added up there alone they would be off by more than the
    limit of fp16 (see the mistakes below)."""
    weight, x = quantized("fp8", 64, 4096), rows(16, 4096)
    y = linear(emulator(), 16, activations(x, "fp8"), weight, instances("fp8")[0], 1, torch.float16)
    assert_close(y, product(x, "fp8", weight))


def test_rows_do_not_depend_on_the_batch() -> None:
    """The instance for batch_invariant, whole blocks: the same bits for one row and for many."""
    weight, x = quantized("fp8-block128", 200, 384), rows(150, 384)
    asked = replace(problem(1, n=200, k=384), batch_invariant=True)
    found = []
    for some in (slice(0, 150), slice(7, 8), slice(90, 131)):
        m = len(x[some])
        variant, dealt = cuda_sm90_fp8.plan(replace(asked, m=m), instances("fp8-block128"))
        assert not dealt.shared
        found.append(linear(emulator(), m, activations(x[some], "fp8-g128"), weight, variant, dealt))
    assert_same_bits(found[1], found[0][7:8])
    assert_same_bits(found[2], found[0][90:131])


@pytest.mark.parametrize("spec", ["fp8-block128", "fp8-g128"])
def test_the_main_loop_has_no_bank_conflicts(spec: str) -> None:
    weight = quantized(spec, 128, 1024)
    for variant in instances(spec):
        x = rows(variant.rows, 1024)
        linear(emulator(), variant.rows, activations(x, "fp8-g128"), weight, variant, 1)
        counted = emulator().counters()
        assert counted["uncounted"] == 0
        assert counted["steady"]["load"]["accesses"] > 0
        assert counted["steady"]["load"]["conflicts"] == 0, variant
        assert counted["steady"]["store"]["accesses"] == counted["steady"]["copy"]["accesses"] == 0


def test_an_unknown_result_is_refused() -> None:
    module, schedule = emulator(), emulator().Schedule(1, 1, 1, 0, 0)
    operand = module.Fp8Operand(4096, 128, 4096, 4, False)
    with pytest.raises(ValueError, match="float16, bfloat16 or float32, not float64"):
        module.sm90_scaled_fp8(0, operand, operand, 4096, 0, "float64", 1, 1, 128, schedule, 1, 0)


# operands


def test_a_weights_operand_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantized("fp8-block128", 300, 200)
    made = cuda_sm90_fp8.weight_operand(weight)
    assert cuda_sm90_fp8.weight_operand(weight) is made
    assert made.codes.data_ptr() == weight.parts["codes"].data_ptr()
    assert made.scales.shape == (2, 4)
    assert_same_bits(made.scales[:, :3], weight.parts["scales"].T.contiguous())


def test_codes_off_16_bytes_are_copied() -> None:
    weight = quantized("fp8", 16, 64)
    room = torch.empty(16 * 64 + 1, dtype=torch.uint8)
    weight.parts["codes"] = room[1:].view(16, 64).copy_(weight.parts["codes"])
    made = cuda_sm90_fp8.weight_operand(weight)
    assert made.codes.data_ptr() % 16 == 0
    assert_same_bits(made.codes, weight.parts["codes"])


# mistakes


CASES = (
    (0, "fp8-block128", "fp8-g128", 1280),
    (1, "fp8-g128", "fp8-g128", 1280),
    (0, "fp8-e4m3-tensor", "fp8", 4096),
)
"""Instance of a copy, formats of W and x, K: more turns than there are stages, in both orientations; and a long sum with scales
of whole rows."""


def check(module: ModuleType, cases: tuple[tuple[int, str, str, int], ...] = CASES) -> None:
    """Two blocks of y in one program's hands."""
    for index, weight_spec, spec, k in cases:
        variant = cuda_sm90_fp8.variants(module)[index]
        weight, x = quantized(weight_spec, 140, k), rows(16, k)
        y = linear(module, 16, activations(x, spec), weight, variant, 1, torch.float16, order="reverse")
        assert_close(y, product(x, spec, weight))


def test_a_copy_without_mistakes_works(tmp_path: Path) -> None:
    check(build_edited(tmp_path, SOURCE))


CONSUMER, CONFIG, KERNEL = "scaled_fp8_consumer.h", "scaled_fp8_config.h", "scaled_fp8.h"
MISTAKES: dict[str, Edit] = {
    "codes_before_they_came": (CONSUMER, "barrier_wait(full + ring.slot, ring.parity);", ""),
    "stage_filled_while_read": (KERNEL, "barrier_wait(empty + ring.slot, ring.parity ^ 1);", ""),
    "scales_not_waited_for_by_all": (CONSUMER, "sync_warp();  // all lanes have read their scales", ""),
    "sums_before_they_are_ready": (CONSUMER, "wgmma_wait<0>();", ""),
    "sums_not_fenced": (CONSUMER, "wgmma_fence();", ""),
    "scales_not_announced": (CONFIG, "X_BYTES + W_BYTES + 4 * (X_SCALES + W_SCALES)", "X_BYTES + W_BYTES"),
    "one_warp_not_waited_for": (KERNEL, "Config::CONSUMERS / WARP);", "Config::CONSUMERS / WARP - 1);"),
}
"""Found by the emulator itself."""

BEGUN = "wgmma_e4m3<false, Config::COLUMNS>(part, a, b)"
GONE_ON: Edit = (CONSUMER, BEGUN, BEGUN.replace("false", "true"))
WRONG_NUMBERS: dict[str, Edit] = {
    "scales_of_rows_swapped": (CONSUMER, "first[i / 2]", "first[1 - i / 2]"),
    "scales_of_columns_swapped": (CONSUMER, "second[i % 2]", "second[1 - i % 2]"),
    "scales_of_the_first_turn": (KERNEL, "turn * args.x_step", "0 * args.x_step"),
    "scales_of_another_block": (KERNEL, "place.first_n / Config::BN", "1 - place.first_n / Config::BN"),
    "sums_never_begun_anew": GONE_ON,
    "a_step_along_k_missing": (CONSUMER, "k < SCALED_COLUMNS; k += 32", "k < SCALED_COLUMNS - 32; k += 32"),
}
"""Found by what comes out."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(tmp_path: Path, mistake: str) -> None:
    with pytest.raises(SimtError):
        check(build_edited(tmp_path, SOURCE, MISTAKES[mistake]))


@pytest.mark.parametrize("mistake", WRONG_NUMBERS)
def test_wrong_numbers_are_found(tmp_path: Path, mistake: str) -> None:
    with pytest.raises(AssertionError, match="relative error"):
        check(build_edited(tmp_path, SOURCE, WRONG_NUMBERS[mistake]))


def test_sums_left_to_the_tensor_cores_are_found(tmp_path: Path) -> None:
    """Without promotion: one sum for the whole of K, scaled at the end, which scales of whole rows would allow."""
    added = "multiply_add(part[4 * j + i], multiply_rounded(first[i / 2], second[i % 2]), sum)"
    module = build_edited(tmp_path, SOURCE, GONE_ON, (CONSUMER, added, added.replace(", sum)", ", 0.0f)")))
    with pytest.raises(AssertionError, match=r"relative error .* exceeds .* for torch\.float16"):
        check(module, CASES[2:])


# choosing


def problem(m: int = 4096, weight: str = "fp8-block128", x: str | None = "fp8-g128", **changes: Any) -> Problem:
    asked = Problem("linear", m, 8192, 8192, torch.bfloat16, get_format(weight), "rows", x, H100)
    return replace(asked, **changes)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine whose quantlib._cuda holds every instance of this kernel and nothing else."""
    monkeypatch.setattr(cuda_module, "module", emulator)
    monkeypatch.setattr(cuda_module, "refusal", lambda sources, _: None if sources == "sm90/scaled_fp8" else f"no {sources}")
    yield
    cuda_sm90_fp8.plan.cache_clear()


KERNEL_NAME = "cuda_sm90_scaled_fp8"
REFUSALS = (
    (problem(x=None), "none are asked for"),
    (problem(x="mxfp8"), "other activations than mxfp8"),
    (problem(x="int8", weight="int8"), "other activations than int8"),
    (problem(weight="int4-g128"), "fp8 weights, not with int4-g128"),
    (problem(weight="fp8-e5m2"), "takes e4m3 weights"),
    (problem(device=device_facts("cpu")), "needs a CUDA device"),
    (problem(device=replace(H100, arch="sm_100", name="a B200")), "which Hopper (sm_90) alone has; a B200 is sm_100"),
    (problem(dtype=torch.float32), "gives fp16 or bf16, not float32"),
    (problem(layout="fragments"), "reads the rows layout"),
    (problem(weight="fp8", x="fp8", k=4100), "K in multiples of 16 where scales are of whole rows; K is 4100"),
    (problem(weight="fp8", k=4100), "K is 4100"),
    (problem(k=0), "K is 0"),
    (problem(x="fp8-e4m3-tensor", batch_invariant=True), "one scale for the whole batch"),
)


@pytest.mark.parametrize(("asked", "words"), REFUSALS)
def test_refusals_say_why(asked: Problem, words: str, built: None) -> None:
    assert words in str(get_kernel(KERNEL_NAME).supports(asked))


def test_a_module_without_the_kernel_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_module, "refusal", lambda sources, capability: f"without {sources} for {capability}")
    assert get_kernel(KERNEL_NAME).supports(problem()) == "without sm90/scaled_fp8 for 90"


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("x", ACTIVATIONS)
def test_every_pair_is_taken_at_a_cost_between_the_floor_and_a_few_times_it(x: str, weight: str, built: None) -> None:
    kernel = get_kernel(KERNEL_NAME)
    for m in (1, 16, 64, 256, 1024, 8192):
        asked = problem(m, weight, x, n=8200)
        floor = max(asked.format.nbytes(8200, 8192) / 3.35e6, 2 * m * 8200 * 8192 / (2 * 989e6))
        assert kernel.supports(asked) is None
        assert floor < kernel.cost(asked) < 4 * floor


def test_any_n_is_taken_and_any_k_where_formats_pad(built: None) -> None:
    for changes in (
        {"n": 1},
        {"n": 4097},
        {"k": 100},
        {"weight": "fp8-g128", "k": 4099},
        {"weight": "fp8", "x": "fp8", "k": 144},
    ):
        assert get_kernel(KERNEL_NAME).supports(problem(**changes)) is None


def test_blocks_grow_with_the_batch() -> None:
    chosen = [cuda_sm90_fp8.plan(problem(m), instances("fp8-block128"))[0].rows for m in (1, 16, 32, 64, 128, 8192)]
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (16, 256)


def test_few_blocks_are_shared_and_many_are_not() -> None:
    _, dealt = cuda_sm90_fp8.plan(problem(1), instances("fp8-block128"))
    assert dealt.shared
    assert dealt.programs > 120
    _, dealt = cuda_sm90_fp8.plan(problem(8192), instances("fp8-block128"))
    assert not dealt.shared
    assert dealt.programs <= 132


def test_dispatch_compares_it_with_other_kernels_and_says_why_not(built: None) -> None:
    found = {choice.kernel: choice for choice in choices(problem(16))}
    costs = [choice.cost for choice in found.values() if choice.cost is not None]
    assert costs == sorted(costs)
    assert found[KERNEL_NAME].cost is not None
    assert found[KERNEL_NAME].cost < found["reference_linear"].cost
    refused = {choice.kernel: choice for choice in choices(problem(16, "fp8", "fp8", k=4100))}
    assert "K in multiples of 16" in str(refused[KERNEL_NAME].refusal)


# what was compiled


@pytest.mark.skipif(cuda_module.refusal("sm90/scaled_fp8", 90) is not None, reason="quantlib._cuda was built without it")
def test_compiled_kernels_hold_qgmma_and_spill_nothing() -> None:
    kernels = [kernel for kernel in cuda_module.facts()["kernels"] if kernel["source"] == "sm90/scaled_fp8.cu"]
    assert len(kernels) == 10
    for kernel in kernels:
        usage = kernel["targets"]["sm_90a"]
        assert usage["spill_stores"] == usage["spill_loads"] == usage["stack"] == 0
        assert not usage["notes"]
    assert cuda_sm90_fp8.variants(cuda_module.module()) == cuda_sm90_fp8.variants(emulator())


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("weight_spec", WEIGHTS)
@pytest.mark.parametrize("spec", ACTIVATIONS)
def test_products_on_a_gpu(spec: str, weight_spec: str) -> None:
    """Every instance, with shared and with whole blocks, against the reference kernel in fp64; the same bits twice."""
    weight, kernel = quantized(weight_spec, 1051, 1552).to("cuda"), get_kernel(KERNEL_NAME)
    for m in (1, 16, 33, 130, 500, 2100):
        for dtype in (torch.bfloat16, torch.float16):
            x = rows(m, 1552).to(dtype)
            asked = problem_of("linear", m, weight, dtype, spec, "cuda")
            refusal = kernel.supports(asked)
            if refusal is not None:
                pytest.skip(refusal)
            bias = torch.randn(1051, generator=torch.Generator().manual_seed(9)).to(dtype)
            expected = product(x, spec, weight.to("cpu")) + bias.double()
            for each in (asked, replace(asked, batch_invariant=spec != "fp8-e4m3-tensor")):
                y = kernel.run(each, x.cuda(), weight, bias.cuda())
                assert_close(y.cpu(), expected)
                assert_same_bits(kernel.run(each, x.cuda(), weight, bias.cuda()), y)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["fp8-block128", "fp8-g128"])
def test_every_instance_on_a_gpu(spec: str) -> None:
    refusal = cuda_module.refusal("sm90/scaled_fp8", device_facts("cuda").capability)
    if refusal is not None:
        pytest.skip(refusal)
    module, k = cuda_module.module(), 4096
    weight = quantized(spec, 1051, k)
    on_gpu, block = weight.to("cuda"), weight.format.block
    for variant in cuda_sm90_fp8.instances(module, (block.rows, block.cols)):
        x = rows(variant.rows + 5, k)
        a, m = activations(x, "fp8-g128"), len(x)
        x_operand = cuda_sm90_fp8.activations_operand(replace(a, codes=a.codes.cuda(), scales=a.scales.cuda()))
        for programs in (1, 7, 132):
            for dtype in TYPES:
                y = torch.full((m, 1051), float("nan"), dtype=dtype, device="cuda")
                dealt = deal(m, 1051, k, variant, programs)
                partial = torch.empty(2 * dealt.programs * variant.rows * variant.columns, device="cuda")
                counters = torch.zeros(dealt.blocks, dtype=torch.int32, device="cuda")
                launch, stream = cuda_module.launcher("sm90_scaled_fp8"), torch.cuda.current_stream().cuda_stream
                operands = x_operand, cuda_sm90_fp8.weight_operand(on_gpu)
                cuda_sm90_fp8.multiply(module, launch, variant, *operands, k, None, y, dealt, partial, counters, stream)
                assert_as_good_as_fp8(y.cpu(), product(x, "fp8-g128", weight))
                assert not counters.any()
