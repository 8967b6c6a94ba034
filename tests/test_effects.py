"""Effects as values: what a driver may rely on."""

import inspect

import msgspec
import pytest

from p2pcoord import effects
from p2pcoord.effects import Cancelled, Done, Effect, Failed, Outcome, Persist, Send

KINDS = [
    kind
    for _, kind in inspect.getmembers(effects, inspect.isclass)
    if issubclass(kind, Effect) and kind is not Effect
]
ANSWERED = {"Dial", "Reach", "Persist", "Fetch", "Train", "Combine", "Step", "Validate"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_effect_is_frozen_and_has_an_id_exactly_when_it_is_answered(kind: type[Effect]) -> None:
    assert kind.__struct_config__.frozen
    assert ("id" in kind.__struct_fields__) == (kind.__name__ in ANSWERED)


def test_effects_with_the_same_content_are_equal_and_cannot_be_changed() -> None:
    assert Send("a", b"x", 1) == Send("a", b"x", 1)
    assert Persist(1, ()) != Persist(2, ())
    with pytest.raises(AttributeError):
        Send("a", b"x", 1).to = "b"  # type: ignore[misc]


def test_an_outcome_is_done_failed_with_a_reason_or_cancelled() -> None:
    kinds = {kind for kind in (Done, Failed, Cancelled) if issubclass(kind, Outcome)}
    assert len(kinds) == 3
    with pytest.raises(TypeError):
        Failed()  # type: ignore[call-arg]
    assert msgspec.structs.asdict(Failed("disk full")) == {"reason": "disk full", "value": None}
