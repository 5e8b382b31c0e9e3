"""A C++ kernel for few rows of x with AVX2 (csrc/cpu/quads_*.h): codes become fp32 numbers in registers."""

from __future__ import annotations

from torch import Tensor

from quantlib.formats.base import Format
from quantlib.formats.codecs import Affine, Minifloat
from quantlib.kernels import cpu
from quantlib.kernels.base import Kernel, Problem, register_kernel
from quantlib.kernels.cpu import Packed, predicted, refusal, rounded_activations
from quantlib.tensor import QuantizedTensor

LOOK_UP_BITS = (2, 3, 4)
"""Widths of codes whose code book lies in a register."""
ROWS = 32
"""Rows of x up to which the kernel multiplies: beyond, a matrix library wins although it needs decoded weights."""


def unreadable(fmt: Format) -> str | None:
    """Why the kernel can't read the format's codes, or None."""
    codec = fmt.codec
    if codec.bits in LOOK_UP_BITS:
        return None
    if isinstance(codec, Minifloat) and codec.name in ("e4m3", "e5m2"):
        return None
    if isinstance(codec, Affine) and (codec.bits in (5, 6) or (codec.bits == 8 and codec.offset in (0, 128))):
        return None
    return f"reads code books of {', '.join(map(str, LOOK_UP_BITS))} bits, integers of 5, 6 and 8, E4M3 and E5M2; not {codec}"


class CpuQuadsDot(Kernel):
    name = "cpu_quads_dot"
    backend = "cpu"
    operation = "linear"
    function = "quads_dot"
    scaling = (
        "code values in fp32 (entries of code books that bf16 doesn't hold are rounded to it for bf16 x); scales, zeros and "
        "minima on fp32 sums of four or eight columns"
    )

    def supports(self, problem: Problem) -> str | None:
        """Why the kernel can't run the problem, or None."""
        why = refusal(problem)
        if why is not None:
            return why
        if not cpu.native().has_quads():
            return f"is written in AVX2; {cpu.isa()} runs here"
        if problem.m > ROWS:
            return f"multiplies up to {ROWS} rows; the batch has {problem.m}"
        if problem.batch_invariant:
            return "dispatch takes another kernel for another batch, and batch_invariant is set: cpu_linear serves every one"
        return unreadable(problem.format)

    def cost(self, problem: Problem) -> float:
        narrow = problem.format.codec.bits <= 4 and problem.format.zero == "none"
        return predicted(problem, self.name, decode_rate=28.0 if narrow else 18.0, peak_share=0.9)

    def run(self, problem: Problem, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        y = x.new_empty(x.shape[0], weight.shape[0])
        if y.numel():
            Packed.of(weight).product(cpu.native().quads_dot, rounded_activations(problem, x), bias, y)
        return y


register_kernel(CpuQuadsDot())
