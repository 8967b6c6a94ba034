"""When a round closes under bulk synchrony: the whole rule as a table."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.synchronization.bsp import Closing, StragglerPolicy, closing

LEAVE_OUT, EXTEND, REASSIGN = StragglerPolicy.LEAVE_OUT, StragglerPolicy.EXTEND, StragglerPolicy.REASSIGN


@pytest.mark.parametrize(
    ("arrived", "waited", "extensions", "policy", "decision"),
    [
        # all are there: no policy waits
        (4, 0, 0, LEAVE_OUT, Closing.CLOSE),
        (4, 0, 0, EXTEND, Closing.CLOSE),
        (4, 0, 0, REASSIGN, Closing.CLOSE),
        # some are missing, and the barrier's time is not over
        (3, 9, 0, LEAVE_OUT, Closing.WAIT),
        (3, 9, 0, EXTEND, Closing.WAIT),
        (3, 9, 1, REASSIGN, Closing.WAIT),
        (0, 9, 0, LEAVE_OUT, Closing.WAIT),
        # the time is over, and enough are there
        (3, 10, 0, LEAVE_OUT, Closing.CLOSE),
        (3, 10, 0, EXTEND, Closing.EXTEND),
        (3, 10, 0, REASSIGN, Closing.REASSIGN),
        # the one extension is over too
        (3, 10, 1, EXTEND, Closing.CLOSE),
        (3, 10, 1, REASSIGN, Closing.CLOSE),
        # exactly the minimum share is enough
        (2, 10, 0, LEAVE_OUT, Closing.CLOSE),
        # too few: what is missing goes to others, whatever the policy and however often
        (1, 10, 0, LEAVE_OUT, Closing.REASSIGN),
        (1, 10, 0, EXTEND, Closing.REASSIGN),
        (1, 10, 9, EXTEND, Closing.REASSIGN),
        (0, 10, 9, LEAVE_OUT, Closing.REASSIGN),
    ],
)
def test_a_round_of_four_with_a_barrier_of_10_and_a_minimum_of_half(
    arrived: int, waited: int, extensions: int, policy: StragglerPolicy, decision: Closing
) -> None:
    assert (
        closing(
            assigned=4,
            arrived=arrived,
            waited_ns=waited,
            barrier_ns=10,
            extensions=extensions,
            policy=policy,
            minimum_share=0.5,
        )
        is decision
    )


@given(
    assigned=st.integers(1, 50),
    share=st.floats(0, 1),
    waited=st.integers(0, 20),
    extensions=st.integers(0, 3),
    policy=st.sampled_from(StragglerPolicy),
    data=st.data(),
)
def test_a_round_closes_with_all_or_after_the_barrier_with_at_least_one_and_the_minimum_share(
    assigned: int, share: float, waited: int, extensions: int, policy: StragglerPolicy, data: st.DataObject
) -> None:
    arrived = data.draw(st.integers(0, assigned))
    decision = closing(
        assigned=assigned,
        arrived=arrived,
        waited_ns=waited,
        barrier_ns=10,
        extensions=extensions,
        policy=policy,
        minimum_share=share,
    )
    if decision is Closing.CLOSE:
        assert arrived == assigned or (waited >= 10 and arrived >= 1 and arrived >= share * assigned)
    if waited < 10:
        assert decision in (Closing.WAIT, Closing.CLOSE)
    if waited >= 10:
        assert decision is not Closing.WAIT
    if extensions and arrived >= max(1, share * assigned):
        assert decision in (Closing.WAIT, Closing.CLOSE)
