"""Phi accrual: what it calls silence, what it does not, and that its numbers hold far out."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.errors import LocalError
from p2pcoord.gossip.failure_detector import (
    MAX_INTERVAL_NS,
    MILLISECOND_NS,
    SECOND_NS,
    FailureDetector,
    LinkHeard,
    LinkSilent,
    PhiAccrual,
    PhiSettings,
    phi_of_deviation,
)

FAST = 150 * MILLISECOND_NS


def steady(link: PhiAccrual, interval: int, count: int, now: int) -> int:
    for _ in range(count):
        now += interval
        link.heartbeat(interval, now)
    return now


@pytest.mark.parametrize(
    ("deviation", "phi"), [(0.0, 0.30103), (3.0, 2.86967), (5.61200, 8.0), (10.0, 23.11805)]
)
def test_phi_is_the_normal_distributions_tail(deviation, phi):
    assert phi_of_deviation(deviation) == pytest.approx(phi, abs=2e-4)


@given(st.floats(-30, 1e6), st.floats(0, 1e6))
def test_phi_grows_with_silence_and_is_never_infinite(deviation, more):
    low, high = phi_of_deviation(deviation), phi_of_deviation(deviation + more)
    assert 0 <= low <= high < math.inf


def test_the_series_meets_the_exact_value_where_it_begins():
    edge = 5.0 * math.sqrt(2)
    for deviation in (edge - 1e-9, edge + 1e-9, 20.0, 35.0):
        exact = -math.log10(0.5 * math.erfc(deviation / math.sqrt(2)))
        assert phi_of_deviation(deviation) == pytest.approx(exact, abs=1e-4)
    assert phi_of_deviation(200) < phi_of_deviation(200.001)  # erfc underflows at 38


def test_a_frozen_peer_on_a_fast_link_is_found_within_two_seconds():
    link = PhiAccrual(0, FAST, PhiSettings())
    now = steady(link, FAST, 100, 0)
    assert link.phi(now) < 0.01
    assert SECOND_NS < link.deadline() - now < 2 * SECOND_NS
    assert link.phi(link.deadline() - 2) < 8 <= link.phi(link.deadline())


def test_a_slower_stated_interval_does_not_look_like_failure_and_a_faster_one_is_held_to_at_once():
    link = PhiAccrual(0, FAST, PhiSettings())
    now = steady(link, FAST, 100, 0)
    link.heartbeat(5 * SECOND_NS, now)
    assert link.phi(now + 5 * SECOND_NS) < 1
    now = steady(link, 5 * SECOND_NS, 3, now)
    link.heartbeat(FAST, now)
    assert link.deadline() - now < 2 * SECOND_NS


def test_nobody_buys_eternal_life_by_stating_an_endless_interval():
    link = PhiAccrual(0, FAST, PhiSettings())
    link.heartbeat(10**15, FAST)
    assert link.deadline() < 3 * MAX_INTERVAL_NS


def test_a_restless_link_is_judged_later_than_a_steady_one():
    rng = random.Random(5)
    restless, calm = PhiAccrual(0, FAST, PhiSettings()), PhiAccrual(0, FAST, PhiSettings())
    now = 0
    for _ in range(200):
        now += FAST + rng.randrange(900 * MILLISECOND_NS)
        restless.heartbeat(FAST, now)
    calm_now = steady(calm, FAST, 200, 0)
    assert restless.deadline() - now > calm.deadline() - calm_now + SECOND_NS


def test_a_link_never_heard_is_found_by_the_initial_estimate():
    detector = FailureDetector()
    detector.watch("a", FAST, 0)
    due = detector.next_deadline()
    assert due is not None
    assert due < 2 * SECOND_NS
    assert detector.tick(due - 1) == []
    assert detector.tick(due) == [LinkSilent("a")]
    assert detector.tick(due + SECOND_NS) == []


def test_an_outage_is_no_sample_of_the_rhythm_before_it():
    detector = FailureDetector()
    detector.watch("a", FAST, 0)
    now = 0
    for _ in range(50):
        now += FAST
        detector.heartbeat("a", FAST, now)
    before = detector.next_deadline() - now
    assert detector.tick(detector.next_deadline()) == [LinkSilent("a")]
    now += 60 * SECOND_NS
    assert detector.heartbeat("a", FAST, now) == [LinkHeard("a")]
    assert detector.next_deadline() - now == before


def test_a_gap_of_our_own_is_no_sample_and_fails_nobody():
    detector = FailureDetector()
    now = 0
    for peer in "ab":
        detector.watch(peer, FAST, now)
    for _ in range(50):
        now += FAST
        for peer in "ab":
            detector.heartbeat(peer, FAST, now)
    before = detector.next_deadline() - now
    now += 3600 * SECOND_NS
    assert detector.tick(now) == []
    detector.heartbeat("a", FAST, now + 1)
    assert detector.phi("b", now + FAST) < 0.1
    assert detector.next_deadline() == now + before  # b, waited for anew
    detector.heartbeat("b", FAST, now + 1)
    assert detector.next_deadline() == now + 1 + before


@given(st.lists(st.integers(0, 3 * SECOND_NS), min_size=1, max_size=60), st.integers(1, 15))
def test_the_deadline_is_where_phi_reaches_the_threshold(waits, threshold):
    link = PhiAccrual(0, FAST, PhiSettings(threshold=float(threshold), window=20))
    now = 0
    for wait in waits:
        now += wait
        link.heartbeat(FAST, now)
    due = link.deadline()
    assert link.phi(due + MILLISECOND_NS) >= threshold
    assert link.phi(due - MILLISECOND_NS) < threshold


def test_links_are_bounded_and_unwatched_ones_say_nothing():
    detector = FailureDetector()
    for index in range(1024):
        detector.watch(str(index), FAST, 0)
    with pytest.raises(LocalError):
        detector.watch("one more", FAST, 0)
    assert detector.heartbeat("stranger", FAST, 1) == []
    assert detector.phi("stranger", 10**12) == 0.0
    for index in range(1024):
        detector.unwatch(str(index))
    assert detector.next_deadline() is None
