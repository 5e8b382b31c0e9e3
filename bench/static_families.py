"""What `python -m bench.static` compiles: one Family per kernel, each with its cases and the launch that a case leads to.

A new kernel is one more entry of FAMILIES: a function from a case to its Launch, built by the kernel's own launcher from
tensors without storage, and the sweeps of cases to compile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from bench.static_cases import (
    DETAILED_FORMATS,
    FORMATS,
    GROUPED_FORMATS,
    SIBLING_FORMATS,
    SIBLINGS,
    TENSOR_CORE,
    UNEVEN_K,
    Case,
    Family,
    N,
    Sweep,
    Work,
    by_rows,
    dequantize_work,
    fragments_weight,
    meta,
    nothing,
    operands,
    product_work,
    rows_weight,
    version_number,
    warp_level,
    weight_of,
)
from bench.static_chips import CHIPS
from quantlib.devices import Device
from quantlib.experts import QuantizedExperts
from quantlib.formats import get_format
from quantlib.kernels import activations_launch, fragments_launch, get_kernel, grouped_launch, triton_launch
from quantlib.kernels.base import Operation, Problem
from quantlib.kernels.triton_fragments import COLUMNS, FragmentKernel
from quantlib.kernels.triton_launch import Launch, Tile

# The rows layout.


def _rows_linear(arch: int, case: Case) -> Launch:
    x, y, bias = operands(case)
    tile = triton_launch.rows_linear_tile(case.m, case.k, case.torch_dtype, arch)
    return triton_launch.rows_linear_launch(x, weight_of(case, rows_weight), bias, y, tile)


def _rows_dequantize(arch: int, case: Case) -> Launch:
    out = meta(N, case.k, dtype=case.torch_dtype)
    return triton_launch.rows_dequantize_launch(weight_of(case, rows_weight), out)


# The fragments layout.


def _device(arch: int) -> Device:
    chip = CHIPS[arch]
    return Device("cuda", chip.name, f"sm_{arch}", chip.sms, chip.bandwidth, chip.peak_tflops)


def _workspace(case: Case, splits: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Partial sums and arrival counters; none where K isn't split."""
    if splits == 1:
        return None, None
    return meta(splits, case.m, N, dtype=torch.float32), meta(N, dtype=torch.int32)


def _tile(name: str, operation: Operation, arch: int, case: Case) -> Tile:
    """The tile that the kernel takes for the case's problem on the named chip."""
    kernel = get_kernel(name)
    assert isinstance(kernel, FragmentKernel)
    fmt, chip = get_format(case.format), _device(arch)
    return kernel.tile(Problem(operation, case.m, N, case.k, case.torch_dtype, fmt, "fragments", None, chip))


def _gemv(arch: int, case: Case) -> Launch:
    x, y, bias = operands(case)
    tile = _tile("triton_gemv", "linear", arch, case)
    weight = weight_of(case, fragments_weight)
    return fragments_launch.gemv_launch(x, weight, bias, None, y, *_workspace(case, tile.splits), tile)


def _skinny(arch: int, case: Case) -> Launch:
    x, y, bias = operands(case)
    tile = _tile("triton_skinny", "linear", arch, case)
    weight, whole = weight_of(case, fragments_weight), fragments_launch.whole_columns(x, COLUMNS)
    return fragments_launch.skinny_launch(whole, weight, bias, None, y, *_workspace(case, tile.splits), tile, arch)


def _gemm(arch: int, case: Case) -> Launch:
    x, y, bias = operands(case)
    tile = _tile("triton_gemm", "linear", arch, case)
    weight, whole = weight_of(case, fragments_weight), fragments_launch.whole_columns(x, COLUMNS)
    return fragments_launch.gemm_launch(whole, weight, bias, None, y, tile, CHIPS[arch].sms, arch)


