"""Bytes per second that a resting peer sends, at 5 and at 100 peers, in the virtual world.

    python -m benchmarks.gossip_load [--peers 5 100] [--rest-s 60] [--seed 1]

Peers join, those who are there train a few real rounds on the quadratic workload, and rest: the run is over. Then every byte
of every message that a peer sends (gossip, probes, heartbeats, catch-up; announcements once per receiver) is counted for a
minute of virtual time. What transports add (TCP, Noise, Yamux, pings) is not in it.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

from simulations import quadratic
from simulations.network import SECOND, Weather
from simulations.training import Training
from simulations.world import World, WorldSettings, kind_of

ROUNDS = 3
JOIN_WITHIN_S = 120


def rested(peers: int, seed: int) -> World:
    """A world whose run is over and where all are members. Raises SystemExit when it does not come to that in time."""
    rules = quadratic.rules(rounds=ROUNDS)
    world = World(seed, WorldSettings(weather=Weather(), rules=rules, gossip=True))
    Training(world)
    world.found("m0")
    for index in range(1, peers):
        # Not all in one moment: nobody starts a hundred machines so.
        world.later(SECOND + index * SECOND // 10, world.join, f"m{index}")
    deadline = world.now + JOIN_WITHIN_S * SECOND
    while world.now < deadline and not _at_rest(world, peers) and not world.invariants.violations:
        world.run(world.now + SECOND)
    if not _at_rest(world, peers):
        raise SystemExit(f"{peers} peers did not come to rest: {world.invariants.violations[:1]}")
    return world


def _at_rest(world: World, peers: int) -> bool:
    members = [m for m in world.machines.values() if m.peer is not None and m.peer.is_member]
    return world.invariants.version == ROUNDS and len(members) == peers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", type=int, nargs="+", default=[5, 100])
    parser.add_argument("--rest-s", type=int, default=60, help="virtual seconds to count over")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    for peers in given.peers:
        began = time.perf_counter()
        world = rested(peers, given.seed)
        world.run(world.now + 10 * SECOND)  # the last records spread
        before, kinds = Counter(world.network.sent_bytes), Counter[str]()

        def count(sender: str, receiver: str, data: bytes, kinds: Counter[str] = kinds) -> None:
            kinds[kind_of(data)] += len(data)

        world.network.on_send = count
        world.run(world.now + given.rest_s * SECOND)
        sent = [world.network.sent_bytes[peer] - before[peer] for peer in world.machines]
        rates = sorted(count / given.rest_s for count in sent)
        shares = ", ".join(f"{kind} {size / sum(sent):.0%}" for kind, size in kinds.most_common(5))
        print(
            f"{peers} peers: {sum(rates) / len(rates):.0f} bytes/s per peer "
            f"(least {rates[0]:.0f}, most {rates[-1]:.0f}) over {given.rest_s} virtual seconds; {shares}; "
            f"{time.perf_counter() - began:.1f} s"
        )


if __name__ == "__main__":
    main()
