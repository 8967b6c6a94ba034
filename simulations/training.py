"""Content and tensors in the virtual world: real float32 arithmetic on the quadratic workload, in virtual time.

Every effect of a round takes its time, may fail as it does in a node, and is answered exactly once unless the machine dies
first. What it makes is durable when it is done. Content is fetched from one source after another: who is cut off keeps the
fetcher waiting, who does not have it says so at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from p2pcoord.aggregation.mean import PARTIAL
from p2pcoord.content import ContentRef
from p2pcoord.effects import (
    Adopt,
    Cancel,
    Cancelled,
    Combine,
    Combined,
    Discard,
    Done,
    Failed,
    Fetch,
    FetchReport,
    Offer,
    Outcome,
    Step,
    Stepped,
    Train,
    Trained,
    Validate,
    Validated,
)
from p2pcoord.rounds.attempt import Attempt
from simulations import quadratic
from simulations.disk import Content
from simulations.machine import Machine
from simulations.network import MILLISECOND, SECOND
from simulations.randomness import stream
from simulations.world import World

STALL_NS = 3 * SECOND
"""A source that sends nothing for so long is given up (a node waits 2.5 s for a round's content and 4 s for a state)."""

COMPUTE_NS = 3 * MILLISECOND
"""Combine, step, validate: memory bandwidth on a small state."""


TRAINER_FAILS = 0.01
"""Share of trainings that end in an error: out of memory, a killed trainer."""


class Missing(Exception):
    """What an effect works on is not on this disk."""


class Training:
    """Performs the effects of rounds for all machines of a world. `made` keeps all bytes ever made, for the invariants."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.made: dict[bytes, bytes] = {}
        self.fetched: int = 0
        self._speeds: dict[str, int] = {}
        self._trainers: dict[str, Random] = {}
        world.before_founding = lambda founder: self._store(founder, quadratic.STATE_ZERO)
        world.after_founding = self._watch
        world.performers |= {
            Fetch: self._fetch,
            Offer: lambda machine, effect: None,  # all that is on the disk may be fetched
            Discard: self._discard,
            Adopt: self._adopt,
            Train: self._train,
            Combine: self._combine,
            Step: self._step,
            Validate: self._validate,
            Cancel: self._cancel,
        }

    def keep(self, machine: Machine, data: bytes, *, durable: bool) -> ContentRef:
        """Puts content on a disk."""
        ref = quadratic.ref_of(data)
        before = machine.disk.content.get(ref.root)
        machine.disk.content[ref.root] = Content(data, durable or (before is not None and before.durable))
        self.made[ref.root] = data
        return ref

    def _store(self, founder: Machine, state: bytes) -> None:
        self.keep(founder, state, durable=True)

    def _watch(self) -> None:
        self.world.invariants.rebuild = self.rebuild

    def rebuild(self, attempt: Attempt) -> bytes:
        """The root of the state that an attempt makes: every sum anew, in the order of its tree, from what was made."""
        result = self._sum(attempt, attempt.tree.root)
        state, _ = quadratic.step(self.made[attempt.parent.root], result, attempt.step)
        return quadratic.ref_of(state).root

    def _sum(self, attempt: Attempt, member: str) -> bytes:
        inputs = [(self.made[own.content.root], own.factors) for own in attempt.of(member)]
        for child in attempt.tree.children(member):
            if attempt.sends_partial(child):
                inputs.append((self._sum(attempt, child), PARTIAL))
            else:
                inputs += [(self.made[leaf.content.root], leaf.factors) for leaf in attempt.of(child)]
        return quadratic.combine(inputs)[0]

    # Outcomes

    def _later(self, machine: Machine, number: int, delay_ns: int, outcome: Callable[[], Outcome]) -> None:
        machine.in_flight.add(number)
        self.world.later(delay_ns, self._finish, machine, machine.life, number, outcome)

    def _finish(self, machine: Machine, life: int, number: int, outcome: Callable[[], Outcome]) -> None:
        if machine.life != life or number not in machine.in_flight:
            return
        try:
            result = outcome()
        except Missing as missing:
            result = Failed(str(missing))
        machine.in_flight.discard(number)
        self.world.feed(machine, "complete", number, result)

    def _cancel(self, machine: Machine, effect: Cancel) -> None:
        if effect.effect_id in machine.in_flight:
            # Answered by the loop, not inside the input that asked for it.
            self.world.later(0, self._finish, machine, machine.life, effect.effect_id, Cancelled)

    def _read(self, machine: Machine, ref: ContentRef) -> bytes:
        content = machine.disk.content.get(ref.root)
        if content is None or not content.durable:
            raise Missing(f"{ref.root.hex()[:16]} is not here")
        return content.data

    # Content

    def _fetch(self, machine: Machine, effect: Fetch) -> None:
        machine.in_flight.add(effect.id)
        if effect.purpose != "state":
            self.world.invariants.receives(machine, effect.ref.root)
        self.world.later(0, self._try, machine, machine.life, effect, effect.sources, {})

    def _try(
        self,
        machine: Machine,
        life: int,
        effect: Fetch,
        sources: Sequence[str],
        bad: dict[str, str],
    ) -> None:
        """Asks the first of `sources`, and after it the next."""
        world = self.world
        if machine.life != life or effect.id not in machine.in_flight:
            return
        if effect.ref.root in machine.disk.content:  # perhaps of a fetch that was cancelled before its fsync
            done = Done(FetchReport({}, {}))
            self._later(
                machine, effect.id, self._fsync(machine), lambda: self._stored(machine, effect.ref, done)
            )
            return
        if not sources:
            report = FetchReport({}, bad)
            self._finish(machine, life, effect.id, lambda: Failed("no source has it", report))
            return
        source, rest = sources[0], sources[1:]
        trip = 2 * world.network.distance(machine.id, source)
        if source not in world.network.connected(machine.id):
            world.later(MILLISECOND, self._try, machine, life, effect, rest, {**bad, source: "not connected"})
        elif world.network.severed(machine.id, source):
            world.later(STALL_NS, self._try, machine, life, effect, rest, {**bad, source: "stalled"})
        else:
            world.later(trip, self._received, machine, life, effect, source, rest, bad)

    def _received(
        self,
        machine: Machine,
        life: int,
        effect: Fetch,
        source: str,
        rest: Sequence[str],
        bad: dict[str, str],
    ) -> None:
        world = self.world
        if machine.life != life or effect.id not in machine.in_flight:
            return
        other = world.machines[source]
        content = other.disk.content.get(effect.ref.root)
        reached = source in world.network.connected(machine.id) and other.runs
        if not reached or other.peer is None:
            world.later(STALL_NS, self._try, machine, life, effect, rest, {**bad, source: "stalled"})
        elif content is None or not content.durable or not other.peer.may_read(machine.id):
            self._try(machine, life, effect, rest, {**bad, source: "does not have it"})
        else:
            self.fetched += 1
            self.keep(machine, content.data, durable=False)
            world.feed(machine, "progress", effect.id)
            report = FetchReport({source: len(content.data)}, bad)
            self._later(
                machine,
                effect.id,
                self._fsync(machine),
                lambda: self._stored(machine, effect.ref, Done(report)),
            )

    def _fsync(self, machine: Machine) -> int:
        return machine.disk.latency(*self.world.settings.disk_ns) + machine.slow_disk_ns

    def _stored(self, machine: Machine, ref: ContentRef, done: Done) -> Done:
        content = machine.disk.content.get(ref.root)
        if content is None:
            raise Missing("discarded while it was fetched")
        content.durable = True
        return done

    def _discard(self, machine: Machine, effect: Discard) -> None:
        for root in effect.roots:
            machine.disk.content.pop(root, None)

    def _adopt(self, machine: Machine, effect: Adopt) -> None:
        content = machine.disk.content.get(effect.state.root)
        if content is None or not content.durable:
            self.world.invariants.violated(
                "content", f"{machine.name} adopts version {effect.version}, which is not on its disk"
            )
        self.world.invariants.adopted(machine, effect.version, effect.state.root)

    # Tensors

    def _speed(self, machine: Machine) -> int:
        """Nanoseconds that one assignment takes here."""
        if machine.id not in self._speeds:
            random = stream(self.world.seed, "speed", machine.id)
            self._speeds[machine.id] = random.choice((50, 80, 150, 400)) * MILLISECOND
        return self._speeds[machine.id]

    def _failures(self, machine: Machine) -> Random:
        if machine.id not in self._trainers:
            self._trainers[machine.id] = stream(self.world.seed, "trainer", machine.id)
        return self._trainers[machine.id]

    def _train(self, machine: Machine, effect: Train) -> None:
        wall = self._speed(machine)
        slot = (effect.version, effect.assignment)
        self.world.invariants.trains(machine, slot)

        fails = self._failures(machine).random() < TRAINER_FAILS

        def outcome() -> Outcome:
            if fails:
                return Failed("the trainer died")
            data, samples, norm, loss = quadratic.train(self._read(machine, effect.base), effect.ranges)
            ref = self.keep(machine, data, durable=True)
            self.world.invariants.trained(machine, slot)
            return Done(Trained(ref, samples, quadratic.LOCAL_STEPS, norm, loss, wall))

        self._later(machine, effect.id, wall + self._fsync(machine), outcome)

    def _combine(self, machine: Machine, effect: Combine) -> None:
        def outcome() -> Outcome:
            inputs = [(self._read(machine, ref), factors) for ref, factors in effect.inputs]
            data, norm, finite = quadratic.combine(inputs)
            return Done(Combined(self.keep(machine, data, durable=True), norm, finite))

        self._later(machine, effect.id, COMPUTE_NS + self._fsync(machine), outcome)

    def _step(self, machine: Machine, effect: Step) -> None:
        def outcome() -> Outcome:
            state, result = self._read(machine, effect.state), self._read(machine, effect.result)
            data, finite = quadratic.step(state, result, effect.parameters)
            return Done(Stepped(self.keep(machine, data, durable=True), finite))

        self._later(machine, effect.id, COMPUTE_NS + self._fsync(machine), outcome)

    def _validate(self, machine: Machine, effect: Validate) -> None:
        def outcome() -> Outcome:
            samples, loss = quadratic.validate(self._read(machine, effect.state), effect.ranges)
            return Done(Validated(samples, loss, {}))

        self._later(machine, effect.id, COMPUTE_NS, outcome)
