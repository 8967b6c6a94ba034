"""Version vectors: what a peer knows of everybody, small enough to send every second.

Theory of operation
    Every peer's state record carries a **stamp** (incarnation, version): the version grows with each change, the
    incarnation with each restart or refutation. A **version vector** maps peers to the newest stamp known. Stamps are
    totally ordered, so vectors form a lattice: learning takes the larger stamp for each peer, in whatever order and however
    often it is heard, and nothing ever goes back. This is the digest of Scuttlebutt ("Efficient Reconciliation and Flow
    Control for Anti-Entropy", van Renesse et al. 2008, section 3) with one value per peer.

    A peer id has 52 characters and a stamp 2 to 10 bytes, so ids would be nearly all of a digest. Members are therefore
    named by their **index in the order of admission**, which is agreed (the ledger says it) and only grows: their stamps
    travel as two columns of numbers. Peers outside the order travel with their ids.

    Two peers may know orders of different length. A digest says how long its sender's order is; peers beyond that are, to
    the sender, outside the order. It also says what it **covers**: a window of indices and an interval of ids. Nothing
    follows from the absence of what is not covered, so a digest has a fixed largest size whatever the size of the run,
    and several digests together cover everybody.

    A **forgotten** peer keeps the stamp (incarnation, FORGOTTEN): newer than every version of that incarnation, so nobody
    sends its old records again, and nothing to ask for.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Annotated

import msgspec

from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.identity import PeerId

MAX_COUNTER = 2**32 - 1
"""Largest incarnation and version. At one change each 200 ms, versions of one incarnation last 27 years; it is 5 bytes of
CBOR and so bounds the size of a digest."""

FORGOTTEN = MAX_COUNTER
"""The version that stands for "removed here; only a higher incarnation is news"."""

MAX_DENSE = 2048
"""Indices in one digest. A run up to this size is covered by one digest of typically 4-8 KiB (at most 20 KiB); a larger
one by several."""

MAX_OTHERS = 128
"""Peers with their ids in one digest: about 60 bytes each. Outside the order are only those about to join."""

Counter = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNTER)]
Index = Annotated[int, msgspec.Meta(ge=0, le=2**31)]


class Stamp(msgspec.Struct, frozen=True, order=True, array_like=True, forbid_unknown_fields=True):
    """How new a peer's record is: incarnation first, then version."""

    incarnation: Counter
    version: Counter


NOTHING = Stamp(0, 0)
"""The stamp of a peer of which nothing is known. Real incarnations and versions begin with 1."""


