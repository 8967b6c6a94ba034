"""The screen: one line a round, words and names for people, JSON for programs, and no flood."""

from __future__ import annotations

import ast
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from node.reporting.console import WARNINGS, Console
from node.reporting.event_words import WORDS, in_words, naming, number, printable, size
from node.reporting.repetitions import MAX_REPEATED

NAMES = {"peerA": "lab1", "peerB": "lab2", "peerC": "laptop"}
COMMIT = {
    "version": 12,
    "term": 3,
    "coordinator": "peerB",
    "loss": 1.2341,
    "measures": {"bits_per_byte": 2.5104},
    "contributors": ["peerA", "peerB", "peerC"],
    "seconds": 3.21,
}
ROOT = Path(__file__).parents[3]


def name_of(peer: str) -> str:
    return NAMES.get(peer, peer)


class Screen:
    def __init__(self, *, terminal: bool) -> None:
        self.told: list[str] = []
        self.now = 0.0
        self.console = Console(self.told.append, lambda: name_of, terminal=terminal, clock=lambda: self.now)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)


def test_a_commit_is_one_line_with_names() -> None:
    screen = Screen(terminal=True)
    screen.console.event("commit", COMMIT)
    (line,) = screen.told
    clock, _, rest = line.partition(" ")
    assert re.fullmatch(r"\d\d:\d\d:\d\d", clock)
    assert rest == (
        "round 12  loss 1.234  bits_per_byte 2.51  contributors lab1 lab2 laptop  3.2 s  coordinator lab2"
    )


def test_not_on_a_terminal_the_same_event_is_json_with_peer_ids_in_full() -> None:
    screen = Screen(terminal=False)
    screen.console.event("commit", COMMIT | {"root": b"\x01"})
    (line,) = screen.told
    event = json.loads(line)
    assert event.pop("time").endswith("Z")
    assert event == {"level": "info", "event": "commit", **COMMIT, "root": "01"}


def test_other_events_are_words_and_nothing_is_said_twice() -> None:
    screen = Screen(terminal=True)
    screen.console.event("failed", {"peer": "peerB", "was": "suspect"})
    assert screen.told[0][9:] == "lab2 is gone"


def test_rounds_that_came_together_are_one_line() -> None:
    screen = Screen(terminal=True)
    for version in range(1, 38):
        screen.console.event("commit", COMMIT | {"version": version, "late": True})
    screen.console.event("caught-up", {"version": 20, "loss": 3.1, "rounds": 20})
    screen.console.event("caught-up", {"version": 37, "loss": 2.4071, "rounds": 17})
    screen.console.event("commit", COMMIT | {"version": 38, "late": False})
    assert [line[9:].split("  ")[0] for line in screen.told] == [
        "caught up to version 37, loss 2.407",
        "round 38",
    ]


def test_it_has_caught_up_when_no_more_comes() -> None:
    screen = Screen(terminal=False)
    for version in (20, 37):
        screen.console.event("caught-up", {"version": version, "loss": 2.4, "rounds": 20})
        screen.now += 1.0
        screen.console.settle()
    assert screen.told == []
    screen.now += 1.0
    screen.console.settle()
    screen.console.settle()
    [line] = map(json.loads, screen.told)
    assert (line["version"], line["rounds"]) == (37, 40)


def test_history_is_no_news() -> None:
    screen = Screen(terminal=True)
    for event in ("admitted", "left", "excluded"):
        screen.console.event(event, {"peer": "peerB", "name": "lab2", "reason": "lied", "late": True})
    screen.console.event("fetch-failed", {"purpose": "state", "reason": "no link", "superseded": True})
    assert screen.told == []


def test_a_state_that_cannot_be_had_is_told_of_by_names() -> None:
    peer = "12D3KooW" + "a" * 44
    told = in_words(
        "fetch-failed",
        {"purpose": "state", "version": 3, "reason": f"{peer}: connection lost"},
        naming([(peer, "lab1")]),
    )
    assert told == "the state of version 3 could not be fetched: lab1: connection lost"


