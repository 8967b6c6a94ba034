"""What a voter knows and keeps: its term, its one vote, the proof of the term, its log, and its role.

    role          meaning                                                        leaves it when
    follower      follows a coordinator, or waits for one                        its election timeout passes
    pre-candidate asks whether a vote would succeed; its term is unchanged       a quorum grants, or a coordinator is heard
    candidate     its term is one higher, proven by the grants; it voted itself  a quorum votes, or the timeout passes
    coordinator   opened its term; orders records                                a higher proven term, or no quorum is heard

`Voter` is the part that election, replication, following and catch-up share. Everything that must survive a crash is
written as frames (`Frame`), and read back by `Voter.restore` in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum

import msgspec

from p2pcoord.consensus.evidence import SignedStatement
from p2pcoord.consensus.ledger import Ledger
from p2pcoord.consensus.messages import Grants, TermProof, Votes
from p2pcoord.consensus.quorum import MAX_SIGNATURES
from p2pcoord.consensus.record import Record
from p2pcoord.consensus.statements import Acknowledgement, Certificate, Vote, check_votes
from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.identity import Authority
from p2pcoord.outbox import Outbox


class Role(StrEnum):
    FOLLOWER = "follower"
    PRE_CANDIDATE = "pre-candidate"
    CANDIDATE = "candidate"
    COORDINATOR = "coordinator"


class Timing(msgspec.Struct, frozen=True):
    """Times of the agreement, in nanoseconds."""

    heartbeat_ns: int = 150_000_000
    """While a round runs. etcd's default is 100 ms; 150 leaves room for a busy laptop's scheduler and Wi-Fi."""
    resting_heartbeat_ns: int = 1_000_000_000
    """While the run rests: nothing is waiting for a commit, so a slower takeover costs nobody anything."""
    election_minimum: int = 7
    """Heartbeats missed before a voter gives its coordinator up: about one second, longer than most hiccups (etcd: 10)."""
    election_maximum: int = 14
    """Timeouts are spread over one whole minimum, so that one voter usually stands alone (Raft, section 9.3)."""
    dead_voter_ns: int = 10_000_000_000
    """A voter silent for this long is replaced by a learner: long against a reboot of a process, short against a night."""
    shrink_ns: int = 60_000_000_000
    """A voter silent for this long, with nobody to replace it, is dropped and the committee gets smaller."""


# Frames --------------------------------------------------------------------------------------------------------------


class Frame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of what is written to the log file."""


class Owner(Frame, frozen=True, tag="owner"):
    """The first frame: whose log this is. A key without its log, or a log without its key, never votes."""

    peer_id: str
    run: bytes


class Standing(Frame, frozen=True, tag="standing"):
    """The term, its proof, and the vote given in it (candidate and the candidate's last record)."""

    term: int
    voted_for: str | None
    voted_last: bytes
    proof: TermProof | None


class Appended(Frame, frozen=True, tag="appended"):
    record: Record


class Truncated(Frame, frozen=True, tag="truncated"):
    """All records above `height` are gone."""

    height: int


class Certified(Frame, frozen=True, tag="certified"):
    certificate: Certificate


AnyFrame = Owner | Standing | Appended | Truncated | Certified


# Proofs --------------------------------------------------------------------------------------------------------------


def proof_term(proof: TermProof | None) -> int:
    """The term that a proof claims to prove. Raises RemoteError("bad_proof") for an empty one."""
    if proof is None:
        return 0
    if isinstance(proof, Certificate):
        return proof.term
    statements: Sequence[object] = proof.grants if isinstance(proof, Grants) else proof.votes
    if not statements:
        raise RemoteError("bad_proof", "empty")
    return proof.grants[0].term if isinstance(proof, Grants) else proof.votes[0].term


