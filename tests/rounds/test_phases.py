"""The table of phases: what it says of itself, and that everything in it can be reached and left."""

from itertools import pairwise

from p2pcoord.rounds.phases import COLLECTING, FOLLOWS, RECONFIGURABLE, Phase

MAIN_LINE = list(Phase)


def reachable(start: Phase) -> set[Phase]:
    seen, todo = {start}, [start]
    while todo:
        for phase in FOLLOWS[todo.pop()] - seen:
            seen.add(phase)
            todo.append(phase)
    return seen


def test_every_phase_says_what_follows_it_and_every_phase_can_be_reached_from_every_other() -> None:
    assert set(FOLLOWS) == set(Phase)
    assert all(reachable(phase) == set(Phase) for phase in Phase)


def test_the_eight_phases_follow_each_other_in_the_order_of_the_specification() -> None:
    assert len(MAIN_LINE) == 8
    assert MAIN_LINE[0] is Phase.INITIALIZATION
    assert MAIN_LINE[-1] is Phase.COMPLETED
    for before, after in pairwise(MAIN_LINE):
        assert after in FOLLOWS[before]
    assert FOLLOWS[Phase.COMPLETED] == {Phase.INITIALIZATION}


def test_a_round_is_completed_from_validation_only() -> None:
    assert [phase for phase in Phase if Phase.COMPLETED in FOLLOWS[phase]] == [Phase.VALIDATION]


def test_the_plan_as_a_whole_may_fail_in_every_phase_and_no_phase_follows_itself() -> None:
    for phase in MAIN_LINE[1:]:
        assert Phase.INITIALIZATION in FOLLOWS[phase]
    assert all(phase not in FOLLOWS[phase] for phase in Phase)


def test_a_new_attempt_collects_again_from_every_phase_after_the_collection_but_the_last() -> None:
    after = MAIN_LINE[MAIN_LINE.index(Phase.GRADIENT_COLLECTION) + 1 : -1]
    assert all(Phase.GRADIENT_COLLECTION in FOLLOWS[phase] for phase in after)


def test_the_committee_may_change_up_to_the_collection_and_not_once_an_attempt_rests_on_it() -> None:
    at = MAIN_LINE.index(Phase.GRADIENT_COLLECTION)
    assert set(MAIN_LINE[: at + 1]) == RECONFIGURABLE


def test_what_is_collected_is_collected_before_the_attempt() -> None:
    start, end = MAIN_LINE.index(Phase.TASK_DISTRIBUTION), MAIN_LINE.index(Phase.AGGREGATION)
    assert set(MAIN_LINE[start:end]) == COLLECTING
