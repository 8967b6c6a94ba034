"""The laws of combining: same inputs same bits, honest range, equivariance; what is refused, and by which name."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import p2pcoord.aggregation
from p2pcoord.aggregation import NotFiniteError, aggregate, engine
from p2pcoord.aggregation.engine import combine, decide
from p2pcoord.aggregation.gram import BLOCK, centre_among, gram, total
from p2pcoord.aggregation.mean import Mean
from p2pcoord.aggregation.pre_aggregation import pre_aggregation
from p2pcoord.aggregation.rules import rule
from p2pcoord.aggregation.summation import norm, weighted_sum
from p2pcoord.errors import LocalError, UserError
from p2pcoord.float32 import is_float32

LARGEST = float(np.finfo(np.float32).max)
seeds = st.integers(0, 2**32 - 1)
sizes = st.floats(-LARGEST, LARGEST, width=32)

# For 11 updates, of which 2 may be arbitrary.
N, F = 11, 2
CALLS = [
    ("federated_average", {}),
    ("federated_average", {"clip_norm": 1.0}),
    ("median", {}),
    ("trimmed_mean", {"f": F}),
    ("krum", {"f": F}),
    ("multi_krum", {"f": F}),
    ("multi_krum", {"f": F, "m": 3}),
    ("bulyan", {"f": F}),
    ("geometric_median", {}),
    ("centered_clipping", {"radius": 1.0, "iterations": 2}),
    ("median", {"pre": [("bucketing", {"size": 2})], "seed": 5}),
    ("trimmed_mean", {"f": F, "pre": [("nearest_neighbour_mixing", {"f": F})]}),
    ("krum", {"f": 1, "pre": [("bucketing", {"size": 2})], "seed": 5}),
    (
        "geometric_median",
        {"pre": [("nearest_neighbour_mixing", {"f": F}), ("bucketing", {"size": 3})], "seed": 1},
    ),
]
calls = st.sampled_from(CALLS)
ROBUST = [call for call in CALLS if call[0] != "federated_average"]


def drawn(seed: int, n: int = N, size: int = 10) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, size)).astype(np.float32)


def attacked(seed: int, outliers: list[float], n: int = N) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Updates of which some are outliers at places that the seed draws; and which are honest."""
    random = np.random.default_rng(seed)
    updates = drawn(seed, n)
    bad = random.permutation(n)[: len(outliers)]
    for at, size in zip(bad, outliers, strict=True):
        updates[at] = np.float32(size)
        updates[at, random.random(10) < 0.3] = 0
    honest = np.delete(updates, bad, axis=0)
    return updates, honest, bad


@given(seeds, st.lists(st.integers(1, 2**40), min_size=1, max_size=12), st.sampled_from([None, 0.5, 3.0]))
def test_federated_average_is_the_mean_and_its_sum_to_the_bit(seed, samples, clip_norm):
    updates = drawn(seed, len(samples), 3000)
    for weighted in (True, False):
        factors = Mean(weighted, clip_norm).factors(samples, [norm(update) for update in updates])
        expected = np.empty(3000, np.float32)
        weighted_sum(
            [(update, factor.parameters) for update, factor in zip(updates, factors, strict=True)], expected
        )
        for given_samples in (samples, np.array(samples), np.array(samples, np.float64)):
            found = aggregate(
                "federated_average", updates, given_samples, weighted=weighted, clip_norm=clip_norm
            )
            assert found.value.tobytes() == expected.tobytes()
            assert found.weights == tuple(factor.parameters for factor in factors)
        assert found.scores == (tuple(norm(update) for update in updates) if clip_norm else ())


@given(calls, seeds)
def test_the_same_inputs_give_the_same_bits_and_are_only_read(call, seed):
    kind, options = call
    updates = drawn(seed)
    updates.flags.writeable = False
    found = aggregate(kind, updates, **options)
    again = aggregate(kind, list(updates.copy()), **options)
    assert found.value.tobytes() == again.value.tobytes()
    assert (found.weights, found.scores) == (again.weights, again.scores)
    assert found.value.dtype == np.float32
    assert all(is_float32(weight) for weight in found.weights)


