"""The model file DIR/model/latest.safetensors carries a checksum of itself, and says which version and state it is.

    __metadata__    p2pcoord_version    of which certified version it is
                    p2pcoord_state      that version's state hash
                    p2pcoord_sha256     SHA-256 of the whole file, with zeros in the place of these 64 digits

A safetensors file says nothing of its own bytes: one that was damaged on the disk loads without a word.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

from p2pcoord.errors import LocalError

CHECKSUM: Final = "p2pcoord_sha256"
NO_CHECKSUM: Final = "0" * 64
"""Stands in the file until it is sealed."""

MAX_HEADER_BYTES: Final = 64 << 20
"""Of a safetensors file: names and shapes, some 100 bytes a tensor. Their own limit is 100 MB."""

_LENGTH_BYTES: Final = 8
_READ_BYTES: Final = 1 << 20


class DamagedModel(LocalError):
    """The file is not as it was written."""


class ModelInfo(msgspec.Struct, frozen=True):
    """What a whole model file says of itself; `state` is in hexadecimal."""

    version: int
    state: str


def seal(path: Path) -> None:
    """Writes the checksum into a complete file that has NO_CHECKSUM in its place. Raises OSError."""
    with path.open("r+b") as file:
        _, at = _header(file)
        digest = _digest(file, at)
        file.seek(at)
        file.write(digest.encode())


def check_model(file: BinaryIO) -> ModelInfo:
    """Reads all of a model file; it stands at its beginning afterwards. Raises DamagedModel."""
    metadata, at = _header(file)
    found = metadata.get(CHECKSUM)
    if found != _digest(file, at):
        raise DamagedModel("its bytes are not those that its checksum is of")
    file.seek(0)
    try:
        return ModelInfo(int(metadata["p2pcoord_version"]), str(metadata["p2pcoord_state"]))
    except (KeyError, ValueError):
        raise DamagedModel("it does not say which version it is") from None


def _header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The metadata, and where in the file the checksum stands."""
    file.seek(0)
    size = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    data = file.read(size) if size <= MAX_HEADER_BYTES else b""
    mark = f'"{CHECKSUM}":"'.encode()
    try:
        metadata = msgspec.json.decode(data)["__metadata__"]
        return dict(metadata), _LENGTH_BYTES + data.index(mark) + len(mark)
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        raise DamagedModel("its header cannot be read") from None


def _digest(file: BinaryIO, at: int) -> str:
    digest = sha256()
    file.seek(0)
    digest.update(file.read(at))
    file.seek(len(NO_CHECKSUM), 1)
    digest.update(NO_CHECKSUM.encode())
    while block := file.read(_READ_BYTES):
        digest.update(block)
    return digest.hexdigest()
