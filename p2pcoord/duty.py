"""The coordinator's duty besides the rounds: members first, then the committee, then the duty itself.

Each waits for the certificate of the record before. It is looked at a few times a second, at once when something waits, and
between any two rounds.
"""

from __future__ import annotations

from p2pcoord.consensus.agreement import Agreement
from p2pcoord.effects import NEVER
from p2pcoord.neighbours import Neighbours
from p2pcoord.rounds.admissions import Admissions
from p2pcoord.rounds.setting import Interruptible

# The coordinator looks at its committee this often; a change takes two certificates anyway.
TEND_INTERVAL_NS = 500_000_000

# While it waits for learners it looks more often: one that has all is ready for a moment only, until the next record.
LEARNING_INTERVAL_NS = 50_000_000


class Duty:
    """Of a peer that coordinates; of others it does nothing. `rotation_rounds`: rounds in a term, 0 for any number."""

    def __init__(
        self, agreement: Agreement, admissions: Admissions, neighbours: Neighbours, rotation_rounds: int
    ) -> None:
        self._agreement = agreement
        self._admissions = admissions
        self._neighbours = neighbours
        self._rotation_rounds = rotation_rounds
        self._tend_at = NEVER

    def begin(self, now: int) -> None:
        """A life begins, or records were certified: look anew."""
        self._tend_at = now

    def hasten(self, now: int) -> None:
        """Something waits for the coordinator's care."""
        self._tend_at = min(self._tend_at, now)

    def next_deadline(self) -> int:
        return self._tend_at if self._agreement.replication.opened else NEVER

    def tick(self, work: Interruptible, now: int) -> None:
        if now < self.next_deadline():
            return
        self._tend(work, now)
        learning = bool(self._agreement.replication.learners)
        self._tend_at = now + (LEARNING_INTERVAL_NS if learning else TEND_INTERVAL_NS)

    def between_rounds(self, rounds: Interruptible, now: int) -> bool:
        """Whoever waits between rounds has its turn; False when no round may begin after it: whoever leaves hands over first,
        and a learner cannot catch up with rounds that follow each other faster than its answers."""
        self._tend(rounds, now)
        return not self._admissions.leaving

    def _tend(self, work: Interruptible, now: int) -> None:
        agreement = self._agreement
        if not work.reconfigurable:
            return
        pending = self._admissions.pending()
        if pending is not None and agreement.voter.ledger.certified == agreement.voter.ledger.height:
            agreement.propose(pending)
            return
        gone = self._admissions.gone()
        candidates = self._neighbours.voter_candidates({*agreement.committee.everyone, *gone})
        agreement.tend_committee(candidates, gone, now)
        due = self._rotation_rounds > 0 and agreement.made_in_term(self._rotation_rounds)
        if work.idle and (due or self._admissions.leaving):
            agreement.rotate(now)