class Voter:
    """Term, vote, log and role of this peer; the state machines of consensus work on it."""

    def __init__(
        self,
        authority: Authority,
        outbox: Outbox,
        genesis: Record,
        trusted: tuple[int, bytes] | None = None,
        *,
        see: Callable[[SignedStatement], None] = lambda statement: None,
        distrusts: Callable[[str], bool] = lambda peer: False,
    ) -> None:
        """`see` gets each statement whose signature was checked (`evidence.py`); whom this peer `distrusts`, as there is
        evidence against it, it neither follows nor votes for."""
        self.authority = authority
        self.outbox = outbox
        self.me = authority.peer_id
        self.ledger = Ledger(authority, genesis, trusted)
        self.term = 0
        self.voted_for: str | None = None
        self.voted_last = b""
        self.proof: TermProof | None = None
        self.role = Role.FOLLOWER
        self.coordinator: str | None = None
        self.silenced = ""
        """Why this peer neither votes nor stands any more: its computations are not to be trusted ("" while they are)."""
        self.see = see
        self.distrusts = distrusts
        self.contradicted: Record | None = None
        """A record of the present term that a certified one replaced here: its coordinator ordered two. Nothing more is
        acknowledged in that term, for it might stand where this voter has acknowledged another record before."""
        self.term_persist = 0
        """The Persist that makes the current term durable: a heartbeat waits for no more than that."""

    # Surviving a restart

    def first_frames(self) -> list[Frame]:
        return [Owner(self.me, self.authority.run), Appended(self.ledger.records[0])]

    def compacted_frames(self) -> list[Frame]:
        """The frames that are enough to go on from here."""
        frames = self.first_frames()
        if self.term:
            frames.append(Standing(self.term, self.voted_for, self.voted_last, self.proof))
        for at, record in enumerate(self.ledger.records[1:], 1):
            if self.contradicted is not None and self.contradicted.header.height == at:
                frames += [Appended(self.contradicted), Truncated(at - 1)]
            frames.append(Appended(record))
            if at in self.ledger.certificates:
                frames.append(Certified(self.ledger.certificates[at]))
        return frames

    def restore(self, frames: Sequence[AnyFrame]) -> None:
        """Replays the frames of an earlier life, the first two (first_frames) included.

        Raises LocalError when they are not this peer's, or contradict themselves.
        """
        if not isinstance(frames[0], Owner):
            raise LocalError("the log does not begin with the peer it belongs to")
        try:
            for frame in frames:
                self._replay(frame)
        except RemoteError as error:
            raise LocalError(f"the log contradicts itself: {error}") from error

    def _replay(self, frame: AnyFrame) -> None:
        if isinstance(frame, Owner):
            if (frame.peer_id, frame.run) != (self.me, self.authority.run):
                raise LocalError(f"this log belongs to {frame.peer_id}, not to {self.me}, or to another run")
        elif isinstance(frame, Standing):
            self.term, self.proof = frame.term, frame.proof
            self.voted_for, self.voted_last = frame.voted_for, frame.voted_last
            self._forget_contradiction()
        elif isinstance(frame, Appended):
            if frame.record.header.height > 0:
                if not self.ledger.fill(frame.record):
                    self.ledger.append(frame.record)
            elif frame.record != self.ledger.records[0]:
                raise LocalError("this log begins with another genesis")
        elif isinstance(frame, Truncated):
            self.dropped(self.ledger.records[frame.height + 1 :])
            self.ledger.truncate(frame.height)
        else:
            self.ledger.certify(frame.certificate)

    # Records

    def acknowledge(self, record: Record) -> Acknowledgement:
        """Signs that this voter holds the record. Raises LocalError for one of another term than its own."""
        header = record.header
        if header.term != self.term:
            raise LocalError(f"acknowledging a record of term {header.term} in term {self.term}")
        return self.authority.sign(
            Acknowledgement(self.term, header.height, self.authority.hash(header), self.me)
        )

    def dropped(self, records: Sequence[Record]) -> None:
        """These records, the end of the log, are replaced."""
        if records and records[-1].header.term == self.term and self.contradicted is None:
            self.contradicted = records[0]

    def _forget_contradiction(self) -> None:
        if self.contradicted is not None and self.contradicted.header.term < self.term:
            self.contradicted = None

    # Terms

    def is_voter(self, peer: str | None = None) -> bool:
        return (peer or self.me) in self.ledger.committee.everyone

    @property
    def may_stand(self) -> bool:
        """Whether it may coordinate: who lacks the newest round would order an old version again."""
        return self.is_voter() and not self.silenced and self.ledger.lacking is None

    def check_proof(self, proof: TermProof | None) -> int:
        """The term proven. Raises RemoteError: "unproven" when no committee this peer knows to be live has a quorum in it.

        "unproven" may also mean that this peer's log is behind; the caller then asks for records.
        """
        term = proof_term(proof)
        if proof is None:
            return 0
        committees = self.ledger.live_committees(term)
        if isinstance(proof, Certificate):
            signers = proof.signers(self.authority)
        elif isinstance(proof, Votes):
            first = proof.votes[0]
            try:
                check_votes(
                    self.authority,
                    proof.votes,
                    term=term,
                    candidate=first.candidate,
                    last=first.last,
                    committees=committees,
                )
            except RemoteError as error:
                raise RemoteError(
                    "unproven" if error.kind == "bad_votes" else error.kind, error.detail
                ) from None
            for vote in proof.votes:
                self.see(vote)
            return term
        else:
            if len(proof.grants) > MAX_SIGNATURES:
                raise RemoteError("bad_proof", "more grants than a committee has voters")
            for grant in proof.grants:
                if grant.term != term:
                    raise RemoteError("bad_proof", "grants of several terms")
                self.authority.check(grant.voter, grant)
            signers = frozenset(grant.voter for grant in proof.grants)
        if not any(committee.is_quorum(signers) for committee in committees):
            raise RemoteError("unproven", f"no quorum behind term {term}")
        return term

    def enter_term(
        self, term: int, proof: TermProof, voted_for: str | None = None, voted_last: bytes = b""
    ) -> int:
        """Moves to `term` (never down) with its proof and vote, durably; returns the Persist to wait for."""
        if term < self.term or (term == self.term and self.voted_for not in (None, voted_for)):
            raise LocalError(f"from term {self.term} to {term}, vote {self.voted_for} to {voted_for}")
        self.term, self.proof = term, proof
        self.voted_for, self.voted_last = voted_for, voted_last
        self._forget_contradiction()
        self.term_persist = self.outbox.persist([Standing(term, voted_for, voted_last, proof)])
        return self.term_persist

    def last_votes(self) -> tuple[Vote, ...]:
        """The votes that elected whoever signed the last record of this log."""
        opening = self.ledger.opening(self.ledger.last.term)
        return getattr(opening.body, "votes", ()) if opening else ()
