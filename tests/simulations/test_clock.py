"""A machine's own clock."""

from hypothesis import given
from hypothesis import strategies as st

from simulations.clock import Clock

TIMES = st.integers(0, 1 << 50)
DRIFTS = st.integers(-100_000, 100_000)


@given(offset=TIMES, drift=DRIFTS, since=TIMES, reading=TIMES)
def test_when_is_the_first_moment_at_which_the_clock_shows_the_reading(
    offset: int, drift: int, since: int, reading: int
) -> None:
    clock = Clock(offset, drift, since)
    at = clock.when(offset + reading)
    assert clock.read(at) >= offset + reading
    assert clock.read(at - 1) < offset + reading


@given(offset=TIMES, drifts=st.lists(st.tuples(DRIFTS, st.integers(0, 1 << 40)), max_size=5))
def test_a_change_of_drift_never_sets_the_clock_back(offset: int, drifts: list[tuple[int, int]]) -> None:
    clock, now = Clock(offset, 0, 0), 0
    shown = clock.read(now)
    for drift, passed in drifts:
        now += passed
        clock.drift(drift, now)
        assert clock.read(now) >= shown
        shown = clock.read(now)


def test_a_fast_clock_gains_what_its_drift_says() -> None:
    assert Clock(7, 100_000, 0).read(1_000_000_000) == 7 + 1_100_000_000
