"""How a node comes to its run: it founds one, is brought to one by a join token, or goes on with the one in its directory.

    directory   --bootstrap   what happens
    empty       no            found: make version 0 and genesis, print the line for others
    empty       yes           join: ask the bootstrap peer for genesis, check it against the token, fetch data, compare pins
    used        any           resume: the log says which run; flags that contradict it are refused, and so is a workload
                              that is no longer the run's

All three end with a `Run`: genesis, config, pins and secret, the trainer configured for it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import trio

from node.flags import FoundersFlags
from node.founded_content import ContentMissing, Event, fetch_founded, missing_content, who_answers
from node.network.hello import OTHER_RUN, SECRET_BYTES, JoinToken, parse_token, program_version, proof_of
from node.network.libp2p_transport import Libp2pTransport
from node.network.question import NoAnswer, ask
from node.network.transport_events import DialError
from node.storage.identity_key import IdentityKey
from node.storage.store import Store
from node.training.trainer_process import Trainer
from node.training.trainer_protocol import Configure, Initialize
from node.training.workload_loading import BUILT_IN, parse_spec
from p2pcoord.consensus.ledger import Ledger
from p2pcoord.consensus.record import Admission, Genesis, Record, make_genesis
from p2pcoord.consensus.voter import Appended, Owner
from p2pcoord.content import ContentRef
from p2pcoord.errors import LocalError, RemoteError, UserError
from p2pcoord.frames import PeerFrame
from p2pcoord.identity import Authority, Ed25519Signer, verify_ed25519
from p2pcoord.messages import GenesisReply, GenesisRequest
from p2pcoord.optimization.optimizer import configured
from p2pcoord.run_config import (
    NONCE_BYTES,
    RunConfig,
    RunSettings,
    derive_seed,
    found_run,
    parse_run_file,
    run_id,
)
from p2pcoord.run_config import decode as decode_config
from p2pcoord.run_config import encode as encode_config
from p2pcoord.wire import decode, encode
from p2pcoord.workload import WorkloadPins, compare_pins

LOCAL_FILE = "node.cbor"

Warn = Callable[[str], None]


class Local(msgspec.Struct, frozen=True, omit_defaults=True):
    """What this machine keeps of how it was started (mode 0600: the secret is in it).

    `trusted` is the (height, record) of the join line that brought it to the run: it may be stopped before its chain is so long.
    `init` is the SHA-256 of the file whose parameters the run was founded with here.
    """

    secret: bytes
    workload: str
    settings: dict[str, str]
    name: str
    trusted: tuple[int, bytes] | None = None
    listen: tuple[str, ...] = ()
    announce: tuple[str, ...] = ()
    device: str | None = None
    init: bytes | None = None


class Run(msgspec.Struct, frozen=True):
    """The run this node takes part in. `secret` is None in an open run; `frames` are an earlier life's; `trusted` is the
    (height, record) that the chain must have, by the line that it was joined with."""

    genesis: Record
    config: RunConfig
    pins: WorkloadPins
    secret: bytes | None
    frames: tuple[bytes, ...] = ()
    trusted: tuple[int, bytes] | None = None

    @property
    def id(self) -> bytes:
        return run_id(self.config)

    @property
    def body(self) -> Genesis:
        assert isinstance(self.genesis.body, Genesis)
        return self.genesis.body


def authority_of(key: IdentityKey, run: bytes) -> Authority:
    return Authority(Ed25519Signer(key.seed), verify_ed25519, run)


def known_run(store: Store, key: IdentityKey) -> tuple[Record, tuple[bytes, ...]] | None:
    """Genesis and frames of the run in this directory; None when there is none yet.

    Raises LocalError (CorruptLog, or a log of another key) when the log must not be used.
    """
    frames = store.recovered().payloads
    if not frames:
        return None
    try:
        owner: PeerFrame = decode(frames[0], PeerFrame)  # type: ignore[arg-type]  # a union is a type to msgspec
        first: PeerFrame | None = decode(frames[1], PeerFrame) if len(frames) > 1 else None  # type: ignore[arg-type]
    except RemoteError as error:
        raise LocalError(f"the log holds what is no frame of this program: {error}") from error
    if not isinstance(owner, Owner) or owner.peer_id != key.peer_id or not isinstance(first, Appended):
        raise LocalError("the log belongs to another key")
    return first.record, frames


def check_genesis(genesis: Record) -> tuple[RunConfig, WorkloadPins]:
    """Raises RemoteError unless genesis holds a config and pins that this program understands, by their own founder."""
    body = genesis.body
    if not isinstance(body, Genesis):
        raise RemoteError("bad_genesis", "not a genesis record")
    if body.state is None:
        raise RemoteError("bad_genesis", "names no version 0")
    config = decode_config(body.config)
    if config.founder != genesis.header.coordinator:
        raise RemoteError("bad_genesis", "signed by another than the founder")
    return config, decode(body.pins, WorkloadPins)


def readable(genesis: Record, whose: str) -> tuple[RunConfig, WorkloadPins]:
    """`check_genesis` in words for the user: `whose` run cannot be read. Raises UserError."""
    try:
        return check_genesis(genesis)
    except RemoteError as error:
        raise UserError(
            f"{whose} run cannot be read by this program, p2pcoord {program_version()} ({error}): it was founded by "
            "another version, most likely a newer one. Upgrade p2pcoord here"
        ) from error


def read_local(store: Store) -> Local | None:
    """None where there is none yet. Raises UserError when it is damaged."""
    data = store.read_file(LOCAL_FILE)
    try:
        return decode(data, Local) if data is not None else None
    except RemoteError as error:
        raise UserError(
            f"{store.path / LOCAL_FILE} is damaged ({error.kind}): remove it, and start this node with all of its flags, the "
            "--secret that another node's line names among them"
        ) from None


def write_local(store: Store, local: Local) -> None:
    store.write_file(LOCAL_FILE, encode(local))


async def configure(
    trainer: Trainer, config: RunConfig, store: Store, dataset: ContentRef | None, frozen: ContentRef | None
) -> None:
    """Tells the trainer what the run says."""

    def path(ref: ContentRef | None) -> str | None:
        return str(store.file_of(ref)) if ref is not None and store.has(ref) else None

    await trainer.configure(
        Configure(
            options=config.workload,
            data_mode=config.data.mode,
            batch_size=config.local.batch_size,
            optimizer=config.local.optimizer,
            seed=derive_seed(run_id(config), "model"),
            slots=configured(config.optimization).slots,
            dataset=path(dataset),
            frozen=path(frozen),
        )
    )


# Founding ------------------------------------------------------------------------------------------------------------


async def found(
    store: Store,
    key: IdentityKey,
    trainer: Trainer,
    *,
    workload: str,
    founders: FoundersFlags,
) -> Run:
    """Makes a new run with version 0, in this directory. Raises UserError for the run file, the workload and `init`."""
    loaded = await trainer.ready()
    text = _read_run_file(founders.config)
    settings = parse_run_file(text, str(founders.config or "run.toml"), loaded.run_defaults)
    settings = _with_flags(settings, founders.rounds, founders.minimum_members)
    config = found_run(
        settings,
        founder=key.peer_id,
        nonce=os.urandom(NONCE_BYTES),
        workload_spec=parse_spec(workload).portable,
        open=founders.open,
    )
    await configure(trainer, config, store, None, None)
    scratch = store.path / "scratch"
    scratch.mkdir(exist_ok=True)
    names = {what: str(scratch / f"founded-{what}") for what in ("state", "dataset", "frozen")}
    made = await trainer.initialize(Initialize(init=str(founders.init) if founders.init else None, **names))

    def keep(what: str) -> ContentRef:
        return store.put_file(names[what], move=True)

    state = await trio.to_thread.run_sync(keep, "state")
    dataset = await trio.to_thread.run_sync(keep, "dataset") if made.has_dataset else None
    frozen = await trio.to_thread.run_sync(keep, "frozen") if made.has_frozen else None
    await configure(trainer, config, store, dataset, frozen)
    authority = authority_of(key, run_id(config))
    pins = made.described.pins
    genesis = make_genesis(authority, encode_config(config), encode(pins), state, dataset, frozen)
    return Run(genesis, config, pins, None if founders.open else os.urandom(SECRET_BYTES))


def digest_of(init: Path | None) -> bytes | None:
    """The SHA-256 of a file of first parameters. Raises UserError where it cannot be read."""
    if init is None:
        return None
    try:
        with init.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise UserError(f"cannot read --init {init}: {error.strerror}", exit_code=2) from error


def _read_run_file(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"cannot read the run file {path}: {reason}", exit_code=2) from error


def _with_flags(settings: RunSettings, rounds: int | None, minimum_members: int | None) -> RunSettings:
    """The run file's settings, with those that the founder also has flags for."""
    replace = msgspec.structs.replace
    if rounds is not None:
        strategy = replace(settings.strategy, aggregation_rounds=rounds)
        settings = replace(settings, strategy=strategy)
    if minimum_members is not None:
        participation = replace(settings.participation, minimum_members=minimum_members)
        settings = replace(settings, participation=participation)
    return settings


