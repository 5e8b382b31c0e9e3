"""Factors between a module and the layers that read it: what it makes is divided by s, the layers' weights are multiplied.

    norm --x/s--> q, k, v      v --(attention)/s--> o      norm --x/s--> gate, up      up --(gated)/s--> down

A name only suggests which module comes before. Whether it does, and whether nothing else reads it, a run of the segment shows:
with powers of two as factors both ways cancel to the last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.algorithms import Scaling
from quantlib.calibration.journal import Journal
from quantlib.calibration.statistics import segment_statistics
from quantlib.calibration.walk import Segment
from quantlib.formats.base import Format
from quantlib.nn import QuantLinear

PRECEDING = (
    (("q_proj", "k_proj", "v_proj", "qkv_proj"), 2, ("input_layernorm", "self_attn_layer_norm")),
    (("gate_proj", "up_proj", "gate_up_proj"), 2, ("pre_feedforward_layernorm", "post_attention_layernorm")),
    (("fc1",), 1, ("final_layer_norm",)),
    (("o_proj", "out_proj"), 1, ("v_proj",)),
    (("down_proj",), 1, ("up_proj",)),
    (("fc2",), 1, ("fc1",)),
)
"""Layers of one stage by the last part of their names; how many parts to cut off, and what the module before is then called."""

NO_SCALES = "no scales: what comes before can't take them up"

EXACT = 1e-4
"""How much of the change that the module alone makes may be left where powers of two cancel exactly, but for kernels' order."""


@dataclass(frozen=True)
class Fold:
    """A module and the layers that read it.

    module   the name of a norm or of a linear layer that makes P numbers
    layers   names of linear layers with K inputs each
    offset   1 where the norm multiplies by 1 + weight, else 0
    heads    (size, copies) where each run of `size` numbers is read `copies` times in a row (grouped-query attention)
    """

    module: str
    layers: tuple[str, ...]
    offset: float = 0.0
    heads: tuple[int, int] | None = None

    def sources(self, k: int) -> Tensor | None:
        """int64 [k]: which of the module's numbers each of k inputs is a copy of."""
        if self.heads is None:
            return None
        size, copies = self.heads
        column = torch.arange(k)
        return column // (size * copies) * size + column % size


