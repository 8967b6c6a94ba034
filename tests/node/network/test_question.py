"""Asking a peer before there is a run: its answer is found among whatever else it sends, or what it did instead is told."""

import pytest
import trio

from node.network import question
from node.network.libp2p_transport import Libp2pTransport
from node.network.question import NoAnswer, ask
from node.network.transport_events import Received
from node.reporting import remote_status
from p2pcoord.consensus.messages import RecordsRequest
from p2pcoord.consensus.record import Admission
from p2pcoord.errors import UserError
from p2pcoord.messages import StatusReply, StatusRequest, decode_message
from p2pcoord.wire import encode
from tests.node.network.open_transports import opened

QUESTION = StatusRequest(Admission("somebody", "", b""))


async def answer(transport: Libp2pTransport, *answers: bytes) -> None:
    """To the first question that comes."""
    while not isinstance(event := await transport.receive(), Received):
        pass
    assert isinstance(decode_message(event.frame), StatusRequest)
    for data in answers:
        transport.send(event.peer, data)


@pytest.mark.trio
async def test_the_answer_is_found_among_what_else_the_peer_sends() -> None:
    with trio.fail_after(20):
        async with opened() as here, opened() as there, trio.open_nursery() as nursery:
            nursery.start_soon(answer, there, b"\xff", encode(RecordsRequest(1)), encode(StatusReply(b"{}")))
            peer = await here.connect(None, there.addresses())
            assert await ask(here, peer, QUESTION, StatusReply) == StatusReply(b"{}")


@pytest.mark.trio
async def test_silence_and_a_closed_connection_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question, "ANSWER_TIMEOUT_S", 0.3)
    with trio.fail_after(20):
        async with opened() as here, opened() as there:
            peer = await here.connect(None, there.addresses())
            with pytest.raises(NoAnswer) as silent:
                await ask(here, peer, QUESTION, StatusReply)
            assert silent.value.closed is None
            there.disconnect(here.peer_id, "not for you")
            with pytest.raises(NoAnswer) as ended:
                await ask(here, peer, QUESTION, StatusReply)
            assert ended.value.closed


@pytest.mark.trio
async def test_the_status_of_a_node_elsewhere_is_a_document_or_one_plain_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_status, "check_hello", lambda data, run, may_join: None)
    with trio.fail_after(30):
        async with opened() as there:
            (address, *_) = there.addresses()
            for data, document in ((b'{"schema": 1}', {"schema": 1}), (b"[]", None), (b"{", None)):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(answer, there, encode(StatusReply(data)))
                    if document is not None:
                        assert await remote_status.ask(address, None) == document
                        continue
                    with pytest.raises(UserError, match="gives no status: it may need the run's --secret"):
                        await remote_status.ask(address, None)
        with pytest.raises(UserError, match=r"does not answer: .*nobody listens there"):
            await remote_status.ask(address, None)
