"""Strangers against a running node: nothing breaks, the run goes on, and everything they do is counted for all to see."""

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import cbor2
import msgspec
import pytest
import trio

from node.network.hello import JoinToken, make_hello, parse_token
from node.network.link import MAX_FRAME_BYTES, MESSAGE
from node.network.streams import HEADER, frame
from node.storage.identity_key import IdentityKey
from p2pcoord.consensus.messages import Append, Records, RecordsRequest
from p2pcoord.consensus.record import Admission, Members
from p2pcoord.consensus.statements import Farewell
from p2pcoord.messages import GenesisReply, GenesisRequest, StatusReply, StatusRequest
from p2pcoord.rounds.messages import LeaveRequest
from p2pcoord.rounds.participation import join_proof
from p2pcoord.wire import encode
from tests.hostile.strangers import Stranger, garbage, half_a_handshake, raw, refusal, stranger, unframed
from tests.namespaces.running_node import START_S, RunningNode, human_status, join_flags, running, verified
from tests.namespaces.runs import WORKLOADS, run_file

Rejected = dict[str, Any]


class Target:
    """Two nodes that train; the first is the one that strangers go for."""

    def __init__(self, nodes: list[RunningNode]) -> None:
        self.node, self.other = nodes
        document = self.node.status()
        assert document is not None
        flags = join_flags(document)
        self.address = flags[1]
        self.port = int(self.address.split("/")[4])
        self.token: JoinToken = parse_token(flags[3])

    @property
    def rejected(self) -> Rejected:
        document = self.node.status()
        assert document is not None, self.node.printed()[-3000:]
        return dict(document["rejected"])

    def by(self, peer: str) -> int:
        return int(self.rejected["by_peer"].get(peer, 0))

    def of(self, kind: str) -> int:
        return int(self.rejected["by_kind"].get(kind, 0))

    def until(self, holds: Callable[[Rejected], object], timeout_s: float = 10.0) -> Rejected:
        return dict(self.node.until("counted", lambda d: holds(d["rejected"]), timeout_s)["rejected"])

    def goes_on(self, rounds: int = 2) -> None:
        """The run makes further rounds, with both in them."""
        since = time.time()
        document = self.node.status()
        assert document is not None
        goal = document["version"] + rounds
        for node in (self.node, self.other):
            node.until("goes on", lambda d: d["version"] >= goal, 30.0)
        assert self.node.runs
        assert self.other.runs
        assert all(len(commit["contributors"]) == 2 for commit in self.node.commits(since))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("hostile")
    flags = ("--workload", f"{WORKLOADS}:Small", "--device", "cpu", "--listen", "/ip4/127.0.0.1/tcp/0")
    with running() as nodes:
        config = run_file(folder / "run.toml", members=2, committee=3, pause_s=0.05)
        nodes.append(RunningNode(folder / "lab0", *flags, "--config", str(config)).start())
        document = nodes[0].until("founded", lambda d: d.get("join_line"), START_S)
        nodes.append(RunningNode(folder / "lab1", *flags, *join_flags(document)).start())
        for node in nodes:
            node.until("trains", lambda d: d["version"] >= 2 and len(d["members"]) == 2, START_S)
        yield Target(nodes)


# Before anybody is known -------------------------------------------------------------------------------------------------


def test_garbage_and_half_a_handshake_are_counted_by_address(target: Target) -> None:
    before = target.of("bad_handshake")
    for _ in range(5):
        garbage(target.port)
    half_a_handshake(target.port)
    rejected = target.until(lambda r: r["by_kind"].get("bad_handshake", 0) >= before + 6)
    assert rejected["by_peer"]["127.0.0.1"] >= 6
    target.goes_on()


def test_a_silent_connection_is_closed_after_a_while_and_counted(target: Target) -> None:
    before = target.of("handshake_timeout")
    with closing(raw(target.port, b"")) as silent, closing(raw(target.port, b"\x13/multi")) as slow:
        target.goes_on()
        for connection in (silent, slow):
            connection.settimeout(15)
            while connection.recv(4096):
                pass
    target.until(lambda r: r["by_kind"].get("handshake_timeout", 0) >= before + 2)


def test_a_crowd_of_silent_connections_keeps_nobody_out(target: Target) -> None:
    before = target.of("too_many_connections")
    crowd = [socket.create_connection(("127.0.0.1", target.port), timeout=5) for _ in range(40)]
    try:
        target.until(lambda r: r["by_kind"].get("too_many_connections", 0) > before)
        target.goes_on()
    finally:
        for connection in crowd:
            connection.close()


# With a hello --------------------------------------------------------------------------------------------------------------


