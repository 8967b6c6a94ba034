"""Failpoints: named places hold once, from a version on, and nothing else ever does."""

import pytest

from node.failpoints import Failpoints
from p2pcoord.errors import UserError


def test_nothing_holds_without_names() -> None:
    points = Failpoints("")
    assert not points
    assert not points.reached("phase:aggregation", 5)
    assert points.held == ""


def test_a_place_holds_from_its_version_on_and_then_for_ever() -> None:
    points = Failpoints("phase:aggregation@3, persist-before:vote")
    assert points
    assert not points.reached("phase:aggregation", 2)
    assert not points.reached("phase:validation", 3)
    assert points.reached("phase:aggregation", 3)
    assert points.held == "phase:aggregation"
    assert points.reached("phase:validation", 4), "what is held stays held, wherever it is looked at"
    assert points.held == "phase:aggregation"
    assert Failpoints("persist-before:vote").reached("persist-before:vote", 0)


def test_a_version_that_is_none_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="a version after @"):
        Failpoints("phase:aggregation@soon")
