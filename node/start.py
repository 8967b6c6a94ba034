"""How a node starts: its directory is opened, its trainer loads the workload, and the run is founded, joined or resumed.

directory    key and log; a log that must not be used is set aside together with its key
trainer      it loads the workload first: what the workload says of itself may become part of a new run
run          see `run.py`: three ways to come to one, and the flags that contradict each of them
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from node.flags import FoundersFlags
from node.founded_content import Event
from node.network.hello import JoinToken
from node.network.known_addresses import known_addresses
from node.network.libp2p_transport import Libp2pTransport
from node.reporting.console import Console
from node.run import (
    LOCAL_FILE,
    Local,
    Run,
    ask_genesis,
    contradicted,
    digest_of,
    found,
    join,
    known_run,
    read_local,
    readable,
    resume,
    workload_for,
    write_local,
)
from node.storage.identity_key import FILE_NAME as KEY_FILE
from node.storage.identity_key import IdentityKey, load_or_create
from node.storage.store import Store
from node.training.trainer_process import Trainer, TrainerSettings
from node.training.trainer_protocol import Loaded
from node.training.workload_loading import parse_spec
from p2pcoord.errors import LocalError, UserError
from p2pcoord.run_config import run_id


class NodeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The command line of `p2pcoord node`."""

    data_dir: Path
    bootstrap: tuple[str, ...] = ()
    secret: str | None = None
    workload: str | None = None
    local: dict[str, str] = {}
    listen: tuple[str, ...] = ()
    announce: tuple[str, ...] = ()
    name: str | None = None
    device: str | None = None
    founders: FoundersFlags = FoundersFlags()


def remembered(options: NodeOptions, local: Local | None) -> NodeOptions:
    """The command line, and where it says nothing of this machine, what the directory's last start was told."""
    if local is None:
        return options
    return msgspec.structs.replace(
        options,
        local=options.local or local.settings,
        listen=options.listen or local.listen,
        announce=options.announce or local.announce,
        name=options.name or local.name,
        device=options.device or local.device,
    )


# The directory -------------------------------------------------------------------------------------------------------


def open_directory(
    store: Store, token: JoinToken | None, tell: Callable[[str], None]
) -> tuple[IdentityKey, Run | None]:
    """The key, and the run that the log is of; None where there is none yet.

    Raises UserError when the run's secret is not here: without it every proof would pass for one of an open run.
    """
    has_key = (store.path / KEY_FILE).exists()
    key = load_or_create(store.path)
    try:
        known = known_run(store, key)
    except LocalError as error:
        key = _new_key(store, tell, f"the log cannot be used ({error})")
        store.set_aside_log()  # after its key: whatever happens between, the two are never used apart
        return key, None
    local = read_local(store)
    if known is None:
        if has_key and local is not None:
            key = _new_key(store, tell, "the key is here, but its log is gone")
        return key, None
    genesis, frames = known
    config, pins = readable(genesis, f"{store.path}'s")
    # Of the token that it was joined with: what this log holds of its own above it, a newer token may contradict.
    trusted = local.trusted if local is not None else None
    if config.open:
        return key, Run(genesis, config, pins, None, frames, trusted)
    secret = local.secret if local is not None else b""
    if not secret and token is not None and token.run == run_id(config):
        secret = token.secret
    if not secret:
        raise UserError(
            f"{store.path / LOCAL_FILE} is gone, and with it the run's secret: add the --secret that another node's line names",
            exit_code=2,
        )
    return key, Run(genesis, config, pins, secret, frames, trusted)


def _new_key(store: Store, tell: Callable[[str], None], why: str) -> IdentityKey:
    """A key without its log never votes again: this machine comes back as a new peer."""
    (store.path / KEY_FILE).rename(store.path / f"{KEY_FILE}.retired")
    key = load_or_create(store.path)
    tell(f"{why}: this machine comes back as a new peer, {key.peer_id}")
    return key


# The run -------------------------------------------------------------------------------------------------------------


class Started(msgspec.Struct, frozen=True):
    """A run, and a trainer that is configured for it."""

    run: Run
    trainer: Trainer
    loaded: Loaded


async def start(
    options: NodeOptions,
    *,
    name: str,
    token: JoinToken | None,
    resumed: Run | None,
    store: Store,
    key: IdentityKey,
    transport: Libp2pTransport,
    console: Console,
    nursery: trio.Nursery,
    event: Event,
) -> Started:
    """Founds, joins or resumes; the trainer runs in `nursery` from then on. Raises UserError.

    `name` is this machine's. Flags that contradict the run are refused before anything slow begins.
    """
    local = read_local(store)
    init = local.init if local is not None else None
    invitation = None
    if resumed is not None:
        workload = _workload_to_resume(options, name, store, resumed, local)
    elif options.bootstrap:
        for flag in options.founders.given():
            raise UserError(f"{flag} is the founder's: a node that joins takes the run as it is", exit_code=2)
        invitation = await ask_genesis(transport, key, options.bootstrap, token)
        workload = workload_for(invitation.run.config, options.workload)
    elif options.secret is not None:
        raise UserError(
            f"--secret goes with --bootstrap: {store.path} is in no run, and without the address of one of its nodes none can "
            "be joined",
            exit_code=2,
        )
    else:
        workload = options.workload or "text"
    trainer = Trainer(
        TrainerSettings(
            parse_spec(workload), store.path / "trainer", options.local, options.device or "auto"
        ),
        output=console.trainer_output,
        restarted=lambda reason: event("trainer-died", {"reason": reason}),
    )
    nursery.start_soon(trainer.run)
    loaded = await trainer.ready()
    if resumed is not None:
        run = resumed
        addresses = (*options.bootstrap, *known_addresses(store))
        await resume(store, transport, trainer, run, addresses, console.warn, event)
    elif invitation is not None:
        run = await join(store, transport, trainer, invitation, console.warn, event)
    else:
        run = await found(
            store,
            key,
            trainer,
            workload=workload,
            founders=options.founders,
        )
        init = digest_of(options.founders.init)
    absolute = parse_spec(workload)
    spec = f"{absolute.file}:{absolute.name}" if absolute.file else workload
    write_local(
        store,
        Local(
            run.secret or b"",
            spec,
            options.local,
            name,
            run.trusted,
            options.listen,
            options.announce,
            options.device,
            init,
        ),
    )
    return Started(run, trainer, loaded)


def _workload_to_resume(
    options: NodeOptions, name: str, store: Store, resumed: Run, local: Local | None
) -> str:
    workload = options.workload or (local.workload if local is not None else None)
    workload = workload_for(resumed.config, workload)
    reason = contradicted(
        resumed.config,
        local or Local(resumed.secret or b"", workload, {}, name),
        secret=options.secret,
        workload=options.workload,
        founders=options.founders,
    )
    if reason:
        raise UserError(
            f"{store.path} already takes part in run {resumed.id.hex()[:16]}: {reason}. Leave the flag out, "
            "or use another --data-dir",
            exit_code=2,
        )
    return workload
