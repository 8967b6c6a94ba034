"""The status for people: everything the document says, whatever machine it came from."""

from __future__ import annotations

import io
from datetime import datetime
from typing import Any

import pytest
import trio
from rich.console import Console

from node.reporting import status_view
from node.reporting.status_view import LAST_EVENTS, is_over, lines, quorum_line, render
from p2pcoord.errors import UserError

NOW = datetime(2026, 1, 1, 14, 12, 30)
A, B, C = (f"12D3KooW{letter * 44}" for letter in "ABC")


def member(peer: str, name: str, **fields: Any) -> dict[str, Any]:
    return {
        "peer_id": peer, "name": name, "role": "voter", "alive": True, "state": "alive", "phi": 0.4, "version": 12,
        "staleness": 0, "excluded": "", "last_seen_s": 1.0, "device": "cpu", "local_step": 600, "local_loss": 1.5,
    } | fields  # fmt: skip


def document(**fields: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "run_id": "ab" * 32,
        "name": "lab1",
        "peer_id": A,
        "role": "voter",
        "term": 3,
        "coordinator": B,
        "version": 12,
        "rounds": 30,
        "state_held": True,
        "round": {"number": 13, "attempt": 2, "phase": "local_training", "deadline_s": 41.7},
        "quorum": {"voters": 3, "reachable": 3, "needed": 2, "held": True, "missing": []},
        "metrics": {"loss": 1.234, "measures": {"bits_per_byte": 2.51}, "gradient_norm": 0.5, "learning_rate": 0.7},
        "history": [[version, 3.0 - version / 10] for version in range(1, 13)],
        "members": [member(B, "lab2", role="coordinator"), member(A, "lab1"), member(C, "laptop", role="member")],
        "last_commit": {
            "version": 12, "coordinator": B, "term": 3, "computation_s": 2.0, "communication_s": 0.25,
            "contributors": [
                {"peer_id": A, "weight": 0.25, "origin_round": 12}, {"peer_id": C, "weight": 0.75, "origin_round": 12}
            ],
        },
        "rejected": {"total": 0, "by_kind": {}, "by_peer": {}},
    } | fields  # fmt: skip


def text_of(shown: dict[str, Any], events: list[dict[str, Any]] | None = None) -> str:
    console = Console(file=io.StringIO(), width=220, color_system=None)
    console.print(render(shown, events or [], NOW))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_story_of_a_running_run() -> None:
    told = lines(document(), NOW)
    assert told[0] == f"lab1  voter, term 3, coordinator lab2  run {'ab' * 8}  peer {A}"
    assert told[1] == "version 12 of 30  round 13: local_training, attempt 2, closes within 42 s"
    assert told[2] == "quorum: 3 of 3 voters reachable, 2 needed"
    assert told[3] == "loss 1.234  bits_per_byte 2.51  gradient_norm 0.5  learning_rate 0.7"
    assert told[4] == "loss █▇▆▆▅▄▄▃▂▂▁▁  2.9 at version 1, 1.8 at 12"
    assert told[5] == (
        "last commit: version 12 by lab2 in term 3, from lab1 25%, laptop 75%; computation 2.0 s, communication 0.2 s"
    )
    assert len(told) == 6


def test_without_a_quorum_it_says_who_is_missing_and_since_when() -> None:
    waiting = document(
        quorum={"voters": 2, "reachable": 1, "needed": 2, "held": False, "missing": [B]},
        members=[member(A, "lab1"), member(B, "lab2", alive=False, state="dead", last_seen_s=630.0)],
    )
    assert "waiting for quorum: 1 of 2 needed; missing lab2 (last seen 14:02)" in lines(waiting, NOW)
    waiting["members"][1]["last_seen_s"] = None
    assert "waiting for quorum: 1 of 2 needed; missing lab2 (never seen)" in lines(waiting, NOW)


def test_a_missing_voter_is_named_although_there_is_a_quorum() -> None:
    told = lines(
        document(quorum={"voters": 3, "reachable": 2, "needed": 2, "held": True, "missing": [C]}), NOW
    )
    assert "quorum: 2 of 3 voters reachable, 2 needed; missing laptop (last seen 14:12)" in told