def _dgrad(arch: int, case: Case) -> Launch:
    dx, dy, _ = operands(case)
    return fragments_launch.dgrad_launch(dy, weight_of(case, fragments_weight), dx, _tile("triton_dgrad", "dgrad", arch, case))


def _dequantize(arch: int, case: Case) -> Launch:
    return fragments_launch.dequantize_launch(weight_of(case, fragments_weight), meta(N, case.k, dtype=case.torch_dtype))


# Several experts.

EXPERTS = 8


def _experts(case: Case) -> QuantizedExperts:
    one = weight_of(case, fragments_weight)
    parts = {name: meta(EXPERTS, *part.shape, dtype=part.dtype) for name, part in one.parts.items()}
    return QuantizedExperts(one.format, (EXPERTS, *one.shape), parts, "fragments")


def _offsets() -> torch.Tensor:
    return meta(EXPERTS + 1, dtype=torch.int32)


def _grouped(arch: int, case: Case) -> Launch:
    x, y, _ = operands(case)
    weight = _experts(case)
    tile = grouped_launch.grouped_tile(case.m, EXPERTS, weight.format, case.torch_dtype, arch)
    rows, row_scale = meta(case.m, dtype=torch.int32), meta(case.m, dtype=torch.float32)
    return grouped_launch.grouped_launch(x, weight, _offsets(), rows, None, row_scale, y, tile, arch)


def _grouped_dgrad(arch: int, case: Case) -> Launch:
    dx, dy, _ = operands(case)
    weight = _experts(case)
    tile = grouped_launch.grouped_dgrad_tile(case.m, EXPERTS, weight.format, case.torch_dtype, arch)
    return grouped_launch.grouped_dgrad_launch(dy, weight, _offsets(), None, dx, tile)


def _experts_work(case: Case) -> Work:
    """As `product_work`, with every expert's weight that a row may need."""
    one = product_work(case)
    used = min(EXPERTS, case.m)
    return Work(one.bytes + (used - 1) * get_format(case.format).nbytes(N, case.k), one.flops, used * one.weights)


