import hashlib
import hmac

import msgspec
import pytest

from p2pcoord.consensus.record import (
    MAX_BODY_BYTES,
    Admission,
    Exclusion,
    Members,
    Record,
    make_genesis,
    make_record,
)
from p2pcoord.consensus.statements import Farewell
from p2pcoord.rounds.participation import (
    MAX_ADMISSIONS,
    MAX_NAME_LENGTH,
    MAX_PEER_ID_LENGTH,
    MAX_PROOF_BYTES,
    Roster,
    join_proof,
)
from p2pcoord.wire import encode
from tests.script_runner import CONFIG, RUN, SECRET, authority_of, peer_id, scripted_round

A, B, C, D = (peer_id(letter) for letter in "ABCD")
GENESIS = make_genesis(authority_of("A"), CONFIG)


def roster(secret: bytes | None = SECRET) -> Roster:
    result = Roster(authority_of("A"), secret)
    result.apply([GENESIS])
    return result


def admission(peer: str, name: str = "name", secret: bytes = SECRET) -> Admission:
    return Admission(peer, name, join_proof(secret, RUN, peer))


def farewell(letter: str, height: int) -> Farewell:
    return authority_of(letter).sign(Farewell(peer_id(letter), height))


def record(height: int, body: Members) -> Record:
    return make_record(authority_of("A"), height=height, term=1, previous=bytes(32), committee=0, body=body)


def version(height: int, number: int) -> Record:
    body = scripted_round(number)
    return make_record(authority_of("A"), height=height, term=1, previous=bytes(32), committee=0, body=body)


def test_the_founder_is_the_first_member() -> None:
    assert roster().members == (A,)
    assert roster().name_of(A) == "", "genesis does not say what it is called"
    assert roster().name_of(B) == ""


def test_members_count_in_order_of_admission() -> None:
    r = roster()
    r.apply([record(1, Members((admission(C, "c"), admission(B, "b"))))])
    assert list(r.members) == [A, C, B]
    assert r.name_of(C) == "c"
    r.apply([record(2, Members(left=(farewell("C", 1),)))])
    assert list(r.members) == [A, B]
    r.apply([record(3, Members((admission(C),)))])
    assert list(r.members) == [A, B, C]


def test_who_has_left_keeps_its_name() -> None:
    r = roster()
    r.apply([record(1, Members((admission(C, "c"), admission(B, "b"))))])
    r.apply([record(2, Members(left=(farewell("C", 1),)))])
    assert r.departed == (C,)
    assert r.name_of(C) == "c"
    r.apply([record(3, Members((admission(C, "new"),)))])
    assert r.departed == ()
    assert r.name_of(C) == "new"


def test_the_roster_depends_on_the_records_only() -> None:
    records = [
        record(1, Members((admission(B), admission(C)))),
        record(2, Members(excluded=(Exclusion(C, "liar", 5),))),
        version(3, 4),
        record(4, Members((admission(D),), left=(farewell("B", 1),))),
        version(5, 5),
    ]
    whole, stepwise = roster(), roster()
    whole.apply(records)
    for one in records:
        stepwise.apply([one])
    expected = (A, C, D)
    assert whole.members == expected
    assert stepwise.members == expected


def test_a_proof_is_an_hmac_of_run_and_joiner() -> None:
    expected = hmac.new(SECRET, b"p2pcoord join 1\x00" + RUN + B.encode(), hashlib.sha256).digest()
    assert join_proof(SECRET, RUN, B) == expected
    assert roster().proves(admission(B)) == ""


@pytest.mark.parametrize(
    "proof",
    [
        b"",
        bytes(32),
        join_proof(b"guess", RUN, B),
        join_proof(SECRET, b"s" * 32, B),
        join_proof(SECRET, RUN, C),
    ],
)
def test_a_proof_with_another_secret_for_another_run_or_joiner_does_not_hold(proof: bytes) -> None:
    request = Admission(B, "b", proof)
    assert roster().proves(request) == "wrong secret"
    assert "wrong secret" in roster().check(Members((request,)))
    assert roster(None).proves(request) == ""  # an open run asks for none


def test_who_is_a_member_is_not_admitted_again() -> None:
    assert "member already" in roster().check(Members((admission(A),)))


@pytest.mark.parametrize(
    "request_",
    [
        Admission(B, "x" * (MAX_NAME_LENGTH + 1), b""),
        Admission("1" * (MAX_PEER_ID_LENGTH + 1), "b", b""),
        Admission(B, "b", bytes(MAX_PROOF_BYTES + 1)),
        Admission("\U0001f600" * 60, "b", b""),
    ],
)
def test_what_a_joiner_sends_is_bounded_in_an_open_run_too(request_: Admission) -> None:
    assert roster(None).check(Members((request_,)))
    assert roster(None).check(Members((Admission(B, "x" * MAX_NAME_LENGTH, bytes(MAX_PROOF_BYTES)),))) == ""


