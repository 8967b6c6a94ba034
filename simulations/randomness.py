"""Every random stream of a simulation is derived by hash from (seed, purpose, peer).

So one more draw in one place moves nothing in another, and a seed reproduces a run on every machine and Python.
"""

from __future__ import annotations

from hashlib import sha256
from random import Random


def derive(seed: int, purpose: str, who: str = "") -> bytes:
    """32 bytes that only this seed, purpose and peer have."""
    return sha256(f"p2pcoord simulation\0{seed}\0{purpose}\0{who}".encode()).digest()


def stream(seed: int, purpose: str, who: str = "") -> Random:
    """A stream of its own for one purpose of one peer."""
    return Random(derive(seed, purpose, who))
