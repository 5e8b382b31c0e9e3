"""Native block-scaled products on Blackwell: x quantized by csrc/cuda/common/quantize.h, multiplied with NVFP4 and MX weights
by CUTLASS's kernels in csrc/cuda/sm100 and sm120.

Both operands lie as in the rows layout; block scales are in the 128x4 order (quantlib.layouts.swizzled): the quantizer writes
those of x so, those of a weight are brought into it once and kept with the weight. NVFP4's global scales are read and
multiplied on the GPU alone.

Status of the products: compiled, their machine code inspected, never run, for want of a GPU. The quantizer runs in the
emulator, bit for bit as the formats say.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantlib.errors import KernelError
from quantlib.formats.base import Format
from quantlib.kernels import cuda_module
from quantlib.kernels.activations import activations_of, native_speedup
from quantlib.kernels.activations_launch import Activations, element_of, empty_activations, pair_refusal
from quantlib.kernels.base import Kernel, Problem, register_kernel
from quantlib.kernels.costs import CLOCK, LATENCY, MEETING, packed_bytes, tuned_efficiency
from quantlib.kernels.workspace import split_workspace
from quantlib.layouts.swizzled import swizzle
from quantlib.tensor import QuantizedTensor

DTYPES = (torch.float16, torch.bfloat16)

CHIPS = {100: "sm100", 103: "sm100", 120: "sm120", 121: "sm120"}
"""Compute capability -> the folder of csrc/cuda whose code runs there."""

INGEST = 64
"""Bytes per clock that one multiprocessor takes in from the L2 cache."""

N_MULTIPLE = 8
"""Rows of y are stored in pieces of 16 bytes, which tensor copies want at multiples of 16."""


@dataclass(frozen=True)
class Pair:
    """Formats that one set of kernels multiplies, by the elements of their codes.

    k_multiple   stored columns, K in whole blocks, come in multiples of so many: 16 bytes of each operand; 128 columns where
                 E2M1 is spread to bytes beside E4M3
    """

    name: str
    activations: str
    weight: str
    k_multiple: int


NVFP4 = Pair("nvfp4", "e2m1", "e2m1", 32)
MX = (Pair("mxfp4", "e2m1", "e2m1", 32), Pair("mxfp8", "e4m3", "e4m3", 16), Pair("mxfp8_mxfp4", "e4m3", "e2m1", 128))


@dataclass(frozen=True)
class Tile:
    """A compiled shape, as csrc/cuda/sm*/tiles.h has it: n rows of W and m rows of x by `multiprocessors` together.

    shares_k     tiles that don't fill the chip are shared along K (stream-K)
    share        of the peak that the tile can reach: smaller ones read operands more often from shared memory (estimates)
    in_flight    bytes of operands that one multiprocessor has under way
    """

    name: str
    n: int
    m: int
    multiprocessors: int
    shares_k: bool
    share: float
    in_flight: int


_SM100 = (
    Tile("narrow", 128, 64, 1, True, 0.6, 190_000),
    Tile("middle", 256, 128, 2, False, 0.85, 190_000),
    Tile("wide", 256, 256, 2, False, 1.0, 190_000),
)
_SM120_E2M1 = (Tile("narrow", 128, 128, 1, True, 0.85, 80_000), Tile("wide", 256, 128, 1, False, 1.0, 80_000))
_SM120 = (Tile("narrow", 128, 128, 1, True, 1.0, 64_000),)


def tiles_of(chip: str, pair: Pair) -> tuple[Tile, ...]:
    """What was compiled for a chip and a pair, the narrowest first."""
    if chip == "sm100":
        return _SM100
    return _SM120_E2M1 if (pair.activations, pair.weight) == ("e2m1", "e2m1") else _SM120


def tile_cost(problem: Problem, tile: Tile, speedup: float) -> float:
    """Predicted microseconds of the product with a tile at the model's full speed; `speedup`: its peak as a multiple of the
    16-bit one. Operands are read at the pace that the multiprocessors at work can ask for; a tile's padding is multiplied like
    numbers."""
    device = problem.device
    slots = max(1, device.units // tile.multiprocessors)
    across = -(-problem.m // tile.m)
    tiles = -(-problem.n // tile.n) * across
    programs = min(slots, tiles * -(-problem.k // 512)) if tile.shares_k else tiles
    fill = programs / (-(-programs // slots) * slots)
    compute = 2 * tiles * tile.n * tile.m * problem.k / (device.peak_tflops * 1e6 * speedup * tile.share) / fill
    asking = min(programs, slots) * tile.multiprocessors * min(tile.in_flight / LATENCY, INGEST * CLOCK * 1e3)
    fmt = activations_of(problem)
    x = 0 if fmt is None else fmt.nbytes(problem.m, problem.k)
    y = problem.m * problem.n * problem.dtype.itemsize
    # Further columns of tiles find most of the weight in the L2 cache, which has some four times the bandwidth.
    moved = packed_bytes(problem) * (1 + (across - 1) / 4) + x + y
    sums = 4 * programs * tile.n * min(tile.m, problem.m) if tile.shares_k and tiles % programs else 0
    memory = (moved + sums) / min(device.bandwidth * 1e3, asking)
    return max(memory, compute) + (MEETING if sums else 0.0)


@lru_cache(maxsize=4096)
def best_tile(problem: Problem, chip: str, pair: Pair, speedup: float) -> Tile:
    """The tile with the least predicted cost; where no row may depend on its batch one for all, whose K nobody shares."""
    tiles = tiles_of(chip, pair)
    if problem.batch_invariant:
        return replace(tiles[-1], shares_k=False)
    return min(tiles, key=lambda tile: tile_cost(problem, tile, speedup))


def quantizing_cost(problem: Problem, fmt: Format) -> float:
    """Predicted microseconds of quantizing x; NVFP4's global scale takes a pass of its own."""
    passes = 2 if fmt.scale.kind == "e4m3_global" else 1
    moved = passes * problem.m * problem.k * problem.dtype.itemsize + fmt.nbytes(problem.m, problem.k)
    return moved / (problem.device.bandwidth * 1e3) / tuned_efficiency(problem.device, "cuda_quantize", 0.7)


