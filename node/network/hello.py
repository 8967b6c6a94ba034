"""What two nodes say before anything else, and the line that brings a joiner to a run.

A **hello** carries protocol, versions, run and the proof that its sender may take part. A protocol that differs, another run
or a wrong secret is refused in words, before any message is read.

A **join token** is what the founder prints behind --secret: the run's secret, the run's id, and the newest certified record
(height, hash) of the node that printed it. So a joiner knows which run it is brought to, and refuses a chain without that
record. The secret itself is never sent: a joiner proves that it knows it (`rounds/participation.py`).
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata

import base58
import msgspec

from p2pcoord.errors import RemoteError, UserError
from p2pcoord.identity import PROTOCOL_VERSION
from p2pcoord.rounds.participation import join_proof
from p2pcoord.wire import decode, encode

MAX_HELLO_BYTES = 4096
SECRET_BYTES = 16
_TOKEN_PREFIX = "p2p1"

# The words in which a node refuses one that names another run. Who gave a --secret is told that it is the wrong one.
OTHER_RUN = "peer belongs to another run"


# Letters shown of a version that a peer claims.
MAX_VERSION = 32


class Hello(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`run` is empty for a joiner that was given no token (an open run); `proof` as in an Admission."""

    protocol: int
    program: str
    python: str
    torch: str
    run: bytes
    proof: bytes


def program_version() -> str:
    try:
        return metadata.version("p2pcoord")
    except metadata.PackageNotFoundError:
        return "0"


def torch_version() -> str:
    """As installed; torch itself is not imported here."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def make_hello(run: bytes, proof: bytes) -> bytes:
    return encode(
        Hello(PROTOCOL_VERSION, program_version(), platform.python_version(), torch_version(), run, proof)
    )


def proof_of(secret: bytes | None, run: bytes, peer_id: str) -> bytes:
    """What a peer shows of the secret in its hello and admission; empty where it has none (an open run)."""
    return join_proof(secret, run, peer_id) if secret else b""


def check_hello(data: bytes, run: bytes, may_join: Callable[[bytes], str]) -> str | None:
    """Why a peer's hello is refused, in words for its user; None when it is welcome.

    `run` is ours, empty while we do not know it. `may_join(proof)` says why its proof does not hold ("" when it does).
    """
    try:
        protocol = _protocol(data)
        if protocol != PROTOCOL_VERSION:
            older = "upgrade this program" if protocol > PROTOCOL_VERSION else "upgrade the peer"
            return f"peer speaks protocol {protocol}, this program {PROTOCOL_VERSION}: {older}"
        hello = decode(data, Hello, limit=MAX_HELLO_BYTES)
    except RemoteError as error:
        return f"no p2pcoord node: its hello is {error.kind}"
    if hello.run and run and hello.run != run:
        return OTHER_RUN
    return may_join(hello.proof) or None


def other_versions(data: bytes) -> tuple[str, str] | None:
    """What a peer whose hello `check_hello` accepted runs, and what we run; None where the two are alike.

    Of Python only the minor version counts. Versions of one protocol work together, but what one of them gets wrong the
    other may not, and local training may differ in its last bits.
    """
    hello = decode(data, Hello, limit=MAX_HELLO_BYTES)
    theirs = (hello.program[:MAX_VERSION], hello.python[:MAX_VERSION], hello.torch[:MAX_VERSION])
    ours = (program_version(), platform.python_version(), torch_version())
    if (theirs[0], theirs[1].rpartition(".")[0], theirs[2]) == (ours[0], ours[1].rpartition(".")[0], ours[2]):
        return None
    told = "p2pcoord {}, Python {}, torch {}"
    return told.format(*theirs), told.format(*ours)


def _protocol(data: bytes) -> int:
    """The protocol of any version's hello: its first field, whatever follows."""
    import cbor2

    if len(data) > MAX_HELLO_BYTES:
        raise RemoteError("oversized")
    try:
        fields = cbor2.loads(data, max_depth=4, allow_indefinite=False)
    except Exception as error:  # the decoder raises what it likes on hostile bytes
        raise RemoteError("malformed", str(error)) from None
    if not isinstance(fields, list) or not fields or not isinstance(fields[0], int):
        raise RemoteError("bad_type", "no hello")
    return fields[0]


class JoinToken(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`secret` is empty for an open run, `record` where whoever made the token knew none."""

    secret: bytes
    run: bytes
    height: int
    record: bytes

    @property
    def anchor(self) -> tuple[int, bytes] | None:
        """What the joiner's chain must have."""
        return (self.height, self.record) if self.record else None

    def text(self) -> str:
        return _TOKEN_PREFIX + base58.b58encode_check(encode(self)).decode()


def parse_token(text: str) -> JoinToken:
    """Raises UserError (exit code 2) for anything that is not a whole token."""
    wrong = UserError(
        "--secret is not what a node of the run printed: copy the whole line again (a letter is wrong or missing)",
        exit_code=2,
    )
    if not text.startswith(_TOKEN_PREFIX):
        raise wrong
    try:
        return decode(base58.b58decode_check(text[len(_TOKEN_PREFIX) :]), JoinToken)
    except (ValueError, RemoteError):
        raise wrong from None
