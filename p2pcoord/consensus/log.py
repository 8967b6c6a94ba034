"""The log's bytes: how records become a file, and how they are read back after a crash or from a bad disk.

Theory of operation
    A log file is a sequence of frames and nothing else. Each frame is written twice, one copy directly behind
    the other, and every append ends with one fsync. One copy is a header of 64 bytes and the payload,
    big-endian:

        magic 4 | chain 48: salt 8, index 8, digest 32 | position 4 | length 4 | crc 4 | payload

    `chain` is what the frame follows: the log's salt, the number of frames before this one (so its own
    index), and SHA-256 over the previous frame's chain and payload. `position` is the number of frames before
    this one in the same append (the same fsync). `crc` is CRC-32 over all of the header before it and the
    payload.

    The salt is random for every log file. It makes the start of a frame a mark that nobody else can write:
    neither bytes that a peer chose and that lie inside a payload, nor blocks of an older log that a file
    system hands back after a crash, can pass for a frame of this log (SQLite's write-ahead log uses its salts
    for the latter).

Recovery, frame by frame
    both copies equal and intact        the payload is taken
    one copy intact                     the payload is taken, the other copy is rewritten from it
    none, and nothing after it          the append was never synced, so nobody was told of it: cut there
    none, and intact frames after it    those of the *same* append prove nothing, since a disk may write one
                                        append's sectors in any order: cut there. One of a *later* append
                                        proves that this one was synced, since appends never overlap: refuse,
                                        raise `CorruptLog`

    A length that cannot be trusted never moves the reader: after a bad first copy it looks for the very bytes
    that the second copy must begin with (magic and expected chain), and the distance to them must be that
    copy's size.

    So one flipped byte anywhere costs nothing. What cannot be seen is a file rolled back by whole frames, and
    damage to both copies within the newest append, which looks like an append that was never synced.

The functions are pure: bytes in, bytes out. Reading a file while another process appends to it is safe: what
is not finished yet is a cut tail, never corruption.
"""

import hashlib
import struct
import zlib
from collections.abc import Iterable

import msgspec

from p2pcoord.errors import LocalError

MAGIC = b"\xf5p2L"
"""Begins with a byte that valid UTF-8 never holds, so text in a payload is no candidate for the scan."""

SALT_BYTES = 8
_CHAIN = struct.Struct(">8sQ32s")
_LENGTHS = struct.Struct(">III")
CHAIN_BYTES = _CHAIN.size
_LENGTHS_AT = len(MAGIC) + CHAIN_BYTES
HEADER_BYTES = _LENGTHS_AT + _LENGTHS.size
_CRC_AT = HEADER_BYTES - 4

MAX_PAYLOAD_BYTES = (1 << 20) + (64 << 10)
"""A message is at most 1 MiB on the wire; 64 KiB more leave room for what the log wraps around it."""

MAX_FRAME_BYTES = HEADER_BYTES + MAX_PAYLOAD_BYTES
"""One copy of the largest frame. It bounds what a damaged length field can make recovery read or search."""

MAX_FALSE_STARTS = 10_000
"""Frame starts that turn out damaged, after which the search behind a lost frame ends in a refusal. An append
holds a few frames; so many marks are no unsynced tail, and each may cost a checksum over 1 MiB."""

NO_SALT = bytes(SALT_BYTES)
_FIRST = bytes(CHAIN_BYTES - SALT_BYTES)  # index 0, and no frame before it to hash


class CorruptLog(LocalError):
    """Frames that had been synced are lost. The log must not be used: its votes and records may be forgotten.

    `index` and `offset` (bytes) say where the first lost frame is.
    """

    def __init__(self, index: int, offset: int, reason: str) -> None:
        super().__init__(f"log frame {index} at byte {offset}: {reason}")
        self.index = index
        self.offset = offset


class Tail(msgspec.Struct, frozen=True):
    """Where the next frame goes: the chain that it must follow (48 bytes), and its offset in bytes."""

    chain: bytes
    offset: int

    @property
    def frames(self) -> int:
        """The number of frames before the tail, which is the next frame's index."""
        return _index(self.chain)


