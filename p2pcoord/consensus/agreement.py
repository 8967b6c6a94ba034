"""The agreement of a run: election, replication and the committee, as one machine that `Peer` holds.

    election      who coordinates a term                 following   append, check and acknowledge what is ordered
    replication   order, count and certify records       catch_up    certified records, for anybody who asks

All four work on one `Voter`. Of each other they know only the election: whose term it is, and that its coordinator was heard.

It decides nothing about training. What a record means is asked of its owner: `check(record)` before a record is appended
("" when it may be, None to wait, else why not) and `certified(records, now)` once a quorum has acknowledged it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from random import Random

import msgspec

from p2pcoord.consensus.catch_up import CatchUp
from p2pcoord.consensus.committees import wanted_voters
from p2pcoord.consensus.election import Election
from p2pcoord.consensus.evidence import SignedStatement
from p2pcoord.consensus.following import Check, Following
from p2pcoord.consensus.messages import (
    Append,
    AppendReply,
    PreVoteReply,
    PreVoteRequest,
    Records,
    RecordsRequest,
    TermNotice,
    TransferRequest,
    VoteReply,
    VoteRequest,
)
from p2pcoord.consensus.quorum import Committee
from p2pcoord.consensus.record import AnyBody, CommitteeChange, Record, Round
from p2pcoord.consensus.replication import Replication
from p2pcoord.consensus.statements import Vote
from p2pcoord.consensus.voter import AnyFrame, Role, Timing, Voter
from p2pcoord.effects import NEVER
from p2pcoord.identity import Authority
from p2pcoord.outbox import Outbox
from p2pcoord.wire import Message

# Learners that the coordinator feeds at a time; a committee changes by a few voters at once.
MAX_LEARNERS = 8

# A learner gets ready in this time, or another is tried; twice the time when its turn comes again, so that a slow one gets there.
# A voter that leaves is dropped if none got ready in it; who leaves waits up to 5 s.
LEARNER_PATIENCE_NS = 3_000_000_000
MAX_DOUBLINGS = 6

# Records that may have been certified since a learner's last answer; it has them before it can acknowledge its committee.
LEARNER_LAG = 1


class Trial(msgspec.Struct):
    """What came of making a voter of somebody: how often it was not ready in time, and the end of its time now (or NEVER)."""

    failures: int = 0
    until: int = NEVER


class Agreement:
    """Consensus of one peer. Inputs: receive, durable, tick; outputs go to the outbox."""

    def __init__(
        self,
        authority: Authority,
        outbox: Outbox,
        genesis: Record,
        random: Random,
        *,
        timing: Timing,
        committee_size: int,
        trusted: tuple[int, bytes] | None,
        check: Check,
        certified: Callable[[Sequence[Record], int], None],
        see: Callable[[SignedStatement], None],
        distrusts: Callable[[str], bool],
        holds_state: Callable[[], bool],
    ) -> None:
        self._awaited: tuple[tuple[str, ...], int] = ((), 0)
        """The voters that somebody is waited for to replace, and until when."""
        self._trials: dict[str, Trial] = {}
        self.voter = Voter(authority, outbox, genesis, trusted, see=see, distrusts=distrusts)
        self.timing = timing
        self.committee_size = committee_size
        self.election = Election(self.voter, timing, random, elected=self._elected, behind=self._behind)
        self.replication = Replication(self.voter, self.election, timing, certified=certified)
        self.following = Following(
            self.voter, self.election, check=check, certified=certified, holds_state=holds_state
        )
        self.catch_up = CatchUp(self.voter, self.election, certified=certified)

    # Life

    def start(self, frames: Sequence[AnyFrame], now: int) -> None:
        """Begins, or goes on after a restart from the frames of the log. Raises LocalError for a log that is not ours."""
        first = self.voter.first_frames()
        if frames:
            self.voter.restore(frames)
        if len(frames) < len(first):  # a crash may have left a part of the very first write
            self.voter.outbox.persist(first[len(frames) :])
        self.election.start(now)

    def receive(self, sender: str, message: Message, now: int) -> bool:
        """Handles a message of consensus; False when it is none. Raises RemoteError, Fork."""
        match message:
            case Append():
                self.following.on_append(sender, message, now)
            case AppendReply():
                self.replication.on_append_reply(sender, message, now)
            case PreVoteRequest():
                self.election.on_pre_vote_request(sender, message, now)
            case PreVoteReply():
                self.election.on_pre_vote_reply(sender, message, now)
            case VoteRequest():
                self.election.on_vote_request(sender, message, now)
            case VoteReply():
                self.election.on_vote_reply(sender, message, now)
            case TermNotice():
                self.election.on_term_notice(sender, message, now)
            case TransferRequest():
                self.following.on_transfer(sender, message, now)
            case RecordsRequest():
                self.catch_up.on_records_request(sender, message, now)
            case Records():
                self.catch_up.on_records(sender, message, now)
            case _:
                return False
        return True

    def durable(self, now: int) -> None:
        self.election.durable(now)
        self.replication.durable(now)

    def tick(self, now: int) -> None:
        self.election.tick(now)
        self.replication.tick(now)
        self.catch_up.tick(now)

    def postpone(self, now: int) -> None:
        self.election.postpone(now)
        self.replication.postpone(now)

    def next_deadline(self) -> int:
        return min(part.next_deadline() for part in (self.election, self.replication, self.catch_up))

    # Reading

    @property
    def is_coordinator(self) -> bool:
        return self.voter.role is Role.COORDINATOR

    @property
    def committee(self) -> Committee:
        return self.voter.ledger.committee

    def quorum_held(self, now: int) -> bool:
        """Whether this peer has reason to believe that a coordinator with a quorum is at work."""
        if self.is_coordinator:
            return self.replication.opened
        heard = self.election.heard_at
        limit = self.timing.election_maximum * self.election.interval_ns
        return self.voter.coordinator is not None and heard is not None and now - heard <= limit

    # Deciding (for the coordinator's owner)

    def propose(self, body: AnyBody) -> int | None:
        return self.replication.propose(body)

    def made_in_term(self, rounds: int) -> bool:
        """Whether so many rounds (1 or more) were certified under this peer's present term."""
        ledger, count = self.voter.ledger, 0
        for height in range(ledger.certified, 0, -1):
            header = ledger.records[height].header
            if header.term != self.voter.term:
                break
            count += header.kind == Round.__struct_config__.tag
            if count == rounds:
                return True
        return False

    def rotate(self, now: int) -> bool:
        """Hands the duty to the next fit voter in the committee's order. False when there is none."""
        voters = self.committee.voters
        me = self.voter.me
        at = voters.index(me) if me in voters else -1
        order = voters[at + 1 :] + voters[:at] if at >= 0 else voters
        return any(self.replication.transfer(target, now) for target in order)

    def tend_committee(self, candidates: Sequence[str], gone: Collection[str], now: int) -> None:
        """The coordinator's care for the committee: finish a joint one, feed learners, propose the next.

        `candidates` are living, reachable members that hold the state, preferred first; `gone` have left or are excluded.
        """
        replication, ledger = self.replication, self.voter.ledger
        if not replication.opened or ledger.certified != ledger.height:
            return
        if self.committee.joint:
            replication.propose(CommitteeChange(Committee(self.committee.voters)))
            return
        silent = self._silent_since(self.timing.dead_voter_ns, now)
        lost = self._silent_since(self.timing.shrink_ns, now)
        candidates = self._by_trials(candidates, now)
        wanted = wanted_voters(
            self.committee,
            silent=silent,
            gone={*gone, *lost},
            candidates=candidates,
            limit=self.committee_size,
        )
        voters = self.committee.voters
        self._try([peer for peer in wanted if peer not in voters][:MAX_LEARNERS], now)
        if wanted == voters:
            self._awaited = ((), 0)
            return
        ready = [peer for peer in wanted if peer in voters or self._caught_up(peer, now)]
        if len(ready) < len(wanted):
            # Not all learners are ready: go ahead with those that are, if they already make a better committee.
            able = [peer for peer in candidates if peer in ready]
            wanted = wanted_voters(
                self.committee,
                silent=silent,
                gone={*gone, *lost},
                candidates=able,
                limit=self.committee_size,
            )
            leaving = tuple(peer for peer in voters if peer in gone or peer in lost)
            if len(wanted) < len(voters) and self._patient(leaving, now):
                return
        if wanted != voters and self._answers(Committee(wanted, voters), now):
            self.voter.outbox.emit("committee", voters=list(wanted), outgoing=list(voters))
            replication.propose(CommitteeChange(Committee(wanted, voters)))

    def _patient(self, leaving: tuple[str, ...], now: int) -> bool:
        """Whether somebody may still become ready to replace these voters before the committee shrinks."""
        if self._awaited[0] != leaving:
            self._awaited = (leaving, now + LEARNER_PATIENCE_NS)
        return now < self._awaited[1]

    def _by_trials(self, candidates: Sequence[str], now: int) -> list[str]:
        """Who was not ready in its time comes after those that failed less often: a learner that never gets ready, or says so,
        keeps nobody else from becoming a voter."""
        for peer, trial in list(self._trials.items()):
            if self._caught_up(peer, now):
                del self._trials[peer]
            elif now >= trial.until:
                trial.failures, trial.until = trial.failures + 1, NEVER
        return sorted(candidates, key=lambda peer: self._trials.get(peer, Trial()).failures)

    def _try(self, learners: Sequence[str], now: int) -> None:
        """These shall get ready to be voters."""
        self.replication.learners = tuple(learners)
        self._trials = {p: t for p, t in self._trials.items() if t.failures or p in learners}
        for peer, trial in self._trials.items():
            if peer not in learners:
                trial.until = NEVER
        for peer in learners:
            trial = self._trials.setdefault(peer, Trial())
            if trial.until == NEVER:
                trial.until = now + (LEARNER_PATIENCE_NS << min(trial.failures, MAX_DOUBLINGS))

    def _answers(self, committee: Committee, now: int) -> bool:
        """Whether a quorum of this committee was heard just now. A record that only the dead could certify would block the log
        and every later election for ever (etcd refuses it too: its strict reconfiguration check)."""
        recently = self.timing.election_minimum * self.replication.interval_ns
        heard = [p for p in committee.everyone if self.replication.heard_within(p, recently, now)]
        return committee.is_quorum(heard)

    def _silent_since(self, span_ns: int, now: int) -> set[str]:
        """Voters not heard for so long; one never heard in this term is silent since the term began."""
        replication = self.replication
        since = now - span_ns
        silent = set()
        for peer in self.committee.everyone:
            progress = replication.progress.get(peer)
            never = progress is None or progress.heard_at >= NEVER
            heard = replication.opened_at if never or progress is None else progress.heard_at
            if peer != self.voter.me and heard < since:
                silent.add(peer)
        return silent

    def _caught_up(self, peer: str, now: int) -> bool:
        progress = self.replication.progress.get(peer)
        recently = self.timing.election_minimum * self.replication.interval_ns
        return (
            progress is not None
            and progress.match_height + LEARNER_LAG >= self.voter.ledger.certified
            and progress.holds
            and self.replication.heard_within(peer, recently, now)
        )

    # Between election and replication

    def _elected(self, votes: tuple[Vote, ...], now: int) -> None:
        self._awaited = ((), 0)
        for trial in self._trials.values():
            trial.until = NEVER  # a learner's time did not run while nobody fed it
        self.replication.open_term(votes, now)

    def _behind(self, peer: str, now: int) -> None:
        self.catch_up.ask(peer, now)
