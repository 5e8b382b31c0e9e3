"""The C++ kernels for the CPU (csrc/cpu), and decode + torch's matmul where a batch is large enough for a matrix library.

They take the layouts `rows` and `cpu_rows` as they are: codes of 1 to 8 bits under every scale and zero kind. Where the
extension `quantlib._cpu` is missing, `unavailable` says why, every kernel here refuses in those words, and dispatch goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor

from quantlib.errors import KernelError
from quantlib.formats import get_format
from quantlib.formats.base import Format
from quantlib.formats.codecs import Affine, Minifloat, decode
from quantlib.formats.scales import DYNAMIC_MAP, FloatScale, SuperScale
from quantlib.kernels.base import Kernel, Problem, register_kernel
from quantlib.kernels.build_record import build_record
from quantlib.kernels.costs import activation_bytes, packed_bytes, tuned_efficiency
from quantlib.kernels.reference import round_trip
from quantlib.layouts.strips import COLUMNS, whole_words
from quantlib.tensor import QuantizedTensor

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
CODEC_KINDS = ("affine", "table", "minifloat")
SCALE_KINDS = ("float", "e4m3_global", "e8m0", "double", "super")
LAYOUTS = ("rows", "cpu_rows")
LINEAR_ROWS = 16
"""Rows of x up to which the fused kernel multiplies; beyond, the matrix library wins even though it needs decoded weights."""
DECODED_BYTES = 4 << 20
"""Bound of the decoded part of W that exists at once: it stays in the cache between decoding and multiplying."""


def _load() -> tuple[Any, str | None]:
    try:
        return import_module("quantlib._cpu"), None
    except (ImportError, ValueError) as error:
        why = build_record("_cpu").get("why")
        if why is None:
            return None, f"the C++ extension quantlib._cpu can't be loaded ({error})"
        return None, f"the C++ extension quantlib._cpu was not built ({why.splitlines()[0]})"


_cpu, unavailable = _load()
"""The extension, and None or the reason why there is none."""


def isa() -> str | None:
    """The instruction set that runs: "amx", "avx512_bf16", "avx512", "avx2" or "scalar" (QUANTLIB_CPU_ISA can lower it). None:
    not built."""
    return None if _cpu is None else str(_cpu.isa())


def has_pairs() -> bool:
    """Whether the instruction set that runs multiplies pairs of bf16 numbers."""
    return _cpu is not None and bool(_cpu.has_pairs())


def has_tiles() -> bool:
    """Whether the instruction set that runs multiplies in tile registers."""
    return _cpu is not None and bool(_cpu.has_tiles())


def has_int8() -> bool:
    """Whether the instruction set that runs multiplies bytes."""
    return _cpu is not None and bool(_cpu.has_int8())


def has_lookup() -> bool:
    """Whether the instruction set that runs looks up bytes (AVX2, and AVX-512 without products of bf16 pairs)."""
    return _cpu is not None and bool(_cpu.has_lookup())


def native() -> Any:
    """The extension's functions. Asked for only where `unavailable` is None."""
    return _cpu


@dataclass(frozen=True)
class Plan:
    """A format's facts for one shape in the extension's terms, and the parts that it may be called with."""

    format: Format
    native: Any
    specs: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


def _values(fmt: Format) -> list[float]:
    codes = torch.arange(len(fmt.codec.entries), dtype=torch.uint8)
    values: list[float] = decode(fmt.codec, codes).tolist()
    return values + [float("nan")] * ((1 << fmt.codec.bits) - len(values))


def native_codec(fmt: Format) -> str:
    """The extension's word for the way in which codes become numbers."""
    if isinstance(fmt.codec, Affine):
        return "affine"
    if isinstance(fmt.codec, Minifloat) and fmt.codec.name in ("e4m3", "e5m2"):
        return fmt.codec.name
    return "table"


@lru_cache(maxsize=1024)
def make_plan(fmt: Format, n: int, k: int, layout: str) -> Plan:
    """The plan of a weight [n, k] in a layout of LAYOUTS; holds no address of any tensor."""
    scale = fmt.scale
    supers = scale if isinstance(scale, SuperScale) else None
    native = _cpu.Plan(
        n=n,
        k=k,
        padded_k=fmt.padded(k),
        bits=fmt.codec.bits,
        codec=native_codec(fmt),
        offset=fmt.codec.offset if isinstance(fmt.codec, Affine) else 0,
        values=_values(fmt),
        block_rows=fmt.block.rows or 0,
        block_cols=fmt.block.cols or 0,
        blocks_across=fmt.grid(n, k)[1],
        scale=scale.kind,
        scale_dtype=DTYPES[scale.dtype] if isinstance(scale, FloatScale) else "float32",
        super_bits=supers.bits if supers else 0,
        super_count=supers.count if supers else 0,
        super_offset=1 << (supers.bits - 1) if supers and supers.signed else 0,
        scale_values=list(DYNAMIC_MAP.entries) if scale.kind == "double" else [],
        has_zero=fmt.zero == "integer",
        has_minimum=fmt.zero == "minimum",
        strips=layout == "cpu_rows",
    )
    specs = tuple((name, spec.shape, spec.dtype) for name, spec in fmt.specs(n, k).items())
    return Plan(fmt, native, specs)


