"""Who takes part: joining, leaving, exclusion.

    state      meaning                                             becomes
    stranger   no certified record names it                        member, by an admission
    member     admitted; may contribute, hold state, become voter  left, by its own wish; excluded, with a reason
    excluded   does not count until version `until` is certified   member again at that version (0: never)
    left       said goodbye                                        member again, by a new admission

The roster is a pure function of certified records, so all peers that certified the same prefix have the same one. Joining
is asked of any member; it travels to the coordinator, and every voter checks its proof before it acknowledges the record.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from hashlib import sha256

import msgspec

from p2pcoord.consensus.evidence import contradict, signer_of
from p2pcoord.consensus.record import Admission, Exclusion, Genesis, Members, Record, Round
from p2pcoord.identity import Authority

# Changes in one record: the largest admission (a name of 64 four-byte letters) has 360 bytes, and 128 of them fit a body
# (64 KiB) with room to spare.
MAX_ADMISSIONS = 128

# An excluded member is tried again at the latest after so many versions.
MAX_WAIT_VERSIONS = 64

MAX_REASON_LENGTH = 256

# Of an admission's addresses, in all: two or three, so that MAX_ADMISSIONS of them fit a body.
MAX_ADDRESSES_LENGTH = 200
MAX_ADDRESSES = 16

# In a run, with those who have left: what gossip and probing keep for each is bounded (gossip/suspicion.py, MAX_MEMBERS).
MAX_RUN_MEMBERS = 15_000

# A name is for people; the peer id is what counts.
MAX_NAME_LENGTH = 64

# An Ed25519 peer id has 52 letters, a proof is one HMAC-SHA256. In an open run nothing else bounds what a joiner sends.
MAX_PEER_ID_LENGTH = 64
MAX_PROOF_BYTES = 32

_JOIN_DOMAIN = b"p2pcoord join 1\x00"


def join_proof(secret: bytes, run: bytes, peer: str) -> bytes:
    """HMAC-SHA256 of run and joiner's id: shows that the joiner knows the secret, to all who know it, for itself only."""
    return hmac.new(secret, _JOIN_DOMAIN + run + peer.encode(), sha256).digest()


class Member(msgspec.Struct, frozen=True):
    admitted_height: int
    addresses: tuple[str, ...] = ()


