"""Other libraries on the same problems, one file each. One that is absent, refuses or fails is reported, never an error.

What a peer offers is bench.contestants.Contestant; `Peer` holds what they have in common. Peers quantize in their own way, or
take quantlib's codes where they read the same numbers; either way a peer's error is measured to what its own weights decode to.
"""

from __future__ import annotations

from bench.peers.base import Peer
from bench.peers.bitsandbytes import BitsAndBytes
from bench.peers.cublas import DequantizeCublas, TorchBf16
from bench.peers.gemlite import GemLite
from bench.peers.humming import Humming
from bench.peers.marlin import Marlin
from bench.peers.scaled_mm import ScaledMm
from bench.peers.tinygemm import TinyGemm
from bench.peers.torchao import TorchAo

__all__ = ["Peer", "list_peers"]


def list_peers() -> list[Peer]:
    """Every peer, whether it is there or not."""
    return [
        TorchBf16(),
        DequantizeCublas(),
        ScaledMm(),
        TinyGemm(),
        Marlin(),
        Humming(),
        GemLite(),
        BitsAndBytes(),
        TorchAo(),
    ]