class Recovery(msgspec.Struct, frozen=True):
    """What a log file holds.

    payloads       every payload that survives, oldest first; all that were synced are among them
    tail           where the next append goes
    valid_length   the file's length in bytes once `repairs` are written and the rest is cut; equals
                   `tail.offset`
    proven_length  bytes whose fsync is proven by a later append; what lies between here and `valid_length` is
                   readable but may never have been synced, so it must be synced before anybody relies on it
    repairs        (offset, bytes) to write over damaged or missing copies; the last may reach past the end of
                   the file
    cut            there were bytes behind `valid_length`
    """

    payloads: tuple[bytes, ...]
    tail: Tail
    valid_length: int
    proven_length: int
    repairs: tuple[tuple[int, bytes], ...]
    cut: bool

    @property
    def damaged(self) -> tuple[int, ...]:
        """Offsets of damaged copies that a later append proves synced: the disk changed them."""
        return tuple(offset for offset, _ in self.repairs if offset < self.proven_length)


class _Copy(msgspec.Struct, frozen=True, gc=False):
    chain: bytes
    position: int
    payload: bytes
    size_bytes: int


def start(salt: bytes = NO_SALT) -> Tail:
    """The tail of an empty log. `salt`: 8 random bytes, new for every log file and told to nobody.

    Raises LocalError for a salt of another length.
    """
    if len(salt) != SALT_BYTES:
        raise LocalError(f"a log's salt has {SALT_BYTES} bytes, not {len(salt)}")
    return Tail(salt + _FIRST, 0)