def test_hellos_of_another_run_another_protocol_or_with_a_wrong_secret_are_refused_in_words(
    target: Target,
) -> None:
    before = target.of("hello_refused")
    run, key = target.token.run, IdentityKey.generate()
    wrong = make_hello(run, join_proof(secrets.token_bytes(16), run, key.peer_id))
    another = make_hello(secrets.token_bytes(32), b"")
    protocol_2 = cbor2.dumps([2, "9.9", "3.13", "2.13", run, b"", "new"], canonical=True)
    replayed = make_hello(run, join_proof(target.token.secret, run, IdentityKey.generate().peer_id))
    told = [
        trio.run(refusal, target.token, target.address, hello)
        for hello in (wrong, another, protocol_2, b"\xff" * 40, replayed)
    ]
    assert [kind for kind, _ in told] == ["refused"] * 5
    assert told[0][1].startswith("wrong secret")
    assert told[1][1] == "peer belongs to another run"
    assert told[2][1].startswith("peer speaks protocol 2, this program 1: upgrade")
    assert told[3][1].startswith("no p2pcoord node")
    assert told[4][1].startswith("wrong secret"), "a proof speaks for its own peer only"
    target.until(lambda r: r["by_kind"].get("hello_refused", 0) >= before + 5)
    target.goes_on()


def test_frames_that_are_oversized_or_of_no_kind_end_the_link_and_are_counted(target: Target) -> None:
    before = {kind: target.of(kind) for kind in ("oversized", "unknown_kind")}
    trio.run(unframed, target.port, target.token, HEADER.pack(MESSAGE, MAX_FRAME_BYTES + 1) + bytes(1000))
    trio.run(unframed, target.port, target.token, HEADER.pack(MESSAGE, (1 << 32) - 1))
    trio.run(unframed, target.port, target.token, frame(77, b"what?"))
    target.until(
        lambda r: (
            r["by_kind"].get("oversized", 0) >= before["oversized"] + 2
            and r["by_kind"].get("unknown_kind", 0) >= before["unknown_kind"] + 1
        )
    )
    target.goes_on()


# With a link ---------------------------------------------------------------------------------------------------------------


class RecordsAndGenesis(msgspec.Struct, frozen=True):
    genesis: GenesisReply
    records: Records

    @property
    def admissions(self) -> list[Admission]:
        """Signed proofs of others, for all members to read."""
        bodies = [record.body for record in self.records.records]
        return [a for body in bodies if isinstance(body, Members) for a in body.admitted]


def _counted(
    target: Target, kind: str, act: Callable[[Stranger, RecordsAndGenesis], None], times: int = 1
) -> None:
    """`act` is done by a stranger with a link; the node counts `times` of `kind`, under the stranger's own id."""

    async def run() -> str:
        async with stranger(target.token, target.address) as peer:
            await peer.introduce()
            genesis = await peer.ask(GenesisRequest(Admission(peer.peer_id, "", peer.proof)), GenesisReply)
            records = await peer.ask(RecordsRequest(1), Records)
            assert isinstance(genesis, GenesisReply)
            assert isinstance(records, Records)
            act(peer, RecordsAndGenesis(genesis, records))
            with trio.move_on_after(10):
                while await trio.to_thread.run_sync(target.by, peer.peer_id) < times:  # noqa: ASYNC110  # another process
                    await trio.sleep(0.1)
            return peer.peer_id

    before = target.of(kind)
    peer = trio.run(run)
    assert target.of(kind) >= before + times, f"{kind}: {target.rejected}"
    assert target.by(peer) >= times
    target.goes_on(1)


def test_garbage_in_messages_is_counted(target: Target) -> None:
    def act(peer: Stranger, seen: RecordsAndGenesis) -> None:
        for _ in range(20):
            peer.send(b"\xff" + os.urandom(300))  # no CBOR begins so
        peer.send(b"")

    _counted(target, "malformed", act, 21)


