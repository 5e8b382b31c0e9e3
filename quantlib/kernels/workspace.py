"""Scratch memory of kernels that split a sum between programs: partial sums in fp32, and arrival counters that are zero between
calls.

Partial sums come from torch's allocator at every call. Counters are kept, one buffer per device and stream, because calls on
one stream follow each other and leave them at zero. While a CUDA graph is captured each call gets counters of its own from the
graph's pool: the graph may be replayed beside other work.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}
FEWEST_COUNTERS = 1 << 14


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def split_workspace(splits: int, m: int, n: int, blocks: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """(partial fp32 [splits * m * n], counters int32 [>= blocks]) for one launch; None, None for a single split."""
    if splits == 1:
        return None, None
    partial = torch.empty(splits * m * n, device=device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return partial, torch.zeros(blocks, dtype=torch.int32, device=device)
    key = (device, _stream(device))
    counters = _COUNTERS.get(key)
    if counters is None or counters.numel() < blocks:
        counters = _COUNTERS[key] = torch.zeros(max(blocks, FEWEST_COUNTERS), dtype=torch.int32, device=device)
    return partial, counters
