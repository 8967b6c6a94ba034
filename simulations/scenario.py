"""One run of the virtual world: what it is like, what goes wrong in it, and what must be true when it is over.

    0 s            the founder starts; the others join it within a second
    3 s .. end_s   faults
    end_s          all is healed and started again; a new version must be certified within 30 s
    then           at least `rounds` versions; no more are wanted, and all peers must come to one certified log

A scenario is read from a file (`scenarios/*.toml`) or drawn from a seed. The adversary lies from its first moment to the last.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Literal

import msgspec

from p2pcoord.consensus.quorum import Committee
from p2pcoord.errors import UserError
from p2pcoord.identity import Authority
from p2pcoord.peer import Peer
from p2pcoord.rounds.rounds import Rounds
from simulations.adversary import INTERVAL_NS, Adversary
from simulations.faults import FAMILIES, Fault, draw_faults
from simulations.machine import Machine
from simulations.network import CALM, MILLISECOND, SECOND, Cut, Loss, Weather
from simulations.randomness import stream
from simulations.world import World

COMMIT_WITHIN_NS = 30 * SECOND
"""After all faults end: detection, an election, a replaced voter and a round fit in it with room to spare."""

ROUNDS_WITHIN_NS = 60 * SECOND
SETTLE_WITHIN_NS = 20 * SECOND

LEAVE_WITHIN_NS = 5 * SECOND
"""How long a leaving machine waits before it is switched off."""

PHASE_WITHIN_NS = 5 * SECOND
"""How long a crash waits for its phase; rounds take about a second."""

WorkName = Literal["steady", "training"]

WeatherName = Literal["lan", "home", "world"]

WEATHERS: dict[WeatherName, Weather] = {
    "lan": Weather((200_000, 2 * MILLISECOND)),
    "home": Weather((5 * MILLISECOND, 40 * MILLISECOND), bandwidth=5_000_000),
    "world": Weather((20 * MILLISECOND, 140 * MILLISECOND), bandwidth=5_000_000, announce_loss=0.1),
}


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    peers: int
    end_s: float = 25.0
    rounds: int = 10
    weather: WeatherName = "lan"
    adversary: bool = False
    work: WorkName = "training"
    """Real rounds on the quadratic workload, or such as cost nothing and come often: the agreement alone."""
    overtake: bool = False
    writes_at_once: int = 1
    faults: tuple[Fault, ...] = ()


def draw_scenario(seed: int, peers: int, family: str, rounds: int, work: WorkName = "training") -> Scenario:
    """The scenario of a seed."""
    random = stream(seed, "scenario")
    end_s = 25.0 if FAMILIES[family] else 8.0
    weathers: tuple[WeatherName, ...] = ("lan", "lan", "home", "world")
    weather = random.choice(weathers)
    adversary = family == "all" and random.random() < 0.5
    faults = draw_faults(seed, family, 3.0, end_s, training=work == "training")
    overtake, at_once = random.random() < 0.5, random.choice((1, 1, 64))
    return Scenario(peers, end_s, rounds, weather, adversary, work, overtake, at_once, faults)


def load_scenario(path: Path) -> Scenario:
    """A scenario file. Raises UserError that says what is wrong with it."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Scenario)
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UserError(f"{path}: {error}", exit_code=2) from None


