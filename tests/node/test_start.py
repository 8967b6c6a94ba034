"""Opening a directory: whose log must not be used comes back as a new peer, and nothing of the old one is lost."""

from pathlib import Path

from node.identity_key import FILE_NAME
from node.run import Local, write_local
from node.start import open_directory
from node.store import Store
from tests.node.signed_run import SignedRun


def opened(directory: Path) -> tuple[str, list[str]]:
    """Peer id, and what was told."""
    told: list[str] = []
    with Store.open(directory) as store:
        key, run = open_directory(store, told.append)
    assert run is None
    return key.peer_id, told


def test_an_empty_directory_gets_a_key_that_stays(tmp_path: Path) -> None:
    peer, told = opened(tmp_path / "node")
    assert told == []
    assert opened(tmp_path / "node") == (peer, [])


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
