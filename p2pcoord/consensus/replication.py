"""Replication, the coordinator's side: it orders records, and a quorum of acknowledgements certifies them.

The coordinator sends records as soon as it has them, its own write running meanwhile (Ongaro, section 10.2.1): that is safe
because a coordinator that crashes is no coordinator of this term when it comes back. It counts its own acknowledgement when
its write is durable, and a voter's acknowledgement leaves that voter only after the write it speaks of (`following.py`).

Of each follower, voter or learner, it knows how far its log agrees (`Progress`) and sends what comes next; a heartbeat sends
again what was not answered. One whose log disagrees answers with its certified height, where the logs must agree, and gets all
from there. One that is further behind gets certified records with their certificate (`batches.certified_from`).

The coordinator steps down when no quorum answers, and hands the duty over to a voter that holds the whole log (`transfer`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from p2pcoord.consensus.batches import certified_from, has_room, records_from
from p2pcoord.consensus.election import Election
from p2pcoord.consensus.messages import Append, AppendReply, TransferRequest, Votes
from p2pcoord.consensus.record import AnyBody, CommitteeChange, Opening, Record, make_record
from p2pcoord.consensus.statements import Acknowledgement, Transfer, Vote, certificate_of
from p2pcoord.consensus.voter import Appended, Certified, Role, Timing, Voter
from p2pcoord.effects import NEVER
from p2pcoord.errors import RemoteError


class Progress(msgspec.Struct):
    """What the coordinator knows of one follower's log."""

    next_height: int
    match_height: int = 0
    heard_at: int = NEVER
    """Last answer in this term; NEVER when none yet."""
    holds: bool = False
    """It has the state of the newest version on its disk."""
    proven: bool = False
    """It has answered in this term, so it needs no more proof of it."""


