"""One run of a model, watched: which linear layers read one input, what blocks are given, which modules end with a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.running import call

HIDDEN = "hidden_states"


@dataclass
class Call:
    """What a block was given besides hidden states; whether it takes them by name, and answers with a tuple."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    by_name: bool
    in_tuple: bool = False


@dataclass(frozen=True)
class Ending:
    """A module inside a block whose answer is a linear layer's, by itself or before `nones` times None in a tuple."""

    module: str
    nones: int | None

    def answer(self, y: Tensor) -> Any:
        return y if self.nones is None else (y, *[None] * self.nones)


@dataclass
class Recording:
    """One whole run.

    calls    of blocks
    stages   number of a block (-1: before the first, their number: behind the last) -> linear layers in the order of their
             calls, those together that read one and the same tensor
    endings  linear layer -> the outermost module inside its block that answers with what the layer gave
    """

    calls: list[Call] = field(default_factory=list)
    stages: dict[int, list[list[str]]] = field(default_factory=dict)
    endings: dict[str, Ending] = field(default_factory=dict)


def find_blocks(model: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
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


def record(
    model: nn.Module, batches: Sequence[Tensor], names: Sequence[str], blocks: list[tuple[str, nn.Module]]
) -> dict[int, Recording] | None:
    """One run for every size of a batch (masks and positions may follow it); None where `blocks` aren't a chain, each called
    once on what the one before gave."""
    found = {}
    for size in dict.fromkeys(len(batch) for batch in batches):
        batch = next(batch for batch in batches if len(batch) == size)
        recorder = _Recorder(model, names, blocks)
        recorder.run(batch)
        if not recorder.complete:
            return None
        found[size] = recorder.recording
    return found


class _Recorder:
    def __init__(self, model: nn.Module, names: Sequence[str], blocks: list[tuple[str, nn.Module]]) -> None:
        self.model, self.names, self.blocks = model, names, blocks
        self.recording = Recording()
        self.at = -1
        self.chained = True
        self.handed_on: Tensor | None = None  # what the last block gave
        self.read: Tensor | None = None  # what the last linear layer read,
        self.made: tuple[str, Tensor] | None = None  # and what it gave

    @property
    def complete(self) -> bool:
        return self.chained and len(self.recording.calls) == len(self.blocks)

    def run(self, batch: Tensor) -> None:
        with ExitStack() as stack, torch.no_grad():
            for number, (path, block) in enumerate(self.blocks):
                stack.enter_context(hook_before(block, self._entering(number)))
                stack.enter_context(_hook_after(block, self._leave_block))
                for name, module in block.named_modules():
                    if name and any(layer.startswith(f"{path}.{name}.") for layer in self.names):
                        stack.enter_context(_hook_after(module, self._leaving(f"{path}.{name}")))
            for name in self.names:
                layer = self.model.get_submodule(name)
                stack.enter_context(hook_before(layer, self._reading(name)))
                stack.enter_context(_hook_after(layer, self._making(name)))
            call(self.model, batch)
        self.handed_on = self.read = self.made = None

    def _entering(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            by_name = not arguments
            hidden = keywords.get(HIDDEN) if by_name else arguments[0]
            calls = self.recording.calls
            self.chained &= number == len(calls) and (number == 0 or hidden is self.handed_on)
            others = {key: value for key, value in keywords.items() if not (by_name and key == HIDDEN)}
            calls.append(Call(arguments[1:], others, by_name))
            self.at, self.handed_on = number, None

        return hook

    def _leave_block(self, module: nn.Module, arguments: Any, output: Any) -> None:
        in_tuple = isinstance(output, tuple)
        self.recording.calls[-1].in_tuple = in_tuple
        self.handed_on = output[0] if in_tuple else output
        if len(self.recording.calls) == len(self.blocks):
            self.at = len(self.blocks)

    def _reading(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            read = arguments[0] if arguments else keywords["input"]
            stages = self.recording.stages.setdefault(self.at, [])
            if not any(name in stage for found in self.recording.stages.values() for stage in found):
                if stages and read is self.read:
                    stages[-1].append(name)
                else:
                    stages.append([name])
            self.read = read

        return hook

    def _making(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            self.made = name, output

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            first, others = (output[0], output[1:]) if isinstance(output, tuple) and output else (output, ())
            if self.made is not None and first is self.made[1] and all(part is None for part in others):
                nones = len(others) if isinstance(output, tuple) else None
                self.recording.endings[self.made[0]] = Ending(name, nones)

        return hook


@contextmanager
def hook_before(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    """hook(module, arguments, keywords) before every call of the module."""
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _hook_after(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
