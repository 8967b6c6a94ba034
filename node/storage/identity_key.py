"""The node's Ed25519 key: made once, kept in the data directory, and the only thing that proves who a node is.

The file `identity.key` holds the key as the libp2p specification says (a protobuf: type Ed25519, then 32 bytes of seed and
32 bytes of public key), so Go, Rust and JavaScript programs can read it. It is created whole or not at all, never replaced, and
refused when others can read it: whoever holds it can vote in this node's name.

Nothing here imports libp2p until the host's key pair is asked for: `p2pcoord status` and `verify` read the key too, and
libp2p takes a second to import.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nacl.signing import SigningKey

from node.storage.whole_file import whole_file
from p2pcoord.errors import UserError
from p2pcoord.identity import peer_id_of

if TYPE_CHECKING:
    from libp2p.crypto.keys import KeyPair

FILE_NAME = "identity.key"

# Protobuf of libp2p's PrivateKey message: field 1 (key type) = 1 (Ed25519), field 2 (data) of 64 bytes.
# See "Keys" in the libp2p peer-ids specification.
_PRIVATE_KEY_PREFIX = bytes.fromhex("08011240")
_FILE_BYTES = len(_PRIVATE_KEY_PREFIX) + 64


class IdentityKey:
    """An Ed25519 key pair. `seed` is the 32 secret bytes; nothing prints it."""

    def __init__(self, seed: bytes) -> None:
        self.signing_key = SigningKey(seed)
        self.public_key = bytes(self.signing_key.verify_key)
        self.peer_id = peer_id_of(self.public_key)

    @classmethod
    def generate(cls) -> IdentityKey:
        """A new random key, held in memory only."""
        return cls(bytes(SigningKey.generate()))

    @property
    def seed(self) -> bytes:
        return bytes(self.signing_key)

    def libp2p_key_pair(self) -> KeyPair:
        """The same key as a libp2p host wants it."""
        from libp2p.crypto.ed25519 import create_new_key_pair

        return create_new_key_pair(self.seed)

    def __repr__(self) -> str:
        return f"IdentityKey({self.peer_id})"


def load_or_create(directory: Path) -> IdentityKey:
    """The key of this data directory; made (with the directory) when there is none.

    Two processes that create it at once end up with the same key: the second one reads what the first one made.

    Raises UserError when the file can be read by others, is damaged, or cannot be read or written.
    """
    path = directory / FILE_NAME
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _create(path, IdentityKey.generate())
    except OSError as error:
        raise UserError(f"cannot write the node's key {path}: {error.strerror or error}") from error
    return load(directory)


def load(directory: Path) -> IdentityKey:
    """The key of this data directory. Raises UserError when there is none, or as `load_or_create` does."""
    path = directory / FILE_NAME
    try:
        # O_NONBLOCK: opening a FIFO of that name must not hang.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise UserError(f"no key in {directory}: it is not the data directory of a node") from error
    except OSError as error:
        raise UserError(f"cannot read the node's key {path}: {error.strerror or error}") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"the node's key {path} is not a regular file")
        if status.st_mode & 0o077:
            raise UserError(f"other users can read the node's key: run  chmod 600 {path}")
        data = file.read(_FILE_BYTES + 1)
    seed, public = data[4:36], data[36:]
    if len(data) != _FILE_BYTES or not data.startswith(_PRIVATE_KEY_PREFIX):
        raise UserError(f"the node's key {path} is damaged: restore it, or remove it to join as a new peer")
    key = IdentityKey(seed)
    if key.public_key != public:  # a flipped bit would silently make this node somebody else
        raise UserError(f"the node's key {path} is damaged: restore it, or remove it to join as a new peer")
    return key


def _create(path: Path, key: IdentityKey) -> None:
    """Write the key beside its place, make it durable, and put it there unless somebody else did in the meantime."""
    with suppress(FileExistsError), whole_file(path, replace=False, mode=0o600) as temporary:
        temporary.chmod(0o600)  # whatever the umask
        temporary.write_bytes(_PRIVATE_KEY_PREFIX + key.seed + key.public_key)