class Replication:
    """Orders records while this peer coordinates. `certified(records, now)` is called with newly certified records in order,
    once each."""

    def __init__(
        self,
        voter: Voter,
        election: Election,
        timing: Timing,
        *,
        certified: Callable[[Sequence[Record], int], None],
    ) -> None:
        self.voter = voter
        self.election = election
        self.timing = timing
        self._certified = certified
        self.resting = False
        """Set by the owner: nothing is waiting for a commit, heartbeats may slow down."""
        self.learners: tuple[str, ...] = ()
        self.progress: dict[str, Progress] = {}
        self.transferring: tuple[str, int] | None = None
        """(target, deadline) while the duty is being handed over: nothing is proposed meanwhile."""
        self.unfit: set[str] = set()
        """Voters that did not take over when asked in this term: they are not asked again in it."""
        self._heartbeat_at = NEVER
        self._quorum_seen_at = 0
        self.opened_at = 0
        """When this peer last became coordinator."""
        self._acknowledgements: dict[int, dict[str, Acknowledgement]] = {}
        self._own_acknowledgements: deque[tuple[int, Acknowledgement]] = deque()

    @property
    def is_coordinator(self) -> bool:
        return self.voter.role is Role.COORDINATOR

    @property
    def opened(self) -> bool:
        """This peer coordinates and its term's opening is certified: it may decide."""
        return (
            self.is_coordinator
            and self.voter.ledger.records[self.voter.ledger.certified].header.term == self.voter.term
        )

    @property
    def interval_ns(self) -> int:
        return self.timing.resting_heartbeat_ns if self.resting else self.timing.heartbeat_ns

    def open_term(self, votes: tuple[Vote, ...], now: int) -> None:
        """The election is won: append the opening of the term."""
        voter = self.voter
        voter.role = Role.COORDINATOR
        voter.coordinator = voter.me
        voter.enter_term(voter.term, Votes(votes), voter.voted_for, voter.voted_last)
        self.progress = {}
        self.learners = ()
        self.transferring = None
        self.unfit = set()
        self._acknowledgements = {}
        self._own_acknowledgements.clear()
        self._quorum_seen_at = self.opened_at = now
        voter.outbox.emit("coordinator", term=voter.term)
        self._order(Opening(votes))
        self._beat(now)

    def propose(self, body: AnyBody) -> int | None:
        """Orders a record; its height, or None when this peer may not order now (not opened, handing over, too many; a
        committee change waits until all below it is certified)."""
        ledger = self.voter.ledger
        if not self.opened or self.transferring is not None or not has_room(ledger):
            return None
        if isinstance(body, CommitteeChange) and ledger.certified < ledger.height:
            return None
        return self._order(body)

    def _order(self, body: AnyBody) -> int:
        voter, ledger = self.voter, self.voter.ledger
        record = make_record(
            voter.authority,
            height=ledger.height + 1,
            term=voter.term,
            previous=ledger.hashes[-1],
            committee=ledger.committee_height,
            body=body,
        )
        ledger.append(record)
        persist = voter.outbox.persist([Appended(record)])
        self._own_acknowledgements.append((persist, voter.acknowledge(record)))
        for peer in self._followers():
            progress = self._progress(peer)
            if progress.next_height == record.header.height and progress.proven:
                self._send_append(peer)
        return record.header.height

    def _followers(self) -> list[str]:
        voters = self.voter.ledger.committee.everyone
        return [
            peer
            for peer in (*voters, *(p for p in self.learners if p not in voters))
            if peer != self.voter.me
        ]

    def _progress(self, peer: str) -> Progress:
        progress = self.progress.get(peer)
        if progress is None:
            progress = self.progress[peer] = Progress(next_height=self.voter.ledger.height)
        return progress

    def _send_append(self, peer: str) -> None:
        voter, ledger, progress = self.voter, self.voter.ledger, self._progress(peer)
        old = certified_from(ledger, progress.next_height)
        if old is not None:
            voter.outbox.send(peer, old, after=voter.term_persist)
            progress.next_height = old.records[-1].header.height + 1
        previous = min(progress.next_height - 1, ledger.height)
        records = records_from(ledger, previous + 1)
        progress.next_height = previous + 1 + len(records)
        votes = voter.proof if isinstance(voter.proof, Votes) and not progress.proven else None
        message = Append(
            voter.term,
            self.interval_ns,
            previous,
            ledger.hashes[previous],
            records,
            ledger.newest_certificate,
            votes,
        )
        voter.outbox.send(peer, message, after=voter.term_persist)

    def _beat(self, now: int) -> None:
        for peer in self._followers():
            progress = self._progress(peer)
            # What was sent and not answered within a heartbeat is sent again.
            progress.next_height = min(
                progress.next_height, max(progress.match_height, self.voter.ledger.certified) + 1
            )
            self._send_append(peer)
        self._heartbeat_at = now + self.interval_ns

    def wake(self, now: int) -> None:
        """Work has begun: the next heartbeat comes at the quick interval."""
        self.resting = False
        if self.is_coordinator:
            self._heartbeat_at = min(self._heartbeat_at, now)

    def heard_within(self, peer: str, span_ns: int, now: int) -> bool:
        progress = self.progress.get(peer)
        return peer == self.voter.me or (
            progress is not None and now - progress.heard_at <= span_ns and progress.proven
        )

    def reachable_voters(self, now: int) -> list[str]:
        """Voters heard within an election timeout, this peer included."""
        span = self.timing.election_maximum * self.interval_ns
        return [peer for peer in self.voter.ledger.committee.everyone if self.heard_within(peer, span, now)]

    def tick(self, now: int) -> None:
        if not self.is_coordinator:
            return
        if self.voter.ledger.committee.is_quorum(self.reachable_voters(now)):
            self._quorum_seen_at = now
        elif now - self._quorum_seen_at > self.timing.election_maximum * self.interval_ns:
            self.step_down("no quorum answers", now)
            return
        if self.transferring is not None and now >= self.transferring[1]:
            self.voter.outbox.emit("transfer-failed", target=self.transferring[0], term=self.voter.term)
            self.unfit.add(self.transferring[0])
            self.transferring = None
        if now >= self._heartbeat_at:
            self._beat(now)

    def next_deadline(self) -> int:
        if not self.is_coordinator:
            return NEVER
        return min(self._heartbeat_at, self.transferring[1] if self.transferring else NEVER)

    def postpone(self, now: int) -> None:
        """This peer was asleep: give the others a full timeout to answer before stepping down."""
        self._quorum_seen_at = now

    def step_down(self, reason: str, now: int) -> None:
        voter = self.voter
        voter.role = Role.FOLLOWER
        voter.coordinator = None
        voter.outbox.emit("stepped-down", term=voter.term, reason=reason)
        self.election.heard_at = None
        self.election.postpone(now)

    def transfer(self, target: str, now: int) -> bool:
        """Hands the duty to a voter that holds the whole log. False when it is not fit for it now."""
        voter, ledger = self.voter, self.voter.ledger
        progress = self.progress.get(target)
        fit = self.opened and self.transferring is None and ledger.certified == ledger.height
        if (
            not fit
            or target in self.unfit
            or progress is None
            or progress.match_height < ledger.height
            or target not in ledger.committee.voters
        ):
            return False
        if not self.heard_within(target, self.timing.election_minimum * self.interval_ns, now):
            return False
        statement = voter.authority.sign(Transfer(voter.term, voter.me, target))
        voter.outbox.send(target, TransferRequest(statement), after=voter.term_persist)
        voter.outbox.emit("transfer", target=target, term=voter.term)
        self.transferring = (target, now + self.timing.election_minimum * self.timing.heartbeat_ns)
        return True

    def on_append_reply(self, sender: str, reply: AppendReply, now: int) -> None:
        voter, ledger = self.voter, self.voter.ledger
        if not self.is_coordinator or reply.term > voter.term or sender not in self._followers():
            return
        if reply.term < voter.term:
            self._progress(sender).proven = False  # it missed this term's proof: the next message carries it
            self._send_append(sender)
            return
        progress = self._progress(sender)
        progress.heard_at, progress.proven, progress.holds = now, True, reply.holds
        for ack in reply.acknowledgements:
            self._take_acknowledgement(sender, ack)
        if reply.matched:
            progress.match_height = min(max(progress.match_height, reply.match_height), ledger.height)
            progress.next_height = max(progress.next_height, progress.match_height + 1)
        else:
            progress.match_height = 0
            progress.next_height = min(reply.certified_height, ledger.height) + 1
        self._certify(now)
        if not reply.waiting and (not reply.matched or progress.next_height <= ledger.height):
            self._send_append(sender)

    def _take_acknowledgement(self, sender: str, ack: Acknowledgement) -> None:
        voter, ledger = self.voter, self.voter.ledger
        if ack.voter != sender:
            raise RemoteError("bad_ack", f"{sender} sent an acknowledgement by {ack.voter}")
        if ack.term != voter.term:
            return
        voter.authority.check(sender, ack)
        voter.see(ack)  # also one that comes late, and of whatever record: with another it may be evidence
        if not ledger.holds(ack.height, ack.record):
            raise RemoteError("bad_ack", f"an acknowledgement of another record at height {ack.height}")
        if ack.height <= ledger.certified:
            return
        self._acknowledgements.setdefault(ack.height, {})[sender] = ack

    def durable(self, now: int) -> None:
        """Some Persist became durable: own acknowledgements of what it wrote count from now on."""
        counted = False
        while self._own_acknowledgements and self._own_acknowledgements[0][0] <= self.voter.outbox.durable:
            ack = self._own_acknowledgements.popleft()[1]
            if self.is_coordinator and ack.term == self.voter.term:
                self._acknowledgements.setdefault(ack.height, {})[ack.voter] = ack
                counted = True
        if counted:
            self._certify(now)

    def certifiable(self) -> int:
        """The highest record of this term that a quorum acknowledged (0: none above the certified)."""
        ledger = self.voter.ledger
        for height in range(ledger.height, ledger.certified, -1):
            acks = self._acknowledgements.get(height, {})
            if ledger.records[height].header.term == self.voter.term and ledger.committee_at(
                height
            ).is_quorum(acks):
                return height
        return 0

    def _certify(self, now: int) -> None:
        height = self.certifiable()
        if not height:
            return
        ledger = self.voter.ledger
        committee = ledger.committee_at(height).everyone
        acks = self._acknowledgements[height]
        certificate = certificate_of(ack for peer, ack in acks.items() if peer in committee)
        covered = ledger.certify(certificate)
        for old in [h for h in self._acknowledgements if h <= height]:
            del self._acknowledgements[old]
        self.voter.outbox.persist([Certified(certificate)])
        self._certified(covered, now)
        if not self.is_coordinator:
            return
        if self.voter.me not in ledger.committee.everyone and ledger.certified == ledger.height:
            for peer in self._followers():
                self._send_append(peer)
            self.step_down("no longer a voter", now)
            return
        for peer in self._followers():
            if self.progress.get(peer) is not None and self.progress[peer].proven:
                self._send_append(peer)
