"""Catch-up: certified records, for anybody who asks.

Whoever sees that it is behind asks any peer for the records after its certified ones. An answer ends with a certificate, which
needs no trust in who sent it and no check of what the records claim: they are taken as they are, in place of all that
contradicts them here. The coordinator sends the same to a follower that is far behind (`replication.py`).

Rounds of long ago come without their bodies (compaction), the newest never does. Of who leaves that one out, and says that more
is to come, all is true that it says, so it is asked for in turn with what follows, and of one peer after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from p2pcoord.consensus.batches import certified_from
from p2pcoord.consensus.election import Election
from p2pcoord.consensus.messages import Records, RecordsRequest
from p2pcoord.consensus.record import Opening, Record
from p2pcoord.consensus.voter import Appended, Certified, Frame, Truncated, Voter
from p2pcoord.effects import NEVER
from p2pcoord.errors import RemoteError

# A peer is asked for records at most this often, whatever it shows: five a second catch up 300 records a second.
ASK_INTERVAL_NS = 200_000_000

# A peer is answered at most this often: half of what an honest one asks.
ANSWER_INTERVAL_NS = ASK_INTERVAL_NS // 2


class CatchUp:
    """Asks for certified records, and answers who asks. `certified(records, now)` is called with newly certified records in
    order, once each."""

    def __init__(
        self, voter: Voter, election: Election, *, certified: Callable[[Sequence[Record], int], None]
    ) -> None:
        self.voter = voter
        self.election = election
        self._certified = certified
        self._asked_at: dict[str, int] = {}
        self._body_next = False
        """Whether the body that is lacking is asked for next, not the records that follow."""
        self._answered_at: dict[str, int] = {}
        self._more: tuple[str, int] | None = None
        """Who has more certified records than its last answer brought, and when to ask for them."""

    def ask(self, peer: str, now: int) -> None:
        """Asks a peer for the certified records after ours, or for the body that is lacking, not too often."""
        if now - self._asked_at.get(peer, -ASK_INTERVAL_NS) < ASK_INTERVAL_NS:
            return
        if len(self._asked_at) > 1024:
            self._asked_at.clear()
        self._asked_at[peer] = now
        height, lacking = self.voter.ledger.certified + 1, self.voter.ledger.lacking
        if lacking is not None and self._body_next:
            height = lacking
        self._body_next = not self._body_next
        self.voter.outbox.send(peer, RecordsRequest(height))

    def tick(self, now: int) -> None:
        if now >= self.next_deadline() and self._more is not None:
            peer, self._more = self._more[0], None
            self.ask(peer, now)

    def next_deadline(self) -> int:
        return NEVER if self._more is None else self._more[1]

    def on_records_request(self, sender: str, request: RecordsRequest, now: int) -> None:
        """An answer is half a MiB, its question forty bytes: each peer gets one per interval."""
        if now - self._answered_at.get(sender, -ANSWER_INTERVAL_NS) < ANSWER_INTERVAL_NS:
            return
        if len(self._answered_at) > 1024:
            self._answered_at.clear()
        self._answered_at[sender] = now
        answer = certified_from(self.voter.ledger, request.from_height)
        if answer is not None and self.voter.ledger.lacking is None:
            self.voter.outbox.send(sender, answer)

    def on_records(self, sender: str, message: Records, now: int) -> None:
        ledger, certificate = self.voter.ledger, message.certificate
        filled = [record for record in message.records if ledger.fill(record)]
        if filled:
            self.voter.outbox.persist([Appended(record) for record in filled])
            self._certified(filled, now)
        if certificate.height <= ledger.certified:
            ledger.check_no_fork(certificate)
            return
        if not message.records or message.records[-1].header.height > certificate.height:
            raise RemoteError("gap", "records that their certificate does not cover")
        newest = next((r for r in reversed(message.records) if r.header.kind == "round"), None)
        if newest is not None and newest.body is None and message.more <= certificate.height:
            raise RemoteError("bad_record", "the newest round without its body")
        first = message.records[0].header
        joins = ledger.holds(first.height - 1, first.previous)
        if first.height > ledger.height + 1 or (first.height - 1 > ledger.certified and not joins):
            # They begin beyond our log, or above records of ours that were never certified.
            self.ask(sender, now)
            return
        uncertified = ledger.records[ledger.certified + 1 :]
        kept, added = ledger.adopt(message.records, certificate)
        self._compare(uncertified, added)
        newly = ledger.certify(certificate)
        frames: list[Frame] = [Truncated(kept)] if added else []
        frames += [Appended(record) for record in added]
        frames.append(Certified(certificate))
        self.voter.outbox.persist(frames)
        # A certificate proves its term.
        self.election.adopt(sender, certificate, now, claimed=certificate.term)
        self._body_next = False  # what follows may bring it
        self._certified(newly, now)
        if message.more > ledger.certified:
            self._more = sender, self._asked_at.get(sender, -ASK_INTERVAL_NS) + ASK_INTERVAL_NS
            self.tick(now)

    def _compare(self, before: Sequence[Record], added: Sequence[Record]) -> None:
        """Certified records came in place of some of those before: who signed two for one place is found out here."""
        voter, ledger = self.voter, self.voter.ledger
        for record in added:
            if isinstance(record.body, Opening):
                for vote in record.body.votes:
                    voter.see(vote)
        dropped = [r for r in before if not ledger.holds(r.header.height, voter.authority.hash(r.header))]
        for record in dropped:
            voter.see(record.header)
            if record.header.height <= ledger.height:
                voter.see(ledger.records[record.header.height].header)
        voter.dropped(dropped)
