"""Seven real nodes in a tree of fan-out 2: an interior member that dies while sums flow is left out by a new attempt."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.processes.deaths import MAX_MISSES, come_back, wait_phase, was_within
from tests.processes.network import LARGE, Network, Node, at, run_file

FAN_OUT = 2


def interior(network: Network, coordinator: Node) -> Node:
    """A member of the tree's middle level. The tree is built over the contributors in the order of their assignments, each
    member's children being those at fan_out * i + 1 and the next: so the second and third have two children each."""
    newest = network.commits()[max(network.commits())]
    candidates = [network.node_of(peer) for peer in newest["contributors"][1:3]]
    return next(node for node in candidates if node is not coordinator)


@pytest.mark.slow
def test_an_interior_member_killed_in_aggregation_is_left_out_by_a_new_attempt(tmp_path: Path) -> None:
    with Network(tmp_path, run_file(parameters=LARGE, members=6, fan_out=FAN_OUT)) as network:
        network.found(7)
        network.wait(
            lambda: any(len(event["contributors"]) == 7 for event in network.commits().values()),
            "all seven contribute",
            120.0,
        )
        for _ in range(MAX_MISSES):
            coordinator = network.coordinator()
            victim = interior(network, coordinator)
            phase = wait_phase(network, coordinator, "aggregation")
            time.sleep(0.05)
            killed = victim.kill()
            commit = network.next_commit(killed)
            later = [
                event
                for event in coordinator.events("phase")
                if event["version"] == phase["version"]
                and event["phase"] == "aggregation"
                and at(event) > killed
            ]
            if was_within(coordinator, phase, killed) and later:
                break
            come_back(network, victim)
        else:
            raise AssertionError("no interior member was met before it had passed its sum up")
        print(f"{at(commit) - killed:.2f} s from the interior member's death to the certificate")
        assert later[-1]["attempt"] > phase["attempt"]
        assert victim.peer_id not in commit["contributors"]
        assert len(commit["contributors"]) == 6
        network.check()
