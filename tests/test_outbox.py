"""Effects leave in order, numbered, and nothing is said before it is written."""

import pytest

from p2pcoord.consensus.messages import RecordsRequest
from p2pcoord.effects import Announce, Emit, Persist, Send
from p2pcoord.errors import LocalError
from p2pcoord.messages import StatusReply
from p2pcoord.outbox import Outbox
from p2pcoord.rounds.frames import Life
from p2pcoord.rounds.messages import JoinReply
from p2pcoord.wire import MAX_MESSAGE_BYTES, encode


def test_effects_are_taken_once_in_the_order_they_were_put() -> None:
    outbox = Outbox("me")
    outbox.emit("one", value=1)
    outbox.persist([Life(1)])
    outbox.send("other", RecordsRequest(1))
    kinds = [type(effect) for effect in outbox.take()]
    assert kinds == [Emit, Persist, Send]
    assert outbox.take() == []


def test_a_message_leaves_after_the_newest_write_asked_for_and_never_waits_for_a_later_one() -> None:
    outbox = Outbox("me")
    outbox.send("other", RecordsRequest(1))
    first = outbox.persist([Life(1)])
    outbox.send("other", RecordsRequest(2))
    second = outbox.persist([Life(2)])
    outbox.announce(RecordsRequest(3))
    outbox.send("other", RecordsRequest(4), after=first)
    waits = [effect.after for effect in outbox.take() if isinstance(effect, Send | Announce)]
    assert waits == [0, first, second, first]
    assert 0 < first < second


def test_numbers_are_given_once() -> None:
    outbox = Outbox()
    numbers = [outbox.new_id(), outbox.persist([Life(1)]), outbox.new_id(), outbox.persist([Life(1)])]
    assert numbers == sorted(set(numbers))


def test_what_a_peer_tells_itself_never_becomes_bytes_and_does_not_wait() -> None:
    outbox = Outbox("me")
    message = JoinReply("")
    outbox.send("me", message)
    assert list(outbox.local) == [message]
    assert outbox.take() == []


def test_the_log_counts_its_bytes_and_starts_anew_when_it_is_replaced() -> None:
    outbox = Outbox()
    size = len(encode(Life(1)))
    outbox.persist([Life(1), Life(1)])
    outbox.persist([Life(1)])
    assert outbox.written_bytes == 3 * size
    outbox.persist([Life(1)], replace=True)
    assert outbox.written_bytes == size
    effects = [effect for effect in outbox.take() if isinstance(effect, Persist)]
    assert [effect.replace for effect in effects] == [False, False, True]
    assert effects[0].frames == (encode(Life(1)),) * 2


def test_a_message_that_no_peer_would_read_is_our_own_mistake() -> None:
    outbox = Outbox("me")
    with pytest.raises(LocalError):
        outbox.send("other", StatusReply(bytes(MAX_MESSAGE_BYTES)))
    with pytest.raises(LocalError):
        outbox.announce(StatusReply(bytes(MAX_MESSAGE_BYTES)))
    assert outbox.take() == []
