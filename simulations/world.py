"""The virtual world: machines, their network and time, driven by one heap of events.

Theory of operation
    An event is (world time in ns, sequence number, function, arguments); the heap gives them in this order, so a run is a
    function of its seed. Every input of a peer goes through `feed`: it is given the machine's own clock, and the effects
    that come back are run as architecture.md, section 1 says:

        Persist      one after the other, each with the disk's latency; then `complete`
        Send         each only when its `after` is durable; in order per link, or overtaking (`overtake`)
        Announce     when its `after` is durable
        others       by `performers`, a table from the type of effect to a function

    A frozen machine collects its inputs; when it goes on it gets them first, and then its tick, late. A crash forgets the
    peer and tears the disk; a restart gives a new Peer the frames that recovery found, and fresh entropy.

    After every input the invariants look at the peer (`invariants.py`). Everything delivered and every effect goes into one
    running hash: the trace, equal for equal seeds.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable
from hashlib import sha256
from itertools import islice, takewhile
from typing import Any, get_args

import msgspec

from p2pcoord.consensus.record import Record, make_genesis
from p2pcoord.consensus.voter import Timing
from p2pcoord.effects import (
    Announce,
    AnswerStatus,
    Cancel,
    Dial,
    Disconnect,
    Done,
    Effect,
    Emit,
    Failed,
    Halt,
    Persist,
    Reach,
    Send,
)
from p2pcoord.errors import LocalError
from p2pcoord.identity import Authority
from p2pcoord.messages import AnyMessage
from p2pcoord.peer import Peer
from p2pcoord.peer_settings import PeerSettings, Restored
from p2pcoord.rounds.phases import Phase
from p2pcoord.rounds.rounds import Rounds
from p2pcoord.rounds.setting import Rules
from p2pcoord.work import Work
from simulations.clock import Clock
from simulations.disk import Disk
from simulations.invariants import Invariants
from simulations.machine import Machine
from simulations.network import HANDSHAKE_TRIPS, MILLISECOND, Host, Network, Weather
from simulations.randomness import derive, stream
from simulations.signatures import Keyring
from simulations.steady_work import Situation, SteadyWork

SECRET = b"a secret that every simulated machine knows"

MAX_TICKS_AT_ONCE = 100
"""Ticks of one peer without time passing: more means that its deadline never moves."""

WorkFactory = Callable[[Peer, Situation], Work]


class WorldSettings(msgspec.Struct, frozen=True):
    weather: Weather = Weather()
    timing: Timing = Timing()
    committee_size: int = 7
    """The largest, where a run of its own has 5 by default: more voters, more that can go wrong."""
    rotation_rounds: int = 20
    """A run has 10 by default; a term that lasts longer leaves the faults more time to end it."""
    disk_ns: tuple[int, int] = (MILLISECOND // 5, 4 * MILLISECOND)
    """Latency of one fsync."""
    drift_ppm: int = 100
    """Clocks gain or lose up to this much: quartz."""
    real_signatures: bool = False
    overtake: bool = False
    """Whether a message that waits for nothing may overtake one on its link that still waits for the disk, as in a node."""
    writes_at_once: int = 1
    """Persists that one fsync takes, when several wait."""
    compact_after_bytes: int = 20_000
    kept_bodies: int = 6
    """Small, so that every log is compacted many times."""
    gossip: bool = False
    """Whether peers gossip, probe and dial; else all links are given to them."""
    rules: Rules | None = None
    """The rules of real rounds (see training.py); None: the world's `work` takes their place."""


PLAIN = WorldSettings()


