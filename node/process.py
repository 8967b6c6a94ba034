"""One node: directory, key, transport, trainer and peer brought together, from start to exit.

exit code 0   the run is over, or the user ended the node
exit code 1   the peer halted, or (as UserError) something of the user's cannot work
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import psutil
import trio

from node.console import Console
from node.document import quorum_of, status_document
from node.driver import Driver
from node.events import EventLog
from node.export import MODEL_FILE
from node.hello import JoinToken, check_hello, make_hello, parse_token, program_version, proof_of
from node.identity_key import FILE_NAME as KEY_FILE
from node.identity_key import IdentityKey, load_or_create
from node.libp2p_transport import Libp2pTransport, open_transport
from node.link import SESSION_BYTES
from node.repetitions import Repetitions
from node.run import (
    Local,
    Run,
    ask_genesis,
    authority_of,
    check_genesis,
    configure,
    contradicted,
    found,
    join,
    known_run,
    read_local,
    workload_for,
    write_local,
)
from node.status_socket import serve_status
from node.store import Store
from node.trainer_process import Trainer, TrainerSettings
from node.workload_loading import parse_spec
from p2pcoord.consensus.ledger import Genesis
from p2pcoord.errors import LocalError, UserError
from p2pcoord.gossip.records import CapabilityProfile
from p2pcoord.peer import Peer, PeerSettings, Restored
from p2pcoord.rounds.participation import join_proof
from p2pcoord.rounds.rounds import Rounds
from p2pcoord.rounds.setting import rules_of

DEFAULT_LISTEN = "/ip4/0.0.0.0/tcp/4001"
ADDRESSES_FILE = "addresses.json"

# After SIGTERM: time for the goodbye to be certified. Whoever is told to stop is usually killed 10 s later.
LEAVE_S = 4.0

# After the last round a node serves the result for as long as a living member lacks it, but no longer than this.
SERVE_S = 60.0
WATCH_S = 0.5

# Too few voters in reach is told after so long: a link that breaks is dialled anew, and suspicions are refuted, in less.
QUORUM_LOST_S = 3.0


class NodeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The command line of `p2pcoord node`."""

    data_dir: Path
    bootstrap: tuple[str, ...] = ()
    secret: str | None = None
    workload: str | None = None
    config: Path | None = None
    local: dict[str, str] = {}
    listen: tuple[str, ...] = ()
    announce: tuple[str, ...] = ()
    name: str | None = None
    device: str = "auto"
    rounds: int | None = None
    minimum_members: int | None = None
    init: Path | None = None
    open: bool = False


