"""The follower's side of replication: what a voter or learner does with the records that a coordinator orders.

    an append of a lower term         is answered with the proof of the present one
    of a higher term                  that term is entered, if the message proves it
    of this term, by another peer     is refused; nobody orders in a term before its votes were shown
    by one that contradicted itself   is refused: there is evidence, and another has to be elected
    that begins where logs differ     is answered with the certified height, where the logs must agree
    any other                         its records are appended, in place of what contradicts them here, and acknowledged

A record is appended when the chain allows it (`Ledger.check_next`) and `check` says that what it claims is so and that all it
names is durable here. `check` may answer "not yet": the records are then kept and tried again by `retry`.

Only records of the present term are acknowledged, with a signature; for older ones the answer only says how far the logs
agree. So a record of an earlier term is never certified by counting: it is covered by the opening of the present one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from p2pcoord.consensus.batches import has_room
from p2pcoord.consensus.election import Election
from p2pcoord.consensus.messages import Append, AppendReply, TransferRequest, Votes
from p2pcoord.consensus.record import Opening, Record
from p2pcoord.consensus.statements import Acknowledgement, Header
from p2pcoord.consensus.voter import Appended, Certified, Frame, Truncated, Voter
from p2pcoord.errors import RemoteError

# A coordinator whose opening is not certified after this long coordinates nothing: its heartbeats no longer count, so that
# a winner that never commits cannot hold the run. Far above any honest certificate, disk and round trips included.
OPENING_PATIENCE_NS = 20_000_000_000

Check = Callable[[Record], str | None]
"""Why a record cannot be appended yet or at all ("" when it can be); None asks to wait."""


class Following:
    """Follows whoever coordinates the term. `certified(records, now)` is called with newly certified records in order, once
    each."""

    def __init__(
        self,
        voter: Voter,
        election: Election,
        *,
        check: Check,
        certified: Callable[[Sequence[Record], int], None],
        holds_state: Callable[[], bool],
    ) -> None:
        self.voter = voter
        self.election = election
        self._check = check
        self._certified = certified
        self._holds_state = holds_state
        self._kept: tuple[str, Append] | None = None
        """(coordinator, its message) while a record in it cannot be checked yet."""
        self._opening_since: tuple[int, int] | None = None
        """(term, when its coordinator was first heard) while the term's opening is not certified here."""

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
        if voter.distrusts(sender):
            raise RemoteError("distrusted", f"{sender} orders, which has contradicted itself")
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
        self._witness(record.header)
        if height <= ledger.certified:
            raise RemoteError("contradiction", f"another record at certified height {height}")
        replaced = ledger.records[height:]
        if replaced and replaced[-1].header.term == self.voter.term:
            # A coordinator's log only grows in its term. Whoever followed it here would sign two acknowledgements for one place.
            raise RemoteError(
                "equivocation", f"another record at height {height}, ordered in term {self.voter.term}"
            )
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

    def _witness(self, header: Header) -> None:
        """A header that contradicts this log may be evidence together with ours, if its signature holds."""
        voter, ledger = self.voter, self.voter.ledger
        ours = ledger.records[header.height].header if header.height <= ledger.height else None
        if ours is not None and (ours.term, ours.coordinator) == (header.term, header.coordinator):
            if voter.authority.verify(header.coordinator, header):
                voter.see(ours)
                voter.see(header)

    def _judge(self, record: Record) -> str | None:
        ledger = self.voter.ledger
        if record.header.kind == "committee" and ledger.certified != record.header.height - 1:
            return "a committee change waits for the certificate of the record below it"
        if record.body is None:  # only what is certified may have lost it
            raise RemoteError("bad_record", f"a {record.header.kind} to be judged without its body")
        if record.header.kind != "opening" and not has_room(ledger):
            return "too many records before it are not certified"
        ledger.check_next(record)
        self.voter.see(record.header)
        if isinstance(record.body, Opening):
            for vote in record.body.votes:
                self.voter.see(vote)
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
        if matched and voter.contradicted is None:
            uncertified = ledger.records[ledger.certified + 1 : match_height + 1]
            acks = [voter.acknowledge(record) for record in uncertified if record.header.term == voter.term]
        return AppendReply(
            voter.term,
            matched,
            match_height if matched else ledger.certified,
            ledger.certified,
            tuple(acks),
            waiting,
            self._holds_state() and ledger.lacking is None,
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
