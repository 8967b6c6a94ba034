"""A user's mistakes at `p2pcoord node`, on real processes: what is said, the exit code, and no traceback of ours."""

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import cbor2
import msgspec
import pytest
import trio

from node.network.hello import JoinToken, make_hello, parse_token, program_version
from node.network.libp2p_transport import open_transport
from node.network.link import SESSION_BYTES
from node.network.transport_events import Received
from node.run import LOCAL_FILE, authority_of
from node.storage.identity_key import IdentityKey, load_or_create
from node.storage.store import Store
from p2pcoord.consensus.record import Record, make_genesis
from p2pcoord.consensus.voter import Appended, Owner
from p2pcoord.content import ContentRef
from p2pcoord.identity import Authority
from p2pcoord.layout import Layout
from p2pcoord.messages import GenesisReply
from p2pcoord.run_config import RunSettings, found_run
from p2pcoord.run_config import encode as encode_config
from p2pcoord.wire import encode
from p2pcoord.workload import WorkloadPins
from tests.namespaces.running_node import (
    COMMAND,
    START_S,
    RunningNode,
    environment,
    join_flags,
    running,
)
from tests.namespaces.runs import WORKLOADS, run_file

pytestmark = (
    pytest.mark.slow
)  # each mistake is a process that loads everything first: minutes on a busy machine

SMALL = f"{WORKLOADS}:Small"
ANYWHERE = ("--listen", "/ip4/127.0.0.1/tcp/0", "--device", "cpu")
ENDS_S = 60.0


