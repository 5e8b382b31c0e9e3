"""Quantizing in the order of the model's own work: each layer is calibrated on what reaches it through the layers quantized
before, so that later ones can make up for earlier ones ("true sequential")."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantlib.algorithms import RTN, Algorithm, InputStatistics, Scaling
from quantlib.calibration.folding import NO_SCALES, fold_segment
from quantlib.calibration.journal import Journal
from quantlib.calibration.statistics import own_share, stage_statistics
from quantlib.calibration.walk import check_tokens, walk
from quantlib.formats.base import Format
from quantlib.running import return_freed_memory
from quantlib.tensor import QuantizedTensor

FALLBACK = RTN()
"""For layers that no calibration token reached."""


@dataclass(frozen=True)
class Quantized:
    """One layer done: its weight, by which algorithm, what was known of its inputs (None where the journal had it), and what
    couldn't be done as the algorithm does it."""

    name: str
    weight: QuantizedTensor
    algorithm: str
    inputs: InputStatistics | None
    note: str = ""


def quantize_in_sequence(
    model: nn.Module,
    chosen: Mapping[str, Format],
    method: Algorithm,
    tokens: Tensor,
    *,
    batch_size: int = 4,
    device: torch.device | str | None = None,
    journal: Journal | None = None,
    watch: Callable[[str], None] = lambda text: None,
) -> Generator[Quantized]:
    """Every chosen layer, in the order of calls. The caller puts each into the model before it asks for the next one.

    tokens   int64 [samples, length]; in a process group of torch.distributed all of them, of which each process takes its share
    journal  keeps each layer, and has those of an earlier run; watch: is told what is being done

    Layers that no token reaches (experts) come last, rounded to nearest. Raises as `calibrate` and as the algorithm.
    """
    check_tokens(model, tokens)
    tokens = own_share(tokens)
    batches = -(-len(tokens) // batch_size)
    left = dict(chosen)
    with closing(walk(model, tokens, list(chosen), batch_size, device)) as segments:
        for segment in segments:
            return_freed_memory()  # what the segment before kept
            unscaled = []
            if isinstance(method, Scaling):
                unscaled = fold_segment(model, segment, chosen, method, batches, journal, watch)
            for stage in segment.stages:
                inputs = None
                if journal is None or not all(name in journal for name in stage):
                    watch(f"{segment.name or 'model'}: inputs of {', '.join(name.rpartition('.')[2] for name in stage)}")
                    inputs = stage_statistics(model, segment, stage, batches, method.needs)
                for name in stage:
                    watch(name)
                    done = _one(model, name, left.pop(name), method, inputs, journal)
                    yield replace(done, note=NO_SCALES) if name in unscaled else done
    for name, fmt in left.items():
        watch(name)
        yield _one(model, name, fmt, method, None, journal)


def _one(
    model: nn.Module, name: str, fmt: Format, method: Algorithm, inputs: InputStatistics | None, journal: Journal | None
) -> Quantized:
    if journal is not None and name in journal:
        return Quantized(name, journal.get(name), method.name, inputs)
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    if inputs is None or inputs.tokens == 0:
        method, inputs = FALLBACK, None
    quantized = method.quantize(weight.detach(), fmt, inputs, name)
    if journal is not None:
        journal.put(name, quantized)
    return Quantized(name, quantized, method.name, inputs)