# Joining -------------------------------------------------------------------------------------------------------------


class Invitation(msgspec.Struct, frozen=True):
    """What the bootstrap peer said of its run, checked against the token. `source` is its peer id."""

    source: str
    run: Run


async def ask_genesis(
    transport: Libp2pTransport, key: IdentityKey, bootstrap: tuple[str, ...], token: JoinToken | None
) -> Invitation:
    """Connects to one of the bootstrap addresses and asks it for the run's genesis.

    Raises UserError when nobody answers there, or what is answered is another run or none that this program can read.
    """
    peer = await _connect(transport, bootstrap)
    proof = proof_of(token.secret, token.run, key.peer_id) if token is not None else b""
    try:
        reply = await ask(transport, peer, GenesisRequest(Admission(key.peer_id, "", proof)), GenesisReply)
    except NoAnswer as silence:
        if silence.closed is not None:
            raise UserError(f"the peer at {bootstrap[0]} closed the connection: {silence.closed}") from None
        why = (
            "it may need the run's secret: use the whole line that a node of the run printed"
            if token is None
            else ""
        )
        raise UserError(
            f"the peer at {bootstrap[0]} does not say which run it is in. {why}".rstrip(". ") + "."
        ) from None
    config, pins = readable(reply.genesis, "the bootstrap peer's")
    if token is not None and token.run != run_id(config):
        raise UserError(
            "the bootstrap peer belongs to another run than --secret names: use the whole line again"
        )
    trusted = token.anchor if token is not None else None
    try:
        Ledger(authority_of(key, run_id(config)), reply.genesis, trusted)
    except RemoteError as error:
        raise UserError(f"the bootstrap peer's genesis is not the run's ({error})") from error
    secret = token.secret or None if token is not None else None
    return Invitation(peer, Run(reply.genesis, config, pins, secret, trusted=trusted))