def fold_segment(
    model: nn.Module,
    segment: Segment,
    formats: Mapping[str, Format],
    method: Scaling,
    batches: int,
    journal: Journal | None = None,
    watch: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Fold the factors that `method` wants, or that a journal has, into a segment of which nothing is quantized yet.

    Returns the layers that go without: no module before them is found, or folding changes what the segment answers. Parameters
    are replaced, never written to: another model that shares them stays as it is.
    """
    folds: list[Fold] = []
    left: list[str] = []
    plain = _answer(segment)
    for stage in segment.stages:
        fold = next((fold for fold in _suggested(model, stage) if _cancels(model, segment, fold, plain)), None)
        if fold is None:
            watch(f"{segment.name or 'model'}: {NO_SCALES} ({', '.join(name.rpartition('.')[2] for name in stage)})")
            left += stage
        else:
            folds.append(fold)
    key = segment.stages[0][0]
    factors = None if journal is None else journal.get_factors(key)
    if factors is None:
        watch(f"{segment.name or 'model'}: scales of {len(folds)} stages")
        factors = _search(model, segment, folds, formats, method, batches)
        if journal is not None:
            journal.put_factors(key, factors)
    for fold in folds:
        if fold.module in factors:
            _apply(model, fold, factors[fold.module])
    return left


def _search(
    model: nn.Module,
    segment: Segment,
    folds: Sequence[Fold],
    formats: Mapping[str, Format],
    method: Scaling,
    batches: int,
) -> dict[str, Tensor]:
    """Name of a module -> factors fp32 [P]."""
    if not folds:
        return {}
    statistics = segment_statistics(model, segment, batches, "hessian")
    found = {}
    for fold in folds:
        weights = [_weight(model.get_submodule(name)) for name in fold.layers]
        sources = fold.sources(weights[0].shape[1])
        sources = None if sources is None else sources.to(weights[0].device)
        factors = method.scales(weights, [formats[name] for name in fold.layers], statistics[fold.layers[0]], sources)
        if factors is not None:
            found[fold.module] = factors.to(torch.float32)
    return found


def _suggested(model: nn.Module, stage: tuple[str, ...]) -> Iterator[Fold]:
    """What names and shapes allow, where no parameter in question is held twice."""
    held = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))

    def shared(module: nn.Module) -> bool:
        return any(held[id(parameter)] != 1 for parameter in module.parameters(recurse=False))

    if any(shared(model.get_submodule(name)) for name in stage):
        return
    for leaves, levels, modules in PRECEDING:
        if not all(name.rpartition(".")[2] in leaves for name in stage):
            continue
        parent = stage[0]
        for _ in range(levels):
            parent = parent.rpartition(".")[0]
        for leaf in modules:
            name = f"{parent}.{leaf}" if parent else leaf
            try:
                module = model.get_submodule(name)
            except AttributeError:
                continue
            weight = getattr(module, "weight", None)
            if not isinstance(weight, nn.Parameter) or isinstance(module, QuantLinear) or shared(module):
                continue
            made, read = len(weight), _weight(model.get_submodule(stage[0])).shape[1]
            if isinstance(module, nn.Linear):
                if made == read:
                    yield Fold(name, stage)
                size = getattr(model.get_submodule(parent), "head_dim", None)
                if isinstance(size, int) and made != read and made % size == 0 and read % made == 0:
                    yield Fold(name, stage, heads=(size, read // made))
            elif weight.dim() == 1 and made == read:
                yield Fold(name, stage)
                yield Fold(name, stage, offset=1.0)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _apply(model: nn.Module, fold: Fold, factors: Tensor, layers: bool = True) -> list[tuple[nn.Module, str, Any]]:
    """Fold factors [P] in; returns (module, name, former parameter) of every parameter that was replaced."""
    before: list[tuple[nn.Module, str, Any]] = []

    def change(owner: nn.Module, name: str, wanted: Tensor) -> None:
        old = getattr(owner, name)
        before.append((owner, name, old))
        setattr(owner, name, nn.Parameter(wanted.to(old.dtype), requires_grad=old.requires_grad))

    module: Any = model.get_submodule(fold.module)
    old = module.weight.detach().to(torch.float32)
    s = factors.to(old.device)
    if isinstance(module, nn.Linear):
        change(module, "weight", old / s[:, None])
    else:
        change(module, "weight", (old + fold.offset) / s - fold.offset)
        # The factors that are left after rounding, which the layers can make good.
        new = module.weight.detach().to(torch.float32) + fold.offset
        s = torch.where(new == 0, s, (old + fold.offset) / new)
        s = torch.where(s > 0, s, factors.to(old.device))
    if getattr(module, "bias", None) is not None:
        change(module, "bias", module.bias.detach().to(torch.float32) / s)
    for name in fold.layers if layers else ():
        layer: Any = model.get_submodule(name)
        sources = fold.sources(layer.in_features)
        columns = s if sources is None else s[sources.to(s.device)]
        change(layer, "weight", _weight(layer).to(torch.float32) * columns.to(layer.weight.device))
    return before


@contextmanager
def _folded(model: nn.Module, fold: Fold, factors: Tensor, layers: bool = True) -> Iterator[None]:
    before = _apply(model, fold, factors, layers)
    try:
        yield
    finally:
        for owner, name, parameter in reversed(before):
            setattr(owner, name, parameter)


def _cancels(model: nn.Module, segment: Segment, fold: Fold, plain: Tensor) -> bool:
    """Whether the segment answers the first batch as before (`plain`), up to rounding, with factors 1/2, 1 and 2 folded in.

    What the rounding may be is counted against the change that the module's own part makes.
    """
    module: Any = model.get_submodule(fold.module)
    generator = torch.Generator().manual_seed(0)
    factors = 2.0 ** torch.randint(-1, 2, (len(module.weight),), generator=generator)
    with _folded(model, fold, factors):
        both = _answer(segment)
    with _folded(model, fold, factors, layers=False):
        alone = _answer(segment)
    # 1 + weight is rounded to the weight's dtype, which no power of two avoids.
    limit = max(EXACT, 4 * torch.finfo(module.weight.dtype).eps) if fold.offset else EXACT
    return float((both - plain).norm()) < limit * float((alone - plain).norm())


def _answer(segment: Segment) -> Tensor:
    found = segment.run(0)
    while not isinstance(found, Tensor):
        found = next(iter(found.values() if isinstance(found, Mapping) else found))
    return found.to(torch.float64)
