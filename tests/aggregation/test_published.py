"""Every rule against public implementations: ByzFL 0.0.11 and Flower 1.42.0 (make_published_vectors.py says how and where)."""

import json
from pathlib import Path

import numpy as np
import pytest

from p2pcoord.aggregation import aggregate
from p2pcoord.aggregation.combination import median
from p2pcoord.aggregation.engine import combine
from p2pcoord.aggregation.gram import gram
from p2pcoord.aggregation.mixing import bucketing, nearest_neighbour_mixing, rows_of

PUBLISHED = json.loads((Path(__file__).parent / "published_vectors.json").read_text())
F = PUBLISHED["f"]
SCENES = sorted(PUBLISHED["scenes"])


def test_the_vectors_say_what_made_them():
    assert PUBLISHED["made by"] == "byzfl 0.0.11, flwr 1.42.0"


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize(
    ("kind", "options", "author", "named"),
    [
        ("federated_average", {}, "byzfl", "average"),
        ("median", {}, "byzfl", "median"),
        ("trimmed_mean", {"f": F}, "byzfl", "trimmed_mean"),
        ("krum", {"f": F}, "byzfl", "krum"),
        ("krum", {"f": F}, "flower", "krum"),
        ("multi_krum", {"f": F, "m": PUBLISHED["multi_krum"]["byzfl m"]}, "byzfl", "multi_krum"),
        ("multi_krum", {"f": F, "m": PUBLISHED["multi_krum"]["flower m"]}, "flower", "multi_krum"),
        ("bulyan", {"f": F}, "flower", "bulyan"),
        ("geometric_median", {"iterations": 1000}, "byzfl", "geometric_median"),
        ("centered_clipping", {}, "byzfl", "centered_clipping"),
        (
            "trimmed_mean",
            {"f": F, "pre": [("nearest_neighbour_mixing", {"f": F})]},
            "byzfl",
            "trimmed_mean after nearest_neighbour_mixing",
        ),
    ],
)
def test_rules_agree_with_public_implementations(scene, kind, options, author, named):
    updates = np.array(PUBLISHED["scenes"][scene]["updates"], np.float32)
    if kind == "centered_clipping":
        options = dict(PUBLISHED[kind])
        options["start"] = updates[options["start"]]
    expected = PUBLISHED["scenes"][scene][author][named]
    np.testing.assert_allclose(aggregate(kind, updates, **options).value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scene", SCENES)
def test_so_do_the_means_of_pre_aggregations(scene):
    updates = np.array(PUBLISHED["scenes"][scene]["updates"], np.float32)
    settings = PUBLISHED["bucketing"]
    for named, matrix in (
        ("bucketing", bucketing(settings["order"], settings["size"])),
        ("nearest_neighbour_mixing", nearest_neighbour_mixing(gram(updates), F)),
    ):
        out = np.empty((len(matrix), updates.shape[1]), np.float32)
        for row, into in zip(rows_of(matrix), out, strict=True):
            assert combine(median((row,)), list(updates), into)
        np.testing.assert_allclose(out, PUBLISHED["scenes"][scene]["byzfl"][named], rtol=1e-5, atol=1e-5)
