"""How a node ends: it is told to stop, or the run is over. And what it says while the run cannot go on.

SIGINT, SIGTERM     leaves in good order: the duty is handed over, the others are told; a second SIGINT ends it at once.
                    A node that is still starting has nobody to tell, and just ends
workload fails      leaves in good order with exit code 1, when its code failed several times in a row: others go on
the last round      says what came of it, serves it while a living member lacks it, and ends
too few voters      only says so: it waits for them

Once the run is over, whoever goes away has ended as this node will: no member has failed then, and no voter is missed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from node.driver import Driver
from node.reporting.document import names_of, quorum_of
from node.reporting.event_words import enough_reached, naming
from node.storage.export import MODEL_FILE
from p2pcoord.peer import Peer
from p2pcoord.rounds.rounds import Rounds

# After SIGTERM: time for the goodbye to be certified. Whoever is told to stop is usually killed 10 s later.
LEAVE_S = 4.0

# After SIGTERM the process is gone, with exit code 0, whatever holds it: `p2pcoord cluster` kills after 5 s.
END_S = 4.8

# After the last round a node serves the result for as long as a living member lacks it, but no longer than this.
SERVE_S = 60.0
WATCH_S = 0.5

# Too few voters in reach is told after so long: a link that breaks is dialled anew, and suspicions are refuted, in less.
QUORUM_LOST_S = 3.0

Tell = Callable[[str], None]


# Told to stop


@asynccontextmanager
async def leaving_on_signals(driver: Callable[[], Driver | None], tell: Tell) -> AsyncIterator[None]:
    """Around all that a node does: the first SIGINT or SIGTERM leaves in good order, a second SIGINT at once.

    `driver()` is None before there is one. Nothing was promised to anybody then, and the block is cancelled.
    """
    ended = trio.Event()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_leave_on_signals, signals, driver, tell, nursery.cancel_scope, ended)
            try:
                yield
            finally:
                ended.set()
                nursery.cancel_scope.cancel()


async def _leave_on_signals(
    signals: AsyncIterator[int],
    driver: Callable[[], Driver | None],
    tell: Tell,
    block: trio.CancelScope,
    ended: trio.Event,
) -> None:
    await anext(signals)
    tell("leaving")
    # Shielded: the block is cancelled below, and this watches over its end.
    with trio.CancelScope(shield=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_exit_at_once, signals)
            with trio.move_on_after(END_S):
                if running := driver():
                    await _leave(running, tell)
                else:
                    block.cancel()
                await ended.wait()
            if not ended.is_set():
                os._exit(
                    0
                )  # a thread that cannot be cancelled: the directory bears that, as it bears any death
            nursery.cancel_scope.cancel()


async def _exit_at_once(signals: AsyncIterator[int]) -> None:
    async for number in signals:
        if number == signal.SIGINT:
            os._exit(130)


async def watch_workload(driver: Driver, tell: Tell) -> None:
    """Ends a node whose workload fails again and again: its user has to see that, and the others wait for it in vain."""
    await driver.tensors.gave_up.wait()
    await _leave(driver, tell, driver.tensors.gave_up_why)


async def _leave(driver: Driver, tell: Tell, reason: str = "") -> None:
    peer = driver.peer
    # A run that is over needs no goodbye, and has nobody left to certify one: who goes has ended.
    if len(peer.roster.members) > 1 and not run_is_over(peer):
        driver.put(peer.leave)
        with trio.move_on_after(LEAVE_S):
            while not (peer.left or driver.stopped.is_set()):  # noqa: ASYNC110  # a certified record has no event of its own
                await trio.sleep(0.05)
        if not (peer.left or driver.stopped.is_set()):
            tell("nobody could take this machine off the list in time: it stays listed as a member")
    driver.stop(reason)


# Too few voters


async def watch_quorum(driver: Driver, event: Callable[[str, dict[str, Any]], None]) -> None:
    """Tells when too few voters can be reached for the run to go on, and when there is a coordinator again. An election
    among enough of them is neither."""
    lost, since = False, trio.current_time()
    while True:
        await trio.sleep(WATCH_S)
        if not driver.peer.is_member or run_is_over(driver.peer):
            since = trio.current_time()
            continue
        quorum = quorum_of(driver.peer, driver.now())
        told = {name: quorum[name] for name in ("reachable", "needed", "outgoing", "missing")}
        if quorum["held"] or enough_reached(quorum):
            since = trio.current_time()
        if not lost and trio.current_time() - since >= QUORUM_LOST_S:
            lost = True
            event("quorum-lost", told)
        elif lost and quorum["held"]:
            lost = False
            event("quorum-regained", told)


# The run is over


def run_is_over(peer: Peer) -> bool:
    """Whether the run's last version is certified, as this peer knows."""
    return isinstance(peer.work, Rounds) and peer.work.over


async def watch_end(driver: Driver, tell: Tell) -> None:
    """After the last round: says what came of it, and serves it while a living member lacks it."""
    rounds = driver.peer.work
    assert isinstance(rounds, Rounds)
    was_over = rounds.over
    while not (rounds.over and driver.tensors.exported_version == rounds.participant.version):  # noqa: ASYNC110
        await trio.sleep(WATCH_S)
    _tell_result(driver, rounds, tell)
    if _without(driver.peer, rounds.participant.version):
        tell(f"serving the result until every member has it (at most {SERVE_S:.0f} s)")
    elif was_over:
        tell(f"serving the result for {SERVE_S:.0f} s")
    with trio.move_on_after(SERVE_S):
        while was_over or _without(driver.peer, rounds.participant.version):  # noqa: ASYNC110
            await trio.sleep(WATCH_S)
    if missing := _without(driver.peer, rounds.participant.version):
        call = naming(names_of(driver.peer))
        tell(f"not known to have the result: {', '.join(map(call, missing))}")
    # Who leaves first must not take the last words of a slower one with it: a moment for the records to spread.
    await trio.sleep(2 * WATCH_S)
    driver.stop()


def _without(peer: Peer, version: int) -> list[str]:
    """Living members that are not known to have this version."""
    if peer.gossip is None:
        return []
    records = ((member, peer.gossip.book.get(member)) for member in peer.roster.members if member != peer.me)
    return [
        member
        for member, record in records
        if peer.alive(member) and (record is None or record.last_sync < version)
    ]


def _tell_result(driver: Driver, rounds: Rounds, tell: Tell) -> None:
    metrics = rounds.metrics.newest
    if metrics is not None:
        measures = "".join(f"  {name} {value:.4g}" for name, value in sorted(metrics.measures.items()))
        tell(f"the run is over: {metrics.version} rounds, loss {metrics.loss:.4f}{measures}")
    tell(f"the model lies in {driver.store.path / MODEL_FILE}")