async def run_node(options: NodeOptions, *, tell: Callable[[str], None]) -> int:
    """Runs a node until the run is over, it is told to stop, or it fails. Raises UserError; returns the exit code.

    `tell` prints a line for people.
    """
    token = parse_token(options.secret) if options.secret is not None else None
    if token is not None and not options.bootstrap and not (options.data_dir / "log").exists():
        raise UserError("--secret needs --bootstrap: the address of a node of the run", exit_code=2)
    store = await trio.to_thread.run_sync(Store.open, options.data_dir)
    try:
        return await _Node(options, token, store, tell).run()
    except BaseExceptionGroup as group:
        mistake = _first_user_error(group)
        if mistake is None:
            raise
        raise mistake from None
    finally:
        await trio.to_thread.run_sync(store.close)


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
        self.console: Console
        self.peer: Peer | None = None
        self.run_id = token.run if token is not None else b""
        self.key: IdentityKey
        self.run_: Run
        self.transport: Libp2pTransport
        self.driver: Driver
        self.told_unreachable = False

    # Start

    async def run(self) -> int:
        known = self._open_directory()
        self.console = Console(self.tell, self._name_of)
        token = self.token
        proof = proof_of(token.secret, token.run, self.key.peer_id) if token is not None else b""
        run: Run | None = None
        if known is not None:
            local = read_local(self.store)
            config, pins = check_genesis(known[0])
            secret = None if config.open else local.secret if local is not None else None
            run = Run(known[0], config, pins, secret, known[1])
            self.run_id = run.id
            proof = proof_of(secret, run.id, self.key.peer_id)
        async with AsyncExitStack() as stack:
            self.transport = await stack.enter_async_context(
                open_transport(
                    self.key,
                    self.options.listen or (DEFAULT_LISTEN,),
                    hello=make_hello(self.run_id, proof),
                    check_hello=self._check_hello,
                    session=os.urandom(SESSION_BYTES),
                    announce=self.options.announce,
                )
            )
            # Outside the nursery: its task is cancelled before the receiver closes.
            signals = stack.enter_context(trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM))
            nursery = await stack.enter_async_context(trio.open_nursery())
            try:
                nursery.start_soon(self._watch_signals, signals)
                trainer = await self._begin(nursery, run)
                await self._live(trainer)
            finally:
                nursery.cancel_scope.cancel()
        if self.driver.halted:
            self.tell(f"this node stops: {self.driver.halted}")
            return 1
        return 0

    def _open_directory(self) -> Any:
        """The key, and what the log says; a log that must not be used is set aside together with its key."""
        has_key = (self.store.path / KEY_FILE).exists()
        self.key = load_or_create(self.store.path)
        try:
            known = known_run(self.store, self.key)
        except LocalError as error:
            self._new_key(f"the log cannot be used ({error})")
            return None
        if known is None and has_key and read_local(self.store) is not None:
            self._new_key("the key is here, but its log is gone")
        return known

    def _new_key(self, why: str) -> None:
        """A key without its log never votes again: this machine comes back as a new peer."""
        (self.store.path / KEY_FILE).rename(self.store.path / f"{KEY_FILE}.retired")
        if (self.store.path / "log").exists():
            self.store.set_aside_log()
        self.key = load_or_create(self.store.path)
        self.tell(f"{why}: this machine comes back as a new peer, {self.key.peer_id}")

    def _check_hello(self, peer_id: str, data: bytes) -> str | None:
        def may_join(proof: bytes) -> str:
            if self.peer is None or self.run_.config.open or self.peer.roster.is_member(peer_id):
                return ""
            if self.run_.secret is not None and proof == join_proof(self.run_.secret, self.run_id, peer_id):
                return ""
            return "wrong secret: copy the whole line that a node of the run printed"

        return check_hello(data, self.run_id, may_join)

    async def _begin(self, nursery: trio.Nursery, resumed: Run | None) -> Trainer:
        """The trainer configured, and the run known: founded, joined or resumed."""
        options = self.options
        local = read_local(self.store)
        source, genesis = "", None
        if resumed is not None:
            workload = options.workload or (local.workload if local is not None else None)
            workload = workload_for(resumed.config, workload)
            reason = contradicted(
                resumed.config,
                local or Local(b"", workload, {}, self.name),
                secret=options.secret,
                workload=options.workload,
                rounds=options.rounds,
                run_file=options.config,
                init=options.init,
                open_run=options.open,
            )
            if reason:
                raise UserError(
                    f"{self.store.path} already takes part in run {resumed.id.hex()[:16]}: {reason}. Leave the flag out, "
                    "or use another --data-dir",
                    exit_code=2,
                )
        elif options.bootstrap:
            for flag, given in (
                ("--init", options.init),
                ("--rounds", options.rounds),
                ("--minimum-members", options.minimum_members),
                ("--config", options.config),
            ):
                if given is not None:
                    raise UserError(
                        f"{flag} is the founder's: a node that joins takes the run as it is", exit_code=2
                    )
            source, genesis = await ask_genesis(self.transport, self.key, options.bootstrap, self.token)
            config, _ = check_genesis(genesis)
            workload = workload_for(config, options.workload)
        else:
            workload = options.workload or "text"
        settings = options.local or (local.settings if local is not None else {})
        trainer = Trainer(
            TrainerSettings(parse_spec(workload), self.store.path / "trainer", settings, options.device),
            output=self.console.trainer_output,
            restarted=lambda reason: self._event("trainer-died", {"reason": reason}),
        )
        nursery.start_soon(trainer.run)
        self.device = (await trainer.ready()).device_name
        if resumed is not None:
            self.run_ = resumed
            await configure(trainer, resumed.config, self.store, resumed.body.dataset, resumed.body.frozen)
        elif genesis is not None:
            self.run_ = await join(
                self.store, self.transport, trainer, source, genesis, self.token, self.console.warn
            )
        else:
            self.run_ = await found(
                self.store,
                self.key,
                trainer,
                workload=workload,
                run_file=options.config,
                rounds=options.rounds,
                minimum_members=options.minimum_members,
                init=options.init,
                open_run=options.open,
            )
        self.run_id = self.run_.id
        secret = self.run_.secret
        self.transport.set_hello(make_hello(self.run_id, proof_of(secret, self.run_id, self.key.peer_id)))
        absolute = parse_spec(workload)
        spec = f"{absolute.file}:{absolute.name}" if absolute.file else workload
        write_local(self.store, Local(secret or b"", spec, settings, self.name))
        return trainer

    # Life

    async def _live(self, trainer: Trainer) -> None:
        run = self.run_
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
                bootstrap=(*self.options.bootstrap, *self._known_addresses()),
                profile=CapabilityProfile(
                    self.device[:64], psutil.virtual_memory().total, os.cpu_count() or 0
                ),
                program_version=program_version(),
                minimum_memory_bytes=run.config.participation.minimum_memory_mb << 20,
                trusted=(self.token.height, self.token.record) if self.token is not None else None,
            ),
        )
        self.driver = Driver(
            peer,
            self.transport,
            self.store,
            trainer,
            run.config,
            run.pins.layout,
            event=self._event,
            status=lambda: json.dumps(self.document()).encode(),
        )
        contents = frozenset(ref.root for ref in self.store.refs())
        restored = Restored(run.frames, os.urandom(32), contents)
        self._introduce()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_status, self.store.path, self.local_document)
            nursery.start_soon(self._watch_end)
            nursery.start_soon(self._watch_quorum)
            nursery.start_soon(self._keep_addresses)
            await self.driver.run(functools.partial(peer.start, restored))
            nursery.cancel_scope.cancel()

    def _introduce(self) -> None:
        """What the founder, and every other node, says of itself first."""
        tell = self.tell
        tell(f"peer       {self.key.peer_id} ({self.name})")
        tell(f"device     {self.device}")
        tell(f"directory  {self.store.path}")
        tell(f"run        {self.run_id.hex()}")
        for at, address in enumerate(self.transport.addresses()):
            tell(f"{'addresses' if at == 0 else '':9}  {address}")
        tell("join with  " + self.join_line())
        if self.key.peer_id == self.run_.config.founder and not self.run_.frames:
            tell("voters     1 of 1: this machine must stay until status shows 3 voters")

    def join_line(self) -> str:
        """The command that brings another machine to this run."""
        ledger = (
            self.peer.agreement.voter.ledger
            if self.peer is not None and hasattr(self.peer, "agreement")
            else None
        )
        height = ledger.certified if ledger is not None else 0
        record = ledger.hashes[height] if ledger is not None else b""
        token = JoinToken(self.run_.secret or b"", self.run_id, height, record)
        address = (self.transport.addresses() or ("ADDRESS",))[0]
        workload = self.run_.config.workload_spec
        flag = f" --workload {workload}" if ".py:" in workload else ""
        return f"p2pcoord node --bootstrap {address} --secret {token.text()}{flag}"

    def document(self) -> dict[str, Any]:
        assert self.peer is not None
        return status_document(
            self.peer,
            self.run_id,
            self.transport.addresses(),
            self.transport.counters.snapshot(),
            self.driver.now(),
        ) | {"failpoint": self.driver.failpoints.held}

    def local_document(self) -> dict[str, Any]:
        return self.document() | {"join_line": self.join_line(), "directory": str(self.store.path)}

    def _name_of(self, peer_id: str) -> str:
        record = (
            self.peer.gossip.book.get(peer_id)
            if self.peer is not None and self.peer.gossip is not None
            else None
        )
        return record.name if record is not None else peer_id[-8:]

    def _event(self, event: str, fields: dict[str, Any]) -> None:
        # A stranger's garbage must not push the story of the run out of the file.
        repeated = self.repetitions.quiet_before(event, fields) if event == "rejected" else 0
        if repeated is not None:
            self.events.write(event, {**fields, "repeated": repeated} if repeated else fields)
        self.console.event(event, fields)
        if event == "unreachable" and not self.told_unreachable:
            self.told_unreachable = True
            port = (self.options.listen or (DEFAULT_LISTEN,))[0].rpartition("/")[2]
            self.tell(
                f"others cannot reach this machine on TCP {port}: open the port; it takes part over its outgoing "
                "connections"
            )

    # Addresses that outlive the bootstrap peer

    def _known_addresses(self) -> tuple[str, ...]:
        data = self.store.read_file(ADDRESSES_FILE)
        try:
            known = msgspec.json.decode(data, type=list[str]) if data is not None else []
        except msgspec.DecodeError:
            return ()
        return tuple(known[:64])

    async def _keep_addresses(self) -> None:
        """Remembers where others were last seen, so that the peer it bootstrapped from may be gone next time."""
        written: list[str] = []
        while True:
            await trio.sleep(5)
            if self.peer is None or self.peer.gossip is None:
                continue
            records = [
                r for r in self.peer.gossip.book.records() if r.peer != self.key.peer_id and r.reachable
            ]
            known = [address for record in records for address in record.addresses[:4]][:64]
            if known and known != written:
                written = known
                await trio.to_thread.run_sync(
                    self.store.write_file, ADDRESSES_FILE, msgspec.json.encode(known)
                )

    # Ends

    async def _watch_signals(self, signals: Any) -> None:
        """The first SIGINT or SIGTERM leaves in good order, the second SIGINT at once."""
        leaving = False
        async for number in signals:
            if leaving and number == signal.SIGINT:
                os._exit(130)
            if leaving:
                continue
            leaving = True
            if self.peer is None or not hasattr(self, "driver"):
                os._exit(130 if number == signal.SIGINT else 143)
            self.tell("leaving")
            trio.lowlevel.spawn_system_task(self._leave)

    async def _leave(self) -> None:
        assert self.peer is not None
        alone = len(self.peer.roster.members) <= 1
        if not alone:
            self.driver.put(self.peer.leave)
            with trio.move_on_after(LEAVE_S):
                while not self.peer.left:  # noqa: ASYNC110  # a certified record has no event of its own
                    await trio.sleep(0.05)
            if not self.peer.left:
                self.tell("nobody could take this machine off the list in time: it stays listed as a member")
        self.driver.stop()

    async def _watch_quorum(self) -> None:
        """Tells when too few voters can be reached for the run to go on, and when there is a coordinator again. An election
        among enough of them is neither."""
        lost, since = False, trio.current_time()
        while True:
            await trio.sleep(WATCH_S)
            if self.peer is None or not self.peer.is_member:
                since = trio.current_time()
                continue
            quorum = quorum_of(self.peer, self.driver.now())
            told = {name: quorum[name] for name in ("reachable", "needed", "missing")}
            if quorum["held"] or quorum["reachable"] >= quorum["needed"]:
                since = trio.current_time()
            if not lost and trio.current_time() - since >= QUORUM_LOST_S:
                lost = True
                self._event("quorum-lost", told)
            elif lost and quorum["held"]:
                lost = False
                self._event("quorum-regained", told)

    async def _watch_end(self) -> None:
        """After the last round: says what came of it, and serves it while a living member lacks it."""
        rounds = self.peer.work if self.peer is not None else None
        assert isinstance(rounds, Rounds)
        was_over = rounds.over
        while not (rounds.over and self.driver.tensors.exported_version == rounds.participant.version):  # noqa: ASYNC110
            await trio.sleep(WATCH_S)
        self._tell_result(rounds)
        with trio.move_on_after(SERVE_S):
            while was_over or not self._everybody_has_it(rounds.participant.version):  # noqa: ASYNC110
                await trio.sleep(WATCH_S)
        # Who leaves first must not take the last words of a slower one with it: a moment for the records to spread.
        await trio.sleep(2 * WATCH_S)
        self.driver.stop()

    def _everybody_has_it(self, version: int) -> bool:
        peer = self.peer
        if peer is None or peer.gossip is None:
            return True
        for member in peer.roster.members:
            record = peer.gossip.book.get(member)
            if member != peer.me and peer.alive(member) and (record is None or record.last_sync < version):
                return False
        return True

    def _tell_result(self, rounds: Rounds) -> None:
        metrics = rounds.metrics.newest
        if metrics is not None:
            measures = "".join(f"  {name} {value:.4g}" for name, value in sorted(metrics.measures.items()))
            self.tell(f"the run is over: {metrics.version} rounds, loss {metrics.loss:.4f}{measures}")
        self.tell(f"the model lies in {self.store.path / MODEL_FILE}")