# launches


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """The context in which launchers find `device` to be the current one."""
    current = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if current else torch.cuda.device(device)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _aligned(tensor: Tensor) -> Tensor:
    """The same numbers, contiguous, at a multiple of 32 bytes, which tensor copies that spread E2M1 to bytes want."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 32 == 0 else tensor.clone()


def quantize(x: Tensor, fmt: Format, global_scale: Tensor | None = None) -> Activations:
    """x [M, K], fp16 or bf16, any strides -> its codes and swizzled scales, bit for bit those of `fmt.fit` and `fmt.encode`.

    fmt            nvfp4, mxfp8 or mxfp4 (also -ceil)
    global_scale   nvfp4: a given fp32 multiplier instead of the one that x itself leads to
    """
    m, k = x.shape
    out = empty_activations(fmt, m, k, x.device, swizzled=True)
    multiplier = out.global_scale
    if multiplier is not None and global_scale is not None:
        multiplier.copy_(global_scale)
    if m == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    operand = (x.data_ptr(), x.dtype == torch.float16, m, k, x.stride(0))
    stream = _stream(x.device)
    if multiplier is not None and global_scale is None:
        count = cuda_module.launcher("quantize_peaks")(m, k)
        peaks, counter = split_workspace(count + 1, 1, 1, 1, x.device)
        launch = cuda_module.launcher("quantize_multiplier")
        launch(*operand, _address(peaks), _address(counter), _address(multiplier), stream)
    launch = cuda_module.launcher("quantize_" + fmt.name.replace("-", "_"))
    launch(*operand, _address(out.codes), _address(out.scales), _address(multiplier), stream)
    return out


@dataclass(frozen=True)
class WeightOperand:
    """A weight as the products read it: codes of the rows layout, scales in the 128x4 order, the global scale or None."""

    codes: Tensor
    scales: Tensor
    global_scale: Tensor | None


def weight_operand(weight: QuantizedTensor) -> WeightOperand:
    """The weight's operand, made at the first call and kept with it. Its swizzled scales take 1/8 (nvfp4) or 1/16 (mxfp4) of
    the room of the codes once more."""
    found = weight.memo.get("cuda_scaled")
    if isinstance(found, WeightOperand):
        return found
    parts = weight.parts
    made = WeightOperand(_aligned(parts["codes"]), swizzle(parts["scales"]), parts.get("global_scale"))
    # What is made while a CUDA graph is captured exists only when the graph is replayed.
    if not _capturing(weight.device):
        weight.memo["cuda_scaled"] = made
    return made


@lru_cache(maxsize=1024)
def workspace_bytes(function: str, tile: Tile, m: int, n: int, k: int, sms: int) -> int:
    """Scratch memory of a product."""
    return int(cuda_module.launcher(function)(tile.name, m, n, k, sms, tile.shares_k))


def multiply(
    a: Activations, weight: QuantizedTensor, bias: Tensor | None, y: Tensor, pair: Pair, chip: str, tile: Tile, sms: int
) -> None:
    """a [M, K] times W^T plus bias [N] -> y [M, N], contiguous, fp16 or bf16."""
    (m, n), operand = y.shape, weight_operand(weight)
    k = a.format.padded(a.shape[1])
    size = workspace_bytes(f"{chip}_{pair.name}_workspace", tile, m, n, k, sms)
    workspace = torch.empty(size, dtype=torch.uint8, device=y.device) if size else None
    if bias is not None:
        bias = _aligned(bias.to(y.dtype))
    cuda_module.launcher(f"{chip}_{pair.name}_gemm")(
        tile.name,
        _address(operand.codes),
        _address(operand.scales),
        _address(a.codes),
        _address(a.scales),
        _address(operand.global_scale),
        _address(a.global_scale),
        _address(bias),
        _address(y),
        m,
        n,
        k,
        y.dtype == torch.float16,
        _address(workspace),
        size,
        sms,
        tile.shares_k,
        _stream(y.device),
    )


def multiply_quantized(
    a: Activations, weight: QuantizedTensor, bias: Tensor | None, global_scale: Tensor, capability: int, sms: int
) -> Activations:
    """NVFP4 a [M, K] times W^T plus bias [N] (bf16) -> NVFP4 [M, N] with the given fp32 global scale, in one kernel.

    A block's scale is its largest magnitude / (6 global_scale), rounded to E4M3; codes are made with an approximate inverse of
    that scale, so that here and there one differs by a step from the format's own. Raises KernelError where N isn't a multiple
    of 64, or the chip or the formats are others.
    """
    n = weight.shape[0]
    chip = CHIPS.get(capability)
    if chip is None or n % 64 or {a.format.scale.kind, weight.format.scale.kind} != {"e4m3_global"}:
        raise KernelError(
            f"an NVFP4 result is written for nvfp4 operands on sm_100 and sm_120, N in multiples of 64; "
            f"asked for {a.format} times {weight.format}, N={n} on sm_{capability}"
        )
    (m, k), operand = a.shape, weight_operand(weight)
    device = a.codes.device
    out = empty_activations(a.format, m, n, device, swizzled=True)
    out.scales.zero_()
    assert out.global_scale is not None
    assert a.global_scale is not None
    assert operand.global_scale is not None
    out.global_scale.copy_(global_scale)
    if m == 0:
        return out
    alpha, inverse = a.global_scale * operand.global_scale, out.global_scale.reciprocal()
    bias = None if bias is None else _aligned(bias.to(torch.bfloat16))
    cuda_module.launcher(f"{chip}_nvfp4_quantizing_gemm")(
        _address(operand.codes),
        _address(operand.scales),
        _address(a.codes),
        _address(a.scales),
        _address(alpha),
        _address(bias),
        _address(out.codes),
        _address(out.scales),
        _address(inverse),
        m,
        n,
        a.format.padded(k),
        sms,
        _stream(device),
    )
    return out


# kernels


class CudaScaled(Kernel):
    """x quantized, then multiplied by tcgen05 (sm_100, 103) or mma.sync (sm_120, 121) with block scales."""

    backend = "cuda"
    operation = "linear"
    scale: ClassVar[str]
    """The kind of the activations' scales."""
    pairs: ClassVar[tuple[Pair, ...]]

    def pair(self, fmt: Format, weight: Format) -> Pair | None:
        """The pair of the two formats, or None where there is no kernel for them."""
        elements = element_of(fmt), element_of(weight)
        return next((pair for pair in self.pairs if (pair.activations, pair.weight) == elements), None)

    def supports(self, problem: Problem) -> str | None:
        fmt, device = activations_of(problem), problem.device
        if fmt is None:
            return "multiplies quantized activations; none are asked for"
        if fmt.scale.kind != self.scale:
            return f"takes other activations than {fmt}"
        refusal = pair_refusal(fmt, problem.format)
        if refusal is not None:
            return refusal
        pair = self.pair(fmt, problem.format)
        if pair is None:
            names = ", ".join(pair.name.replace("_", " times ") for pair in self.pairs)
            return f"was built for {names}; not for {fmt} activations and {problem.format} weights"
        if device.kind != "cuda":
            return "needs a CUDA device"
        chip = CHIPS.get(device.capability)
        if chip is None:
            return f"block-scaled products need sm_100, 103, 120 or 121; {device.name} is {device.arch}"
        return _problem_refusal(problem, fmt, pair) or (
            cuda_module.refusal(chip, device.capability) or cuda_module.refusal("common/quantize", device.capability)
        )

    def cost(self, problem: Problem) -> float:
        fmt, chip = activations_of(problem), CHIPS.get(problem.device.capability)
        pair = None if fmt is None else self.pair(fmt, problem.format)
        if fmt is None or pair is None or chip is None:
            return math.inf
        speedup = native_speedup(fmt, problem.format)
        product = tile_cost(problem, best_tile(problem, chip, pair, speedup), speedup)
        return quantizing_cost(problem, fmt) + product / tuned_efficiency(problem.device, self.name, 0.7)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(x.shape[0], weight.shape[0])
        fmt, device = activations_of(problem), problem.device
        if y.numel() == 0 or fmt is None:
            return y
        chip, pair = CHIPS[device.capability], self.pair(fmt, weight.format)
        assert pair is not None
        tile = best_tile(problem, chip, pair, native_speedup(fmt, weight.format))
        with _on(x.device):
            multiply(quantize(x, fmt), weight, bias, y, pair, chip, tile, device.units)
        return y


