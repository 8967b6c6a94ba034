"""The local door: one document for each connection, for the node's user only, and plain words when nobody answers."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from node.reporting import status_socket
from node.reporting.status_socket import PATH_FILE, SOCKET_FILE, ask_status, serve_status
from node.storage.store import Store
from p2pcoord.errors import LocalError, UserError

DOCUMENT = {"schema": 1, "role": "voter", "loss": float("inf"), "join_line": "p2pcoord node --secret x"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    with Store.open(tmp_path / "data"):
        pass
    return tmp_path / "data"


async def started(nursery: trio.Nursery, directory: Path, document: Callable[[], Any]) -> Path:
    """Serves in the nursery; returns once the socket is there, with its place."""
    nursery.start_soon(serve_status, directory, document)
    with trio.fail_after(5):
        while not (directory / SOCKET_FILE).exists() and not (directory / PATH_FILE).exists():  # noqa: ASYNC110
            await trio.sleep(0.005)
    return status_socket._place(directory)


@pytest.mark.trio
async def test_the_document_is_answered_to_everyone_who_asks(directory: Path) -> None:
    async with trio.open_nursery() as nursery:
        path = await started(nursery, directory, lambda: DOCUMENT)
        assert path == directory / SOCKET_FILE
        for _ in range(3):
            assert await ask_status(directory) == {**DOCUMENT, "loss": None}
        nursery.cancel_scope.cancel()
    assert not path.exists()


@pytest.mark.trio
async def test_the_socket_is_for_its_user_only(directory: Path) -> None:
    async with trio.open_nursery() as nursery:
        path = await started(nursery, directory, lambda: DOCUMENT)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_a_path_too_long_for_a_socket_goes_elsewhere_and_is_found(tmp_path: Path) -> None:
    directory = tmp_path / ("deep" * 15) / ("deeper" * 15)
    with Store.open(directory):
        pass
    async with trio.open_nursery() as nursery:
        path = await started(nursery, directory, lambda: DOCUMENT)
        assert (directory / PATH_FILE).read_text() == f"{path}\n"
        assert len(os.fsencode(path)) <= 103
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert (await ask_status(directory))["role"] == "voter"
        nursery.cancel_scope.cancel()
    assert not path.parent.exists()
    assert not (directory / PATH_FILE).exists()


@pytest.mark.trio
async def test_what_a_killed_process_left_is_replaced(directory: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(os.fspath(directory / SOCKET_FILE))
    left.close()
    with pytest.raises(UserError, match="no node answers"):
        await ask_status(directory)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_status, directory, lambda: DOCUMENT)
        with trio.fail_after(5):
            while True:
                try:
                    assert (await ask_status(directory))["schema"] == 1
                    break
                except UserError:
                    await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_nobody_there_is_said_plainly(directory: Path, tmp_path: Path) -> None:
    (directory / "lock").write_text("999999999\n")
    with pytest.raises(
        UserError, match=r"no node answers in .*: none is running there \(start it with: p2pcoord node"
    ):
        await ask_status(directory)
    (directory / "lock").write_text(f"{os.getpid()}\n")
    with pytest.raises(UserError, match=f"yet: process {os.getpid()} may be starting"):
        await ask_status(directory)
    with pytest.raises(UserError, match="does not exist: no node has run there"):
        await ask_status(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="is not a p2pcoord data directory"):
        await ask_status(tmp_path / "other")


@pytest.mark.trio
async def test_a_mistake_in_the_document_is_told_and_stops_nothing(directory: Path) -> None:
    answers: list[Any] = [{"bad": object()}, {"schema": 1}]
    async with trio.open_nursery() as nursery:
        await started(nursery, directory, lambda: answers.pop(0))
        with pytest.raises(LocalError, match="cannot tell its status: TypeError"):
            await ask_status(directory)
        assert await ask_status(directory) == {"schema": 1}
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_readers_that_do_not_read_hold_nobody_else_up(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_socket, "ANSWER_S", 0.3)
    large = {"schema": 1, "text": "x" * (4 << 20)}
    async with trio.open_nursery() as nursery:
        path = await started(nursery, directory, lambda: large)
        silent = [socket.socket(socket.AF_UNIX) for _ in range(status_socket.MAX_CONNECTIONS)]
        for one in silent:
            one.connect(os.fspath(path))
        await trio.sleep(0.5)  # they have been given up by now
        monkeypatch.setattr(status_socket, "ANSWER_S", 5.0)
        assert await ask_status(directory) == large
        for one in silent:
            one.close()
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_a_node_that_does_not_answer_and_one_that_dies_are_told_apart(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_socket, "ANSWER_S", 0.2)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(os.fspath(directory / SOCKET_FILE))
    listening.listen()
    with pytest.raises(UserError, match="does not answer within"):
        await ask_status(directory)

    def die_at_once() -> None:
        while True:
            connection, _ = listening.accept()
            connection.sendall(msgspec.json.encode(DOCUMENT)[:10])
            connection.close()
            return

    async with trio.open_nursery() as nursery:
        listening.accept()[0].close()  # the one from before
        nursery.start_soon(trio.to_thread.run_sync, die_at_once)
        with pytest.raises(UserError, match="ended while it answered"):
            await ask_status(directory)
    listening.close()


@pytest.mark.trio
async def test_no_socket_is_a_local_error(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="no socket for the status"):
        await serve_status(tmp_path / "nowhere", dict)