class World:
    """One run of one seed. Machines are added with `found` and `join`, and then `run` moves time on."""

    def __init__(self, seed: int, settings: WorldSettings = PLAIN, work: WorkFactory = SteadyWork) -> None:
        self.seed = seed
        self.settings = settings
        self.now = 0
        self.events = 0
        self.open = True
        """Whether new rounds are wanted."""
        self.machines: dict[str, Machine] = {}
        self.keyring = Keyring(seed, real=settings.real_signatures)
        self.run_id = derive(seed, "run")
        self.lost: Counter[tuple[str, str]] = Counter()
        """(message kind, how it was lost)"""
        self.crashed: Counter[tuple[str, str]] = Counter()
        """(role of the machine that crashed, what it was at)"""
        self.told: Counter[str] = Counter()
        """Events that peers emitted, by name."""
        self.before_founding: Callable[[Machine], None] = lambda machine: None
        """Prepares the founder's disk."""
        self.after_founding: Callable[[], None] = lambda: None
        """Called once the world has its invariants."""
        self.on_delivery: Callable[[Machine, str, bytes], None] | None = None
        """Sees what each machine receives (a liar listens)."""
        self.on_phase: Callable[[Machine, str], None] | None = None
        """Hears of every phase that a coordinator's round enters."""
        self._work = work
        self._queue: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        self._trace = sha256()
        self._ticks_at_once = 0
        self.genesis: Record
        self.invariants: Invariants
        self.network = Network(
            seed,
            settings.weather,
            Host(
                now=lambda: self.now,
                later=self.later,
                deliver=self._deliver,
                connected=lambda peer, other: self._tell(peer, "connected", other),
                disconnected=lambda peer, other: self._tell(peer, "disconnected", other),
                answers=lambda peer: peer in self.machines and self.machines[peer].runs,
                plugged=lambda peer: peer in self.machines and self.machines[peer].up,
                kind_of=kind_of,
                lost=self._lost,
            ),
            given=not settings.gossip,
        )
        self.performers: dict[type[Effect], Callable[[Machine, Any], None]] = {
            Send: self._send,
            Announce: self._announce,
            Persist: self._persist,
            Dial: self._dial,
            Disconnect: lambda machine, effect: self.network.disconnect(machine.id, effect.peer),
            Reach: self._reach,
            AnswerStatus: lambda machine, effect: None,  # its document is the node's
            Cancel: lambda machine, effect: None,  # what is under way here ends by itself
            Halt: lambda machine, effect: self.invariants.violated(
                "halt", f"{machine.name}: {effect.reason}"
            ),
            Emit: self._emit,
        }

    # Time

    def later(self, delay_ns: int, function: Callable[..., None], *arguments: Any) -> None:
        self._sequence += 1
        heapq.heappush(self._queue, (self.now + max(delay_ns, 0), self._sequence, function, arguments))

    def run(self, until_ns: int, stop: Callable[[], bool] = lambda: False) -> None:
        """Moves on to `until_ns`, or until `stop()` or the first violation."""
        queue, violations = self._queue, self.invariants.violations
        while queue and queue[0][0] <= until_ns and not violations and not stop():
            at, _, function, arguments = heapq.heappop(queue)
            if at > self.now:
                self.now = self.invariants.now = at
                self._ticks_at_once = 0
            self.events += 1
            function(*arguments)
        if not violations and not stop():
            self.now = self.invariants.now = max(self.now, until_ns)

    # Machines

    def machine(self, name: str) -> Machine:
        """A new machine, not started yet."""
        random = stream(self.seed, "machine", name)
        signer = self.keyring.signer(name)
        limit = self.settings.drift_ppm
        clock = Clock(random.randrange(1 << 50), random.randint(-limit, limit), self.now)
        machine = Machine(name, signer, clock, Disk(stream(self.seed, "disk", name)))
        self.machines[machine.id] = machine
        return machine

    def found(self, name: str = "m0") -> Machine:
        """The founder's machine, started; it brings the run's genesis."""
        machine = self.machine(name)
        self.before_founding(machine)
        authority = Authority(machine.signer, self.keyring.verify, self.run_id)
        rules = self.settings.rules
        state = rules.state_zero if rules is not None else None
        self.genesis = make_genesis(authority, b"a simulated run", state=state)
        self.invariants = Invariants(self.keyring, self.run_id, self.genesis, self.machines)
        self.after_founding()
        self.start(machine)
        return machine

    def join(self, name: str) -> Machine:
        """A fresh machine that knows the run's secret, started."""
        machine = self.machine(name)
        self.start(machine)
        return machine

    def start(self, machine: Machine) -> None:
        """Starts the peer from what its disk holds; also after a crash."""
        if machine.up or machine.gone:
            return
        try:
            frames = machine.disk.recover()
        except Exception as error:  # any: the log must come back
            self.invariants.violated("log", f"{machine.name}: {error!r}")
            return
        machine.life += 1
        name = f"{machine.name} {machine.life}"
        authority = Authority(machine.signer, self.keyring.verify, self.run_id)
        settings = self.settings
        peer = Peer(
            authority,
            self.genesis,
            PeerSettings(
                machine.name,
                SECRET,
                settings.committee_size,
                settings.rotation_rounds,
                settings.timing,
                settings.rules,
                gossip=settings.gossip,
                addresses=(machine.id,),
                bootstrap=tuple(self._addresses_known_to(machine)),
                compact_after_bytes=settings.compact_after_bytes,
                kept_bodies=settings.kept_bodies,
            ),
        )
        situation = Situation(stream(self.seed, "work", name), lambda: self.open)
        if settings.rules is None:
            peer.work = self._work(peer, situation)
        machine.peer = peer
        self._note(b"start", machine)
        self.invariants.restarting(machine)
        self.feed(machine, "start", self._restored(machine, frames, derive(self.seed, "entropy", name)))
        self.invariants.restarted(machine, peer)
        self.network.add(machine.id)

    def _addresses_known_to(self, machine: Machine) -> list[str]:
        """Whom it ever had a link with; a new machine was told the address of one that runs (an id is an address here)."""
        if not machine.known:
            others = [other for other in self.machines.values() if other.up and other is not machine]
            members = [other for other in others if other.peer is not None and other.peer.is_member]
            others = members or others
            if others:
                chosen = stream(self.seed, "bootstrap", machine.name).choice(others)
                machine.known[chosen.id] = None
        return list(machine.known)

    @staticmethod
    def _restored(machine: Machine, frames: tuple[bytes, ...], entropy: bytes) -> Restored:
        return Restored(frames, entropy, frozenset(machine.disk.content))

    def crash(self, machine: Machine) -> None:
        """Kills the machine: memory and what was under way are gone, the unsynced tail of the log is torn."""
        if machine.peer is None:
            return
        self.crashed[machine.peer.agreement.voter.role.value, self._at(machine.peer)] += 1
        self._note(b"crash", machine)
        machine.forget()
        machine.disk.crash()
        self.network.crash(machine.id)

    def lose_disk(self, machine: Machine) -> None:
        """Nothing is left of the machine and its key."""
        self.crash(machine)
        machine.gone = True
        self.network.remove(machine.id)

    def freeze(self, machine: Machine) -> None:
        if machine.runs:
            machine.frozen = True
            self.network.freeze(machine.id)

    def thaw(self, machine: Machine) -> None:
        """Goes on: first what is queued, then the tick."""
        if not machine.frozen:
            return
        machine.frozen = False
        life = machine.life
        while machine.inputs and machine.life == life:
            name, arguments = machine.inputs.popleft()
            self.feed(machine, name, *arguments)
        if machine.peer is not None and machine.life == life:
            self._arm(machine)
            self.network.redial(machine.id)

    def leave(self, machine: Machine) -> None:
        """The machine asks to be let go; it is switched off when the run has done so (see scenario.py)."""
        self.feed(machine, "leave")

    @staticmethod
    def _at(peer: Peer) -> str:
        """What a peer is at, for the coverage table: a coordinator's phases are those of its round, where rounds are real."""
        agreement = peer.agreement
        replication, ledger = agreement.replication, agreement.voter.ledger
        if not agreement.is_coordinator:
            return "member" if not agreement.voter.is_voter() else "voter"
        if not replication.opened:
            return "opening"
        if replication.transferring is not None:
            return "transferring"
        if isinstance(peer.work, Rounds):
            phase = peer.work.coordinator.phase
            return (
                str(phase)
                if peer.work.coordinator.proposed is not None or phase is not Phase.COMPLETED
                else "idle"
            )
        if ledger.certified < ledger.height:
            return f"proposed {ledger.records[ledger.certified + 1].header.kind}"
        return "joint" if agreement.committee.joint else "between rounds"

    # Inputs

    def feed(self, machine: Machine, name: str, *arguments: Any) -> None:
        """Gives one input to the machine's peer, runs the effects, looks at the invariants."""
        peer = machine.peer
        if peer is None:
            return
        if machine.frozen:
            machine.inputs.append((name, arguments))
            return
        effects = getattr(peer, name)(*arguments, machine.clock.read(self.now))
        for effect in effects:
            perform = self.performers.get(type(effect))
            if perform is None:
                raise LocalError(f"the virtual world does not know {type(effect).__name__}")
            perform(machine, effect)
        self.invariants.observe(machine, peer)
        if machine.doomed:
            self.crash(machine)
        else:
            self._arm(machine)

    def _tell(self, peer: str, name: str, other: str) -> None:
        """News of a link, as an input of its own: a link may break while the effects of another input are performed."""
        machine = self.machines[peer]
        self.later(0, self._told, machine, machine.life, name, other)

    def _told(self, machine: Machine, life: int, name: str, other: str) -> None:
        if machine.life == life:
            if name == "connected":
                machine.known[other] = None
            self.feed(machine, name, other)

    def _arm(self, machine: Machine) -> None:
        peer = machine.peer
        if peer is None or machine.frozen:
            return
        at = max(machine.clock.when(peer.next_deadline()), self.now)
        if machine.tick_at is None or at < machine.tick_at:
            machine.tick_at = at
            self.later(at - self.now, self._tick, machine, machine.life, at)

    def _tick(self, machine: Machine, life: int, at: int) -> None:
        peer = machine.peer
        if peer is None or machine.life != life or machine.tick_at != at:
            return
        machine.tick_at = None
        if not machine.frozen and machine.clock.when(peer.next_deadline()) <= self.now:
            self._ticks_at_once += 1
            if self._ticks_at_once > MAX_TICKS_AT_ONCE * len(self.machines):
                raise LocalError(f"{machine.name} asks for ticks and no time passes")
            self.feed(machine, "tick")
        else:
            self._arm(machine)

    def _deliver(self, receiver: str, sender: str, data: bytes) -> None:
        machine = self.machines[receiver]
        if machine.peer is None:
            self._lost(data, "down")
            return
        self._note(b"deliver", machine, sender.encode(), data)
        if self.on_delivery is not None:
            self.on_delivery(machine, sender, data)
        self.feed(machine, "receive", sender, data)

    # Effects

    def _persist(self, machine: Machine, effect: Persist) -> None:
        self._note(b"persist", machine, *effect.frames)
        self.invariants.written(effect.frames)
        machine.persists.append(effect)
        if len(machine.persists) == 1:
            self._write(machine)

    def _write(self, machine: Machine) -> None:
        """The next fsync: of what waits, some; a persist that replaces the log alone."""
        if machine.persists[0].replace:
            machine.writing = 1
            machine.disk.rewrite(machine.persists[0].frames)
        else:
            waiting = islice(machine.persists, self.settings.writes_at_once)
            batch = list(takewhile(lambda persist: not persist.replace, waiting))
            machine.writing = len(batch)
            machine.disk.write([frame for persist in batch for frame in persist.frames])
        low, high = self.settings.disk_ns
        # The disk's own stream: how often it is asked changes nothing elsewhere.
        latency = machine.disk.latency(low, high) + machine.slow_disk_ns
        self.later(latency, self._synced, machine, machine.life)

    def _synced(self, machine: Machine, life: int) -> None:
        if machine.life != life:
            return
        done = [machine.persists.popleft() for _ in range(machine.writing)]
        numbers = [persist.id for persist in done]
        self.invariants.synced(machine, machine.disk.sync(), replaced=done[0].replace)
        machine.durable = numbers[-1]
        if machine.persists:
            self._write(machine)
        self._release(machine)
        if machine.doomed:
            self.crash(machine)
            return
        for number in numbers:
            if machine.life == life:
                self.feed(machine, "complete", number, Done())

    def may_leave(self, machine: Machine, after: int) -> bool:
        """Whether what waits for this Persist may leave now."""
        return after <= machine.durable

    def _send(self, machine: Machine, effect: Send) -> None:
        self._note(b"send", machine, effect.to.encode(), effect.data)
        self.invariants.signed(machine, effect.data)
        queue = machine.waiting.get(effect.to)
        free = self.settings.overtake or not queue
        if free and self.may_leave(machine, effect.after):
            self._leave(machine, effect.to, effect.data)
        elif queue is None:
            machine.waiting[effect.to] = deque((effect,))
        else:
            queue.append(effect)

    def _announce(self, machine: Machine, effect: Announce) -> None:
        self._note(b"announce", machine, effect.data)
        if self.may_leave(machine, effect.after):
            self.network.announce(machine.id, effect.data)
        else:
            machine.announcements.append(effect)

    def _release(self, machine: Machine) -> None:
        for to in list(machine.waiting):
            queue = machine.waiting[to]
            while queue and self.may_leave(machine, queue[0].after):
                self._leave(machine, to, queue.popleft().data)
            if not queue:
                del machine.waiting[to]
        while machine.announcements and self.may_leave(machine, machine.announcements[0].after):
            self.network.announce(machine.id, machine.announcements.popleft().data)

    def _leave(self, machine: Machine, to: str, data: bytes) -> None:
        if machine.doomed:
            return
        self.invariants.spoken(machine, data)
        self.network.send(machine.id, to, data)
        if machine.crash_when is not None and machine.crash_when(kind_of(data)):
            machine.doomed = True

    def _dial(self, machine: Machine, effect: Dial) -> None:
        life = machine.life

        def done(why: str) -> None:
            if machine.life == life:
                self.feed(machine, "complete", effect.id, Failed(why) if why else Done())

        self.network.dial(machine.id, effect.peer or effect.addresses[0], done)

    def _reach(self, machine: Machine, effect: Reach) -> None:
        """A new connection to somebody that is connected: every machine here can be dialled."""
        trip = self.network.distance(machine.id, effect.peer)
        self.later(HANDSHAKE_TRIPS * trip, self._reached, machine, machine.life, effect)

    def _reached(self, machine: Machine, life: int, effect: Reach) -> None:
        if machine.life == life:
            self.feed(machine, "complete", effect.id, Done(not self.network.severed(machine.id, effect.peer)))

    def _emit(self, machine: Machine, effect: Emit) -> None:
        self.told[effect.event] += 1
        self._note(b"emit", machine, effect.event.encode())
        if effect.event == "phase" and self.on_phase is not None:
            self.on_phase(machine, effect.fields["phase"])
        elif effect.event == "evidence":
            self.invariants.accused(machine.name, effect.fields["peer"], effect.fields["reason"])

    # Seen from outside

    def _lost(self, data: bytes, how: str) -> None:
        self.lost[kind_of(data), how] += 1

    def _note(self, what: bytes, machine: Machine, *details: bytes) -> None:
        self._trace.update(b"%d %s %s %d" % (self.now, what, machine.id.encode(), len(details)))
        for detail in details:
            self._trace.update(detail)

    @property
    def trace(self) -> str:
        """sha256 over all that happened so far."""
        return self._trace.hexdigest()

    def coordinator(self) -> Machine | None:
        """The machine that coordinates the highest term."""
        best: Machine | None = None
        for machine in self.machines.values():
            if machine.peer is not None and machine.peer.agreement.is_coordinator:
                if best is None or best.peer is None or term_of(machine) > term_of(best):
                    best = machine
        return best


def term_of(machine: Machine) -> int:
    return machine.peer.agreement.voter.term if machine.peer is not None else 0


MESSAGE_KINDS = frozenset(str(kind.__struct_config__.tag) for kind in get_args(AnyMessage))


def kind_of(data: bytes) -> str:
    """The tag of a message: a short text at the beginning of an array."""
    if len(data) < 2 or not 0x60 <= data[1] < 0x78:
        return "garbage"
    kind = data[2 : 2 + data[1] - 0x60].decode("ascii", "replace")
    return kind if kind in MESSAGE_KINDS else "garbage"