@given(
    st.sampled_from([call for call in CALLS if "bucketing" not in str(call) and call[0] != "bulyan"]), seeds
)
def test_who_comes_first_does_not_matter(call, seed):
    kind, options = call
    updates = drawn(seed)
    order = np.random.default_rng(seed).permutation(N)
    found = aggregate(kind, updates, **options)
    moved = aggregate(kind, updates[order], **options)
    # What is a sum in the given order may differ by its rounding.
    exact = kind in ("median", "trimmed_mean", "krum") and "pre" not in options
    tolerance = 0 if exact else 1e-5
    np.testing.assert_allclose(moved.value, found.value, rtol=tolerance, atol=tolerance)
    if found.weights:
        np.testing.assert_allclose(moved.weights, np.array(found.weights)[order], rtol=1e-5)
    if found.scores:
        np.testing.assert_allclose(moved.scores, np.array(found.scores)[order], rtol=1e-6)


@given(seeds)
def test_bulyan_does_not_see_the_order_where_two_neighbours_count(seed):
    updates = drawn(seed, 15)
    order = np.random.default_rng(seed).permutation(15)
    found, moved = (aggregate("bulyan", given_updates, f=3) for given_updates in (updates, updates[order]))
    assert found.value.tobytes() == moved.value.tobytes()


@given(seeds, st.lists(sizes, min_size=F, max_size=F))
def test_columns_stay_in_the_honest_range_whatever_f_others_send(seed, outliers):
    updates, honest, _ = attacked(seed, outliers)
    lowest, highest = honest.min(axis=0), honest.max(axis=0)
    for kind, options in (("median", {}), ("trimmed_mean", {"f": F})):
        value = aggregate(kind, updates, **options).value
        assert (lowest <= value).all()
        assert (value <= highest).all()
    # Bulyan averages what is near to the median, which is in the range: as far from it as an honest value, at most.
    value = aggregate("bulyan", updates, f=F).value
    assert (lowest - (highest - lowest) <= value).all()
    assert (value <= highest + (highest - lowest)).all()


@given(seeds, st.lists(sizes, min_size=F, max_size=F))
def test_vectors_stay_near_the_honest_whatever_f_others_send(seed, outliers):
    updates, honest, _ = attacked(seed, outliers)
    exact = honest.astype(np.float64)
    diameter = np.linalg.norm(exact[:, None] - exact, axis=2).max()
    centre = exact.mean(axis=0)
    for kind, options in (("krum", {"f": F}), ("multi_krum", {"f": F})):
        # A chosen vector scores no worse than an honest one, and among its nearest is an honest one.
        value = aggregate(kind, updates, **options).value.astype(np.float64)
        reach = np.sqrt(N - F - 2) * diameter
        assert np.linalg.norm(exact - value, axis=1).min() <= reach * (1 + 1e-5)
    value = aggregate("geometric_median", updates, iterations=100).value.astype(np.float64)
    share = F / N  # Minsker 2015, lemma 2.1; smoothing and 100 iterations leave little
    bound = 2 * (1 - share) / (1 - 2 * share) * np.linalg.norm(exact - centre, axis=1).max()
    assert np.linalg.norm(value - centre) <= bound * 1.01


@given(seeds, st.lists(sizes, min_size=0, max_size=N), st.floats(0.01, 100), st.integers(1, 5))
def test_centered_clipping_moves_no_farther_than_its_radius_whoever_lies(seed, outliers, radius, iterations):
    updates, _, _ = attacked(seed, outliers)
    start = drawn(seed + 1)[0]
    options = {"radius": radius, "iterations": iterations}
    for given_start in (None, start):
        value = aggregate("centered_clipping", updates, start=given_start, **options).value
        moved = value.astype(np.float64) - (0 if given_start is None else given_start)
        rounding = 1e-5 * (1 + (radius * iterations))
        assert np.linalg.norm(moved) <= radius * iterations + rounding