_recent: dict[tuple[int, int, int, str], Plan] = {}
"""(id of a format, n, k, layout) -> plan. Hashing a format hashes its code book. A plan keeps its format alive, so its id."""


def plan_of(weight: QuantizedTensor) -> Plan:
    """The plan of a weight, found again without hashing its format."""
    key = (id(weight.format), *weight.shape, weight.layout)
    plan = _recent.get(key)
    if plan is None:
        if len(_recent) >= 4096:
            _recent.clear()
        plan = make_plan(weight.format, *weight.shape, weight.layout)
        if plan.format is weight.format:
            _recent[key] = plan
    return plan


@dataclass(frozen=True)
class Packed:
    """A weight as the extension takes it. `parts` are the tensors that the addresses belong to; `given` are the weight's, and
    `where` they lay."""

    plan: Plan
    native: Any
    parts: list[Tensor]
    given: list[Tensor]
    where: list[int]

    @classmethod
    def of(cls, weight: QuantizedTensor) -> Packed:
        """Kept with the weight. Raises ShapeError where a part lacks the shape or dtype of its format, KernelError where it is
        not on the CPU."""
        kept = weight.memo.get(Packed)
        if kept is not None and all(part.data_ptr() == at for part, at in zip(kept.given, kept.where, strict=True)):
            return cast(Packed, kept)
        plan = plan_of(weight)
        parts, given = [], []
        for name, shape, dtype in plan.specs:
            part = weight.parts.get(name)
            if part is None or part.shape != shape or part.dtype != dtype:
                weight.format.check(weight.parts, *weight.shape)
                raise KernelError(f"{weight}: part {name!r} is not what {weight.format} needs")
            if not part.is_cpu:
                raise KernelError(f"{weight}: part {name!r} lies on {part.device}; the CPU kernels need it on the CPU")
            given.append(part)
            parts.append(part.contiguous())
        addresses = {spec[0]: part.data_ptr() for spec, part in zip(plan.specs, parts, strict=True)}
        packed = cls(plan, _cpu.Parts(plan.native, addresses), parts, given, [part.data_ptr() for part in given])
        # A copy of parts with other strides would not see what is written to them later.
        if all(part is original for part, original in zip(parts, given, strict=True)):
            weight.memo[Packed] = packed
        return packed

    def product(self, function: Any, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out, contiguous = what a product of the extension makes of x (two dimensions, any strides) and bias (any dtype)."""
        if bias is not None:
            bias = bias.to(torch.float32).contiguous()
        function(
            self.plan.native,
            self.native,
            x.shape[0],
            DTYPES[x.dtype],
            x.data_ptr(),
            x.stride(0),
            x.stride(1),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )

    def products(self, function: Any, x: Tensor, bias: Tensor | None, out: Tensor, at_once: int) -> None:
        """The same for `at_once` rows of x a call, which bounds the memory of a call."""
        for start in range(0, x.shape[0], at_once):
            self.product(function, x[start : start + at_once], bias, out[start : start + at_once])

    def decode(self, rows: tuple[int, int], columns: tuple[int, int], out: Tensor) -> None:
        """out, contiguous = W[rows, columns] in out's dtype; the first column is a multiple of 32."""
        _cpu.dequantize(
            self.plan.native, self.native, rows, columns, DTYPES[out.dtype], out.data_ptr(), torch.get_num_threads()
        )


def decoded_rows(weight: QuantizedTensor, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, W[start:stop] in `dtype`) over all rows; one buffer of DECODED_BYTES, or of 64 rows, serves every block."""
    packed = Packed.of(weight)
    n, k = weight.shape
    step = max(64, DECODED_BYTES // max(1, k * dtype.itemsize) // 16 * 16)
    buffer = torch.empty(min(step, n) * k, dtype=dtype)
    for start in range(0, n, step):
        stop = min(start + step, n)
        block = buffer[: (stop - start) * k].view(stop - start, k)
        packed.decode((start, stop), (0, k), block)
        yield start, stop, block


def decoded_columns(weight: QuantizedTensor, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, W[:, start:stop] in `dtype`) over all columns, in the same way."""
    packed = Packed.of(weight)
    n, k = weight.shape
    step = max(64, DECODED_BYTES // max(1, n * dtype.itemsize) // 32 * 32)
    buffer = torch.empty(min(step, k) * n, dtype=dtype)
    for start in range(0, k, step):
        stop = min(start + step, k)
        block = buffer[: (stop - start) * n].view(n, stop - start)
        packed.decode((0, n), (start, stop), block)
        yield start, stop, block


@lru_cache(maxsize=8)
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that torch multiplies in: x's own where this machine has instructions for it, else fp32."""
    if dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return dtype
    if dtype is torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return dtype
    return torch.float32


def refusal(problem: Problem) -> str | None:
    """Why no kernel of this file can run the problem, or None."""
    fmt = problem.format
    if problem.device.kind != "cpu":
        return f"runs on the CPU; x lies on {problem.device.name}"
    if unavailable is not None:
        return unavailable
    if problem.dtype not in DTYPES:
        return f"computes in fp32, for fp32, bf16 and fp16; x is {str(problem.dtype).removeprefix('torch.')}"
    if problem.layout not in LAYOUTS:
        return f"reads the layouts {' and '.join(LAYOUTS)}; the weight lies in {problem.layout!r}"
    if problem.layout == "cpu_rows" and not whole_words(fmt, problem.k):
        row = f"a row of {fmt} with K = {problem.k}"
        return f"takes cpu_rows of whole runs of {COLUMNS} columns and whole 32-bit words, which {row} is not"
    if fmt.codec.kind not in CODEC_KINDS:
        return f"decodes the codec kinds {', '.join(CODEC_KINDS)}, not {fmt.codec.kind!r}"
    if not 1 <= fmt.codec.bits <= 8:
        return f"decodes codes of 1 to 8 bits, not {fmt.codec.bits}"
    if fmt.scale.kind not in SCALE_KINDS:
        return f"decodes the scale kinds {', '.join(SCALE_KINDS)}, not {fmt.scale.kind!r}"
    if isinstance(fmt.scale, FloatScale) and fmt.scale.dtype not in DTYPES:
        return f"reads scales in fp32, bf16 or fp16, not in {str(fmt.scale.dtype).removeprefix('torch.')}"
    if (fmt.block.cols or 0) % 8:
        return f"needs blocks of a multiple of 8 columns; {fmt} has {fmt.block.cols}"
    return None


def predicted(problem: Problem, kernel: str, decode_rate: float, peak_share: float) -> float:
    """Microseconds: reading the packed weight, or decoding `decode_rate` weights per ns and thread and then multiplying.

    The rates were measured on a core of a fourth-generation EPYC (AVX-512), in units of torch's fp32 matmul, which the costs of
    every kernel take for the peak; bench/tuned corrects them for other devices. A batch-invariant problem counts as one of one
    row, so that one kernel wins for every batch.
    """
    if problem.batch_invariant:
        problem = replace(problem, m=1)
    device = problem.device
    memory = (packed_bytes(problem) + activation_bytes(problem)) / (device.bandwidth * 1e3)
    decode = problem.n * problem.k / (device.units * decode_rate * 1e3)
    compute = 2 * problem.m * problem.n * problem.k / (device.peak_tflops * 1e6 * peak_share)
    work = decode + compute
    # What takes less hides behind the other, but not quite: of two kernels that wait for memory, the one with less to do wins.
    return (max(memory, work) + 0.05 * min(memory, work)) / tuned_efficiency(device, kernel, 1.0)


def predicted_decode_matmul(problem: Problem, kernel: str) -> float:
    """Microseconds of decoding in blocks and multiplying in torch. Its 16-bit products are fast, but start slowly."""
    if product_dtype(problem.dtype) is torch.float32:
        # Beside cpu_lookup_tile on two cores of Zen 3: 65 GFLOP/s with 64 rows, 103 with 256, 140 with 2048.
        rows = max(1, problem.m)
        share = 1.85 * rows / (rows + 100) if has_lookup() else 1.0
        return predicted(problem, kernel, decode_rate=12.0, peak_share=share)
    if has_tiles() and problem.dtype is torch.bfloat16:  # torch multiplies in them too
        return predicted(problem, kernel, decode_rate=2.0, peak_share=8.0)
    return predicted(problem, kernel, decode_rate=5.7, peak_share=1.95)


@lru_cache(maxsize=64)
def in_int8(activations: str | None) -> bool:
    """Whether a name of activations is the format int8's, which the extension rounds to."""
    return activations is not None and get_format(activations) == get_format("int8")


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] of fp32, bf16 or fp16, any strides -> codes uint8 [M, K], 128 above their numbers, and scales fp32 [M]: those of
    the format int8. A row with a number that isn't finite gets the scale NaN."""
    codes, scales = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), dtype=torch.float32)
    _rows_to_int8(x, codes.data_ptr(), scales.data_ptr(), 0)
    return codes, scales


