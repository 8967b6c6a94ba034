"""Probing: who answers, found out by everybody about everybody at a constant cost each.

Theory of operation
    SWIM (Das, Gupta, Motivala 2002) with Lifeguard (Dadgar, Phillips, Currey 2018), as in memberlist. Each period one
    member is probed, in a shuffled round-robin, so each is probed once a period on average whatever the size of the run,
    and everybody gets to everybody within two rounds:

        ping the member                             an ack in time ends the probe
        no ack after ping_timeout                   ask k others to ping it (ping request); they relay the ack, or send
                                                    a nack that says "I am here, it did not answer me"
        no ack by the end of the period             suspect it
        suspicion neither refuted nor withdrawn     dead

    A leaf (nobody can dial it) that is not linked to us is pinged by members that it names.

    State    Event                                                            Next     Output
    alive    our probe failed; a suspicion or death heard from another        suspect  Suspect
    suspect  an ack (direct or relayed) of a ping sent after it began         alive    Alive
    suspect  a higher incarnation (from itself, or in its signed record)      alive    Alive
    suspect  the suspicion's time is over, and it did not answer us either    dead     Dead
    dead     a higher incarnation; a direct ack                               alive    Alive

    Only a round trip or a higher incarnation clears a suspicion: that it speaks is not enough, a peer that sends and
    cannot receive takes no part. Who hears itself suspected raises its incarnation (RaiseIncarnation); its newly signed
    record is the refutation, and travels with our messages (`records_of`).

    Suspicion's time is long for one accuser and falls to its minimum as independent ones confirm (Lifeguard). A death
    that others report shortens it likewise, and no more. Rumors are not signed, so nobody dies of what others say: who
    has not failed a probe of ours gets one when its time is over (SWIM would believe the rumor). Who hears nobody at all
    slows down and accuses later (the local health multiplier): mostly the fault is its own.

    Rumors (suspect, dead) ride on the messages above, each lambda * log(n) times, the least sent first; a suspect always
    hears first what is said of it. The dead are pinged now and then, or two healed halves would never meet.

    If a tick is over 500 ms late, this process slept: open probes say nothing, suspicions last longer by the gap, and
    nobody is declared dead in that tick.
"""

from __future__ import annotations

import enum
import heapq
import math
import random
from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec

from p2pcoord.errors import LocalError
from p2pcoord.gossip.version_vector import MAX_COUNTER, PeerId

SECOND_NS = 1_000_000_000

MAX_RUMORS = 8
"""Rumors in one message: about 1 KiB. A burst of deaths takes a few more messages."""

MAX_RECORDS = 2
"""Signed records (refutations) that travel with one message, and as many again in answer to outdated rumors: about 1.5 KiB
each."""

MAX_BROADCASTS = 1024
"""Rumors waiting to be sent on. Beyond it (half of a large run dies) the most sent goes; probing finds what is lost."""

MAX_HEARD = 32
"""Rumors remembered for each member, so that none is taken in or sent on twice."""

MAX_RELAYS = 64
"""Pings on behalf of others at one time. On average it is less than one."""

MAX_PROBES = 16
"""Probes out of turn (hints of closed connections) at one time; the rest waits for its turn."""

MAX_MEMBERS = 16_384

GAP_NS = SECOND_NS // 2
"""A tick later than this means that the process slept (a suspended laptop, SIGSTOP)."""

NACK_SHARE = 0.8
"""A helper gives up at this share of the ping timeout, so that its nack arrives before the verdict (memberlist: 0.8)."""


class State(enum.Enum):
    """What the prober holds of a member."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"


class Rumor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`origin` says that `peer` in `incarnation` did not answer (dead=False), or that it died of that (dead=True)."""

    peer: PeerId
    incarnation: Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNTER)]
    origin: PeerId
    dead: bool


