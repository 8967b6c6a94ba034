"""A liar: a member whose machine also says what is not so.

It has its own key and no other, hears what every member hears, and forges: terms that nobody proved, votes and grants in
others' names, transfers and openings, stale and invented records, certificates with a quorum of false signatures, other
peers' goodbyes, and bytes that are no message at all. It changes nothing: no invariant breaks, no term is reached that a
quorum did not ask for, and the run goes on.

Its own machine runs an honest Peer beside it, so it may be a voter as well; it does not vote twice, for that is what the
threat model says nobody survives in a quorum of crash-tolerant voters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random
from typing import TypeVar

import msgspec

from p2pcoord.consensus.messages import (
    Append,
    AppendReply,
    Grants,
    PreVoteReply,
    PreVoteRequest,
    Records,
    RecordsRequest,
    TermNotice,
    TransferRequest,
    VoteReply,
    VoteRequest,
    Votes,
)
from p2pcoord.consensus.quorum import Committee
from p2pcoord.consensus.record import (
    Admission,
    CommitteeChange,
    Counted,
    Opening,
    Record,
    Round,
    body_hash,
    body_kind,
)
from p2pcoord.consensus.statements import (
    Acknowledgement,
    Certificate,
    Farewell,
    Grant,
    Header,
    Transfer,
    Vote,
)
from p2pcoord.identity import Authority, Statement
from p2pcoord.peer import Peer
from p2pcoord.rounds.messages import JoinRequest, LeaveRequest
from p2pcoord.wire import MAX_MESSAGE_BYTES, Message, encode

S = TypeVar("S", bound=Statement)

MAX_HEARD = 64
INTERVAL_NS = 150_000_000


class Adversary:
    """Forges in the name of the peer beside it. `forge` gives the next lie, to be sent to `target`."""

    def __init__(self, peer: Peer, authority: Authority, random: Random) -> None:
        self.peer = peer
        self._authority = authority
        self._random = random
        self._heard: deque[bytes] = deque(maxlen=MAX_HEARD)
        self._lies: tuple[Callable[[str], Message | bytes], ...] = (
            self._pre_vote_request,
            self._pre_vote_request,
            self._vote_request,
            self._term_notice,
            self._term_by_certificate,
            self._transfer,
            self._transfer_to_me,
            self._opening,
            self._stale_append,
            self._own_order,
            self._records,
            self._acknowledgements,
            self._replies,
            self._join,
            self._farewell,
            self._request,
            self._replay,
            self._garbage,
        )

    def hear(self, data: bytes) -> None:
        self._heard.append(data)

    def forge(self, target: str) -> bytes:
        if any(
            c.is_quorum((self._authority.peer_id,))
            for c in self.peer.agreement.voter.ledger.live_committees()
        ):
            return b""  # a run whose only voter lies is beyond every promise
        lie = self._random.choice(self._lies)(target)
        return lie if isinstance(lie, bytes) else encode(lie)

    # What it knows

    @property
    def _term(self) -> int:
        return self.peer.agreement.voter.term

    def _voters(self) -> tuple[str, ...]:
        return self.peer.agreement.committee.everyone

    def _last(self) -> Header:
        return self.peer.agreement.voter.ledger.last

    def _sign(self, statement: S) -> S:
        return self._authority.sign(statement)

    def _higher(self) -> int:
        return self._term + self._random.choice((1, 2, 3, 50, 10_000))

    def _elected(self) -> bool:
        """Whether others may follow it in this term: it coordinates, or it did until a moment ago."""
        proof = self.peer.agreement.voter.proof
        mine = self._authority.peer_id
        return isinstance(proof, Votes) and any(vote.candidate == mine for vote in proof.votes)

    def _grants(self, term: int) -> Grants:
        """A quorum of grants: all signed with its own key."""
        mine = self._authority.peer_id
        return Grants(tuple(self._sign(Grant(term, mine, voter)) for voter in self._voters()))

    def _votes(self, term: int, last: bytes) -> Votes:
        mine = self._authority.peer_id
        if self._random.random() < 0.3:  # its own vote, as often as a quorum needs
            return Votes((self._sign(Vote(term, mine, last, mine)),) * len(self._voters()))
        return Votes(tuple(self._sign(Vote(term, mine, last, voter)) for voter in self._voters()))

    # Its lies

    def _pre_vote_request(self, target: str) -> Message:
        term = self._higher()
        proof = self._random.choice((None, self._grants(term - 1), self.peer.agreement.voter.proof))
        last, votes = self._last(), self.peer.agreement.voter.last_votes()
        if self._random.random() < 0.5:  # a log that is longer than anybody's
            last = self._sign(
                msgspec.structs.replace(last, term=term - 1, height=last.height + 9, signature=b"")
            )
            votes = self._votes(term - 1, last.previous).votes
        return PreVoteRequest(term, proof, last, votes)

    def _vote_request(self, target: str) -> Message:
        term = self._higher()
        return VoteRequest(term, self._grants(term), self._last(), self.peer.agreement.voter.last_votes())

    def _term_notice(self, target: str) -> Message:
        term = self._higher()
        last = self._authority.hash(self._last())
        return TermNotice(term, self._random.choice((self._grants(term), self._votes(term, last))))

    def _term_by_certificate(self, target: str) -> Message | bytes:
        known = self.peer.agreement.voter.ledger.newest_certificate
        if known is None:
            return b""
        term = self._higher()
        return TermNotice(term, Certificate(term, known.height, known.record, known.signatures))

    def _transfer(self, target: str) -> Message:
        coordinator = self.peer.agreement.voter.coordinator or target
        return TransferRequest(self._sign(Transfer(self._term, coordinator, target)))

    def _transfer_to_me(self, target: str) -> Message | bytes:
        voter = self.peer.agreement.voter
        if self._elected() or voter.coordinator is None:
            return b""
        transfer = self._sign(Transfer(voter.term, voter.coordinator, voter.me))
        return PreVoteRequest(voter.term + 1, voter.proof, self._last(), voter.last_votes(), transfer)

    def _opening(self, target: str) -> Message:
        term = self._higher()
        ledger = self.peer.agreement.voter.ledger
        votes = self._votes(term, ledger.hashes[-1])
        record = self._record(term, Opening(votes.votes))
        return Append(
            term, 150_000_000, ledger.height, ledger.hashes[-1], (record,), ledger.newest_certificate, votes
        )

    def _record(self, term: int, body: Opening | CommitteeChange | Round) -> Record:
        ledger = self.peer.agreement.voter.ledger
        height = ledger.height + 1
        committee = height if isinstance(body, CommitteeChange) else ledger.committee_height
        mine = self._authority.peer_id
        header = Header(height, term, ledger.hashes[-1], committee, body_kind(body), body_hash(body), mine)
        return Record(self._sign(header), body)

    def _stale_append(self, target: str) -> Message:
        """Real records, as if it had the order of them."""
        ledger = self.peer.agreement.voter.ledger
        at = self._random.randint(0, ledger.height)
        records = tuple(ledger.records[at + 1 : at + 4])
        term = self._random.choice((self._term, ledger.records[at].header.term))
        return Append(term, 30_000_000_000, at, ledger.hashes[at], records, ledger.newest_certificate, None)

    def _own_order(self, target: str) -> Message | bytes:
        """A record of its own in the present term, which contradicts the coordinator's, be that itself. Who was elected could
        have a committee of its own choice (threat model); that it does not order."""
        ledger = self.peer.agreement.voter.ledger
        mine = self._authority.peer_id
        change = CommitteeChange(Committee((mine,), ledger.committee.voters))
        made_up = Round(1, b"", bytes(32), (Counted(0, mine, 1, 1.0),), bytes(32), bytes(32), 1)
        body = made_up if self._elected() else self._random.choice((change, made_up))
        record = self._record(self._term, body)
        return Append(self._term, 1_000_000, ledger.height, ledger.hashes[-1], (record,), None, None)

    def _records(self, target: str) -> Message:
        """An invented record that all voters certified, it says."""
        body = CommitteeChange(Committee((self._authority.peer_id,), self.peer.agreement.committee.voters))
        record = self._record(self._term, body)
        height, name = record.header.height, self._authority.hash(record.header)
        acks = [self._sign(Acknowledgement(self._term, height, name, voter)) for voter in self._voters()]
        signatures = tuple(sorted((ack.voter, ack.signature) for ack in acks))
        return Records((record,), Certificate(self._term, height, name, signatures), height)

    def _acknowledgements(self, target: str) -> Message:
        last = self._last()
        name = self._authority.hash(last)
        voter = self._random.choice(self._voters())
        ack = self._sign(Acknowledgement(self._term, last.height, name, voter))
        return AppendReply(self._term, True, last.height + self._random.randint(0, 99), 0, (ack,), "")

    def _replies(self, target: str) -> Message:
        term = self._term + 1
        mine = self._authority.peer_id
        if self._random.random() < 0.5:
            return PreVoteReply(term, self._sign(Grant(term, target, self._random.choice(self._voters()))))
        return VoteReply(term, self._sign(Vote(term, target, self._random.randbytes(32), mine)))

    def _join(self, target: str) -> Message:
        return JoinRequest(Admission(f"{target[:-3]}abc", "nobody", self._random.randbytes(32)))

    def _farewell(self, target: str) -> Message:
        return LeaveRequest(self._sign(Farewell(target, self.peer.agreement.voter.ledger.certified)))

    def _request(self, target: str) -> Message:
        return RecordsRequest(self._random.choice((0, 1, 1 << 52)))

    def _replay(self, target: str) -> bytes:
        return self._random.choice(self._heard) if self._heard else b""

    def _garbage(self, target: str) -> bytes:
        random = self._random
        drawn = random.random()
        if drawn < 0.02:
            return bytes(MAX_MESSAGE_BYTES + 1)
        if drawn < 0.1:
            return b"\x81" * random.randint(1, 2000)
        if drawn < 0.4 or not self._heard:
            return random.randbytes(random.randint(0, 200))
        data = bytearray(random.choice(self._heard))
        if drawn < 0.6:
            return bytes(data[: random.randrange(len(data) + 1)])
        for _ in range(random.randint(1, 3)):
            if data:
                data[random.randrange(len(data))] = random.randrange(256)
        return bytes(data)
