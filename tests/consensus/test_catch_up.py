"""Certified records from whoever has them: what an answer must bring, and what is asked for again."""

from __future__ import annotations

import pytest

from node.storage.log_replay import Replay
from p2pcoord.consensus.catch_up import ASK_INTERVAL_NS, CatchUp
from p2pcoord.consensus.ledger import Ledger
from p2pcoord.consensus.messages import PreVoteRequest, Records, RecordsRequest
from p2pcoord.consensus.record import Record
from tests.round_runner import RoundWorld
from tests.script_runner import authority_of


def ledger_of(world: RoundWorld, letter: str) -> Ledger:
    return world.peer(letter).agreement.voter.ledger


def newest_round(ledger: Ledger) -> int:
    return max(r.header.height for r in ledger.records[: ledger.certified + 1] if r.header.kind == "round")


def one_behind() -> tuple[RoundWorld, tuple[Record, ...]]:
    """A and B have certified a round that C has not heard of: the records that C lacks, without the round's body."""
    world = RoundWorld()
    world.execute("committee A B C members D rounds=40 size=3")
    world.execute("cut A C")
    world.execute("cut B C")
    world.execute("begin A")
    while not world.commits("A"):
        world.execute("run 100ms")
    for letter in "ABCD":
        world.execute(f"hold {letter} train")
    world.execute("run 500ms")
    ours = ledger_of(world, "A")
    missed = ours.records[ledger_of(world, "C").certified + 1 : newest_round(ours) + 1]
    return world, tuple(Record(r.header, None) if r.header.kind == "round" else r for r in missed)


def answer(world: RoundWorld, records: tuple[Record, ...], more: int = 0) -> Records:
    top = records[-1].header.height
    return Records(records, ledger_of(world, "A").certificates[top], top + more)


def test_an_answer_without_the_newest_body_is_refused() -> None:
    world, stripped = one_behind()
    before = ledger_of(world, "C").certified
    world.inject("D", "C", answer(world, stripped))
    assert world.rejected("C") == {"bad_record": 1}
    assert ledger_of(world, "C").certified == before


@pytest.mark.parametrize("restart", [False, True])
def test_who_was_told_that_more_is_to_come_gets_the_newest_body_from_another(restart: bool) -> None:
    world, stripped = one_behind()
    world.inject("D", "C", answer(world, stripped, more=9))
    c = world.peer("C")
    assert ledger_of(world, "C").lacking == stripped[-1].header.height
    assert c.agreement.following._reply(matched=False).holds is False
    asked = len(world.messages(PreVoteRequest, "C"))
    world.execute("timeout C")
    assert len(world.messages(PreVoteRequest, "C")) == asked  # it would order an old version again
    world.inject("B", "C", RecordsRequest(1))
    assert not world.messages(Records, "C")
    world.execute("crash A")
    world.execute("heal")
    world.execute("run 10s")
    assert ledger_of(world, "C").lacking is None
    assert world.participant("C").version >= 1
    replay = Replay(authority_of("C")._verify, check_config=False)
    for frame in world.machines["C"].disk:
        replay.take(frame)
    assert replay.state is not None
    assert replay.version in replay.states
    if restart:
        world.execute("crash C")
        world.execute("restart C")
        assert ledger_of(world, "C").lacking is None
        assert world.participant("C").version >= 1
    for letter in "BCD":
        world.execute(f"release {letter}")
    world.execute("run 30s")
    assert [body.version for body in world.commits("C")] == list(range(1, len(world.commits("C")) + 1))
    assert len(world.commits("C")) > 1


def test_a_chain_whose_old_bodies_are_gone_is_caught_up_with() -> None:
    world, stripped = one_behind()
    half = answer(world, stripped, more=1)
    world.inject("D", "C", half)
    world.execute("run 1s")
    world.execute("heal")
    for letter in "ABCD":
        world.execute(f"release {letter}")
    world.execute("run 10s")
    assert ledger_of(world, "C").certified == ledger_of(world, "A").certified
    assert not world.rejected("C")


def test_what_more_there_is_is_asked_for_as_soon_as_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    world = RoundWorld()
    world.execute("committee A B C members D rounds=40 size=3")
    for letter in "ABC":
        world.execute(f"cut {letter} D")
    world.execute("begin A")
    while len(world.commits("A")) < 3:
        world.execute("run 100ms")
    behind, records = ledger_of(world, "D").certified, ledger_of(world, "A").records
    asked: list[int] = []
    ask = CatchUp.ask

    def told(self: CatchUp, peer: str, now: int) -> None:
        asked.append(now)
        ask(self, peer, now)

    monkeypatch.setattr(CatchUp, "ask", told)
    for height in (behind + 1, behind + 2):
        world.inject("A", "D", answer(world, (records[height],), more=9))
    assert len(asked) == 1
    world.execute("run 250ms")
    assert asked[1] - asked[0] == ASK_INTERVAL_NS
