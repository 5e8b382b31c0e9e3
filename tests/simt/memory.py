"""Running emulated kernels on torch tensors: which memory they may touch, in which order blocks run, what was counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

import torch


class SimtError(RuntimeError):
    """A kernel did what it must not, or what a GPU would leave to chance. The message names thread, block and line."""


def extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size()


@contextmanager
def allowed(
    module: ModuleType, reads: Mapping[str, torch.Tensor], writes: Mapping[str, torch.Tensor] | None = None
) -> Iterator[None]:
    """Lets the kernels of `module` read the tensors `reads`, read and write `writes`, and nothing else. Names are for errors.

    One tensor may come twice under two names, if both only read it; other overlaps are errors.
    """
    known: set[tuple[int, int]] = set()
    try:
        for tensors, writable in ((reads, False), (writes or {}, True)):
            for name, tensor in tensors.items():
                place = (tensor.data_ptr(), extent(tensor))
                if place[1] == 0 or (not writable and place in known):
                    continue
                module.allow(*place, name, writable)
                known.add(place)
        yield
    finally:
        for address, _ in known:
            module.forget(address)


@contextmanager
def block_order(module: ModuleType, order: str, seed: int = 0) -> Iterator[None]:
    """Runs blocks, and a block's warps, "forward", "reverse" or "random" by `seed`. Results must not depend on it."""
    module.set_order(order, seed)
    try:
        yield
    finally:
        module.set_order("forward")
