"""Walking a model's blocks over sample tokens: what reaches each block is kept, and a block runs as often as it is asked to.

    tokens --model, stopped at the first block--> hidden states --block 0--> hidden states --block 1--> ...

Only the block at hand has to be on the device. What else a block is given (rotary angles, masks) doesn't depend on the tokens
and is taken from one whole run. A model without a chain of blocks is walked as one block that is run from the start each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.errors import QuantlibError, ShapeError
from quantlib.running import call, evaluating, vocabulary_of

HIDDEN = "hidden_states"


class _Stop(Exception):  # noqa: N818 it reports no error
    """Ends a forward pass whose rest is of no interest."""


@dataclass
class Segment:
    """A part of the model that can be run by itself over every batch.

    name     of the block; "" for what lies outside blocks
    stages   names of linear layers that read one and the same input, in the order of their calls
    run      runs it over batch number i
    """

    name: str
    module: nn.Module
    stages: list[tuple[str, ...]]
    run: Callable[[int], Any]


@dataclass
class _Call:
    """What a block was given besides hidden states; whether it takes them by name, and answers with a tuple."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    by_name: bool
    in_tuple: bool = False


@dataclass
class _Recording:
    """One whole run: calls of blocks, and linear layers in the order of their calls, by the block that they ran in."""

    calls: list[_Call] = field(default_factory=list)
    stages: dict[int, list[list[str]]] = field(default_factory=dict)


def walk(
    model: nn.Module, tokens: Tensor, names: Sequence[str], batch_size: int = 4, device: torch.device | str | None = None
) -> Iterator[Segment]:
    """The model's segments that hold any of the linear layers `names`, in order; between two of them the walk runs the first
    one again, as it then is, to learn what reaches the second.

    tokens  int64 [samples, length] (or whatever else the model takes, batched in its first dimension)
    device  where blocks run and stay afterwards; default: where they lie
    """
    batches = list(tokens.split(batch_size))
    with evaluating(model):
        blocks = _blocks(model, names)
        recorded = _recordings(model, batches, names, blocks)
        if recorded is None:
            blocks = []
            recorded = _recordings(model, batches, names, blocks)
        assert recorded is not None
        stages = recorded[len(batches[0])].stages
        calls = {size: recording.calls for size, recording in recorded.items()}
        yield from _Walk(model, batches, blocks, calls, stages, device).segments()


class _Walk:
    def __init__(
        self,
        model: nn.Module,
        batches: list[Tensor],
        blocks: list[tuple[str, nn.Module]],
        calls: dict[int, list[_Call]],
        stages: dict[int, list[list[str]]],
        device: torch.device | str | None,
    ) -> None:
        self.model, self.batches, self.blocks, self.calls, self.device = model, batches, blocks, calls, device
        self.stages = {at: [tuple(stage) for stage in found] for at, found in stages.items()}
        self.hidden: list[Tensor] = []

    def segments(self) -> Iterator[Segment]:
        if not self.blocks:
            yield Segment("", self.model, self.stages.get(-1, []), _guarded(self._whole))
            return
        if -1 in self.stages:
            yield Segment("", self.model, self.stages[-1], self._until_first)
        self.hidden = [self._until_first(batch) for batch in range(len(self.batches))]
        last = max(self.stages)
        for number, (name, block) in enumerate(self.blocks):
            if self.device is not None:
                block.to(self.device)
            if number in self.stages:
                yield Segment(name, block, self.stages[number], _guarded(partial(self._run, number)))
            if number < last:
                for batch in range(len(self.batches)):
                    found = self._run(number, batch)
                    self.hidden[batch] = found[0] if isinstance(found, tuple) else found
        if len(self.blocks) in self.stages:
            with self._skipped_blocks() as whole:
                yield Segment("", self.model, self.stages[len(self.blocks)], _guarded(whole))

    def _whole(self, batch: int) -> Any:
        return _forward(self.model, self.batches[batch])

    def _until_first(self, batch: int) -> Tensor:
        """The hidden states that reach the first block."""
        kept: list[Tensor] = []

        def take(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            kept.append(arguments[0] if arguments else keywords[HIDDEN])
            raise _Stop

        with _hook(self.blocks[0][1], take):
            _guarded(self._whole)(batch)
        return kept[0] if kept else torch.empty(0)

    @torch.no_grad()
    def _run(self, number: int, batch: int) -> Any:
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
        at = {"batch": 0}

        def answer(number: int) -> Callable[..., Any]:
            def forward(*arguments: Any, **keywords: Any) -> Any:
                hidden = self.hidden[at["batch"]]
                in_tuple = self.calls[len(self.batches[at["batch"]])][number].in_tuple
                return (hidden,) if in_tuple else hidden

            return forward

        def run(batch: int) -> Any:
            at["batch"] = batch
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

    with _hook(layer, hook):
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


def _blocks(model: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The list of blocks that holds most of the layers, the outermost where several hold as many."""
    best: list[tuple[str, nn.Module]] = []
    most = 0
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        inside = sum(name.startswith(f"{path}.") for name in names)
        if inside > most:
            best, most = [(f"{path}.{key}", block) for key, block in module.named_children()], inside
    return best


def _recordings(
    model: nn.Module, batches: list[Tensor], names: Sequence[str], blocks: list[tuple[str, nn.Module]]
) -> dict[int, _Recording] | None:
    """One run for every size of a batch (masks and positions may follow it); None where `blocks` aren't a chain."""
    found = {}
    for size in dict.fromkeys(len(batch) for batch in batches):
        batch = next(batch for batch in batches if len(batch) == size)
        recording = _record(model, batch, names, blocks)
        if recording is None:
            return None
        found[size] = recording
    return found


def _record(model: nn.Module, batch: Tensor, names: Sequence[str], blocks: list[tuple[str, nn.Module]]) -> _Recording | None:
    """One whole run; None where `blocks` aren't a chain, each called once on what the one before gave."""
    recording = _Recording()
    state: dict[str, Any] = {"at": -1, "input": None, "output": None, "chain": True}

    def enter(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            by_name = not arguments
            hidden = keywords.get(HIDDEN) if by_name else arguments[0]
            expected = state["output"]
            state["chain"] &= number == len(recording.calls) and (number == 0 or hidden is expected)
            others = {key: value for key, value in keywords.items() if not (by_name and key == HIDDEN)}
            recording.calls.append(_Call(arguments[1:], others, by_name))
            state["at"], state["output"] = number, None

        return hook

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        in_tuple = isinstance(output, tuple)
        recording.calls[-1].in_tuple = in_tuple
        state["output"] = output[0] if in_tuple else output
        if len(recording.calls) == len(blocks):
            state["at"] = len(blocks)

    def called(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            read = arguments[0] if arguments else keywords["input"]
            stages = recording.stages.setdefault(state["at"], [])
            seen = any(name in stage for found in recording.stages.values() for stage in found)
            if stages and read is state["input"] and not seen:
                stages[-1].append(name)
            elif not seen:
                stages.append([name])
            state["input"] = read

        return hook

    with ExitStack() as stack:
        for number, (_, block) in enumerate(blocks):
            stack.enter_context(_hook(block, enter(number)))
            handle = block.register_forward_hook(leave)
            stack.callback(handle.remove)
        for name in names:
            stack.enter_context(_hook(model.get_submodule(name), called(name)))
        _forward(model, batch)
    complete = state["chain"] and len(recording.calls) == len(blocks)
    return recording if complete else None


@torch.no_grad()
def _forward(model: nn.Module, batch: Tensor) -> Any:
    return call(model, batch)


@contextmanager
def _hook(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(part, device) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value
