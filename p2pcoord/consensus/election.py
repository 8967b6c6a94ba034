"""Leader election: Raft with pre-vote (Ongaro, sections 3.4, 9.6), where every step up is signed and proven.

    input                         follower            pre-candidate           candidate            coordinator
    election timeout              ask for pre-votes   ask again               ask for pre-votes    -
                                                                              of the next term
    a quorum grants               -                   enter the term, vote    -                    -
                                                      for itself, ask votes
    a quorum votes                -                   -                       open the term        -
    this term's coordinator heard stay                follower                follower             -
    a higher term, proven         enter it            enter it                enter it             step down

What is asked of a voter, and when it says yes:

    pre-vote of term t   its own term is t - 1 (a higher one is first adopted from its proof), it has not heard a coordinator
                         within the minimum election timeout (unless a transfer names the candidate), the candidate is a
                         voter of a committee it holds for live, and its last record is at least as new as its own
    vote in term t       t is its own term (adopted from the grants), it has not voted for another, and the last two again

Terms need proof, so one liar cannot inflate them: a term is entered only with a quorum of signed grants or votes, or a
certificate, of a committee this peer holds for live. Whoever shows a lower term is sent the proof of the higher one.
A candidate's last record is the header its coordinator signed, with the votes that elected that coordinator; so a candidate
cannot invent a newer log either.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from p2pcoord.consensus.messages import (
    Grants,
    PreVoteReply,
    PreVoteRequest,
    TermNotice,
    TermProof,
    VoteReply,
    VoteRequest,
)
from p2pcoord.consensus.statements import Grant, Header, Transfer, Vote, check_votes
from p2pcoord.consensus.voter import Role, Timing, Voter
from p2pcoord.effects import NEVER
from p2pcoord.errors import RemoteError


class Election:
    """The election of one voter. `elected(votes, now)` is called when a quorum has voted for it; `behind(peer, now)` when a
    peer shows something that only a longer certified log can explain."""

    def __init__(
        self,
        voter: Voter,
        timing: Timing,
        random: Random,
        *,
        elected: Callable[[tuple[Vote, ...], int], None],
        behind: Callable[[str, int], None],
    ) -> None:
        self.voter = voter
        self.timing = timing
        self._random = random
        self._elected = elected
        self._behind = behind
        self.interval_ns = timing.heartbeat_ns
        """The coordinator's stated time between heartbeats."""
        self.heard_at: int | None = None
        """When this term's coordinator was last heard."""
        self.deadline = NEVER
        self._transfer: Transfer | None = None
        self._grants: dict[str, Grant] = {}
        self._votes: dict[str, Vote] = {}
        self._own_vote: tuple[int, Vote] | None = None

    # Time

    def start(self, now: int) -> None:
        """A voter that is its own quorum has nobody to wait for."""
        self._rearm(now)
        if self._alone():
            self.deadline = now

    def _alone(self) -> bool:
        return self.voter.ledger.committee.is_quorum((self.voter.me,))

    def _rearm(self, now: int) -> None:
        low, high = self.timing.election_minimum, self.timing.election_maximum
        self.deadline = now + int(self.interval_ns * self._random.uniform(low, high))

    def heard(self, coordinator: str, interval_ns: int, now: int) -> None:
        """This term's coordinator spoke (its right to the term was checked)."""
        voter = self.voter
        if not (voter.role is Role.PRE_CANDIDATE and self._transfer is not None):
            voter.role = (
                Role.FOLLOWER
            )  # who was asked to take over goes on although the coordinator is still heard
        if voter.coordinator != coordinator:
            voter.coordinator = coordinator
            voter.outbox.emit("following", coordinator=coordinator, term=voter.term)
        # What a coordinator states moves the timeout only between our own two settings: a liar that once coordinated would
        # else leave behind an election that never comes, or timeouts shorter than a round trip, which nobody wins.
        slowest = max(self.timing.heartbeat_ns, self.timing.resting_heartbeat_ns)
        self.interval_ns = min(max(interval_ns, self.timing.heartbeat_ns), slowest)
        self.heard_at = now
        self._rearm(now)

    def postpone(self, now: int) -> None:
        """This peer itself was asleep: its silence about others means nothing (architecture: late ticks)."""
        if self.voter.role is not Role.COORDINATOR:
            self._rearm(now)

    def tick(self, now: int) -> None:
        if now < self.deadline or self.voter.role is Role.COORDINATOR:
            return
        if not self.voter.may_stand:
            self._rearm(now)
            return
        if self.voter.coordinator is not None:
            self.voter.outbox.emit(
                "coordinator-silent", coordinator=self.voter.coordinator, term=self.voter.term
            )
        self.voter.coordinator = None
        self.interval_ns = self.timing.heartbeat_ns  # that of the silent one no longer counts
        self._ask_for_pre_votes(None, now)

    def next_deadline(self) -> int:
        return NEVER if self.voter.role is Role.COORDINATOR else self.deadline

    # Standing for election

    def campaign(self, transfer: Transfer, now: int) -> None:
        """The coordinator asked this voter to take over."""
        if self.voter.may_stand and self.voter.role is not Role.COORDINATOR:
            self._ask_for_pre_votes(transfer, now)

    def _ask_for_pre_votes(self, transfer: Transfer | None, now: int) -> None:
        voter = self.voter
        voter.role = Role.PRE_CANDIDATE
        self._transfer = transfer
        self._grants, self._votes, self._own_vote = {}, {}, None
        self._rearm(now)
        term = voter.term + 1
        request = PreVoteRequest(term, voter.proof, voter.ledger.last, voter.last_votes(), transfer)
        for peer in voter.ledger.committee.everyone:
            if peer != voter.me:
                voter.outbox.send(peer, request)
        self._count_grant(voter.authority.sign(Grant(term, voter.me, voter.me)), now)

    def _count_grant(self, grant: Grant, now: int) -> None:
        voter = self.voter
        self._grants[grant.voter] = grant
        if not voter.ledger.committee.is_quorum(self._grants) or not voter.may_stand:
            return
        committee = voter.ledger.committee.everyone
        grants = tuple(g for peer, g in sorted(self._grants.items()) if peer in committee)
        self._stand(grant.term, Grants(grants), now)

    def _stand(self, term: int, proof: Grants, now: int) -> None:
        voter = self.voter
        last = voter.ledger.hashes[-1]
        persist = voter.enter_term(term, proof, voter.me, last)
        voter.role = Role.CANDIDATE
        voter.outbox.emit("candidate", term=term)
        self._own_vote = (persist, voter.authority.sign(Vote(term, voter.me, last, voter.me)))
        self._rearm(now)
        request = VoteRequest(term, proof, voter.ledger.last, voter.last_votes())
        for peer in voter.ledger.committee.everyone:
            if peer != voter.me:
                voter.outbox.send(peer, request, after=persist)

    def durable(self, now: int) -> None:
        """Some Persist became durable: this peer's own vote counts from then on, not before."""
        if self._own_vote is not None and self._own_vote[0] <= self.voter.outbox.durable:
            vote, self._own_vote = self._own_vote[1], None
            if self.voter.role is Role.CANDIDATE and vote.term == self.voter.term:
                self._count_vote(vote, now)

    def _count_vote(self, vote: Vote, now: int) -> None:
        if vote.last != self.voter.ledger.hashes[-1]:
            # Certified records came meanwhile: an opening could not extend what the votes name.
            self.voter.role = Role.FOLLOWER
            return
        self._votes[vote.voter] = vote
        committee = self.voter.ledger.committee
        if committee.is_quorum(self._votes):
            votes = tuple(v for peer, v in sorted(self._votes.items()) if peer in committee.everyone)
            self._elected(votes, now)

    def on_pre_vote_reply(self, sender: str, reply: PreVoteReply, now: int) -> None:
        voter, grant = self.voter, reply.grant
        if voter.role is not Role.PRE_CANDIDATE or grant is None or grant.term != voter.term + 1:
            return
        if grant.voter != sender or grant.candidate != voter.me:
            raise RemoteError("bad_grant", f"{sender} sent a grant by {grant.voter} for {grant.candidate}")
        voter.authority.check(sender, grant)
        self._count_grant(grant, now)

    def on_vote_reply(self, sender: str, reply: VoteReply, now: int) -> None:
        voter, vote = self.voter, reply.vote
        if vote is None or vote.term != voter.term:
            return
        if vote.voter == sender and voter.authority.verify(sender, vote):
            voter.see(vote)  # also one that comes late: the opening of another may show that it voted twice
        if voter.role is not Role.CANDIDATE:
            return
        if vote.voter != sender or vote.candidate != voter.me or vote.last != voter.voted_last:
            raise RemoteError("bad_vote", f"{sender} sent a vote by {vote.voter} for {vote.candidate}")
        voter.authority.check(sender, vote)
        self._count_vote(vote, now)

    # Being asked

    def on_pre_vote_request(self, sender: str, request: PreVoteRequest, now: int) -> None:
        voter = self.voter
        self.adopt(sender, request.proof, now, claimed=request.term - 1)
        if request.term != voter.term + 1:
            self.notify(sender, request.term - 1)
            return
        reason = (
            voter.silenced
            or self._distrust(sender)
            or self._silence(sender, request.transfer, now)
            or self._without_vote(sender, now)
            or self._older_log(sender, request.last, request.last_votes, now)
        )
        grant = None if reason else voter.authority.sign(Grant(request.term, sender, voter.me))
        voter.outbox.send(sender, PreVoteReply(request.term, grant, reason))

    def _silence(self, candidate: str, transfer: Transfer | None, now: int) -> str:
        """Why the rule of silence forbids a pre-vote ("" when it does not)."""
        voter = self.voter
        if transfer is not None and (transfer.term, transfer.target) == (voter.term, candidate):
            if transfer.coordinator == voter.coordinator and voter.authority.verify(
                transfer.coordinator, transfer
            ):
                return ""
            return "that transfer is not by the coordinator of this term"
        if voter.role is Role.COORDINATOR:
            return "this peer is the coordinator"
        if (
            voter.coordinator is not None
            and self.heard_at is not None
            and not voter.distrusts(voter.coordinator)
        ):
            if now - self.heard_at < self.timing.election_minimum * self.interval_ns:
                return f"{voter.coordinator} was heard"
        return ""

    def _distrust(self, candidate: str) -> str:
        return "there is evidence against it" if self.voter.distrusts(candidate) else ""

    def _without_vote(self, candidate: str, now: int) -> str:
        """Why a candidate that has no vote itself gets none ("" when it has one, by a committee this peer holds for live)."""
        if any(candidate in committee.everyone for committee in self.voter.ledger.live_committees()):
            return ""
        self._behind(candidate, now)
        return f"nothing here shows that {candidate} has a vote"

    def _older_log(self, sender: str, last: Header, votes: tuple[Vote, ...], now: int) -> str:
        """Why a candidate whose log ends with `last` gets no vote ("" when its log is at least as new)."""
        voter = self.voter
        ours = voter.ledger.last
        if last.term > voter.term:
            raise RemoteError("bad_header", f"a record of term {last.term} under term {voter.term}")
        if (last.term, last.height) < (ours.term, ours.height):
            return (
                f"its log ends at term {last.term}, height {last.height}; ours at {ours.term}, {ours.height}"
            )
        known = voter.ledger.coordinator_of(last.term)
        if known is None:
            try:
                check_votes(
                    voter.authority,
                    votes,
                    term=last.term,
                    candidate=last.coordinator,
                    last=votes[0].last if votes else b"",
                    committees=voter.ledger.live_committees(last.term),
                )
            except RemoteError as error:
                self._behind(sender, now)
                return f"nothing here shows who coordinated term {last.term}: {error.detail}"
        elif known != last.coordinator:
            raise RemoteError("bad_header", f"{last.coordinator} did not coordinate term {last.term}")
        if last.height > 0:
            voter.authority.check(last.coordinator, last)
            voter.see(last)
        elif last != ours:
            raise RemoteError("bad_header", "another genesis")
        return ""

    def on_vote_request(self, sender: str, request: VoteRequest, now: int) -> None:
        voter = self.voter
        self.adopt(sender, request.proof, now, claimed=request.term)
        if request.term != voter.term:
            self.notify(sender, request.term)
            return
        last = voter.authority.hash(request.last)
        reason = (
            voter.silenced
            or self._distrust(sender)
            or self._without_vote(sender, now)
            or self._older_log(sender, request.last, request.last_votes, now)
        )
        if (
            not reason
            and voter.voted_for is not None
            and (voter.voted_for, voter.voted_last) != (sender, last)
        ):
            reason = f"this term's vote went to {voter.voted_for}"
        if reason:
            voter.outbox.send(sender, VoteReply(request.term, None, reason))
            return
        if voter.voted_for is None:
            voter.role = Role.FOLLOWER
            voter.enter_term(request.term, voter.proof or request.proof, sender, last)
            self._rearm(now)
        vote = voter.authority.sign(Vote(request.term, sender, last, voter.me))
        voter.outbox.send(sender, VoteReply(request.term, vote))

    # Terms

    def adopt(self, sender: str, proof: TermProof | None, now: int, *, claimed: int) -> None:
        """Enters a higher term that is proven: then this peer's term is at least `claimed`.

        Raises RemoteError for a proof that proves nothing; asks for records when only a longer log could judge it.
        """
        voter = self.voter
        if claimed <= voter.term:
            return
        try:
            proven = voter.check_proof(proof)
        except RemoteError as error:
            if error.kind == "unproven":
                self._behind(sender, now)
            raise
        if proven != claimed or proof is None:
            raise RemoteError("unproven", f"claims term {claimed}, proves {proven}")
        was_coordinator = voter.role is Role.COORDINATOR
        voter.enter_term(proven, proof)
        voter.role = Role.FOLLOWER
        voter.coordinator = None
        self.heard_at = None
        if was_coordinator:
            voter.outbox.emit("stepped-down", term=proven, reason="a higher term")
            self._rearm(now)

    def notify(self, sender: str, shown: int) -> None:
        """Sends the proof of this peer's term to one that showed a lower one."""
        voter = self.voter
        if shown < voter.term and voter.proof is not None:
            voter.outbox.send(sender, TermNotice(voter.term, voter.proof))

    def on_term_notice(self, sender: str, notice: TermNotice, now: int) -> None:
        self.adopt(sender, notice.proof, now, claimed=notice.term)
