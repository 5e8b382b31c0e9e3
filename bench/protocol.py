"""What is measured: shapes of real models, batch sizes, formats, and the order in which a run takes them.

A Case is one problem. A plan is a tuple of Blocks in the order of importance, so that a run that is cut off has measured what
matters most. Within a block M varies fastest: a weight is quantized, and prepared for every contestant, once per shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

Shape = tuple[int, int]

SHAPES: dict[str, tuple[Shape, ...]] = {
    "llama-3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (1024, 4096), (14336, 4096)),
    "llama-3-70b": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    "qwen-2.5-7b": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
    "qwen-2.5-72b": ((8192, 29568),),
}
"""Model -> (N, K) of its linear layers, attention and MLP fused as servers fuse them, and unfused. K = 29568 fits few tiles."""

MS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

REGIMES = {"decode": (1, 16), "middle": (17, 256), "prefill": (257, 1 << 30)}
"""Name -> smallest and largest M: bound by the weight's bytes; in between; bound by arithmetic."""

FOUR_BIT = ("int4-g128", "nf4", "nvfp4")
FORMATS = (*FOUR_BIT, "mxfp4", "int8-channel", "fp8-e4m3", "mxfp8", "int3-g128", "int2-g64", "q4_k", "q6_k")


@dataclass(frozen=True)
class Case:
    """One problem: W is [n, k]. `quantize` takes x [m, k] and has n = 0; `dequantize` has m = 0.

    activations: None (weights only), or the format that x is rounded to before multiplying.
    """

    operation: str
    format: str
    n: int
    k: int
    m: int
    activations: str | None = None

    @property
    def label(self) -> str:
        """One word that names the case in progress lines, markers and recordings."""
        shape = f"{self.m}x{self.k}" if self.operation == "quantize" else f"{self.n}x{self.k}"
        m = f" M={self.m}" if self.m and self.operation != "quantize" else ""
        activations = f" x={self.activations}" if self.activations else ""
        return f"{self.operation} {self.format} {shape}{m}{activations}"

    @property
    def weight(self) -> Case:
        """What cases of the same prepared weight have in common."""
        return replace(self, m=0)

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


def regime(m: int) -> str:
    """The name of the regime that m rows fall into."""
    return next(name for name, (low, high) in REGIMES.items() if low <= m <= high)


@dataclass(frozen=True)
class Block:
    """The product of formats, shapes and ms, under one operation."""

    formats: tuple[str, ...]
    shapes: tuple[Shape, ...]
    ms: tuple[int, ...]
    operation: str = "linear"
    activations: str | None = None

    def cases(self) -> Iterator[Case]:
        for fmt in self.formats:
            for n, k in self.shapes:
                for m in self.ms:
                    yield Case(self.operation, fmt, n, k, m, self.activations)


WIDE, TALL = (28672, 4096), (8192, 28672)
SQUARES = ((4096, 4096), (8192, 8192))
EVERY_SHAPE = tuple(shape for shapes in SHAPES.values() for shape in shapes)
QUANTIZERS = ("fp8-e4m3", "int8-channel", "nvfp4", "mxfp8")

QUICK = (
    Block(("int4-g128",), (WIDE, TALL, *SQUARES), (1, 16)),
    Block(("nf4", "nvfp4"), (WIDE, (8192, 8192)), (1, 16)),
    Block(("int4-g128", "nf4"), ((8192, 8192),), (512, 4096)),
    Block(("int4-g128", "nf4"), ((8192, 8192),), (512, 4096), operation="dgrad"),
    Block(("int4-g128",), (WIDE, (8192, 8192)), (64, 256)),
    Block(("fp8-e4m3",), ((8192, 8192),), (4096,), activations="fp8-e4m3"),
    Block(QUANTIZERS, ((0, 8192),), (4096,), operation="quantize"),
    Block(("nf4", "nvfp4"), (TALL, (4096, 4096)), (1, 16)),
    Block(("int4-g128",), (WIDE, TALL, *SQUARES), (2, 4, 8)),
    Block(("nf4", "nvfp4"), ((8192, 8192),), (64, 256)),
    Block(FOUR_BIT, (WIDE,), (512, 4096)),
    Block(FOUR_BIT, (WIDE, (8192, 8192)), (1024, 2048), operation="dgrad"),
)
"""What the targets ask for on few shapes, within a few minutes of an H100."""

FULL = (
    *QUICK,
    Block(FOUR_BIT, EVERY_SHAPE, MS),
    Block(FOUR_BIT, EVERY_SHAPE, (512, 1024, 2048, 4096), operation="dgrad"),
    Block(("fp8-e4m3", "int8-channel"), EVERY_SHAPE, (1, 16, 256, 4096), activations="fp8-e4m3"),
    Block(QUANTIZERS, ((0, 4096), (0, 8192), (0, 28672)), (16, 512, 4096), operation="quantize"),
    Block(FORMATS, (WIDE, (8192, 8192)), (0,), operation="dequantize"),
    Block(FORMATS, EVERY_SHAPE, MS),
)
"""Everything; hours."""

TINY = (
    Block(("int4-g128", "nf4"), ((64, 256),), (1, 17)),
    Block(("nf4",), ((33, 130),), (5,), operation="dgrad"),
    Block(("nf4",), ((33, 130),), (0,), operation="dequantize"),
    Block(("fp8-e4m3",), ((48, 128),), (5,), activations="fp8-e4m3"),
    Block(("fp8-e4m3", "int8-channel", "nvfp4"), ((0, 130),), (5,), operation="quantize"),
)
"""For tests, and to see on any machine that the tooling works."""

PLANS = {"quick": QUICK, "full": FULL, "tiny": TINY}


def cases_of(plan: tuple[Block, ...]) -> list[Case]:
    """Every case of a plan once, in its order."""
    return list(dict.fromkeys(case for block in plan for case in block.cases()))


def by_weight(cases: list[Case]) -> list[tuple[Case, list[Case]]]:
    """Neighbouring cases of one weight together: (what they share, the cases)."""
    return [(weight, list(group)) for weight, group in groupby(cases, key=lambda case: case.weight)]
