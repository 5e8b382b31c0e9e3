"""calibrate: statistics of every linear layer's inputs under the model as it is, to be kept and used again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.algorithms.statistics import InputStatistics, Need
from quantlib.calibration.shelf import Shelf
from quantlib.calibration.tokens import calibration_tokens
from quantlib.calibration.walk import Segment, check_tokens, hooked, walk
from quantlib.checkpoints import native
from quantlib.errors import CheckpointError, QuantlibError
from quantlib.selection import linear_layers


class Statistics(Mapping[str, InputStatistics]):
    """Name of a linear layer -> InputStatistics, one object for layers that read the same input.

    `save` and `load` keep it as a directory of safetensors and JSON.
    """

    def __init__(self, layers: Mapping[str, InputStatistics]) -> None:
        self._layers = dict(layers)

    def __getitem__(self, name: str) -> InputStatistics:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def save(self, path: str | Path) -> Path:
        """Write a directory; it appears whole or not at all."""
        shared = list({id(found): found for found in self._layers.values()}.values())
        number = {id(found): place for place, found in enumerate(shared)}
        tensors: dict[str, Tensor] = {}
        for place, found in enumerate(shared):
            tensors |= {f"{place}.sum_abs": found.sum_abs, f"{place}.sum_sq": found.sum_sq}
            if found.outer is not None:
                tensors[f"{place}.outer"] = found.outer
        manifest = {
            "statistics": {name: number[id(found)] for name, found in self._layers.items()},
            "tokens": [found.tokens for found in shared],
        }
        target = Path(path)
        with native.atomic_directory(target) as directory:
            native.write(directory, tensors, manifest)
        return target

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote. Raises CheckpointError."""
        manifest = native.read_manifest(Path(path))
        if "statistics" not in manifest:
            raise CheckpointError(f"{path} holds no calibration statistics; it is another kind of quantlib's directories")
        tensors = native.read_tensors(Path(path))
        shared = [
            InputStatistics(tokens, tensors[f"{at}.sum_abs"], tensors[f"{at}.sum_sq"], tensors.get(f"{at}.outer"))
            for at, tokens in enumerate(manifest["tokens"])
        ]
        return cls({name: shared[at] for name, at in manifest["statistics"].items()})


def calibrate(
    model: nn.Module,
    data: str | Sequence[str] | Tensor | None = None,
    tokenizer: Any = None,
    *,
    needs: Need = "moments",
    layers: Iterable[str] | None = None,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    batch_size: int = 4,
    progress: bool = True,
) -> Statistics:
    """What the linear layers of a model read from sample text.

    data      as `calibration_tokens` takes it, with `tokenizer`, `samples`, `length` and `seed`; or windows [samples, length]
    needs     "moments" (mean |x| and x^2) or "hessian" (x x^T too: K^2 floats for each input that layers share)
    layers    names of linear layers; default: all

    One pass, block by block; the model is left as it was. In a process group of torch.distributed every process takes its share
    of the samples and all return the same sums. Raises as `calibration_tokens`; ShapeError for ids outside the vocabulary;
    QuantlibError for NaN or infinite activations, naming the layer. A layer that the text never reaches has `tokens` zero.
    """
    tokens = data if isinstance(data, Tensor) and data.dim() == 2 else None
    if tokens is None:
        tokens = calibration_tokens(data, tokenizer, samples=samples, length=length, seed=seed)
    check_tokens(model, tokens)
    wanted = list(linear_layers(model)) if layers is None else list(layers)
    if needs == "nothing":
        raise QuantlibError("needs='nothing' asks calibration for nothing; choose 'moments' or 'hessian'")
    tokens = own_share(tokens)
    found: dict[str, InputStatistics] = {}
    batches = -(-len(tokens) // batch_size)
    with closing(walk(model, tokens, wanted, batch_size)) as segments:
        for segment in shown(segments, progress, "calibrating"):
            found |= segment_statistics(model, segment, batches, needs)
    for name in wanted:
        if name not in found:
            found[name] = InputStatistics.empty(model.get_submodule(name).in_features, needs)  # type: ignore[arg-type]
    return Statistics({name: found[name] for name in wanted})


def stage_statistics(model: nn.Module, segment: Segment, stage: tuple[str, ...], batches: int, need: Need) -> InputStatistics:
    """Statistics of the input that a stage's layers share; what lies behind them in the segment isn't run, and what led to them
    isn't run again where the segment has a shortcut."""
    layer = model.get_submodule(stage[0])
    found = _empty(layer, need)
    shortcut = segment.shortcuts.get(stage[0])
    kept = Shelf(batches, segment.home)

    def take(x: Tensor) -> None:
        found.add(x, stage[0])
        if shortcut is not None:
            segment.keep(kept, batch, x)

    with hooked(layer, take, stop=True):
        for batch in range(batches):
            segment.run(batch)
    if shortcut is not None:
        shortcut(kept)
    return summed(found)


def segment_statistics(model: nn.Module, segment: Segment, batches: int, need: Need) -> dict[str, InputStatistics]:
    """Statistics of every stage of a segment as it is, from one run."""
    with ExitStack() as stack:
        found = []
        for stage in segment.stages:
            layer = model.get_submodule(stage[0])
            mine = _empty(layer, need)
            found.append(mine)
            stack.enter_context(hooked(layer, partial(mine.add, name=stage[0])))
        for batch in range(batches):
            segment.run(batch)
    totals = [summed(mine) for mine in found]
    return {name: total for stage, total in zip(segment.stages, totals, strict=True) for name in stage}


def _empty(layer: nn.Module, need: Need) -> InputStatistics:
    return InputStatistics.empty(layer.in_features, need, next(layer.parameters()).device)  # type: ignore[arg-type]


def own_share(tokens: Tensor) -> Tensor:
    """The samples of this process of a torch.distributed group; all of them where there is none."""
    if not _distributed():
        return tokens
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    if len(tokens) < world:
        raise QuantlibError(f"{len(tokens)} calibration samples are fewer than the {world} processes that share them")
    return tokens[rank::world]


def summed(statistics: InputStatistics) -> InputStatistics:
    """The sums over all processes of a torch.distributed group, the same in each; otherwise the statistics as they are."""
    if _distributed():
        count = torch.tensor([statistics.tokens], dtype=torch.int64, device=statistics.sum_sq.device)
        for tensor in (count, *statistics.tensors()):
            torch.distributed.all_reduce(tensor)
        statistics.tokens = int(count)
    return statistics


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def shown(segments: Iterator[Segment], progress: bool, title: str) -> Iterator[Segment]:
    """The segments, behind a line that names the present one where someone watches."""
    from rich.console import Console

    console = Console(stderr=True)
    if not (progress and console.is_terminal):
        yield from segments
        return
    with console.status(title) as status:
        for segment in segments:
            status.update(f"{title} {segment.name or 'the rest of the model'}")
            yield segment
