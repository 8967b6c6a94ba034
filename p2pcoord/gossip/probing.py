"""Probing: who answers, found out by everybody about everybody at a constant cost each.

Theory of operation
    SWIM (Das, Gupta, Motivala 2002) with Lifeguard (Dadgar, Phillips, Currey 2018), as in memberlist. Each period one
    member is probed, in a shuffled round-robin, so each is probed once a period on average whatever the size of the run,
    and everybody gets to everybody within two rounds:

        ping the member                             an ack in time ends the probe
        no ack after the ping's time                ask k others to ping it (ping request); they relay the ack, or send
                                                    a nack that says "I am here, it did not answer me"
        no ack by the end of the period             suspect it
        suspicion neither refuted nor withdrawn     dead

    A leaf (nobody can dial it) that is not linked to us is pinged by members that it names. The dead are pinged now and
    then, or two healed halves would never meet.

    This is the clockwork. What follows for a member is in `suspicion.py`, what is told on the way in `rumors.py`, whose turn it
    is in `probe_targets.py`, what waits for its answer in `pings.py`.

    Who hears nobody at all slows down and accuses later (the local health multiplier): mostly the fault is its own. If a tick
    is over 500 ms late, this process slept: open probes say nothing, suspicions last longer by the gap, and nobody is declared
    dead in that tick.
"""

from __future__ import annotations

import enum
import heapq
import random
from collections.abc import Iterable, Sequence

from p2pcoord.gossip.pings import Pings, Relay, SendAck, SendNack, SendPing, SendPingRequest
from p2pcoord.gossip.probe_targets import ProbeTargets
from p2pcoord.gossip.rumors import Rumor
from p2pcoord.gossip.suspicion import (
    PERIOD_NS,
    Member,
    Output,
    RaiseIncarnation,
    State,
    Suspicions,
)

SECOND_NS = 1_000_000_000

PING_TIMEOUT_NS = SECOND_NS // 2
"""Until others are asked (memberlist's LAN default): longer than a round trip anywhere with a garbage collection in it."""

NACK_SHARE = 0.8
"""A helper gives up at this share of the ping's time, so that its nack arrives before the verdict (memberlist: 0.8)."""

DEAD_PERIOD_NS = 4 * SECOND_NS
"""One of the dead is pinged this often: it brings two halves together again well within 30 s."""

MAX_HEALTH = 8
"""The local health multiplier slows probing down at most this many times (memberlist: 8)."""

GAP_NS = SECOND_NS // 2
"""A tick later than this means that the process slept (a suspended laptop, SIGSTOP)."""


class _Timer(enum.IntEnum):
    PERIOD = 0  # begin the next probe
    DEAD_PERIOD = 1  # ping one of the dead
    INDIRECT = 2  # no ack yet: ask the helpers
    VERDICT = 3  # no ack at all
    RELAY = 4  # no ack for who asked us
    SUSPICION = 5  # not refuted


