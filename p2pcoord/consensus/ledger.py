"""The chain of records that a peer holds, and how far it is certified.

A *log* is the chain a peer holds; its prefix up to the highest certified record is the *ledger*.

Rules of a chain, checked when a record is appended (`Ledger.check_next`):

    height      one more than the record before                     previous   the hash of the record before
    term        never falls; rises only with an opening, which carries a quorum of votes for its coordinator that name the
                record before, counted over the committee at that record
    signature   by the coordinator that opened the term
    committee   a simple committee C is followed only by J(new, C); a joint one only by N(new); both only when the record
                below is certified where they are proposed

A *certificate* is a quorum of acknowledgements of one record, counted over the committee at its height (the last committee
record at or below it in the same chain); it covers all ancestors. The certified prefix is never truncated: a chain that
contradicts it is refused, and two certified chains are `Fork`, which halts the node (Raft, section 5.4; the signatures are
ours).

Genesis is height 0, term 0, signed by the founder. It needs no certificate: its run config is what the run id hashes.
"""

from __future__ import annotations

from collections.abc import Sequence

from p2pcoord.consensus.quorum import Committee
from p2pcoord.consensus.record import (
    MAX_BODY_BYTES,
    NO_PREVIOUS,
    AnyBody,
    CommitteeChange,
    Genesis,
    Members,
    Opening,
    Record,
    body_hash,
    body_kind,
)
from p2pcoord.consensus.statements import Certificate, Header, check_votes
from p2pcoord.errors import LocalError, P2PCoordError, RemoteError
from p2pcoord.identity import Authority
from p2pcoord.wire import encode

# Records of one message: half of MAX_MESSAGE_BYTES, so that certificate and proof always fit beside the bodies.
BATCH_BYTES = 512 << 10

# Records from one certificate to the next in the compacted part of a chain: a batch (at most 64 records, and BATCH_BYTES) always
# reaches one.
CERTIFICATE_SPACING = 24


class Fork(P2PCoordError):
    """Two certified chains of one run: a voter lied and was shared by two quorums. The node halts with the evidence."""


