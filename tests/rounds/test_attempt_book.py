"""The attempts that a peer was shown."""

import msgspec

from p2pcoord.effects import Persist
from p2pcoord.frames import decode_frames
from p2pcoord.rounds.attempt_book import MAX_ATTEMPTS_KEPT
from p2pcoord.rounds.messages import AttemptMessage
from tests.round_runner import holding
from tests.script_runner import authority_of


def test_an_older_attempt_never_replaces_a_newer_one_and_few_are_kept() -> None:
    world = holding("A fetch")
    good = world.messages(AttemptMessage, "A", "B")[0]
    assert isinstance(good, AttemptMessage)
    for number in [*range(20, 10, -1)]:
        attempt = authority_of("A").sign(msgspec.structs.replace(good.attempt, number=number))
        world.inject("A", "B", AttemptMessage(attempt, good.headers))
        current = world.participant("B").current
        assert current is not None
        assert current.number == 20
    assert len(world.participant("B").book) == MAX_ATTEMPTS_KEPT


def test_what_was_kept_is_on_disk_once_and_comes_back_in_the_next_life() -> None:
    world = holding("A validate", "B validate")
    book = world.participant("B").book
    assert book.kept() == []
    before = list(world.machines["B"].disk)
    world.peer("B").outbox.take()
    book.keep(book.current_name)
    book.keep(book.current_name)
    (persist,) = world.peer("B").outbox.take()
    assert isinstance(persist, Persist)
    (frame,) = decode_frames(persist.frames)
    assert [frame] == book.kept()
    world.execute("crash B")
    world.machines["B"].disk = [*before, *persist.frames]
    world.execute("restart B")
    again = world.participant("B").book
    assert again.kept() == [frame]
    assert again.current is not None
    assert again.current.summed


def test_an_attempt_without_a_result_is_not_kept() -> None:
    world = holding("A combine")
    book = world.participant("B").book
    world.peer("B").outbox.take()
    assert book.current is not None
    book.keep(book.current_name)
    assert world.peer("B").outbox.take() == []
    assert book.kept() == []