class Prober:
    """One peer's probing of all others. Every method returns what is to be sent and what was found out, in order."""

    def __init__(self, own: str, incarnation: int, rng: random.Random, now: int) -> None:
        self._own = own
        self._rng = rng
        self._suspicions = Suspicions(own, incarnation, self._expire)
        self._members = self._suspicions.members
        self._targets = ProbeTargets(self._members, rng)
        self._pings = Pings()
        self._health = 0  # the local health multiplier less 1: each step makes probes slower by one period
        self._timers: list[tuple[int, int, _Timer, str]] = []
        self._timer_count = 0
        self._period_at = self._dead_at = now
        self._restart(now)

    # Who there is ----------------------------------------------------------------------------------------------------

    def state(self, peer: str) -> State | None:
        """What is held of a member; None for who is no member."""
        return self._suspicions.state(peer)

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
        if not self._members:
            self._restart(now)  # with nobody to probe nothing was due, so nothing is late
        self._suspicions.add(peer, incarnation, tuple(links))
        self._targets.add(peer)

    def remove_member(self, peer: str) -> None:
        """Probe this peer no more (it left, or was removed); whatever is rumored of it is ignored."""
        self._suspicions.remove(peer)
        self._pings.end_probe(peer)

    def raise_incarnation(self, incarnation: int) -> None:
        """Our incarnation was raised elsewhere (RecordBook's IncarnationRaised); our record goes along from now on."""
        self._suspicions.raise_incarnation(incarnation)

    def alive(self, peer: str, incarnation: int, now: int) -> list[Output]:
        """A member's own word that it lives in `incarnation`: its signed record. News only above the one known."""
        was_dead = self.state(peer) is State.DEAD
        outputs = self._suspicions.alive(peer, incarnation, now)
        # The refutation may be older than the death that it arrives after: ask.
        if was_dead and outputs and not self._pings.busy:
            outputs += self._probe(self._members[peer], now)
        return outputs

    def connection_closed(self, peer: str, now: int) -> list[Output]:
        """A hint that the peer may be gone: it is probed now, out of turn."""
        member = self._members.get(peer)
        if member is None or member.state is not State.ALIVE or self._pings.busy:
            return []
        return self._probe(member, now)

    def connection_opened(self, peer: str, now: int) -> list[Output]:
        """A hint that a suspect or dead peer lives: it is pinged now, and so hears what is said of it."""
        member = self._members.get(peer)
        if member is None or member.state is State.ALIVE or self._pings.busy:
            return []
        return self._ping(member, now, now + PERIOD_NS)

    # Messages --------------------------------------------------------------------------------------------------------

    def receive_ping(
        self, sender: str, sequence: int, incarnation: int, rumors: Sequence[Rumor], now: int
    ) -> list[Output]:
        """A ping: answered with an ack, whoever sent it."""
        outputs = self._hear(sender, incarnation, rumors, now)
        told, records_of = self._suspicions.answer_to(sender, rumors)
        ack = SendAck(sender, sequence, self._suspicions.incarnation, told, records_of, self._own)
        return [*outputs, ack]

    def receive_ping_request(
        self, sender: str, sequence: int, incarnation: int, target: str, rumors: Sequence[Rumor], now: int
    ) -> list[Output]:
        """Ping a member for another one. For who is no member here the answer is a nack."""
        outputs = self._hear(sender, incarnation, rumors, now)
        if target == self._own:
            return [*outputs, SendAck(*self._carry(sender, sequence), subject=self._own)]
        known = target in self._members and sender in self._members
        ours = self._pings.open_relay(sender, sequence, target) if known else None
        if ours is None:
            return [*outputs, SendNack(*self._carry(sender, sequence), subject=target)]
        self._set(now + int(PING_TIMEOUT_NS * NACK_SHARE), _Timer.RELAY, str(ours))
        return [*outputs, SendPing(*self._carry(target, ours))]

    def receive_ack(
        self, sender: str, sequence: int, incarnation: int, subject: str, rumors: Sequence[Rumor], now: int
    ) -> list[Output]:
        """An ack, direct or relayed. One that nobody waits for changes nothing (but what its rumors say)."""
        outputs = self._hear(sender, incarnation, rumors, now)
        ended = self._pings.acked(sender, sequence, subject)
        if ended is None:
            return outputs
        if isinstance(ended, Relay):
            return [*outputs, SendAck(*self._carry(ended.requester, ended.sequence), subject=sender)]
        if ended.expects_verdict:
            self._health = max(0, self._health - 1)
        # (The dead are pinged without helpers, so nobody's word but their own raises them.)
        return [*outputs, *self._suspicions.answered(self._members[subject], ended.started)]

    def receive_nack(
        self, sender: str, sequence: int, incarnation: int, subject: str, rumors: Sequence[Rumor], now: int
    ) -> list[Output]:
        """A helper is there and the target did not answer it: the fault is not ours."""
        outputs = self._hear(sender, incarnation, rumors, now)
        self._pings.nacked(sender, sequence, subject)
        return outputs

    def _hear(self, sender: str, incarnation: int, rumors: Sequence[Rumor], now: int) -> list[Output]:
        """What every message says: its sender's incarnation (the channel proves the sender), and rumors."""
        outputs = self.alive(sender, incarnation, now)
        for output in self._suspicions.hear(rumors, now):
            if isinstance(output, RaiseIncarnation):
                self._worsen()
            outputs.append(output)
        return outputs

    def _carry(self, to: str, sequence: int) -> tuple[str, int, int, tuple[Rumor, ...], tuple[str, ...]]:
        rumors, records_of = self._suspicions.news_for(to)
        return to, sequence, self._suspicions.incarnation, rumors, records_of

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
        self._pings.clear()
        self._worsen()
        self._restart(now)
        self._suspicions.gap(now - due, now)

    def _restart(self, now: int) -> None:
        self._timers.clear()
        self._period_at = now + self._rng.randrange(PERIOD_NS)
        self._dead_at = now + self._rng.randrange(DEAD_PERIOD_NS)
        self._set(self._period_at, _Timer.PERIOD)
        self._set(self._dead_at, _Timer.DEAD_PERIOD)

    def _set(self, at: int, kind: _Timer, key: str = "") -> None:
        self._timer_count += 1
        heapq.heappush(self._timers, (at, self._timer_count, kind, key))

    def _expire(self, at: int, peer: str) -> None:
        self._set(at, _Timer.SUSPICION, peer)

    def _is_set(self, timer: tuple[int, int, _Timer, str]) -> bool:
        """Timers are never taken back; one that no longer says what its subject says is skipped."""
        at, _, kind, key = timer
        if kind is _Timer.PERIOD:
            return at == self._period_at
        if kind is _Timer.DEAD_PERIOD:
            return at == self._dead_at
        if kind is _Timer.RELAY:
            return int(key) in self._pings.relays
        if kind is _Timer.SUSPICION:
            member = self._members.get(key)
            return member is not None and member.suspicion is not None and member.suspicion.deadline == at
        return int(key) in self._pings.probes

    def _fire(self, timer: tuple[int, int, _Timer, str], now: int) -> list[Output]:
        _, _, kind, key = timer
        if kind is _Timer.PERIOD:
            self._period_at = now + self._scaled(PERIOD_NS)
            self._set(self._period_at, _Timer.PERIOD)
            member = self._targets.next(self._pings.probed)
            return self._probe(member, now) if member else []
        if kind is _Timer.DEAD_PERIOD:
            self._dead_at = now + DEAD_PERIOD_NS
            self._set(self._dead_at, _Timer.DEAD_PERIOD)
            dead = self._targets.next_dead()
            return self._ping(dead, now, now + DEAD_PERIOD_NS) if dead else []
        if kind is _Timer.INDIRECT:
            return self._ask_helpers(int(key))
        if kind is _Timer.VERDICT:
            return self._judge(int(key), now)
        if kind is _Timer.RELAY:
            relay = self._pings.relays.pop(int(key))
            return [SendNack(*self._carry(relay.requester, relay.sequence), subject=relay.target)]
        return self._condemn(self._members[key], now)

    def _scaled(self, duration_ns: int) -> int:
        return duration_ns * (1 + self._health)

    def _worsen(self) -> None:
        self._health = min(MAX_HEALTH, self._health + 1)

    # Probes ----------------------------------------------------------------------------------------------------------

    def _probe(self, member: Member, now: int) -> list[Output]:
        if member.peer in self._pings.probed:
            return []
        verdict_at = now + self._scaled(PERIOD_NS)
        sequence = self._open_probe(member, now, verdict_at, expects_verdict=True)
        if member.links and self._own not in member.links:
            return self._ask_helpers(sequence)
        self._set(now + self._scaled(PING_TIMEOUT_NS), _Timer.INDIRECT, str(sequence))
        return [SendPing(*self._carry(member.peer, sequence))]

    def _ping(self, member: Member, now: int, until: int) -> list[Output]:
        """Ping who is suspect or dead already: an answer changes that, silence changes nothing."""
        if member.peer in self._pings.probed:
            return []
        sequence = self._open_probe(member, now, until, expects_verdict=False)
        return [SendPing(*self._carry(member.peer, sequence))]

    def _open_probe(self, member: Member, now: int, verdict_at: int, *, expects_verdict: bool) -> int:
        sequence = self._pings.open_probe(member.peer, now, verdict_at, expects_verdict=expects_verdict)
        self._set(verdict_at, _Timer.VERDICT, str(sequence))
        return sequence

    def _ask_helpers(self, sequence: int) -> list[Output]:
        probe = self._pings.probes[sequence]
        probe.helpers = self._targets.helpers(self._members[probe.target])
        return [
            SendPingRequest(*self._carry(helper, sequence), target=probe.target) for helper in probe.helpers
        ]

    def _judge(self, sequence: int, now: int) -> list[Output]:
        probe = self._pings.probes[sequence]
        self._pings.end_probe(probe.target)
        member = self._members[probe.target]
        if not probe.expects_verdict:
            return self._tell_suspect(member, now)
        # Lifeguard: if nobody at all was heard, the fault may be ours. (memberlist counts every missing nack; where a
        # tenth of the packets is lost, or half of the run is cut off, that slows all to a ninth just when it matters.)
        if not probe.nacks:
            self._worsen()
        outputs = self._suspicions.failed(member, now)
        return [*outputs, *self._tell_suspect(member, now)]

    def _tell_suspect(self, member: Member, now: int) -> list[Output]:
        """Each period, tell a member that we accused ourselves: the sooner it knows, the sooner it refutes."""
        if not self._suspicions.accused_by_us(member) or self._pings.busy:
            return []
        return self._ping(member, now, now + PERIOD_NS)

    def _condemn(self, member: Member, now: int) -> list[Output]:
        """A suspicion's time is over: it dies if it did not answer us either; else it is asked first."""
        if self._suspicions.had_its_chance(member):
            self._pings.end_probe(member.peer)
            return self._suspicions.declare_dead(member)
        outputs = self._probe(member, now)  # none if one is open: its verdict is awaited too
        open_probe = self._pings.probes[self._pings.probed[member.peer]]
        self._suspicions.wait_for_answer(member, open_probe.verdict_at + 1)
        return outputs