def test_while_the_committee_changes_it_says_which_half_lacks_voters() -> None:
    quorum = {
        "voters": 3, "reachable": 3, "needed": 2, "held": False, "missing": [B],
        "outgoing": {"voters": 2, "reachable": 1, "needed": 2},
    }  # fmt: skip
    told = [quorum_line(document(quorum=quorum), NOW)]
    quorum["outgoing"] = {"voters": 2, "reachable": 2, "needed": 2}
    told.append(quorum_line(document(quorum=quorum | {"missing": []}), NOW))
    told.append(quorum_line(document(quorum=quorum | {"missing": [], "held": True}), NOW))
    assert told == [
        "waiting for quorum: 3 of 2 needed, and 1 of 2 needed of the outgoing voters; missing lab2 (last seen 14:12)",
        "waiting for a coordinator: 3 of 3 voters reachable, 2 needed, and 2 of 2 outgoing voters reachable, 2 needed",
        "quorum: 3 of 3 voters reachable, 2 needed, and 2 of 2 outgoing voters reachable, 2 needed",
    ]


def test_the_end_of_the_run_and_a_coordinator_say_so() -> None:
    quorum = {"voters": 3, "reachable": 1, "needed": 2, "held": False, "missing": [B, C]}
    over = document(
        version=30,
        role="coordinator",
        quorum=quorum,
        members=[member(A, "lab1", version=30), member(B, "lab2", alive=False, state="dead", version=30)],
    )
    assert is_over(over)
    assert not is_over(document())
    assert not is_over({})
    told = lines(over, NOW)
    assert told[0].startswith("lab1  coordinator of term 3  run ")
    assert told[1] == "version 30 of 30: the run is over"
    assert not any(line.startswith("waiting") for line in told), "whoever is gone has ended"
    [row] = [line.split() for line in text_of(over).splitlines() if line.startswith("lab2")]
    assert row[2] == "ended"


def test_rejected_messages_are_counted_by_kind_and_peer() -> None:
    by_peer = {B: 4, "198.51.100.7": 3} | {f"192.0.2.{n}": 1 for n in range(7)}
    told = lines(
        document(rejected={"total": 14, "by_kind": {"malformed": 9, "wrong_secret": 5}, "by_peer": by_peer}),
        NOW,
    )
    assert told[-1] == (
        "rejected: 14 messages (malformed 9, wrong_secret 5) from lab2 4, 198.51.100.7 3, 192.0.2.0 1, 192.0.2.1 1, "
        "192.0.2.2 1, 4 more"
    )


def test_members_are_a_table_with_this_machine_first() -> None:
    text = text_of(
        document(members=[*document()["members"], member("12D3KooWx", "", excluded="lied", phi=None)])
    )
    rows = [row.split() for row in text.splitlines()]
    at = next(i for i, row in enumerate(rows) if row[:2] == ["member", "role"])
    assert [row[0] for row in rows[at + 1 : at + 5]] == ["lab1", "lab2", "laptop", "-"]
    assert rows[at + 2] == ["lab2", "coordinator", "alive", "12", "0", "0.4", "600", "1.5", "cpu", "BBBBBBBB"]
    assert "excluded: lied" in text


def test_two_members_of_one_name_are_told_apart() -> None:
    told = text_of(
        document(members=[member(B, "lab1", role="coordinator"), member(A, "lab1"), member(C, "laptop")])
    )
    assert "coordinator lab1(BBBBBBBB)" in told
    assert "from lab1(AAAAAAAA) 25%, laptop 75%" in told


def test_who_has_left_is_told_of_by_name() -> None:
    twice = {"peer_id": B, "weight": 0.33, "origin_round": 12}
    left = document(
        members=[member(A, "lab1"), member(C, "laptop")],
        departed={B: "lab2"},
        last_commit=document()["last_commit"] | {"contributors": [twice, twice]},
    )
    assert "from lab2 66%;" in text_of(left), "what a member did in two parts is one figure"
    assert "lab2 left the run" in text_of(left, [{"event": "left", "peer": B}])
    left["members"][1]["name"] = "lab2"  # the machine came back with a new key
    assert "lab2(BBBBBBBB) left the run" in text_of(left, [{"event": "left", "peer": B}])
    assert "lab2 is gone" in text_of(left, [{"event": "failed", "peer": C}])


