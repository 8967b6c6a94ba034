"""The coordinator's care for the committee, where learners do not do as they should."""

from __future__ import annotations

import msgspec
import pytest

from p2pcoord.consensus.agreement import LEARNER_PATIENCE_NS
from p2pcoord.consensus.messages import AppendReply
from p2pcoord.effects import Send
from p2pcoord.messages import decode_message
from p2pcoord.wire import encode
from tests.round_runner import RoundWorld
from tests.script_runner import Machine, letter_of, peer_id


class NeverReady(RoundWorld):
    """One member says in every answer that it does not hold the newest state."""

    def __init__(self, liar: str) -> None:
        super().__init__()
        self.liar = liar

    def _leave(self, machine: Machine, send: Send) -> None:
        message = decode_message(send.data)
        if machine.letter == self.liar and isinstance(message, AppendReply):
            send = msgspec.structs.replace(send, data=encode(msgspec.structs.replace(message, holds=False)))
        super()._leave(machine, send)

    def voters(self) -> str:
        return "".join(letter_of(peer) for peer in self.peer("A").agreement.committee.voters)


@pytest.mark.parametrize(("size", "voters"), [(3, "ACD"), (5, "ACDEF")])
def test_a_committee_grows_past_who_never_gets_ready(size: int, voters: str) -> None:
    world = NeverReady("B")
    world.execute(f"committee A members B C D E F rounds=400 size={size}")
    world.execute("hold A train")
    world.execute("timeout A")
    world.execute("run 30s")
    assert world.voters() == voters


def test_a_dead_voter_is_replaced_past_who_never_gets_ready() -> None:
    world = NeverReady("D")
    world.execute("committee A B C members D E rounds=400 size=3")
    world.execute("hold A train")
    world.execute("timeout A")
    world.execute("run 5s")
    world.execute("crash C")
    world.execute("run 40s")
    assert world.voters() == "ABE"


def test_who_needs_longer_than_the_others_becomes_a_voter_all_the_same() -> None:
    world = NeverReady("B")
    world.execute("committee A members B C rounds=400 size=3")
    world.execute("hold A train")
    world.execute("timeout A")
    world.execute("run 30s")
    assert world.voters() == "A"
    world.liar = ""
    world.execute("run 10s")
    assert world.voters() == "ABC"


def test_a_voter_that_leaves_again_is_waited_for_again() -> None:
    """C is dead and is to be dropped: first by waiting for D, who does not get ready. When C is back nobody leaves."""
    world = NeverReady("D")
    world.execute("committee A B C members D rounds=400 size=3")
    world.execute("hold A train")
    world.execute("timeout A")
    agreement = world.peer("A").agreement
    leaving = (peer_id("C"),)
    assert [agreement._patient(leaving, at * LEARNER_PATIENCE_NS) for at in (1, 2)] == [True, False]
    world.execute("run 2s")  # the committee is as it should be meanwhile
    assert agreement._patient(leaving, 9 * LEARNER_PATIENCE_NS)


def test_the_time_of_a_learner_does_not_run_while_another_coordinates() -> None:
    world = NeverReady("D")
    world.execute("committee A B C members D rounds=400 size=5")
    world.execute("hold A train")
    world.execute("timeout A")
    agreement = world.peer("A").agreement
    agreement._try([peer_id("D")], 0)
    agreement._elected((), LEARNER_PATIENCE_NS)
    agreement._by_trials([], LEARNER_PATIENCE_NS)
    assert agreement._trials[peer_id("D")].failures == 0