class ProbeSettings(msgspec.Struct, frozen=True):
    """Times and counts; memberlist's LAN defaults unless said otherwise.

    `period_ns` 1 s, `ping_timeout_ns` 0.5 s: longer than a round trip anywhere with a garbage collection in it.
    `helpers`: k, 3. `suspicion_multiplier`: 5 (LAN 4, WAN 6): the least time of a suspicion is this * log10(n) periods,
    and our rumors ride only on probes, so a refutation needs a little more than a LAN's.
    `suspicion_max_multiplier`: a lone accuser waits 6 times as long. `confirmations`: independent accusers that bring it
    down to the least, 3 (memberlist: multiplier - 2). `retransmit_multiplier`: lambda, 4. `max_health`: the local health
    multiplier slows probing down at most 8 times. `dead_period_ns`: one of the dead is pinged this often; 4 s
    brings two halves together again well within 30 s.
    """

    period_ns: int = SECOND_NS
    ping_timeout_ns: int = SECOND_NS // 2
    helpers: int = 3
    suspicion_multiplier: int = 5
    suspicion_max_multiplier: int = 6
    confirmations: int = 3
    retransmit_multiplier: int = 4
    max_health: int = 8
    dead_period_ns: int = 4 * SECOND_NS


class Output(msgspec.Struct, frozen=True):
    """Base of what a Prober asks for and tells."""


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


class Suspect(Output, frozen=True):
    """A member did not answer `origin` (perhaps ourselves)."""

    peer: str
    incarnation: int
    origin: str


class Alive(Output, frozen=True):
    """A suspect or dead member lives."""

    peer: str
    incarnation: int


class Dead(Output, frozen=True):
    """A suspicion was not refuted."""

    peer: str
    incarnation: int


class RaiseIncarnation(Output, frozen=True):
    """We are suspected: our incarnation is now this. Make it durable and sign our record anew under it before the
    outputs that follow leave."""

    incarnation: int


class _Suspicion:
    """Why a member is suspect, and until when."""

    __slots__ = ("asked", "began", "confirmed", "deadline", "least_ns", "most_ns", "origins")

    def __init__(self, now: int, least_ns: int, most_ns: int) -> None:
        self.began = now
        self.least_ns = least_ns
        self.most_ns = most_ns
        self.origins: dict[str, None] = {}
        self.confirmed = False  # another declared it dead
        self.asked = False  # its time is over and our own last probe is under way
        self.deadline = now + most_ns


class _Member:
    __slots__ = ("heard", "incarnation", "links", "peer", "state", "suspicion")

    def __init__(self, peer: str, incarnation: int, links: tuple[str, ...]) -> None:
        self.peer = peer
        self.incarnation = incarnation
        self.links = links
        self.state = State.ALIVE
        self.suspicion: _Suspicion | None = None
        self.heard: dict[Rumor, None] = {}


class _Probe:
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


class _Relay(msgspec.Struct, frozen=True):
    """A ping on behalf of `requester`, to be answered under its sequence number."""

    requester: str
    sequence: int
    target: str


class _Broadcast:
    __slots__ = ("added", "rumor", "sent", "subject")

    def __init__(self, subject: str, rumor: Rumor | None) -> None:
        self.subject = subject
        self.rumor = rumor  # None: the subject's signed record
        self.added = 0
        self.sent = 0


class _Timer(enum.IntEnum):
    PERIOD = 0  # begin the next probe
    DEAD_PERIOD = 1  # ping one of the dead
    INDIRECT = 2  # no ack yet: ask the helpers
    VERDICT = 3  # no ack at all
    RELAY = 4  # no ack for who asked us
    SUSPICION = 5  # not refuted


