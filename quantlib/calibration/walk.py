"""Walking a model's blocks over sample tokens: what reaches each block is kept, and a block runs as often as it is asked to.

    tokens --model, stopped at the first block--> hidden states --block 0--> hidden states --block 1--> ...

Only the block at hand has to be on the device. What else a block is given (rotary angles, masks) doesn't depend on the tokens
and is taken from one whole run. A model without a chain of blocks is walked as one block that is run from the start each time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.calibration.recording import HIDDEN, Ending, Recording, find_blocks, hook_before, record
from quantlib.calibration.shelf import Shelf
from quantlib.errors import QuantlibError, ShapeError
from quantlib.running import call, evaluating, vocabulary_of

KEPT = 2.5
"""What a block's layers read is kept up to so many times the hidden states' size; what is not is computed again."""


class _Stop(Exception):  # noqa: N818 it reports no error
    """Ends a forward pass whose rest is of no interest."""


@dataclass
class Segment:
    """A part of the model that can be run by itself over every batch.

    name       of the block; "" for what lies outside blocks
    stages     names of linear layers that read one and the same input, in the order of their calls
    run        runs it over batch number i
    shortcuts  for a layer that a module inside the segment ends with: told what the layer reads, all [batches] or some, later
               runs don't compute it again, but let the module answer with the layer's answer to it
    home       where such inputs are kept; None: where they are
    room       bytes that they may take
    """

    name: str
    module: nn.Module
    stages: list[tuple[str, ...]]
    run: Callable[[int], Any]
    shortcuts: Mapping[str, Callable[[Shelf], None]] = field(default_factory=dict)
    home: torch.device | None = None
    room: float = 0.0

    def keep(self, kept: Shelf, batch: int, x: Tensor) -> None:
        """Put x on a shelf, if there is room."""
        if x.nbytes <= self.room:
            self.room -= x.nbytes
            kept[batch] = x


def walk(
    model: nn.Module, tokens: Tensor, names: Sequence[str], batch_size: int = 4, device: torch.device | str | None = None
) -> Generator[Segment]:
    """The model's segments that hold any of the linear layers `names`, in order; between two of them the walk runs the first
    one again, as it then is, to learn what reaches the second.

    Close it where it isn't walked to its end: the model's modules are as before then.

    tokens  int64 [samples, length] (or whatever else the model takes, batched in its first dimension)
    device  where blocks run and stay afterwards; default: where they lie
    """
    batches = list(tokens.split(batch_size))
    with evaluating(model):
        blocks = find_blocks(model, names)
        recorded = record(model, batches, names, blocks)
        if recorded is None:
            blocks = []
            recorded = record(model, batches, names, blocks)
        assert recorded is not None
        yield from _Walk(model, batches, blocks, recorded, device).segments()


class _Walk:
    def __init__(
        self,
        model: nn.Module,
        batches: list[Tensor],
        blocks: list[tuple[str, nn.Module]],
        recorded: dict[int, Recording],
        device: torch.device | str | None,
    ) -> None:
        self.model, self.batches, self.blocks, self.device = model, batches, blocks, device
        self.calls = {size: recording.calls for size, recording in recorded.items()}
        first = recorded[len(batches[0])]
        self.stages = {at: [tuple(stage) for stage in found] for at, found in first.stages.items()}
        self.endings = first.endings
        self.hidden = Shelf(len(batches))
        self.batch = 0  # the one that is being run

    def segments(self) -> Iterator[Segment]:
        if not self.blocks:
            yield Segment("", self.model, self.stages.get(-1, []), _guarded(self._whole))
            return
        if -1 in self.stages:
            yield Segment("", self.model, self.stages[-1], self._until_first)
        for batch in range(len(self.batches)):
            self.hidden[batch] = self._until_first(batch)
        last = max(self.stages)
        for number, (name, block) in enumerate(self.blocks):
            if self.device is not None:
                block.to(self.device)
            with ExitStack() as shortcuts:
                if number in self.stages:
                    yield self._segment(number, name, block, shortcuts)
                for batch in range(len(self.batches) if number < last else 0):
                    found = self._run(number, batch)
                    self.hidden[batch] = found[0] if isinstance(found, tuple) else found
        if len(self.blocks) in self.stages:
            with self._skipped_blocks() as whole:
                yield Segment("", self.model, self.stages[len(self.blocks)], _guarded(whole))

    def _segment(self, number: int, name: str, block: nn.Module, shortcuts: ExitStack) -> Segment:
        stages = self.stages[number]
        closing = {stage[0]: self.endings[stage[0]] for stage in stages if len(stage) == 1 and stage[0] in self.endings}
        known = {layer: partial(self._shorten, layer, ending, shortcuts) for layer, ending in closing.items()}
        home = None if self.device is None else self.hidden[0].device
        room = KEPT * sum(self.hidden[batch].nbytes for batch in range(len(self.batches)))
        return Segment(name, block, stages, _guarded(partial(self._run, number)), known, home, room)

    def _shorten(self, layer: str, ending: Ending, shortcuts: ExitStack, inputs: Shelf) -> None:
        module = self.model.get_submodule(ending.module)
        whole = module.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            if self.batch not in inputs:
                return whole(*arguments, **keywords)
            x = inputs[self.batch] if self.device is None else inputs[self.batch].to(self.device)
            return ending.answer(self.model.get_submodule(layer)(x))

        module.forward = forward
        shortcuts.callback(module.__dict__.pop, "forward")

    def _whole(self, batch: int) -> Any:
        return _forward(self.model, self.batches[batch])

    def _until_first(self, batch: int) -> Tensor:
        """The hidden states that reach the first block."""
        kept: list[Tensor] = []

        def take(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            kept.append(arguments[0] if arguments else keywords[HIDDEN])
            raise _Stop

        with hook_before(self.blocks[0][1], take):
            _guarded(self._whole)(batch)
        return kept[0] if kept else torch.empty(0)

    @torch.no_grad()
    def _run(self, number: int, batch: int) -> Any:
        self.batch = batch
        hidden = self.hidden[batch]
        call = self.calls[len(self.batches[batch])][number]
        arguments, keywords = call.arguments, call.keywords
        if self.device is not None:
            hidden, arguments, keywords = (_moved(part, self.device) for part in (hidden, arguments, keywords))
        block = self.blocks[number][1]
        if call.by_name:
            found = block(*arguments, **{**keywords, HIDDEN: hidden})
        else:
            found = block(hidden, *arguments, **keywords)
        return _moved(found, self.hidden[batch].device) if self.device is not None else found

    @contextmanager
    def _skipped_blocks(self) -> Iterator[Callable[[int], Any]]:
        """The whole model with blocks that hand on what is known already."""

        def answer(number: int) -> Callable[..., Any]:
            def forward(*arguments: Any, **keywords: Any) -> Any:
                hidden = self.hidden[self.batch]
                in_tuple = self.calls[len(self.batches[self.batch])][number].in_tuple
                return (hidden,) if in_tuple else hidden

            return forward

        def run(batch: int) -> Any:
            self.batch = batch
            return _forward(self.model, self.batches[batch])

        with ExitStack() as stack:
            for number, (_, block) in enumerate(self.blocks):
                block.forward = answer(number)
                stack.callback(block.__dict__.pop, "forward")
            yield run


def _guarded(run: Callable[[int], Any]) -> Callable[[int], Any]:
    """The run, to its end or to a `_Stop`."""

    def guarded(batch: int) -> Any:
        try:
            return run(batch)
        except _Stop:
            return None

    return guarded


@contextmanager
def hooked(layer: nn.Module, take: Callable[[Tensor], None], stop: bool = False) -> Iterator[None]:
    """Give `take` the input of a linear layer whenever it is called; `stop`: a segment's run ends there."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        take(arguments[0] if arguments else keywords["input"])
        if stop:
            raise _Stop

    with hook_before(layer, hook):
        yield


def check_tokens(model: nn.Module, tokens: Tensor) -> None:
    """Raise ShapeError for token ids that the model's embedding doesn't have, or for no tokens at all."""
    if tokens.dim() < 1 or tokens.numel() == 0:
        raise QuantlibError(f"calibration data is empty: {list(tokens.shape)}")
    size = vocabulary_of(model)
    if tokens.is_floating_point() or size is None:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= size:
        raise ShapeError(
            f"calibration token id {low if low < 0 else high} is outside the model's vocabulary of {size}: "
            "were the tokens made by its own tokenizer?"
        )


@torch.no_grad()
def _forward(model: nn.Module, batch: Tensor) -> Any:
    return call(model, batch)


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(part, device) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value
