"""Block-scaled products on Blackwell: who may run them, what their launchers are told, and the bits of the quantizer.

The quantizer runs in the emulator. The products were compiled but never run: here their launchers are stood in for by a
reference that reads the same addresses, and their machine code is searched for the instructions.
"""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import cuda_read
from build_tools import BuildError
from build_tools.nvcc import find_cutlass, find_nvcc
from quantlib.devices import Device, device_facts
from quantlib.dispatch import choices, problem_of
from quantlib.errors import KernelError
from quantlib.formats import Format, get_format
from quantlib.kernels import Problem, cuda_module, cuda_scaled, get_kernel
from quantlib.kernels.activations_launch import Activations
from quantlib.layouts.swizzled import swizzle, swizzled_size, unswizzle
from quantlib.tensor import QuantizedTensor
from quantlib.testing import assert_close, assert_same_bits, random_weight, relative_error
from tests.simt.build import build
from tests.simt.memory import allowed, block_order

ROOT = Path(__file__).parents[1]
FORMATS = ("nvfp4", "mxfp8", "mxfp8-ceil", "mxfp4", "mxfp4-ceil")
DTYPES = (torch.bfloat16, torch.float16)
PAIRS = (("nvfp4", "nvfp4"), ("nvfp4", "nvfp4-46"), ("mxfp8", "mxfp8"), ("mxfp8", "mxfp4"), ("mxfp4", "mxfp4-ceil"))
B200 = Device("cuda", "a B200", "sm_100", 148, 8000.0, 2250.0)
RTX = Device("cuda", "an RTX 5090", "sm_120", 170, 1792.0, 210.0)


def kernel_of(activations: str) -> cuda_scaled.CudaScaled:
    found = get_kernel("cuda_scaled_nvfp4" if activations == "nvfp4" else "cuda_scaled_mx")
    assert isinstance(found, cuda_scaled.CudaScaled)
    return found


def law(x: Tensor, fmt: Format, **options: Any) -> dict[str, Tensor]:
    parts = fmt.fit(x, **options)
    return {"codes": fmt.encode(x, parts), **parts}


def quantized_weight(spec: str, n: int, k: int) -> QuantizedTensor:
    fmt = get_format(spec)
    return QuantizedTensor(fmt, (n, k), law(random_weight(n, k), fmt))


# the quantizer, in the emulator


@lru_cache(maxsize=1)
def emulated() -> ModuleType:
    return build("quantize_simt", [ROOT / "tests" / "quantize_simt.cpp"])


def memory(address: int, count: int) -> Tensor:
    """`count` bytes at an address, shared."""
    return torch.frombuffer((ctypes.c_uint8 * count).from_address(address), dtype=torch.uint8)


