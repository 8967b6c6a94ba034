"""Who stands out over rounds: scores grow with the difference and not with one bad day, and nobody hides by moving the scale."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.aggregation import aggregate, measure
from p2pcoord.aggregation.outliers import (
    MAX_SCORE,
    MEASURES,
    Detector,
    History,
    Measured,
    measured_from_gram,
)
from p2pcoord.errors import LocalError, UserError
from p2pcoord.wire import decode, encode

seeds = st.integers(0, 2**32 - 1)
NAMES = [f"peer{at}" for at in range(9)]


def rounds(seed: int, count: int, change=lambda number, name, found: found) -> History:
    """Nine members that differ by about a tenth, whose updates shrink; `change` may change what one of them shows."""
    random = np.random.default_rng(seed)
    detector, history = Detector(), History()
    for number in range(count):
        size = 10.0 * 0.8**number
        measured = {}
        for name in NAMES:
            noise = (random.standard_normal(3) * 0.1).tolist()
            found = Measured(
                size * (1 + noise[0]), size * (0.7 + 0.7 * noise[1]), max(-1.0, min(1.0, 0.6 + noise[2]))
            )
            measured[name] = change(number, name, found)
        history = detector.observe(history, measured)
    return history


def of_first(**changes):
    def change(number, name, found):
        if name != NAMES[0]:
            return found
        return Measured(
            *(changes.get(field, lambda value: value)(getattr(found, field)) for field in MEASURES)
        )

    return change


@given(seeds)
def test_who_is_like_the_others_is_not_proposed(seed):
    assert Detector().proposals(rounds(seed, 10)) == ()


@given(
    seeds,
    st.sampled_from(
        [
            {"norm": lambda norm: norm * 5},
            {"norm": lambda norm: norm * 0.01},
            {"distance": lambda distance: distance * 5},
            {"cosine": lambda cosine: -cosine},
        ]
    ),
)
def test_who_stands_out_round_after_round_is_proposed_and_nobody_else(seed, changes):
    history = rounds(seed, 10, of_first(**changes))
    assert Detector().proposals(history) == (NAMES[0],)
    (named,) = changes
    scores = Detector(measures=(named,)).scores(history)
    assert max(scores, key=scores.get) == NAMES[0]
    others = Detector(measures=tuple(set(MEASURES) - {named}))
    assert others.proposals(history) == ()


def test_nearer_and_more_aligned_than_others_is_no_outlier():
    history = rounds(1, 10, of_first(distance=lambda distance: 0.0, cosine=lambda cosine: 1.0))
    assert Detector(measures=("distance", "cosine")).scores(history)[NAMES[0]] == 0


def test_a_minority_of_bad_rounds_accuses_nobody():
    def change(number, name, found):
        bad = name == NAMES[0] and number % 3 == 2
        return Measured(1e6, 1e6, -1.0) if bad else found

    assert Detector().proposals(rounds(2, 10, change)) == ()


@given(seeds, st.floats(1, 1e30))
def test_fewer_than_half_move_neither_centre_nor_scale(seed, size):
    def change(number, name, found):
        return Measured(found.norm * (1 + size), found.distance, found.cosine) if name in NAMES[:3] else found

    detector = Detector(measures=("norm",))
    scores = detector.scores(rounds(seed, 10, change))
    assert all(scores[name] < detector.threshold for name in NAMES[3:])
    assert set(detector.proposals(rounds(seed, 10, change))) <= set(NAMES[:3])


def test_no_proposal_before_a_contributor_was_seen_often_enough_and_none_of_who_is_gone():
    change = of_first(norm=lambda norm: norm * 50)
    for count, expected in ((0, ()), (1, ()), (2, ()), (3, (NAMES[0],))):
        assert Detector().proposals(rounds(3, count, change)) == expected
    history = rounds(3, 5, change)
    left = {name: found for name, found in history.rounds[-1].items() if name != NAMES[0]}
    assert Detector().proposals(Detector().observe(history, left)) == ()


def test_history_is_a_window_and_travels():
    history = rounds(4, 25)
    assert len(history.rounds) == Detector().window
    assert decode(encode(history), History) == history
    assert Detector().observe(history, {}).rounds[:-1] == history.rounds[1:]


def test_where_all_agree_a_difference_of_a_hundredth_is_nothing_and_a_large_one_something():
    alike = {name: Measured(1.0, 0.5, 0.9) for name in NAMES}
    for norm, expected in ((1.01, ()), (1.2, (NAMES[0],))):
        history = History((alike | {NAMES[0]: Measured(norm, 0.5, 0.9)},) * 3)
        assert Detector().proposals(history) == expected


def test_scores_are_finite_whatever_was_measured():
    silent = dict.fromkeys(NAMES, Measured(0.0, 0.0, 0.0))
    for loud in (Measured(1e300, 1e300, -1.0), Measured(1e-300, 1e-300, 0.0)):
        history = History((silent | {NAMES[0]: loud},) * 3)
        scores = Detector().scores(history)
        assert scores[NAMES[0]] == MAX_SCORE
        assert all(scores[name] == 0 for name in NAMES[1:])
    tiny = dict.fromkeys(NAMES, Measured(1e-300, 1.0, 0.0))
    assert math.isfinite(Detector().scores(History((tiny | {NAMES[0]: loud},) * 3))[NAMES[1]])
    assert Detector().scores(History()) == {}
    with pytest.raises(LocalError, match="peer0: Measured"):
        Detector().observe(History(), {"peer0": Measured(math.nan, 0.0, 0.0)})


@given(seeds)
def test_scores_do_not_depend_on_the_order_of_names(seed):
    history = rounds(seed, 6)
    turned = History(tuple(dict(reversed(measured.items())) for measured in history.rounds))
    assert Detector().scores(history) == Detector().scores(turned)


def test_what_is_measured_is_measured_on_the_vectors():
    updates = np.random.default_rng(0).standard_normal((5, 3000)).astype(np.float32)
    value = aggregate("median", updates).value
    for update, found in zip(updates, measure(updates, value), strict=True):
        norm, length = np.linalg.norm(update), np.linalg.norm(value)
        assert found.norm == pytest.approx(norm, rel=1e-5)
        assert found.distance == pytest.approx(np.linalg.norm(update - value), rel=1e-5)
        assert found.cosine == pytest.approx(update @ value / norm / length, abs=1e-5)
    assert measured_from_gram([[0.0, 0.0], [0.0, 4.0]]) == (Measured(0.0, 2.0, 0.0),)
    updates[3, 7] = np.inf
    with pytest.raises(LocalError, match="update 3 "):
        measure(updates, value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"measures": ()}, "measures must be some of norm, distance, cosine, they are []"),
        ({"measures": ("angle",)}, "measures must be some of norm, distance, cosine, they are ['angle']"),
        ({"threshold": 0.0}, "threshold must be a positive number, it is 0.0"),
        ({"window": 2}, "least_rounds must be 1 to window (2), it is 3: nobody would be seen so often"),
    ],
)
def test_a_detector_that_could_never_speak_is_refused(options, text):
    with pytest.raises(UserError) as error:
        Detector(**options)
    assert str(error.value) == text
