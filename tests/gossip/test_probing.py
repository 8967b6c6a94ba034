"""Probing: what a prober does step by step, and what many of them find out together in a lossy virtual network."""

import heapq
import itertools
import random
from collections import Counter

import pytest

from p2pcoord.gossip.pings import MAX_RELAYS, Carrier, SendAck, SendNack, SendPing, SendPingRequest
from p2pcoord.gossip.probing import Prober
from p2pcoord.gossip.rumors import Rumor
from p2pcoord.gossip.suspicion import Alive, Dead, Output, RaiseIncarnation, State, Suspect

SECOND = 1_000_000_000


def prober(members: str = "abcd", own: str = "me", incarnation: int = 1) -> Prober:
    made = Prober(own, incarnation, random.Random(7), 0)
    for peer in members:
        made.add_member(peer, 1, (), 0)
    return made


def run_to(machine: Prober, until: int) -> list[Output]:
    """All that a prober does on time up to `until` when nobody answers."""
    outputs: list[Output] = []
    while (due := machine.next_deadline()) is not None and due <= until:
        outputs += machine.tick(due)
    return outputs


def next_of(machine: Prober, kind: type[Output]) -> tuple[Output, int]:
    """Tick on until an output of this kind comes; the output and the time."""
    for _ in range(1000):
        due = machine.next_deadline()
        assert due is not None
        for output in machine.tick(due):
            if isinstance(output, kind):
                return output, due
    raise AssertionError(f"no {kind.__name__}")


def hear(machine: Prober, rumors: list[Rumor], now: int) -> list[Output]:
    """Rumors come with a message that says nothing else."""
    return machine.receive_nack("nobody", 0, 0, "nobody", rumors, now)


def only(outputs: list[Output], kind: type[Output]) -> list[Output]:
    return [output for output in outputs if isinstance(output, kind)]


# One prober --------------------------------------------------------------------------------------------------------


def test_each_member_is_probed_once_a_round_in_an_order_that_changes():
    machine = prober("abcdefgh")
    rounds = []
    for _ in range(6):
        targets = []
        while len(targets) < 8:
            ping, now = next_of(machine, SendPing)
            targets.append(ping.to)
            machine.receive_ack(ping.to, ping.sequence, 1, ping.to, (), now)
        rounds.append(tuple(targets))
    assert all(sorted(targets) == list("abcdefgh") for targets in rounds)
    assert len(set(rounds)) == 6


