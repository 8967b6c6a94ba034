"""Version vectors: the laws of the lattice, and digests between peers that know different orders of admission."""

import itertools
import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.gossip.version_vector import (
    FORGOTTEN,
    MAX_DENSE,
    MAX_OTHERS,
    NOTHING,
    Digest,
    OtherStamp,
    Stamp,
    VersionVector,
    Wanted,
)
from p2pcoord.wire import decode, encode

PEERS = tuple("abcdefgh")
STAMPS = st.builds(Stamp, st.integers(1, 3), st.integers(1, 4) | st.just(FORGOTTEN))
KNOWLEDGE = st.dictionaries(st.sampled_from(PEERS), STAMPS)
ADMITTED = st.integers(0, len(PEERS))


def ordered(order: Iterable[str]) -> VersionVector:
    made = VersionVector()
    for peer in order:
        made.admit(peer)
    return made


def vector(*heard: dict[str, Stamp], admitted: int = 0) -> VersionVector:
    """Of all that was heard, in this order, when the first `admitted` of PEERS are in the order of admission."""
    made = ordered(PEERS[:admitted])
    for peer, stamp in itertools.chain.from_iterable(known.items() for known in heard):
        made.update(peer, stamp)
    return made


def known(to: VersionVector) -> dict[str, Stamp]:
    return {peer: to.stamp(peer) for peer in PEERS if to.stamp(peer) != NOTHING}


def ahead(first: VersionVector, second: VersionVector) -> dict[str, Stamp]:
    """Where the first knows more."""
    return {peer: stamp for peer, stamp in known(first).items() if stamp > second.stamp(peer)}


@given(KNOWLEDGE, KNOWLEDGE, KNOWLEDGE, ADMITTED)
def test_what_is_known_depends_neither_on_the_order_nor_on_how_often_it_was_heard(a, b, c, admitted):
    once = known(vector(a, b, c))
    for order in itertools.permutations([a, b, c]):
        assert known(vector(*order, admitted=admitted)) == once
    assert known(vector(a, b, a, c, b)) == once
    assert known(vector(a)) == a


@given(KNOWLEDGE, KNOWLEDGE, ADMITTED)
def test_hearing_more_never_lowers_a_stamp(a, b, admitted):
    x = vector(a, b, admitted=admitted)
    for peer in PEERS:
        assert x.stamp(peer) == max(a.get(peer, NOTHING), b.get(peer, NOTHING))


@given(KNOWLEDGE, ADMITTED, ADMITTED)
def test_admission_changes_nothing_that_is_known(a, before, after):
    x = vector(a, admitted=min(before, after))
    for peer in PEERS[min(before, after) : max(before, after)]:
        x.admit(peer)
    assert known(x) == a


@given(KNOWLEDGE, KNOWLEDGE, ADMITTED, ADMITTED)
def test_a_digest_shows_every_difference_whatever_orders_the_two_know(a, b, mine, theirs):
    x, y = vector(a, admitted=mine), vector(b, admitted=theirs)
    digest = decode(encode(y.digest()), Digest)
    digest.check()
    newer = x.newer_than(digest)
    assert set(ahead(x, y)) <= set(newer)
    assert len(newer) == len(set(newer))
    named = set(PEERS[:mine]) | (set(PEERS[theirs:]))  # what both can name
    assert set(newer) & named <= set(ahead(x, y)) | set(PEERS[mine:theirs])
    wanted = {y.peer_at(wish.who): wish.have for wish in x.older_than(digest)}
    expected = {peer: x.stamp(peer) for peer, stamp in ahead(y, x).items() if stamp.version != FORGOTTEN}
    assert wanted == {peer: have for peer, have in expected.items() if peer in named}


def test_digests_of_a_large_run_are_bounded_and_together_cover_it():
    order = [f"member{index:06}" for index in range(2 * MAX_DENSE + 10)]
    big = ordered(order)
    for peer in order:
        big.update(peer, Stamp(1, 1))
    strangers = [f"stranger{index:03}" for index in range(MAX_OTHERS + 5)]
    for peer in strangers:
        big.update(peer, Stamp(1, 1))
    empty = ordered(order)
    rng = random.Random(1)
    seen: set[str] = set()
    for _ in range(30):
        digest = empty.random_digest(rng)
        assert len(digest.versions) <= MAX_DENSE
        newer = big.newer_than(digest)
        seen.update(newer)
        ours = big.random_digest(rng)
        ours.check()
        assert len(ours.others) <= MAX_OTHERS
        assert len(encode(ours)) < 20_000
    assert seen == {*order, *strangers}
    # The interval of ids: absence says nothing outside it.
    first = big.digest()
    assert first.until == strangers[MAX_OTHERS - 1]
    more = vector({"stranger999": Stamp(1, 1), "stranger0": Stamp(1, 1)})
    assert set(more.newer_than(first)) == {"stranger0"}


def test_a_forgotten_peer_is_neither_sent_nor_asked_for_until_a_higher_incarnation():
    tomb = vector({"a": Stamp(2, FORGOTTEN)}, admitted=1)
    old, new = vector({"a": Stamp(2, 900)}, admitted=1), vector({"a": Stamp(3, 1)}, admitted=1)
    assert old.newer_than(tomb.digest()) == []
    assert old.older_than(tomb.digest()) == []
    assert new.newer_than(tomb.digest()) == ["a"]
    assert tomb.older_than(new.digest()) == [Wanted(0, Stamp(2, FORGOTTEN))]


@pytest.mark.parametrize(
    "digest",
    [
        Digest(2, 0, (1, 1), (1,), ()),
        Digest(2, 1, (1, 1), (1, 1), ()),
        Digest(0, 0, (), (), (OtherStamp("b", Stamp(1, 1)), OtherStamp("a", Stamp(1, 1)))),
        Digest(0, 0, (), (), (OtherStamp("a", Stamp(1, 1)), OtherStamp("a", Stamp(1, 1)))),
        Digest(0, 0, (), (), (OtherStamp("c", Stamp(1, 1)),), "", "b"),
    ],
)
def test_a_digest_whose_parts_do_not_fit_is_refused(digest):
    with pytest.raises(RemoteError, match="bad_digest"):
        digest.check()


def test_a_digest_with_more_entries_than_allowed_is_no_digest():
    many = Digest(3000, 0, (1,) * (MAX_DENSE + 1), (1,) * (MAX_DENSE + 1), ())
    with pytest.raises(RemoteError, match="bad_type"):
        decode(encode(many), Digest)


def test_nobody_is_admitted_twice_and_no_member_dropped():
    x = ordered("a")
    with pytest.raises(LocalError):
        x.admit("a")
    with pytest.raises(LocalError):
        x.drop("a")
