"""What both sides of a round stand on: the run's rules, and this peer's place in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from p2pcoord.aggregation.contribution import MAX_COUNT
from p2pcoord.aggregation.mean import Mean
from p2pcoord.consensus.agreement import Agreement
from p2pcoord.consensus.evidence import SignedStatement
from p2pcoord.consensus.record import Exclusion, Genesis
from p2pcoord.consensus.statements import Header
from p2pcoord.content import ContentRef
from p2pcoord.effects import Cancel, Effect, Outcome
from p2pcoord.errors import LocalError
from p2pcoord.identity import Authority
from p2pcoord.optimization.learning_rate import Constant, learning_rate
from p2pcoord.optimization.optimizer import Optimizer, StepParameters, configured
from p2pcoord.outbox import Outbox
from p2pcoord.rounds.participation import Roster
from p2pcoord.run_config import RunConfig, derive_seed, run_id
from p2pcoord.synchronization.bsp import StragglerPolicy
from p2pcoord.workload import WorkloadPins

# Effects a peer has in flight at a time. Fetches dominate: fan_out children and a state; 256 is far above any honest need.
MAX_IN_FLIGHT = 256


class Rules(msgspec.Struct, frozen=True):
    """The run's agreed rules, as rounds need them (from the RunConfig and the pins in genesis)."""

    rounds: int
    barrier_ns: int
    straggler_policy: StragglerPolicy
    minimum_share: float
    minimum_members: int
    mean: Mean
    fan_out: int
    optimizer: Optimizer
    learning_rate: Callable[[int], float]
    """Version -> the step's learning rate."""
    train_length: int
    """Training samples that are dealt; 0 in mode own."""
    validation_length: int
    contribution_bytes: int
    state_zero: ContentRef
    seed: int
    pinned: frozenset[bytes] = frozenset()
    """Roots that are kept for as long as the run lasts: the founder's data set and frozen parameters."""
    local_epochs: int = 1
    local_steps: int | None = None
    batch_size: int | None = None
    """What the run file says; None: the workload's own, which nobody else knows."""

    def most_samples(self, dealt: int) -> int:
        """How many samples training may count, with repetition, that was dealt so many (all of them when it is not known
        which; of own data nobody knows how much there is). A time limit makes it fewer."""
        dealt = dealt or self.train_length
        if self.local_steps is None:
            return min(self.local_epochs * dealt, MAX_COUNT) if dealt else MAX_COUNT
        batch = min(self.batch_size or dealt, dealt or MAX_COUNT)  # no batch has more than there is
        return min(self.local_steps * batch, MAX_COUNT) if batch else MAX_COUNT

    def step_parameters(self, version: int) -> StepParameters:
        return self.optimizer.parameters(version, self.learning_rate(version))


def rules_of(config: RunConfig, pins: WorkloadPins, genesis: Genesis) -> Rules:
    """The rules that a run's config and pins amount to. Raises LocalError for a genesis without version 0."""
    if genesis.state is None:
        raise LocalError("genesis names no version 0")
    rate = config.optimization.learning_rate
    return Rules(
        rounds=config.strategy.aggregation_rounds,
        barrier_ns=int(config.synchronization.barrier_timeout_s * 1e9),
        straggler_policy=StragglerPolicy(config.synchronization.straggler_policy),
        minimum_share=config.participation.minimum_share,
        minimum_members=config.participation.minimum_members,
        mean=Mean(config.aggregation.weighted, config.aggregation.clip_norm),
        fan_out=config.aggregation.fan_out,
        optimizer=configured(config.optimization),
        learning_rate=lambda version: learning_rate(Constant(), rate, version - 1),
        train_length=pins.train.length if pins.train else 0,
        validation_length=pins.validation.length if pins.validation else 0,
        contribution_bytes=pins.layout.contribution_bytes,
        state_zero=genesis.state,
        seed=derive_seed(run_id(config), "rounds"),
        pinned=frozenset(ref.root for ref in (genesis.dataset, genesis.frozen) if ref is not None),
        local_epochs=config.strategy.local_epochs,
        local_steps=config.strategy.local_steps,
        batch_size=config.local.batch_size,
    )


