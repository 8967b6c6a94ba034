"""A machine that nobody can dial: it is told so, takes part over its own connections, and never votes."""

import time
from pathlib import Path

import pytest

from tests.namespaces.hosts import missing, network
from tests.namespaces.running_node import START_S, RunningNode, join_flags, running
from tests.namespaces.runs import PORT, WORKLOADS, run_file, until_all, voters

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

TOLD = f"others cannot reach this machine on TCP {PORT}: open the port"


def test_a_member_that_nobody_can_dial_is_told_so_and_contributes_as_a_leaf_without_a_vote(
    tmp_path: Path,
) -> None:
    with network(4) as net, running() as nodes:
        net.hosts[1].refuse_inbound(PORT)  # the first to join: it would be the first to become a voter
        config = run_file(tmp_path / "run.toml", members=2, committee=3, pause_s=0.1)
        flags = ("--workload", f"{WORKLOADS}:Small", "--device", "cpu")
        began = time.time()
        for number, host in enumerate(net.hosts):
            node = RunningNode(tmp_path / f"lab{number}", prefix=host.prefix)
            nodes.append(node)
            if number == 0:
                node.start(*flags, "--config", str(config))
                line = join_flags(node.until("founded", lambda d: d.get("join_line"), START_S))
                continue
            node.start(*flags, *line)
            if number == 1:
                node.until(
                    "a member", lambda d: any(m["peer_id"] == d["peer_id"] for m in d["members"]), START_S
                )
        leaf = nodes[1]
        documents = until_all(nodes, "three voters", lambda d: len(voters(d)) == 3, 60.0)
        me = documents[1]["peer_id"]
        leaf.until("a leaf", lambda d: d["role"] == "leaf", 30.0)
        leaf.until("in reach of the voters", lambda d: d["quorum"]["held"], 30.0)
        for node in nodes:
            document = node.until(
                "shows the leaf",
                lambda d: {m["peer_id"]: m["role"] for m in d["members"]}.get(me) == "leaf",
                30.0,
            )
            assert me not in voters(document)
        assert TOLD in leaf.printed()
        assert all(TOLD not in node.printed() for node in nodes if node is not leaf)
        since = time.time()
        goal = documents[0]["version"] + 10
        nodes[0].until("ten more rounds", lambda d: d["version"] >= goal, 60.0)
        commits = nodes[0].commits(since)
        print(
            f"leaf known after {since - began:.1f} s; in {sum(me in c['contributors'] for c in commits)} of "
            f"{len(commits)} commits since"
        )
        assert sum(me in commit["contributors"] for commit in commits) >= len(commits) - 1
        assert me not in {c["coordinator"] for c in nodes[0].commits()}
        changes = [event for node in nodes for event in node.events("committee")]
        assert changes
        assert all(me not in event["voters"] for event in changes)
        assert all(node.events("quorum-lost") == [] for node in nodes)
        assert all(node.runs for node in nodes)