class Ledger:
    """The chain of records this peer holds, and how far it is certified. Grows at the end, is cut above the certified."""

    def __init__(
        self, authority: Authority, genesis: Record, trusted: tuple[int, bytes] | None = None
    ) -> None:
        """`trusted` is a (height, record) that a joiner was told by its inviter: a chain with another record there is refused,
        and so is one that admits this peer below it, as the inviter had certified it before anybody could be admitted. A chain
        that is only shorter may be one that grows."""
        header = genesis.header
        body = genesis.body
        if (
            header.height != 0
            or header.term != 0
            or header.previous != NO_PREVIOUS
            or not isinstance(body, Genesis)
        ):
            raise RemoteError("bad_genesis", "not a genesis record")
        if body.founder != header.coordinator or header.body != body_hash(body) or header.kind != "genesis":
            raise RemoteError("bad_genesis", "header and body disagree")
        authority.check(header.coordinator, header)
        self._authority = authority
        self._trusted = trusted
        self.records: list[Record] = [genesis]
        self.hashes: list[bytes] = [authority.hash(header)]
        self._check_trusted(header, body)
        self.certified = 0
        self.certificates: dict[int, Certificate] = {}
        self._newest_round = 0
        """Height of the newest certified round; genesis is what version 0 is made of."""
        self.compacted = 0
        """Up to where bodies of rounds, and certificates that nobody needs, were dropped already."""
        self._spaced = 0
        self._spaced_bytes = 0
        """The newest certificate kept in that part, and the size of the records after it."""
        self._committees: list[tuple[int, Committee]] = [(0, Committee((body.founder,)))]
        self._openings: list[tuple[int, Header]] = [(0, header)]

    # Reading

    @property
    def last(self) -> Header:
        return self.records[-1].header

    @property
    def height(self) -> int:
        return len(self.records) - 1

    @property
    def newest_certificate(self) -> Certificate | None:
        return self.certificates.get(self.certified)

    def committee_at(self, height: int) -> Committee:
        """The committee that votes and certificates at `height` count over."""
        return next(committee for at, committee in reversed(self._committees) if at <= height)

    @property
    def committee(self) -> Committee:
        """The committee at the end of the log, certified or not."""
        return self._committees[-1][1]

    @property
    def committee_height(self) -> int:
        return self._committees[-1][0]

    def live_committees(self, term: int | None = None) -> list[Committee]:
        """Those whose quorums prove a term to this peer: the last certified committee and any above it.

        A joint one that is certified may have been followed by its incoming half in a log this peer has not seen, so that
        half alone proves a term too (its majority is no single liar; that is all a proof of a term has to exclude). Not so a
        half of one voter in a record that is not certified here: a coordinator that lies may have ordered that.

        With `term`, also those replaced since by which a quorum may have begun that term. A voter that acknowledged the
        replacing record, in term s, grants nothing to a candidate without it, and what it granted before was s + 1 at most; so
        a replaced committee proves no term above s + 1, and its former voters cannot inflate terms.
        """
        last_certified = max(i for i, (at, _) in enumerate(self._committees) if at <= self.certified)
        first = last_certified
        while term is not None and first > 0:
            if term > self.records[self._committees[first][0]].header.term + 1:
                break
            first -= 1
        live = [committee for _, committee in self._committees[first:]]
        return live + [
            Committee(committee.voters)
            for at, committee in self._committees[first:]
            if committee.joint and (at <= self.certified or len(committee.voters) > 1)
        ]

    def opening(self, term: int) -> Record | None:
        """The record that opened `term` in this log (genesis for term 0)."""
        for at, header in reversed(self._openings):
            if header.term == term:
                return self.records[at]
            if header.term < term:
                break
        return None

    def coordinator_of(self, term: int) -> str | None:
        record = self.opening(term)
        return record.header.coordinator if record else None

    def holds(self, height: int, name: bytes) -> bool:
        return 0 <= height <= self.height and self.hashes[height] == name

    @property
    def lacking(self) -> int | None:
        """Height of the newest certified round if its body is not here: then nobody here knows what the next is made from."""
        return self._newest_round if self.records[self._newest_round].body is None else None

    def fill(self, record: Record) -> bool:
        """Takes up the body that is lacking, if `record` brings it."""
        at, body = self.lacking, record.body
        if at is None or body is None or not self.holds(at, self._authority.hash(record.header)):
            return False
        if record.header.body != body_hash(body):
            return False
        self.records[at] = Record(self.records[at].header, body)
        return True

    def compact(self, height: int) -> None:
        """Drops the bodies of rounds at or below `height` (certified), and certificates that nobody needs to be shown.

        All headers and all other records stay: they are what a joiner verifies from genesis. Of the certificates enough stay
        that every batch of records can end with one. Costs as much as there is newly to drop.
        """
        while self.compacted < min(height, self.certified):
            self.compacted = at = self.compacted + 1
            record = self.records[at]
            if record.header.kind == "round" and record.body is not None:
                self.records[at] = record = Record(record.header, None)
            self._spaced_bytes += len(encode(record))
            if at in self.certificates:
                self._space(at)

    def _space(self, at: int) -> None:
        """Drops the certificate at `at` if a batch reaches from the one before it to the one after it."""
        after = next((h for h in range(at + 1, self.certified + 1) if h in self.certificates), None)
        if after is not None and after - self._spaced <= CERTIFICATE_SPACING:
            between = sum(len(encode(record)) for record in self.records[at + 1 : after + 1])
            if self._spaced_bytes + between <= BATCH_BYTES:
                del self.certificates[at]
                return
        self._spaced, self._spaced_bytes = at, 0

    # Growing

    def check_next(self, record: Record) -> None:
        """Raises RemoteError unless `record` may follow the last one (module docstring)."""
        header, body, last = record.header, record.body, self.last
        if header.height != last.height + 1:
            raise RemoteError("bad_record", f"height {header.height} after {last.height}")
        if header.previous != self.hashes[-1]:
            raise RemoteError("bad_record", f"record {header.height} does not extend ours")
        if body is None:
            if header.kind != "round":
                raise RemoteError("bad_record", f"a {header.kind} record without its body")
        elif header.kind != body_kind(body) or header.body != body_hash(body):
            raise RemoteError("bad_record", "header and body disagree")
        elif len(encode(body)) > MAX_BODY_BYTES:
            # What a liar gets certified everybody else must be able to send.
            raise RemoteError("bad_record", f"a {header.kind} record over {MAX_BODY_BYTES} bytes")
        own_committee = header.height if header.kind == "committee" else self.committee_height
        if header.committee != own_committee:
            raise RemoteError(
                "bad_record", f"counts over the committee of {header.committee}, not {own_committee}"
            )
        if header.term == last.term:
            if header.kind in ("opening", "genesis"):
                raise RemoteError("bad_record", f"a second {header.kind} in term {header.term}")
            if header.coordinator != self.coordinator_of(header.term):
                raise RemoteError("bad_record", f"{header.coordinator} did not open term {header.term}")
        elif header.term < last.term or not isinstance(body, Opening):
            raise RemoteError("bad_record", f"a {header.kind} of term {header.term} after term {last.term}")
        else:
            self._check_opening(header, body)
        if isinstance(body, CommitteeChange):
            self._check_committee_change(body.committee)
        self._check_trusted(header, body)
        self._authority.check(header.coordinator, header)

    def _check_trusted(self, header: Header, body: AnyBody | None) -> None:
        """Raises RemoteError for a record that cannot be of the inviter's chain."""
        if self._trusted is None:
            return
        height, name = self._trusted
        if header.height == height and self._authority.hash(header) != name:
            raise RemoteError("untrusted", f"another record at height {height} than the inviter's")
        if header.height < height and isinstance(body, Members):
            if any(admission.peer == self._authority.peer_id for admission in body.admitted):
                raise RemoteError(
                    "untrusted", f"admits this peer at {header.height}, below the inviter's {height}"
                )

    def _check_opening(self, header: Header, body: Opening) -> None:
        """Raises RemoteError unless the votes elect `header.coordinator` in its term, naming the record before."""
        check_votes(
            self._authority,
            body.votes,
            term=header.term,
            candidate=header.coordinator,
            last=header.previous,
            committees=[self.committee_at(header.height - 1)],
        )

    def _check_committee_change(self, new: Committee) -> None:
        new.check()
        current = self.committee
        if current.joint:
            if new.joint or new.voters != current.voters:
                raise RemoteError("bad_committee", "a joint committee is followed by its incoming half")
        elif new.outgoing != current.voters:
            raise RemoteError(
                "bad_committee", "a change goes through the joint committee of new and current voters"
            )

    def append(self, record: Record) -> None:
        """Adds a record that `check_next` accepts."""
        self.check_next(record)
        height = record.header.height
        self.records.append(record)
        self.hashes.append(self._authority.hash(record.header))
        if isinstance(record.body, CommitteeChange):
            self._committees.append((height, record.body.committee))
        if isinstance(record.body, Opening):
            self._openings.append((height, record.header))

    def truncate(self, height: int) -> None:
        """Drops all above `height`. Raises LocalError when that would drop something certified."""
        if height < self.certified:
            raise LocalError(f"truncation to {height} below the certified height {self.certified}")
        del self.records[height + 1 :], self.hashes[height + 1 :]
        while self._committees[-1][0] > height:
            self._committees.pop()
        while self._openings[-1][0] > height:
            self._openings.pop()

    def check_certificate(self, certificate: Certificate) -> None:
        """Raises RemoteError unless a quorum of the committee at its height signed it (the record must be held here)."""
        if not self.holds(certificate.height, certificate.record):
            raise RemoteError("unknown_record", f"a certificate for height {certificate.height}")
        if certificate.term != self.records[certificate.height].header.term:
            raise RemoteError("bad_certificate", "of another term than its record")
        committee = self.committee_at(certificate.height)
        if len(certificate.signatures) > len(committee.everyone):
            raise RemoteError("bad_certificate", "more signatures than voters")
        signers = certificate.signers(self._authority)
        if len(signers) < len(certificate.signatures) or not signers <= set(committee.everyone):
            # Padding would be kept, and passed on with every proof.
            raise RemoteError("bad_certificate", "a signature that is none of its committee's")
        if not committee.is_quorum(signers):
            raise RemoteError("bad_certificate", f"no quorum at height {certificate.height}")

    def check_no_fork(self, certificate: Certificate) -> None:
        """Raises Fork when a quorum certified another record than ours at a height that is certified here, and RemoteError
        when somebody only says so."""
        height = certificate.height
        if not 0 < height <= self.certified or self.hashes[height] == certificate.record:
            return
        if self.committee_at(height).is_quorum(certificate.signers(self._authority)):
            raise Fork(
                f"two certificates at height {height}: {self.hashes[height].hex()[:16]} is certified here, {certificate}"
            )
        raise RemoteError("bad_certificate", f"another record at certified height {height}, without a quorum")

    def certify(self, certificate: Certificate) -> list[Record]:
        """Extends the certified prefix; returns the records that it newly covers, oldest first.

        Raises RemoteError as check_certificate does.
        """
        self.check_certificate(certificate)
        if certificate.height <= self.certified:
            return []
        covered = self.records[self.certified + 1 : certificate.height + 1]
        self.certificates[certificate.height] = certificate
        self.certified = certificate.height
        rounds = (record.header.height for record in covered if record.header.kind == "round")
        self._newest_round = max(rounds, default=self._newest_round)
        return covered

    def adopt(self, records: Sequence[Record], certificate: Certificate) -> tuple[int, list[Record]]:
        """Replaces what is not certified here by a certified chain; (height kept, records now new in the log).

        The chain is checked as a whole before anything changes: on RemoteError the ledger is as it was.
        Raises Fork when the chain contradicts the certified prefix and is certified itself.
        """
        records = list(records)
        while records and self.holds(records[0].header.height, self._authority.hash(records[0].header)):
            records.pop(0)
        if not records:
            return self.height, []
        start = records[0].header.height
        if start > self.height + 1 or start < 1:
            raise RemoteError("gap", f"records from {start} on, while the log ends at {self.height}")
        if start <= self.certified:
            self._check_fork(start, records, certificate)
        replaced = self.records[start:]
        self.truncate(start - 1)
        try:
            for record in records:
                self.append(record)
            self.check_certificate(certificate)
        except RemoteError:
            self.truncate(start - 1)
            for record in replaced:
                self.append(record)
            raise
        return start - 1, records

    def _check_fork(self, start: int, records: Sequence[Record], certificate: Certificate) -> None:
        """Raises RemoteError when the chain that contradicts the certified prefix is not certified, else Fork."""
        if not certificate.signers(self._authority) & set(self.committee_at(start).everyone):
            # A fork needs a voter that both chains share; without one, the chain is not worth checking.
            raise RemoteError("contradiction", f"another record at certified height {start}")
        other = Ledger(self._authority, self.records[0])
        # What both share is not checked again: one voter's lie must not cost as much as the whole chain.
        other.records, other.hashes = self.records[:start], self.hashes[:start]
        other._committees = [(at, committee) for at, committee in self._committees if at < start]
        other._openings = [(at, header) for at, header in self._openings if at < start]
        for record in records:
            other.append(record)
        other.check_certificate(certificate)
        raise Fork(
            f"two certified chains: at height {start} this peer holds {self.hashes[start].hex()[:16]}, another "
            f"certified {other.hashes[start].hex()[:16]} (certificate at {certificate.height}, "
            f"signed by {', '.join(voter for voter, _ in certificate.signatures)})"
        )
