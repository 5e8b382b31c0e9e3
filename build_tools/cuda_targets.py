"""For which chips each CUDA source is compiled: one table, and the environment's wish to build for fewer of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

from build_tools import BuildError

CHIPS = (80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)
"""Compute capabilities of the GPUs that can run something of this package, times ten."""


@dataclass(frozen=True)
class Target:
    """One thing that nvcc makes: machine code for a chip, or PTX that a driver compiles for any later one.

    suffix      "": this chip and later ones of its major version; "a": this chip alone; "f": its family, with instructions
                that only the family has
    """

    number: int
    suffix: str = ""
    ptx: bool = False

    @property
    def name(self) -> str:
        """ "sm_90a", or "compute_80" for PTX."""
        return f"{'compute' if self.ptx else 'sm'}_{self.number}{self.suffix}"

    def runs_on(self, chip: int) -> bool:
        if self.suffix == "a":
            return chip == self.number
        return chip >= self.number and (self.ptx or chip // 10 == self.number // 10)


def target(word: str) -> Target:
    """The target of a word such as "sm_90a" or "compute_80"."""
    found = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", word)
    if found is None:
        raise ValueError(word)
    return Target(int(found[2]), found[3], found[1] == "compute")


@dataclass(frozen=True)
class Row:
    """Sources, as a pattern under csrc/cuda, and what they are compiled for.

    targets     `before_families`: instead of them, where nvcc has no targets with the suffix f yet
    memory      GB that one such file takes to compile
    ptxas       what ptxas is told besides
    cutlass     whether they include CUTLASS
    """

    pattern: str
    targets: tuple[str, ...]
    before_families: tuple[str, ...] = ()
    memory: float = 1.5
    ptxas: tuple[str, ...] = ()
    cutlass: bool = False


# The PTX is for chips that came later than this table, and lets sm80 kernels be forced and tested on any GPU.
_EVERY_CHIP = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "compute_80")

# Conversions to E2M1 belong to Blackwell's families; the quantizers of other chips are Triton's.
_BLACKWELL = (("sm_100f", "sm_120f"), ("sm_100a", "sm_103a", "sm_120a", "sm_121a"))

TABLE = (
    Row("common/quantize*", *_BLACKWELL),
    Row("common/*", _EVERY_CHIP),
    Row("sm80/*", _EVERY_CHIP),
    Row("sm90/*", ("sm_90a",)),
    Row("sm100/*", ("sm_100f",), ("sm_100a", "sm_103a"), memory=7.5, cutlass=True),
    # At its default -O3 ptxas spills up to 136 bytes around the stream-K kernels' loops.
    Row("sm120/*", ("sm_120f",), ("sm_120a", "sm_121a"), memory=8, ptxas=("-O2",), cutlass=True),
)
"""The first row whose pattern a source's path under csrc/cuda fits is the source's own."""

FAMILIES = ("common", "sm80", "sm90", "sm100", "sm120")
"""Folders under csrc/cuda, each with a bindings.cpp; in the order in which csrc/cuda/bindings.cpp binds them."""


def row_of(source: str) -> Row:
    """The row of a source, named as it lies under csrc/cuda ("sm80/gemv.cu")."""
    return next(row for row in TABLE if fnmatch(source, row.pattern))


def chips_of(words: str) -> tuple[int, ...]:
    """The chips that a list such as "80,90a;120f" names; all where it names none.

    A suffix says that code which only that chip, or its family, can run is meant to be there; such code belongs to its own
    sources and is built for the bare number just as well. Raises BuildError where a word is no chip of ours.
    """
    chips = []
    for word in filter(None, (part.strip() for part in re.split("[,;]", words))):
        found = re.fullmatch(r"(?:sm_)?(\d+)([af]?)", word)
        special = {(made.number, made.suffix) for row in TABLE for made in map(target, row.targets + row.before_families)}
        if found is None or int(found[1]) not in CHIPS or (found[2] and (int(found[1]), found[2]) not in special):
            raise BuildError(
                f"QUANTLIB_CUDA_ARCHS: {word!r} is no architecture that quantlib builds for; write numbers like 80, 90a or 120f"
                f" with commas between them, of {', '.join(map(str, CHIPS))}"
            )
        chips.append(int(found[1]))
    return tuple(dict.fromkeys(chips)) or CHIPS


def targets_of(row: Row, chips: Iterable[int], known: Iterable[int], families: bool) -> tuple[Target, ...]:
    """What nvcc makes of the row's sources for `chips`: for each its best target, and a target's PTX beside it.

    known       the numbers that nvcc compiles for; `families`: whether it has targets with the suffix f
    """
    words = row.targets if families or not row.before_families else row.before_families
    offered = [made for made in map(target, words) if made.number in set(known)]
    best = set()
    for chip in chips:
        fitting = [made for made in offered if made.runs_on(chip)]
        if fitting:
            best.add(max(fitting, key=lambda made: (not made.ptx, made.number)))
    best |= {made for made in offered if made.ptx and Target(made.number) in best}
    return tuple(made for made in offered if made in best)


def gencodes(row: Row, made: Iterable[Target]) -> list[str]:
    """What nvcc's -gencode is told for targets of a row.

    A target with a suffix has PTX of its own. The plain ones, which use nothing that the row's oldest chip lacks, share that
    chip's PTX: most of the time goes into making it, and once is enough.
    """
    targets = list(made)
    own = [f"arch=compute_{one.number}{one.suffix},code={one.name}" for one in targets if one.suffix]
    plain = [one.name for one in targets if not one.suffix]
    oldest = min((one.number for one in map(target, row.targets) if not one.suffix), default=0)
    return own + ([f"arch=compute_{oldest},code=[{','.join(plain)}]"] if plain else [])