def test_a_large_run_does_not_flood_the_screen() -> None:
    members = [member(f"12D3KooW{n:044}", f"n{n}") for n in range(500)]
    text = text_of(document(members=members))
    assert "and 470 more" in text
    assert len(text.splitlines()) < 60


def test_a_small_terminal_shows_whole_cells_and_the_last_event() -> None:
    members = [member(A, "lab1", role="coordinator", device="NVIDIA H100 80GB HBM3")]
    members += [member(f"12D3KooW{n:044}", f"machine{n}") for n in range(40)]
    events = [{"time": f"2026-01-01T12:00:{n:02}.000Z", "event": "failed", "peer": A} for n in range(9)]
    events.append({"event": "left", "peer": A})
    console = Console(file=io.StringIO(), width=80, height=24, color_system=None)
    console.print(status_view.fitted(document(members=members), events, console, NOW))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue().splitlines()
    assert len(shown) < 24
    assert not any("…" in line for line in shown)
    assert shown[-1].endswith("lab1 left the run")
    headings = next(line.split() for line in shown if line.startswith("member"))
    assert headings[:5] == ["member", "role", "state", "version", "behind"]
    assert any(line.startswith("machine0 ") for line in shown)
    assert any(line.strip().startswith("and ") for line in shown)


def test_the_last_events_are_told_in_words() -> None:
    events = [{"time": f"2026-01-01T12:00:{n:02}.000Z", "event": "failed", "peer": B} for n in range(9)]
    events += [{"time": "bad", "event": "phase", "phase": "aggregation"}]
    text = text_of(document(), events)
    assert text.count("lab2 is gone") == LAST_EVENTS
    assert "aggregation" not in text


def test_names_from_other_machines_are_text_and_nothing_else() -> None:
    evil = document(
        members=[member(A, "lab1"), member(B, "[red]x\x1b[2Jy[/red]")], join_line="p2pcoord node [bold]x"
    )
    text = text_of(evil)
    assert "\x1b" not in text
    assert "[red]x?[2Jy[/red]" in text


def test_the_line_to_join_with_is_whole_on_a_narrow_screen() -> None:
    console = Console(file=io.StringIO(), width=60, color_system=None)
    line = f"p2pcoord node --bootstrap lab1:4001 [bold] --secret {'x' * 200}"
    status_view.show(document(join_line=line), [], console)
    assert isinstance(console.file, io.StringIO)
    assert f"join with  {line}" in console.file.getvalue().splitlines()


def test_a_document_with_little_in_it_is_shown() -> None:
    for little in (
        {},
        {"peer_id": A, "members": [{"peer_id": A}]},
        document(metrics={}, history=[[1, None]], last_commit=None),
    ):
        assert "quorum" in text_of(little)


@pytest.mark.trio
async def test_watching_goes_on_when_the_node_stops_answering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_view, "REFRESH_S", 0.01)
    answers: list[Any] = [
        document(),
        document(version=13),
        UserError("no node answers in x"),
        document(version=14),
    ]

    async def ask() -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        if not answers:
            scope.cancel()
            await trio.sleep_forever()
        answer = answers.pop(0)
        if isinstance(answer, UserError):
            raise answer
        return answer  # type: ignore[no-any-return]

    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    with trio.CancelScope() as scope:
        await status_view.watch(ask, list, console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "no node answers in x" in shown
    assert all(f"version {version} of 30" in shown for version in (12, 13, 14))


@pytest.mark.trio
async def test_watching_where_nobody_is_says_so_at_once() -> None:
    async def ask() -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        raise UserError("no node answers in x")

    with pytest.raises(UserError, match="no node answers"):
        await status_view.watch(ask, list, Console(file=io.StringIO()))
