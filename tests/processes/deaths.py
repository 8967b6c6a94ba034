"""Ways for a node to die or to freeze, and how long the others take to go on: shared by the tests and by benchmarks/recovery.py.

Each function changes a running network, waits for what must come of it, and gives seconds from the blow to the next
certificate, by the clock that all the nodes' events share.
"""

from __future__ import annotations

import signal
import time
from random import Random

import psutil

from tests.processes.network import Event, Network, Node, at

# A blow that came too early or too late for its phase is made good by another; more than this says that something is wrong.
MAX_MISSES = 20


def last_phase(coordinator: Node) -> Event:
    """The phase in which the coordinator's round is."""
    phases = coordinator.events("phase")
    return phases[-1] if phases else {"phase": "", "version": 0, "attempt": 0}


def wait_phase(network: Network, coordinator: Node, phase: str, timeout_s: float = 60.0) -> Event:
    """Until the coordinator enters this phase anew."""
    seen = len(coordinator.events("phase"))

    def entered() -> Event | None:
        new = coordinator.events("phase")[seen:]
        return new[-1] if new and new[-1]["phase"] == phase else None

    event: Event = network.wait(entered, f"{coordinator.name} enters {phase}", timeout_s, poll_s=0.003)
    return event


def was_within(coordinator: Node, phase: Event, moment: float) -> bool:
    """Whether the coordinator was still in this phase of this attempt at that moment."""
    later = [event for event in coordinator.events("phase") if at(event) > at(phase)]
    return at(phase) <= moment and (not later or at(later[0]) >= moment)


def kill_in_transfer(network: Network, victim: Node, random: Random) -> tuple[float, Event]:
    """SIGKILL for `victim` while its bytes move: one that the next certificate names had no bytes left to send. Gives the
    seconds to the next certificate, and that commit. Restarts it and tries again as long as the moment was missed."""
    for _ in range(MAX_MISSES):
        coordinator = network.coordinator()
        assert victim is not coordinator
        phase = wait_phase(network, coordinator, "aggregation")
        time.sleep(random.uniform(0.0, 0.1))
        killed = victim.kill()
        commit = network.next_commit(killed)
        if was_within(coordinator, phase, killed) and victim.peer_id not in commit["contributors"]:
            return at(commit) - killed, commit
        come_back(network, victim)
    raise AssertionError("aggregation was never met under way")


def come_back(network: Network, node: Node) -> Event:
    """Starts a killed node again; until it contributes."""
    started = time.time()
    network.restart(node)
    return network.wait_contribution(node, started, 90.0)


def freeze(network: Network, victim: Node, seconds: float) -> tuple[float, Event]:
    """SIGSTOP for a node and its trainer, SIGCONT after so many seconds; until it contributes again. Gives the seconds to the
    next certificate that the others reach, and that commit."""
    trainers = victim.trainers()
    frozen = victim.signal(signal.SIGSTOP)
    for trainer in trainers:
        trainer.suspend()
    commit = network.next_commit(frozen, seconds)
    time.sleep(max(0.0, frozen + seconds - time.time()))
    for trainer in trainers:
        try:
            trainer.resume()
        except psutil.NoSuchProcess:
            continue
    thawed = victim.signal(signal.SIGCONT)
    network.wait_contribution(victim, thawed, 60.0)
    return at(commit) - frozen, commit


def other_than(network: Network, *nodes: Node) -> Node:
    """The last node that runs and is none of these."""
    return [node for node in network.nodes if node.runs and node not in nodes][-1]
