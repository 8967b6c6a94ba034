"""What a running node writes to its screen: the story that the events file tells, in words, through structlog.

    on a terminal       12:03:04 round 12  loss 1.234  bits_per_byte 2.51  contributors lab1 lab2  3.2 s  coordinator lab2
                        12:03:09 lab2 is gone
    not on a terminal   {"time": "2026-01-01T12:03:04.000Z", "level": "info", "event": "commit", "version": 12, ...}

So a file or a log collector gets what a program can read, with peer ids in full, and a person gets words and names. The lines
that a node says of itself (its introduction, its result) are plain text in both: they are for whoever started it.

Events without words (`event_words`) are not shown. What strangers can cause (rejected messages) is shown once, and then
summed up once a minute. A screen that is gone (a closed pipe) never stops the node.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
import structlog
import trio

from node.reporting.event_words import WORDS, NameOf, in_words, printable, short_name
from node.reporting.events import plain
from node.reporting.repetitions import Repetitions

SETTLED_S: Final = 2.0
"""History comes in parts, well under a second apart: after this long without another one, it was the last."""

TRACEBACK: Final = "Traceback (most recent call last):"
"""Python's first line of one; those that follow are indented, up to the last."""

MAX_TRACEBACK_LINES: Final = 100
"""Python itself sums up what recurs."""

MAX_OUTPUT_CHARACTERS: Final = 2000
"""Of one line that the workload prints."""

WARNINGS: Final = frozenset(
    [
        "assignment-failed",
        "attempt-refused",
        "equivocation",
        "evidence",
        "excluded",
        "export-failed",
        "failed",
        "fetch-failed",
        "join-refused",
        "late-tick",
        "lost",
        "quorum-lost",
        "rejected",
        "sole-voter",
        "state-differs",
        "step-failed",
        "trainer-died",
        "training-failed",
        "unreachable",
        "validation-failed",
        "versions-differ",
    ]
)
"""Events that a person may have to do something about."""

OCCASIONAL: Final = frozenset({"rejected", "fetch-failed", "unreachable", "versions-differ"})
"""Events that others can cause as often as they like."""

Tell = Callable[[str], object]


class Console:
    """The screen of one node. `tell` prints a line; `names()` gives what peers are called now.

    `terminal`: words for people, else JSON; by default what standard output is.
    """

    def __init__(
        self,
        tell: Tell,
        names: Callable[[], NameOf] = lambda: short_name,
        *,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.terminal = sys.stdout.isatty() if terminal is None else terminal
        self._tell = tell
        self._names = names
        self._repetitions = Repetitions(clock)
        self._clock = clock
        self._traceback: list[str] = []
        self._caught_up: tuple[Mapping[str, Any], float] | None = None
        """The newest of these, and when it came: only the last one of several in a row is told."""
        self._log = structlog.wrap_logger(
            _Lines(tell),
            processors=[_stamp, _for_people if self.terminal else _as_json],
            wrapper_class=structlog.BoundLogger,
            cache_logger_on_first_use=False,
        )
        quiet_libraries(self._log)

    def event(self, event: str, fields: Mapping[str, Any]) -> None:
        """Shows an event, if it has words."""
        if event == "caught-up":
            rounds = self._caught_up[0].get("rounds", 0) if self._caught_up else 0
            self._caught_up = {**fields, "rounds": fields.get("rounds", 0) + rounds}, self._clock()
            return
        if event == "commit" and not fields.get("late"):
            self.settle(0.0)
        self._show(event, fields)

    def settle(self, after_s: float = SETTLED_S) -> None:
        """Tells how far this node has caught up, once nothing more has come for this long."""
        if self._caught_up is not None and self._clock() - self._caught_up[1] >= after_s:
            (fields, _), self._caught_up = self._caught_up, None
            self._show("caught-up", fields)

    async def keep_settling(self) -> None:
        while True:
            await trio.sleep(SETTLED_S / 2)
            self.settle()

    def _show(self, event: str, fields: Mapping[str, Any]) -> None:
        words = in_words(event, fields, self._names()) if event in WORDS else None
        if words is None:
            return
        repeated = self._repetitions.quiet_before(event, fields) if event in OCCASIONAL else 0
        if repeated is None:
            return
        told = dict(fields) | ({"repeated": repeated} if repeated else {})
        words += f" (and {repeated} more like it before)" if repeated else ""
        write = self._log.warning if event in WARNINGS else self._log.info
        write(event, words=words, fields=told)

    def warn(self, text: str) -> None:
        """A warning that the person at the keyboard must see."""
        self._log.warning("warning", words=f"warning: {text}", fields={"text": text})

    def trainer_output(self, line: str) -> None:
        """A line that the workload's code printed. A program gets a traceback whole, as one error."""
        text = line.rstrip()[:MAX_OUTPUT_CHARACTERS]
        if not self.terminal and (self._traceback or text == TRACEBACK):
            self._traceback.append(text)
            if text.startswith((" ", TRACEBACK)) and len(self._traceback) < MAX_TRACEBACK_LINES:
                return  # up to the line that names the exception
            text, self._traceback = "\n".join(self._traceback), []
            self._log.error("trainer", words=text, fields={"text": text})
            return
        self._log.info("trainer", words=f"trainer: {text}", fields={"text": text})


class _Lines:
    """A logger for structlog that hands each rendered line to `tell`."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    def msg(self, line: str) -> None:
        self._tell(line)

    info = warning = error = msg


def _stamp(_: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["at"] = datetime.now(UTC)
    event["level"] = method
    return event


def _for_people(_: Any, __: str, event: MutableMapping[str, Any]) -> str:
    return f"{event['at'].astimezone():%H:%M:%S} {printable(event['words'])}"


def _as_json(_: Any, __: str, event: MutableMapping[str, Any]) -> str:
    moment = event["at"].isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line = {"time": moment, "level": event["level"], "event": event["event"]}
    line |= {name: plain(value) for name, value in event["fields"].items() if name not in line}
    return msgspec.json.encode(line).decode()


# Other people's logs -------------------------------------------------------------------------------------------------


class _ToConsole(logging.Handler):
    """Hands what libraries log to the console."""

    def __init__(self, log: Any) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()[:MAX_OUTPUT_CHARACTERS]
        except Exception:  # a library that formats its own message wrongly
            text = str(record.msg)[:MAX_OUTPUT_CHARACTERS]
        self._log.warning(
            "library", words=f"{record.name}: {text}", fields={"logger": record.name, "text": text}
        )


def quiet_libraries(log: Any) -> None:
    """Errors of libraries go to the console, their chatter nowhere.

    libp2p's logger passes nothing on and has no handler, so Python would print its warnings: of every dial that fails, of every
    stream that a peer resets. What matters of that is an event of ours. LIBP2P_DEBUG, its own switch, is left alone.
    """
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, _ToConsole)]:
        root.removeHandler(old)
    root.addHandler(_ToConsole(log))
    root.setLevel(logging.WARNING)
    chatty = ("multiaddr", "async_service", "asyncio") + (
        () if os.environ.get("LIBP2P_DEBUG") else ("libp2p",)
    )
    for name in chatty:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.captureWarnings(capture=True)
