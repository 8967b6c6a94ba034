"""Bugs that can be switched on, to show that the invariants see them.

Each is a context manager that patches a seam of the program or of the world while a run lasts; the core itself has no flag.
What each breaks is a rule of architecture.md, section 7, that others broke before. `FAULTS` of the seeds that are tried are
drawn as always: that some seed catches each bug says that the schedules reach these places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

from p2pcoord.consensus import batches
from p2pcoord.consensus.following import Following
from p2pcoord.consensus.ledger import Ledger
from p2pcoord.consensus.messages import AppendReply, TermProof
from p2pcoord.consensus.quorum import majority
from p2pcoord.consensus.record import Record
from p2pcoord.consensus.replication import Replication
from p2pcoord.consensus.statements import Acknowledgement, Certificate, certificate_of
from p2pcoord.consensus.voter import AnyFrame, Certified, Standing, Voter, proof_term
from p2pcoord.errors import RemoteError
from p2pcoord.rounds.summing import Summing
from simulations.machine import Machine
from simulations.world import World

Mutant = Callable[[], AbstractContextManager[None]]


@contextmanager
def patched(*places: tuple[type | ModuleType, str, Any]) -> Iterator[None]:
    """Replaces attributes of classes, and puts the old ones back."""
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in places]
    for owner, name, value in places:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def speak_before_persist() -> AbstractContextManager[None]:
    """What should wait for the disk leaves at once."""

    def may_leave(self: World, machine: Machine, after: int) -> bool:
        return True

    return patched((World, "may_leave", may_leave))


def old_term_by_counting() -> AbstractContextManager[None]:
    """Records of earlier terms are acknowledged, counted and certified, as Raft's figure 8 forbids. One record goes into a
    message, so that the old one is counted before the opening that would cover it."""

    def acknowledge(self: Voter, record: Record) -> Acknowledgement:
        header = record.header
        ack = Acknowledgement(header.term, header.height, self.authority.hash(header), self.me)
        return self.authority.sign(ack)

    def reply(self: Following, *, matched: bool, match_height: int = 0, waiting: str = "") -> AppendReply:
        voter, ledger = self.voter, self.voter.ledger
        height = match_height if matched else ledger.certified
        acks = tuple(
            acknowledge(voter, record) for record in ledger.records[ledger.certified + 1 : height + 1]
        )
        return AppendReply(voter.term, matched, height, ledger.certified, acks, waiting)

    def take(self: Replication, sender: str, ack: Acknowledgement) -> None:
        ledger = self.voter.ledger
        if ack.height > ledger.certified and ledger.holds(ack.height, ack.record):
            for record in ledger.records[ledger.certified + 1 : ack.height + 1]:
                if record.header.term < self.voter.term:  # its own, which is on its disk
                    own = acknowledge(self.voter, record)
                    self._acknowledgements.setdefault(own.height, {})[own.voter] = own
            self._acknowledgements.setdefault(ack.height, {})[sender] = ack

    def certifiable(self: Replication) -> int:
        ledger = self.voter.ledger
        for height in range(ledger.height, ledger.certified, -1):
            if ledger.committee_at(height).is_quorum(self._acknowledgements.get(height, {})):
                return height
        return 0

    return patched(
        (Voter, "acknowledge", acknowledge),
        (Following, "_reply", reply),
        (Replication, "_take_acknowledgement", take),
        (Replication, "certifiable", certifiable),
        (batches, "BATCH_RECORDS", 1),
    )


def quorum_from_gossip() -> AbstractContextManager[None]:
    """A coordinator counts over the voters that it can reach at the moment, and others believe any certificate that more
    than half of somebody signed."""

    def certify(self: Replication, now: int) -> None:
        ledger = self.voter.ledger
        reachable = self.reachable_voters(now)
        for height in range(ledger.height, ledger.certified, -1):
            acks = {p: a for p, a in self._acknowledgements.get(height, {}).items() if p in reachable}
            if acks and len(acks) >= majority(len(reachable)):
                certificate = certificate_of(acks.values())
                covered = ledger.certify(certificate)
                self.voter.outbox.persist([Certified(certificate)])
                self._certified(covered, now)
                return

    def check(self: Ledger, certificate: Certificate) -> None:
        if not self.holds(certificate.height, certificate.record):
            raise RemoteError("unknown_record", f"a certificate for height {certificate.height}")

    return patched((Replication, "_certify", certify), (Ledger, "check_certificate", check))


def vote_forgotten() -> AbstractContextManager[None]:
    """A restarted voter knows its term and not whom it voted for in it."""
    replay = Voter._replay

    def forgetful(self: Voter, frame: AnyFrame) -> None:
        replay(self, frame)
        if isinstance(frame, Standing):
            self.voted_for, self.voted_last = None, b""

    return patched((Voter, "_replay", forgetful))


def unsigned_proof() -> AbstractContextManager[None]:
    """A proof of a term is believed as it is written."""

    def check_proof(self: Voter, proof: TermProof | None) -> int:
        return proof_term(proof)

    return patched((Voter, "check_proof", check_proof))


def mixed_attempts() -> AbstractContextManager[None]:
    """A partial sum is taken for its sender's, whatever attempt it was made for: one of an earlier attempt at the round
    stands in for the child that has not sent its own yet, with the contributors of then."""
    gather = Summing.gather

    def mixing(self: Summing, now: int) -> None:
        entry = self.book.current
        if entry is not None and self.setting.me in entry.attempt.tree:
            for earlier in self.book.entries():
                for child in entry.attempt.tree.children(self.setting.me):
                    if child in earlier.partials and entry.attempt.sends_partial(child):
                        entry.partials.setdefault(child, earlier.partials[child])
        gather(self, now)

    return patched((Summing, "gather", mixing))


MUTANTS: dict[str, Mutant] = {
    "speak-before-persist": speak_before_persist,
    "old-term-by-counting": old_term_by_counting,
    "quorum-from-gossip": quorum_from_gossip,
    "vote-forgotten": vote_forgotten,
    "unsigned-proof": unsigned_proof,
    "mixed-attempts": mixed_attempts,
}
