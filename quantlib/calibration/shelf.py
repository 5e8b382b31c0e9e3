"""Shelf: one tensor for each batch, side by side in one piece of memory."""

from __future__ import annotations

import torch
from torch import Tensor


class Shelf:
    """Tensors by number of batch, kept as copies in one allocation that is large enough to go back to the system whole.

    As many allocations of some megabytes they would lie between everything that running a block allocates and frees, and
    leave the allocator with holes. A tensor of another shape or dtype than the one it replaces, or one that finds no room (a
    last batch never needs more than the first), is kept by itself.
    """

    def __init__(self, batches: int, home: torch.device | None = None) -> None:
        """home: where the copies lie; None: where the first tensor does."""
        self._found: list[Tensor | None] = [None] * batches
        self._home = home
        self._room: Tensor | None = None

    def __setitem__(self, batch: int, tensor: Tensor) -> None:
        present = self._found[batch]
        if present is None or present.shape != tensor.shape or present.dtype != tensor.dtype:
            present = self._found[batch] = self._place(tensor)
        present.copy_(tensor)

    def __contains__(self, batch: int) -> bool:
        return self._found[batch] is not None

    def __getitem__(self, batch: int) -> Tensor:
        found = self._found[batch]
        if found is None:
            raise IndexError(f"nothing is kept for batch {batch}")
        return found

    def _place(self, tensor: Tensor) -> Tensor:
        """Room for a tensor like this one."""
        device = self._home or tensor.device
        if self._room is None:
            self._room = torch.empty(tensor.numel() * len(self._found), dtype=tensor.dtype, device=device)
        if len(self._room) < tensor.numel() or self._room.dtype != tensor.dtype:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        place, self._room = self._room[: tensor.numel()], self._room[tensor.numel() :]
        return place.view(tensor.shape)
