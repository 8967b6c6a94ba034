"""Work without training: rounds that cost nothing, so that a world shows the agreement alone.

While its peer coordinates and has opened its term, it proposes a round at an interval: version after version, the state of
each derived by hash from its parent and its contributors, who are drawn from the members. Voters check what a voter of a
real round would: parent and version in their own log, contributors, and that no assignment counts twice. Sometimes the
bytes are "not here yet": the check waits, and is tried again.

Assignments that a round left out are offered again in the next one, as members re-offer what they trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from random import Random

import msgspec

from p2pcoord.consensus.record import Counted, Record, Round
from p2pcoord.effects import NEVER, Outcome
from p2pcoord.peer import Peer
from p2pcoord.wire import Message

MILLISECOND = 1_000_000
STATE_BYTES = 4096


class WorkSettings(msgspec.Struct, frozen=True):
    interval_ns: int = 300 * MILLISECOND
    """Between two rounds."""
    missing: float = 0.1
    """Share of checks that find the bytes missing at first."""
    arrival_ns: int = 60 * MILLISECOND
    """After how long they are there."""


STEADY = WorkSettings()


class Situation(msgspec.Struct, frozen=True):
    """What a world gives to the work of one peer."""

    random: Random
    open: Callable[[], bool]
    """Whether new rounds are wanted."""


def state_of(parent: bytes, version: int, attempt: bytes, contributors: Iterable[Counted]) -> bytes:
    """The state that these contributions make of `parent`."""
    digest = sha256(parent + version.to_bytes(8, "big") + attempt)
    for counted in contributors:
        digest.update(f"{counted.contributor} {counted.origin_round} {counted.assignment}".encode())
    return digest.digest()


class SteadyWork:
    """work.Work for one peer."""

    def __init__(self, peer: Peer, situation: Situation, settings: WorkSettings = STEADY) -> None:
        self._peer = peer
        self._situation = situation
        self._settings = settings
        self._counted: set[tuple[int, int]] = set()
        self._propose_at = 0
        self._arrivals: dict[bytes, int] = {}
        """State -> when its bytes are here (0: they are)."""

    # work.Work

    def check(self, record: Record, body: Round, now: int) -> str | None:
        version, state = self._last_in_log(record.header.height)
        if (body.version, body.parent) != (version + 1, state):
            return f"version {body.version} does not follow version {version} of this log"
        slots = [(counted.origin_round, counted.assignment) for counted in body.contributors]
        if len(set(slots)) != len(slots) or self._counted.intersection(slots):
            return "an assignment counts twice"
        for counted in body.contributors:
            if not self._peer.roster.is_member(counted.contributor):
                return f"{counted.contributor} is no member"
        if body.state != state_of(body.parent, body.version, body.attempt, body.contributors):
            return "another state comes out here"
        return "" if self._here(body.state, now) else None

    def certified(self, records: Sequence[Record], now: int) -> None:
        self._propose_at = max(
            self._propose_at, now
        )  # a coordinator begins with its opening, not in the past
        for record in records:
            body = record.body
            if isinstance(body, Round):
                self._counted.update((c.origin_round, c.assignment) for c in body.contributors)
                self._arrivals.pop(body.state, None)
                self._propose_at = now + self._settings.interval_ns

    def receive(self, sender: str, message: Message, now: int) -> bool:
        return False

    def complete(self, effect_id: int, outcome: Outcome, now: int) -> None:
        pass

    def progress(self, now: int) -> None:
        pass

    def connected(self, peer: str, now: int) -> None:
        pass

    def tick(self, now: int) -> None:
        if any(0 < at <= now for at in self._arrivals.values()):
            self._arrivals = {state: 0 if at <= now else at for state, at in self._arrivals.items()}
            self._peer.agreement.following.retry(now)
        if self._leads and now >= self._propose_at:
            self._propose_at = now + self._settings.interval_ns
            ledger = self._peer.agreement.voter.ledger
            if ledger.certified == ledger.height and self._situation.open():
                self._peer.agreement.propose(self._next_round())

    def next_deadline(self) -> int:
        arrival = min((at for at in self._arrivals.values() if at), default=NEVER)
        return min(arrival, self._propose_at) if self._leads else arrival

    @property
    def idle(self) -> bool:
        ledger = self._peer.agreement.voter.ledger
        return ledger.certified == ledger.height

    @property
    def reconfigurable(self) -> bool:
        return self.idle

    @property
    def holds_state(self) -> bool:
        return True

    def local_progress(self) -> None:
        return None

    def frames(self) -> Sequence[msgspec.Struct]:
        return ()

    # Making

    @property
    def _leads(self) -> bool:
        return self._peer.agreement.replication.opened

    def _next_round(self) -> Round:
        random = self._situation.random
        version, parent = self._last_in_log(self._peer.agreement.voter.ledger.height + 1)
        members = self._peer.roster.members
        contributors = [
            Counted(index, member, version + 1, 1 / len(members))
            for index, member in enumerate(members)
            if random.random() < 0.8
        ]
        late = [
            Counted(index, member, version, 1 / len(members))
            for index, member in enumerate(members)
            if version > 0 and (version, index) not in self._counted and random.random() < 0.5
        ]
        chosen = tuple(late + contributors)
        attempt = random.randbytes(32)
        state = state_of(parent, version + 1, attempt, chosen)
        return Round(version + 1, parent, attempt, chosen, random.randbytes(32), state, STATE_BYTES)

    def _last_in_log(self, height: int) -> tuple[int, bytes]:
        """Version and state of the newest round below `height` in this log, certified or not."""
        for record in reversed(self._peer.agreement.voter.ledger.records[:height]):
            if isinstance(record.body, Round):
                return record.body.version, record.body.state
        return 0, b""

    def _here(self, state: bytes, now: int) -> bool:
        if state not in self._arrivals:
            missing = self._situation.random.random() < self._settings.missing
            self._arrivals[state] = now + self._settings.arrival_ns if missing else 0
        return self._arrivals[state] == 0
