"""The node itself, where no process is needed to see what it does."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio

from node import process as node_process
from node.driver import Driver
from node.network import hello
from node.network.hello import make_hello, parse_token, proof_of
from node.network.libp2p_transport import Libp2pTransport
from node.process import _Node
from node.reporting.console import Console
from node.reporting.events import read_events
from node.run import Run
from node.start import NodeOptions, Started
from node.storage.identity_key import IdentityKey
from node.storage.store import Store
from node.training.trainer_process import Trainer
from node.training.trainer_protocol import Loaded
from p2pcoord.consensus.record import Genesis
from p2pcoord.layout import Layout
from p2pcoord.peer import Peer
from p2pcoord.peer_settings import PeerSettings
from p2pcoord.run_config import decode as decode_config
from p2pcoord.wire import encode
from p2pcoord.workload import WorkloadPins
from tests.node.storage.signed_run import SignedRun

SECRET = b"s" * 16
REFUSED = "wrong secret: copy the whole line that a node of the run printed"
NEEDED = "the run needs a secret: copy the whole line that a node of the run printed"


def node_of(signed: SignedRun, store: Store, *, open_run: bool = False) -> _Node:
    """A's node as it is once it has a peer."""
    node = _Node(NodeOptions(data_dir=store.path), None, store, lambda line: None)
    settings = PeerSettings("lab1", None if open_run else SECRET, 5, 10)
    node.run_id = signed.run
    node.run_ = cast(Run, SimpleNamespace(config=SimpleNamespace(open=open_run), secret=settings.secret))
    node.peer = Peer(signed.authorities[0], signed.ledger.records[0], settings)
    return node


@pytest.mark.parametrize("open_run", [False, True])
def test_a_hello_is_welcome_with_a_proof_of_its_own_or_from_a_member_or_in_an_open_run(
    tmp_path: Path, open_run: bool
) -> None:
    signed = SignedRun().complete()
    stranger = "12D3KooW" + "x" * 44
    with Store.open(tmp_path / "node") as store:
        node = node_of(signed, store, open_run=open_run)
        right = proof_of(SECRET, signed.run, stranger)
        assert node._check_hello(stranger, make_hello(signed.run, right)) is None
        for proof in (
            b"",
            right[:-1],
            right + b"x",
            os.urandom(32),
            proof_of(b"t" * 16, signed.run, stranger),
            proof_of(SECRET, os.urandom(32), stranger),
            proof_of(SECRET, signed.run, signed.peers[1]),
        ):
            told = node._check_hello(stranger, make_hello(signed.run, proof))
            assert told == (None if open_run else REFUSED if proof else NEEDED), proof
        assert node.peer is not None
        node.peer.roster.apply(signed.ledger.records)
        assert node._check_hello(signed.peers[1], make_hello(signed.run, b"")) is None
        assert (
            node._check_hello(signed.peers[1], make_hello(os.urandom(32), b""))
            == "peer belongs to another run"
        )


def test_another_version_is_welcome_and_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signed = SignedRun().complete()
    told: list[str] = []
    with Store.open(tmp_path / "node") as store:
        node = node_of(signed, store, open_run=True)
        node.console = Console(told.append, terminal=True)
        assert node._check_hello(signed.peers[1], make_hello(signed.run, b"")) is None
        monkeypatch.setattr(hello, "torch_version", lambda: "2.99\x1b[2J" + "9" * 100)
        data = make_hello(signed.run, b"")
        monkeypatch.undo()
        for _ in range(3):
            assert node._check_hello(signed.peers[1], data) is None
        assert node._check_hello(signed.peers[1], make_hello(os.urandom(32), b"")) is not None
    (event,) = read_events(tmp_path / "node")
    assert (event["event"], event["peer"]) == ("versions-differ", signed.peers[1])
    assert "torch 2.99" in event["theirs"]
    assert "2.99" not in event["ours"]
    assert len(event["theirs"]) < 120
    assert len(told) == 1
    assert "\x1b" not in told[0]


def test_who_goes_away_has_failed_while_the_run_lasts_and_ended_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = SignedRun().complete()
    told: list[str] = []
    with Store.open(tmp_path / "node") as store:
        node = node_of(signed, store)
        node.console = Console(told.append, terminal=True)
        for over in (False, True):
            monkeypatch.setattr(node_process, "run_is_over", lambda peer, over=over: over)
            node._event("failed", {"peer": signed.peers[1 + over], "was": "suspect"})
            node._event("left", {"peer": signed.peers[1 + over]})
    written = [(event["event"], event["peer"]) for event in read_events(tmp_path / "node")]
    assert written == [("failed", signed.peers[1]), ("left", signed.peers[1]), ("left", signed.peers[2])]
    assert [line.split()[2:4] for line in told] == [["is", "gone"], ["left", "the"], ["left", "the"]]


def test_a_machine_that_has_become_the_only_voter_is_told_to_stay_while_the_run_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    with Store.open(tmp_path / "node") as store:
        node = node_of(SignedRun().complete(), store)
        node.console = Console(told.append, terminal=True)
        for over in (False, True):
            monkeypatch.setattr(node_process, "run_is_over", lambda peer, over=over: over)
            node._event("sole-voter", {})
    assert len(told) == 1
    assert told[0].endswith("voters     1 of 1: this machine must stay until status shows 3 voters")


@pytest.mark.parametrize("behind", [False, True])
def test_the_first_join_line_names_the_newest_certified_record_or_the_one_it_was_joined_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: bool
) -> None:
    signed = SignedRun().complete()
    told: list[str] = []
    pins = WorkloadPins(Layout(()), bytes(32), bytes(32), None, None)
    genesis = signed.ledger.records[0]
    assert isinstance(genesis.body, Genesis)
    anchor = (99, b"r" * 32) if behind else (1, signed.ledger.hashes[1])
    frames = tuple(map(encode, signed.frames))
    config = decode_config(genesis.body.config)

    async def started_only(driver: Driver, start: Callable[[int], object]) -> None:
        assert not any("join with" in line for line in told)
        start(0)

    monkeypatch.setattr(Driver, "run", started_only)
    with Store.open(tmp_path / "node") as store:
        node = _Node(NodeOptions(data_dir=store.path), None, store, told.append)
        node.key = IdentityKey(signed.seeds[0])
        node.run_id = signed.run
        node.run_ = Run(genesis, config, pins, SECRET, frames, anchor)
        node.transport = cast(
            Libp2pTransport, SimpleNamespace(addresses=lambda: ("/ip4/192.0.2.7/tcp/4001",))
        )
        loaded = Loaded(bytes(32), {}, "cpu", "cpu", 1 << 30, "2")
        trio.run(node._live, Started(node.run_, cast(Trainer, None), loaded))
    [line] = [line for line in told if line.startswith("join with")]
    token = parse_token(line.split()[line.split().index("--secret") + 1])
    newest = signed.ledger.certified, signed.ledger.hashes[signed.ledger.certified]
    assert token.anchor == (anchor if behind else newest)
