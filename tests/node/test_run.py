"""Coming to a run with a real trainer: what is compared and fetched before a node takes part, and what refuses it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from node.flags import FoundersFlags
from node.network.bulk import serve
from node.network.hello import JoinToken
from node.network.libp2p_transport import Libp2pTransport, open_transport
from node.network.transport_events import Received
from node.reporting.console import Console
from node.run import Local, Run, ask_genesis, authority_of, contradicted, digest_of, read_local, write_local
from node.start import NodeOptions, open_directory, start
from node.storage.identity_key import IdentityKey
from node.storage.store import Store
from p2pcoord.consensus.record import Record, make_genesis
from p2pcoord.consensus.voter import Appended, Owner
from p2pcoord.content import ContentRef
from p2pcoord.errors import UserError
from p2pcoord.layout import Layout
from p2pcoord.messages import GenesisReply
from p2pcoord.run_config import RunSettings, found_run, run_id
from p2pcoord.run_config import encode as encode_config
from p2pcoord.wire import encode
from p2pcoord.workload import WorkloadPins
from tests.node.network.bulk_sources import Held

WORKLOAD = """
import torch
from torch.utils.data import TensorDataset
import p2pcoord

class Mine(p2pcoord.Workload):
    def model(self):
        return torch.nn.Linear(8, WIDTH)
    def dataset_bytes(self):
        return b"the founder's"
    def data(self, split):
        assert self.dataset == b"the founder's"
        x = torch.linspace(0, SCALE, 8 * 20).reshape(20, 8)
        return TensorDataset(x, x)
    def loss(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean()
"""

LIMIT_S = 120.0


def workload(folder: Path, *, width: int = 8, scale: int = 1, comment: str = "") -> str:
    file = folder / "mine.py"
    file.write_text(WORKLOAD.replace("WIDTH", str(width)).replace("SCALE", str(scale)) + comment)
    return f"{file}:Mine"


@asynccontextmanager
async def transport_of(key: IdentityKey) -> AsyncIterator[Libp2pTransport]:
    async with open_transport(
        key, ["/ip4/127.0.0.1/tcp/0"], hello=b"", check_hello=lambda peer, hello: None, session=os.urandom(8)
    ) as transport:
        yield transport


class Machine:
    """A directory in which a node starts; `told` is what its user reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told: list[str] = []
        self.events: list[tuple[str, dict[str, Any]]] = []

    async def start(self, **flags: object) -> Run:
        """As far as `start` goes; of a new run the log's first frames are written, as a peer does. Raises UserError."""
        options = NodeOptions(data_dir=self.folder / "node", device="cpu", **flags)  # type: ignore[arg-type]
        try:
            with trio.fail_after(LIMIT_S), Store.open(options.data_dir) as store:
                return await self._start(options, store)
        except BaseExceptionGroup as group:
            mistakes, others = group.split(UserError)
            assert mistakes is not None and others is None, group
            raise mistakes.exceptions[0] from None

    async def _start(self, options: NodeOptions, store: Store) -> Run:
        key, resumed = open_directory(store, None, self.told.append)
        async with transport_of(key) as transport, trio.open_nursery() as nursery:
            try:
                started = await start(
                    options,
                    name="lab1",
                    token=None,
                    resumed=resumed,
                    store=store,
                    key=key,
                    transport=transport,
                    console=Console(self.told.append, lambda peer: peer),
                    nursery=nursery,
                    event=lambda name, fields: self.events.append((name, fields)),
                )
            finally:
                nursery.cancel_scope.cancel()
        if resumed is None:
            store.append(
                [
                    encode(frame)
                    for frame in (Owner(key.peer_id, started.run.id), Appended(started.run.genesis))
                ]
            )
        return started.run


# Resuming


def test_a_node_that_resumes_with_another_model_or_other_data_is_refused(tmp_path: Path) -> None:
    machine = Machine(tmp_path)

    async def main() -> None:
        run = await machine.start(workload=workload(tmp_path))
        workload(tmp_path, width=16)
        with pytest.raises(
            UserError, match=r"this machine's workload is not the run's: the model differs: .*weight"
        ):
            await machine.start()
        workload(tmp_path, scale=2)
        with pytest.raises(UserError, match="train data differs"):
            await machine.start()
        workload(tmp_path, comment="# a comment\n")
        with Store.open(tmp_path / "node") as store:
            local = read_local(store)
            assert local is not None
            write_local(store, msgspec.structs.replace(local, trusted=(7, b"r" * 32)))
        resumed = await machine.start()
        assert (resumed.id, resumed.trusted) == (run.id, (7, b"r" * 32))
        with Store.open(tmp_path / "node") as store:
            assert read_local(store) == msgspec.structs.replace(local, trusted=resumed.trusted)

    trio.run(main)
    assert ["source differs" in line for line in machine.told] == [True], "a source that differs only warns"


def test_a_data_set_that_is_gone_is_fetched_again_or_the_node_is_refused(tmp_path: Path) -> None:
    machine = Machine(tmp_path)

    async def main() -> None:
        run = await machine.start(workload=workload(tmp_path))
        ref = run.body.dataset
        assert ref is not None
        with Store.open(tmp_path / "node") as store:
            store.discard([ref.root])
        with pytest.raises(UserError, match=r"the run's data set \(13 bytes\) is gone from .*--bootstrap$"):
            await machine.start()
        async with transport_of(IdentityKey.generate()) as serving:
            serve(serving, lambda peer, root: Held(b"the founder's"))
            await machine.start(bootstrap=(serving.addresses()[0],))
            told = {"purpose": "dataset", "size_bytes": 13, "sources": {serving.peer_id: 13}, "refused": {}}
        assert [name for name, _ in machine.events] == ["fetch-failed", "fetched"]
        assert machine.events[-1] == ("fetched", told)
        with Store.open(tmp_path / "node") as store:
            assert store.has(ref)

    trio.run(main)


WRONG = {
    "config": Path("run.toml"),
    "rounds": 7,
    "minimum_members": 9,
    "init": Path("first.safetensors"),
    "open": True,
}


@pytest.mark.parametrize("name", FoundersFlags._fields)
def test_each_of_the_founders_flags_is_refused_where_a_run_is_there_already(
    tmp_path: Path, name: str
) -> None:
    founders = FoundersFlags(**{name: WRONG[name]})
    [flag] = founders.given()
    with pytest.raises(UserError, match=f"^{flag} is the founder's") as caught:
        trio.run(lambda: Machine(tmp_path).start(bootstrap=("192.0.2.7:4001",), founders=founders))
    assert caught.value.exit_code == 2
    (tmp_path / "run.toml").write_text("[strategy]\nlocal_steps = 4\n")
    (tmp_path / "first.safetensors").write_bytes(b"other parameters")
    if name in ("config", "init"):
        founders = FoundersFlags(**{name: tmp_path / WRONG[name]})
    config = found_run(RunSettings(), founder="A", nonce=bytes(16), workload_spec="text")
    local = Local(b"s" * 16, "text", {}, "lab1")
    told = contradicted(config, local, secret=None, workload=None, founders=founders)
    assert told.startswith(flag)
    assert contradicted(config, local, secret=None, workload=None, founders=FoundersFlags()) == ""


def test_flags_with_which_the_run_was_founded_are_no_contradiction(tmp_path: Path) -> None:
    init = tmp_path / "first.safetensors"
    init.write_bytes(b"parameters")
    config = found_run(RunSettings(), founder="A", nonce=bytes(16), workload_spec="text", open=True)
    founders = FoundersFlags(
        rounds=config.strategy.aggregation_rounds,
        minimum_members=config.participation.minimum_members,
        init=init,
        open=True,
    )
    local = Local(b"", "text", {}, "lab1", init=digest_of(init))
    assert contradicted(config, local, secret=None, workload="text", founders=founders) == ""


# Joining


async def asked(genesis: Record, run: bytes) -> Run:
    """What a joiner makes of a bootstrap peer's genesis. Raises UserError."""

    async def answer(transport: Libp2pTransport) -> None:
        while True:
            event = await transport.receive()
            if isinstance(event, Received):
                transport.send(event.peer, encode(GenesisReply(genesis)))

    key = IdentityKey.generate()
    async with (
        transport_of(IdentityKey.generate()) as serving,
        transport_of(key) as transport,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(answer, serving)
        try:
            token = JoinToken(b"s" * 16, run, 0, b"")
            invitation = await ask_genesis(transport, key, (serving.addresses()[0],), token)
        except UserError as error:
            mistake = error
        else:
            return invitation.run
        finally:
            nursery.cancel_scope.cancel()
    raise mistake


def test_a_genesis_that_is_forged_or_starts_from_nothing_is_refused_in_words() -> None:
    founder = IdentityKey.generate()
    config = found_run(RunSettings(), founder=founder.peer_id, nonce=bytes(16), workload_spec="text")
    pins = encode(WorkloadPins(Layout(()), bytes(32), bytes(32), None, None))
    run = run_id(config)

    def made(state: ContentRef | None) -> Record:
        return make_genesis(authority_of(founder, run), encode_config(config), pins, state)

    right = made(ContentRef(bytes(32), 0))
    assert trio.run(asked, right, run).id == run
    forged = msgspec.structs.replace(right, header=msgspec.structs.replace(right.header, signature=bytes(64)))
    for genesis, told in (
        (forged, "the bootstrap peer's genesis is not the run's"),
        (made(None), "names no version 0"),
    ):
        with pytest.raises(UserError, match=told):
            trio.run(asked, genesis, run)
    with pytest.raises(UserError, match="another run than --secret names"):
        trio.run(asked, right, bytes(32))