def _rows_to_int8(x: Tensor, codes: int, scales: int, rounded: int) -> None:
    _cpu.rows_to_int8(*x.shape, DTYPES[x.dtype], x.data_ptr(), *x.stride(), codes, scales, rounded, torch.get_num_threads())


def rounded_activations(problem: Problem, x: Tensor) -> Tensor:
    """x, or x rounded to the format of the problem's activations and back."""
    if problem.activations is None:
        return x
    if not in_int8(problem.activations):
        return round_trip(x, get_format(problem.activations))
    rounded = torch.empty(x.shape, dtype=x.dtype)
    _rows_to_int8(x, 0, 0, rounded.data_ptr())
    return rounded


class CpuLinear(Kernel):
    name = "cpu_linear"
    backend = "cpu"
    layout = "any"
    operation = "linear"
    function = "linear"
    scaling = "weights decoded in fp32 and not rounded; fp32 products and sums, rounded once to x's dtype"

    def supports(self, problem: Problem) -> str | None:
        if problem.m > LINEAR_ROWS and not problem.batch_invariant:
            return f"multiplies up to {LINEAR_ROWS} rows; the batch has {problem.m}"
        return refusal(problem)

    def cost(self, problem: Problem) -> float:
        if isa() in ("avx2", "scalar"):  # measured with AVX2
            return predicted(problem, self.name, decode_rate=6.2, peak_share=0.8)
        if has_tiles():
            return predicted(problem, self.name, decode_rate=7.5, peak_share=0.5)
        return predicted(problem, self.name, decode_rate=21.0, peak_share=0.95)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(x.shape[0], weight.shape[0])
        if y.numel():
            Packed.of(weight).products(_cpu.linear, rounded_activations(problem, x), bias, y, LINEAR_ROWS)
        return y


