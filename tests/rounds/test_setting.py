"""What rounds stand on: the rules that a run's config and pins amount to, and effects answered exactly once."""

from hashlib import sha256

import msgspec
import pytest

from p2pcoord.aggregation.contribution import MAX_COUNT
from p2pcoord.aggregation.mean import Mean
from p2pcoord.consensus.record import Genesis
from p2pcoord.content import ContentRef
from p2pcoord.effects import Cancel, Cancelled, Done, Outcome, Validate
from p2pcoord.errors import LocalError
from p2pcoord.rounds.setting import MAX_IN_FLIGHT, Setting, rules_of
from p2pcoord.run_config import RunConfig, derive_seed, found_run, run_id
from p2pcoord.run_file import parse_run_file
from p2pcoord.synchronization.bsp import StragglerPolicy
from p2pcoord.workload import DataPins, WorkloadPins
from simulations import quadratic
from tests.round_runner import started
from tests.script_runner import peer_id

STATE = ContentRef(sha256(b"state").digest(), 100)
DATASET = ContentRef(sha256(b"dataset").digest(), 7)


def config(text: str = "") -> RunConfig:
    return found_run(parse_run_file(text), founder="12D3KooWFounder", nonce=bytes(16), workload_spec="text")


def data(length: int) -> DataPins:
    return DataPins(length, (bytes(32),))


def pins(train: DataPins | None = None, validation: DataPins | None = None) -> WorkloadPins:
    return WorkloadPins(quadratic.LAYOUT, bytes(32), bytes(32), train, validation)


def genesis(**changes: object) -> Genesis:
    return msgspec.structs.replace(Genesis(b"", "founder", b"", STATE), **changes)


def test_the_rules_are_what_the_run_file_says() -> None:
    said = config(
        """
        [strategy]
        aggregation_rounds = 7
        [synchronization]
        barrier_timeout_s = 2.5
        straggler_policy = "extend"
        [participation]
        minimum_share = 0.75
        minimum_members = 3
        [aggregation]
        weighted = false
        clip_norm = 2.0
        fan_out = 5
        """
    )
    rules = rules_of(said, pins(data(100), data(40)), genesis())
    assert rules.rounds == 7
    assert rules.barrier_ns == 2_500_000_000
    assert rules.straggler_policy is StragglerPolicy.EXTEND
    assert (rules.minimum_share, rules.minimum_members) == (0.75, 3)
    assert rules.mean == Mean(weighted=False, clip_norm=2.0)
    assert rules.fan_out == 5
    assert (rules.train_length, rules.validation_length) == (100, 40)
    assert rules.contribution_bytes == quadratic.LAYOUT.contribution_bytes
    assert rules.state_zero == STATE
    assert rules.seed == derive_seed(run_id(said), "rounds")


def test_own_data_is_not_dealt() -> None:
    rules = rules_of(config(), pins(), genesis())
    assert (rules.train_length, rules.validation_length) == (0, 0)


def test_the_founders_data_and_frozen_parameters_are_kept_for_as_long_as_the_run_lasts() -> None:
    assert rules_of(config(), pins(), genesis()).pinned == frozenset()
    assert rules_of(config(), pins(), genesis(dataset=DATASET)).pinned == {DATASET.root}
    assert rules_of(config(), pins(), genesis(dataset=DATASET, frozen=STATE)).pinned == {
        DATASET.root,
        STATE.root,
    }


def test_a_genesis_without_version_0_has_no_rules() -> None:
    with pytest.raises(LocalError):
        rules_of(config(), pins(), genesis(state=None))


def test_all_peers_compute_the_same_scalars_of_the_step() -> None:
    one, other = (rules_of(config(), pins(), genesis()) for _ in range(2))
    assert [one.step_parameters(v) for v in (1, 2, 99)] == [other.step_parameters(v) for v in (1, 2, 99)]


# Effects in flight


def setting() -> Setting:
    return started("A", begin="").participant("A").setting


def effect(of: Setting) -> Validate:
    return Validate(of.outbox.new_id(), STATE, ())


def test_an_effect_is_answered_once_to_who_asked_for_it() -> None:
    of = setting()
    heard: list[tuple[str, Outcome, int]] = []
    first = of.start(effect(of), lambda outcome, now: heard.append(("first", outcome, now)))
    second = of.start(effect(of), lambda outcome, now: heard.append(("second", outcome, now)))
    assert of.complete(second, Done(2), 20)
    assert not of.complete(second, Done(2), 21)
    assert of.complete(first, Done(1), 30)
    assert heard == [("second", Done(2), 20), ("first", Done(1), 30)]
    assert not of.complete(999_999, Done(), 0)


def test_a_cancelled_effect_is_still_answered_and_its_outcome_is_nobodys() -> None:
    of = setting()
    heard: list[Outcome] = []
    number = of.start(effect(of), lambda outcome, now: heard.append(outcome))
    of.outbox.take()
    of.cancel(number)
    assert of.outbox.take() == [Cancel(number)]
    assert of.complete(number, Cancelled(), 1)
    assert heard == []
    of.cancel(number)
    assert of.outbox.take() == []


def test_effects_in_flight_are_bounded() -> None:
    of = setting()
    numbers = [of.start(effect(of), lambda outcome, now: None) for _ in range(MAX_IN_FLIGHT)]
    with pytest.raises(LocalError):
        of.start(effect(of), lambda outcome, now: None)
    of.cancel(numbers[0])  # which is still to be answered
    with pytest.raises(LocalError):
        of.start(effect(of), lambda outcome, now: None)
    of.complete(numbers[0], Cancelled(), 0)
    of.start(effect(of), lambda outcome, now: None)


def test_who_coordinates_a_term_is_what_the_log_says() -> None:
    world = started("A B C")
    of = world.participant("B").setting
    assert of.coordinates(peer_id("A"), 2)
    assert of.coordinates(peer_id("A"), 1)
    assert not of.coordinates(peer_id("B"), 2)
    assert not of.coordinates(peer_id("A"), 3)
    assert of.newest_opening.coordinator == peer_id("A")
    assert of.newest_opening.term == 2


def test_the_most_samples_that_training_counts_follow_from_the_run_and_what_was_dealt() -> None:
    thousand = data(1000)

    def most(text: str, dealt: int, train: DataPins | None = thousand) -> int:
        return rules_of(config(text), pins(train), genesis()).most_samples(dealt)

    assert most("[strategy]\nlocal_epochs = 3", 50) == 150
    assert most("[strategy]\nlocal_epochs = 3", 0) == 3000
    assert most("[strategy]\nlocal_steps = 20\n[local]\nbatch_size = 8", 50) == 160
    assert most("[strategy]\nlocal_steps = 20\n[local]\nbatch_size = 80", 50) == 1000
    assert (
        most("[strategy]\nlocal_steps = 20", 50) == 1000
    )  # the batch is the workload's, and no larger than 50
    assert most("[strategy]\nlocal_epochs = 3", 0, None) == MAX_COUNT
    assert most("[strategy]\nlocal_steps = 20", 0, None) == MAX_COUNT
    assert most("[strategy]\nlocal_steps = 20\n[local]\nbatch_size = 8", 0, None) == 160