class Stand:
    """In place of quantlib._cuda: quantizers of the emulator, and products by a reference that reads the addresses it is given.

    Every launch is noted in `launches`, by name, with its arguments.
    """

    def __init__(self) -> None:
        self.launches: list[tuple[str, tuple[Any, ...]]] = []

    def launcher(self, name: str) -> Callable[..., Any]:
        def launch(*arguments: Any) -> Any:
            self.launches.append((name, arguments))
            if name == "quantize_peaks":
                return emulated().quantize_peaks(*arguments)
            if name == "quantize_multiplier":
                return self.multiplier(arguments)
            if name.startswith("quantize_"):
                return self.quantize(name, arguments)
            if name.endswith("_workspace"):
                return 1000
            return self.product(name.split("_", 1)[1].removesuffix("_gemm"), arguments)

        return launch

    @staticmethod
    def rows(arguments: tuple[Any, ...]) -> Tensor:
        x, _, m, k, stride = arguments[:5]
        return memory(x, 2 * ((m - 1) * stride + k))

    def multiplier(self, arguments: tuple[Any, ...]) -> None:
        peaks, counter, multiplier, _ = arguments[5:]
        m, k = arguments[2:4]
        assert memory(counter, 4).view(torch.int32).item() == 0
        written = {
            "peaks": memory(peaks, 4 * emulated().quantize_peaks(m, k)),
            "counter": memory(counter, 4),
            "multiplier": memory(multiplier, 4),
        }
        with allowed(emulated(), {"x": self.rows(arguments)}, written):
            emulated().quantize_multiplier(*arguments)
        assert memory(counter, 4).view(torch.int32).item() == 0

    def quantize(self, name: str, arguments: tuple[Any, ...]) -> None:
        codes, scales, multiplier, _ = arguments[5:]
        m, k = arguments[2:4]
        fmt = get_format(name.removeprefix("quantize_").replace("_", "-"))
        read = {"x": self.rows(arguments)} | ({"multiplier": memory(multiplier, 4)} if multiplier else {})
        size = swizzled_size(*fmt.grid(m, k))
        written = {"codes": memory(codes, fmt.specs(m, k)["codes"].nbytes), "scales": memory(scales, size)}
        written["scales"].fill_(0xA5)
        with allowed(emulated(), read, written):
            getattr(emulated(), name)(*arguments)

    @staticmethod
    def operand(spec: str, codes: int, scales: int, multiplier: int, rows: int, k: int) -> Tensor:
        """The numbers [rows, k] of an operand, in fp64."""
        fmt = get_format(spec)
        assert fmt.padded(k) == k
        assert codes % 32 == 0
        parts = {"codes": memory(codes, fmt.specs(rows, k)["codes"].nbytes).view(rows, -1)}
        parts["scales"] = unswizzle(memory(scales, swizzled_size(*fmt.grid(rows, k))), *fmt.grid(rows, k))
        if multiplier:
            parts["global_scale"] = memory(multiplier, 4).view(torch.float32)[0]
        return fmt.decode(parts, rows, k).double()

    def product(self, pair: str, arguments: tuple[Any, ...]) -> None:
        _, w, w_scales, x, x_scales, w_global, x_global, bias, y, m, n, k, half, workspace, size, _, _, _ = arguments
        assert size == 1000
        assert workspace
        x_spec, w_spec = {"mxfp8_mxfp4": ("mxfp8", "mxfp4")}.get(pair, (pair, pair))
        result = self.operand(x_spec, x, x_scales, x_global, m, k) @ self.operand(w_spec, w, w_scales, w_global, n, k).T
        dtype = torch.float16 if half else torch.bfloat16
        if bias:
            result += memory(bias, 2 * n).view(dtype).double()
        memory(y, 2 * m * n).view(dtype).copy_(result.view(-1))


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    """quantlib._cuda's launchers stood in for, and held to be built for every chip."""
    made = Stand()
    monkeypatch.setattr(cuda_module, "launcher", made.launcher)
    monkeypatch.setattr(cuda_module, "refusal", lambda sources, capability: None)
    cuda_scaled.workspace_bytes.cache_clear()
    return made


def assert_law(x: Tensor, spec: str, **options: Any) -> Activations:
    """The kernel's codes, scales with their pad, and global scale are the law's, whatever the order of blocks."""
    fmt = get_format(spec)
    given = options.get("shared", {}).get("global_scale")
    expected = law(x, fmt, **options)
    with block_order(emulated(), "reverse"):
        found = cuda_scaled.quantize(x, fmt, given)
    assert_same_bits(found.codes, expected["codes"])
    assert_same_bits(found.scales, swizzle(expected["scales"]))
    if found.global_scale is not None:
        assert_same_bits(found.global_scale, expected["global_scale"])
    return found


