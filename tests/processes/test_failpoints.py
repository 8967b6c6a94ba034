"""The coordinator is held by a failpoint and killed there, in every phase of a round and around every write to its log.

Whatever it had begun: the same round is certified under a higher term, or its record is covered by the new term's opening;
nobody trains an assignment twice, and no version goes back (`Network.check`).
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from p2pcoord.rounds.phases import Phase
from tests.processes.network import Network, Node, run_file

PHASES = [f"phase:{phase}" for phase in Phase]
WRITES = [
    f"persist-{when}:{kind}"
    for kind in ("standing", "appended", "certified", "slot", "checked", "owner")
    for when in ("before", "after")
]
"""Every kind of frame that a round writes; "owner" begins the log that takes the old one's place when it is compacted."""

COMPACTS_ALWAYS = {"P2PCOORD_COMPACT_AFTER_BYTES": "0"}
"""At every certificate: else the log may double several times before it does so while it has the duty."""


def hold(network: Network, node: Node, place: str, timeout_s: float = 90.0) -> dict[str, object]:
    """Waits until `node` is held at `place`; its status then."""

    def held() -> dict[str, object] | None:
        status = node.status()
        return status if status is not None and status["failpoint"] else None

    status: dict[str, object] = network.wait(held, f"{node.name} is held at {place}", timeout_s)
    assert status["failpoint"] == place
    return status


def kill_held(network: Network, node: Node, place: str) -> float:
    """Kills a held coordinator and waits for the round that it was making; gives the seconds until then."""
    status = hold(network, node, place)
    current, term = status["round"], status["term"]
    assert isinstance(current, dict) and isinstance(term, int)
    making = current["number"]
    killed = node.kill()
    commit = network.next_commit(killed, 60.0, version=making)
    following = network.next_commit(killed, 60.0, version=making + 1)
    # Certified under a higher term, or (its record was ordered already) covered by a higher term's opening.
    assert commit["version"] == making
    assert commit["term"] >= term
    # A voter, too, enters terms and compacts its log: then the coordinator is another, and goes on.
    assert following["term"] > term or status["role"] != "coordinator"
    seconds = max(network.commit_at(making) - killed, 0.0)
    print(f"{place}: round {making} certified {seconds:.2f} s after the kill, in term {commit['term']}")
    return seconds


def test_a_coordinator_killed_in_aggregation_is_succeeded_and_the_round_is_made(tmp_path: Path) -> None:
    place = "phase:aggregation"
    with Network(tmp_path, run_file(members=2, rotation_rounds=2)) as network:
        # Not the founder: that one may still be the only voter. To another the duty comes when there are three.
        network.found(3, environments={2: {"P2PCOORD_FAILPOINTS": f"{place}@2"}})
        node = network.nodes[1]
        kill_held(network, node, place)
        restarted = time.time()
        network.restart(node)
        network.wait_contribution(node, restarted)
        network.check()


@pytest.mark.slow
@pytest.mark.parametrize(
    "places",
    [PHASES[:4], PHASES[4:], WRITES[:4], WRITES[4:8], WRITES[8:10], WRITES[10:]],
    ids=lambda places: places[0].partition(":")[2],
)
def test_a_coordinator_killed_anywhere_is_succeeded_and_the_round_is_made(
    tmp_path: Path, places: list[str]
) -> None:
    """Each node that is killed comes back with the next failpoint, and is held when the duty has come round to it."""
    with Network(tmp_path, run_file(members=2, rotation_rounds=2)) as network:
        network.found(3, environments={2: {"P2PCOORD_FAILPOINTS": f"{places[0]}@3"} | COMPACTS_ALWAYS})
        node = network.nodes[1]
        for place, following in zip(places, [*places[1:], ""], strict=True):
            kill_held(network, node, place)
            restarted = time.time()
            newest = max(network.commits())
            environment = {"P2PCOORD_FAILPOINTS": f"{following}@{newest + 3}"} if following else {}
            network.restart(node, environment=environment | COMPACTS_ALWAYS)
            if not following:  # else the duty may be its own, and the node held, before it contributes
                network.wait_contribution(node, restarted, 90.0)
        network.check()
