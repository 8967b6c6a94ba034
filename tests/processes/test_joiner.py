"""A node joins a run of which it knows one address, and the peer there dies at once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.processes.network import HERE, LARGE, Network, at, run_file

LYING = (sys.executable, "-P", str(HERE / "lying_node.py"), "node")


@pytest.mark.slow
def test_a_joiner_outlives_the_one_peer_it_knew_and_takes_the_state_from_several(tmp_path: Path) -> None:
    with Network(tmp_path, run_file(parameters=LARGE, pause_s=0.3, members=3)) as network:
        network.found(4, commands={3: LYING})
        _, known, liar, _ = network.nodes
        network.wait(
            lambda: any(len(event["contributors"]) == 4 for event in network.commits().values()),
            "all four contribute",
            120.0,
        )
        assert known is not network.coordinator()
        status = known.status()
        assert status is not None
        (joiner,) = network.add()
        secret = network.join_flags[network.join_flags.index("--secret") + 1]
        joiner.start("--bootstrap", status["addresses"][0], "--secret", secret, workload=network.workload)

        def knows_others() -> bool:
            members = (joiner.status() or {}).get("members", [])
            return sum(bool(member["addresses"]) for member in members) >= 3

        network.wait(knows_others, "the joiner has heard of others", 90.0)
        killed = known.kill()
        network.learn_id(joiner)
        commit = network.wait_contribution(joiner, killed, 90.0)
        network.check()

        states = [
            event
            for event in joiner.events()
            if event["event"] in ("fetched", "fetch-failed") and event["purpose"] == "state"
        ]
        for event in states:
            sources = {network.node_of(peer).name: size for peer, size in event["sources"].items()}
            refused = {network.node_of(peer).name: why for peer, why in event["refused"].items()}
            print(f"{event['event']} state of version {event['version']}: from {sources}, refused {refused}")
        assert any(len(event["sources"]) >= 2 for event in states if event["event"] == "fetched")
        assert any(liar.peer_id in event["refused"] for event in states)
        rejected = (joiner.status() or {})["rejected"]
        assert rejected["by_peer"].get(liar.peer_id, 0) >= 1

        (admitted, *_) = [e for e in network.nodes[0].events("admitted") if e["peer"] == joiner.peer_id]
        before = max(v for v, event in network.commits().items() if at(event) <= at(admitted))
        print(f"admitted at version {before}, its first contribution is in version {commit['version']}")
        assert commit["version"] <= before + 2