def test_a_member_that_does_not_answer_is_asked_through_three_others_then_suspected_then_dead():
    machine = prober("abcdef")
    ping, began = next_of(machine, SendPing)
    outputs = machine.tick(machine.next_deadline())
    assert {request.target for request in outputs} == {ping.to}
    assert len({request.to for request in outputs}) == 3
    assert ping.to not in {request.to for request in outputs}
    for request in outputs:
        machine.receive_nack(request.to, request.sequence, 1, ping.to, (), began + SECOND // 2)
    suspect, when = next_of(machine, Suspect)
    assert suspect == Suspect(ping.to, 1, "me")
    assert when == began + SECOND
    assert machine._health == 0  # all helpers were heard: the fault is not ours
    dead = None
    while dead is None:
        now = machine.next_deadline()
        for output in machine.tick(now):
            if isinstance(output, SendPing) and output.to != ping.to:
                machine.receive_ack(output.to, output.sequence, 1, output.to, (), now)
            dead = output if isinstance(output, Dead) else dead
    assert dead == Dead(ping.to, 1)
    assert 5 * SECOND <= now - when <= 31 * SECOND
    assert machine.state(ping.to) is State.DEAD


def test_a_relayed_ack_ends_the_probe_and_only_from_who_was_asked():
    machine = prober("abcdef")
    ping, now = next_of(machine, SendPing)
    requests = machine.tick(machine.next_deadline())
    asked = {request.to for request in requests}
    stranger = next(peer for peer in "abcdef" if peer not in asked and peer != ping.to)
    machine.receive_ack(stranger, ping.sequence, 1, ping.to, (), now)
    assert ping.sequence in machine._pings.probes
    machine.receive_ack(requests[0].to, ping.sequence, 1, ping.to, (), now)
    assert ping.sequence not in machine._pings.probes
    assert not only(machine.tick(now + SECOND), Suspect)


def test_helpers_that_are_silent_too_make_us_slower_and_acks_make_us_well_again():
    machine = prober("abcdef")
    run_to(machine, 12 * SECOND)
    assert machine._health >= 3
    worst = machine._health
    begun = [now for _, now in (next_of(machine, SendPing) for _ in range(2))]
    assert begun[1] - begun[0] > 0
    for _ in range(worst + 12):
        ping, now = next_of(machine, SendPing)
        machine.receive_ack(ping.to, ping.sequence, 1, ping.to, (), now)
    assert machine._health < worst


def test_a_ping_request_is_answered_with_the_targets_ack_or_a_nack():
    machine = prober("abcd")
    (ping,) = only(machine.receive_ping_request("a", 77, 1, "b", (), 0), SendPing)
    (ack,) = only(machine.receive_ack("b", ping.sequence, 1, "b", (), 1), SendAck)
    assert (ack.to, ack.sequence, ack.subject) == ("a", 77, "b")
    machine.receive_ping_request("a", 78, 1, "c", (), 2)
    nack, now = next_of(machine, SendNack)
    assert (nack.to, nack.sequence, nack.subject) == ("a", 78, "c")
    assert now < 2 + SECOND // 2  # before the asker's verdict
    assert only(machine.receive_ping_request("a", 79, 1, "nobody", (), 3), SendNack)
    for sequence in range(100):
        machine.receive_ping_request("a", sequence, 1, "d", (), 4)
    assert len(machine._pings.relays) == MAX_RELAYS


def test_a_leaf_is_probed_through_the_members_that_it_names():
    machine = Prober("me", 1, random.Random(1), 0)
    for peer in "abcde":
        machine.add_member(peer, 1, (), 0)
    machine.add_member("leaf", 1, ("c", "d"), 0)
    machine.add_member("ours", 1, ("me", "a"), 0)
    direct, requests = set(), set()
    for _ in range(60):
        now = machine.next_deadline()
        for output in machine.tick(now):
            if isinstance(output, SendPing):
                direct.add(output.to)
                machine.receive_ack(output.to, output.sequence, 1, output.to, (), now)
            elif isinstance(output, SendPingRequest):
                requests.add((output.to, output.target))
                machine.receive_ack(output.to, output.sequence, 1, output.target, (), now)
    assert requests == {("c", "leaf"), ("d", "leaf")}
    assert direct == {*"abcde", "ours"}


def test_who_hears_itself_suspected_raises_its_incarnation_before_it_answers():
    machine = prober(incarnation=4)
    outputs = machine.receive_ping("a", 1, 1, [Rumor("me", 4, "a", False)], 0)
    assert outputs[0] == RaiseIncarnation(5)
    (ack,) = outputs[1:]
    assert (ack.incarnation, ack.records_of) == (5, ("me",))
    assert not only(machine.receive_ping("b", 1, 1, [Rumor("me", 4, "b", False)], 0), RaiseIncarnation)


def test_an_ack_clears_a_suspicion_but_a_ping_from_the_suspect_does_not():
    machine = prober("a")
    ping, _ = next_of(machine, SendPing)
    assert next_of(machine, Suspect)[0] == Suspect("a", 1, "me")
    again, later = next_of(machine, SendPing)
    machine.receive_ping("a", 5, 1, (), later)
    assert machine.state("a") is State.SUSPECT
    assert machine.receive_ack("a", ping.sequence, 1, "a", (), later) == []  # asked before the suspicion
    assert machine.receive_ack("a", again.sequence, 1, "a", (), later) == [Alive("a", 1)]


def test_confirmations_shorten_a_suspicion_to_its_least_time_and_a_liars_death_does_no_more():
    def dies_after(rumors: list[Rumor]) -> float:
        machine = prober("abcdefgh")
        hear(machine, rumors, 0)
        while True:
            now = machine.next_deadline()
            for output in machine.tick(now):
                if isinstance(output, (SendPing, SendPingRequest)):
                    subject = output.to if isinstance(output, SendPing) else output.target
                    if subject != "a":
                        machine.receive_ack(output.to, output.sequence, 1, subject, (), now)
                if output == Dead("a", 1):
                    return now / SECOND

    accused = [Rumor("a", 1, origin, False) for origin in "bcdefg"]
    times = [dies_after(accused[:count]) for count in (1, 2, 3, 4, 6)]
    assert times == sorted(times, reverse=True)
    assert times[0] == 17.5  # with us, as it does not answer our probe either
    assert 5.0 <= times[2] < 8.0  # as soon as our probe fails
    assert all(5.0 <= time < 7.0 for time in times[3:])  # it is asked a last time
    assert 5.0 <= dies_after([Rumor("a", 1, "b", True)]) < 7.0
    assert dies_after(accused[:1] * 8) == 17.5  # one voice, however often
    assert dies_after([*accused[:1], Rumor("a", 1, "invented", False), Rumor("a", 1, "me", False)]) == 17.5


def test_nobody_who_answers_us_dies_of_what_others_say():
    machine = prober("abcdefgh")
    liars = [Rumor("a", 1, origin, dead) for origin in "bcdefgh" for dead in (False, True)]
    hear(machine, liars[:8], 0)
    hear(machine, liars[8:], 0)
    outputs: list[Output] = []
    while (now := machine.next_deadline()) < 30 * SECOND:
        for output in machine.tick(now):
            outputs.append(output)
            if isinstance(output, SendPing):
                outputs += machine.receive_ack(output.to, output.sequence, 1, output.to, (), now)
    assert not only(outputs, Dead)
    assert only(outputs, Alive) == [Alive("a", 1)]


def test_an_answer_to_a_ping_from_before_the_suspicion_does_not_clear_it():
    machine = prober("a")
    ping, now = next_of(machine, SendPing)
    hear(machine, [Rumor("a", 1, "a", False)], now)  # nobody accuses itself
    assert machine.state("a") is State.ALIVE
    machine.add_member("b", 1, (), now)
    hear(machine, [Rumor("a", 1, "b", False)], now + 1)
    assert machine.receive_ack("a", ping.sequence, 1, "a", (), now + 2) == []
    assert machine.state("a") is State.SUSPECT


def test_confirmations_that_come_late_end_a_suspicion_now_and_are_no_gap():
    machine = prober("abcdefgh")
    hear(machine, [Rumor("a", 1, "b", False)], 0)
    dead: list[Output] = []
    while (now := machine.next_deadline()) < 16 * SECOND:
        for output in machine.tick(now):
            if isinstance(output, SendPing) and output.to != "a":
                machine.receive_ack(output.to, output.sequence, 1, output.to, (), now)
    now = 16 * SECOND
    hear(machine, [Rumor("a", 1, origin, True) for origin in "cde"], now)
    assert machine.next_deadline() == now
    dead += only(machine.tick(now), Dead)
    assert dead == [Dead("a", 1)]


def test_a_suspicion_withdrawn_after_an_answer_can_be_raised_again_in_the_same_incarnation():
    machine = prober("ab")
    for _ in range(2):
        assert hear(machine, [Rumor("a", 1, "b", False)], 0) == [Suspect("a", 1, "b")]
        (ping,) = machine.connection_opened("a", 0)
        assert machine.receive_ack("a", ping.sequence, 1, "a", (), 0) == [Alive("a", 1)]


def test_the_dead_are_pinged_now_and_then_and_only_their_own_answer_or_a_restart_raises_them():
    def with_dead() -> Prober:
        machine = prober("ab")
        hear(machine, [Rumor("a", 1, "b", True)], 0)
        run_to(machine, 40 * SECOND)
        assert machine.state("a") is State.DEAD
        return machine

    machine = with_dead()
    pings = [output for output in run_to(machine, 60 * SECOND) if isinstance(output, SendPing)]
    told = [ping for ping in pings if ping.to == "a"]
    assert 2 <= len(told) <= 3  # b has died too, and has its turn
    assert told[-1].rumors[0] == Rumor("a", 1, "me", True)
    assert machine.alive("a", 1, 60 * SECOND) == []  # old gossip
    now = machine.next_deadline()
    assert machine.receive_ack("a", told[-1].sequence, 2, "a", (), now) == [Alive("a", 2)]
    alive, ping = with_dead().alive("a", 2, now)
    assert alive == Alive("a", 2)
    assert isinstance(ping, SendPing)  # its record may be older than its death: it is asked


def test_a_gap_kills_nobody_and_gives_everybody_the_least_time_anew():
    machine = prober("abcdefgh")
    hear(machine, [Rumor(peer, 1, "h", True) for peer in "abc"], 0)
    now = machine.next_deadline() + 3600 * SECOND
    assert machine.tick(now) == []
    assert machine.state("a") is State.SUSPECT
    outputs = run_to(machine, now + 5 * SECOND - 1)
    assert not only(outputs, Dead)
    assert {dead.peer for dead in only(run_to(machine, now + 20 * SECOND), Dead)} >= set("abc")


def test_with_nobody_to_probe_nothing_is_due_and_the_first_member_is_no_gap():
    machine = Prober("me", 1, random.Random(1), 0)
    assert machine.next_deadline() is None
    machine.add_member("a", 1, (), 3600 * SECOND)
    assert machine.next_deadline() >= 3600 * SECOND
    assert only(run_to(machine, 3601 * SECOND), SendPing)
    assert machine._health == 0
    machine.remove_member("a")
    assert machine.next_deadline() is None


def test_a_closed_connection_is_probed_at_once_and_an_opened_one_tells_the_dead():
    machine = prober("abcd")
    (ping,) = machine.connection_closed("c", 0)
    assert ping.to == "c"
    assert machine.connection_closed("c", 1) == []
    hear(machine, [Rumor("d", 1, "a", False)], 1)
    (ping,) = machine.connection_opened("d", 2)
    assert ping.rumors[0].peer == "d"
    assert machine.connection_opened("a", 2) == []


# Many probers in a lossy network -----------------------------------------------------------------------------------


class Network:
    """Probers on one event heap: latencies of 1 to 30 ms, messages lost with a fixed chance, peers that crash.

    A signed record is here the number of its incarnation; a prober's peer attaches what it holds.
    """

    def __init__(self, count: int, loss: float, seed: int) -> None:
        self.rng = random.Random(seed)
        self.loss = loss
        self.now = 0
        self.names = [f"p{index:03}" for index in range(count)]
        self.crashed: dict[str, int] = {}
        self.cut: dict[str, int] = {}  # peer -> side of a partition
        self.records = {name: dict.fromkeys(self.names, 1) for name in self.names}
        self.found: list[tuple[int, str, Output]] = []
        self.sent: Counter[str] = Counter()
        self.events: list[tuple[int, int, str, str, Carrier | None, dict[str, int]]] = []
        self.order = itertools.count()
        self.probers: dict[str, Prober] = {}
        for name in self.names:
            self.probers[name] = Prober(name, 1, random.Random(f"{seed} {name}"), 0)
            for other in self.names:
                self.probers[name].add_member(other, 1, (), 0)
            self.schedule(name)

    def schedule(self, name: str) -> None:
        due = self.probers[name].next_deadline()
        assert due is not None
        heapq.heappush(self.events, (max(due, self.now), next(self.order), name, "", None, {}))

    def do(self, name: str, outputs: list[Output]) -> None:
        for output in outputs:
            if isinstance(output, RaiseIncarnation):
                self.records[name][name] = output.incarnation
            elif isinstance(output, Carrier):
                self.sent[name] += 1
                if self.rng.random() < self.loss or self.cut.get(name) != self.cut.get(output.to):
                    continue
                records = {peer: self.records[name][peer] for peer in output.records_of}
                at = self.now + self.rng.randrange(1_000_000, 30_000_000)
                heapq.heappush(self.events, (at, next(self.order), output.to, name, output, records))
            else:
                self.found.append((self.now, name, output))

    def receive(self, name: str, sender: str, message: Carrier, records: dict[str, int]) -> None:
        machine = self.probers[name]
        for peer, incarnation in records.items():
            self.records[name][peer] = max(incarnation, self.records[name][peer])
            self.do(name, machine.alive(peer, incarnation, self.now))
        start = (sender, message.sequence, message.incarnation)
        if isinstance(message, SendPing):
            self.do(name, machine.receive_ping(*start, message.rumors, self.now))
        elif isinstance(message, SendPingRequest):
            self.do(name, machine.receive_ping_request(*start, message.target, message.rumors, self.now))
        elif isinstance(message, SendAck):
            self.do(name, machine.receive_ack(*start, message.subject, message.rumors, self.now))
        elif isinstance(message, SendNack):
            self.do(name, machine.receive_nack(*start, message.subject, message.rumors, self.now))

    def run(self, seconds: float) -> None:
        until = self.now + int(seconds * SECOND)
        while self.events and self.events[0][0] <= until:
            self.now, _, name, sender, message, records = heapq.heappop(self.events)
            if name in self.crashed:
                continue
            if message is not None:
                self.receive(name, sender, message, records)
            elif (self.probers[name].next_deadline() or 0) <= self.now:
                self.do(name, self.probers[name].tick(self.now))
            else:
                continue  # a deadline that moved, and is on the heap where it moved to
            self.schedule(name)
        self.now = until

    def crash(self, *names: str) -> None:
        self.crashed.update(dict.fromkeys(names, self.now))

    def deaths(self) -> list[tuple[int, str, str]]:
        return [(at, name, output.peer) for at, name, output in self.found if isinstance(output, Dead)]


def test_all_crashed_are_found_by_all_at_twenty_percent_loss():
    network = Network(60, loss=0.2, seed=3)
    network.run(15)
    victims = network.names[5:11]
    network.crash(*victims)
    survivors = [name for name in network.names if name not in victims]
    waited = 0
    while not all(
        network.probers[name].state(victim) is State.DEAD for name in survivors for victim in victims
    ):
        network.run(1)
        waited += 1
        assert waited < 60
    times = sorted(
        (at - network.crashed[victim]) / SECOND for at, _, victim in network.deaths() if victim in victims
    )
    false = [death for death in network.deaths() if death[2] not in victims]
    print(
        f"60 peers, 20% loss, 6 crashed: found by half after {times[len(times) // 2]:.1f} s, by all after {times[-1]:.1f} s; "
        f"false deaths {len(false)}"
    )
    # A lone accuser's suspicion lasts 53 s among 60; then the last probe clears it.
    network.loss = 0.0
    network.run(60)
    assert all(
        network.probers[name].state(other) is State.ALIVE
        for name, other in itertools.permutations(survivors, 2)
    )


@pytest.mark.parametrize("count", [25, 75])
def test_nobody_dies_falsely_at_five_percent_loss(count):
    network = Network(count, loss=0.05, seed=11)
    network.run(60)
    suspicions = sum(isinstance(output, Suspect) for _, _, output in network.found)
    print(f"{count} peers, 5% loss, 60 s: {suspicions} suspicions held, {len(network.deaths())} deaths")
    assert network.deaths() == []


def test_the_load_of_a_peer_is_the_same_in_a_run_of_25_and_of_200():
    load = {}
    for count in (25, 200):
        network = Network(count, loss=0.01, seed=1)
        network.run(15)
        load[count] = [network.sent[name] / 15 for name in network.names]
        print(
            f"{count} peers: {sum(load[count]) / count:.2f} messages sent a second by each, at most {max(load[count]):.2f}"
        )
    means = {count: sum(values) / count for count, values in load.items()}
    assert means[200] == pytest.approx(means[25], rel=0.15)
    assert means[200] < 3
    assert max(load[200]) < 6


def test_two_halves_find_each_other_again_after_a_partition():
    network = Network(10, loss=0.0, seed=2)
    network.run(5)
    network.cut = dict.fromkeys(network.names[:6], 1)
    network.run(60)
    left, right = network.probers[network.names[0]], network.probers[network.names[9]]
    assert [left.state(name) for name in network.names[6:]] == [State.DEAD] * 4
    assert [right.state(name) for name in network.names[:6]] == [State.DEAD] * 6
    network.cut = {}
    healed = 0
    while any(
        machine.state(other) is not State.ALIVE
        for name, machine in network.probers.items()
        for other in network.names
        if other != name
    ):
        network.run(1)
        healed += 1
        assert healed < 30
    print(f"10 peers cut 6|4 for 60 s: all alive to all {healed} s after healing")


def test_a_peer_that_can_send_but_not_receive_is_found_dead():
    network = Network(12, loss=0.0, seed=4)
    network.run(3)
    deaf = network.names[0]
    original = network.receive

    def receive(name: str, sender: str, message: Carrier, records: dict[str, int]) -> None:
        if name != deaf:
            original(name, sender, message, records)

    network.receive = receive
    network.run(60)
    assert all(network.probers[name].state(deaf) is State.DEAD for name in network.names[1:])
    assert {victim for _, name, victim in network.deaths() if name != deaf} == {deaf}


def test_the_same_seed_gives_the_same_run():
    first, second = (Network(20, loss=0.1, seed=9) for _ in range(2))
    for network in (first, second):
        network.run(10)
        network.crash(network.names[3])
        network.run(20)
    assert first.found == second.found
    assert first.sent == second.sent
    assert first.found