@given(seeds, st.lists(st.sampled_from([1e3, -1e10, 1e30, LARGEST, -LARGEST]), min_size=F, max_size=F))
def test_far_outliers_are_in_no_sum_of_the_krum_family(seed, outliers):
    updates, _, bad = attacked(seed, outliers)
    for kind in ("krum", "multi_krum"):
        weights = np.array(aggregate(kind, updates, f=F).weights)
        assert not weights[bad].any()
    without = aggregate("krum", np.delete(updates, bad, axis=0), f=0)
    assert np.isfinite(without.value).all()


@given(st.sampled_from(ROBUST), seeds)
def test_of_equal_updates_the_aggregate_is_that_update(call, seed):
    kind, options = call
    update = drawn(seed)[0]
    updates = np.tile(update, (N, 1))
    options = dict(options, start=update) if kind == "centered_clipping" else options
    value = aggregate(kind, updates, **options).value
    exact = kind in ("median", "trimmed_mean", "krum", "bulyan") and "pre" not in options
    np.testing.assert_allclose(value, update, rtol=0 if exact else N * 2.0**-23)


@given(st.sampled_from(ROBUST), seeds, st.integers(-20, 20))
def test_a_power_of_two_passes_through(call, seed, power):
    # Exactly: it changes no rounding. Lengths that are parameters grow with it.
    kind, options = call
    factor = np.float32(2.0**power)
    scaled = dict(options)
    if kind == "centered_clipping":
        scaled["radius"] = options["radius"] * 2.0**power
    if kind == "geometric_median":
        options = dict(options, smoothing=1e-6)
        scaled["smoothing"] = 1e-6 * 2.0**power
    updates = drawn(seed)
    expected = aggregate(kind, updates, **options).value * factor
    assert aggregate(kind, updates * factor, **scaled).value.tobytes() == expected.tobytes()


@given(st.sampled_from(ROBUST), seeds)
def test_a_shift_passes_through(call, seed):
    kind, options = call
    updates = np.round(drawn(seed) * 64) / 64  # exact after the shift, too
    shift = np.arange(10, dtype=np.float32) - 4
    start = np.zeros(10, np.float32)
    moved = dict(options, start=shift) if kind == "centered_clipping" else options
    given_options = dict(options, start=start) if kind == "centered_clipping" else options
    expected = aggregate(kind, updates, **given_options).value + shift
    np.testing.assert_allclose(aggregate(kind, updates + shift, **moved).value, expected, atol=1e-4)


@given(
    st.sampled_from(
        [("krum", {"f": F}), ("multi_krum", {"f": F}), ("bulyan", {"f": F}), ("geometric_median", {})]
    ),
    seeds,
)
def test_updates_that_nearly_agree_are_told_apart(call, seed):
    kind, options = call
    common = np.round(drawn(seed + 1)[0] * 2**10) / np.float32(2**10)
    small = np.round(drawn(seed) * 2**6) / np.float32(2**20)
    updates = common + small
    assert (updates - common == small).all()  # nothing was rounded: what is left is what was put in
    expected, found = aggregate(kind, small, **options), aggregate(kind, updates, **options)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-4)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)
    np.testing.assert_allclose(found.value - common, expected.value, atol=2e-6)


@given(calls, seeds, st.sets(st.integers(0, N + 2), min_size=3, max_size=3))
def test_an_update_of_weight_zero_takes_no_part_whatever_it_holds(call, seed, absent):
    kind, options = call
    updates = drawn(seed, N + 3)
    weights = np.ones(N + 3)
    for at in absent:
        updates[at], weights[at] = np.nan, 0
    present = sorted(set(range(N + 3)) - absent)
    found = aggregate(kind, updates, weights, **options)
    expected = aggregate(kind, updates[present], **options)
    assert found.value.tobytes() == expected.value.tobytes()
    for name in ("weights", "scores"):
        values = getattr(found, name)
        assert tuple(values[at] for at in present if values) == getattr(expected, name)
        assert len(values) in (0, N + 3)
    assert not any(found.weights[at] for at in absent if found.weights)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_updates_that_are_not_finite_are_refused_by_name(call, value):
    kind, options = call
    updates = drawn(0)
    updates[3, 7] = value
    updates[9, 0] = -value
    with pytest.raises(NotFiniteError) as error:
        aggregate(kind, updates, **options)
    assert error.value.updates == (3, 9)
    assert "updates 3, 9 (counted from 0)" in str(error.value)
    good = np.delete(drawn(0, N + 2), error.value.updates, axis=0)
    assert np.isfinite(aggregate(kind, good, **options).value).all()
    # Its place among all, not among those that take part.
    updates = drawn(0, N + 1)
    updates[4, 2] = value
    with pytest.raises(NotFiniteError, match=r"update 4 \(counted from 0\)"):
        aggregate(kind, updates, [1, 0] + [1] * (N - 1), **options)


