"""Transports of their own, on loopback, for tests that need a peer at the other end and no node around it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from node.network.libp2p_transport import Libp2pTransport, open_transport
from node.storage.identity_key import IdentityKey


@asynccontextmanager
async def opened() -> AsyncIterator[Libp2pTransport]:
    """One with a fresh key, which accepts everybody."""
    async with open_transport(
        IdentityKey.generate(),
        ["/ip4/127.0.0.1/tcp/0"],
        hello=b"",
        check_hello=lambda peer, hello: None,
        session=os.urandom(8),
    ) as transport:
        yield transport
