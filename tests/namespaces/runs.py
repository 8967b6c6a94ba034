"""Runs on several hosts: a founder, the others joined by its line, and what all of them say."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from tests.namespaces.hosts import Host
from tests.namespaces.running_node import START_S, Document, RunningNode, join_flags

WORKLOADS: Final = Path(__file__).with_name("workloads.py")
PORT: Final = 4001


def run_file(path: Path, *, members: int, committee: int, pause_s: float, **more: str) -> Path:
    """A run that does not end by itself, with local steps of `pause_s` seconds. `more`: lines for other sections."""
    sections = {
        "strategy": "local_steps = 2\naggregation_rounds = 100000",
        "participation": f"minimum_members = {members}",
        "coordination": f"committee_size = {committee}\nrotation_rounds = 0",
        "workload": f"pause_s = {pause_s}",
    }
    for name, lines in more.items():
        sections[name] = f"{sections.get(name, '')}\n{lines}"
    path.write_text("".join(f"[{name}]\n{lines.strip()}\n\n" for name, lines in sections.items()))
    return path


def found_and_join(
    nodes: list[RunningNode], hosts: Sequence[Host], folder: Path, workload: str, config: Path
) -> None:
    """Starts a node on each host; the first founds the run. `nodes` gets them at once, so that they are ended."""
    flags = ("--workload", f"{WORKLOADS}:{workload}", "--device", "cpu")
    for number, host in enumerate(hosts):
        node = RunningNode(folder / f"lab{number}", prefix=host.prefix)
        nodes.append(node)
        if number == 0:
            node.start(*flags, "--config", str(config))
            line = join_flags(node.until("founded", lambda d: d.get("join_line"), START_S))
        else:
            node.start(*flags, *line)


def until_all(
    nodes: Sequence[RunningNode], told: str, holds: Callable[[Document], object], timeout_s: float
) -> list[Document]:
    """Everybody's status, each once `holds` is true of it."""
    give_up = time.monotonic() + timeout_s
    return [node.until(told, holds, max(give_up - time.monotonic(), 1.0)) for node in nodes]


def voters(document: Document) -> list[str]:
    return [member["peer_id"] for member in document["members"] if member["role"] in ("voter", "coordinator")]
