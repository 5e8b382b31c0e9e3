"""Scratch memory of kernels that split a sum between programs: partial sums in fp32, and arrival counters that are zero between
calls.

One buffer per device and stream, because calls on one stream follow each other; it grows and is kept. While a CUDA graph is
captured each call gets memory of its own from the graph's pool: the graph may be replayed when the kept buffer is long in use
elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

_PARTIAL: dict[tuple[torch.device, int], Tensor] = {}
_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def split_workspace(splits: int, m: int, n: int, blocks: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """(partial fp32 [>= splits * m * n], counters int32 [>= blocks]) for one launch; None, None for a single split."""
    if splits == 1:
        return None, None
    elements = splits * m * n
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.empty(elements, device=device), torch.zeros(blocks, dtype=torch.int32, device=device)
    key = (device, _stream(device))
    partial, counters = _PARTIAL.get(key), _COUNTERS.get(key)
    if partial is None or partial.numel() < elements:
        partial = _PARTIAL[key] = torch.empty(max(elements, 1 << 20), device=device)
    if counters is None or counters.numel() < blocks:
        counters = _COUNTERS[key] = torch.zeros(max(blocks, 1 << 14), dtype=torch.int32, device=device)
    return partial, counters
