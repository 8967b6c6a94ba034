"""What happens to five nodes when their network is cut 3|2, and to four when one of them is cut off in mid-transfer."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from tests.namespaces.hosts import network
from tests.namespaces.running_node import Document, RunningNode, at, human_status, running, verified
from tests.namespaces.runs import found_and_join, run_file, until_all, voters

GROW_S = 90.0
HEAL_S = 60.0
AGREE_S = 30.0

# What a node may still write about the time before it knew of the cut: what was in flight and on its disk.
NOTICED_S = 5.0


class Cut(msgspec.Struct):
    """What was seen of a cut. Times in seconds."""

    grown_s: float = 0.0
    """From the first process' start to five voters on everybody's status."""
    going_on_s: float = 0.0
    """From the cut to the majority's next certificate."""
    told_s: float = 0.0
    """From the cut until both of the minority say that they hold no quorum."""
    coordinator_cut_off: bool = False
    majority_commits: int = 0
    minority_commits: list[int] = []
    """Versions that the minority saw certified during the cut, without its first moments."""
    human: list[str] = []
    """The quorum's line of the minority's status for people."""
    events: list[list[str]] = []
    """What each of the minority told of its quorum, from the cut to the end."""
    healed_s: float = 0.0
    """From healing until all five are in one commit again."""
    lineages: list[str] = []
    """At one height, of each node."""
    verified: list[tuple[int, str]] = []


def cut_three_two(folder: Path, cut_s: float, *, coordinator_with_two: bool) -> Cut:
    """Five voters, a cut of `cut_s` seconds, and how it heals. The coordinator is on the smaller side, or is not."""
    seen = Cut(coordinator_cut_off=coordinator_with_two)
    with network(5) as net, running() as nodes:
        began = time.time()
        config = run_file(folder / "run.toml", members=3, committee=5, pause_s=0.25)
        found_and_join(nodes, net.hosts, folder, "Small", config)
        documents = until_all(
            nodes, "five voters", lambda d: len(voters(d)) == 5 and d["quorum"]["held"], GROW_S
        )
        seen.grown_s = time.time() - began
        _until_committee_is_settled(nodes[0])
        _until_all_contribute(nodes, 30.0, since=time.time())
        coordinator = nodes[0].status()["coordinator"]  # type: ignore[index]
        leading = next(n for n, d in zip(nodes, documents, strict=True) if d["peer_id"] == coordinator)
        others = [node for node in nodes if node is not leading]
        small = [leading, others[0]] if coordinator_with_two else others[:2]
        large = [node for node in nodes if node not in small]
        hosts = dict(zip((node.name for node in nodes), net.hosts, strict=True))
        net.split([hosts[node.name] for node in large], [hosts[node.name] for node in small])
        cut_at = time.time()
        _watch_cut(seen, large, small, cut_at, cut_s)
        seen.majority_commits = len(large[0].commits(cut_at))
        seen.minority_commits = [
            event["version"] for node in small for event in node.commits(cut_at + NOTICED_S)
        ]
        net.heal()
        healed_at = time.time()
        seen.healed_s = _until_all_contribute(nodes, HEAL_S, since=healed_at) - healed_at
        seen.lineages = _lineages(nodes)
        seen.events = [
            [event["event"] for event in node.events("quorum-lost", "quorum-regained") if at(event) > cut_at]
            for node in small
        ]
        seen.verified = [verified(node.directory) for node in nodes]
    return seen


def _until_committee_is_settled(founder: RunningNode) -> None:
    """Until the joint committee has ended: while it lasts, a majority of the old voters is needed too, and three of five who
    hold one of three old voters rightly commit nothing. Each change is one event here and two certified records."""
    give_up = time.monotonic() + AGREE_S
    while time.monotonic() < give_up:
        certified = [event for event in founder.events("certified") if event["kind"] == "committee"]
        if len(certified) == 2 * len(founder.events("committee")) > 0:
            return
        time.sleep(0.1)
    raise AssertionError("the committee does not settle")


def _watch_cut(
    seen: Cut, large: list[RunningNode], small: list[RunningNode], cut_at: float, cut_s: float
) -> None:
    while time.time() < cut_at + cut_s:
        if not seen.told_s:
            documents = [node.status() for node in small]
            if all(d is not None and _lost(d["quorum"]) for d in documents):
                seen.told_s = time.time() - cut_at
                seen.human = [
                    next(line for line in human_status(node.directory).splitlines() if "waiting for" in line)
                    for node in small
                ]
        if not seen.going_on_s:
            # What was certified in the moment of the cut is no sign of going on: the round after it is.
            later = [event for event in large[0].commits(cut_at) if len(event["contributors"]) == len(large)]
            if later:
                seen.going_on_s = at(later[0]) - cut_at
        time.sleep(0.2)


def _lost(quorum: Document) -> bool:
    return not quorum["held"] and quorum["reachable"] < quorum["needed"]


def _until_all_contribute(nodes: list[RunningNode], timeout_s: float, since: float = 0.0) -> float:
    """When every node had seen a commit with all of them in it."""
    give_up = time.monotonic() + timeout_s
    while time.monotonic() < give_up:
        firsts = [
            next((at(e) for e in node.commits(since) if len(e["contributors"]) == len(nodes)), None)
            for node in nodes
        ]
        if None not in firsts:
            return max(moment for moment in firsts if moment is not None)
        time.sleep(0.2)
    told = "\n".join(
        f"{n.name}: {[(e['version'], len(e['contributors'])) for e in n.commits(since)]} {n.status()}"
        for n in nodes
    )
    raise AssertionError(f"not all {len(nodes)} contribute after {timeout_s:g} s\n{told}")


