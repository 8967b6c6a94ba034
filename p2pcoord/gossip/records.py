"""State records: what each peer says of itself, signed by itself.

A **record** is a peer's whole public state under a stamp (incarnation, version), signed by its owner, so it may be learned
from anyone. Its content is compared as bytes, not as values: a loss may be NaN, and NaN differs from itself.

Some of it others must know at once (`urgent_part`); the rest waits and is gathered (`record_book.py`).
"""

from __future__ import annotations

from hashlib import sha256
from typing import Annotated

import msgspec

from p2pcoord.gossip.version_vector import FORGOTTEN, MAX_COUNTER, Stamp
from p2pcoord.identity import PeerId, Statement
from p2pcoord.wire import encode

MAX_RECORD_BYTES = 4096
"""Typical records have 400 to 800 bytes; 16 addresses and 8 links of usual length fit in this."""

Text = Annotated[str, msgspec.Meta(max_length=64)]
Address = Annotated[str, msgspec.Meta(max_length=192)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class CapabilityProfile(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a machine can do. 0 means: not known.

    `device`: "cpu", "cuda:0 NVIDIA H100", ...; memory in bytes of that device; CPU cores.
    """

    device: Text = "cpu"
    memory_bytes: Count = 0
    cores: Count = 0


class PeerRecord(Statement, frozen=True, tag="peer_record"):
    """One peer's public state, signed by itself.

    `reachable`: others can dial it (a leaf they cannot; it names in `links` the members it stays connected to).
    `base_version`: the version it trains from; `last_sync`: the last version it adopted; `local_loss` and
    `gradient_norm`: of its last local step, None before the first; `queue_length`: assignments it has not finished.
    `leaving`: it said goodbye and takes part no more in this incarnation.
    """

    peer: PeerId
    incarnation: Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNTER)]
    version: Annotated[int, msgspec.Meta(ge=1, lt=FORGOTTEN)]
    name: Text
    addresses: Annotated[tuple[Address, ...], msgspec.Meta(max_length=16)] = ()
    reachable: bool = True
    links: Annotated[tuple[PeerId, ...], msgspec.Meta(max_length=8)] = ()
    profile: CapabilityProfile = CapabilityProfile()
    program_version: Text = ""
    local_step: Count = 0
    base_version: Count = 0
    last_sync: Count = 0
    local_loss: float | None = None
    gradient_norm: float | None = None
    queue_length: Count = 0
    leaving: bool = False
    signature: Annotated[bytes, msgspec.Meta(max_length=64)] = b""

    @property
    def stamp(self) -> Stamp:
        return Stamp(self.incarnation, self.version)


def weigh(record: PeerRecord) -> tuple[bytes, int]:
    """The hash of a record's content without its signature, and its encoded size with it, in bytes."""
    content = encode(msgspec.structs.replace(record, signature=b""))
    length = len(record.signature)
    return sha256(content).digest(), len(content) + length + (1 if length > 23 else 0)  # a longer CBOR header


def urgent_part(record: PeerRecord) -> tuple[object, ...]:
    """What does not wait: how the peer is reached, whether it stays, and the refutation of a suspicion."""
    return record.incarnation, record.name, record.addresses, record.reachable, record.links, record.leaving
