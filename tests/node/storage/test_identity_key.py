"""The node's key file: created once, durable, private, and the same identity as libp2p derives from it."""

import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from node.storage.identity_key import FILE_NAME, IdentityKey, load, load_or_create
from p2pcoord.errors import UserError
from p2pcoord.identity import public_key_of


def test_a_new_directory_gets_a_key_that_only_its_owner_can_read(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    old = os.umask(0)
    try:
        load_or_create(directory)
    finally:
        os.umask(old)
    assert stat.S_IMODE((directory / FILE_NAME).stat().st_mode) == 0o600
    assert [entry.name for entry in directory.iterdir()] == [FILE_NAME]


def test_the_same_directory_keeps_its_identity(tmp_path: Path) -> None:
    first = load_or_create(tmp_path)
    assert load_or_create(tmp_path).peer_id == load(tmp_path).peer_id == first.peer_id


def test_the_peer_id_is_the_one_libp2p_derives() -> None:
    from libp2p.peer.id import ID

    key = IdentityKey.generate()
    assert key.peer_id == str(ID.from_pubkey(key.libp2p_key_pair().public_key))
    assert key.peer_id.startswith("12D3KooW")
    assert public_key_of(key.peer_id) == key.public_key


def test_the_file_is_the_private_key_message_of_the_libp2p_specification(tmp_path: Path) -> None:
    # Test vector of the libp2p peer-ids specification, section "Test vectors", Ed25519.
    vector = bytes.fromhex(
        "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
        "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
    )
    path = tmp_path / FILE_NAME
    path.write_bytes(vector)
    path.chmod(0o600)
    key = load(tmp_path)
    assert key.public_key == vector[-32:]
    assert load_or_create(tmp_path / "other").seed != key.seed
    assert (tmp_path / "other" / FILE_NAME).read_bytes()[:4] == vector[:4]


def test_what_it_signs_is_verified_by_the_key_inside_the_peer_id() -> None:
    from nacl.signing import VerifyKey

    key = IdentityKey.generate()
    signature = key.signing_key.sign(b"words").signature
    VerifyKey(public_key_of(key.peer_id)).verify(b"words", signature)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o610])
def test_a_key_that_others_can_reach_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    load_or_create(tmp_path)
    path = tmp_path / FILE_NAME
    path.chmod(mode)
    with pytest.raises(UserError, match=f"chmod 600 {path}"):
        load_or_create(tmp_path)


def test_any_flipped_byte_or_length_is_refused_and_the_file_stays(tmp_path: Path) -> None:
    load_or_create(tmp_path)
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    damaged = [whole[:-1], whole + b"\0", b""]
    damaged += [whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :] for at in range(len(whole))]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(UserError, match="damaged"):
            load_or_create(tmp_path)
        assert path.read_bytes() == data


def test_a_missing_key_and_a_pipe_in_its_place_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the data directory of a node"):
        load(tmp_path)
    os.mkfifo(tmp_path / FILE_NAME, 0o600)
    with pytest.raises(UserError, match="not a regular file"):
        load(tmp_path)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the node's key"):
        load_or_create(tmp_path / "file" / "data")


def _peer_id(directory: Path) -> str:
    return load_or_create(directory).peer_id


def test_processes_that_create_it_at_once_agree_on_one_key(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        peers = pool.map(_peer_id, [tmp_path / "data"] * 16, chunksize=1)
    assert len(set(peers)) == 1


def test_the_secret_is_not_printed() -> None:
    key = IdentityKey.generate()
    assert key.seed.hex() not in repr(key) and repr(key) == f"IdentityKey({key.peer_id})"
