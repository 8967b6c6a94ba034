"""What the founder's workload brought besides version 0, fetched before there is a `Peer`: its data set and frozen parameters.

It is fetched as a state is, from several members at once. A joiner knows one, its bootstrap peer, whose status names others;
they are asked while the fetch runs, and used once they have seen the proof that they may give it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import msgspec
import trio

from node.network.bulk_fetch import FetchError, FetchReport, fetch_into
from node.network.libp2p_transport import Libp2pTransport
from node.network.question import NoAnswer, ask
from node.network.transport_events import DialError
from node.storage.store import Store
from p2pcoord.consensus.record import Admission, Genesis
from p2pcoord.content import ContentRef
from p2pcoord.messages import GenesisReply, GenesisRequest, StatusReply, StatusRequest

MAX_SOURCES: Final = 4
"""Who is asked for content at once: four fill most links."""

NAMES: Final = {"dataset": "data set", "frozen": "frozen parameters"}
"""For people, by the purpose that an event tells."""

Event = Callable[[str, dict[str, Any]], None]


class ContentMissing(Exception):
    """`what` of the founder's could not be fetched."""

    def __init__(self, what: str, ref: ContentRef, error: FetchError) -> None:
        super().__init__(str(error))
        self.what = what
        self.ref = ref


class _Member(msgspec.Struct, frozen=True):
    peer_id: str
    alive: bool
    addresses: tuple[str, ...]


class _Status(msgspec.Struct, frozen=True):
    members: tuple[_Member, ...]


def missing_content(store: Store, body: Genesis) -> dict[str, ContentRef]:
    """What the trainer needs and is not here, by purpose."""
    wanted = {"dataset": body.dataset, "frozen": body.frozen}
    return {purpose: ref for purpose, ref in wanted.items() if ref is not None and not store.has(ref)}


async def fetch_founded(
    store: Store,
    transport: Libp2pTransport,
    body: Genesis,
    sources: list[str],
    admission: Admission,
    event: Event,
) -> None:
    """Fetches what is missing from the connected `sources` and from members that they name. Raises ContentMissing."""
    missing = missing_content(store, body)
    if not missing:
        return
    sources = list(sources)
    searched = trio.Event()
    failure: ContentMissing | None = None

    async def search() -> None:
        await find_more(transport, sources, admission)
        searched.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(search)
        for purpose, ref in missing.items():
            try:
                report = await _fetch(store, transport, ref, sources, searched)
            except FetchError as error:
                event("fetch-failed", {"purpose": purpose, "source": "", "reason": str(error)})
                failure = ContentMissing(NAMES[purpose], ref, error)
                break
            told = {"sources": report.bytes_by_source, "refused": report.bad_sources}
            event("fetched", {"purpose": purpose, "size_bytes": ref.size_bytes, **told})
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _fetch(
    store: Store, transport: Libp2pTransport, ref: ContentRef, sources: list[str], searched: trio.Event
) -> FetchReport:
    """Those who are known may have nothing: then from those who are found. Raises FetchError."""
    known = len(sources)
    try:
        return await fetch_into(store, transport, ref, sources)
    except FetchError:
        await searched.wait()
        if len(sources) == known:
            raise
    return await fetch_into(store, transport, ref, sources)


async def find_more(transport: Libp2pTransport, sources: list[str], admission: Admission) -> None:
    """Adds living members to `sources`, as the first of them names them, until there are MAX_SOURCES."""
    for source in tuple(sources):
        try:
            reply = await ask(transport, source, StatusRequest(admission), StatusReply)
            members = msgspec.convert(json.loads(reply.document), _Status).members
        except (NoAnswer, ValueError, RecursionError):  # what it says is a stranger's word
            continue
        for member in members:
            if len(sources) >= MAX_SOURCES:
                return
            if member.alive and member.peer_id not in (*sources, transport.peer_id):
                with suppress(DialError, NoAnswer):
                    await transport.connect(member.peer_id, member.addresses)
                    await ask(transport, member.peer_id, GenesisRequest(admission), GenesisReply)
                    sources.append(member.peer_id)


async def who_answers(transport: Libp2pTransport, addresses: tuple[str, ...]) -> list[str]:
    """The peers at these addresses that can be connected to; only the first MAX_SOURCES addresses are tried."""
    peers: list[str] = []

    async def connect(address: str) -> None:
        with suppress(DialError):
            peers.append(await transport.connect(None, (address,)))

    async with trio.open_nursery() as nursery:
        for address in addresses[:MAX_SOURCES]:
            nursery.start_soon(connect, address)
    return peers