ROUNDED_TO_BF16 = "weights decoded in fp32 and rounded once to bf16"
ROUNDED_FOR_PRODUCT = (
    "weights decoded in fp32 and rounded once to x's dtype, or left in fp32 where the CPU lacks products of it"
)


class CpuDecodeMatmul(Kernel):
    name = "cpu_decode_matmul"
    backend = "cpu"
    layout = "any"
    operation = "linear"
    scaling = ROUNDED_FOR_PRODUCT

    def supports(self, problem: Problem) -> str | None:
        if problem.batch_invariant:
            return "torch's matmul may sum in another order for another batch, and batch_invariant is set"
        return refusal(problem)

    def cost(self, problem: Problem) -> float:
        return predicted_decode_matmul(problem, self.name)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(x.shape[0], weight.shape[0])
        if y.numel() == 0:
            return y
        dtype = product_dtype(x.dtype)
        x = rounded_activations(problem, x).to(dtype)
        bias = None if bias is None else bias.to(dtype)
        for start, stop, block in decoded_rows(weight, dtype):
            y[:, start:stop] = torch.nn.functional.linear(x, block, None if bias is None else bias[start:stop])
        return y


class CpuDgrad(Kernel):
    name = "cpu_dgrad"
    backend = "cpu"
    layout = "any"
    operation = "dgrad"
    scaling = ROUNDED_FOR_PRODUCT

    def supports(self, problem: Problem) -> str | None:
        return refusal(problem)

    def cost(self, problem: Problem) -> float:
        # Blocks of columns read a row's scales once for each block.
        if product_dtype(problem.dtype) is torch.float32:
            return predicted(problem, self.name, decode_rate=2.0, peak_share=1.0)
        tiles = has_tiles() and problem.dtype is torch.bfloat16
        return predicted(problem, self.name, decode_rate=0.6, peak_share=8.0 if tiles else 1.8)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        dx = x.new_zeros(x.shape[0], weight.shape[1])
        if x.numel() == 0:
            return dx
        dtype = product_dtype(x.dtype)
        x = x.to(dtype)
        for start, stop, block in decoded_columns(weight, dtype):
            dx[:, start:stop] = x @ block
        return dx


class CpuDequantize(Kernel):
    name = "cpu_dequantize"
    backend = "cpu"
    layout = "any"
    operation = "dequantize"

    def supports(self, problem: Problem) -> str | None:
        return refusal(problem)

    def cost(self, problem: Problem) -> float:
        return predicted(problem, self.name, decode_rate=1.0, peak_share=1.0)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        out = torch.empty(weight.shape, dtype=problem.dtype)
        if out.numel():
            n, k = weight.shape
            Packed.of(weight).decode((0, n), (0, k), out)
        return out


for _kernel in (CpuLinear(), CpuDecodeMatmul(), CpuDgrad(), CpuDequantize()):
    register_kernel(_kernel)
