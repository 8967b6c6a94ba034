"""Version vectors: the laws of the lattice, and digests between peers that know different orders of admission."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.gossip.version_vector import (
    FORGOTTEN,
    MAX_DENSE,
    MAX_OTHERS,
    NOTHING,
    Comparison,
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


def vector(known: dict[str, Stamp], admitted: int = 0) -> VersionVector:
    made = VersionVector(PEERS[:admitted])
    for peer, stamp in known.items():
        made.update(peer, stamp)
    return made


def merged(*parts: VersionVector) -> dict[str, Stamp]:
    whole = VersionVector()
    for part in parts:
        whole.merge(part)
    return dict(whole.items())


@given(KNOWLEDGE, KNOWLEDGE, KNOWLEDGE, ADMITTED)
def test_merge_is_commutative_associative_and_idempotent(a, b, c, admitted):
    x, y, z = vector(a, admitted), vector(b), vector(c)
    assert merged(x, y) == merged(y, x)
    xy, yz = vector(merged(x, y)), vector(merged(y, z))
    assert merged(xy, z) == merged(x, yz)
    assert merged(x, x) == a


@given(KNOWLEDGE, KNOWLEDGE, ADMITTED)
def test_merging_never_lowers_a_stamp(a, b, admitted):
    x = vector(a, admitted)
    x.merge(vector(b))
    for peer in PEERS:
        assert x.stamp(peer) == max(a.get(peer, NOTHING), b.get(peer, NOTHING))


@given(KNOWLEDGE, KNOWLEDGE, ADMITTED)
def test_comparison_agrees_with_the_differences(a, b, admitted):
    x, y = vector(a, admitted), vector(b)
    expected = {
        (False, False): Comparison.EQUAL,
        (True, False): Comparison.AFTER,
        (False, True): Comparison.BEFORE,
        (True, True): Comparison.CONCURRENT,
    }
    assert x.compare(y) is expected[bool(x.difference(y)), bool(y.difference(x))]
    assert vector(merged(x, y)).compare(x) in (Comparison.EQUAL, Comparison.AFTER)


@given(KNOWLEDGE, ADMITTED, ADMITTED)
def test_admission_changes_nothing_that_is_known(a, before, after):
    x = vector(a, min(before, after))
    for peer in PEERS[min(before, after) : max(before, after)]:
        x.admit(peer)
    assert dict(x.items()) == a


@given(KNOWLEDGE, KNOWLEDGE, ADMITTED, ADMITTED)
def test_a_digest_shows_every_difference_whatever_orders_the_two_know(a, b, mine, theirs):
    x, y = vector(a, mine), vector(b, theirs)
    digest = decode(encode(y.digest()), Digest)
    digest.check()
    newer = x.newer_than(digest)
    assert set(x.difference(y)) <= set(newer)
    assert len(newer) == len(set(newer))
    named = set(PEERS[:mine]) | (set(PEERS[theirs:]))  # what both can name
    assert set(newer) & named <= set(x.difference(y)) | set(PEERS[mine:theirs])
    wanted = {y.peer_at(wish.who): wish.have for wish in x.older_than(digest)}
    expected = {peer: x.stamp(peer) for peer, stamp in y.difference(x).items() if stamp.version != FORGOTTEN}
    assert wanted == {peer: have for peer, have in expected.items() if peer in named}


def test_digests_of_a_large_run_are_bounded_and_together_cover_it():
    order = [f"member{index:06}" for index in range(2 * MAX_DENSE + 10)]
    big = VersionVector(order)
    for peer in order:
        big.update(peer, Stamp(1, 1))
    strangers = [f"stranger{index:03}" for index in range(MAX_OTHERS + 5)]
    for peer in strangers:
        big.update(peer, Stamp(1, 1))
    empty = VersionVector(order)
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
    tomb = vector({"a": Stamp(2, FORGOTTEN)}, 1)
    old, new = vector({"a": Stamp(2, 900)}, 1), vector({"a": Stamp(3, 1)}, 1)
    assert old.newer_than(tomb.digest()) == []
    assert old.older_than(tomb.digest()) == []
    assert new.newer_than(tomb.digest()) == ["a"]
    assert tomb.older_than(new.digest()) == [Wanted(0, Stamp(2, FORGOTTEN))]
    assert tomb.max_version == 0
    assert new.max_version == 1


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
    x = VersionVector(["a"])
    with pytest.raises(LocalError):
        x.admit("a")
    with pytest.raises(LocalError):
        x.drop("a")
