"""Rumors: how often each is passed on, to whom, and which goes first."""

from p2pcoord.gossip.rumors import MAX_BROADCASTS, MAX_RECORDS, MAX_RUMORS, Rumor, Rumors


def rumor(peer: str, origin: str = "z") -> Rumor:
    return Rumor(peer, 1, origin, False)


def test_a_rumor_is_passed_on_a_bounded_number_of_times():
    rumors = Rumors()
    rumors.spread(rumor("a"))
    told = sum(rumor("a") in rumors.take("c", 8)[0] for _ in range(100))
    assert told == 4  # 4 * log10(10)
    assert rumors.take("c", 8) == ([], [])


def test_what_is_said_to_many_is_said_more_often():
    rumors = Rumors()
    rumors.spread(rumor("a"))
    assert sum(bool(rumors.take("c", 9998)[0]) for _ in range(100)) == 16


def test_the_least_sent_goes_first_and_of_those_the_newest():
    rumors = Rumors()
    for peer in "abc":
        rumors.spread(rumor(peer))
    assert [said.peer for said in rumors.take("x", 100)[0]] == ["c", "b", "a"]
    rumors.spread(rumor("d"))
    assert [said.peer for said in rumors.take("x", 100)[0]] == ["d", "c", "b", "a"]


def test_nobody_is_told_what_it_said_itself():
    rumors = Rumors()
    rumors.spread(rumor("a", "b"))
    rumors.spread_record("c")
    assert rumors.take("b", 8) == ([], ["c"])
    assert rumors.take("c", 8) == ([rumor("a", "b")], [])


def test_a_record_takes_the_place_of_what_was_said_of_its_owner():
    rumors = Rumors()
    rumors.spread(rumor("a"))
    rumors.spread(rumor("b"))
    rumors.spread_record("a")
    assert rumors.take("x", 8) == ([rumor("b")], ["a"])
    rumors.spread(rumor("a"))
    rumors.drop("a", rumors_only=True)
    assert rumors.take("x", 8) == ([rumor("b")], ["a"])
    rumors.drop("a")
    assert rumors.take("x", 8) == ([rumor("b")], [])


def test_one_message_carries_a_bounded_number_of_rumors_and_records():
    rumors = Rumors()
    for peer in "abcdefghijkl":
        rumors.spread(rumor(peer))
    for peer in "mnop":
        rumors.spread_record(peer)
    said, records_of = rumors.take("x", 100)
    assert records_of == ["p", "o"]
    assert len(records_of) == MAX_RECORDS
    assert len(said) + len(records_of) == MAX_RUMORS


def test_waiting_rumors_are_bounded_and_what_was_sent_most_goes():
    rumors = Rumors()
    rumors.spread(rumor("sent"))
    rumors.take("x", 10_000)
    for index in range(MAX_BROADCASTS):
        rumors.spread(rumor(str(index)))
    told: set[str] = set()
    while said := rumors.take("x", 10_000)[0]:
        told.update(each.peer for each in said)
    assert told == {str(index) for index in range(MAX_BROADCASTS)}