class Prober:
    """One peer's probing of all others. Every method returns what is to be sent and what was found out, in order."""

    def __init__(
        self, own: str, incarnation: int, rng: random.Random, now: int, settings: ProbeSettings | None = None
    ) -> None:
        self._own = own
        self._incarnation = incarnation
        self._rng = rng
        self._settings = settings or ProbeSettings()
        self._members: dict[str, _Member] = {}
        self._dead_count = 0
        self._round: list[str] = []  # the members in this round's order; the gone are skipped
        self._refuted_ahead: dict[Rumor, None] = {}
        self._place = 0
        self._dead_place = 0
        self._health = 0
        self._sequence = 0
        self._probes: dict[int, _Probe] = {}
        self._probed: dict[str, int] = {}  # target -> sequence of its open probe
        self._relays: dict[int, _Relay] = {}
        self._broadcasts: dict[Rumor | str, _Broadcast] = {}  # a rumor, or whose record
        self._broadcast_count = 0
        self._timers: list[tuple[int, int, _Timer, str]] = []
        self._timer_count = 0
        self._period_at = self._dead_at = now
        self._restart(now)

    # Who there is ----------------------------------------------------------------------------------------------------

    @property
    def incarnation(self) -> int:
        return self._incarnation

    @property
    def health(self) -> int:
        """The local health multiplier less 1: 0 is well; each step makes probes slower by one base period."""
        return self._health

    def state(self, peer: str) -> State | None:
        """What is held of a member; None for who is no member."""
        member = self._members.get(peer)
        return member.state if member else None

    def add_member(self, peer: str, incarnation: int, links: Iterable[str], now: int) -> None:
        """Probe this peer from now on. `links`: only for a leaf, the members it stays connected to.

        For a member already here only the links are taken over; its incarnation comes by `alive`.
        Raises LocalError beyond MAX_MEMBERS.
        """
        if peer == self._own:
            return
        member = self._members.get(peer)
        if member is not None:
            member.links = tuple(links)
            return
        if len(self._members) >= MAX_MEMBERS:
            raise LocalError(f"more than {MAX_MEMBERS} members")
        if not self._members:
            self._restart(now)  # with nobody to probe nothing was due, so nothing is late
        self._members[peer] = _Member(peer, incarnation, tuple(links))
        # At a random place of this round, so that peers which learn of it together do not probe it together.
        self._round.insert(self._rng.randrange(self._place, len(self._round) + 1), peer)

    def remove_member(self, peer: str) -> None:
        """Probe this peer no more (it left, or was removed); whatever is rumored of it is ignored."""
        member = self._members.pop(peer, None)
        if member is None:
            return
        if member.state is State.DEAD:
            self._dead_count -= 1
        self._end_probe(peer)
        self._drop_broadcasts(peer)

    def raise_incarnation(self, incarnation: int) -> None:
        """Our incarnation was raised elsewhere (RecordBook's IncarnationRaised); our record goes along from now on."""
        if incarnation > self._incarnation:
            self._incarnation = incarnation
            self._spread_record(self._own)

    def alive(self, peer: str, incarnation: int, now: int) -> list[Output]:
        """A member's own word that it lives in `incarnation`: its signed record. News only above the one known."""
        member = self._members.get(peer)
        if member is None or incarnation <= member.incarnation:
            return []
        member.incarnation = incarnation
        if member.state is State.ALIVE:
            return []
        was_dead = member.state is State.DEAD
        self._spread_record(peer)
        outputs = self._revive(member)
        # Accusations of this very incarnation that came before it hold; those of the ones before are refuted.
        later = [rumor for rumor in member.heard if rumor.incarnation >= incarnation]
        member.heard = {rumor: None for rumor in later if rumor.incarnation > incarnation}
        for rumor in later:
            if rumor.incarnation == incarnation:
                outputs += self._receive_rumor(rumor, now)
        # The refutation may be older than the death that it arrives after: ask.
        if was_dead and len(self._probes) < MAX_PROBES:
            outputs += self._probe(member, now)
        return outputs

    def connection_closed(self, peer: str, now: int) -> list[Output]:
        """A hint that the peer may be gone: it is probed now, out of turn."""
        member = self._members.get(peer)
        if member is None or member.state is not State.ALIVE or len(self._probes) >= MAX_PROBES:
            return []
        return self._probe(member, now)

    def connection_opened(self, peer: str, now: int) -> list[Output]:
        """A hint that a suspect or dead peer lives: it is pinged now, and so hears what is said of it."""
        member = self._members.get(peer)
        if member is None or member.state is State.ALIVE or len(self._probes) >= MAX_PROBES:
            return []
        return self._ping(member, now, now + self._settings.period_ns)

    # Messages --------------------------------------------------------------------------------------------------------

    def receive_ping(
        self, sender: str, sequence: int, incarnation: int, rumors: Sequence[Rumor], now: int
    ) -> list[Output]:
        """A ping: answered with an ack, whoever sent it."""
        outputs = self._hear(sender, incarnation, rumors, now)
        return [*outputs, SendAck(*self._answer(sender, sequence, rumors), subject=self._own)]

    def receive_ping_request(
        self, sender: str, sequence: int, incarnation: int, target: str, rumors: Sequence[Rumor], now: int
    ) -> list[Output]:
        """Ping a member for another one. For who is no member here the answer is a nack."""
        outputs = self._hear(sender, incarnation, rumors, now)
        if target == self._own:
            return [*outputs, SendAck(*self._carry(sender, sequence), subject=self._own)]
        if target not in self._members or sender not in self._members or len(self._relays) >= MAX_RELAYS:
            return [*outputs, SendNack(*self._carry(sender, sequence), subject=target)]
        self._sequence += 1
        self._relays[self._sequence] = _Relay(sender, sequence, target)
        patience = int(self._settings.ping_timeout_ns * NACK_SHARE)
        self._set(now + patience, _Timer.RELAY, str(self._sequence))
        return [*outputs, SendPing(*self._carry(target, self._sequence))]

    def receive_ack(
        self, sender: str, sequence: int, incarnation: int, subject: str, rumors: Sequence[Rumor], now: int
    ) -> list[Output]:
        """An ack, direct or relayed. One that nobody waits for changes nothing (but what its rumors say)."""
        outputs = self._hear(sender, incarnation, rumors, now)
        relay = self._relays.get(sequence)
        if relay is not None and relay.target == sender == subject:
            del self._relays[sequence]
            outputs.append(SendAck(*self._carry(relay.requester, relay.sequence), subject=sender))
            return outputs
        probe = self._probes.get(sequence)
        if probe is None or probe.target != subject or (sender != subject and sender not in probe.helpers):
            return outputs
        self._end_probe(subject)
        member = self._members[subject]
        if probe.expects_verdict:
            self._health = max(0, self._health - 1)
        # (The dead are pinged without helpers, so nobody's word but their own raises them.)
        began = member.suspicion.began if member.suspicion else 0
        if member.state is not State.ALIVE and probe.started >= began:
            member.heard.clear()  # whoever accuses it again is to be heard
            outputs += self._revive(member)
        return outputs

    def receive_nack(
        self, sender: str, sequence: int, incarnation: int, subject: str, rumors: Sequence[Rumor], now: int
    ) -> list[Output]:
        """A helper is there and the target did not answer it: the fault is not ours."""
        outputs = self._hear(sender, incarnation, rumors, now)
        probe = self._probes.get(sequence)
        if probe is not None and probe.target == subject and sender in probe.helpers:
            probe.nacks[sender] = None
        return outputs

    def gossip(self, to: str) -> tuple[tuple[Rumor, ...], tuple[str, ...]]:
        """Rumors, and peers whose records should go along, for any other message to `to`; counted as sent."""
        chosen = self._choose_broadcasts(to)
        rumors = [item.rumor for item in chosen if item.rumor is not None]
        member = self._members.get(to)
        if member is not None and member.state is not State.ALIVE:
            # Lifeguard's buddy system: tell it, so that it can refute. It cannot be told too often.
            told = Rumor(to, member.incarnation, self._own, member.state is State.DEAD)
            rumors = [told, *(rumor for rumor in rumors if rumor != told)][:MAX_RUMORS]
        return tuple(rumors), tuple(item.subject for item in chosen if item.rumor is None)

    def receive_rumors(self, rumors: Sequence[Rumor], now: int) -> list[Output]:
        """Rumors that came with any other message."""
        outputs: list[Output] = []
        for rumor in rumors[:MAX_RUMORS]:
            # Accusers are other members: nobody may accuse in our name, or multiply by inventing names.
            if rumor.origin in self._members and rumor.origin != rumor.peer:
                outputs += self._receive_rumor(rumor, now)
        return outputs

    # Time ------------------------------------------------------------------------------------------------------------

    def next_deadline(self) -> int | None:
        """When `tick` is due; None while there is nobody to probe."""
        while self._timers and not self._is_set(self._timers[0]):
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._members and self._timers else None

    def tick(self, now: int) -> list[Output]:
        """Do what is due. A tick over 500 ms late is a gap: it declares nobody dead."""
        due = self.next_deadline()
        if due is None:
            return []
        if now - due > GAP_NS:
            self.gap(now)
            return []
        outputs: list[Output] = []
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)
            if self._is_set(timer):
                outputs += self._fire(timer, now)
        return outputs

    def gap(self, now: int) -> None:
        """This process slept until now. Its peers may have answered; nothing follows from silence."""
        due = self.next_deadline()
        if due is None or now <= due:
            return
        self._probes.clear()
        self._probed.clear()
        self._relays.clear()
        self._worsen(1)
        self._restart(now)
        for member in self._members.values():
            suspicion = member.suspicion
            if suspicion is not None:
                # Refutations were missed too: everybody gets the least time anew.
                suspicion.deadline = max(suspicion.deadline + now - due, now + suspicion.least_ns)
                suspicion.began += now - due
                suspicion.asked = False
                self._set(suspicion.deadline, _Timer.SUSPICION, member.peer)

    def _restart(self, now: int) -> None:
        self._timers.clear()
        self._period_at = now + self._rng.randrange(self._settings.period_ns)
        self._dead_at = now + self._rng.randrange(self._settings.dead_period_ns)
        self._set(self._period_at, _Timer.PERIOD)
        self._set(self._dead_at, _Timer.DEAD_PERIOD)

    def _set(self, at: int, kind: _Timer, key: str = "") -> None:
        self._timer_count += 1
        heapq.heappush(self._timers, (at, self._timer_count, kind, key))

    def _is_set(self, timer: tuple[int, int, _Timer, str]) -> bool:
        """Timers are never taken back; one that no longer says what its subject says is skipped."""
        at, _, kind, key = timer
        if kind is _Timer.PERIOD:
            return at == self._period_at
        if kind is _Timer.DEAD_PERIOD:
            return at == self._dead_at
        if kind is _Timer.RELAY:
            return int(key) in self._relays
        if kind is _Timer.SUSPICION:
            member = self._members.get(key)
            return member is not None and member.suspicion is not None and member.suspicion.deadline == at
        return int(key) in self._probes

    def _fire(self, timer: tuple[int, int, _Timer, str], now: int) -> list[Output]:
        _, _, kind, key = timer
        if kind is _Timer.PERIOD:
            self._period_at = now + self._scaled(self._settings.period_ns)
            self._set(self._period_at, _Timer.PERIOD)
            member = self._next_member()
            return self._probe(member, now) if member else []
        if kind is _Timer.DEAD_PERIOD:
            self._dead_at = now + self._settings.dead_period_ns
            self._set(self._dead_at, _Timer.DEAD_PERIOD)
            return self._ping_dead(now)
        if kind is _Timer.INDIRECT:
            return self._ask_helpers(int(key), now)
        if kind is _Timer.VERDICT:
            return self._judge(int(key), now)
        if kind is _Timer.RELAY:
            relay = self._relays.pop(int(key))
            return [SendNack(*self._carry(relay.requester, relay.sequence), subject=relay.target)]
        return self._condemn(self._members[key], now)

    def _scaled(self, duration_ns: int) -> int:
        return duration_ns * (1 + self._health)

    def _worsen(self, steps: int) -> None:
        self._health = min(self._settings.max_health, self._health + steps)

    # Probes ----------------------------------------------------------------------------------------------------------

    def _next_member(self) -> _Member | None:
        """The next in this round who is not dead; at its end the members are shuffled anew."""
        for _ in range(2):
            while self._place < len(self._round):
                member = self._members.get(self._round[self._place])
                self._place += 1
                if member is not None and member.state is not State.DEAD and member.peer not in self._probed:
                    return member
            self._round = list(self._members)
            self._rng.shuffle(self._round)
            self._place = 0
        return None

    def _probe(self, member: _Member, now: int) -> list[Output]:
        if member.peer in self._probed:
            return []
        verdict_at = now + self._scaled(self._settings.period_ns)
        sequence = self._open_probe(member, now, verdict_at, expects_verdict=True)
        if member.links and self._own not in member.links:
            return self._ask_helpers(sequence, now)
        self._set(now + self._scaled(self._settings.ping_timeout_ns), _Timer.INDIRECT, str(sequence))
        return [SendPing(*self._carry(member.peer, sequence))]

    def _open_probe(self, member: _Member, now: int, verdict_at: int, expects_verdict: bool) -> int:
        self._sequence += 1
        self._probes[self._sequence] = _Probe(member.peer, now, verdict_at, expects_verdict)
        self._probed[member.peer] = self._sequence
        self._set(verdict_at, _Timer.VERDICT, str(self._sequence))
        return self._sequence

    def _end_probe(self, peer: str) -> None:
        sequence = self._probed.pop(peer, None)
        if sequence is not None:
            del self._probes[sequence]

    def _ping_dead(self, now: int) -> list[Output]:
        if not self._dead_count:
            return []
        dead = [member for member in self._members.values() if member.state is State.DEAD]
        self._dead_place = (self._dead_place + 1) % len(dead)
        member = dead[self._dead_place]
        return self._ping(member, now, now + self._settings.dead_period_ns)

    def _ping(self, member: _Member, now: int, until: int) -> list[Output]:
        """Ping who is suspect or dead already: an answer changes that, silence changes nothing."""
        if member.peer in self._probed:
            return []
        sequence = self._open_probe(member, now, until, expects_verdict=False)
        return [SendPing(*self._carry(member.peer, sequence))]

    def _ask_helpers(self, sequence: int, now: int) -> list[Output]:
        probe = self._probes[sequence]
        member = self._members[probe.target]
        probe.helpers = self._helpers(member)
        return [
            SendPingRequest(*self._carry(helper, sequence), target=probe.target) for helper in probe.helpers
        ]

    def _helpers(self, target: _Member) -> tuple[str, ...]:
        """k living members that can ping the target: those a leaf names, else any but leaves."""
        count = self._settings.helpers
        if target.links:
            named = [peer for peer in target.links if self.state(peer) in (State.ALIVE, State.SUSPECT)]
            return tuple(self._rng.sample(named, min(count, len(named))))
        chosen: dict[str, None] = {}
        # Drawn by place: a list of all who qualify would cost a pass over the run. In small runs all are tried.
        size = len(self._round)
        for place in self._rng.sample(range(size), min(size, max(32, 8 * count))):
            member = self._members.get(self._round[place])
            if member is None or member is target or member.links or member.state is not State.ALIVE:
                continue
            chosen[member.peer] = None
            if len(chosen) == count:
                break
        return tuple(chosen)

    def _judge(self, sequence: int, now: int) -> list[Output]:
        probe = self._probes[sequence]
        self._end_probe(probe.target)
        member = self._members[probe.target]
        if not probe.expects_verdict:
            return self._tell_suspect(member, now)
        # Lifeguard: if nobody at all was heard, the fault may be ours. (memberlist counts every missing nack; where a
        # tenth of the packets is lost, or half of the run is cut off, that slows all to a ninth just when it matters.)
        if not probe.nacks:
            self._worsen(1)
        if member.state is State.DEAD:
            return []
        outputs = self._receive_rumor(Rumor(member.peer, member.incarnation, self._own, False), now)
        return [*outputs, *self._tell_suspect(member, now)]

    def _tell_suspect(self, member: _Member, now: int) -> list[Output]:
        """Each period, tell a member that we accused ourselves: the sooner it knows, the sooner it refutes."""
        accused = member.suspicion is not None and self._own in member.suspicion.origins
        if not accused or len(self._probes) >= MAX_PROBES:
            return []
        return self._ping(member, now, now + self._settings.period_ns)

    # Suspicions ------------------------------------------------------------------------------------------------------

    def _hear(self, sender: str, incarnation: int, rumors: Sequence[Rumor], now: int) -> list[Output]:
        """What every message says: its sender's incarnation (the channel proves the sender), and rumors."""
        return [*self.alive(sender, incarnation, now), *self.receive_rumors(rumors, now)]

    def _receive_rumor(self, rumor: Rumor, now: int) -> list[Output]:
        if rumor.peer == self._own:
            return self._refute(rumor)
        member = self._members.get(rumor.peer)
        # An incarnation above the one known is no proof that it exists; as an accusation it counts all the same.
        if member is None or rumor.incarnation < member.incarnation:
            return []
        if rumor in member.heard and rumor.origin != self._own:
            return []
        if rumor not in member.heard and len(member.heard) >= MAX_HEARD:
            del member.heard[next(iter(member.heard))]
        member.heard[rumor] = None
        if member.state is State.DEAD:
            return []
        outputs: list[Output] = []
        if member.suspicion is None:
            member.state = State.SUSPECT
            member.suspicion = self._new_suspicion(now)
            self._drop_broadcasts(member.peer)
            outputs.append(Suspect(member.peer, member.incarnation, rumor.origin))
        suspicion = member.suspicion
        wanted = self._confirmations()
        # The first accuser and `wanted` more are passed on; whoever comes after them brings nothing.
        room = len(suspicion.origins) <= wanted or rumor.origin == self._own
        if rumor.origin not in suspicion.origins and room:
            suspicion.origins[rumor.origin] = None
            self._spread(rumor)
        elif rumor.dead and not suspicion.confirmed:
            self._spread(rumor)
        suspicion.confirmed = suspicion.confirmed or rumor.dead
        confirmations = wanted if suspicion.confirmed else len(suspicion.origins) - 1
        if suspicion.asked and self._own not in suspicion.origins:
            return outputs  # its answer to us decides
        # Never before now: what is overdue counts as slept through.
        suspicion.deadline = max(now, suspicion.began + _suspicion_ns(suspicion, confirmations, wanted))
        self._set(suspicion.deadline, _Timer.SUSPICION, member.peer)
        return outputs

    def _confirmations(self) -> int:
        """How many independent accusers are to be had: none in a run of two or three."""
        others = len(self._members) - self._dead_count - 1
        return self._settings.confirmations if others >= self._settings.confirmations else 0

    def _new_suspicion(self, now: int) -> _Suspicion:
        scale = max(1.0, math.log10(max(1, len(self._members) - self._dead_count + 1)))
        least_ns = int(self._settings.suspicion_multiplier * scale * self._settings.period_ns)
        return _Suspicion(now, least_ns, least_ns * self._settings.suspicion_max_multiplier)

    def _refute(self, rumor: Rumor) -> list[Output]:
        if rumor.incarnation < self._incarnation or rumor in self._refuted_ahead:
            return []  # refuted already
        if rumor.incarnation > self._incarnation:
            # An incarnation we never had: someone guessed ahead. It costs one step, however often it comes.
            self._refuted_ahead[rumor] = None
            if len(self._refuted_ahead) > MAX_HEARD:
                del self._refuted_ahead[next(iter(self._refuted_ahead))]
        if self._incarnation >= MAX_COUNTER:
            raise LocalError("incarnations are used up: this key cannot go on")
        self._incarnation += 1
        self._worsen(1)
        self._spread_record(self._own)
        return [RaiseIncarnation(self._incarnation)]

    def _revive(self, member: _Member) -> list[Output]:
        if member.state is State.DEAD:
            self._dead_count -= 1
        member.state = State.ALIVE
        member.suspicion = None
        self._drop_broadcasts(member.peer, rumors_only=True)
        return [Alive(member.peer, member.incarnation)]

    def _condemn(self, member: _Member, now: int) -> list[Output]:
        """A suspicion's time is over: it dies if it did not answer us either; else it is asked first."""
        suspicion = member.suspicion
        if suspicion is None:
            raise LocalError(f"{member.peer} is condemned without a suspicion")
        if self._own in suspicion.origins or suspicion.asked:
            return self._declare_dead(member)
        outputs = self._probe(member, now)  # none if one is open: its verdict is awaited too
        suspicion.asked = True
        suspicion.deadline = self._probes[self._probed[member.peer]].verdict_at + 1
        self._set(suspicion.deadline, _Timer.SUSPICION, member.peer)
        return outputs

    def _declare_dead(self, member: _Member) -> list[Output]:
        member.state = State.DEAD
        member.suspicion = None
        self._dead_count += 1
        self._end_probe(member.peer)
        self._drop_broadcasts(member.peer)
        self._spread(Rumor(member.peer, member.incarnation, self._own, True))
        return [Dead(member.peer, member.incarnation)]

    # Rumors ----------------------------------------------------------------------------------------------------------

    def _spread(self, rumor: Rumor) -> None:
        self._enqueue(rumor, _Broadcast(rumor.peer, rumor))

    def _spread_record(self, peer: str) -> None:
        self._drop_broadcasts(peer)
        self._enqueue(peer, _Broadcast(peer, None))

    def _enqueue(self, key: Rumor | str, broadcast: _Broadcast) -> None:
        if key not in self._broadcasts and len(self._broadcasts) >= MAX_BROADCASTS:
            most = max(self._broadcasts, key=lambda each: self._broadcasts[each].sent)
            del self._broadcasts[most]
        self._broadcast_count += 1
        broadcast.added = self._broadcast_count
        self._broadcasts[key] = broadcast

    def _drop_broadcasts(self, peer: str, *, rumors_only: bool = False) -> None:
        keys = [key for key, item in self._broadcasts.items() if item.subject == peer]
        for key in keys:
            if self._broadcasts[key].rumor is not None or not rumors_only:
                del self._broadcasts[key]

    def _choose_broadcasts(self, to: str) -> list[_Broadcast]:
        """The least sent first, the newest of those first; none is told what it said itself."""
        if not self._broadcasts:
            return []
        records = 0
        chosen: list[_Broadcast] = []
        limit = math.ceil(self._settings.retransmit_multiplier * math.log10(len(self._members) + 2))
        for key, item in sorted(self._broadcasts.items(), key=lambda pair: (pair[1].sent, -pair[1].added)):
            if to == (item.rumor.origin if item.rumor else item.subject):
                continue
            if item.rumor is None:
                if records == MAX_RECORDS:
                    continue
                records += 1
            item.sent += 1
            if item.sent >= limit:
                del self._broadcasts[key]
            chosen.append(item)
            if len(chosen) == MAX_RUMORS:
                break
        return chosen

    def _refuted(self, rumors: Sequence[Rumor]) -> tuple[str, ...]:
        """Of whom the sender of these rumors has missed a refutation: it is told again, or it would let them die."""
        known = {
            peer: member.incarnation for rumor in rumors if (member := self._members.get(peer := rumor.peer))
        }
        known[self._own] = self._incarnation
        behind = (rumor.peer for rumor in rumors[:MAX_RUMORS] if rumor.incarnation < known.get(rumor.peer, 0))
        return tuple(dict.fromkeys(behind))[:MAX_RECORDS]

    def _answer(
        self, to: str, sequence: int, heard: Sequence[Rumor]
    ) -> tuple[str, int, int, tuple[Rumor, ...], tuple[str, ...]]:
        """The parts of an ack to who said `heard`: what it missed goes along first."""
        rumors, records_of = self.gossip(to)
        # Who suspects late whom all others hold dead would wait for confirmations in vain.
        dead = [
            Rumor(rumor.peer, rumor.incarnation, self._own, True)
            for rumor in heard[:MAX_RUMORS]
            if self.state(rumor.peer) is State.DEAD and rumor.peer != to and not rumor.dead
        ]
        rumors = tuple(dict.fromkeys((*rumors[:1], *dead, *rumors[1:])))[:MAX_RUMORS]
        records = dict.fromkeys((*self._refuted(heard), *records_of))
        return to, sequence, self._incarnation, rumors, tuple(records)

    def _carry(self, to: str, sequence: int) -> tuple[str, int, int, tuple[Rumor, ...], tuple[str, ...]]:
        rumors, records_of = self.gossip(to)
        return to, sequence, self._incarnation, rumors, records_of


def _suspicion_ns(suspicion: _Suspicion, confirmations: int, wanted: int) -> int:
    """Lifeguard (section IV-B): from the most to the least time as log(confirmations + 1) / log(wanted + 1)."""
    if wanted == 0:
        return suspicion.least_ns
    share = math.log(confirmations + 1) / math.log(wanted + 1)
    return max(suspicion.least_ns, int(suspicion.most_ns - share * (suspicion.most_ns - suspicion.least_ns)))