async def _connect(transport: Libp2pTransport, bootstrap: tuple[str, ...]) -> str:
    errors = []
    for address in bootstrap:
        try:
            return await transport.connect(None, (address,))
        except DialError as error:
            errors.append((address, error))
    raise _unreachable(*errors[0])


def _unreachable(address: str, error: DialError) -> UserError:
    match error.kind:
        case "bad_address":
            return UserError(
                f"--bootstrap {address}: {error.detail}. Use HOST:PORT or a multiaddr such as "
                "/ip4/192.0.2.7/tcp/4001/p2p/12D3...",
                exit_code=2,
            )
        case "wrong_peer":
            return UserError(
                f"at {address} lives another peer than the one named ({error.detail}): use the line that the "
                "machine prints now"
            )
        case "refused" if error.detail == OTHER_RUN:
            return UserError(
                f"--secret is of another run than the peer at {address}: copy the whole line that a node of the run printed"
            )
        case "refused":
            return UserError(f"the peer at {address} refused this node: {error.detail}")
        case _:
            return UserError(
                f"no node answers at {address} ({error.detail}): check the address, that the node there runs, and that "
                "its port is open"
            )


async def join(
    store: Store,
    transport: Libp2pTransport,
    trainer: Trainer,
    invitation: Invitation,
    warn: Warn,
    event: Event,
) -> Run:
    """Gets the founder's data, and compares this machine's workload with the run's. Raises UserError."""
    run = invitation.run
    try:
        await fetch_founded(
            store, transport, run.body, [invitation.source], _admission(transport, run), event
        )
    except ContentMissing as error:
        raise UserError(f"the run's {error.what} could not be fetched: {error}") from error
    await agree(trainer, store, run, warn)
    return run