def _by_expert_rows(arch: int, case: Case) -> str:
    """As `by_rows`, for a share of the rows."""
    return by_rows(arch, replace(case, m=case.m // EXPERTS))


# Quantized activations.


def _quantize(swizzled: bool) -> Callable[[int, Case], Launch]:
    def launch(arch: int, case: Case) -> Launch:
        x = meta(case.m, case.k, dtype=case.torch_dtype)
        out = activations_launch.empty_activations(get_format(case.format), case.m, case.k, "meta", swizzled=swizzled)
        return activations_launch.quantize_launches(x, out, True, arch)[-1]

    return launch


def _quantizing(arch: int, case: Case) -> str:
    """Divisions are corrected by multiply-adds; scales that are powers of two need none."""
    return "none" if get_format(case.format).scale.kind == "e8m0" else "fma.rn.f32"


def _quantize_work(case: Case) -> Work:
    moved = case.m * case.k * case.torch_dtype.itemsize + get_format(case.format).nbytes(case.m, case.k)
    return Work(moved, 0, 0)


def _scaled_gemm(arch: int, case: Case) -> Launch:
    out = activations_launch.empty_activations(get_format(case.activations), case.m, case.k, "meta")
    _, y, bias = operands(case)
    return activations_launch.gemm_launch(out, weight_of(case, rows_weight), bias, y, arch)


def _scaled_work(case: Case) -> Work:
    x, weight = get_format(case.activations), get_format(case.format)
    moved = x.nbytes(case.m, case.k) + weight.nbytes(N, case.k) + case.m * N * case.torch_dtype.itemsize
    return Work(moved, 2 * case.m * N * case.k, N * case.k)


def _scaled_instruction(arch: int, case: Case) -> str:
    """What multiplies two quantized operands on each chip (docs/activations.md)."""
    fmt = get_format(case.activations)
    math, _ = activations_launch.math_of(fmt, case.torch_dtype, arch)
    if math == "scaled":
        four = case.activations != "mxfp8"
        if 100 <= arch < 120:
            kind = "mxf8f6f4" if not four else "mxf4nvf4" if case.activations == "nvfp4" else "mxf4"
            return f"tcgen05.mma.cta_group::1.kind::{kind}.block_scale"
        shape, kind = ("m16n8k64", "mxf4nvf4") if four else ("m16n8k32", "mxf8f6f4")
        return f"mma.sync.aligned.{shape}.row.col.kind::{kind}.block_scale"
    if math == "decode" and case.dtype == "float32":
        return "fma.rn.f32"
    if math == "int8" and arch in (100, 103):
        return INT8_TCGEN05 if arch == 100 else "mma.sync"
    return TENSOR_CORE[arch]


INT8_TCGEN05 = "tcgen05.mma.cta_group::1.kind::i8"
EMITTED_SINCE = {
    (100, INT8_TCGEN05): (3, 8),
    (121, "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale"): (3, 8),
    (121, "mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale"): (3, 8),
}
"""(architecture, instruction) -> the first Triton that emits it there; earlier ones take one of the older mma.sync."""


def intended(family: Family, arch: int, case: Case, version: str) -> str:
    """How the multiply instruction must begin in what a version of Triton compiles."""
    wanted = family.instruction(arch, case)
    return wanted if version_number(version) >= EMITTED_SINCE.get((arch, wanted), ()) else "mma.sync"


PAIRS = (
    ("fp8", "fp8-e4m3"), ("fp8-g128", "fp8-e4m3-block128"), ("int8", "int8-channel"), ("nvfp4", "nvfp4"), ("mxfp8", "mxfp4"),
    ("mxfp8", "mxfp8"), ("mxfp4", "mxfp4"),
)  # fmt: skip
"""(activations, weight): every kind of product of two quantized operands."""
SWIZZLED = ("nvfp4", "mxfp8", "mxfp4")
QUANTIZED = ("fp8", "int8", "fp8-g128", "nvfp4", "mxfp8", "mxfp4")


DECODE_LIMITS = ((90, "int4-g128", 4.0), (90, "nvfp4", 4.0), (90, "nf4", 5.0))
"""For kernels that are to reach memory bandwidth: (architecture, format, most decode instructions per weight)."""


def _details(ms: tuple[int, ...], *dtypes: str, machine_code: bool = False) -> tuple[Sweep, ...]:
    """A kernel's other dtypes, and columns that no tile divides."""
    return (
        *(Sweep(DETAILED_FORMATS, ms, (dtype,), machine_code=machine_code) for dtype in dtypes),
        Sweep(DETAILED_FORMATS, ms, k=UNEVEN_K, machine_code=machine_code),
    )


def _by_name(*families: Family) -> dict[str, Family]:
    return {family.name: family for family in families}


FAMILIES: dict[str, Family] = _by_name(
    Family(
        "rows_linear",
        _rows_linear,
        (
            Sweep(FORMATS, (16,)),
            Sweep(DETAILED_FORMATS, (64, 512), everywhere=True, machine_code=False),
            *_details((512,), "float32"),
        ),
    ),
    Family(
        "rows_dequantize",
        _rows_dequantize,
        (Sweep(FORMATS, (0,)), *_details((0,), "float32", machine_code=True)),
        instruction=nothing,
        x=(),
        work=dequantize_work,
        exact="never",
    ),
    Family(
        "gemv",
        _gemv,
        (Sweep(FORMATS, (1,), everywhere=True), *_details((1,), "float16")),
        instruction=warp_level,
        max_decode=DECODE_LIMITS,
        min_load=16,
        exact="free",
    ),
    Family(
        "skinny",
        _skinny,
        (Sweep(FORMATS, (16,), everywhere=True), Sweep(DETAILED_FORMATS, (32, 64)), *_details((16,), "float32")),
        max_decode=DECODE_LIMITS,
        min_load=16,
        exact="free",
    ),
    Family(
        "gemm",
        _gemm,
        (Sweep(FORMATS, (512,), everywhere=True), *_details((512,), "float32")),
        max_decode=DECODE_LIMITS,
        min_load=16,
        exact="free",
    ),
    Family(
        "dgrad",
        _dgrad,
        (Sweep(FORMATS, (512,), everywhere=True), Sweep(DETAILED_FORMATS, (16, 32)), *_details((512,), "float32")),
        instruction=by_rows,
        x=("dy",),
        min_load=16,
        exact="free",
    ),
    Family(
        "dequantize",
        _dequantize,
        (Sweep(FORMATS, (0,), everywhere=True),),
        instruction=nothing,
        x=(),
        work=dequantize_work,
        min_load=16,
        exact="never",
    ),
    Family(
        "grouped",
        _grouped,
        (
            Sweep(GROUPED_FORMATS, (64,), machine_code=False),
            Sweep(DETAILED_FORMATS, (2048,), everywhere=True, machine_code=False),
            Sweep(DETAILED_FORMATS, (64,), ("float32",), machine_code=False),
        ),
        work=_experts_work,
        exact="free",
    ),
    Family(
        "grouped_dgrad",
        _grouped_dgrad,
        (
            Sweep(GROUPED_FORMATS, (64,), machine_code=False),
            Sweep(DETAILED_FORMATS, (2048,), everywhere=True, machine_code=False),
            Sweep(DETAILED_FORMATS, (64,), ("float32",), machine_code=False),
        ),
        instruction=_by_expert_rows,
        x=("dy",),
        work=_experts_work,
        exact="free",
    ),
    *(
        Family(
            name,
            _quantize(swizzled),
            (
                Sweep(formats, (512,), everywhere=True, machine_code=False),
                Sweep(formats[:2], (512,), ("float32",), machine_code=False),
                Sweep(formats[:2], (512,), k=20000, machine_code=False),
            ),
            instruction=_quantizing,
            codes=(),
            work=_quantize_work,
            exact="free",
        )
        for name, swizzled, formats in (
            ("quantize", False, QUANTIZED),
            ("quantize_swizzled", True, ("nvfp4", "mxfp8", "mxfp4")),
        )
    ),
    Family(
        "scaled_gemm",
        _scaled_gemm,
        tuple(
            sweep
            for activations, fmt in PAIRS
            for sweep in (
                Sweep((fmt,), (512,), activations=activations, everywhere=True, machine_code=False),
                Sweep((fmt,), (16, 64), activations=activations, machine_code=False),
                Sweep((fmt,), (512,), ("float32",), activations=activations, machine_code=False),
            )
        ),
        instruction=_scaled_instruction,
        codes=(),
        work=_scaled_work,
        exact="free",
    ),
)
"""Kernel -> what is compiled of it. Kernels that fuse on purpose, where it is exact, are "free" to."""


def family_of(case: Case) -> Family:
    """The family of a case."""
    return FAMILIES[case.kernel]


def cases(arch: int) -> list[Case]:
    """The cases compiled for an architecture, in the order of the table."""
    return list(dict.fromkeys(case for family in FAMILIES.values() for case, _ in sweep_cases(arch, family)))


def sweep_cases(arch: int, family: Family) -> list[tuple[Case, Sweep]]:
    """A family's cases for an architecture, each with its sweep."""
    found = []
    for sweep in family.sweeps:
        if arch in SIBLINGS and not sweep.everywhere:
            continue
        every = arch not in SIBLINGS or sweep.activations != ""
        for fmt in (fmt for fmt in sweep.formats if every or fmt in SIBLING_FORMATS):
            for dtype in sweep.dtypes:
                found += [(Case(family.name, fmt, dtype, m, sweep.k, sweep.activations), sweep) for m in sweep.ms]
    return found