def _problem_refusal(problem: Problem, fmt: Format, pair: Pair) -> str | None:
    """What the kernels of a pair can't do of a problem on a chip that they run on, or None."""
    if problem.dtype not in DTYPES:
        return f"gives fp16 or bf16, not {str(problem.dtype).removeprefix('torch.')}"
    if problem.layout != "rows":
        return f"reads the rows layout; the weight lies in {problem.layout!r}"
    columns = problem.format.padded(problem.k)
    if problem.n % N_MULTIPLE or columns % pair.k_multiple or not columns:
        return (
            f"tensor copies need N in multiples of {N_MULTIPLE} and the stored columns, K in whole blocks, of "
            f"{pair.k_multiple}; the weight is [{problem.n}, {problem.k}]"
        )
    if problem.batch_invariant and fmt.scale.kind == "e4m3_global":
        return f"{fmt} has one scale for the whole batch, and batch_invariant is set"
    return None


class CudaScaledNvfp4(CudaScaled):
    """NVFP4 activations and weights."""

    name = "cuda_scaled_nvfp4"
    scale = "e4m3_global"
    pairs = (NVFP4,)
    scaling = "codes and block scales multiplied by the tensor cores; global scales multiply fp32 sums"


class CudaScaledMx(CudaScaled):
    """MXFP4 and MXFP8 (E4M3) activations and weights, but MXFP4 activations with MXFP8 weights."""

    name = "cuda_scaled_mx"
    scale = "e8m0"
    pairs = MX
    scaling = "codes and block scales multiplied by the tensor cores; fp32 sums"


for _kernel in (CudaScaledNvfp4(), CudaScaledMx()):
    register_kernel(_kernel)
