"""Opening a directory: whose log must not be used comes back as a new peer, and nothing of the old one is lost."""

from pathlib import Path

import msgspec
import pytest

from node.network.hello import JoinToken
from node.run import LOCAL_FILE, Local, authority_of, read_local, write_local
from node.start import NodeOptions, open_directory, remembered
from node.storage.identity_key import FILE_NAME, load_or_create
from node.storage.store import Store
from p2pcoord.consensus.record import make_genesis
from p2pcoord.consensus.voter import Appended, Owner
from p2pcoord.content import ContentRef
from p2pcoord.errors import UserError
from p2pcoord.layout import Layout
from p2pcoord.run_config import RunSettings, found_run, run_id
from p2pcoord.run_config import encode as encode_config
from p2pcoord.wire import encode
from p2pcoord.workload import WorkloadPins
from tests.node.storage.signed_run import SignedRun


def opened(directory: Path) -> tuple[str, list[str]]:
    """Peer id, and what was told."""
    told: list[str] = []
    with Store.open(directory) as store:
        key, run = open_directory(store, None, told.append)
    assert run is None
    return key.peer_id, told


def test_an_empty_directory_gets_a_key_that_stays(tmp_path: Path) -> None:
    peer, told = opened(tmp_path / "node")
    assert told == []
    assert opened(tmp_path / "node") == (peer, [])


def test_what_was_given_at_the_last_start_holds_until_another_is_given() -> None:
    local = Local(b"s", "text", {"path": "/a"}, "lab1", None, ("/ip4/0.0.0.0/tcp/1",), ("c:3",), "cpu")
    nothing = NodeOptions(data_dir=Path("d"))
    kept = NodeOptions(
        data_dir=Path("d"), local={"path": "/a"}, name="lab1", listen=("/ip4/0.0.0.0/tcp/1",), announce=("c:3",), device="cpu"
    )  # fmt: skip
    assert remembered(nothing, None) == nothing
    assert remembered(nothing, local) == kept
    given = NodeOptions(
        data_dir=Path("d"), local={"path": "/b"}, name="lab2", listen=("/ip4/0.0.0.0/tcp/2",), announce=("d:4",), device="auto"
    )  # fmt: skip
    assert remembered(given, local) == given


def test_a_damaged_file_of_how_the_node_was_started_is_told_in_words(tmp_path: Path) -> None:
    with Store.open(tmp_path / "node") as store:
        write_local(store, Local(b"s", "text", {}, "lab1"))
        whole = (store.path / LOCAL_FILE).read_bytes()
        for damaged in (whole[:-4], whole.replace(b"secret", b"sEcret"), b"", b"\xff" * 40):
            (store.path / LOCAL_FILE).write_bytes(damaged)
            with pytest.raises(UserError, match=r"node\.cbor is damaged \(.*remove it") as caught:
                read_local(store)
            assert caught.value.exit_code == 1


def test_a_key_whose_log_is_gone_is_retired(tmp_path: Path) -> None:
    old, _ = opened(tmp_path / "node")
    with Store.open(tmp_path / "node") as store:
        write_local(store, Local(b"s", "text", {}, "lab1"))
    new, told = opened(tmp_path / "node")
    assert new != old
    assert told == [f"the key is here, but its log is gone: this machine comes back as a new peer, {new}"]
    assert (tmp_path / "node" / f"{FILE_NAME}.retired").exists()


def test_a_log_that_is_damaged_is_set_aside_with_its_key(tmp_path: Path) -> None:
    directory = tmp_path / "node"
    SignedRun().write(directory)
    log = directory / "log"
    data = bytearray(log.read_bytes())
    data[len(data) // 2 - 200 : len(data) // 2 + 200] = bytes(400)
    log.write_bytes(data)
    peer, told = opened(directory)
    assert len(told) == 1
    assert told[0].startswith("the log cannot be used (")
    assert told[0].endswith(f"this machine comes back as a new peer, {peer}")
    assert (directory / "log.refused-1").read_bytes() == bytes(data)
    assert (directory / f"{FILE_NAME}.retired").exists()
    assert opened(directory) == (peer, [])


def test_a_log_of_another_key_is_set_aside(tmp_path: Path) -> None:
    directory = tmp_path / "node"
    SignedRun().write(directory)
    written = (directory / "log").read_bytes()
    (directory / FILE_NAME).unlink()
    peer, told = opened(directory)
    assert told == [
        "the log cannot be used (the log belongs to another key): this machine comes back as a new peer, "
        + peer
    ]
    assert (directory / "log.refused-1").read_bytes() == written
    assert opened(directory) == (peer, [])


@pytest.mark.parametrize("open_run", [False, True])
def test_a_closed_run_is_not_gone_on_with_without_its_secret(tmp_path: Path, open_run: bool) -> None:
    """Every proof would hold, as in an open run."""
    with Store.open(tmp_path / "node"):
        key = load_or_create(tmp_path / "node")
    config = found_run(
        RunSettings(), founder=key.peer_id, nonce=bytes(16), workload_spec="text", open=open_run
    )
    pins = encode(WorkloadPins(Layout(()), bytes(32), bytes(32), None, None))
    genesis = make_genesis(
        authority_of(key, run_id(config)), encode_config(config), pins, ContentRef(bytes(32), 0)
    )
    with Store.open(tmp_path / "node") as store:
        store.append([encode(Owner(key.peer_id, run_id(config))), encode(Appended(genesis))])

    def secret(token: JoinToken | None = None) -> bytes | None:
        with Store.open(tmp_path / "node") as store:
            _, run = open_directory(store, token, print)
            assert run is not None
            return run.secret

    if open_run:
        assert secret() is None
        return
    given = JoinToken(b"s" * 16, run_id(config), 0, b"")
    for token in (
        None,
        msgspec.structs.replace(given, run=bytes(32)),
        msgspec.structs.replace(given, secret=b""),
    ):
        with pytest.raises(UserError, match="the run's secret: add the --secret"):
            secret(token)
    assert secret(given) == given.secret
    with Store.open(tmp_path / "node") as store:
        write_local(store, Local(b"kept", "text", {}, "lab1"))
    assert secret(given) == b"kept"