def _admission(transport: Libp2pTransport, run: Run) -> Admission:
    me = transport.peer_id
    return Admission(me, "", proof_of(run.secret, run.id, me))


async def agree(trainer: Trainer, store: Store, run: Run, warn: Warn) -> None:
    """Configures the trainer, and compares this machine's workload with the run's. Raises UserError when it is another."""
    await trainer.ready()
    await configure(trainer, run.config, store, run.body.dataset, run.body.frozen)
    difference = compare_pins((await trainer.describe()).pins, run.pins)
    if difference.refused:
        raise UserError("this machine's workload is not the run's: " + "; ".join(difference.refused))
    for told in difference.warned:
        warn(told)


def workload_for(config: RunConfig, given: str | None) -> str:
    """Which --workload a joiner uses: its own, or the run's where any machine can find it. Raises UserError."""
    if given is not None:
        return given
    spec = config.workload_spec
    if spec in BUILT_IN or not spec.rpartition(":")[0].endswith(".py"):
        return spec
    raise UserError(
        f"this run trains the workload {spec}: copy that file here and pass --workload PATH/{spec}",
        exit_code=2,
    )


# Resuming ------------------------------------------------------------------------------------------------------------


async def resume(
    store: Store,
    transport: Libp2pTransport,
    trainer: Trainer,
    run: Run,
    addresses: tuple[str, ...],
    warn: Warn,
    event: Event,
) -> None:
    """Goes on with a run: its workload's file and data may have changed since the last start.

    What is gone of the founder's content is fetched again from whoever answers at `addresses`. Raises UserError.
    """
    sources = await who_answers(transport, addresses) if missing_content(store, run.body) else []
    try:
        await fetch_founded(store, transport, run.body, sources, _admission(transport, run), event)
    except ContentMissing as error:
        raise UserError(
            f"the run's {error.what} ({error.ref.size_bytes} bytes) is gone from {store.path}, and could not be fetched "
            f"again: {error}. Start this node while another one of the run is running, and name that one with --bootstrap"
        ) from error
    await agree(trainer, store, run, warn)


def contradicted(
    run: RunConfig,
    local: Local,
    *,
    secret: str | None,
    workload: str | None,
    founders: FoundersFlags,
) -> str:
    """Which flag contradicts the run that this directory is in ("" when none does)."""
    if secret is not None:
        token = parse_token(secret)
        if token.run != run_id(run):
            return "--secret belongs to another run"
        if token.secret != local.secret:
            return "--secret is not this run's"
    if workload is not None and parse_spec(workload).portable != run.workload_spec:
        return f"--workload {workload}, but the run trains {run.workload_spec}"
    for flag, value in founders.given().items():
        if reason := _contradiction(run, local, flag, value):
            return reason
    return ""


def _contradiction(run: RunConfig, local: Local, flag: str, value: Any) -> str:
    """Why one of the founder's flags does not fit the run ("" when it does)."""
    match flag:
        case "--config":
            fits = _same_settings(run, value)
            return "" if fits else f"--config {value} says something else than the run was founded with"
        case "--rounds":
            founded = run.strategy.aggregation_rounds
        case "--minimum-members":
            founded = run.participation.minimum_members
        case "--init":
            fits = digest_of(value) == local.init
            return "" if fits else f"--init {value} is not what the run was founded with"
        case "--open":
            return "" if run.open else "--open, but the run was founded with a secret"
        case _:
            raise LocalError(f"nothing says whether {flag} fits a run")
    return "" if value == founded else f"{flag} {value}, but the run was founded with {founded}"


def _same_settings(run: RunConfig, run_file: Path) -> bool:
    """Whether what the file sets is what the run has; what the file leaves out may come from the workload's defaults."""
    text = _read_run_file(run_file)
    base = {name: msgspec.to_builtins(getattr(run, name)) for name in RunSettings.__struct_fields__}
    settings = parse_run_file(text, str(run_file), base)
    return all(getattr(settings, name) == getattr(run, name) for name in RunSettings.__struct_fields__)