@pytest.mark.parametrize("call", CALLS)
def test_pieces_at_once_and_in_any_order_give_the_same_bits(call, monkeypatch):
    kind, options = call
    monkeypatch.setattr(engine, "PIECE", BLOCK)
    updates = drawn(3, N, 3 * BLOCK + 11)
    expected = aggregate(kind, updates, **options)

    def backwards(function, items):
        return [function(item) for item in reversed(list(items))][::-1]

    with ThreadPoolExecutor(3) as pool:
        for run in (backwards, pool.map):
            found = aggregate(kind, updates, run=run, **options)
            assert found.value.tobytes() == expected.value.tobytes()
            assert (found.weights, found.scores) == (expected.weights, expected.scores)


@pytest.mark.parametrize("call", CALLS[2:])
def test_owners_of_stripes_together_do_what_one_member_does_that_holds_all(call):
    """No owner sees more than its columns of all, whoever decides sees n x n numbers, and the result is the same."""
    kind, options = call
    chosen = rule(
        kind, **{name: value for name, value in options.items() if name not in ("pre", "seed", "start")}
    )
    before = tuple(pre_aggregation(name, **settings) for name, settings in options.get("pre", ()))
    updates = drawn(4, N, 5 * BLOCK)
    stripes = [slice(0, BLOCK), slice(BLOCK, 3 * BLOCK), slice(3 * BLOCK, 5 * BLOCK)]
    products = total(gram(updates[:, stripe]) for stripe in stripes)
    if kind != "centered_clipping" and (middle := centre_among(products)) is not None:
        products = total(gram(updates[:, stripe], updates[middle, stripe]) for stripe in stripes)
    decision = decide(chosen, before, [1] * N, products=products, seed=options.get("seed", 0))
    out = np.empty(5 * BLOCK, np.float32)
    for stripe in stripes:
        assert combine(decision.combination, list(updates[:, stripe]), out[stripe])
    whole = aggregate(kind, updates, **options)
    np.testing.assert_allclose(decision.weights, whole.weights, rtol=1e-6)
    np.testing.assert_allclose(out, whole.value, rtol=1e-6, atol=1e-7)
    if kind not in ("geometric_median", "centered_clipping"):  # weights that no rounding in float64 moves
        assert out.tobytes() == whole.value.tobytes()


def test_running_statistics_are_values_and_are_not_clipped():
    norms = [10.0, 0.1]
    decision = decide(rule("federated_average", clip_norm=1.0), (), [1, 3], norms=norms)
    assert decision.combination.rows == (((0, float(np.float32(0.025))), (1, 0.75)),)
    assert decision.float_buffers.rows == (((0, 0.25), (1, 0.75)),)
    assert decision.scores == (10.0, 0.1)
    products = gram(drawn(0, 5))
    clipped = decide(rule("centered_clipping", radius=0.1), (), [1] * 5, products=products, started=True)
    assert (clipped.combination.operation, clipped.float_buffers.operation) == ("sum", "trimmed_mean")
    assert 0 < clipped.combination.start < 1
    assert clipped.float_buffers.cut == 2
    chosen = decide(rule("krum", f=1), (), [1] * 5, products=products)
    assert chosen.combination == chosen.float_buffers


