"""The run's global state follows certified rounds."""

from p2pcoord.consensus.record import Round
from p2pcoord.gossip.records import PeerRecord
from p2pcoord.synchronization.state_tracker import LOSS_HISTORY, LocalState, StateTracker, local_state


def certified(version: int, **metrics: float) -> Round:
    state = version.to_bytes(32, "big")
    return Round(version, bytes(32), bytes(32), (), bytes(32), state, 8, tuple(sorted(metrics.items())))


def tracker(*rounds: Round) -> StateTracker:
    result = StateTracker(b"zero")
    for body in rounds:
        result.certified(body)
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


def test_a_members_local_state_is_what_its_newest_record_says() -> None:
    record = PeerRecord("a", 1, 1, "name", local_step=7, last_sync=3, gradient_norm=0.5, local_loss=1.25)
    assert local_state(record) == LocalState(local_step=7, last_sync=3, gradient_norm=0.5, local_loss=1.25)


def test_a_member_that_said_nothing_yet_is_at_the_beginning() -> None:
    beginning = LocalState(local_step=0, last_sync=0, gradient_norm=None, local_loss=None)
    assert local_state(None) == local_state(PeerRecord("a", 1, 1, "name")) == beginning
