"""Scripts about rounds: the manual world of `script_runner`, with peers that really train (the quadratic workload).

All its commands hold here too. What a peer asks to be done (train, combine, step, validate, fetch) is done when everything
stands still (`settle`, `run`), in the order in which it was asked, unless it is held:

    setting up   committee A B C [members D] [option...]
                 options of rounds: rounds=N barrier=2s policy=extend share=0.5 minimum=N fan_out=N; rotation=N
                 begin A                       A's election timeout passes, and it coordinates
    work         hold B train [fetch ...]      B's work of these kinds is not done
                 release B                     ... is done from now on
                 break B train WORDS           the oldest of it that is held fails with this reason
    reading      held B                        what B has to do
                 rounds [A ...]                where they stand

Printed are the events of peers, plans and attempts when they are first sent, and commits as the coordinator tells them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import msgspec

from p2pcoord.aggregation.contribution import ContributionHeader
from p2pcoord.consensus.record import Round
from p2pcoord.content import ContentRef
from p2pcoord.effects import (
    Adopt,
    Announce,
    Cancel,
    Cancelled,
    Combine,
    Combined,
    Discard,
    Done,
    Effect,
    Emit,
    Failed,
    Fetch,
    FetchReport,
    Halt,
    Offer,
    Outcome,
    Persist,
    Send,
    Step,
    Stepped,
    Train,
    Trained,
    Validate,
    Validated,
)
from p2pcoord.messages import decode_message
from p2pcoord.peer import Peer
from p2pcoord.peer_settings import Restored
from p2pcoord.rounds.coordinator import RoundCoordinator
from p2pcoord.rounds.messages import AttemptMessage, PlanMessage
from p2pcoord.rounds.participant import Participant
from p2pcoord.rounds.phases import Phase
from p2pcoord.rounds.rounds import Rounds
from p2pcoord.synchronization.bsp import StragglerPolicy
from p2pcoord.wire import encode
from simulations import quadratic
from tests.script_runner import (
    LETTERS,
    MAX_DELIVERIES,
    Block,
    Machine,
    World,
    authority_of,
    duration_ns,
    letter_of,
    peer_id,
)

# Told by every peer, or of no interest to rounds.
SILENT = ("candidate", "certified", "fetched", "following")

Work = Train | Fetch | Combine | Step | Validate
TRAINING_NS = 80_000_000
"""What a training says it took; no clock moves for it."""


def name_of(effect: Work) -> str:
    return type(effect).__name__.lower()


class RoundWorld(World):
    """`sent` are all messages that left, `trainings` all that were finished: (letter, version, assignment)."""

    def __init__(self) -> None:
        super().__init__()
        self.rules = quadratic.rules(rounds=1)
        self.contents: dict[str, dict[bytes, bytes]] = {}
        self.work: dict[str, dict[int, Work]] = {}
        self.cancelled: dict[str, list[int]] = {}
        self.held_kinds: dict[str, set[str]] = {}
        self.sent: list[tuple[str, str, msgspec.Struct]] = []
        self.trainings: list[tuple[str, int, int]] = []
        self.twists: dict[tuple[str, str], Callable[[Outcome], Outcome]] = {}
        """(letter, kind of work) -> what becomes of its outcome there."""
        self._told: set[bytes] = set()

    # Reading

    def peer(self, letter: str) -> Peer:
        return self._peer(self.machines[letter])

    def rounds(self, letter: str) -> Rounds:
        work = self.peer(letter).work
        assert isinstance(work, Rounds)
        return work

    def coordinator(self, letter: str) -> RoundCoordinator:
        return self.rounds(letter).coordinator

    def participant(self, letter: str) -> Participant:
        return self.rounds(letter).participant

    def rejected(self, letter: str) -> dict[str, int]:
        """What a peer rejected so far, by kind."""
        return {kind: sum(by.values()) for kind, by in self.peer(letter).rejected.items()}

    def commits(self, letter: str) -> list[Round]:
        """The rounds that a peer holds certified."""
        ledger = self.peer(letter).agreement.voter.ledger
        bodies = [record.body for record in ledger.records[: ledger.certified + 1]]
        return [body for body in bodies if isinstance(body, Round)]

    def messages(
        self, kind: type[msgspec.Struct], source: str = "", target: str = ""
    ) -> list[msgspec.Struct]:
        """Messages of this kind that left so far."""
        return [
            message
            for by, to, message in self.sent
            if isinstance(message, kind) and source in ("", by) and target in ("", to)
        ]

    def inject(self, source: str, target: str, message: msgspec.Struct) -> list[str]:
        """What `source` sends although its peer would not; what was printed meanwhile."""
        self.lines = []
        self._arrive(source, target, encode(message))
        return list(self.lines)

    # Commands

    def do_committee(self, *words: str) -> None:
        values = dict(word.split("=") for word in words if "=" in word)
        self.rules = quadratic.rules(
            rounds=int(values.pop("rounds", "1")),
            barrier_ns=duration_ns(values.pop("barrier", "5s")),
            straggler_policy=StragglerPolicy(values.pop("policy", "leave_out")),
            minimum_share=float(values.pop("share", "0.5")),
            minimum_members=int(values.pop("minimum", "1")),
            fan_out=int(values.pop("fan_out", "2")),
        )
        rest = [f"{key}={value}" for key, value in values.items()]
        super().do_committee(*(word for word in words if "=" not in word), *rest)

    def do_begin(self, letter: str) -> None:
        self.do_timeout(letter)
        self._settle()
        for _ in range(2):  # heartbeats tell the voters of the opening's certificate
            self.do_tick(letter, "150ms")
            self._settle()

    def do_hold(self, letter: str, *kinds: str) -> None:
        self.held_kinds.setdefault(letter, set()).update(kinds)

    def do_release(self, letter: str, *kinds: str) -> None:
        self.held_kinds[letter] -= set(kinds) or self.held_kinds[letter]

    def do_break(self, letter: str, kind: str, *words: str) -> None:
        number = next(n for n, effect in self.work[letter].items() if name_of(effect) == kind)
        del self.work[letter][number]
        self._finish(letter, number, Failed(" ".join(words)))

    def do_held(self, letter: str) -> None:
        for effect in self.work[letter].values():
            what = f" {effect.version}.{effect.assignment}" if isinstance(effect, Train) else ""
            self.say(f"{letter} has to {name_of(effect)}{what}")

    def do_rounds(self, *letters: str) -> None:
        for letter in letters or sorted(self.machines):
            if self.machines[letter].peer is None:
                self.say(f"{letter} is down")
                continue
            participant = self.participant(letter)
            held = "holds it" if participant.held else "lacks it"
            duty = (
                f", coordinates: {self.coordinator(letter).phase}" if self.coordinator(letter).active else ""
            )
            self.say(f"{letter} is at version {participant.version}, {held}{duty}")

    # Machines

    def _start(self, machine: Machine) -> None:
        letter = machine.letter
        machine.lives += 1
        state = self.rules.state_zero.root
        contents = self.contents.setdefault(letter, {state: quadratic.STATE_ZERO})
        self.work[letter], self.cancelled[letter] = {}, []
        settings = msgspec.structs.replace(machine.settings, rules=self.rules)
        machine.peer = Peer(authority_of(letter), machine.genesis, settings)
        machine.pending.clear()
        machine.held.clear()
        machine.durable = 0
        entropy = sha256(f"{letter} {machine.lives}".encode()).digest()
        restored = Restored(tuple(machine.disk), entropy, frozenset(contents))
        self._apply(machine, lambda peer, now: peer.start(restored, now))

    def do_crash(self, letter: str) -> None:
        self.work[letter], self.cancelled[letter] = {}, []
        super().do_crash(letter)

    def _tell(self, text: str) -> None:
        """What is on its way and what is written is not told here."""

    def _apply(self, machine: Machine, action: Callable[[Peer, int], list[Effect]]) -> None:
        done: list[Persist] = []
        for effect in action(self._peer(machine), machine.clock):
            match effect:
                case Persist():
                    if machine.manual:
                        machine.pending.append(effect)
                    else:
                        self._write(machine, effect)
                        done.append(effect)
                case Send():
                    if effect.after > machine.durable:
                        assert machine.manual, "a message waits for what nobody writes"
                        machine.held.append(effect)
                    else:
                        self._leave(machine, effect)
                case Announce():
                    self._announce(machine, effect)
                case Emit():
                    self._event(machine, effect)
                case Halt():
                    self.say(f"  {machine.letter} HALTS: {effect.reason}")
                case _:
                    self._ask(machine.letter, effect)
        for persist in done:
            self._complete(machine, persist)

    def _announce(self, machine: Machine, effect: Announce) -> None:
        for other in self.machines:
            linked = peer_id(other) in self._peer(machine).connections
            if linked and (machine.letter, other) not in self.cuts:
                self.queues.setdefault((machine.letter, other), deque()).append(effect.data)

    def _leave(self, machine: Machine, send: Send) -> None:
        message = decode_message(send.data)
        target = letter_of(send.to)
        linked = send.to in self._peer(machine).connections and (machine.letter, target) not in self.cuts
        if linked:
            self.sent.append((machine.letter, target, message))
            self.queues.setdefault((machine.letter, target), deque()).append(send.data)
        if isinstance(message, PlanMessage) and self._first(message.plan.signature):
            plan = message.plan
            given = " ".join(f"{a.index}->{letter_of(a.member)}" for a in plan.assignments)
            self.say(f"  {machine.letter} plans version {plan.version}, revision {plan.revision}: {given}")
        if isinstance(message, AttemptMessage) and self._first(message.attempt.signature):
            attempt = message.attempt
            summed = " ".join(f"{letter_of(e.contributor)}({e.assignment})" for e in attempt.entries)
            self.say(
                f"  {machine.letter} attempts version {attempt.version}, number {attempt.number}: {summed}"
            )

    def _first(self, signature: bytes) -> bool:
        new = signature not in self._told
        self._told.add(signature)
        return new

    def _event(self, machine: Machine, emit: Emit) -> None:
        letter, fields = machine.letter, emit.fields
        if emit.event in SILENT:
            return
        if emit.event == "phase":
            self.say(f"  {letter}: {fields['phase']} of version {fields['version']}")
        elif emit.event == "commit":
            if self._peer(machine).agreement.is_coordinator:
                by = " ".join(letter_of(peer) for peer in fields["contributors"])
                self.say(f"  {letter}: version {fields['version']} is certified, by {by}")
        elif emit.event == "trained":
            self.say(f"  {letter}: trained {fields['version']}.{fields['assignment']}")
        else:
            told = " ".join(f"{key}={self._value(value)}" for key, value in fields.items())
            self.say(f"  {letter}: {emit.event} {told}".rstrip())

    # Work

    def _ask(self, letter: str, effect: Effect) -> None:
        match effect:
            case Train() | Fetch() | Combine() | Step() | Validate():
                self.work[letter][effect.id] = effect
            case Cancel():
                if self.work[letter].pop(effect.effect_id, None) is not None:
                    self.cancelled[letter].append(effect.effect_id)
            case Discard():
                for root in effect.roots:
                    self.contents[letter].pop(root, None)
            case Adopt():
                assert effect.state.root in self.contents[letter], f"{letter} adopts what it has not"
            case Offer():
                pass  # all that is on the disk may be fetched
            case _:
                raise AssertionError(f"{letter} asks for {effect}")

    def _settle(self) -> None:
        for _ in range(MAX_DELIVERIES):
            way = next((way for way in sorted(self.queues) if self.queues[way]), None)
            if way is not None:
                self._deliver(*way)
            elif not self._do_something():
                return
        raise AssertionError("the peers do not stop working")

    def _do_something(self) -> bool:
        for letter in sorted(self.machines):
            if self.machines[letter].peer is None:
                continue
            if self.cancelled[letter]:
                self._finish(letter, self.cancelled[letter].pop(0), Cancelled())
                return True
            held = self.held_kinds.get(letter, ())
            for number, effect in self.work[letter].items():
                if name_of(effect) not in held:
                    del self.work[letter][number]
                    outcome = self._perform(letter, effect)
                    twist = self.twists.get((letter, name_of(effect)))
                    self._finish(letter, number, twist(outcome) if twist else outcome)
                    return True
        return False

    def _finish(self, letter: str, number: int, outcome: Outcome) -> None:
        self._apply(self.machines[letter], lambda peer, now: peer.complete(number, outcome, now))

    def _keep(self, letter: str, data: bytes) -> ContentRef:
        ref = quadratic.ref_of(data)
        self.contents[letter][ref.root] = data
        return ref

    def _perform(self, letter: str, effect: Work) -> Outcome:
        disk = self.contents[letter]
        match effect:
            case Fetch():
                return self._fetch(letter, effect)
            case Train():
                self.trainings.append((letter, effect.version, effect.assignment))
                data, samples, norm, loss = quadratic.train(disk[effect.base.root], effect.ranges)
                content = self._keep(letter, data)
                return Done(Trained(content, samples, quadratic.LOCAL_STEPS, norm, loss, TRAINING_NS))
            case Combine():
                data, norm, finite = quadratic.combine([(disk[r.root], f) for r, f in effect.inputs])
                return Done(Combined(self._keep(letter, data), norm, finite))
            case Step():
                old, result = disk[effect.state.root], disk[effect.result.root]
                data, finite = quadratic.step(old, result, effect.parameters)
                return Done(Stepped(self._keep(letter, data), finite))
            case Validate():
                samples, loss = quadratic.validate(disk[effect.state.root], effect.ranges)
                return Done(Validated(samples, loss, {}))

    def _fetch(self, letter: str, effect: Fetch) -> Outcome:
        """From the first source that is connected, has it, and lets this peer read."""
        me = peer_id(letter)
        bad: dict[str, str] = {}
        for source in effect.sources:
            other = letter_of(source)
            machine = self.machines.get(other)
            data = self.contents.get(other, {}).get(effect.ref.root)
            reached = source in self.peer(letter).connections and machine is not None
            if not reached or machine is None or machine.peer is None or (letter, other) in self.cuts:
                bad[source] = "not connected"
            elif data is None or not machine.peer.may_read(me):
                bad[source] = "does not have it"
            else:
                self._keep(letter, data)
                return Done(FetchReport({source: len(data)}, bad))
        return Failed("no source has it", FetchReport({}, bad))


def started(*words: str, begin: str = "A") -> RoundWorld:
    """A committee (letters and options as in `committee`) whose coordinator has begun its first round."""
    world = RoundWorld()
    world.execute("committee " + " ".join(words))
    if begin:
        world.execute(f"begin {begin}")
    return world


def holding(*holds: str, options: str = "A B C") -> RoundWorld:
    """Likewise, with work held back (as in `hold`) from the beginning."""
    world = RoundWorld()
    world.execute("committee " + options)
    for hold in holds:
        world.execute("hold " + hold)
    world.execute("begin A")
    return world


def collecting() -> RoundWorld:
    """A, B and C have a plan; nobody has finished."""
    world = holding("A train", "B train", "C train")
    assert world.coordinator("A").phase is Phase.LOCAL_TRAINING
    return world


def header(world: RoundWorld, letter: str, assignment: int, **changes: object) -> ContributionHeader:
    """What a liar may sign for the round under way."""
    content = ContentRef(bytes([assignment]) * 32, world.rules.contribution_bytes)
    base = world.rules.state_zero.root
    said = ContributionHeader(1, assignment, 1, peer_id(letter), base, content, 10, 3, 0.5, 1.0, 7)
    return authority_of(letter).sign(msgspec.structs.replace(said, **changes))


def play(blocks: Sequence[Block]) -> list[Block]:
    """The blocks with what the commands really print."""
    world = RoundWorld()
    played = []
    for block in blocks:
        printed: list[str] = []
        for command in block.commands:
            try:
                printed += world.execute(command)
            except Exception as error:
                error.add_note(f"in the script's command: {command}")
                raise
        played.append(Block(block.comments, block.commands, (printed or ["ok"]) if block.commands else []))
    return played


def scripts() -> list[Path]:
    return sorted((Path(__file__).parent / "scripts" / "rounds").glob("*.txt"))


__all__ = ["LETTERS", "RoundWorld", "collecting", "header", "holding", "play", "scripts", "started"]