def frame(payload: bytes, previous: bytes, position: int = 0) -> tuple[bytes, bytes]:
    """Encode one payload as both copies of a frame; return them and the chain that the next frame follows.

    `previous` is the chain to follow (from `start`, or an earlier call); `position` counts the frames before
    it in the same fsync. Raises LocalError when the payload is larger than MAX_PAYLOAD_BYTES or `previous` is
    no chain.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise LocalError(f"a log payload has at most {MAX_PAYLOAD_BYTES} bytes, not {len(payload)}")
    if len(previous) != CHAIN_BYTES:
        raise LocalError(f"a chain has {CHAIN_BYTES} bytes, not {len(previous)}")
    header = MAGIC + previous + struct.pack(">II", position, len(payload))
    crc = zlib.crc32(payload, zlib.crc32(header))
    copy = b"".join((header, crc.to_bytes(4, "big"), payload))
    return copy + copy, _next_chain(previous, payload)


def append(payloads: Iterable[bytes], tail: Tail) -> tuple[bytes, Tail]:
    """Encode payloads as one append: the bytes to write at `tail.offset` in one fsync, and the next tail."""
    chain, encoded = tail.chain, []
    for position, payload in enumerate(payloads):
        both, chain = frame(payload, chain, position)
        encoded.append(both)
    data = b"".join(encoded)
    return data, Tail(chain, tail.offset + len(data))


def recover(data: bytes, salt: bytes = NO_SALT) -> Recovery:
    """Read a log file's bytes back, as the module's rules say.

    `salt` is used only when no frame survives, for the tail of the log that begins then. Raises CorruptLog
    when frames that had been synced are lost.
    """
    payloads: list[bytes] = []
    repairs: list[tuple[int, bytes]] = []
    chain = start(salt).chain
    offset = proven = 0
    while offset < len(data):
        first = not payloads
        copy = _copy_at(data, offset)
        if copy is not None and _follows(copy, chain, first):
            second = offset + copy.size_bytes
            if not _equal_at(data, offset, second, copy.payload):
                if _copy_at(data, second) is not None:
                    reason = f"its copies are intact and differ, the second at byte {second}: none is chosen"
                    raise CorruptLog(len(payloads), offset, reason)
                repairs.append((second, data[offset:second]))
        else:
            copy = _second_copy(data, offset, chain, first)
            if copy is None:
                _refuse_if_synced(data, offset, len(payloads), None if first else chain[:SALT_BYTES])
                break
            second = offset + copy.size_bytes
            repairs.append((offset, data[second : second + copy.size_bytes]))
        if copy.position == 0:
            proven = offset
        payloads.append(copy.payload)
        chain = _next_chain(copy.chain, copy.payload)
        offset += 2 * copy.size_bytes
    return Recovery(
        payloads=tuple(payloads),
        tail=Tail(chain, offset),
        valid_length=offset,
        proven_length=proven,
        repairs=tuple(repairs),
        cut=offset < len(data),
    )


def _index(chain: bytes) -> int:
    return int.from_bytes(chain[SALT_BYTES : SALT_BYTES + 8], "big")


def _next_chain(chain: bytes, payload: bytes) -> bytes:
    digest = hashlib.sha256(chain)
    digest.update(payload)
    return _CHAIN.pack(chain[:SALT_BYTES], _index(chain) + 1, digest.digest())


def _follows(copy: _Copy, chain: bytes, first: bool) -> bool:
    """The first frame brings the salt with it; every other one names the chain exactly."""
    return copy.chain[SALT_BYTES:] == _FIRST if first else copy.chain == chain


def _copy_at(data: bytes, offset: int) -> _Copy | None:
    """The copy that begins at `offset`, if it is whole and its checksum is right."""
    body = offset + HEADER_BYTES
    if body > len(data) or not data.startswith(MAGIC, offset):
        return None
    position, length, crc = _LENGTHS.unpack_from(data, offset + _LENGTHS_AT)
    if length > MAX_PAYLOAD_BYTES or body + length > len(data):
        return None
    payload = data[body : body + length]
    if zlib.crc32(payload, zlib.crc32(data[offset : offset + _CRC_AT])) != crc:
        return None
    return _Copy(data[offset + len(MAGIC) : offset + _LENGTHS_AT], position, payload, HEADER_BYTES + length)


def _equal_at(data: bytes, one: int, other: int, payload: bytes) -> bool:
    header = data[one : one + HEADER_BYTES]
    return data.startswith(header, other) and data.startswith(payload, other + HEADER_BYTES)


def _second_copy(data: bytes, offset: int, chain: bytes, first: bool) -> _Copy | None:
    """The second copy of the frame that should begin at `offset`, when the first one there is damaged."""
    mark = MAGIC if first else MAGIC + chain
    limit = offset + MAX_FRAME_BYTES + len(mark)
    at = data.find(mark, offset + HEADER_BYTES, limit)
    for _ in range(MAX_FALSE_STARTS):
        if at < 0:
            return None
        copy = _copy_at(data, at)
        if copy is not None and copy.size_bytes == at - offset and _follows(copy, chain, first):
            return copy
        at = data.find(mark, at + 1, limit)
    return None


def _refuse_if_synced(data: bytes, offset: int, index: int, salt: bytes | None) -> None:
    """Raise CorruptLog if an intact frame from `offset` on proves that the lost frame `index` was synced.

    `salt` is None when the log's first frame is the lost one: then any log's frames count.
    """
    mark = MAGIC if salt is None else MAGIC + salt
    false_starts = 0
    at = data.find(mark, offset)
    while at >= 0:
        copy = _copy_at(data, at)
        if copy is None:
            false_starts += 1
            if false_starts > MAX_FALSE_STARTS:
                raise CorruptLog(index, offset, f"lost, and over {MAX_FALSE_STARTS} damaged frames follow it")
            at = data.find(mark, at + 1)
            continue
        found = _index(copy.chain)
        in_same_append = found - copy.position <= index < found
        if not in_same_append:
            if found > index:
                reason = f"both copies are damaged, and frame {found} of a later write is intact at byte {at}"
            else:
                reason = f"nothing continues the log here, and frame {found} is out of place at byte {at}"
            raise CorruptLog(index, offset, reason)
        at = data.find(mark, at + copy.size_bytes)