def fails(folder: Path, *flags: str, code: int = 1, listen: tuple[str, ...] = ANYWHERE) -> str:
    """What a node that cannot start says on standard error, without the "error: " before it."""
    done = subprocess.run(
        [*COMMAND, "node", "--data-dir", str(folder), *listen, *flags],
        capture_output=True, text=True, check=False, timeout=ENDS_S, env=environment(), stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "node/process.py" not in done.stderr
    assert "ExceptionGroup" not in done.stderr
    assert "trio" not in done.stderr
    return done.stderr.strip().removeprefix("error: ")


@pytest.fixture(scope="module")
def founder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    """A node whose run waits for a second member."""
    folder = tmp_path_factory.mktemp("founder")
    with running() as nodes:
        config = run_file(folder / "run.toml", members=2, committee=3, pause_s=0.05)
        node = RunningNode(folder / "lab0", *ANYWHERE, "--workload", SMALL, "--config", str(config))
        nodes.append(node.start())
        node.until("founded", lambda d: d.get("join_line"), START_S)
        yield node


def line_of(founder: RunningNode) -> tuple[str, str]:
    document = founder.status()
    assert document is not None
    _, address, _, secret = join_flags(document)
    return address, secret


# Joining ------------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return int(server.getsockname()[1])


def test_an_address_at_which_nobody_answers(tmp_path: Path, founder: RunningNode) -> None:
    port, (_, secret) = free_port(), line_of(founder)
    told = fails(tmp_path / "a", "--bootstrap", f"127.0.0.1:{port}", "--secret", secret)
    assert told == (
        f"no node answers at 127.0.0.1:{port} (127.0.0.1:{port}: nobody listens there): check the address, that the "
        "node there runs, and that its port is open"
    )


def test_an_address_at_which_something_else_answers(tmp_path: Path, founder: RunningNode) -> None:
    _, secret = line_of(founder)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        port = server.getsockname()[1]
        told = fails(tmp_path / "a", "--bootstrap", f"127.0.0.1:{port}", "--secret", secret)
    assert told.startswith(f"no node answers at 127.0.0.1:{port} (127.0.0.1:{port} is no p2pcoord node")


@pytest.mark.parametrize("address", ["somewhere", "/ip4/127.0.0.1/udp/4001", "127.0.0.1:99999"])
def test_an_address_that_is_none(tmp_path: Path, founder: RunningNode, address: str) -> None:
    _, secret = line_of(founder)
    told = fails(tmp_path / "a", "--bootstrap", address, "--secret", secret, code=2)
    assert told.startswith(f"--bootstrap {address}: ")
    assert "Use HOST:PORT or a multiaddr such as /ip4/192.0.2.7/tcp/4001/p2p/12D3..." in told


def test_an_address_of_another_peer_than_lives_there(tmp_path: Path, founder: RunningNode) -> None:
    address, secret = line_of(founder)
    named = IdentityKey.generate().peer_id
    wrong = address.rpartition("/")[0] + f"/{named}"
    told = fails(tmp_path / "a", "--bootstrap", wrong, "--secret", secret)
    assert told.startswith(f"at {wrong} lives another peer than the one named (")
    assert f"{founder.peer_id}, not {named}" in told


def test_a_secret_with_a_letter_that_was_changed(tmp_path: Path, founder: RunningNode) -> None:
    address, secret = line_of(founder)
    letter = "x" if secret[40] != "x" else "y"
    changed = secret[:40] + letter + secret[41:]
    for given in (changed, secret[:-3], "hunter2"):
        told = fails(tmp_path / "a", "--bootstrap", address, "--secret", given, code=2)
        assert told == (
            "--secret is not what a node of the run printed: copy the whole line again (a letter is wrong or missing)"
        )


def test_a_well_formed_token_with_another_secret_or_run_or_with_none(
    tmp_path: Path, founder: RunningNode
) -> None:
    address, secret = line_of(founder)
    token = parse_token(secret)
    wrong = msgspec.structs.replace(token, secret=bytes(16)).text()
    told = fails(tmp_path / "a", "--bootstrap", address, "--secret", wrong)
    assert told == (
        f"the peer at {address} refused this node: wrong secret: copy the whole line that a node of the run printed"
    )
    another = msgspec.structs.replace(token, run=bytes(32)).text()
    told = fails(tmp_path / "b", "--bootstrap", address, "--secret", another)
    assert told == (
        f"--secret is of another run than the peer at {address}: copy the whole line that a node of the run printed"
    )
    told = fails(tmp_path / "c", "--bootstrap", address)
    assert told == (
        f"the peer at {address} refused this node: the run needs a secret: copy the whole line that a node of the run printed"
    )
    document = founder.status()
    assert document is not None
    assert document["rejected"]["by_kind"]["hello_refused"] >= 3
    assert [member["program_version"] for member in document["members"]] == [program_version()]


def newer_genesis(authority: Authority, founder: str) -> Record:
    """Of a program whose run file has a key that is unknown here."""
    config = found_run(RunSettings(), founder=founder, nonce=bytes(16), workload_spec="text")
    fields = cbor2.loads(encode_config(config))
    fields["strategy"]["patience"] = 3
    pins = encode(WorkloadPins(Layout(()), bytes(32), bytes(32), None, None))
    return make_genesis(authority, encode(fields), pins, ContentRef(bytes(32), 0))


def test_a_run_of_a_newer_program(tmp_path: Path) -> None:
    key = IdentityKey.generate()
    token = JoinToken(b"s" * 16, b"r" * 32, 0, b"")
    genesis = newer_genesis(authority_of(key, token.run), key.peer_id)

    async def serve() -> str:
        async with (
            open_transport(
                key,
                ["/ip4/127.0.0.1/tcp/0"],
                hello=make_hello(token.run, b""),
                check_hello=lambda peer, data: None,
                session=os.urandom(SESSION_BYTES),
            ) as transport,
            trio.open_nursery() as nursery,
        ):

            async def answer() -> None:
                while True:
                    event = await transport.receive()
                    if isinstance(event, Received):
                        transport.send(event.peer, encode(GenesisReply(genesis)))

            nursery.start_soon(answer)
            flags = ("--bootstrap", transport.addresses()[0], "--secret", token.text())
            told = await trio.to_thread.run_sync(fails, tmp_path / "a", *flags)
            nursery.cancel_scope.cancel()
        return told

    told = trio.run(serve)
    assert told.startswith("the bootstrap peer's run cannot be read by this program, p2pcoord ")
    assert "patience" in told
    assert told.endswith("Upgrade p2pcoord here")


def test_a_directory_of_a_newer_program(tmp_path: Path) -> None:
    with Store.open(tmp_path / "a") as store:
        key = load_or_create(store.path)
        genesis = newer_genesis(authority_of(key, b"r" * 32), key.peer_id)
        store.append([encode(Owner(key.peer_id, b"r" * 32)), encode(Appended(genesis))])
    told = fails(tmp_path / "a")
    assert told.startswith(f"{tmp_path / 'a'}'s run cannot be read by this program, p2pcoord ")
    assert told.endswith("Upgrade p2pcoord here")


def test_flags_of_the_founder_at_a_joiner(tmp_path: Path, founder: RunningNode) -> None:
    address, secret = line_of(founder)
    told = fails(tmp_path / "a", "--bootstrap", address, "--secret", secret, "--rounds", "3", code=2)
    assert told == "--rounds is the founder's: a node that joins takes the run as it is"
    told = fails(tmp_path / "a", "--bootstrap", address, "--secret", secret, "--open", code=2)
    assert told == "--open is the founder's: a node that joins takes the run as it is"
    told = fails(tmp_path / "b", "--secret", secret, code=2)
    assert told.startswith("--secret goes with --bootstrap: ")


def test_a_joiner_without_the_workload_file_is_told_which(tmp_path: Path, founder: RunningNode) -> None:
    address, secret = line_of(founder)
    told = fails(tmp_path / "a", "--bootstrap", address, "--secret", secret, code=2)
    assert told == (
        "this run trains the workload workloads.py:Small: copy that file here and pass --workload PATH/workloads.py:Small"
    )


def test_a_joiner_with_another_model_is_told_the_difference(tmp_path: Path, founder: RunningNode) -> None:
    address, secret = line_of(founder)
    told = fails(
        tmp_path / "a", "--bootstrap", address, "--secret", secret, "--workload", f"{WORKLOADS}:Wide"
    )
    assert told.startswith("this machine's workload is not the run's: ")
    assert "weight" in told
    assert "[25000, 100]" in told or "(25000, 100)" in told


# The workload ---------------------------------------------------------------------------------------------------------------


def test_a_workload_file_or_class_that_is_not_there(tmp_path: Path) -> None:
    told = fails(tmp_path / "a", "--workload", "nowhere.py:Digits", code=2)
    assert told == "--workload nowhere.py:Digits: there is no file nowhere.py"
    told = fails(tmp_path / "b", "--workload", f"{WORKLOADS}:Smal", code=2)
    assert told.endswith("there is no class Smal in it; did you mean Small?")
    told = fails(tmp_path / "c", "--workload", "no_such_module:Digits", code=2)
    assert "there is no module no_such_module" in told


BROKEN = """
import os, torch, p2pcoord
from torch.utils.data import TensorDataset

class Broken(p2pcoord.Workload):
    def model(self):
        return torch.nn.Linear(2, 1)
    def data(self, split):
        return self.rows()
    def rows(self):
        raise FileNotFoundError("no rows.csv here")
    def loss(self, model, batch):
        return model(batch[0]).mean()

class Empty(Broken):
    def rows(self):
        return TensorDataset(torch.zeros(0, 2))

class Deadly(Broken):
    def rows(self):
        print("the last words", flush=True)
        os.kill(os.getpid(), 9)

class Untrainable(Empty):
    def rows(self):
        return TensorDataset(torch.zeros(8, 2))
    def loss(self, model, batch):
        raise ValueError("a bug in loss")

class Diverging(Untrainable):
    def loss(self, model, batch):
        return model(batch[0]).mean() * float("nan")

class Unmeasurable(Untrainable):
    def loss(self, model, batch):
        return model(batch[0]).mean()
    def metrics(self, model, batch):
        raise ValueError("a bug in metrics")
"""


def test_an_exception_in_the_workload_shows_the_users_traceback_and_nothing_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(BROKEN)
    told = fails(tmp_path / "a", "--workload", f"{file}:Broken")
    assert told.splitlines()[0].endswith("of the workload failed:")
    assert "FileNotFoundError: no rows.csv here" in told
    frames = re.findall(r'File "([^"]+)", line \d+, in (\w+)', told)
    assert frames == [(str(file), "data"), (str(file), "rows")]
    file.write_text("import p2pcoord\nraise RuntimeError('at import')\n")
    told = fails(tmp_path / "b", "--workload", f"{file}:Broken")
    assert "RuntimeError: at import" in told
    assert re.findall(r'File "([^"]+)"', told) == [str(file)]
    file.write_text("def broken(:\n")
    told = fails(tmp_path / "c", "--workload", f"{file}:Broken")
    assert "SyntaxError" in told
    assert re.findall(r'File "([^"]+)"', told) == [str(file)]


def test_a_trainer_that_dies_while_its_node_starts(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(BROKEN)
    told = fails(tmp_path / "a", "--workload", f"{file}:Deadly")
    assert told.startswith(
        "this node cannot start: the trainer process was killed by SIGKILL; its last output:"
    )
    assert told.endswith("the last words")


def test_first_parameters_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "first.safetensors"
    told = fails(tmp_path / "a", "--workload", SMALL, "--init", str(file), code=2)
    assert told == f"{file}: there is no such file"
    file.write_bytes(b"x" * 100)
    told = fails(tmp_path / "b", "--workload", SMALL, "--init", str(file), code=2)
    assert told.startswith(f"{file} is no safetensors file: ")


def test_data_without_a_row(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(BROKEN)
    told = fails(tmp_path / "a", "--workload", f"{file}:Empty")
    assert "empty" in told
    assert "train" in told
    assert "Traceback" not in told


def told_event(line: str) -> dict[str, Any]:
    """The event that a line of the screen tells; nothing where it is for people."""
    return json.loads(line) if line.startswith("{") else {}


@pytest.mark.parametrize(("name", "what"), [("Untrainable", "loss"), ("Unmeasurable", "metrics")])
def test_a_workload_that_fails_in_training_ends_its_node_after_a_few_tries(
    tmp_path: Path, name: str, what: str
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(BROKEN)
    with running() as nodes:
        node = RunningNode(tmp_path / "a", *ANYWHERE, "--workload", f"{file}:{name}")
        nodes.append(node.start())
        assert node.wait(ENDS_S) == 1
    printed = node.printed().splitlines()
    texts = [event["text"] for line in printed if (event := told_event(line)).get("event") == "trainer"]
    [traceback] = [text for text in texts if "Traceback" in text]
    assert re.findall(r'  File "([^"]+)", line \d+, in (\w+)', traceback) == [(str(file), what)]
    assert traceback.rstrip().endswith(f"ValueError: a bug in {what}")
    assert f"the same again: ValueError: a bug in {what}" in "\n".join(texts)
    last = printed[-1]
    assert last.startswith("error: this node stops: ")
    assert last.endswith(f"of the workload failed: ValueError: a bug in {what} (3 times in a row)")


def test_a_loss_that_is_no_number_ends_its_node_as_an_exception_does(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(BROKEN)
    with running() as nodes:
        node = RunningNode(tmp_path / "a", *ANYWHERE, "--workload", f"{file}:Diverging")
        nodes.append(node.start())
        assert node.wait(ENDS_S) == 1
    assert node.printed().splitlines()[-1] == (
        "error: this node stops: the contribution is not finite (loss nan) (3 times in a row)"
    )


# This machine ---------------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        listen = ("--listen", f"/ip4/127.0.0.1/tcp/{port}", "--device", "cpu")
        told = fails(tmp_path / "a", "--workload", SMALL, listen=listen)
    assert told == (
        f"port {port} is taken by another program (or another node): stop it, or choose another port with --listen"
    )


def test_a_directory_that_another_node_uses(founder: RunningNode) -> None:
    told = fails(founder.directory)
    assert str(founder.directory) in told
    assert str(founder.pid) in told
    assert "in use" in told or "uses" in told
    assert founder.runs


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    elsewhere = ("--device", "cuda:7", "--listen", "/ip4/127.0.0.1/tcp/0")
    told = fails(tmp_path / "a", "--workload", SMALL, code=2, listen=elsewhere)
    assert told.startswith("--device cuda:7: no such device; this machine has ")


def test_founding_and_contradicting_flags_inside_another_runs_directory(
    tmp_path: Path, founder: RunningNode
) -> None:
    folder = tmp_path / "used"
    config = run_file(tmp_path / "run.toml", members=1, committee=1, pause_s=0.0)
    with running() as nodes:
        node = RunningNode(folder, *ANYWHERE, "--workload", SMALL, "--config", str(config))
        nodes.append(node.start())
        node.until("trains", lambda d: d["version"] >= 1, START_S)
    address, secret = line_of(founder)
    changed = run_file(tmp_path / "other.toml", members=3, committee=3, pause_s=0.0)
    cases = {
        ("--rounds", "7"): "--rounds 7, but the run was founded with 100000",
        ("--minimum-members", "9"): "--minimum-members 9, but the run was founded with 1",
        ("--bootstrap", address, "--secret", secret): "--secret belongs to another run",
        (
            "--workload",
            f"{WORKLOADS}:Wide",
        ): f"--workload {WORKLOADS}:Wide, but the run trains workloads.py:Small",
        ("--open",): "--open, but the run was founded with a secret",
        ("--init", str(changed)): f"--init {changed} is not what the run was founded with",
        ("--config", str(changed)): f"--config {changed} says something else than the run was founded with",
    }
    for flags, reason in cases.items():
        told = fails(folder, *flags, code=2)
        assert told.startswith(f"{folder} already takes part in run "), told
        assert reason in told
        assert told.endswith("Leave the flag out, or use another --data-dir")
    assert (
        fails(folder, "--init", "nowhere", code=2) == "cannot read --init nowhere: No such file or directory"
    )
    told = fails(folder / "inside", code=2)
    assert told == (
        f"{folder / 'inside'} lies inside {folder}, which already takes part in a run: choose another --data-dir"
    )
    assert not (folder / "inside").exists()
    (folder / LOCAL_FILE).write_bytes(b"damaged")
    told = fails(folder)
    assert told.startswith(f"{folder / LOCAL_FILE} is damaged (")


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("[strategy]\nlocal_step = 3\n", "local_step", 2),
        ("[strategy]\nlocal_steps = 3\n\n[coordination]\ncommittee_size = 4\n", "committee_size", 5),
        ("[optimization]\nlearning_rate = 'fast'\n", "learning_rate", 2),
        ("[strateg]\nlocal_steps = 3\n", "strateg", 1),
        ("[strategy]\nlocal_steps =\n", "", 2),
    ],
)
def test_a_bad_run_file_is_told_with_its_key_and_line(tmp_path: Path, text: str, key: str, line: int) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    told = fails(tmp_path / "a", "--workload", SMALL, "--config", str(file), code=2)
    assert str(file) in told
    assert key in told
    assert re.search(rf"\b(line {line}|{re.escape(str(file))}:{line})\b", told), told


def test_a_run_file_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "no.toml"
    told = fails(tmp_path / "a", "--workload", SMALL, "--config", str(missing), code=2)
    assert told == f"cannot read the run file {missing}: No such file or directory"


@pytest.mark.parametrize("gap_s", [0.01, 0.05, 0.1])
def test_two_interrupts_at_once_end_it_without_a_word_of_ours(tmp_path: Path, gap_s: float) -> None:
    with running() as nodes:
        node = RunningNode(tmp_path / "a", *ANYWHERE, "--workload", SMALL)
        nodes.append(node.start())
        began = time.time()
        node.until("trains", lambda d: bool(node.commits(began)), START_S)
        node.signal(signal.SIGINT)
        time.sleep(gap_s)
        if node.runs:
            node.signal(signal.SIGINT)
        # Killed by it: Python gives signals up just before its end.
        assert node.wait(ENDS_S) in (0, 130, -signal.SIGINT)
    assert "Traceback" not in node.printed()
    assert "Error" not in node.printed()


def test_a_second_start_with_the_same_flags_is_no_mistake(tmp_path: Path) -> None:
    config = run_file(tmp_path / "run.toml", members=1, committee=1, pause_s=0.0)
    with running() as nodes:
        node = RunningNode(tmp_path / "used", *ANYWHERE, "--workload", SMALL, "--config", str(config))
        nodes.append(node)
        assert _trains_and_leaves(node) == 0
        assert _trains_and_leaves(node) == 0


def _trains_and_leaves(node: RunningNode) -> int | None:
    """Its exit code."""
    node.start()
    began = time.time()
    node.until("trains", lambda d: bool(node.commits(began)), START_S)
    node.end()
    assert node.process is not None
    return node.process.returncode
