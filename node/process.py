"""One node: directory, key, transport, trainer and peer brought together, from start (`start.py`) to exit (`ends.py`).

exit code 0   the run is over, or the user ended the node
exit code 1   (as UserError) the peer halted, the workload's code failed again and again, or something of the user's cannot work
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from operator import itemgetter
from typing import Any

import trio

from node.driver import Driver
from node.ends import leaving_on_signals, run_is_over, watch_end, watch_quorum, watch_workload
from node.failpoints import compact_after_bytes
from node.network.hello import (
    JoinToken,
    check_hello,
    make_hello,
    other_versions,
    parse_token,
    program_version,
    proof_of,
)
from node.network.known_addresses import keep_addresses, known_addresses
from node.network.libp2p_transport import Libp2pTransport, open_transport
from node.network.link import SESSION_BYTES
from node.reporting.console import Console
from node.reporting.document import names_of, status_document
from node.reporting.event_words import SOLE_VOTER, NameOf, naming, short_name
from node.reporting.events import EventLog
from node.reporting.repetitions import Repetitions
from node.reporting.status_socket import serve_status
from node.run import Run, authority_of, read_local
from node.start import NodeOptions, Started, open_directory, remembered, start
from node.storage.identity_key import IdentityKey
from node.storage.store import Store
from node.training.trainer_process import TrainerDied
from p2pcoord.consensus.record import Admission, Genesis
from p2pcoord.effects import Effect
from p2pcoord.errors import UserError
from p2pcoord.gossip.records import CapabilityProfile
from p2pcoord.peer import Peer
from p2pcoord.peer_settings import PeerSettings, Restored
from p2pcoord.rounds.setting import rules_of

DEFAULT_LISTEN = "/ip4/0.0.0.0/tcp/4001"


async def run_node(options: NodeOptions, *, tell: Callable[[str], None]) -> None:
    """Runs a node until the run is over or it is told to stop. Raises UserError when it fails.

    `tell` prints a line for people.
    """
    token = parse_token(options.secret) if options.secret is not None else None
    node: _Node | None = None
    try:
        async with leaving_on_signals(lambda: node.driver if node is not None else None, tell):
            store = await trio.to_thread.run_sync(Store.open, options.data_dir)
            try:
                node = _Node(remembered(options, read_local(store)), token, store, tell)
                await node.run()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(store.close)
    except BaseExceptionGroup as group:
        mistake = _first_user_error(group)
        if mistake is None:
            raise
        raise mistake from None


def _first_user_error(group: BaseExceptionGroup[BaseException]) -> UserError | None:
    """A user's mistake comes out of the nurseries wrapped; nothing else is hidden by unwrapping it."""
    mistakes, others = group.split(UserError)
    found: BaseException | None = mistakes
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found if others is None and isinstance(found, UserError) else None