SHAPES = ((1, 16), (3, 7), (9, 272), (131, 70), (5, 1060), (2, 2300))
"""Odd M, more than a tile of 128; K in whole blocks and off them, within a chunk of a warp and over several, over two blocks of
the first pass."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", FORMATS)
def test_the_quantizer_gives_the_bits_of_the_format(spec: str, dtype: torch.dtype, stand: Stand) -> None:
    generator = torch.Generator().manual_seed(3)
    for m, k in SHAPES:
        assert_law(torch.randn(m, k, generator=generator).to(dtype), spec)
        # Every exponent, subnormal numbers and both zeros in one block.
        patterns = torch.randint(0, 1 << 16, (m, k), generator=generator, dtype=torch.int32).to(torch.uint16).view(dtype)
        assert_law(torch.where(patterns.isfinite(), patterns, 0.0), spec)
        assert_law(torch.zeros(m, k, dtype=dtype), spec)


@pytest.mark.parametrize("size", [1e-44, 1e-41, 1e-38, 1e-30, 1e4, 1e30, 3e38])
@pytest.mark.parametrize("spec", FORMATS)
def test_the_quantizer_takes_very_small_and_very_large_numbers(spec: str, size: float, stand: Stand) -> None:
    x = torch.randn(3, 80, generator=torch.Generator().manual_seed(4)).clamp(-1, 1)
    assert_law((x * size).to(torch.bfloat16), spec)
    if size <= 1e4:
        assert_law((x * size).to(torch.float16), spec)


@pytest.mark.parametrize("spec", FORMATS)
def test_the_quantizer_takes_any_strides_and_reads_nothing_beside_x(spec: str, stand: Stand) -> None:
    """The emulator refuses every address outside of x."""
    wide = torch.randn(6, 290, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    for x in (wide[:3, ::2], wide[::2, :144], wide[:3, 1:146], wide[:, :5].T, wide[:1, :144].expand(3, 144), wide[:2, 8:88]):
        assert_law(x, spec)


@pytest.mark.parametrize("scale", [0.0007, 1e-41, 3e36])
def test_the_quantizer_takes_a_given_global_scale(scale: float, stand: Stand) -> None:
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)
    assert_law(x, "nvfp4", shared={"global_scale": torch.tensor(scale)})
    assert [name for name, _ in stand.launches] == ["quantize_nvfp4"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spec", FORMATS)
def test_a_block_that_is_not_finite_gets_the_scale_nan_and_no_other_does(spec: str, bad: float, stand: Stand) -> None:
    fmt = get_format(spec)
    x = torch.randn(3, 80, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
    x[1, 37] = bad
    given = torch.tensor(0.001) if spec == "nvfp4" else None
    found = cuda_scaled.quantize(x, fmt, given)
    scales = unswizzle(found.scales, *fmt.grid(3, 80))
    nan = 0x7F if spec == "nvfp4" else 0xFF
    block = 37 // (fmt.block.cols or 1)
    assert (scales == nan).nonzero().tolist() == [[1, block]]
    width = (fmt.block.cols or 1) * fmt.codec.bits // 8
    assert not found.codes[1, block * width : (block + 1) * width].any()
    if spec == "nvfp4":
        whole = cuda_scaled.quantize(x, fmt)
        assert bool(whole.global_scale is not None and whole.global_scale.isnan())


def test_many_rows_meet_in_one_global_scale(stand: Stand) -> None:
    """More rows than blocks of the first pass; the largest number in the last of them."""
    x = torch.zeros(1100, 16, dtype=torch.float16)
    x[-1, 5] = -3.0
    assert emulated().quantize_peaks(1100, 16) == 512
    assert_law(x, "nvfp4")


def test_an_empty_batch_launches_nothing(stand: Stand) -> None:
    fmt = get_format("nvfp4")
    assert cuda_scaled.quantize(torch.empty(0, 48, dtype=torch.bfloat16), fmt).codes.shape == fmt.specs(0, 48)["codes"].shape
    assert not stand.launches


# launches


def problem(activations: str | None, weight: str, device: Device, **changes: Any) -> Problem:
    asked = problem_of("linear", 4096, quantized_weight(weight, 32, 128), torch.bfloat16, activations)
    return replace(asked, **({"n": 8192, "k": 8192, "device": device} | changes))


@pytest.mark.parametrize("device", [B200, RTX], ids=lambda device: device.arch)
@pytest.mark.parametrize(("activations", "weight"), PAIRS)
def test_a_product_is_launched_on_what_it_multiplies(activations: str, weight: str, device: Device, stand: Stand) -> None:
    """From x to y through the addresses alone: order of operands, swizzled scales, global scales, bias, sizes."""
    kernel, fmt = kernel_of(activations), get_format(activations)
    for m, n, k, dtype in ((1, 40, 128, torch.bfloat16), (131, 136, 384, torch.float16)):
        packed = quantized_weight(weight, n, k)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
        bias = torch.randn(n, generator=torch.Generator().manual_seed(9)).to(dtype) if m > 1 else None
        asked = replace(problem_of("linear", m, packed, dtype, activations), device=device)
        assert kernel.supports(asked) is None
        y = kernel.run(asked, x, packed, bias)
        expected = fmt.decode(law(x, fmt), m, k).double() @ packed.dequantize().double().T
        assert_close(y, expected if bias is None else expected + bias.double())
        name, arguments = stand.launches[-1]
        pair = kernel.pair(fmt, packed.format)
        assert pair is not None
        assert name == f"{cuda_scaled.CHIPS[device.capability]}_{pair.name}_gemm"
        assert arguments[0] in {tile.name for tile in cuda_scaled.tiles_of(cuda_scaled.CHIPS[device.capability], pair)}
        assert arguments[9:13] == (m, n, k, dtype == torch.float16)
        assert arguments[15] == device.units


def test_columns_are_counted_with_the_pad_of_whole_blocks(stand: Stand) -> None:
    packed, x = quantized_weight("nvfp4", 16, 20), torch.randn(3, 20).to(torch.bfloat16)
    asked = replace(problem_of("linear", 3, packed, torch.bfloat16, "nvfp4"), device=B200)
    fmt = get_format("nvfp4")
    assert_close(
        kernel_of("nvfp4").run(asked, x, packed, None), fmt.decode(law(x, fmt), 3, 20).double() @ packed.dequantize().double().T
    )
    assert stand.launches[-1][1][11] == 32


def test_a_weight_is_swizzled_once(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(cuda_scaled, "swizzle", lambda scales: calls.append(scales) or swizzle(scales))
    packed, x = quantized_weight("mxfp8", 16, 64), torch.randn(3, 64).to(torch.bfloat16)
    asked = replace(problem_of("linear", 3, packed, torch.bfloat16, "mxfp8"), device=B200)
    for _ in range(3):
        kernel_of("mxfp8").run(asked, x, packed, None)
    assert len(calls) == 1
    monkeypatch.setattr(cuda_scaled, "_capturing", lambda device: True)
    other = quantized_weight("mxfp8", 16, 64)
    cuda_scaled.weight_operand(other)
    assert "cuda_scaled" not in other.memo


def test_operands_off_32_bytes_are_copied(stand: Stand) -> None:
    packed = quantized_weight("mxfp8", 16, 64)
    room = torch.empty(16 * 64 + 1, dtype=torch.uint8)
    packed.parts["codes"] = room[1:].view(16, 64).copy_(packed.parts["codes"])
    x, bias = torch.randn(3, 64).to(torch.bfloat16), torch.randn(17).to(torch.bfloat16)[1:]
    asked = replace(problem_of("linear", 3, packed, torch.bfloat16, "mxfp8"), device=B200)
    kernel_of("mxfp8").run(asked, x, packed, bias)
    assert all(address % 32 == 0 for address in stand.launches[-1][1][1:9])


def test_an_nvfp4_result_is_told_its_scale(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = quantized_weight("nvfp4", 64, 64), torch.randn(3, 64).to(torch.bfloat16)
    a = cuda_scaled.quantize(x, get_format("nvfp4"))
    monkeypatch.setattr(stand, "product", lambda pair, arguments: seen.append((pair, arguments)))
    seen: list[tuple[str, tuple[Any, ...]]] = []
    found = cuda_scaled.multiply_quantized(a, packed, None, torch.tensor(0.25), 120, 170)
    assert found.shape == (3, 64)
    assert found.global_scale is not None
    assert float(found.global_scale) == 0.25
    assert not found.scales.any(), "the hardware reads the pad"
    [(name, arguments)] = seen
    assert name == "nvfp4_quantizing"
    assert arguments[9:13] == (3, 64, 64, 170)
    assert arguments[6:8] == (found.codes.data_ptr(), found.scales.data_ptr())
    with pytest.raises(KernelError, match="N in multiples of 64; asked for nvfp4 times nvfp4, N=40"):
        cuda_scaled.multiply_quantized(a, quantized_weight("nvfp4", 40, 64), None, torch.tensor(0.25), 120, 170)
    with pytest.raises(KernelError, match="N=64 on sm_90"):
        cuda_scaled.multiply_quantized(a, packed, None, torch.tensor(0.25), 90, 132)


# choosing


REFUSALS = (
    (problem(None, "nvfp4", B200), "none are asked for"),
    (problem("mxfp8", "mxfp8-e5m2", B200), "not for mxfp8 activations and mxfp8-e5m2 weights"),
    (problem("mxfp4", "mxfp8", B200), "not for mxfp4 activations and mxfp8 weights"),
    (problem("nvfp4", "int4-g128", B200), "nvfp4 weights, not with int4-g128"),
    (problem("nvfp4-46", "nvfp4", B200), "no kernel quantizes activations to nvfp4-46"),
    (problem("nvfp4", "nvfp4", device_facts("cpu")), "needs a CUDA device"),
    (problem("nvfp4", "nvfp4", replace(B200, arch="sm_90", name="an H100")), "need sm_100, 103, 120 or 121; an H100 is sm_90"),
    (problem("nvfp4", "nvfp4", replace(B200, arch="sm_110")), "need sm_100, 103, 120 or 121"),
    (problem("nvfp4", "nvfp4", B200, dtype=torch.float32), "gives fp16 or bf16, not float32"),
    (problem("nvfp4", "nvfp4", B200, layout="fragments"), "reads the rows layout"),
    (problem("nvfp4", "nvfp4", B200, n=4100), "N in multiples of 8"),
    (problem("nvfp4", "nvfp4", B200, k=4112), "of 32; the weight is [8192, 4112]"),
    (problem("mxfp8", "mxfp4", RTX, k=4128), "of 128; the weight is [8192, 4128]"),
    (problem("nvfp4", "nvfp4", RTX, k=0), "the weight is [8192, 0]"),
    (problem("nvfp4", "nvfp4", RTX, batch_invariant=True), "one scale for the whole batch"),
)


@pytest.mark.parametrize(("asked", "words"), REFUSALS, ids=lambda value: value if isinstance(value, str) else "")
def test_refusals_say_why(asked: Problem, words: str, stand: Stand) -> None:
    kernel = kernel_of("nvfp4" if asked.activations is None else asked.activations.split("-")[0])
    assert words in str(kernel.supports(asked))
    assert not stand.launches


def test_a_module_that_was_not_built_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("sm100", "common/quantize"):
        monkeypatch.setattr(
            cuda_module, "refusal", lambda sources, capability, missing=missing: f"no {sources}" if sources == missing else None
        )
        assert kernel_of("nvfp4").supports(problem("nvfp4", "nvfp4", B200)) == f"no {missing}"


def test_a_cpu_problem_loads_no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object) -> str:
        raise AssertionError("quantlib._cuda was asked for")

    monkeypatch.setattr(cuda_module, "refusal", loaded)
    for kernel in (kernel_of("nvfp4"), kernel_of("mxfp8")):
        assert kernel.supports(problem("nvfp4", "nvfp4", device_facts("cpu"))) is not None
        assert kernel.supports(problem("mxfp8", "mxfp8", device_facts("cpu"))) is not None


@pytest.mark.parametrize("capability", [100, 103, 120, 121])
@pytest.mark.parametrize(("activations", "weight"), PAIRS)
def test_every_blackwell_chip_runs_every_pair(activations: str, weight: str, capability: int, stand: Stand) -> None:
    device = replace(B200 if capability < 110 else RTX, arch=f"sm_{capability}")
    for changes in ({}, {"m": 1}, {"batch_invariant": activations != "nvfp4"}, {"dtype": torch.float16}):
        asked = problem(activations, weight, device, **changes)
        assert kernel_of(activations).supports(asked) is None
        assert 0 < kernel_of(activations).cost(asked) < math.inf


@pytest.mark.parametrize(
    ("device", "m", "n", "k", "tile"),
    [
        (B200, 1, 4096, 14336, "narrow"),
        (B200, 32, 4096, 8192, "narrow"),
        (B200, 16384, 8192, 8192, "wide"),
        (RTX, 1, 4096, 14336, "narrow"),
        (RTX, 8192, 8192, 8192, "wide"),
    ],
)
def test_tiles_follow_the_batch(device: Device, m: int, n: int, k: int, tile: str) -> None:
    asked = problem("nvfp4", "nvfp4", device, m=m, n=n, k=k)
    chip = cuda_scaled.CHIPS[device.capability]
    assert cuda_scaled.best_tile(asked, chip, cuda_scaled.NVFP4, 4.0).name == tile


def test_a_batch_invariant_tile_is_one_for_all_batches() -> None:
    for chip, device in (("sm100", B200), ("sm120", RTX)):
        for pair in cuda_scaled.MX:
            asked = problem("mxfp8", "mxfp8", device, batch_invariant=True)
            tiles = {cuda_scaled.best_tile(replace(asked, m=m), chip, pair, 2.0) for m in (1, 17, 300, 9000)}
            assert len(tiles) == 1
            assert not tiles.pop().shares_k


def test_predicted_times_lie_between_the_floor_and_a_few_times_it() -> None:
    for device in (B200, RTX):
        for m in (1, 16, 64, 256, 1024, 8192):
            asked = problem("nvfp4", "nvfp4", device, m=m)
            floor = max(
                asked.format.nbytes(asked.n, asked.k) / (device.bandwidth * 1e3),
                2 * m * asked.n * asked.k / (device.peak_tflops * 4e6),
            )
            assert floor < kernel_of("nvfp4").cost(asked) < 6 * floor


def test_explanations_name_both_kernels(stand: Stand) -> None:
    found = {choice.kernel: choice for choice in choices(problem("nvfp4", "nvfp4", B200))}
    assert found["cuda_scaled_nvfp4"].refusal is None
    assert "takes other activations than nvfp4" in str(found["cuda_scaled_mx"].refusal)


# the epilogue's arithmetic, on the CPU


@pytest.fixture(scope="module")
def finish(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tensor]:
    """csrc/cuda/common/finish.h as the C++ compiler behind nvcc makes it: sum fp32, alpha, bias -> y of bias's dtype."""
    try:
        nvcc, cutlass = find_nvcc(os.environ), find_cutlass(os.environ)
    except BuildError as error:
        pytest.skip(str(error))
    target = tmp_path_factory.mktemp("finish") / "finish.so"
    include = [f"-I{path}" for path in (ROOT / "csrc" / "cuda" / "common", *cutlass.include)]
    flags = ["-std=c++17", "-x", "cu", "-arch=sm_80", "-shared", "-Xcompiler", "-fPIC", *include]
    subprocess.run([nvcc.path, *flags, ROOT / "tests" / "finish_host.cpp", "-o", target], check=True, capture_output=True)
    library = ctypes.CDLL(str(target))

    def run(sums: Tensor, alpha: float, bias: Tensor) -> Tensor:
        y = torch.empty_like(bias)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (sums, bias, y)]
        half = bias.dtype == torch.float16
        library.finish(pointers[0], ctypes.c_float(alpha), *pointers[1:], len(sums), ctypes.c_bool(half))
        return y

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_become_16_bits_with_one_rounding(dtype: torch.dtype, finish: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(8)
    sums = torch.randn(1 << 16, generator=generator) * torch.randint(0, 100000, (1 << 16,), generator=generator)
    bias = torch.randn(1 << 16, generator=generator).to(dtype)
    alpha = torch.tensor(0.37)
    assert_same_bits(finish(sums, float(alpha), bias), (sums.double() * alpha.double() + bias.double()).float().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_16_bit_number_passes_unchanged(dtype: torch.dtype, finish: Callable[..., Tensor]) -> None:
    """As a sum and as a bias: subnormal, infinite, NaN. fp16 goes through a conversion to bf16 as opaque bits."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    zeros = torch.zeros_like(numbers)
    for y in (finish(numbers.float(), 1.0, zeros), finish(zeros.float(), 1.0, numbers)):
        assert_same_bits(y.isnan(), numbers.isnan())
        assert_same_bits(torch.where(y.isnan(), 0, y), torch.where(numbers.isnan(), 0, numbers + 0))


# what was compiled


E2M1_SM120 = {"OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X", "OMMA.SF.16864.F32.E2M1.E2M1.E8"}
INSTRUCTIONS = {
    "sm100/fp4_narrow.cu": {"UTCOMMA.4X", "UTCOMMA"},
    "sm100/fp4_middle.cu": {"UTCOMMA.2CTA.4X", "UTCOMMA.2CTA"},
    "sm100/fp4_wide.cu": {"UTCOMMA.2CTA.4X", "UTCOMMA.2CTA"},
    "sm100/fp8_narrow.cu": {"UTCQMMA"},
    "sm100/fp8_middle.cu": {"UTCQMMA.2CTA"},
    "sm100/fp8_wide.cu": {"UTCQMMA.2CTA"},
    "sm100/nvfp4_quantizing.cu": {"UTCOMMA.2CTA.4X"},
    "sm120/fp4_narrow.cu": E2M1_SM120,
    "sm120/fp4_wide.cu": E2M1_SM120,
    "sm120/fp8_narrow.cu": {"QMMA.SF.16832.F32.E4M3.E4M3.E8", "QMMA.SF.16832.F32.E2M1.E4M3.E8"},
    "sm120/nvfp4_quantizing.cu": {"OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X"},
}
"""Source -> the only tensor-core instructions that its kernels may hold. 4X is a scale per 16 of K: `kind::mxf4nvf4` with
`scale_vec::4X`, NVFP4's. Compiled for the plain sm_100 or sm_120 a kernel of CUTLASS would hold none."""


def test_the_table_of_instructions_names_every_source() -> None:
    sources = [path for chip in ("sm100", "sm120") for path in (ROOT / "csrc" / "cuda" / chip).glob("*.cu")]
    assert {f"{path.parent.name}/{path.name}" for path in sources} == set(INSTRUCTIONS)


@lru_cache(maxsize=1)
def compiled() -> cuda_read.Table:
    known = cuda_module.facts()
    return cuda_read.read_module(Path(cuda_module.module().__file__), known["kernels"])


@pytest.mark.skipif(cuda_module.unavailable() is not None, reason=str(cuda_module.unavailable()))
@pytest.mark.parametrize("source", INSTRUCTIONS)
def test_compiled_kernels_hold_their_instruction_and_spill_nothing(source: str) -> None:
    kernels = compiled().get(source)
    if kernels is None:
        pytest.skip(f"quantlib._cuda was built without {source}")
    rows = [row for targets in kernels.values() for row in targets.values()]
    assert all(len(row.instructions) == 1 for row in rows)
    assert {row.instructions[0] for row in rows} == INSTRUCTIONS[source]
    assert not any(row.spills or row.stack for row in rows)


@pytest.mark.skipif(cuda_module.unavailable() is not None, reason=str(cuda_module.unavailable()))
@pytest.mark.parametrize("capability", [100, 120])
def test_compiled_products_say_what_room_they_need_and_what_is_wrong(capability: int) -> None:
    """Host code alone: it runs without a GPU, whose absence is an error like others. Only tiles that share K ask for room."""
    chip = cuda_scaled.CHIPS[capability]
    if chip not in cuda_module.facts().get("families", ()):
        pytest.skip(f"quantlib._cuda was built without {chip}")
    for pair in (cuda_scaled.NVFP4, *cuda_scaled.MX):
        room = cuda_module.launcher(f"{chip}_{pair.name}_workspace")
        for tile in cuda_scaled.tiles_of(chip, pair):
            assert (room(tile.name, 1, 4096, 16384, 148, True) > 0) == tile.shares_k
            assert room(tile.name, 1, 4096, 16384, 148, False) == 0
        multiply = cuda_module.launcher(f"{chip}_{pair.name}_gemm")
        with pytest.raises(KernelError, match="was not built with the tile square"):
            multiply("square", *(0,) * 8, 1, 64, 128, False, 0, 0, 148, True, 0)
        wrong = (
            "codes of W must lie at a multiple of 32 bytes" if torch.cuda.is_available() else "driver|no CUDA-capable device"
        )
        with pytest.raises(KernelError, match=rf"{chip}_{pair.name}_narrow\(M=1, N=64, K=128\): .*({wrong})"):
            multiply("narrow", *(0,) * 8, 1, 64, 128, False, 0, 0, 148, True, 0)


# on a GPU


def here(activations: str, weight: QuantizedTensor, m: int, dtype: torch.dtype, **changes: Any) -> Problem:
    """The problem on this machine's GPU; skips the test where its kernels don't run there."""
    asked = replace(problem_of("linear", m, weight, dtype, activations), **changes)
    refusal = kernel_of(activations).supports(asked)
    if refusal is not None:
        pytest.skip(refusal)
    return asked


@pytest.mark.gpu
@pytest.mark.parametrize("spec", FORMATS)
def test_the_quantizer_on_a_gpu(spec: str) -> None:
    refusal = cuda_module.refusal("common/quantize", device_facts("cuda").capability)
    if refusal is not None:
        pytest.skip(refusal)
    fmt = get_format(spec)
    for dtype in DTYPES:
        for m, k in (*SHAPES, (517, 4112)):
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
            expected, found = law(x, fmt), cuda_scaled.quantize(x.cuda(), fmt)
            assert_same_bits(found.codes.cpu(), expected["codes"])
            assert_same_bits(found.scales.cpu(), swizzle(expected["scales"]))
            if found.global_scale is not None:
                assert_same_bits(found.global_scale.cpu(), expected["global_scale"])


@pytest.mark.gpu
@pytest.mark.parametrize(("activations", "weight"), PAIRS)
def test_products_on_a_gpu(activations: str, weight: str) -> None:
    """Every tile, with and without shared K, rows and columns off the tiles."""
    fmt, packed = get_format(activations), quantized_weight(weight, 1048, 1536).to("cuda")
    kernel = kernel_of(activations)
    for m in (1, 16, 33, 64, 130, 500, 2100):
        for dtype in DTYPES:
            asked = here(activations, packed, m, dtype)
            x = torch.randn(m, 1536, generator=torch.Generator().manual_seed(m)).to(dtype)
            bias = torch.randn(1048, generator=torch.Generator().manual_seed(9)).to(dtype)
            decoded = fmt.decode(law(x, fmt), m, 1536).double().cuda()
            expected = decoded @ packed.dequantize().double().T + bias.cuda().double()
            pair, chip = kernel.pair(fmt, packed.format), cuda_scaled.CHIPS[asked.device.capability]
            assert pair is not None
            for tile in cuda_scaled.tiles_of(chip, pair):
                for shares in {tile.shares_k, False}:
                    y = torch.empty(m, 1048, dtype=dtype, device="cuda")
                    a, used = cuda_scaled.quantize(x.cuda(), fmt), replace(tile, shares_k=shares)
                    cuda_scaled.multiply(a, packed, bias.cuda(), y, pair, chip, used, asked.device.units)
                    assert_close(y, expected)


@pytest.mark.gpu
def test_what_a_product_refuses_on_a_gpu() -> None:
    packed = quantized_weight("nvfp4", 1048, 1536).to("cuda")
    chip = cuda_scaled.CHIPS[here("nvfp4", packed, 1, torch.bfloat16).device.capability]
    multiply, anywhere = cuda_module.launcher(f"{chip}_nvfp4_gemm"), packed.parts["codes"].data_ptr()
    with pytest.raises(KernelError, match=r"needs a workspace of \d+ bytes"):
        multiply("narrow", *(anywhere,) * 8, 1, 1024, 16384, False, 0, 0, 148, True, 0)
    with pytest.raises(KernelError, match="N or K isn't a multiple"):
        multiply("narrow", *(anywhere,) * 8, 1, 1028, 16384, False, 0, 0, 148, False, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("activations", ["mxfp8", "mxfp4"])
def test_batch_invariant_products_on_a_gpu(activations: str) -> None:
    packed, x = quantized_weight(activations, 1048, 1536).to("cuda"), torch.randn(300, 1536).to(torch.bfloat16).cuda()
    kernel = kernel_of(activations)
    whole = kernel.run(here(activations, packed, 300, torch.bfloat16, batch_invariant=True), x, packed, None)
    for rows in (slice(0, 1), slice(17, 40), slice(100, 300)):
        asked = here(activations, packed, len(x[rows]), torch.bfloat16, batch_invariant=True)
        assert_same_bits(kernel.run(asked, x[rows], packed, None), whole[rows])


@pytest.mark.gpu
def test_an_nvfp4_result_on_a_gpu() -> None:
    """Its scales are the format's, its codes at most a step off."""
    fmt, packed, x = (
        get_format("nvfp4"),
        quantized_weight("nvfp4", 1024, 1536).to("cuda"),
        torch.randn(130, 1536).to(torch.bfloat16),
    )
    device = here("nvfp4", packed, 130, torch.bfloat16).device
    y = fmt.decode(law(x, fmt), 130, 1536).cuda() @ packed.dequantize().T
    scale = fmt.fit_shared(y)["global_scale"]
    found = cuda_scaled.multiply_quantized(
        cuda_scaled.quantize(x.cuda(), fmt), packed, None, scale, device.capability, device.units
    )
    parts = {"codes": found.codes, "scales": unswizzle(found.scales, *fmt.grid(130, 1024)), "global_scale": scale}
    assert relative_error(fmt.decode(parts, 130, 1024), y) < 1.05 * relative_error(fmt.decode(law(y, fmt), 130, 1024), y)