class OtherStamp(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The stamp of a peer outside the sender's order of admission."""

    peer: PeerId
    stamp: Stamp


class Digest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A part of a version vector, as it travels.

    `order_length`: how many admitted peers the sender knows. `incarnations` and `versions`: the stamps of the indices
    from `start` on, (0, 0) where nothing is known. `others`: all that the sender knows outside its order with
    `after` < id <= `until`; an empty `until` means no upper end.
    """

    order_length: Index
    start: Index
    incarnations: Annotated[tuple[Counter, ...], msgspec.Meta(max_length=MAX_DENSE)]
    versions: Annotated[tuple[Counter, ...], msgspec.Meta(max_length=MAX_DENSE)]
    others: Annotated[tuple[OtherStamp, ...], msgspec.Meta(max_length=MAX_OTHERS)]
    after: PeerId = ""
    until: PeerId = ""

    def check(self) -> None:
        """Raises RemoteError("bad_digest") when its parts do not fit together."""
        if len(self.incarnations) != len(self.versions):
            raise RemoteError(
                "bad_digest", f"{len(self.incarnations)} incarnations, {len(self.versions)} versions"
            )
        if self.start + len(self.versions) > self.order_length:
            raise RemoteError(
                "bad_digest", f"{self.start} + {len(self.versions)} indices of {self.order_length}"
            )
        ids = [other.peer for other in self.others]
        if any(first >= second for first, second in itertools.pairwise(ids)):
            raise RemoteError("bad_digest", "ids not in ascending order")
        if any(not self.covers_id(peer) for peer in ids):
            raise RemoteError("bad_digest", "ids outside the interval")

    def covers_id(self, peer: str) -> bool:
        """Whether the absence of this peer (outside the sender's order) means that the sender does not know it."""
        return self.after < peer and (not self.until or peer <= self.until)


class Wanted(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A record asked for: whose (index in the order of the digest's sender, or id), and the stamp already here."""

    who: Index | PeerId
    have: Stamp


class VersionVector:
    """The newest stamp of every peer known, and the order of admission. Stamps only rise."""

    def __init__(self) -> None:
        self._order: list[str] = []
        self._index: dict[str, int] = {}
        # Columns, not stamps: a digest is a slice of each, and comparing two is one pass over numbers.
        self._incarnations: list[int] = []
        self._versions: list[int] = []
        self._others: dict[str, Stamp] = {}

    def admit(self, peer: str) -> None:
        """Append to the order of admission; what was known of the peer stays. Raises LocalError if it is in already."""
        if peer in self._index:
            raise LocalError(f"{peer} is admitted already, with index {self._index[peer]}")
        stamp = self._others.pop(peer, NOTHING)
        self._index[peer] = len(self._order)
        self._order.append(peer)
        self._incarnations.append(stamp.incarnation)
        self._versions.append(stamp.version)

    def update(self, peer: str, stamp: Stamp) -> None:
        """Raise the stamp of `peer` to `stamp`; a lower one changes nothing."""
        if stamp <= self.stamp(peer):
            return
        index = self._index.get(peer)
        if index is None:
            self._others[peer] = stamp
        else:
            self._incarnations[index] = stamp.incarnation
            self._versions[index] = stamp.version

    def drop(self, peer: str) -> None:
        """Forget a peer outside the order without a trace. Raises LocalError for an admitted one: its index stays."""
        if peer in self._index:
            raise LocalError(f"{peer} has an index in the order of admission")
        self._others.pop(peer, None)

    def stamp(self, peer: str) -> Stamp:
        """The newest stamp known; NOTHING if there is none."""
        index = self._index.get(peer)
        if index is None:
            return self._others.get(peer, NOTHING)
        return Stamp(self._incarnations[index], self._versions[index])

    def admitted(self, peer: str) -> bool:
        return peer in self._index

    def peer_at(self, who: int | str) -> str | None:
        """The peer that an index or id names; None for an index that does not exist here."""
        if isinstance(who, str):
            return who
        return self._order[who] if 0 <= who < len(self._order) else None

    def digest(self, start: int = 0, after: str = "") -> Digest:
        """The part of this vector from index `start` and from the id after `after` on, as much as one digest holds."""
        end = min(start + MAX_DENSE, len(self._order))
        ids = sorted(peer for peer in self._others if peer > after)
        listed = ids[:MAX_OTHERS]
        return Digest(
            order_length=len(self._order),
            start=min(start, end),
            incarnations=tuple(self._incarnations[start:end]),
            versions=tuple(self._versions[start:end]),
            others=tuple(OtherStamp(peer, self._others[peer]) for peer in listed),
            after=after,
            until=listed[-1] if len(listed) < len(ids) else "",
        )

    def random_digest(self, rng: random.Random) -> Digest:
        """The whole vector where one digest holds it, else a random part: each part has the same chance."""
        windows = max(1, -(-len(self._order) // MAX_DENSE))
        ends = sorted(self._others)[MAX_OTHERS - 1 :: MAX_OTHERS]
        start = MAX_DENSE * (rng.randrange(windows) if windows > 1 else 0)
        return self.digest(start, rng.choice(["", *ends]) if ends else "")

    def newer_than(self, digest: Digest) -> list[str]:
        """Peers that the digest covers and whose stamp here is newer than its sender's."""
        theirs = {other.peer: other.stamp for other in digest.others}

        def news(peer: str) -> bool:
            stamp = theirs.get(peer)
            return (digest.covers_id(peer) or stamp is not None) and self.stamp(peer) > (stamp or NOTHING)

        newer = []
        for index, incarnation, version in _window(digest, len(self._order)):
            if (self._incarnations[index], self._versions[index]) > (incarnation, version):
                newer.append(self._order[index])
        # To the sender, whom it did not see admitted yet is outside the order.
        newer.extend(filter(news, self._order[digest.order_length :]))
        newer.extend(filter(news, self._others))
        return newer

    def older_than(self, digest: Digest) -> list[Wanted]:
        """What the digest's sender has and this vector lacks, to be asked for."""
        older: list[Wanted] = []
        for index, incarnation, version in _window(digest, len(self._order)):
            have = (self._incarnations[index], self._versions[index])
            if have < (incarnation, version) and version != FORGOTTEN:
                older.append(Wanted(index, Stamp(*have)))
        for other in digest.others:
            stamp = self.stamp(other.peer)
            if stamp < other.stamp and other.stamp.version != FORGOTTEN:
                older.append(Wanted(other.peer, stamp))
        return older


def _window(digest: Digest, length: int) -> Iterator[tuple[int, int, int]]:
    """(index, incarnation, version) of the digest's window, as far as an order of `length` names its indices.

    Indices beyond that are peers whose admission is not known here: their turn comes when the ledger has caught up.
    """
    indices = range(digest.start, max(digest.start, length))
    return zip(indices, digest.incarnations, digest.versions, strict=False)
