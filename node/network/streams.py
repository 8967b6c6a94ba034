"""Frames on a libp2p stream: one byte of kind, four of length, then the body. Nothing is buffered before its length is checked.

Used by the messages stream (`link.py`) and by transfer streams (`bulk.py`). The two have kinds of their own; a reader is
given the largest body it accepts for each kind, and a kind that is not in that table is a breach like an oversized body.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import trio
from libp2p.io.exceptions import IOException
from libp2p.network.stream.net_stream import NetStream

from p2pcoord.errors import RemoteError

HEADER = struct.Struct("!BI")

# What is asked of Yamux at once. It keeps bytes in one buffer per stream; fewer, larger reads cost fewer window updates.
READ_BYTES = 256 * 1024


class StreamEnded(Exception):
    """The other end closed or reset the stream, or the connection is gone."""


def frame(kind: int, body: bytes = b"") -> bytes:
    return HEADER.pack(kind, len(body)) + body


class FrameReader:
    """Reads frames from one stream. Cancelling a read is safe: what has arrived stays for the next one.

    `limits` maps each kind that is accepted to the largest body in bytes.
    """

    def __init__(self, stream: NetStream, limits: Mapping[int, int]) -> None:
        self._stream = stream
        self.limits = limits
        self._buffer = bytearray()

    async def next(self, *, stall_s: float | None = None) -> tuple[int, bytes]:
        """The next frame's kind and body.

        Raises StreamEnded, RemoteError ("unknown_kind", "oversized") for a frame that is not acceptable, and
        trio.TooSlowError when no byte arrives for `stall_s` seconds.
        """
        await self._have(HEADER.size, stall_s)
        kind, size = HEADER.unpack_from(self._buffer)
        limit = self.limits.get(kind)
        if limit is None:
            raise RemoteError("unknown_kind", f"frame of kind {kind}")
        if size > limit:
            raise RemoteError("oversized", f"frame of kind {kind} with {size} bytes, limit {limit}")
        end = HEADER.size + size
        await self._have(end, stall_s)
        body = bytes(memoryview(self._buffer)[HEADER.size : end])
        del self._buffer[:end]
        return kind, body

    async def _have(self, size: int, stall_s: float | None) -> None:
        while len(self._buffer) < size:
            try:
                if stall_s is None:
                    data = await self._stream.read(READ_BYTES)
                else:
                    with trio.fail_after(stall_s):
                        data = await self._stream.read(READ_BYTES)
            except IOException as error:
                raise StreamEnded(type(error).__name__) from error
            if not data:
                raise StreamEnded("end of stream")
            self._buffer += data