def test_peers_go_by_name_and_those_of_one_name_by_the_end_of_their_id_besides() -> None:
    one, two, three, four = ("12D3KooW" + letter * 44 for letter in "abcd")
    call = naming([(one, "lab1"), (two, "lab2"), (three, "lab2"), (four, "")])
    assert [call(peer) for peer in (one, two, three, four, "10.0.0.1")] == [
        "lab1",
        "lab2(bbbbbbbb)",
        "lab2(cccccccc)",
        "dddddddd",
        "10.0.0.1",
    ]


def test_events_without_words_are_not_shown() -> None:
    screen = Screen(terminal=True)
    for event in ("phase", "certified", "trained", "never-heard-of"):
        screen.console.event(event, {"version": 1})
    screen.console.event("fetched", {"purpose": "result", "sources": {"peerA": 10}})
    assert screen.told == []
    sources = {"peerA": 2048, "peerB": 5}
    screen.console.event(
        "fetched", {"purpose": "state", "version": 3, "sources": sources, "refused": {"peerC": "bad_chunk"}}
    )
    assert (
        "the state of version 3: 2.0 KiB from lab1, 5 B from lab2; laptop was dropped (bad_chunk)"
        in screen.told[0]
    )
    screen.console.event("fetched", {"purpose": "dataset", "sources": {"peerA": 2048}, "refused": {}})
    assert "fetched the run's data set: 2.0 KiB from lab1" in screen.told[1]


def test_what_strangers_cause_is_told_once_a_minute_with_its_number() -> None:
    screen = Screen(terminal=False)
    for _ in range(100):
        screen.console.event("rejected", {"kind": "malformed", "peer": "peerB", "detail": "no CBOR"})
    screen.console.event("rejected", {"kind": "oversized", "peer": "peerB", "detail": ""})
    assert len(screen.told) == 2
    screen.now += 61
    screen.console.event("rejected", {"kind": "malformed", "peer": "peerB", "detail": "no CBOR"})
    assert json.loads(screen.told[-1])["repeated"] == 99
    assert json.loads(screen.told[-1])["level"] == "warning"


def test_a_person_is_told_how_many_were_kept_quiet() -> None:
    screen = Screen(terminal=True)
    for _ in range(4):
        screen.console.event("rejected", {"kind": "malformed", "peer": "peerB", "detail": "no CBOR"})
    screen.now += 61
    screen.console.event("rejected", {"kind": "malformed", "peer": "peerB", "detail": "no CBOR"})
    assert [line[9:] for line in screen.told] == [
        "refused what lab2 sent: malformed no CBOR",
        "refused what lab2 sent: malformed no CBOR (and 3 more like it before)",
    ]


def test_many_strangers_do_not_fill_memory_or_screen() -> None:
    screen = Screen(terminal=False)
    for at in range(5000):
        screen.console.event("rejected", {"kind": "malformed", "peer": f"stranger{at}"})
    assert len(screen.told) <= MAX_REPEATED + 1
    assert len(screen.console._repetitions._told) <= MAX_REPEATED + 1


def test_names_and_reasons_cannot_steer_the_terminal() -> None:
    screen = Screen(terminal=True)
    screen.console.event("admitted", {"peer": "x", "name": "evil\x1b[2J\nround 99"})
    screen.console.trainer_output("progress\r\x1b[31m 50%\n")
    screen.console.warn("odd\x07")
    assert len(screen.told) == 3
    assert not any("\x1b" in line or "\n" in line or "\r" in line or "\x07" in line for line in screen.told)


