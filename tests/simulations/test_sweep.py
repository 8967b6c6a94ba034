"""Whole runs: seeds with faults, scenario files, determinism, and what is reported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from p2pcoord.effects import Failed, Fetch, Step
from p2pcoord.errors import UserError
from simulations import scenarios as scenario_folder
from simulations.faults import FAMILIES, RARE_MESSAGES, RAREST_MESSAGES, Fault, draw_faults
from simulations.machine import Machine
from simulations.network import MILLISECOND
from simulations.scenario import Scenario, WorkName, draw_scenario, load_scenario
from simulations.sweep import parse_range, run_scenario, run_seed, simulate
from simulations.training import Training

SCENARIOS = sorted(Path(next(iter(scenario_folder.__path__))).glob("*.toml"))


@pytest.mark.parametrize("seed", range(1001, 1005))
@pytest.mark.parametrize("work", ["training", "steady"])
def test_five_peers_keep_every_invariant_under_all_faults(seed: int, work: WorkName) -> None:
    report = run_seed(seed, peers=5, faults="all", rounds=10, work=work)
    assert report.violations == ()
    assert report.committed_version >= 10


@pytest.mark.parametrize(("seed", "peers"), [(1, 7), (2, 9)])
def test_more_peers_keep_every_invariant_under_all_faults(seed: int, peers: int) -> None:
    report = run_seed(seed, peers=peers, faults="all", rounds=10)
    assert report.violations == ()
    assert report.committed_version >= 10


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_a_scenario_file_keeps_every_invariant(path: Path) -> None:
    report = run_scenario(1, load_scenario(path))
    assert report.violations == ()
    assert report.coverage.faults or path.stem == "calm"


def test_nothing_goes_wrong_when_nothing_goes_wrong() -> None:
    report = run_seed(1, peers=5, faults="none", rounds=20)
    assert report.violations == ()
    assert report.committed_version >= 20
    assert report.coverage.told["coordinator-silent"] == 0
    assert not report.coverage.crashes


def test_the_same_world_stands_on_real_ed25519_signatures() -> None:
    scenario = draw_scenario(5, 5, "all", 10)
    report = run_scenario(5, scenario, real=True)
    assert report.violations == ()
    assert report.committed_version >= 10


def test_a_member_that_never_comes_to_hold_the_state_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    step, fetch = Training._step, Training._fetch

    def broken(self: Training, machine: Machine, effect: Step | Fetch) -> None:
        if machine.name == "m2" and (isinstance(effect, Step) or effect.purpose == "state"):
            self._later(machine, effect.id, MILLISECOND, lambda: Failed("broken"))
        elif isinstance(effect, Step):
            step(self, machine, effect)
        else:
            fetch(self, machine, effect)

    monkeypatch.setattr(Training, "_step", broken)
    monkeypatch.setattr(Training, "_fetch", broken)
    report = run_seed(1, peers=5, faults="none", rounds=5)
    assert [text for text in report.violations if "m2 without the state" in text]


def test_only_faults_that_came_about_are_counted() -> None:
    # One of two is needed for a quorum: its disk is not lost.
    faults = (
        Fault(6.0, "disk-loss"),
        Fault(6.0, "crash-at-phase", phase="no-such-phase"),
        Fault(7.0, "freeze"),
    )
    report = run_scenario(1, Scenario(peers=2, faults=faults))
    assert report.coverage.faults == {"freeze": 1}
    assert report.violations == ()


def test_one_peer_alone_is_a_run() -> None:
    report = run_seed(1, peers=1, faults="none", rounds=10)
    assert report.violations == ()
    assert report.committed_version >= 10


def test_equal_seeds_give_equal_traces_and_others_give_others() -> None:
    first, again, other = (run_seed(seed, peers=4, faults="all", rounds=10) for seed in (7, 7, 8))
    assert (first.trace_sha256, first.events) == (again.trace_sha256, again.events)
    assert first.trace_sha256 != other.trace_sha256


def test_a_seed_gives_the_same_trace_in_another_process_whatever_pythons_hash_seed_is() -> None:
    lines = []
    for hash_seed in ("1", "2"):
        command = [
            sys.executable,
            "-m",
            "node.cli",
            "simulate",
            "--peers",
            "5",
            "--seed",
            "3",
            "--json",
        ]
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        lines.append(json.loads(done.stdout.splitlines()[-1]))
    assert lines[0]["trace_sha256"] == lines[1]["trace_sha256"]
    assert lines[0]["events"] == lines[1]["events"] > 1000
    assert lines[0]["violations"] == 0


def test_seeds_over_several_processes_give_the_same_summary_as_in_one() -> None:
    alone = simulate(peers=3, seeds=range(1, 4), processes=1)
    spread = simulate(peers=3, seeds=range(1, 4), processes=2)
    assert alone.trace_sha256 == spread.trace_sha256
    assert alone.coverage == spread.coverage
    assert spread.seeds == 3
    assert spread.wall_s > 0


def test_every_seed_draws_at_least_three_kinds_of_faults() -> None:
    for family, kinds in FAMILIES.items():
        for seed in range(50):
            faults = draw_faults(seed, family, 3.0, 25.0)
            assert len({fault.kind for fault in faults}) >= min(3, len(kinds))
            assert all(3.0 <= fault.at_s < 25.0 for fault in faults)
            assert [fault.at_s for fault in faults] == sorted(fault.at_s for fault in faults)
            real = draw_faults(seed, family, 3.0, 25.0, training=True)
            assert len({fault.kind for fault in real}) >= min(3, len(kinds))
            assert all(3.0 <= fault.at_s < 25.0 for fault in real)


def test_of_the_kinds_of_messages_that_few_runs_send_each_seed_loses_two() -> None:
    lost = [
        {fault.message for fault in draw_faults(seed, "all", 3.0, 25.0, training=True) if fault.for_s == 22.0}
        for seed in range(12)
    ]
    assert len(set(map(frozenset, lost))) == 12
    assert all(len(kinds & set(RAREST_MESSAGES)) == len(kinds & set(RARE_MESSAGES)) == 1 for kinds in lost)


def test_what_a_peer_raises_is_a_violation_of_that_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def receive(*arguments: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("p2pcoord.peer.Peer.receive", receive)
    report = run_seed(1, peers=3, faults="none", rounds=1)
    assert len(report.violations) == 1
    assert report.violations[0].startswith("raised at ")
    assert "a bug" in report.violations[0]


@pytest.mark.parametrize(("text", "seeds"), [("7", [7]), ("3..5", [3, 4, 5])])
def test_seeds_are_one_or_a_range(text: str, seeds: list[int]) -> None:
    assert list(parse_range("seeds", text)) == seeds


@pytest.mark.parametrize("text", ["", "a", "5..3", "1..", "..4"])
def test_other_seeds_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"A\.\.B"):
        parse_range("seeds", text)


def test_unknown_faults_and_impossible_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="crashes"):
        simulate(faults="gremlins")
    with pytest.raises(UserError, match="1 to 1000"):
        simulate(peers=0)
    with pytest.raises(UserError, match="1 to 1000"):
        simulate(peers=range(5, 1002))


def test_of_several_numbers_of_peers_each_seed_draws_one_and_always_the_same() -> None:
    summary = simulate(peers=range(1, 4), seeds=range(1, 4), faults="none", rounds=1, processes=1)
    alone = [run_seed(seed, peers=range(1, 4), faults="none", rounds=1) for seed in range(1, 4)]
    assert summary.events == sum(report.events for report in alone)
    assert len({report.events for report in alone}) > 1


def test_a_wrong_scenario_file_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text('peers = 5\n[[faults]]\nat_s = 1.0\nkind = "gremlin"\n')
    with pytest.raises(UserError, match=r"wrong\.toml.*gremlin"):
        load_scenario(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peers", "last", "work"),
    [(3, 60, "training"), (5, 60, "training"), (5, 200, "steady"), (25, 3, "training")],
)
def test_a_sweep_keeps_every_invariant(peers: int, last: int, work: WorkName) -> None:
    summary = simulate(peers=peers, seeds=range(1, last + 1), work=work)
    assert summary.violated == ()
    assert summary.committed_version >= 10


@pytest.mark.slow
@pytest.mark.parametrize(("peers", "seed"), [(5, 58), (7, 104)])
def test_members_that_lost_everybody_they_knew_are_found_again(peers: int, seed: int) -> None:
    """Their admission, which is certified, says where they were."""
    assert simulate(peers=peers, seeds=[seed]).violated == ()