def test_truncated_messages_are_counted(target: Target) -> None:
    def act(peer: Stranger, seen: RecordsAndGenesis) -> None:
        whole = encode(seen.records)
        for share in range(1, 10):
            peer.send(whole[: len(whole) * share // 10])

    _counted(target, "malformed", act, 9)


def test_messages_over_the_limit_are_counted(target: Target) -> None:
    _counted(target, "oversized", lambda peer, seen: _all(peer.send(bytes(MAX_FRAME_BYTES))))


def test_values_of_wrong_types_are_counted(target: Target) -> None:
    def act(peer: Stranger, seen: RecordsAndGenesis) -> None:
        peer.send(cbor2.dumps(["records?", "one"], canonical=True))
        peer.send(cbor2.dumps(["no such message", 1], canonical=True))
        peer.send(cbor2.dumps([[[[[[[1]]]]]]], canonical=True))

    _counted(target, "bad_type", act, 3)


def test_deep_nesting_is_counted_and_costs_no_stack(target: Target) -> None:
    _counted(target, "malformed", lambda peer, seen: _all(peer.send(b"\x81" * 100_000 + b"\x01")))


def test_another_encoding_of_a_valid_message_is_counted(target: Target) -> None:
    _counted(
        target, "not_canonical", lambda peer, seen: _all(peer.send(b"\x82\x68records?\x18\x01"))
    )  # 1 in two bytes


def test_a_replayed_proof_of_another_peer_opens_nothing(target: Target) -> None:
    def act(peer: Stranger, seen: RecordsAndGenesis) -> None:
        [admission, *_] = [a for a in seen.admissions if a.peer == target.other.peer_id]
        peer.say(GenesisRequest(admission))
        peer.say(StatusRequest(admission))

    _counted(target, "wrong_secret", act, 2)


def test_records_that_were_changed_on_the_way_are_counted(target: Target) -> None:
    def act(peer: Stranger, seen: RecordsAndGenesis) -> None:
        [first, *rest] = seen.records.records
        header = msgspec.structs.replace(first.header, signature=bytes(64))
        forged = msgspec.structs.replace(first, header=header)
        far = msgspec.structs.replace(seen.records.certificate, height=1 << 40)
        peer.say(Records((forged, *rest), far, 1 << 40))

    _counted(target, "unknown_record", act)


def test_a_goodbye_that_somebody_else_signed_is_counted_and_nobody_leaves(target: Target) -> None:
    def act(peer: Stranger, seen: RecordsAndGenesis) -> None:
        peer.say(LeaveRequest(Farewell(target.other.peer_id, 1, bytes(64))))
        peer.say(LeaveRequest(Farewell(target.other.peer_id, 1, os.urandom(64))))

    _counted(target, "bad_signature", act, 2)
    document = target.node.status()
    assert document is not None
    assert {m["peer_id"] for m in document["members"]} == {target.node.peer_id, target.other.peer_id}


def test_orders_of_somebody_who_does_not_coordinate_are_counted(target: Target) -> None:
    def act(peer: Stranger, seen: RecordsAndGenesis) -> None:
        term = seen.records.records[-1].header.term
        peer.say(Append(term, 150_000_000, 0, bytes(32), (), None, None))

    _counted(target, "not_coordinator", act)


def test_numbers_that_cannot_be_are_counted(target: Target) -> None:
    _counted(target, "out_of_range", lambda peer, seen: _all(peer.say(RecordsRequest(1 << 60))))


def test_a_stranger_that_has_shown_no_proof_of_its_own_gets_no_records(target: Target) -> None:
    async def ask() -> bool:
        async with stranger(target.token, target.address) as peer:
            with trio.move_on_after(1.0):
                await peer.ask(RecordsRequest(1), Records)
                return True
            return False

    assert not trio.run(ask)


def test_what_is_announced_and_is_no_record_is_counted_and_answered_by_nobody(target: Target) -> None:
    async def run() -> str:
        async with stranger(target.token, target.address) as peer:
            await peer.introduce()
            with trio.move_on_after(15):
                while not await trio.to_thread.run_sync(
                    target.by, peer.peer_id
                ):  # gossip takes a heartbeat to begin
                    await peer.announce(encode(StatusRequest(Admission(peer.peer_id, "", peer.proof))))
                    await peer.announce(os.urandom(100))
                    await trio.sleep(0.2)
            assert await peer.hears(StatusReply, 1.0) is None
            return peer.peer_id

    before = target.of("bad_announcement")
    peer = trio.run(run)
    assert target.by(peer) > 0
    assert target.of("bad_announcement") > before
    target.goes_on(1)


def test_a_flood_of_garbage_delays_nobody_and_fills_no_file(target: Target) -> None:
    async def flood() -> tuple[str, int]:
        async with stranger(target.token, target.address) as peer:
            sent = 0
            while sent < 6000 and peer.linked:
                sent += peer.send(b"\xff" * 20)
                if not sent % 200:
                    await trio.sleep(0.02)
            with trio.move_on_after(15):
                while peer.linked and await trio.to_thread.run_sync(target.by, peer.peer_id) < sent:  # noqa: ASYNC110  # another process
                    await trio.sleep(0.2)
            return peer.peer_id, sent

    since = time.time()
    peer, sent = trio.run(flood)
    print(f"{sent} messages in {time.time() - since:.1f} s; counted {target.by(peer)}")
    assert target.by(peer) >= 1000
    told = [event for event in target.node.events("rejected") if event["peer"] == peer]
    assert 1 <= len(told) <= 10, f"{len(told)} events of one peer"
    target.goes_on()


def _all(sent: bool) -> None:
    assert sent


def test_in_the_end_all_of_it_is_visible_and_the_log_is_well(target: Target) -> None:
    garbage(target.port)
    rejected = target.until(lambda r: r["total"])
    assert rejected["total"] == sum(rejected["by_kind"].values()) == sum(rejected["by_peer"].values())
    assert f"rejected: {rejected['total']} messages" in human_status(target.node.directory)
    assert verified(target.node.directory)[0] == 0
    print(rejected["total"], rejected["by_kind"])
