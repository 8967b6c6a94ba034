"""The run's global state follows certified rounds."""

import msgspec

from p2pcoord.consensus.record import Round, Totals
from p2pcoord.gossip.records import PeerRecord
from p2pcoord.synchronization.state_tracker import (
    LOSS_HISTORY,
    MAX_STEPS,
    LocalState,
    StateTracker,
    local_state,
    totals_after,
)


def certified(version: int, **metrics: float) -> Round:
    state = version.to_bytes(32, "big")
    return Round(version, bytes(32), bytes(32), (), bytes(32), state, 8, tuple(sorted(metrics.items())))


def tracker(*rounds: Round, since: int = 0) -> StateTracker:
    """After these rounds, each with the totals that follow; of the first `since` it has not seen the bodies."""
    result, totals = StateTracker(b"zero"), Totals()
    for body in rounds:
        totals = totals_after(totals, body.version, body.state, dict(body.metrics))
        if body.version > since:
            result.certified(msgspec.structs.replace(body, totals=totals))
    return result


def test_before_the_first_round_the_state_is_version_0() -> None:
    state = tracker().state()
    assert (state.model_version, state.training_step, state.loss_history) == (0, 0, ())
    assert (state.best_checkpoint, state.best_version) == (b"zero", 0)


def test_the_training_step_is_the_sum_of_all_local_steps_certified() -> None:
    state = tracker(
        certified(1, training_steps=30, loss=2.0), certified(2, training_steps=12, loss=1.0)
    ).state()
    assert state.model_version == 2
    assert state.training_step == 42
    assert state.loss_history == ((1, 2.0), (2, 1.0))


def test_the_best_checkpoint_is_the_state_with_the_lowest_validation_loss_and_of_equals_one_stays() -> None:
    state = tracker(certified(1, loss=3.0), certified(2, loss=1.0), certified(3, loss=2.0)).state()
    assert (state.best_version, state.best_checkpoint) == (2, (2).to_bytes(32, "big"))
    equal = tracker(certified(1, loss=1.0), certified(2, loss=1.0)).state()
    assert equal.best_version == 1


def test_without_validation_data_the_training_loss_stands_in_and_without_any_loss_nothing_is_noted() -> None:
    state = tracker(
        certified(1, training_loss=4.0), certified(2, training_loss=9.0, loss=3.0), certified(3)
    ).state()
    assert state.loss_history == ((1, 4.0), (2, 3.0))
    assert state.best_version == 2
    assert state.model_version == 3


def test_the_history_is_bounded_and_forgets_the_oldest_but_the_best_is_remembered() -> None:
    rounds = [certified(1, loss=0.5)]
    rounds += [certified(v, loss=1.0) for v in range(2, LOSS_HISTORY + 3)]
    state = tracker(*rounds).state()
    assert len(state.loss_history) == LOSS_HISTORY
    assert state.loss_history[0][0] == 3
    assert state.best_version == 1


def test_all_that_certified_the_same_rounds_have_the_same_state() -> None:
    rounds = [certified(v, loss=1 / v, training_steps=v) for v in range(1, 6)]
    assert tracker(*rounds).state() == tracker(*rounds).state()


def test_who_has_not_the_bodies_of_old_rounds_has_the_same_totals_and_a_shorter_history() -> None:
    rounds = [certified(v, loss=abs(v - 3.5), training_steps=10) for v in range(1, 9)]
    all_of_it, late = tracker(*rounds).state(), tracker(*rounds, since=6).state()
    assert late == msgspec.structs.replace(all_of_it, loss_history=all_of_it.loss_history[6:])
    assert (late.training_step, late.best_version) == (80, 3)


def test_steps_are_counted_up_to_a_limit_whatever_a_member_claims() -> None:
    rounds = [certified(v, training_steps=1e300) for v in range(1, 4)]
    assert tracker(*rounds).state().training_step == MAX_STEPS


def test_a_members_local_state_is_what_its_newest_record_says() -> None:
    record = PeerRecord("a", 1, 1, "name", local_step=7, last_sync=3, gradient_norm=0.5, local_loss=1.25)
    assert local_state(record) == LocalState(local_step=7, last_sync=3, gradient_norm=0.5, local_loss=1.25)


def test_a_member_that_said_nothing_yet_is_at_the_beginning() -> None:
    beginning = LocalState(local_step=0, last_sync=0, gradient_norm=None, local_loss=None)
    assert local_state(None) == local_state(PeerRecord("a", 1, 1, "name")) == beginning
