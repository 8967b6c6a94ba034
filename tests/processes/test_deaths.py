"""Real nodes die, freeze and come back: the others go on, and every commit holds exactly who is in it."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random

import pytest

from tests.processes.deaths import come_back, freeze, kill_in_transfer, other_than
from tests.processes.network import LARGE, Network, at, run_file


@pytest.mark.slow
def test_a_member_killed_in_mid_transfer_is_left_out_and_comes_back(tmp_path: Path) -> None:
    with Network(tmp_path, run_file(parameters=LARGE, members=3)) as network:
        network.found(4)
        network.wait_version(2)
        victim = other_than(network, network.coordinator())
        seconds, commit = kill_in_transfer(network, victim, Random(1))
        print(f"{seconds:.2f} s from the kill in mid-transfer to the next certificate")
        assert len(commit["contributors"]) >= 3
        network.next_commit(at(commit))
        come_back(network, victim)
        network.check()


@pytest.mark.slow
def test_a_frozen_member_is_left_out_and_contributes_again(tmp_path: Path) -> None:
    with Network(tmp_path, run_file(members=3)) as network:
        network.found(4)
        network.wait_version(2)
        victim = other_than(network, network.coordinator())
        seconds, _ = freeze(network, victim, 20.0)
        print(f"{seconds:.2f} s from the freeze to the next certificate")
        network.check()


@pytest.mark.slow
def test_a_frozen_coordinator_wakes_up_deposed_and_contributes_again(tmp_path: Path) -> None:
    with Network(tmp_path, run_file(members=3)) as network:
        network.found(4)
        network.wait_version(2)
        victim = network.coordinator()
        term = network.commits()[2]["term"]
        seconds, _ = freeze(network, victim, 10.0)
        print(f"{seconds:.2f} s from the coordinator's freeze to the next certificate")
        assert network.commits()[max(network.commits())]["term"] > term
        network.check()


@pytest.mark.slow
def test_a_trainer_killed_alone_costs_neither_its_node_nor_the_duty(tmp_path: Path) -> None:
    with Network(tmp_path, run_file(members=3)) as network:
        network.found(4)
        network.wait_version(2)
        victim = other_than(network, network.coordinator())
        for trainer in victim.trainers():
            trainer.kill()
        killed = time.time()
        network.wait(lambda: victim.events("trainer-died"), "the node notices")
        network.wait_contribution(victim, killed + 1.0)
        terms = {event["term"] for event in network.commits().values()}
        assert terms == {1}
        assert all(node.runs for node in network.nodes)
        network.check()


@pytest.mark.slow
def test_all_killed_at_once_go_on_from_the_last_certified_version(tmp_path: Path) -> None:
    with Network(tmp_path, run_file(members=3)) as network:
        network.found(4)
        network.wait_version(5)
        for node in network.nodes:
            node.kill()
        before = max(network.commits())
        restarted = time.time()
        for node in network.nodes:
            network.restart(node)
        commit = network.next_commit(restarted, 90.0)
        assert commit["version"] == before + 1
        for node in network.nodes:
            network.wait_contribution(node, restarted, 90.0)
        network.check()


@pytest.mark.slow
def test_the_sole_voter_of_two_leaves_and_the_other_goes_on(tmp_path: Path) -> None:
    with Network(tmp_path, run_file()) as network:
        network.found(2)
        network.wait(
            lambda: any(len(event["contributors"]) == 2 for event in network.commits().values()),
            "both contribute",
        )
        founder, other = network.nodes
        status = other.status()
        assert status is not None
        assert status["quorum"]["voters"] == 1
        left = time.time()
        assert founder.terminate() == 0
        print(f"the founder left in {time.time() - left:.2f} s")
        commit = network.next_commit(time.time())
        assert commit["contributors"] == [other.peer_id]
        assert commit["coordinator"] == other.peer_id
        network.check()


@pytest.mark.slow
def test_a_member_whose_workload_fails_leaves_and_the_others_go_on(tmp_path: Path) -> None:
    with Network(tmp_path, run_file(members=3)) as network:
        network.found(3)
        network.wait_version(2)
        [victim] = network.add()
        victim.index = 10**6  # no parameter of its own
        network.join(victim)
        assert victim.process is not None
        assert victim.process.wait(60.0) == 1
        ended = time.time()
        assert victim.events("left"), "the others were told"
        assert "IndexError" in victim.output.read_text().splitlines()[-1]
        assert len(network.next_commit(ended)["contributors"]) == 3
        network.check()