def test_weights_may_be_any_numbers_in_proportion():
    updates = drawn(0, 3)
    expected = aggregate("federated_average", updates, [1, 2, 4]).value
    for weights in ([0.25, 0.5, 1.0], np.array([1, 2, 4], np.int32), (2**60, 2**61, 2**62)):
        assert aggregate("federated_average", updates, weights).value.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (("krum", drawn(0, 8)), {"f": 3}, "krum with f = 3 needs at least 9 vectors (2f + 3), there are 8"),
        (("krum", drawn(0, 9), [0] + [1] * 8), {"f": 3}, "there are 8: with 8, f may be at most 2"),
        (("median", drawn(0, 2), [0, 0]), {}, "median needs at least 1 vector, there are 0"),
        (("krum", drawn(0, 16)), {"f": 3, "pre": [("bucketing", {"size": 2})]}, "17 contributions would do"),
        (("federated_average", drawn(0)), {"pre": [("bucketing", {"size": 2})]}, "a mean of means"),
        (("average", drawn(0)), {}, "there is no aggregation rule 'average'"),
        (("median", drawn(0)), {"pre": [("clipping", {})]}, "there is no pre-aggregation 'clipping'"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_what_could(arguments, options, text):
    with pytest.raises(UserError) as error:
        aggregate(*arguments, **options)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (("median", drawn(0).astype(np.float64)), {}, "flat float32 vectors of one length"),
        (("median", [drawn(0)[0], drawn(0)[0, :5]]), {}, r"not float32 of shape \(5,\)"),
        (("median", [[1.0, 2.0]]), {}, r"not list of shape \(2,\)"),
        (("median", drawn(0), [1, 2]), {}, "11 updates need 11 weights"),
        (("median", drawn(0, 2), [1, -1]), {}, "the weight of update 1 cannot be -1"),
        (("median", drawn(0, 2), [np.nan, 1]), {}, "the weight of update 0 cannot be nan"),
        (("median", drawn(0)), {"start": drawn(0)[0]}, "median starts from nothing"),
        (
            ("centered_clipping", drawn(0)),
            {"radius": 1.0, "start": np.full(10, np.inf, np.float32)},
            "the last aggregate is not finite",
        ),
        ((rule("krum", f=1), drawn(0)), {"f": 1}, "takes no parameters"),
    ],
)
def test_misuse_is_named(arguments, options, text):
    with pytest.raises(LocalError, match=text):
        aggregate(*arguments, **options)


def test_a_sum_beyond_float32_is_told_from_an_update_that_is():
    updates = np.full((10, 4), LARGEST, np.float32)
    with pytest.raises(LocalError, match="beyond float32"):
        aggregate("federated_average", updates)  # ten tenths, rounded up
    assert (aggregate("trimmed_mean", updates, f=0).value == np.float32(LARGEST)).all()
    assert (aggregate("median", updates).value == np.float32(LARGEST)).all()


def test_deciding_needs_the_numbers_it_decides_by():
    with pytest.raises(LocalError, match="krum needs a finite Gram matrix of 5 vectors"):
        decide(rule("krum", f=1), (), [1] * 5)
    with pytest.raises(LocalError, match="needs a finite Gram matrix"):
        decide(rule("krum", f=1), (), [1] * 5, products=np.full((5, 5), np.nan))
    with pytest.raises(LocalError):
        decide(rule("federated_average", clip_norm=1.0), (), [1] * 5)


def test_vectors_of_no_columns_are_combined():
    for kind, options in CALLS:
        assert aggregate(kind, np.zeros((N, 0), np.float32), **options).value.size == 0


@pytest.mark.parametrize("call", [call for call in CALLS if "pre" not in call[1]])
def test_memory_is_that_of_the_inputs_and_a_tenth(call):
    kind, options = call
    updates = np.ones((16, 1 << 20), np.float32)
    tracemalloc.start()
    aggregate(kind, updates, **options)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= updates.nbytes / 10  # the result alone is a sixteenth


def test_what_is_loaded_late_is_there_and_nothing_else():
    assert p2pcoord.aggregation.Aggregate is engine.Aggregate
    with pytest.raises(AttributeError, match="no attribute 'robust'"):
        _ = p2pcoord.aggregation.robust
