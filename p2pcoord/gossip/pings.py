"""Pings under way: the four messages of probing, and which answer belongs to which question.

Theory of operation
    A ping asks whether its receiver is there; an ack says so. A ping request asks a helper to ping somebody else: it relays
    the ack, or sends a nack that says "I am here, it did not answer me". Sequence numbers pair answers with questions, our
    own (probes) and those asked on behalf of others (relays). An answer counts only from whom it was expected.
"""

from __future__ import annotations

import msgspec

from p2pcoord.gossip.rumors import Rumor
from p2pcoord.gossip.suspicion import Output

MAX_RELAYS = 64
"""Pings on behalf of others at one time. On average it is less than one."""

MAX_PROBES = 16
"""Probes out of turn (hints of closed connections) at one time; the rest waits for its turn."""


class Carrier(Output, frozen=True):
    """A message to `to`, with rumors; the newest signed records of `records_of` go along with it.

    `sequence` pairs answers with their questions. `incarnation` is ours.
    """

    to: str
    sequence: int
    incarnation: int
    rumors: tuple[Rumor, ...]
    records_of: tuple[str, ...]


class SendPing(Carrier, frozen=True):
    """Are you there?"""


class SendPingRequest(Carrier, frozen=True):
    """Ping `target` for me."""

    target: str


class SendAck(Carrier, frozen=True):
    """`subject` is there: the sender itself, or the target of a ping request."""

    subject: str


class SendNack(Carrier, frozen=True):
    """I am there, but `subject` has not answered me."""

    subject: str


class Probe:
    """A member being probed: directly until `helpers` are asked. `expects_verdict` is false for extra pings of the dead
    and suspect: their answer is news, its absence is not."""

    __slots__ = ("expects_verdict", "helpers", "nacks", "started", "target", "verdict_at")

    def __init__(self, target: str, started: int, verdict_at: int, expects_verdict: bool) -> None:
        self.target = target
        self.started = started
        self.verdict_at = verdict_at
        self.expects_verdict = expects_verdict
        self.helpers: tuple[str, ...] = ()
        self.nacks: dict[str, None] = {}


class Relay(msgspec.Struct, frozen=True):
    """A ping on behalf of `requester`, to be answered under its sequence number."""

    requester: str
    sequence: int
    target: str


class Pings:
    """`probes` and `relays` by our sequence numbers; `probed`: target -> sequence of its open probe."""

    def __init__(self) -> None:
        self.probes: dict[int, Probe] = {}
        self.probed: dict[str, int] = {}
        self.relays: dict[int, Relay] = {}
        self._sequence = 0

    @property
    def busy(self) -> bool:
        """Whether there is no room for a probe out of turn."""
        return len(self.probes) >= MAX_PROBES

    def open_probe(self, target: str, now: int, verdict_at: int, *, expects_verdict: bool) -> int:
        """Its sequence number. There is no other open probe of this target."""
        self._sequence += 1
        self.probes[self._sequence] = Probe(target, now, verdict_at, expects_verdict)
        self.probed[target] = self._sequence
        return self._sequence

    def end_probe(self, target: str) -> None:
        """Nothing more is expected of this target."""
        sequence = self.probed.pop(target, None)
        if sequence is not None:
            del self.probes[sequence]

    def open_relay(self, requester: str, sequence: int, target: str) -> int | None:
        """Our sequence number for a ping on behalf of `requester`; None when there are too many."""
        if len(self.relays) >= MAX_RELAYS:
            return None
        self._sequence += 1
        self.relays[self._sequence] = Relay(requester, sequence, target)
        return self._sequence

    def acked(self, sender: str, sequence: int, subject: str) -> Probe | Relay | None:
        """What an ack ends; None for one that nobody waits for. A probe may be answered by its helpers, too."""
        relay = self.relays.get(sequence)
        if relay is not None and relay.target == sender == subject:
            return self.relays.pop(sequence)
        probe = self.probes.get(sequence)
        if probe is None or probe.target != subject or (sender != subject and sender not in probe.helpers):
            return None
        self.end_probe(subject)
        return probe

    def nacked(self, sender: str, sequence: int, subject: str) -> None:
        """A helper is there, and its target did not answer it."""
        probe = self.probes.get(sequence)
        if probe is not None and probe.target == subject and sender in probe.helpers:
            probe.nacks[sender] = None

    def clear(self) -> None:
        """Nothing that is under way is waited for any more."""
        self.probes.clear()
        self.probed.clear()
        self.relays.clear()