def _lineages(nodes: list[RunningNode]) -> list[str]:
    """The hash of the newest certified record of each node at a height that all have reached: asked until two agree."""
    known: dict[int, dict[str, str]] = {}
    give_up = time.monotonic() + AGREE_S
    while time.monotonic() < give_up:
        for node in nodes:
            document = node.status()
            if document is not None:
                at_height = known.setdefault(document["height"], {})
                at_height[node.name] = document["lineage"]
                if len(at_height) == len(nodes):
                    return list(at_height.values())
    raise AssertionError(f"no height at which all {len(nodes)} were seen")


class Dropped(msgspec.Struct):
    """One member cut off while bytes move. Times in seconds."""

    phase: str = ""
    """Of the round, as the coordinator said it, when the member's packets began to be dropped."""
    certificate_s: float = 0.0
    """From then to the next certificate."""
    without: int = 0
    """Contributors of that certificate."""
    named: bool = False
    """Whether that certificate's contributors hold the member that was cut off."""
    losses: list[str] = []
    """Whom the coordinators left out of it, and why."""
    back_s: float = 0.0
    """From healing to a certificate with all of them."""
    untrue: list[str] = []
    """Commits of this run that two nodes tell differently, or that name somebody who did not train for them."""


def drop_in_transfer(folder: Path, times: int, *, hold_s: float = 20.0) -> list[Dropped]:
    """Four nodes with updates of 10 MB; one that does not coordinate is cut off during aggregation, `times` times."""
    found = []
    with network(4) as net, running() as nodes:
        config = run_file(folder / "run.toml", members=3, committee=3, pause_s=0.25)
        for host in net.hosts:
            host.limit(200)  # 10 MB take 0.4 s: long enough to be cut in the middle
        found_and_join(nodes, net.hosts, folder, "Wide", config)
        until_all(nodes, "four members", lambda d: len(d["members"]) == 4, GROW_S)
        _until_all_contribute(nodes, 60.0)
        hosts = dict(zip((node.name for node in nodes), net.hosts, strict=True))
        for turn in range(times):
            leading = _leading(nodes)
            others = [node for node in nodes if node is not leading]
            victim = others[turn % len(others)]
            seen = Dropped(phase=_until_aggregation(leading))
            net.isolate(hosts[victim.name])
            cut_at = time.time()
            witnesses = [node for node in nodes if node is not victim]
            first = _next_commit(witnesses, cut_at, 90.0)
            seen.certificate_s = at(first) - cut_at
            seen.without = len(first["contributors"])
            seen.named = victim.peer_id in first["contributors"]
            seen.losses = _losses(witnesses, cut_at, at(first))
            time.sleep(max(0.0, min(hold_s, cut_at + hold_s - time.time())))
            net.heal()
            healed_at = time.time()
            seen.back_s = _until_all_contribute(nodes, HEAL_S, since=healed_at) - healed_at
            seen.untrue = _untrue(nodes)
            found.append(seen)
    return found


def _losses(nodes: list[RunningNode], since: float, until: float) -> list[str]:
    """Members that a coordinator left out between two moments, with its reasons; by name."""
    names = {node.peer_id: node.name for node in nodes}
    return [
        f"{names.get(event['peer'], 'the cut-off one')}: {event.get('reason', kind)}"
        for node in nodes
        for kind in ("lost", "left-out")
        for event in node.events(kind)
        if since <= at(event) <= until
    ]


def _untrue(nodes: list[RunningNode]) -> list[str]:
    """Commits whose contributors are not who is in them, by the events of the contributors themselves."""
    trained = {node.peer_id: {event["version"] for event in node.events("trained")} for node in nodes}
    told: dict[int, list[str]] = {}
    wrong = []
    for node in nodes:
        for commit in node.commits():
            version, contributors = commit["version"], commit["contributors"]
            if told.setdefault(version, contributors) != contributors:
                wrong.append(f"{node.name}: version {version} by {contributors}, elsewhere {told[version]}")
            wrong += [
                f"{node.name}: version {version} names {peer}, which did not train for it"
                for peer in contributors
                if version not in trained[peer]
            ]
    return wrong


def _leading(nodes: list[RunningNode]) -> RunningNode:
    documents = [node.status() for node in nodes]
    for node, document in zip(nodes, documents, strict=True):
        if document is not None and document["role"] == "coordinator":
            return node
    raise AssertionError(f"nobody coordinates: {documents}")


def _until_aggregation(leading: RunningNode) -> str:
    """Waits for the newest event of a coordinator to be the phase in which updates move."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        phases = leading.events("phase")
        if phases and phases[-1]["phase"] == "aggregation" and time.time() - at(phases[-1]) < 0.2:
            return str(phases[-1]["phase"])
        time.sleep(0.01)
    raise AssertionError("no aggregation was seen")


def _next_commit(nodes: list[RunningNode], since: float, timeout_s: float) -> Document:
    give_up = time.monotonic() + timeout_s
    while time.monotonic() < give_up:
        firsts = [node.commits(since)[:1] for node in nodes]
        seen = [commit[0] for commit in firsts if commit]
        if seen:
            return min(seen, key=at)
        time.sleep(0.05)
    raise AssertionError(f"no certificate within {timeout_s:g} s")
