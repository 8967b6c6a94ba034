"""What a peer is given: its settings, and at every start what an earlier life left."""

from __future__ import annotations

import msgspec

from p2pcoord.consensus.voter import Timing
from p2pcoord.gossip.records import CapabilityProfile
from p2pcoord.rounds.setting import Rules

# The log is rewritten when it holds this much: some 650 rounds of four members.
COMPACT_AFTER_BYTES = 2 << 20


class Restored(msgspec.Struct, frozen=True):
    """What an earlier life left: the log's frames (empty on the first start), the roots of the content on the disk, and
    fresh entropy for this life."""

    frames: tuple[bytes, ...]
    entropy: bytes
    contents: frozenset[bytes] = frozenset()


class PeerSettings(msgspec.Struct, frozen=True):
    """What this machine brings, and what the run agreed. `secret` is None in an open run."""

    name: str
    secret: bytes | None
    committee_size: int
    rotation_rounds: int
    timing: Timing = Timing()
    rules: Rules | None = None
    """The run's rules for rounds; None when the owner gives the peer another `work`."""
    gossip: bool = False
    """Whether this peer gossips, probes and dials; False in tests of the agreement alone, where links are given."""
    addresses: tuple[str, ...] = ()
    """Multiaddrs at which others may reach this peer."""
    bootstrap: tuple[str, ...] = ()
    """Addresses (multiaddr or host:port) to dial while this peer knows nobody."""
    profile: CapabilityProfile = CapabilityProfile()
    program_version: str = ""
    compact_after_bytes: int = COMPACT_AFTER_BYTES
    kept_bodies: int = 256
    """Newest rounds whose bodies stay, in memory and in a log that is rewritten: what a member that was away is told of, and
    what metrics and history show at least after a restart."""
    minimum_memory_bytes: int = 0
    """What the run asks of a joiner's device."""
    trusted: tuple[int, bytes] | None = None
    """(height, record) that the inviter had certified: a chain without it is refused."""
