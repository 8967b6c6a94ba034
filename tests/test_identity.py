import base58
import msgspec
import pytest
from nacl.signing import SigningKey

from p2pcoord import identity
from p2pcoord.consensus.statements import Acknowledgement, Farewell, Grant, Vote
from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.identity import (
    Authority,
    Ed25519Signer,
    Statement,
    peer_id_of,
    public_key_of,
    signed_bytes,
    verify_ed25519,
)

RUN = b"r" * 32
SIGNER = Ed25519Signer(b"1" * 32)
OTHER = Ed25519Signer(b"2" * 32)


def authority(signer: Ed25519Signer = SIGNER, run: bytes = RUN) -> Authority:
    return Authority(signer, verify_ed25519, run)


def test_a_peer_id_is_libp2p_s() -> None:
    # From the libp2p peer-ids specification: base58 of the identity multihash of the protobuf-encoded public key.
    key = bytes(SigningKey(b"1" * 32).verify_key)
    from libp2p.crypto.ed25519 import Ed25519PublicKey
    from libp2p.peer.id import ID

    assert peer_id_of(key) == str(ID.from_pubkey(Ed25519PublicKey.from_bytes(key)))
    assert peer_id_of(key).startswith("12D3KooW")
    assert public_key_of(peer_id_of(key)) == key


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_public_key_of_another_length_is_our_own_mistake(length: int) -> None:
    with pytest.raises(LocalError):
        peer_id_of(b"k" * length)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not base58: 0OIl",
        "12D3KooW",
        SIGNER.peer_id + "1",
        SIGNER.peer_id[:-1],
        "1" + SIGNER.peer_id,
        base58.b58encode(b"\x12\x20" + b"h" * 32).decode(),  # an RSA peer id: a hash, not a key
        "é",
        "\x00",
    ],
)
def test_what_is_no_ed25519_peer_id_is_refused(text: str) -> None:
    with pytest.raises(RemoteError, match="bad_peer_id"):
        public_key_of(text)
    assert not verify_ed25519(text, b"data", b"s" * 64)


def test_the_length_of_a_peer_id_is_bounded_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def decode(text: str) -> bytes:
        lengths.append(len(text))
        return b""

    monkeypatch.setattr(base58, "b58decode", decode)
    public_key_of.cache_clear()
    with pytest.raises(RemoteError, match="bad_peer_id"):
        public_key_of("z" * 1_000_000)
    assert all(length <= 64 for length in lengths)  # base58 is quadratic: a megabyte takes minutes


def test_a_signed_statement_verifies_and_names_its_signer_only() -> None:
    signed = authority().sign(Farewell(SIGNER.peer_id, 7))
    assert authority(OTHER).verify(SIGNER.peer_id, signed)
    assert not authority().verify(OTHER.peer_id, signed)
    authority().check(SIGNER.peer_id, signed)
    with pytest.raises(RemoteError, match="bad_signature"):
        authority().check(OTHER.peer_id, signed)


@pytest.mark.parametrize(
    "change",
    [
        {"peer": OTHER.peer_id},
        {"height": 8},
        {"signature": b""},
        {"signature": b"x" * 64},
        {"signature": b"x" * 65},
    ],
)
def test_a_changed_statement_does_not_verify(change: dict[str, object]) -> None:
    signed = authority().sign(Farewell(SIGNER.peer_id, 7))
    assert not authority().verify(SIGNER.peer_id, msgspec.structs.replace(signed, **change))


def test_a_statement_does_not_pass_in_another_run() -> None:
    signed = authority().sign(Farewell(SIGNER.peer_id, 7))
    assert not authority(run=b"s" * 32).verify(SIGNER.peer_id, signed)


def test_a_statement_does_not_pass_for_one_of_another_kind() -> None:
    """Grant(term, candidate, voter) and a kind with equal fields differ in what is signed."""

    class Other(Statement, frozen=True, tag="other"):
        term: int
        candidate: str
        voter: str
        signature: bytes = b""

    grant = authority().sign(Grant(3, OTHER.peer_id, SIGNER.peer_id))
    twin = Other(grant.term, grant.candidate, grant.voter, grant.signature)
    assert authority().verify(SIGNER.peer_id, grant)
    assert not authority().verify(SIGNER.peer_id, twin)


def test_all_kinds_of_statements_sign_different_bytes() -> None:
    def kinds(base: type[Statement]) -> list[str]:
        found = []
        for kind in base.__subclasses__():
            if kind.__module__.startswith("p2pcoord"):
                found.append(str(kind.__struct_config__.tag))
            found += kinds(kind)
        return found

    tags = kinds(Statement)
    assert len(set(tags)) == len(tags)
    assert len(tags) >= 6
    assert not any("\x00" in tag for tag in tags)


def test_the_hash_names_the_content_and_not_the_signature() -> None:
    plain = Acknowledgement(1, 2, b"h" * 32, SIGNER.peer_id)
    signed = authority().sign(plain)
    assert authority().hash(plain) == authority().hash(signed)
    assert authority().hash(plain) != authority().hash(msgspec.structs.replace(plain, height=3))
    assert authority().hash(plain) != authority(run=b"s" * 32).hash(plain)


def test_a_statement_without_a_kind_is_our_own_mistake() -> None:
    class Nameless(Statement, frozen=True):
        signature: bytes = b""

    with pytest.raises(LocalError):
        signed_bytes(RUN, Nameless())


def test_a_verified_signature_is_checked_once_and_a_failed_one_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def verify(peer: str, data: bytes, signature: bytes) -> bool:
        calls.append(peer)
        return verify_ed25519(peer, data, signature)

    judge = Authority(OTHER, verify, RUN)
    good = authority().sign(Vote(1, OTHER.peer_id, b"", SIGNER.peer_id))
    bad = msgspec.structs.replace(good, term=2)
    for _ in range(3):
        assert judge.verify(SIGNER.peer_id, good)
        assert not judge.verify(SIGNER.peer_id, bad)
    assert len(calls) == 1 + 3

    # What is remembered is bounded, oldest first.
    monkeypatch.setattr(identity, "VERIFIED_CACHE_SIZE", 2)
    for term in range(3, 6):
        assert judge.verify(SIGNER.peer_id, authority().sign(Vote(term, "", b"", SIGNER.peer_id)))
    calls.clear()
    assert judge.verify(SIGNER.peer_id, good)
    assert len(calls) == 1
