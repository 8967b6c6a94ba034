"""Replication: the coordinator orders records, voters check and acknowledge, a quorum of acknowledgements certifies.

The coordinator sends records as soon as it has them, its own write running meanwhile (Ongaro, section 10.2.1): that is safe
because a coordinator that crashes is no coordinator of this term when it comes back. It counts its own acknowledgement when
its write is durable, and a voter's acknowledgement leaves that voter only after the write it speaks of.

A voter appends a record when the chain allows it (`Ledger.check_next`) and `check` says that what the record claims is so
and that all it names is durable here. `check` may answer "not yet": the records are then kept and tried again by `retry`. It
acknowledges, with a signature, only records of its own term; for older ones it only says how far the logs agree. So a
record of an earlier term is never certified by counting: it is covered by the opening of the present one.

A certificate overrides all of this: certified records (`Records`) are taken as they are, replacing what contradicts them.

Catch-up has two ways. A voter or learner whose log disagrees answers with its certified height, where the logs must agree,
and gets all from there. Anybody else asks any peer for certified records from a height on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from p2pcoord.consensus.election import NEVER, Election
from p2pcoord.consensus.evidence import SignedStatement
from p2pcoord.consensus.record import MAX_BODY_BYTES, AnyBody, CommitteeChange, Opening, Record, make_record
from p2pcoord.consensus.statements import Acknowledgement, Transfer, Vote, certificate_of
from p2pcoord.consensus.voter import Appended, Certified, Frame, Role, Timing, Truncated, Voter
from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.messages import Append, AppendReply, Records, RecordsRequest, TransferRequest, Votes
from p2pcoord.wire import encode

# Records in flight before the oldest is certified. Rounds need one or two; more would only be lost at the next election.
MAX_UNCERTIFIED = 64

# One Append or Records: half of MAX_MESSAGE_BYTES, so that certificate and proof always fit beside the bodies.
BATCH_BYTES = 512 << 10
BATCH_RECORDS = 64

# A peer is asked for records at most this often, whatever it shows: five a second catch up 300 records a second.
ASK_INTERVAL_NS = 200_000_000

# A peer is answered at most this often: half of what an honest one asks.
ANSWER_INTERVAL_NS = ASK_INTERVAL_NS // 2

# A coordinator whose opening is not certified after this long coordinates nothing: its heartbeats no longer count, so that
# a winner that never commits cannot hold the run. Far above any honest certificate, disk and round trips included.
OPENING_PATIENCE_NS = 20_000_000_000

# Learners that the coordinator feeds at a time; a committee changes by a few voters at once.
MAX_LEARNERS = 8

Check = Callable[[Record], str | None]
"""Why a record cannot be appended yet or at all ("" when it can be); None asks to wait."""


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
    """Both sides of replication for one voter. `certified(records, now)` is called with newly certified records in order,
    once each."""

    def __init__(
        self,
        voter: Voter,
        election: Election,
        timing: Timing,
        *,
        check: Callable[[Record], str | None],
        certified: Callable[[Sequence[Record], int], None],
        see: Callable[[SignedStatement], None] = lambda statement: None,
        holds_state: Callable[[], bool] = lambda: True,
    ) -> None:
        self.voter = voter
        self.election = election
        self.timing = timing
        self._check = check
        self._certified = certified
        self._see = see
        self._holds_state = holds_state
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
        self._kept: tuple[str, Append] | None = None
        self._asked_at: dict[str, int] = {}
        self._answered_at: dict[str, int] = {}
        self._opening_since: tuple[int, int] | None = None
        """(term, when its coordinator was first heard) while the term's opening is not certified here."""

    # The coordinator's side

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
        self._kept = None
        self._quorum_seen_at = self.opened_at = now
        voter.outbox.emit("coordinator", term=voter.term)
        self._order(Opening(votes), now)
        self._beat(now)

    def propose(self, body: AnyBody, now: int) -> int | None:
        """Orders a record; its height, or None when this peer may not order now (not opened, handing over, too many; a
        committee change waits until all below it is certified)."""
        ledger = self.voter.ledger
        if not self.opened or self.transferring is not None or not self._has_room():
            return None
        if isinstance(body, CommitteeChange) and ledger.certified < ledger.height:
            return None
        return self._order(body, now)

    def _has_room(self) -> bool:
        """Whether one more record may stay uncertified: all that one certificate may come to cover fits one message."""
        ledger = self.voter.ledger
        uncertified = ledger.records[ledger.certified + 1 :]
        return (
            len(uncertified) < MAX_UNCERTIFIED
            and sum(len(encode(record)) for record in uncertified) + MAX_BODY_BYTES <= BATCH_BYTES
        )

    def _order(self, body: AnyBody, now: int) -> int:
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
        self._own_acknowledgements.append((persist, self._acknowledge(record)))
        for peer in self._followers():
            progress = self._progress(peer)
            if progress.next_height == record.header.height and progress.proven:
                self._send_append(peer, now)
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

    def _send_append(self, peer: str, now: int) -> None:
        voter, ledger, progress = self.voter, self.voter.ledger, self._progress(peer)
        old = self.certified_from(progress.next_height)
        if old is not None:
            voter.outbox.send(peer, old, after=voter.term_persist)
            progress.next_height = old.records[-1].header.height + 1
        previous = min(progress.next_height - 1, ledger.height)
        records = ledger.batch(previous + 1, limit_bytes=BATCH_BYTES, limit_records=BATCH_RECORDS)
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
            self._send_append(peer, now)
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
            self._send_append(sender, now)
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
            self._send_append(sender, now)

    def _take_acknowledgement(self, sender: str, ack: Acknowledgement) -> None:
        voter, ledger = self.voter, self.voter.ledger
        if ack.voter != sender:
            raise RemoteError("bad_ack", f"{sender} sent an acknowledgement by {ack.voter}")
        if ack.term != voter.term or ack.height <= ledger.certified:
            return
        if not ledger.holds(ack.height, ack.record):
            raise RemoteError("bad_ack", f"an acknowledgement of another record at height {ack.height}")
        voter.authority.check(sender, ack)
        self._see(ack)
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
                self._send_append(peer, now)
            self.step_down("no longer a voter", now)
            return
        for peer in self._followers():
            if self.progress.get(peer) is not None and self.progress[peer].proven:
                self._send_append(peer, now)

    # The follower's side

    def on_append(self, sender: str, message: Append, now: int) -> None:
        voter = self.voter
        if message.term < voter.term:
            self.election.notify(sender, message.term)
            return
        if message.term > voter.term:
            if message.proof is None:  # it thinks we know this term
                voter.outbox.send(sender, self._reply(matched=False))
                return
            self.election.adopt(sender, message.proof, now, claimed=message.term)
        if not self._coordinates(sender, message):
            voter.outbox.send(sender, AppendReply(voter.term - 1, False, 0, voter.ledger.certified))
            return
        if self._patient(message.term, now):
            self.election.heard(sender, message.interval_ns, now)
        self._kept = None
        self._append(sender, message, now)

    def _patient(self, term: int, now: int) -> bool:
        """Whether this term's coordinator still has time to get its opening certified."""
        ledger = self.voter.ledger
        if ledger.records[ledger.certified].header.term >= term:
            self._opening_since = None
            return True
        if self._opening_since is None or self._opening_since[0] != term:
            self._opening_since = (term, now)
        return now - self._opening_since[1] <= OPENING_PATIENCE_NS

    def _coordinates(self, sender: str, message: Append) -> bool:
        """Whether `sender` coordinates this term, by the log, by what was proven, or by the message; False when nothing
        shows it (the answer then makes it send its votes). Raises RemoteError when somebody else does."""
        voter = self.voter
        known = voter.ledger.coordinator_of(voter.term)
        if known is None and isinstance(voter.proof, Votes):
            known = voter.proof.votes[0].candidate
        if known is None and message.proof is not None:
            voter.check_proof(message.proof)
            first = message.proof.votes[0]
            if first.term != voter.term:
                raise RemoteError("unproven", f"votes of term {first.term} in term {voter.term}")
            known = first.candidate
            voter.enter_term(voter.term, message.proof, voter.voted_for, voter.voted_last)
        if known is not None and known != sender:
            raise RemoteError("not_coordinator", f"{sender} orders in term {voter.term} of {known}")
        return known is not None

    def _append(self, sender: str, message: Append, now: int) -> None:
        voter, ledger = self.voter, self.voter.ledger
        if not ledger.holds(message.previous_height, message.previous):
            if message.previous_height <= ledger.certified:
                raise RemoteError(
                    "contradiction", f"another record at certified height {message.previous_height}"
                )
            voter.outbox.send(sender, self._reply(matched=False))
            return
        agreed = message.previous_height
        frames: list[Frame] = []
        newly: list[Record] = []
        waiting = ""
        try:
            self._take_certificate(message, frames, newly)
            for record in message.records:
                if record.header.height != agreed + 1:
                    raise RemoteError("gap", f"record {record.header.height} after {agreed}")
                if not ledger.holds(agreed + 1, voter.authority.hash(record.header)):
                    verdict = self._replace(record, frames)
                    if verdict != "":
                        waiting = verdict or "not checked yet"
                        if verdict is None:
                            self._kept = (sender, message)
                        break
                    self._take_certificate(message, frames, newly)
                agreed += 1
        finally:
            if frames:
                voter.outbox.persist(frames)
            if newly:
                self._certified(newly, now)
        voter.outbox.send(sender, self._reply(matched=True, match_height=agreed, waiting=waiting))

    def _replace(self, record: Record, frames: list[Frame]) -> str | None:
        """Appends `record`, in place of what contradicts it here; or leaves the log as it was and says why (see Check)."""
        ledger, height = self.voter.ledger, record.header.height
        if height <= ledger.certified:
            raise RemoteError("contradiction", f"another record at certified height {height}")
        replaced = ledger.records[height:]
        if replaced and replaced[0].header.term == record.header.term:
            # One coordinator signed both. Whoever followed it here would sign two acknowledgements for one place.
            raise RemoteError("equivocation", f"two records at height {height} of term {record.header.term}")
        ledger.truncate(height - 1)
        verdict: str | None = "refused"
        try:
            verdict = self._judge(record)
        finally:
            if verdict != "":
                for old in replaced:
                    ledger.append(old)
        if verdict == "":
            ledger.append(record)
            if replaced:
                frames.append(Truncated(height - 1))
            frames.append(Appended(record))
        return verdict

    def _judge(self, record: Record) -> str | None:
        ledger = self.voter.ledger
        if record.header.kind == "committee" and ledger.certified != record.header.height - 1:
            return "a committee change waits for the certificate of the record below it"
        if record.body is None:  # only what is certified may have lost it
            raise RemoteError("bad_record", f"a {record.header.kind} to be judged without its body")
        if record.header.kind != "opening" and not self._has_room():
            return "too many records before it are not certified"
        ledger.check_next(record)
        return self._check(record)

    def _take_certificate(self, message: Append, frames: list[Frame], newly: list[Record]) -> None:
        """Certifies what the message's certificate covers of the log as it stands."""
        ledger, certificate = self.voter.ledger, message.certificate
        if certificate is None or certificate.height <= ledger.certified:
            if certificate is not None:
                ledger.check_no_fork(certificate)
            return
        if ledger.holds(certificate.height, certificate.record):
            newly.extend(ledger.certify(certificate))
            frames.append(Certified(certificate))

    def _reply(self, *, matched: bool, match_height: int = 0, waiting: str = "") -> AppendReply:
        voter, ledger = self.voter, self.voter.ledger
        acks: list[Acknowledgement] = []
        if matched:
            uncertified = ledger.records[ledger.certified + 1 : match_height + 1]
            acks = [self._acknowledge(record) for record in uncertified if record.header.term == voter.term]
        return AppendReply(
            voter.term,
            matched,
            match_height if matched else ledger.certified,
            ledger.certified,
            tuple(acks),
            waiting,
            self._holds_state(),
        )

    def _acknowledge(self, record: Record) -> Acknowledgement:
        voter, header = self.voter, record.header
        if header.term != voter.term:
            raise LocalError(f"acknowledging a record of term {header.term} in term {voter.term}")
        return voter.authority.sign(
            Acknowledgement(voter.term, header.height, voter.authority.hash(header), voter.me)
        )

    def retry(self, now: int) -> None:
        """What `check` waited for may have come."""
        if self._kept is not None:
            (sender, message), self._kept = self._kept, None
            if message.term == self.voter.term and self.voter.coordinator == sender:
                self._append(sender, message, now)

    def on_transfer(self, sender: str, request: TransferRequest, now: int) -> None:
        voter, transfer = self.voter, request.transfer
        if (transfer.term, transfer.target, transfer.coordinator) != (voter.term, voter.me, sender):
            return  # of another term, or not for us: too late is no fault
        voter.authority.check(sender, transfer)
        if sender != voter.coordinator:
            raise RemoteError("not_coordinator", f"{sender} hands over term {voter.term}")
        self.election.campaign(transfer, now)

    # Certified records, for anybody

    def ask(self, peer: str, now: int) -> None:
        """Asks a peer for the certified records after ours, not too often."""
        if now - self._asked_at.get(peer, -ASK_INTERVAL_NS) < ASK_INTERVAL_NS:
            return
        if len(self._asked_at) > 1024:
            self._asked_at.clear()
        self._asked_at[peer] = now
        self.voter.outbox.send(peer, RecordsRequest(self.voter.ledger.certified + 1))

    def on_records_request(self, sender: str, request: RecordsRequest, now: int) -> None:
        """An answer is half a MiB, its question forty bytes: each peer gets one per interval."""
        if now - self._answered_at.get(sender, -ANSWER_INTERVAL_NS) < ANSWER_INTERVAL_NS:
            return
        if len(self._answered_at) > 1024:
            self._answered_at.clear()
        self._answered_at[sender] = now
        answer = self.certified_from(request.from_height)
        if answer is not None:
            self.voter.outbox.send(sender, answer)

    def certified_from(self, start: int) -> Records | None:
        """Certified records from `start` on that end with a certificate of their own; None when there are none."""
        ledger = self.voter.ledger
        if not 1 <= start <= ledger.certified:
            return None
        records = ledger.batch(start, limit_bytes=BATCH_BYTES, limit_records=BATCH_RECORDS)
        end = min(start + len(records) - 1, ledger.certified)
        while end >= start and end not in ledger.certificates:
            end -= 1
        if (
            end < start
        ):  # a batch that ends within what one certificate covers: all of that fits a message (_has_room)
            end = next(h for h in range(start, ledger.certified + 1) if h in ledger.certificates)
            records = tuple(ledger.records[start : end + 1])
        return Records(records[: end - start + 1], ledger.certificates[end], ledger.certified)

    def on_records(self, sender: str, message: Records, now: int) -> None:
        ledger, certificate = self.voter.ledger, message.certificate
        if certificate.height <= ledger.certified:
            ledger.check_no_fork(certificate)
            return
        if not message.records or message.records[-1].header.height > certificate.height:
            raise RemoteError("gap", "records that their certificate does not cover")
        first = message.records[0].header
        joins = ledger.holds(first.height - 1, first.previous)
        if first.height > ledger.height + 1 or (first.height - 1 > ledger.certified and not joins):
            # They begin beyond our log, or above records of ours that were never certified.
            self.ask(sender, now)
            return
        kept, added = ledger.adopt(message.records, certificate)
        newly = ledger.certify(certificate)
        frames: list[Frame] = [Truncated(kept)] if added else []
        frames += [Appended(record) for record in added]
        frames.append(Certified(certificate))
        self.voter.outbox.persist(frames)
        self._follow_term(certificate.term, sender, now)
        self._certified(newly, now)
        if message.more > ledger.certified:
            self.ask(sender, now)

    def _follow_term(self, term: int, sender: str, now: int) -> None:
        """A certificate proves its term."""
        certificate = self.voter.ledger.newest_certificate
        if term > self.voter.term and certificate is not None and certificate.term == term:
            self.election.adopt(sender, certificate, now, claimed=term)