class Roster:
    """Members of a run, replayed from certified records. `secret` is None in an open run."""

    def __init__(self, authority: Authority, secret: bytes | None) -> None:
        self._authority = authority
        self._secret = secret
        self._members: dict[str, Member] = {}
        """Every member ever admitted and not left, in order of admission."""
        self._names: dict[str, str] = {}
        """Every member ever admitted, and its name: who has left is still told of by it."""
        self._exclusions: dict[str, Exclusion] = {}
        self._times_excluded: dict[str, int] = {}
        self.version = 0

    def apply(self, records: Iterable[Record]) -> None:
        """Follows newly certified records, in order."""
        for record in records:
            body = record.body
            if isinstance(body, Genesis):
                # Genesis does not say what the founder is called: its gossip does.
                self._members[body.founder] = Member(0)
                self._names[body.founder] = ""
            elif record.header.kind == "round":
                # Its body may be compacted away; each round makes one version.
                self.version = body.version if isinstance(body, Round) else self.version + 1
            elif isinstance(body, Members):
                for admission in body.admitted:
                    self._members.pop(admission.peer, None)
                    self._members[admission.peer] = Member(record.header.height, admission.addresses)
                    self._names.pop(admission.peer, None)
                    self._names[admission.peer] = admission.name
                for farewell in body.left:
                    self._members.pop(farewell.peer, None)
                for exclusion in body.excluded:
                    self._exclusions[exclusion.peer] = exclusion
                    self._times_excluded[exclusion.peer] = self._times_excluded.get(exclusion.peer, 0) + 1

    @property
    def members(self) -> tuple[str, ...]:
        """Those that count now, in order of admission."""
        return tuple(peer for peer in self._members if not self.excluded(peer))

    @property
    def everyone(self) -> tuple[str, ...]:
        """All members, those that are excluded for a time included, in order of admission."""
        return tuple(self._members)

    def is_member(self, peer: str) -> bool:
        return peer in self._members and not self.excluded(peer)

    def is_listed(self, peer: str) -> bool:
        """Whether it is a member, be it excluded now."""
        return peer in self._members

    def excluded_for_good(self, peer: str) -> bool:
        exclusion = self._exclusions.get(peer)
        return exclusion is not None and exclusion.until == 0

    def was_admitted(self, peer: str) -> bool:
        """Whether it was a member at any time, whatever became of it."""
        return peer in self._names

    @property
    def departed(self) -> tuple[str, ...]:
        """Those who were members and have left, in order of their last admission."""
        return tuple(peer for peer in self._names if peer not in self._members)

    def name_of(self, peer: str) -> str:
        """What it called itself when it was last admitted, be it gone now; "" of a stranger and of the founder."""
        return self._names.get(peer, "")

    def addresses_of(self, peer: str) -> tuple[str, ...]:
        """Where a member could be reached when it was admitted."""
        member = self._members.get(peer)
        return member.addresses if member else ()

    def excluded(self, peer: str) -> str:
        """Why `peer` does not count ("" when it does)."""
        exclusion = self._exclusions.get(peer)
        if exclusion is None or (exclusion.until and self.version >= exclusion.until):
            return ""
        return exclusion.reason

    def exclusion_of(self, peer: str, reason: str) -> Exclusion:
        """The record entry that excludes `peer` for a time; the wait doubles each time: 2, 4, 8 ... up to 64 versions."""
        wait = min(2 << self._times_excluded.get(peer, 0), MAX_WAIT_VERSIONS)
        return Exclusion(peer, reason, self.version + wait)

    def proves(self, admission: Admission) -> str:
        """Why the proof of this admission does not hold ("" when it does)."""
        if self._secret is None:
            return ""
        if not hmac.compare_digest(
            admission.proof, join_proof(self._secret, self._authority.run, admission.peer)
        ):
            return "wrong secret"
        return ""

    def check(self, body: Members) -> str:
        """Why a voter must not acknowledge this record ("" when it may)."""
        if len(body.admitted) + len(body.left) + len(body.excluded) > MAX_ADMISSIONS:
            return "too many changes in one record"
        if body.admitted and len(self._members) + len(body.admitted) > MAX_RUN_MEMBERS:
            return f"a run has at most {MAX_RUN_MEMBERS} members"
        for admission in body.admitted:
            if not admission.peer.isascii():
                return "no admission: a peer id has letters of base58 only"
            if len(admission.peer) > MAX_PEER_ID_LENGTH or len(admission.proof) > MAX_PROOF_BYTES:
                return f"no admission: a peer id of {len(admission.peer)} letters, a proof of {len(admission.proof)} bytes"
            too_many = len(admission.addresses) > MAX_ADDRESSES
            if too_many or sum(map(len, admission.addresses)) > MAX_ADDRESSES_LENGTH:
                return f"the addresses of {admission.peer} are too long"
            if len(admission.name) > MAX_NAME_LENGTH:
                return f"the name of {admission.peer} is too long"
            if self.is_member(admission.peer):
                return f"{admission.peer} is a member already"
            if self.excluded(admission.peer):
                return f"{admission.peer} is excluded: {self.excluded(admission.peer)}"
            if reason := self.proves(admission):
                return f"{admission.peer}: {reason}"
        for farewell in body.left:
            member = self._members.get(farewell.peer)
            if member is None or farewell.height < member.admitted_height:
                return f"{farewell.peer} is no member, or was admitted again after it said goodbye"
            if not self._authority.verify(farewell.peer, farewell):
                return f"the goodbye of {farewell.peer} is not signed by it"
        for exclusion in body.excluded:
            if reason := self._check_exclusion(exclusion):
                return reason
        strangers = [exclusion.peer for exclusion in body.excluded if exclusion.peer not in self._members]
        return f"{strangers[0]} is no member" if strangers else ""

    def _check_exclusion(self, exclusion: Exclusion) -> str:
        """For good only with evidence; without it for a bounded time, so that one coordinator's dislike does not last."""
        if exclusion.evidence is not None:
            first, second = exclusion.evidence
            if signer_of(first) != exclusion.peer or not contradict(first, second, self._authority):
                return f"the evidence against {exclusion.peer} shows nothing"
        elif len(exclusion.reason) > MAX_REASON_LENGTH:
            return f"{exclusion.peer} is excluded at too great length"
        elif not self.version < exclusion.until <= self.version + MAX_WAIT_VERSIONS:
            return f"{exclusion.peer} is excluded until version {exclusion.until} without evidence"
        return ""
