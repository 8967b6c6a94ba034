"""Who speaks, and how a statement is signed so that it convinces a third party.

A peer is named by its libp2p peer id: base58 of the identity multihash of its Ed25519 public key, so name and key are the
same thing and nothing has to be looked up. A *statement* is a frozen struct whose last field is `signature`. What is
signed is

    b"p2pcoord/1" || 0 || kind || 0 || run id || canonical CBOR of the statement with an empty signature

so a statement never passes for one of another kind, another run or another protocol version. Messages are refused unless
re-encoding gives the bytes received (`wire.py`), hence the bytes signed here are the bytes that were sent.

The scheme itself is a parameter: nodes use Ed25519 (PyNaCl); the simulated world uses a keyed hash of the same shape, which
is thirty times cheaper and just as unforgeable for peers that are not given each other's keys.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from typing import Annotated, Protocol, TypeVar

import base58
import msgspec
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.wire import encode

PROTOCOL_VERSION = 1
DOMAIN = b"p2pcoord/%d\x00" % PROTOCOL_VERSION

# A libp2p peer id of an Ed25519 key: identity multihash (0x00), 36 bytes (0x24), of the protobuf
# {Type: Ed25519 (0x08 0x01), Data: 32 bytes (0x12 0x20)}. See the libp2p peer-ids specification.
_PEER_ID_PREFIX = bytes.fromhex("002408011220")

# 38 bytes make 52 characters.
MAX_PEER_ID_LENGTH = 64

# Fields of statements, bounded where they are decoded: two statements that are evidence travel on in a record.
PeerId = Annotated[str, msgspec.Meta(max_length=MAX_PEER_ID_LENGTH)]
Sha256 = Annotated[bytes, msgspec.Meta(max_length=32)]
Signature = Annotated[bytes, msgspec.Meta(max_length=64)]

# Verified signatures remembered, so that a certificate seen in ten messages costs one check: those of the largest round (800
# contributors) several times over, in less than 1 MiB.
VERIFIED_CACHE_SIZE = 4096


def peer_id_of(public_key: bytes) -> str:
    """The libp2p peer id of a 32-byte Ed25519 public key."""
    if len(public_key) != 32:
        raise LocalError(f"an Ed25519 public key has 32 bytes, not {len(public_key)}")
    return base58.b58encode(_PEER_ID_PREFIX + public_key).decode()


@lru_cache(maxsize=65_536)
def public_key_of(peer_id: str) -> bytes:
    """The 32-byte Ed25519 public key inside a peer id. Raises RemoteError("bad_peer_id") for anything else."""
    if len(peer_id) > MAX_PEER_ID_LENGTH:  # decoding base58 takes quadratic time
        raise RemoteError("bad_peer_id", f"{len(peer_id)} characters")
    try:
        raw = base58.b58decode(peer_id)
    except ValueError:
        raw = b""
    if len(raw) != 38 or not raw.startswith(_PEER_ID_PREFIX):
        raise RemoteError("bad_peer_id", f"{peer_id[:64]!r} is no Ed25519 peer id")
    return raw[6:]


class Signer(Protocol):
    """Holds one peer's private key."""

    @property
    def peer_id(self) -> str: ...

    def sign(self, data: bytes) -> bytes: ...


Verify = Callable[[str, bytes, bytes], bool]
"""(peer id, data, signature) -> whether that peer signed that data. Never raises."""


class Ed25519Signer:
    """Signs with a 32-byte Ed25519 seed."""

    def __init__(self, seed: bytes) -> None:
        self._key = SigningKey(seed)
        self.peer_id = peer_id_of(bytes(self._key.verify_key))

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data).signature


def verify_ed25519(peer_id: str, data: bytes, signature: bytes) -> bool:
    """Whether `peer_id` signed `data`. False, never an exception, for malformed ids and signatures."""
    try:
        VerifyKey(public_key_of(peer_id)).verify(data, signature)
    except (BadSignatureError, RemoteError, ValueError, TypeError):
        return False
    return True


class Statement(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of everything signed. Subclasses set a tag (the kind) and end with `signature: bytes`."""


S = TypeVar("S", bound=Statement)


def signed_bytes(run: bytes, statement: Statement) -> bytes:
    kind = statement.__struct_config__.tag
    if not isinstance(kind, str):
        raise LocalError(f"{type(statement).__name__} has no kind")
    return b"".join(
        (DOMAIN, kind.encode(), b"\x00", run, encode(msgspec.structs.replace(statement, signature=b"")))
    )


def statement_hash(run: bytes, statement: Statement) -> bytes:
    """Names a statement by its content: sha256 of the bytes its signature covers (so not of the signature)."""
    return sha256(signed_bytes(run, statement)).digest()


class Authority:
    """Signs this peer's statements and checks everybody's, within one run."""

    def __init__(self, signer: Signer, verify: Verify, run: bytes) -> None:
        self.peer_id = signer.peer_id
        self.run = run
        self._signer = signer
        self._verify = verify
        self._verified: OrderedDict[bytes, None] = OrderedDict()

    def sign(self, statement: S) -> S:
        return msgspec.structs.replace(
            statement, signature=self._signer.sign(signed_bytes(self.run, statement))
        )

    def hash(self, statement: Statement) -> bytes:
        return statement_hash(self.run, statement)

    def verify(self, signer: str, statement: Statement) -> bool:
        """Whether `signer` signed `statement` in this run. Positive answers are remembered."""
        data = signed_bytes(self.run, statement)
        signature: bytes = statement.signature  # type: ignore[attr-defined]  # every Statement ends with it
        key = sha256(b"\x00".join((signer.encode(), sha256(data).digest(), signature))).digest()
        if key in self._verified:
            self._verified.move_to_end(key)
            return True
        if not self._verify(signer, data, signature):
            return False
        self._verified[key] = None
        if len(self._verified) > VERIFIED_CACHE_SIZE:
            self._verified.popitem(last=False)
        return True

    def check(self, signer: str, statement: Statement) -> None:
        """Raises RemoteError("bad_signature") unless `signer` signed `statement`."""
        if not self.verify(signer, statement):
            raise RemoteError("bad_signature", f"{type(statement).__name__} not signed by {signer}")