class Others(Protocol):
    """The other peers, as rounds see them (`neighbours.py`)."""

    def alive(self, peer: str) -> bool:
        """Whether a peer is not known to be gone, by what the detectors know now: its work is waited for."""
        ...

    def fit(self, peer: str) -> bool:
        """Whether it is alive beyond suspicion and can be reached: new work, and bytes, may rest on it."""
        ...

    def link(self, peer: str, now: int) -> bool:
        """Whether there is a connection to it; if not, it is dialled."""
        ...

    def leaf(self, peer: str) -> bool:
        """Whether nobody could dial it, by what it says of itself."""
        ...

    def apart(self, one: str, other: str) -> bool:
        """Whether the two can have no connection, by what they say of themselves."""
        ...

    def send(self, peer: str, message: msgspec.Struct, now: int) -> None: ...


class Exclusions(Protocol):
    """Who is put out, and why (`admissions.py`)."""

    def see(self, statement: SignedStatement) -> None:
        """A statement was checked: it may be evidence together with another."""
        ...

    def exclude(self, exclusion: Exclusion) -> None: ...


class Interruptible(Protocol):
    """What a coordinator is at, besides its care for members and committee."""

    @property
    def idle(self) -> bool:
        """Nothing is lost by handing the duty over now."""
        ...

    @property
    def reconfigurable(self) -> bool:
        """Records other than its own may be ordered now."""
        ...


class Care(Protocol):
    """The coordinator's care for members, committee and rotation (`duty.py`)."""

    def between_rounds(self, rounds: Interruptible, now: int) -> bool:
        """Has its turn: what it orders is certified before the next round. False: no round may begin now."""
        ...


Then = Callable[[Outcome, int], None]


class Setting:
    """This peer's place: identity, log, roster, outbox, the other peers, and its effects in flight."""

    def __init__(
        self,
        authority: Authority,
        agreement: Agreement,
        roster: Roster,
        outbox: Outbox,
        rules: Rules,
        *,
        incarnation: int,
        neighbours: Others,
        admissions: Exclusions,
        duty: Care,
    ) -> None:
        self.authority = authority
        self.me = authority.peer_id
        self.agreement = agreement
        self.voter = agreement.voter
        self.replication = agreement.replication
        self.roster = roster
        self.outbox = outbox
        self.rules = rules
        self.incarnation = incarnation
        self.neighbours = neighbours
        self.admissions = admissions
        self.duty = duty
        self._then: dict[int, Then] = {}

    @property
    def coordinator(self) -> str:
        """Who opened the newest term in this peer's log."""
        return self.newest_opening.coordinator

    @property
    def newest_opening(self) -> Header:
        """The opening of the newest term in this peer's log."""
        opening = self.voter.ledger.opening(self.voter.ledger.last.term)
        if opening is None:
            raise LocalError("a log without the opening of its last term")
        return opening.header

    def coordinates(self, peer: str, term: int) -> bool:
        """Whether this log says that `peer` opened `term`."""
        return self.voter.ledger.coordinator_of(term) == peer

    @property
    def busy(self) -> bool:
        """Half of what may be in flight is: nothing is begun that another asks for."""
        return 2 * len(self._then) >= MAX_IN_FLIGHT

    def start(self, effect: Effect, then: Then) -> int:
        """Puts an effect that will be answered to `then`, exactly once, in this life."""
        if len(self._then) >= MAX_IN_FLIGHT:
            raise LocalError(f"{MAX_IN_FLIGHT} effects in flight")
        number: int = effect.id  # type: ignore[attr-defined]  # effects that are answered have an id
        self._then[number] = then
        self.outbox.put(effect)
        return number

    def cancel(self, effect_id: int) -> None:
        if effect_id in self._then:
            self._then[effect_id] = _ignore
            self.outbox.put(Cancel(effect_id))

    def complete(self, effect_id: int, outcome: Outcome, now: int) -> bool:
        then = self._then.pop(effect_id, None)
        if then is None:
            return False
        then(outcome, now)
        return True


def _ignore(outcome: Outcome, now: int) -> None:
    """A cancelled effect's outcome."""