class _Node:
    def __init__(
        self, options: NodeOptions, token: JoinToken | None, store: Store, tell: Callable[[str], None]
    ) -> None:
        self.options = options
        self.token = token
        self.store = store
        self.tell = tell
        self.name = options.name or socket.gethostname().partition(".")[0] or "node"
        self.events = EventLog(store.path)
        self.repetitions = Repetitions()
        self.console = Console(tell, self._names)
        self.peer: Peer | None = None
        self.driver: Driver | None = None
        self.run_id = token.run if token is not None else b""
        self.key: IdentityKey
        self.run_: Run
        self.transport: Libp2pTransport
        self.told_unreachable = False

    async def run(self) -> None:
        """Raises UserError, also when the node does not end well."""
        self.key, resumed = open_directory(self.store, self.token, self.tell)
        secret = self.token.secret if self.token is not None else None
        if resumed is not None:
            self.run_id, secret = resumed.id, resumed.secret
        async with AsyncExitStack() as stack:
            self.transport = await stack.enter_async_context(
                open_transport(
                    self.key,
                    self.options.listen or (DEFAULT_LISTEN,),
                    hello=self._hello(secret),
                    check_hello=self._check_hello,
                    session=os.urandom(SESSION_BYTES),
                    announce=self.options.announce,
                )
            )
            nursery = await stack.enter_async_context(trio.open_nursery())
            try:
                halted = await self._live(await self._start(nursery, resumed))
            finally:
                nursery.cancel_scope.cancel()
        if halted:
            raise UserError(f"this node stops: {halted}")
        if self.peer is not None and run_is_over(self.peer):
            self.tell("done: this node has ended")

    async def _start(self, nursery: trio.Nursery, resumed: Run | None) -> Started:
        try:
            started = await start(
                self.options,
                name=self.name,
                token=self.token,
                resumed=resumed,
                store=self.store,
                key=self.key,
                transport=self.transport,
                console=self.console,
                nursery=nursery,
                event=self._event,
            )
        except TrainerDied as died:
            raise UserError(f"this node cannot start: {died}") from None
        self.run_ = started.run
        self.run_id = started.run.id
        self.transport.set_hello(self._hello(started.run.secret))
        return started

    def _hello(self, secret: bytes | None) -> bytes:
        return make_hello(self.run_id, proof_of(secret, self.run_id, self.key.peer_id))

    def _check_hello(self, peer_id: str, data: bytes) -> str | None:
        def may_join(proof: bytes) -> str:
            if self.peer is None or self.run_.config.open or self.peer.roster.is_member(peer_id):
                return ""
            if self.peer.roster.proves(Admission(peer_id, "", proof)):
                wrong = "wrong secret" if proof else "the run needs a secret"
                return f"{wrong}: copy the whole line that a node of the run printed"
            return ""

        refused = check_hello(data, self.run_id, may_join)
        if refused is None and (versions := other_versions(data)) is not None:
            self._event("versions-differ", {"peer": peer_id, "theirs": versions[0], "ours": versions[1]})
        return refused

    async def _live(self, started: Started) -> str:
        """From the first effect to the last; why the peer halted ("" when it did not)."""
        run, device = started.run, started.loaded.device_name
        assert isinstance(run.genesis.body, Genesis)
        coordination = run.config.coordination
        self.peer = peer = Peer(
            authority_of(self.key, run.id),
            run.genesis,
            PeerSettings(
                self.name,
                run.secret,
                committee_size=coordination.committee_size,
                rotation_rounds=coordination.rotation_rounds,
                rules=rules_of(run.config, run.pins, run.genesis.body),
                gossip=True,
                addresses=self.transport.addresses()[:16],
                bootstrap=(*self.options.bootstrap, *known_addresses(self.store)),
                profile=CapabilityProfile(device[:64], started.loaded.memory_bytes, os.cpu_count() or 0),
                program_version=program_version(),
                compact_after_bytes=compact_after_bytes(),
                minimum_memory_bytes=run.config.participation.minimum_memory_mb << 20,
                trusted=run.trusted,
            ),
        )
        self.driver = driver = Driver(
            peer,
            self.transport,
            self.store,
            started.trainer,
            run.config,
            run.pins.layout,
            event=self._event,
            status=lambda: json.dumps(self.document(driver)).encode(),
        )
        contents = frozenset(ref.root for ref in self.store.refs())
        restored = Restored(run.frames, os.urandom(32), contents)

        def begin(now: int) -> list[Effect]:
            effects = peer.start(restored, now)
            self._introduce(device)  # not before: the join line names the newest certified record
            return effects

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_status, self.store.path, lambda: self.local_document(driver))
            nursery.start_soon(watch_end, driver, self.tell)
            nursery.start_soon(watch_quorum, driver, self._event)
            nursery.start_soon(watch_workload, driver, self.tell)
            nursery.start_soon(keep_addresses, self.store, peer)
            nursery.start_soon(self.console.keep_settling)
            await driver.run(begin)
            nursery.cancel_scope.cancel()
        return driver.halted

    def _introduce(self, device: str) -> None:
        """What the founder, and every other node, says of itself first."""
        tell = self.tell
        tell(f"peer       {self.key.peer_id} ({self.name})")
        tell(f"device     {device}")
        tell(f"directory  {self.store.path}")
        tell(f"run        {self.run_id.hex()}")
        for at, address in enumerate(self.transport.addresses()):
            tell(f"{'addresses' if at == 0 else '':9}  {address}")
        tell("join with  " + self.join_line())
        assert self.peer is not None
        if self.peer.agreement.committee.everyone == (self.key.peer_id,):
            tell(SOLE_VOTER)

    def join_line(self) -> str:
        """The command that brings another machine to this run, once the peer has started.

        It names the newest record that is certified here; while this node is still behind the line that it was joined with, that
        line's.
        """
        assert self.peer is not None
        ledger = self.peer.agreement.voter.ledger
        certified = ledger.certified, ledger.hashes[ledger.certified]
        height, record = max(certified, self.run_.trusted or certified, key=itemgetter(0))
        token = JoinToken(self.run_.secret or b"", self.run_id, height, record)
        address = (self.transport.addresses() or ("ADDRESS",))[0]
        workload = self.run_.config.workload_spec
        flag = f" --workload {workload}" if ".py:" in workload else ""
        return f"p2pcoord node --bootstrap {address} --secret {token.text()}{flag}"

    def document(self, driver: Driver) -> dict[str, Any]:
        return status_document(
            driver.peer,
            self.run_id,
            self.transport.addresses(),
            self.transport.counters.snapshot(),
            driver.now(),
        ) | {"failpoint": driver.failpoints.held}

    def local_document(self, driver: Driver) -> dict[str, Any]:
        return self.document(driver) | {"join_line": self.join_line(), "directory": str(self.store.path)}

    def _names(self) -> NameOf:
        return naming(names_of(self.peer)) if self.peer is not None else short_name

    def _event(self, event: str, fields: dict[str, Any]) -> None:
        if event in ("failed", "sole-voter") and self.peer is not None and run_is_over(self.peer):
            return  # it has ended
        # A stranger's garbage must not push the story of the run out of the file.
        repeated = (
            self.repetitions.quiet_before(event, fields) if event in ("rejected", "versions-differ") else 0
        )
        if repeated is not None:
            self.events.write(event, {**fields, "repeated": repeated} if repeated else fields)
        self.console.event(event, fields)
        if event == "unreachable" and not self.told_unreachable:
            self.told_unreachable = True
            ports = ", ".join(map(str, self.transport.ports()))
            self.tell(
                f"others cannot reach this machine on TCP {ports}: open the port; it takes part over its outgoing "
                "connections"
            )