class Director:
    """Lets a scenario happen in a world."""

    def __init__(self, world: World, scenario: Scenario) -> None:
        self.world = world
        self.scenario = scenario
        self._cuts: list[Cut] = []
        self._leaving: set[str] = set()
        self._joined = 0
        self._phases: list[tuple[Fault, int]] = []
        """Crashes that wait for their phase, and until when."""
        self._liar: Machine | None = None
        self._adversary: Adversary | None = None
        self.done: dict[str, int] = {}
        """Faults that were carried out, by kind."""
        self._holders: set[str] = set()
        """Machines that were seen to hold the state of the version by which all are to be the same, or of a later one."""

    def play(self) -> None:
        """The whole run; what is wrong is in `world.invariants.violations`."""
        world, scenario = self.world, self.scenario
        world.on_phase = self._at_phase
        world.found("m0")
        random = stream(world.seed, "joins")
        for index in range(1, scenario.peers):
            world.later(random.randrange(SECOND), self._join, f"m{index}")
        for index, fault in enumerate(scenario.faults):
            world.later(
                int(fault.at_s * SECOND), self._strike, fault, stream(world.seed, "fault", str(index))
            )
        world.run(int(scenario.end_s * SECOND))
        if world.invariants.violations:
            return
        self._all_ends()
        quiet = world.now
        accounts = world.invariants
        if not self._reached(lambda: accounts.version_at > quiet, COMMIT_WITHIN_NS):
            accounts.violated("liveness", f"no version since {accounts.version_at / SECOND:.1f} s")
            return
        if not self._reached(lambda: accounts.version >= scenario.rounds, ROUNDS_WITHIN_NS):
            accounts.violated("liveness", f"{accounts.version} versions of {scenario.rounds}")
            return
        world.open = False
        target = 0 if scenario.work == "steady" else len(accounts.chain) - 1
        version = accounts.version
        if not self._reached(lambda: not self._differences(target, version), SETTLE_WITHIN_NS):
            accounts.violated("agreement", self._differences(target, version))

    def _reached(self, goal: Callable[[], bool], within_ns: int) -> bool:
        """Whether the goal is reached in time; True too when something else is violated already."""
        world = self.world
        deadline = world.now + within_ns
        while not goal() and world.now < deadline and not world.invariants.violations:
            world.run(min(world.now + SECOND // 10, deadline))
        return goal() or bool(world.invariants.violations)

    def _differences(self, target: int, version: int) -> str:
        """Who has not certified up to `target` (0: all that is certified, and nothing else in its log), or where rounds are real
        never held the state of `version` or of a later one ("" when all have)."""
        top = target or len(self.world.invariants.chain) - 1
        told = []
        for machine in self.world.machines.values():
            if machine.peer is None or machine.id in self._leaving:
                continue
            if machine is self._liar and not machine.peer.is_member:
                continue  # excluded for what it signed: nobody tells it more
            ledger = machine.peer.agreement.voter.ledger
            there = ledger.certified >= top if target else ledger.certified == ledger.height == top
            if not (there and machine.peer.is_member):
                told.append(f"{machine.name} at {ledger.certified}/{ledger.height}")
            elif not self._has_held(machine, version):
                told.append(f"{machine.name} without the state of version {version}")
        return f"certified up to {top}, but {', '.join(told)}" if told else ""

    def _has_held(self, machine: Machine, version: int) -> bool:
        """While rounds go on, a member lacks the newest state for moments: once is enough."""
        work = machine.peer.work if machine.peer is not None else None
        if not isinstance(work, Rounds):
            return True
        if work.participant.version >= version and work.participant.held:
            self._holders.add(machine.id)
        return machine.id in self._holders

    # Choosing

    def _up(self) -> list[Machine]:
        return [machine for machine in self.world.machines.values() if machine.up]

    def _voters(self) -> list[Machine]:
        committee = self._newest_committee()
        return [m for m in self._up() if m.id in committee.everyone]

    def _newest_committee(self) -> Committee:
        ledgers = [m.peer.agreement.voter.ledger for m in self._up() if m.peer is not None]
        best = max(ledgers, key=lambda ledger: (ledger.last.term, ledger.height), default=None)
        return best.committee if best is not None else Committee(())

    def _choose(self, fault: Fault, random: Random) -> list[Machine]:
        up = self._up()
        voters = self._voters()
        if not up:
            return []
        match fault.who:
            case "coordinator":
                coordinator = self.world.coordinator()
                return [coordinator] if coordinator is not None else [random.choice(up)]
            case "voter":
                return [random.choice(voters or up)]
            case "voters":
                return voters
            case "member":
                return [random.choice([m for m in up if m not in voters] or up)]
            case "one":
                return [random.choice(up)]
            case "some":
                return random.sample(up, random.randint(1, max(1, len(up) // 3)))
            case "half":
                return random.sample(up, max(1, len(up) // 2))
            case _:
                return up

    def _expendable(self, machine: Machine) -> bool:
        """Whether an honest quorum of every committee that may count keeps its disks without this machine. Nobody can rely on the
        liar: once it is excluded, it gets no more bytes, and can acknowledge nothing."""
        lost = (machine, self._liar)
        keeps = [m.id for m in self.world.machines.values() if not m.gone and m not in lost]
        committees = [self.world.invariants.newest_committee()]
        for other in self.world.machines.values():
            if other.peer is not None:
                committees += other.peer.agreement.voter.ledger.live_committees()
        return len(self._up()) > 2 and all(committee.is_quorum(keeps) for committee in committees)

    # Faults

    def _strike(self, fault: Fault, random: Random) -> None:
        chosen = self._choose(fault, random)
        span = int(fault.for_s * SECOND)
        if not chosen:
            return
        world = self.world
        match fault.kind:
            # The first two come about later, if at all, and are counted then.
            case "crash-after-send":
                self._crash_after_send(chosen[0], fault, span)
                return
            case "crash-at-phase":
                self._phases.append((fault, world.now + PHASE_WITHIN_NS))
                return
            case "crash":
                for machine in chosen:
                    self._crash(machine, span + random.randrange(200 * MILLISECOND))
            case "crash-loop":
                self._crash_loop(chosen, world.now + span, random)
            case "double-vote-bait":
                self._bait(world.now + span, random)
            case "rot":
                for machine in chosen:
                    world.crash(machine)
                    machine.disk.rot()
                    world.later(span, world.start, machine)
            case "disk-loss":
                if not self._expendable(chosen[0]):
                    return
                world.lose_disk(chosen[0])
                world.later(span, self._join, self._new_name())
            case "join":
                self._join(self._new_name())
            case "leave":
                self._leave(chosen[0])
            case "freeze":
                for machine in chosen:
                    world.freeze(machine)
                    world.later(span, world.thaw, machine)
            case "drift":
                for machine in chosen:
                    machine.clock.drift(random.randint(-100_000, 100_000), world.now)
                    world.later(span, self._true_again, machine, random)
            case "slow-disk":
                for machine in chosen:
                    machine.slow_disk_ns = random.randrange(400 * MILLISECOND)
                    world.later(span, self._quick_again, machine)
            case "loss":
                loss = Loss(fault.drop, fault.reset, fault.ghost)
                if fault.message:
                    world.network.losses_of[fault.message] = loss
                    world.later(span, self._calm_of, fault.message)
                else:
                    world.network.loss = loss
                    world.later(span, self._calm)
            case "partition":
                self._cut(chosen, span, both=True)
            case "one-way":
                self._cut(chosen, span, both=False)
            case "split-off":
                coordinator = world.coordinator()
                voters = [m for m in self._voters() if m is not coordinator]
                side = random.sample(voters, random.randint(0, max(0, (len(voters) - 1) // 2)))
                self._cut([*side, coordinator] if coordinator is not None else side, span, both=True)
        self._came_about(fault)

    def _came_about(self, fault: Fault) -> None:
        self.done[fault.kind] = self.done.get(fault.kind, 0) + 1

    def _crash(self, machine: Machine, down_ns: int) -> None:
        self.world.crash(machine)
        self.world.later(down_ns, self.world.start, machine)

    def _at_phase(self, machine: Machine, phase: str) -> None:
        """Strikes the coordinator whose round enters a phase at which one is to die."""
        world = self.world
        self._phases = [(fault, until) for fault, until in self._phases if world.now <= until]
        due = next((armed for armed in self._phases if armed[0].phase == phase), None)
        if due is None:
            return
        self._phases.remove(due)
        fault = due[0]
        self._came_about(fault)
        down = max(int(fault.for_s * SECOND), 1)
        if fault.after_ms == 0:
            machine.doomed = True
            world.later(down, world.start, machine)
        else:
            world.later(fault.after_ms * MILLISECOND, self._crash_in_life, machine, machine.life, down)

    def _crash_in_life(self, machine: Machine, life: int, down: int) -> None:
        if machine.life == life:
            self._crash(machine, down)

    def _crash_after_send(self, machine: Machine, fault: Fault, down_ns: int) -> None:
        left = fault.nth
        armed_until = self.world.now + 5 * SECOND

        def crash_when(kind: str) -> bool:
            nonlocal left
            if fault.message not in ("", kind) or self.world.now > armed_until:
                return False
            left -= 1
            if left == 0:
                self._came_about(fault)
                self.world.later(max(down_ns, 1), self.world.start, machine)
            return left == 0

        machine.crash_when = crash_when

    def _crash_loop(self, machines: list[Machine], until: int, random: Random) -> None:
        if self.world.now >= until:
            return
        for machine in machines:
            self._crash(machine, random.randint(10 * MILLISECOND, 800 * MILLISECOND))
        self.world.later(random.randint(SECOND // 5, 2 * SECOND), self._crash_loop, machines, until, random)

    def _bait(self, until: int, random: Random) -> None:
        """Elections from everywhere at once, and voters that forget what they said, if they can: the coordinator dies, and
        whoever votes dies with the vote and is back at once."""
        world = self.world
        if world.now >= until:
            return
        coordinator = world.coordinator()
        if coordinator is not None:
            self._crash(coordinator, random.randint(SECOND // 20, SECOND))
        for machine in self._voters():
            if machine.crash_when is None:
                machine.crash_when = self._dies_with(machine, random)
        world.later(SECOND, self._bait, until, random)

    def _dies_with(self, machine: Machine, random: Random) -> Callable[[str], bool]:
        def crash_when(kind: str) -> bool:
            if kind not in ("vote-reply", "vote?") or random.random() < 0.3:
                return False
            self.world.later(random.randint(1, 60 * MILLISECOND), self.world.start, machine)
            return True

        return crash_when

    def _cut(self, chosen: list[Machine], span: int, *, both: bool) -> None:
        side = frozenset(machine.id for machine in chosen)
        cut = Cut(side, both)
        self._cuts.append(cut)
        self.world.network.cut(cut)
        alone = both and len(self._cuts) == 1
        self.world.invariants.sides = (self.world.now, side) if alone else None
        self.world.later(span, self._heal, cut)

    def _heal(self, cut: Cut) -> None:
        if cut in self._cuts:
            self._cuts.remove(cut)
            self.world.invariants.sides = None
            self.world.network.heal(cut)

    def _calm(self) -> None:
        self.world.network.loss = CALM

    def _calm_of(self, kind: str) -> None:
        self.world.network.losses_of.pop(kind, None)

    def _true_again(self, machine: Machine, random: Random) -> None:
        machine.clock.drift(random.randint(-100, 100), self.world.now)

    def _quick_again(self, machine: Machine) -> None:
        machine.slow_disk_ns = 0

    def _new_name(self) -> str:
        self._joined += 1
        return f"n{self._joined}"

    def _join(self, name: str) -> None:
        machine = self.world.join(name)
        if self.scenario.adversary and self._liar is None:
            self._liar = machine
            self.world.invariants.liars.add(machine.id)
            self.world.on_delivery = self._overheard
            self.world.later(INTERVAL_NS, self._lie, stream(self.world.seed, "lies"))

    def _leave(self, machine: Machine) -> None:
        if machine.id in self._leaving or not self._expendable(machine):
            return
        self._leaving.add(machine.id)
        self.world.leave(machine)
        self._let_go(machine, machine.life, self.world.now + LEAVE_WITHIN_NS)

    def _let_go(self, machine: Machine, life: int, deadline: int) -> None:
        """Switches a leaving machine off once the run has let it go, or its patience is over."""
        if machine.life != life or machine.peer is None:
            self._leaving.discard(machine.id)  # it crashed and is a member as before
            return
        if machine.peer.left or (self.world.now >= deadline and self._expendable(machine)):
            self.world.told["let go" if machine.peer.left else "left without a word"] += 1
            self.world.lose_disk(machine)
        else:
            self.world.later(SECOND // 4, self._let_go, machine, life, deadline)

    def _all_ends(self) -> None:
        """Every fault is over."""
        world = self.world
        for cut in list(self._cuts):
            self._heal(cut)
        self._calm()
        self.world.network.losses_of.clear()
        self._phases.clear()
        for machine in list(world.machines.values()):
            machine.slow_disk_ns = 0
            machine.crash_when = None
            world.thaw(machine)
        lost = self._lost()
        for machine in lost:
            world.crash(machine)
            machine.known.clear()
        for machine in list(world.machines.values()):
            if machine not in lost:
                world.start(machine)
        for machine in lost:
            world.later(SECOND, world.start, machine)

    def _lost(self) -> list[Machine]:
        """Machines that no chain of links joins to the committee and that never got in, or know nobody who is left: their
        owners see that, and start them again with the address of one that is in."""
        machines = self.world.machines
        reached = {voter for voter in self._newest_committee().everyone if voter in machines}
        todo = list(reached)
        while todo:
            for other in self.world.network.connected(todo.pop()):
                if other not in reached:
                    reached.add(other)
                    todo.append(other)
        return [
            machine
            for machine in machines.values()
            if machine.peer is not None
            and machine.id not in reached
            and (not machine.peer.is_member or all(machines[other].gone for other in machine.known))
        ]

    # The adversary

    def _overheard(self, machine: Machine, sender: str, data: bytes) -> None:
        if machine is self._liar and self._adversary is not None:
            self._adversary.hear(data)

    def _lie(self, random: Random) -> None:
        machine = self._liar
        if machine is None or machine.gone:
            return
        if machine.runs and machine.peer is not None:
            if self._adversary is None or self._adversary.peer is not machine.peer:
                self._adversary = Adversary(machine.peer, self._authority(machine.peer), random)
            connected = self.world.network.connected(machine.id)
            for target in random.sample(connected, min(len(connected), random.randint(1, 3))):
                self.world.network.send(machine.id, target, self._adversary.forge(target))
        self.world.later(random.randint(INTERVAL_NS // 2, INTERVAL_NS * 3 // 2), self._lie, random)

    @staticmethod
    def _authority(peer: Peer) -> Authority:
        return peer.authority