def test_the_largest_batch_of_admissions_fits_a_record() -> None:
    largest = Admission("1" * MAX_PEER_ID_LENGTH, "\U0001f600" * MAX_NAME_LENGTH, bytes(MAX_PROOF_BYTES))
    assert len(encode(Members((largest,) * MAX_ADMISSIONS))) <= MAX_BODY_BYTES
    assert roster(None).check(Members((largest,) * MAX_ADMISSIONS)) == ""
    assert "too many" in roster(None).check(Members((largest,) * (MAX_ADMISSIONS + 1)))


def test_a_farewell_is_the_member_s_own_word() -> None:
    r = roster()
    r.apply([record(5, Members((admission(B), admission(C))))])
    assert r.check(Members(left=(farewell("B", 5),))) == ""
    assert "not signed" in r.check(Members(left=(authority_of("C").sign(Farewell(B, 5)),)))
    assert "no member" in r.check(Members(left=(farewell("D", 5),)))


def test_an_old_farewell_does_not_undo_a_later_admission() -> None:
    r = roster()
    old = farewell("B", 5)
    r.apply([record(5, Members((admission(B),)))])
    r.apply([record(6, Members(left=(old,)))])
    assert not r.is_member(B)
    assert r.check(Members((admission(B),))) == ""
    r.apply([record(7, Members((admission(B),)))])
    assert "admitted again" in r.check(Members(left=(old,)))
    assert r.check(Members(left=(farewell("B", 7),))) == ""


def test_an_excluded_member_does_not_count_until_its_version() -> None:
    r = roster()
    r.apply([record(1, Members((admission(B),))), record(2, Members(excluded=(Exclusion(B, "late", 3),)))])
    assert list(r.members) == [A]
    assert r.excluded(B) == "late"
    assert "excluded: late" in r.check(Members((admission(B),)))
    r.apply([version(3, 2)])
    assert not r.is_member(B)
    r.apply([version(4, 3)])
    assert r.is_member(B)
    assert r.excluded(B) == ""


def test_leaving_and_coming_back_does_not_shorten_an_exclusion() -> None:
    r = roster()
    r.apply([record(1, Members((admission(B),))), record(2, Members(excluded=(Exclusion(B, "liar", 0),)))])
    assert r.check(Members(left=(farewell("B", 2),))) == ""
    r.apply([record(3, Members(left=(farewell("B", 2),)))])
    assert "excluded: liar" in r.check(Members((admission(B),)))
    r.apply([version(4, 1000)])  # for good
    assert not r.is_member(B)


def test_the_wait_doubles_with_every_exclusion_up_to_64_versions() -> None:
    r = roster()
    r.apply([version(1, 10)])
    waits = []
    for height in range(2, 10):
        exclusion = r.exclusion_of(B, "late")
        waits.append(exclusion.until - r.version)
        r.apply([record(height, Members(excluded=(exclusion,)))])
    assert waits == [2, 4, 8, 16, 32, 64, 64, 64]


def test_without_evidence_nobody_is_excluded_for_good_or_for_long() -> None:
    r = roster()
    r.apply([record(1, Members((admission(B),)))])
    assert "without evidence" in r.check(Members(excluded=(Exclusion(B, "disliked", 0),)))
    assert "without evidence" in r.check(Members(excluded=(Exclusion(B, "disliked", 1000),)))
    assert r.check(Members(excluded=(r.exclusion_of(B, "late"),))) == ""


def test_only_members_are_excluded() -> None:
    assert "no member" in roster().check(Members(excluded=(Exclusion(B, "late", 3),)))
    assert roster().check(Members(excluded=(Exclusion(A, "late", 3),))) == ""


def test_a_run_has_no_more_members_than_gossip_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pcoord.rounds.participation.MAX_RUN_MEMBERS", 2)
    assert roster().check(Members(admitted=(admission(peer_id("B")),))) == ""
    both = Members(admitted=(admission(peer_id("B")), admission(peer_id("C"))))
    assert "at most 2 members" in roster().check(both)


def test_addresses_are_few_as_well_as_short() -> None:
    many = msgspec.structs.replace(admission(peer_id("B")), addresses=("",) * 70_000)
    assert "addresses" in roster().check(Members(admitted=(many,)))
