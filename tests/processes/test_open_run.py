"""A run that anyone may join, from its founding to its end, and a finished directory that serves its result again."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.processes.network import CENSUS, START_S, Network, Node, run_file

ROUNDS = 3


def ended(node: Node) -> bool:
    return not node.runs


@pytest.mark.slow
def test_an_open_run_is_joined_without_a_secret_and_serves_its_result_again(tmp_path: Path) -> None:
    text = run_file(members=2).replace("aggregation_rounds = 1000000", f"aggregation_rounds = {ROUNDS}")
    with Network(tmp_path, text) as network:
        founder, joiner = network.add(2)
        founder.start("--config", str(tmp_path / "run.toml"), "--open", workload=CENSUS)
        line = network.wait(
            lambda: (founder.status() or {}).get("join_line"), "the founder can be joined", START_S
        )
        words = line.split()
        joiner.start("--bootstrap", words[words.index("--bootstrap") + 1], workload=CENSUS)
        for node in (founder, joiner):
            network.wait(partial(ended, node), f"{node.name} ends after the last round", START_S)
            assert node.process is not None
            assert node.process.returncode == 0
            assert node.model()[0] == ROUNDS

        founder.start(workload=CENSUS)
        network.wait(
            lambda: "serving the result for 60 s" in founder.output.read_text(), "it serves again", START_S
        )
        status = founder.status()
        assert status is not None
        assert status["version"] == ROUNDS
        assert founder.terminate() == 0
