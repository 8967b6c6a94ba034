"""What a peer works at once the agreement stands: the interface between `Peer` and the rounds.

`rounds/rounds.py` is the work of a run. Another work in its place (rounds that cost nothing) shows the agreement alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from p2pcoord.consensus.record import Record, Round
from p2pcoord.effects import Outcome
from p2pcoord.wire import Message


class LocalProgress(msgspec.Struct, frozen=True):
    """How far this peer is: what it gossips of its work."""

    version: int
    """The newest certified one."""
    holds_state: bool
    queue_length: int
    """Assignments that the present plan gives to it."""
    steps: int
    """Optimizer steps made so far, in earlier lives too."""
    loss: float | None
    """Of its last training, as is `gradient_norm`; None before the first."""
    gradient_norm: float | None


class Work(Protocol):
    """Makes rounds while this peer coordinates, and judges those of others."""

    # Inputs

    def receive(self, sender: str, message: Message, now: int) -> bool:
        """Handles a message of the work; False when it is none. Raises RemoteError."""
        ...

    def complete(self, effect_id: int, outcome: Outcome, now: int) -> None: ...
    def progress(self, now: int) -> None: ...
    def connected(self, peer: str, now: int) -> None: ...
    def tick(self, now: int) -> None: ...
    def next_deadline(self) -> int: ...

    # Records

    def check(self, record: Record, body: Round, now: int) -> str | None:
        """Whether a voter may append this round: "" when it may, None to wait, else why not."""
        ...

    def certified(self, records: Sequence[Record], now: int) -> None: ...

    # Reading

    @property
    def idle(self) -> bool:
        """Nothing is lost by handing the duty over now."""
        ...

    @property
    def reconfigurable(self) -> bool:
        """Records other than rounds may be ordered now."""
        ...

    @property
    def holds_state(self) -> bool:
        """Whether this peer has the bytes of the newest certified state: only then it may vote."""
        ...

    def local_progress(self) -> LocalProgress | None:
        """What to gossip of this peer's work; None when there is nothing to tell."""
        ...

    def frames(self) -> Sequence[msgspec.Struct]:
        """What of the log is the work's own, and stays when the log is compacted."""
        ...