def test_the_workloads_output_and_warnings_are_shown() -> None:
    screen = Screen(terminal=True)
    screen.console.trainer_output("epoch 1\n")
    screen.console.warn("this machine's source differs")
    assert [line[9:] for line in screen.told] == [
        "trainer: epoch 1",
        "warning: this machine's source differs",
    ]
    screen = Screen(terminal=False)
    screen.console.trainer_output("epoch 1\n")
    assert json.loads(screen.told[0]) | {"time": ""} == {
        "time": "",
        "level": "info",
        "event": "trainer",
        "text": "epoch 1",
    }


def test_a_program_gets_a_traceback_as_one_error() -> None:
    lines = [
        "Traceback (most recent call last):",
        '  File "w.py", line 3, in loss',
        "    1 / 0",
        "ZeroDivisionError: x",
    ]
    screen, terminal = Screen(terminal=False), Screen(terminal=True)
    for line in ["before", *lines, "after"]:
        screen.console.trainer_output(f"{line}\n")
        terminal.console.trainer_output(f"{line}\n")
    told = [json.loads(line) for line in screen.told]
    assert [(line["level"], line["event"], line["text"]) for line in told] == [
        ("info", "trainer", "before"),
        ("error", "trainer", "\n".join(lines)),
        ("info", "trainer", "after"),
    ]
    assert len(terminal.told) == 6


def test_libraries_are_heard_when_it_matters_and_only_once() -> None:
    logging.getLogger().handlers.clear()  # pytest's own raises for a broken message
    Screen(terminal=True)
    screen = Screen(terminal=True)  # a second console takes the first one's place
    logging.getLogger("some.library").warning("disk %s", "odd")
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("libp2p.network").warning("a dial failed")
    logging.getLogger("some.library").error("broken %d", "format")
    assert [line[9:] for line in screen.told] == [
        "some.library: disk odd",
        "some.library: broken %d",
    ]


def test_every_event_with_words_has_them_for_empty_and_for_odd_fields() -> None:
    keys = [
        "peer",
        "by",
        "reason",
        "sources",
        "refused",
        "voters",
        "missing",
        "measures",
        "loss",
        "seconds",
        "late_ns",
        "purpose",
    ]
    odd: dict[str, Any] = dict.fromkeys(keys)
    for event in WORDS:
        for fields in ({}, odd, COMMIT):
            words = in_words(event, fields, name_of)
            assert words is None or (words and words.isprintable()), event
    assert in_words("phase", {}, name_of) is None


def test_warnings_are_events_that_have_words() -> None:
    assert set(WORDS) >= WARNINGS


def test_every_event_that_is_emitted_is_documented() -> None:
    rows = re.findall(
        r"^\| (`[a-z-]+`(?:, `[a-z-]+`)*) \|", (ROOT / "docs/commands.md").read_text(), re.MULTILINE
    )
    documented = set(re.findall(r"[a-z-]+", " ".join(rows)))
    missing = {event: place for event, place in emitted().items() if event not in documented}
    assert not missing
    assert len(emitted()) > 25


def test_words_are_for_events_that_are_emitted() -> None:
    assert set(WORDS) <= set(emitted())


def emitted() -> dict[str, str]:
    """The names of all events in the sources: the first argument of every emit, event or write of one."""
    found = {"events-dropped": "node/reporting/events.py"}
    for path in sorted([*ROOT.glob("p2pcoord/**/*.py"), *ROOT.glob("node/**/*.py")]):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and call.args:
                called = getattr(call.func, "attr", None) or getattr(call.func, "id", None)
                if called in ("emit", "_event", "event"):
                    for constant in ast.walk(call.args[0]):
                        if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                            found[constant.value] = str(path.relative_to(ROOT))
    return found


def test_figures_for_people() -> None:
    assert [number(value) for value in (1.23456, -0.0, 3, None, "x")] == ["1.235", "0", "3", "-", "-"]
    assert [size(count) for count in (5, 2048, 5 << 20, 3 << 30)] == ["5 B", "2.0 KiB", "5.0 MiB", "3.0 GiB"]
    assert printable("a\tb\x00ü") == "a b?ü"
