"""Every rule of a chain, one at a time: what breaks it is refused, and leaves the ledger as it was."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from p2pcoord.consensus.ledger import Fork, Ledger
from p2pcoord.consensus.quorum import MAX_SIGNATURES, Committee
from p2pcoord.consensus.record import (
    MAX_BODY_BYTES,
    Admission,
    AnyBody,
    CommitteeChange,
    Exclusion,
    Genesis,
    Members,
    Opening,
    Record,
    body_hash,
    make_genesis,
    make_record,
)
from p2pcoord.consensus.statements import Acknowledgement, Certificate, Vote, certificate_of
from p2pcoord.errors import LocalError, RemoteError
from tests.script_runner import (
    CONFIG,
    SECRET,
    authority_of,
    certificate_by,
    history,
    peer_id,
    scripted_round,
)

A, B, C, D, E, F = (peer_id(letter) for letter in "ABCDEF")


def chain(voters: str = "ABC", members: str = "ABC") -> Ledger:
    """A certified history: genesis, opening by A in term 1, members, J, N (heights 0 to 4 for three voters)."""
    genesis, records, certificates = history(voters, members, SECRET)
    ledger = Ledger(authority_of("A"), genesis)
    for record in records:
        ledger.append(record)
        ledger.certify(certificates[record.header.height])
    return ledger


def clone(ledger: Ledger) -> Ledger:
    twin = Ledger(authority_of("A"), ledger.records[0])
    for record in ledger.records[1:]:
        twin.append(record)
        if record.header.height in ledger.certificates:
            twin.certify(ledger.certificates[record.header.height])
    return twin


def state(ledger: Ledger) -> tuple[object, ...]:
    return (
        list(ledger.records),
        list(ledger.hashes),
        ledger.certified,
        dict(ledger.certificates),
        ledger.committee,
        ledger.committee_height,
        [ledger.coordinator_of(term) for term in range(9)],
    )


def following(ledger: Ledger, by: str, body: AnyBody, term: int | None = None) -> Record:
    return make_record(
        authority_of(by),
        height=ledger.height + 1,
        term=ledger.last.term if term is None else term,
        previous=ledger.hashes[-1],
        committee=ledger.committee_height,
        body=body,
    )


def votes(term: int, candidate: str, last: bytes, by: str) -> tuple[Vote, ...]:
    return tuple(
        authority_of(x[-1]).sign(Vote(term, peer_id(candidate), last, peer_id(x[0]))) for x in by.split()
    )


def opening(ledger: Ledger, by: str, term: int, voters: str) -> Record:
    return following(ledger, by, Opening(votes(term, by, ledger.hashes[-1], voters)), term)


def resigned(record: Record, by: str, **changes: object) -> Record:
    """The record with a changed header, signed again."""
    header = msgspec.structs.replace(record.header, signature=b"", **changes)
    return Record(authority_of(by).sign(header), record.body)


def round_(ledger: Ledger, by: str = "A", note: bytes = b"") -> Record:
    return following(ledger, by, scripted_round(ledger.height, note))


# Genesis


def test_genesis_is_certified_and_its_founder_is_the_committee() -> None:
    ledger = Ledger(authority_of("B"), make_genesis(authority_of("A"), CONFIG))
    assert ledger.height == ledger.certified == 0
    assert ledger.committee == Committee((A,))
    assert ledger.coordinator_of(0) == A
    assert ledger.newest_certificate is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda g: resigned(g, "A", height=1),
        lambda g: resigned(g, "A", term=1),
        lambda g: resigned(g, "A", previous=b"p" * 32),
        lambda g: resigned(g, "A", body=b"h" * 32),
        lambda g: resigned(g, "A", kind="round"),
        lambda g: Record(g.header, Genesis(b"another config", A)),
        lambda g: Record(g.header, None),
        lambda g: Record(g.header, scripted_round(0)),
        lambda g: make_genesis(authority_of("A"), b"").__class__(
            authority_of("B").sign(msgspec.structs.replace(g.header, coordinator=B)), g.body
        ),
        lambda g: Record(msgspec.structs.replace(g.header, signature=b"s" * 64), g.body),
    ],
)
def test_a_spoiled_genesis_is_refused(spoil: Callable[[Record], Record]) -> None:
    with pytest.raises(RemoteError):
        Ledger(authority_of("A"), spoil(make_genesis(authority_of("A"), CONFIG)))


# check_next


def test_a_record_that_follows_is_appended_and_not_certified() -> None:
    ledger = chain()
    ledger.append(round_(ledger))
    assert (ledger.height, ledger.certified) == (5, 4)


BROKEN: dict[str, Callable[[Ledger], Record]] = {
    "a height that is skipped": lambda ledger: resigned(round_(ledger), "A", height=ledger.height + 2),
    "a height that is taken": lambda ledger: resigned(round_(ledger), "A", height=ledger.height),
    "another previous record": lambda ledger: resigned(round_(ledger), "A", previous=b"p" * 32),
    "an earlier previous record": lambda ledger: resigned(round_(ledger), "A", previous=ledger.hashes[-2]),
    "an earlier term": lambda ledger: resigned(round_(ledger), "A", term=0),
    "a later term without an opening": lambda ledger: resigned(round_(ledger), "A", term=2),
    "another coordinator": lambda ledger: resigned(round_(ledger), "B", coordinator=B),
    "a signature by another": lambda ledger: resigned(round_(ledger), "B"),
    "no signature": lambda ledger: Record(
        msgspec.structs.replace(round_(ledger).header, signature=b""), round_(ledger).body
    ),
    "a body that is not the header's": lambda ledger: Record(round_(ledger).header, scripted_round(99)),
    "a kind that is not the body's": lambda ledger: resigned(round_(ledger), "A", kind="members"),
    "an older committee": lambda ledger: resigned(round_(ledger), "A", committee=0),
    "itself as the committee": lambda ledger: resigned(round_(ledger), "A", committee=ledger.height + 1),
    "members without their body": lambda ledger: Record(following(ledger, "A", Members()).header, None),
    "an opening without its body": lambda ledger: Record(opening(ledger, "B", 2, "A B").header, None),
    "a second opening in the term": lambda ledger: opening(ledger, "A", 1, "A B C"),
    "a second genesis": lambda ledger: following(ledger, "A", Genesis(CONFIG, A)),
    "a genesis of a later term": lambda ledger: following(ledger, "A", Genesis(CONFIG, A), 2),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_breaks_the_chain_is_refused_and_changes_nothing(case: str) -> None:
    ledger = chain()
    before = state(ledger)
    record = BROKEN[case](ledger)
    with pytest.raises(RemoteError):
        ledger.append(record)
    assert state(ledger) == before
    ledger.append(round_(ledger))  # and the right one still follows


def test_a_round_may_come_without_its_body() -> None:
    ledger = chain()
    ledger.append(Record(round_(ledger).header, None))
    assert ledger.records[-1].body is None


def test_a_body_over_its_size_is_refused_whoever_made_it() -> None:
    ledger = chain()
    small = following(ledger, "A", Members())
    body = Members(excluded=(Exclusion(A, "x" * MAX_BODY_BYTES, 0),))
    large = resigned(Record(small.header, body), "A", body=body_hash(body))
    with pytest.raises(RemoteError, match="bad_record"):
        ledger.append(large)


# Openings


def test_an_opening_raises_the_term_and_names_its_coordinator() -> None:
    ledger = chain()
    ledger.append(opening(ledger, "B", 5, "B C"))
    assert ledger.last.term == 5
    assert ledger.coordinator_of(5) == B
    assert ledger.coordinator_of(1) == A
    assert ledger.coordinator_of(3) is None
    record = ledger.opening(5)
    assert record is not None
    assert record.header.height == 5
    ledger.append(round_(ledger, "B"))
    with pytest.raises(RemoteError, match="bad_record"):
        ledger.append(round_(ledger, "A"))


@pytest.mark.parametrize(
    ("voters", "candidate"),
    [
        ("B", "B"),  # one of three
        ("B B", "B"),  # twice the same
        ("B D E", "B"),  # no voters
        ("B~C C", "B"),  # signed by another
        ("", "B"),
        ("A B C", "D"),  # a quorum, for a peer without a vote
    ],
)
def test_an_opening_needs_a_quorum_of_votes_for_a_voter(voters: str, candidate: str) -> None:
    ledger = chain(members="ABCDE")
    before = state(ledger)
    with pytest.raises(RemoteError):
        ledger.append(opening(ledger, candidate, 2, voters))
    assert state(ledger) == before


@pytest.mark.parametrize(
    "change",
    [{"term": 3}, {"candidate": C}, {"last": b"l" * 32}],
)
def test_the_votes_of_an_opening_name_its_term_its_coordinator_and_the_record_before(
    change: dict[str, object],
) -> None:
    ledger = chain()
    fields = {"term": 2, "candidate": B, "last": ledger.hashes[-1]} | change
    ballots = tuple(authority_of(x).sign(Vote(voter=peer_id(x), **fields)) for x in "BC")  # type: ignore[arg-type]
    with pytest.raises(RemoteError, match="bad_votes"):
        ledger.append(following(ledger, "B", Opening(ballots), 2))


# Committees


def change(ledger: Ledger, new: str, old: str = "") -> Record:
    return following(
        ledger,
        "A",
        CommitteeChange(Committee(tuple(peer_id(x) for x in new), tuple(peer_id(x) for x in old))),
    )


def test_a_committee_changes_through_the_joint_one() -> None:
    ledger = chain()
    ledger.append(change(ledger, "ABD", "ABC"))
    assert ledger.committee.joint
    assert ledger.committee_height == 5
    assert ledger.committee_at(4) == Committee((A, B, C))
    ledger.append(change(ledger, "ABD"))
    assert ledger.committee == Committee((A, B, D))
    assert ledger.committee_at(5) == Committee((A, B, D), (A, B, C))
    ledger.append(round_(ledger))
    assert ledger.last.committee == 6


@pytest.mark.parametrize(
    "steps",
    [
        ["ABD"],  # without the joint one
        ["ABC"],
        ["ABD,AB"],  # from a committee that is not the present one
        ["ABD,ACB"],  # its order counts
        ["ABD,ABC", "ABE"],  # ended by another half
        ["ABD,ABC", "ABC"],
        ["ABD,ABC", "ABE,ABD"],  # a joint one after a joint one
        ["AA,ABC"],  # the same voter twice
        [",ABC"],  # nobody
    ],
)
def test_any_other_way_to_change_it_is_refused(steps: list[str]) -> None:
    ledger = chain(members="ABCDE")
    for step in steps[:-1]:
        ledger.append(change(ledger, *step.split(",")))
    before = state(ledger)
    with pytest.raises(RemoteError, match="bad_committee"):
        ledger.append(change(ledger, *steps[-1].split(",")))
    assert state(ledger) == before


def test_other_records_may_lie_between_the_joint_committee_and_its_end() -> None:
    ledger = chain()
    ledger.append(change(ledger, "ABD", "ABC"))
    ledger.append(round_(ledger))
    assert ledger.last.committee == 5
    ledger.append(change(ledger, "ABD"))
    assert ledger.committee_at(6).joint


def test_a_quorum_of_votes_is_counted_over_the_committee_at_the_record_before() -> None:
    ledger = chain()
    ledger.append(change(ledger, "CDE", "ABC"))
    with pytest.raises(RemoteError):  # no majority of the incoming half
        ledger.append(opening(ledger, "C", 2, "A B C"))
    with pytest.raises(RemoteError):  # no majority of the outgoing half
        ledger.append(opening(ledger, "C", 2, "C D E"))
    ledger.append(opening(ledger, "C", 2, "B C D"))


# Truncation


def test_truncation_takes_committees_and_openings_with_it() -> None:
    ledger = chain()
    before = state(ledger)
    ledger.append(opening(ledger, "B", 2, "B C"))
    ledger.append(following(ledger, "B", CommitteeChange(Committee((A, B, D), (A, B, C)))))
    ledger.truncate(4)
    assert state(ledger) == before
    with pytest.raises(LocalError):
        ledger.truncate(3)
    assert state(ledger) == before


# Certificates


def test_a_quorum_certifies_a_record_and_all_below_it() -> None:
    ledger = chain()
    for _ in range(3):
        ledger.append(round_(ledger))
    covered = ledger.certify(certificate_by("AB", ledger.records[6]))
    assert [record.header.height for record in covered] == [5, 6]
    assert ledger.certified == 6
    assert ledger.newest_certificate == ledger.certificates[6]
    assert ledger.certify(certificate_by("BC", ledger.records[5])) == []
    assert ledger.certified == 6
    with pytest.raises(LocalError):
        ledger.truncate(5)


@pytest.mark.parametrize(
    "signers", [["A"], ["A", "A"], ["A", "D"], ["A", "B~C"], ["A", "B~A", "C~A"], ["D", "E", "F"]]
)
def test_less_than_a_quorum_certifies_nothing(signers: list[str]) -> None:
    ledger = chain(members="ABCDEF")
    ledger.append(round_(ledger))
    before = state(ledger)
    with pytest.raises(RemoteError, match="bad_certificate"):
        ledger.certify(certificate_by(signers, ledger.records[5]))
    assert state(ledger) == before


@pytest.mark.parametrize("padding", ["C~A", "D"])
def test_a_certificate_holds_true_signatures_of_its_committee_and_nothing_else(padding: str) -> None:
    """What is taken is kept, and passed on with every proof."""
    ledger = chain(members="ABCD")
    ledger.append(round_(ledger))
    with pytest.raises(RemoteError, match="none of its committee"):
        ledger.certify(certificate_by(["A", "B", padding], ledger.records[5]))
    assert ledger.certify(certificate_by("AB", ledger.records[5]))


def test_a_certificate_of_an_unknown_record_another_height_or_another_term_is_refused() -> None:
    ledger = chain()
    ledger.append(round_(ledger))
    good = certificate_by("AB", ledger.records[5])
    other = certificate_of(
        authority_of(x).sign(Acknowledgement(2, 5, ledger.hashes[5], peer_id(x))) for x in "AB"
    )
    assert ledger.certify(good)
    for certificate, kind in [
        (msgspec.structs.replace(good, record=b"r" * 32), "unknown_record"),
        (msgspec.structs.replace(good, height=6), "unknown_record"),
        (msgspec.structs.replace(good, height=-1), "unknown_record"),
        (msgspec.structs.replace(good, height=4), "unknown_record"),
        (other, "bad_certificate"),
    ]:
        with pytest.raises(RemoteError, match=kind):
            ledger.certify(certificate)


def test_more_signatures_than_any_committee_has_voters_are_not_even_checked() -> None:
    ledger = chain()
    ledger.append(round_(ledger))
    good = certificate_by("AB", ledger.records[5])
    padded = msgspec.structs.replace(good, signatures=good.signatures * MAX_SIGNATURES)
    with pytest.raises(RemoteError, match="more signatures"):
        ledger.check_certificate(padded)
    with pytest.raises(RemoteError, match="more signatures"):
        ledger.check_no_fork(msgspec.structs.replace(padded, height=4))


def test_a_certificate_is_counted_over_the_committee_at_its_height() -> None:
    ledger = chain()
    ledger.append(change(ledger, "CDE", "ABC"))
    for signers in ("AB", "CDE", "ABC"):
        with pytest.raises(RemoteError, match="bad_certificate"):
            ledger.certify(certificate_by(signers, ledger.records[5]))
    assert ledger.certify(certificate_by("ACD", ledger.records[5])) == [ledger.records[5]]
    ledger.append(change(ledger, "CDE"))
    with pytest.raises(RemoteError, match="bad_certificate"):
        ledger.certify(certificate_by("ABC", ledger.records[6]))
    assert ledger.certify(certificate_by("DE", ledger.records[6])) == [ledger.records[6]]


# Which committees prove a term


def test_the_last_certified_committee_and_all_above_it_prove_a_term() -> None:
    ledger = chain()
    assert ledger.live_committees() == [Committee((A, B, C))]
    ledger.append(change(ledger, "ABD", "ABC"))
    joint, half = Committee((A, B, D), (A, B, C)), Committee((A, B, D))
    assert ledger.live_committees() == [Committee((A, B, C)), joint, half]
    ledger.certify(certificate_by("AB", ledger.records[5]))
    assert ledger.live_committees() == [joint, half]
    ledger.append(change(ledger, "ABD"))
    assert ledger.live_committees() == [joint, half, half]
    ledger.certify(certificate_by("AB", ledger.records[6]))
    assert ledger.live_committees() == [half]


def test_a_replaced_committee_proves_terms_up_to_one_above_the_change() -> None:
    ledger = chain(members="ABCD")
    ledger.append(opening(ledger, "A", 4, "A B"))
    ledger.append(change(ledger, "ABD", "ABC"))
    ledger.append(change(ledger, "ABD"))
    ledger.certify(certificate_by("AB", ledger.records[-1]))
    old, new = Committee((A, B, C)), Committee((A, B, D))
    assert old in ledger.live_committees(5)
    assert old not in ledger.live_committees(6)
    assert Committee((A,)) not in ledger.live_committees(3)
    assert Committee((A,)) in ledger.live_committees(2)  # replaced in term 1
    assert all(new in ledger.live_committees(term) for term in range(9))


# Adopting a certified chain


def branch(base: Ledger, by: str = "B", term: int = 2, voters: str = "B C", rounds: int = 2) -> list[Record]:
    other = clone(base)
    other.append(opening(other, by, term, voters))
    for _ in range(rounds):
        other.append(round_(other, by))
    return other.records[base.height + 1 :]


def test_a_certified_chain_replaces_what_is_not_certified() -> None:
    ledger = chain()
    records = branch(ledger)
    ledger.append(round_(ledger))
    ledger.append(round_(ledger))
    kept, added = ledger.adopt(records, certificate_by("BC", records[-1]))
    assert (kept, added) == (4, records)
    assert ledger.records[5:] == records
    assert ledger.coordinator_of(2) == B
    assert ledger.certified == 4  # adopting does not certify
    assert ledger.certify(certificate_by("BC", records[-1])) == records


def test_records_that_are_held_already_are_kept() -> None:
    ledger = chain()
    records = branch(ledger)
    for record in records[:2]:
        ledger.append(record)
    assert ledger.adopt(records, certificate_by("BC", records[-1])) == (6, records[2:])
    assert ledger.adopt(records, certificate_by("BC", records[-1])) == (7, [])
    # A chain that is only the beginning of ours takes nothing away.
    assert ledger.adopt(records[:1], certificate_by("BC", records[0])) == (7, [])
    assert ledger.height == 7


FAILING: dict[str, Callable[[list[Record]], tuple[list[Record], Certificate]]] = {
    "no quorum": lambda records: (records, certificate_by("B", records[-1])),
    "a forged signature": lambda records: (records, certificate_by(["B", "C~B"], records[-1])),
    "a certificate of another record": lambda records: (
        records,
        msgspec.structs.replace(certificate_by("BC", records[-1]), record=b"r" * 32),
    ),
    "a certificate above the chain": lambda records: (records[:-1], certificate_by("BC", records[-1])),
    "a gap inside": lambda records: ([records[0], records[2]], certificate_by("BC", records[-1])),
    "a gap before": lambda records: (
        [resigned(records[2], "B", height=99)],
        certificate_by("BC", resigned(records[2], "B", height=99)),
    ),
    "a spoiled record": lambda records: (
        [records[0], Record(records[1].header, scripted_round(77)), records[2]],
        certificate_by("BC", records[-1]),
    ),
    "a record signed by another": lambda records: (
        [*records[:2], resigned(records[2], "C")],
        certificate_by("BC", records[-1]),
    ),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_failed_adoption_leaves_the_ledger_as_it_was(case: str) -> None:
    ledger = chain()
    records, certificate = FAILING[case](branch(ledger))
    ledger.append(round_(ledger))
    ledger.append(change(ledger, "ABD", "ABC"))
    before = state(ledger)
    with pytest.raises(RemoteError):
        ledger.adopt(records, certificate)
    assert state(ledger) == before
    ledger.append(change(ledger, "ABD"))


def test_a_second_certified_chain_is_a_fork() -> None:
    ledger = chain()
    records = branch(ledger)
    ledger.append(round_(ledger))
    ledger.certify(certificate_by("AC", ledger.records[5]))
    before = state(ledger)
    with pytest.raises(Fork, match="two certified chains"):
        ledger.adopt(records, certificate_by("BC", records[-1]))
    with pytest.raises(Fork, match="height 5"):
        ledger.check_no_fork(certificate_by("BC", records[0]))
    assert state(ledger) == before


def test_a_chain_against_the_certified_prefix_that_is_not_certified_is_only_refused() -> None:
    ledger = chain()
    records = branch(ledger)
    ledger.append(round_(ledger))
    ledger.certify(certificate_by("AC", ledger.records[5]))
    before = state(ledger)
    with pytest.raises(RemoteError, match="bad_certificate"):
        ledger.adopt(records, certificate_by("B", records[-1]))
    with pytest.raises(RemoteError, match="bad_certificate"):
        ledger.check_no_fork(certificate_by("B", records[0]))
    assert state(ledger) == before


@pytest.mark.parametrize("signers", ["B", "BC"])
def test_a_chain_against_the_certified_prefix_costs_no_more_than_its_own_length(
    signers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = chain()
    records = branch(ledger)
    ledger.append(round_(ledger))
    ledger.certify(certificate_by("AC", ledger.records[5]))
    checked: list[int] = []
    check = Ledger.check_next
    monkeypatch.setattr(
        Ledger, "check_next", lambda self, record: (checked.append(record.header.height), check(self, record))
    )
    with pytest.raises(RemoteError if signers == "B" else Fork):
        ledger.adopt(records, certificate_by(signers, records[-1]))
    assert checked == [record.header.height for record in records]


def test_a_certificate_of_what_is_certified_here_is_no_fork() -> None:
    ledger = chain()
    ledger.check_no_fork(certificate_by("BC", ledger.records[4]))
    ledger.check_no_fork(certificate_by("A", ledger.records[4]))
    ledger.check_no_fork(msgspec.structs.replace(certificate_by("BC", ledger.records[4]), height=77))


# Reading


def test_holds_knows_heights_and_names() -> None:
    ledger = chain()
    assert ledger.holds(4, ledger.hashes[4])
    assert not ledger.holds(4, ledger.hashes[3])
    assert not ledger.holds(5, ledger.hashes[4])
    assert not ledger.holds(-1, ledger.hashes[-1])


def test_a_chain_without_the_record_that_the_inviter_named_is_refused() -> None:
    source = chain()
    for trusted, fits in [((3, source.hashes[3]), True), ((3, b"r" * 32), False), ((99, b"r" * 32), True)]:
        joiner = Ledger(authority_of("E"), source.records[0], trusted)
        try:
            joiner.adopt(source.records[1:], source.certificates[4])
            assert fits
        except RemoteError as error:
            assert error.kind == "untrusted"
            assert not fits
            assert joiner.height == 0


def test_a_chain_that_admits_the_joiner_below_the_inviters_record_is_refused() -> None:
    """Nobody was admitted by that line before it was printed. A chain that is only shorter may grow."""
    source = chain()
    admits = following(source, "A", Members((Admission(peer_id("E"), "e", b""),)))
    source.append(admits)
    for trusted, fits in [
        ((5, source.hashes[5]), True),
        ((4, source.hashes[4]), True),
        ((6, b"r" * 32), False),
    ]:
        joiner = Ledger(authority_of("E"), source.records[0], trusted)
        for record in source.records[1:5]:
            joiner.append(record)
        if fits:
            joiner.append(admits)
        else:
            with pytest.raises(RemoteError, match="untrusted: admits this peer at 5, below the inviter's 6"):
                joiner.append(admits)


def test_another_genesis_than_the_one_that_the_inviter_named_is_refused() -> None:
    genesis = chain().records[0]
    assert Ledger(authority_of("E"), genesis, (0, chain().hashes[0])).height == 0
    with pytest.raises(RemoteError, match="untrusted"):
        Ledger(authority_of("E"), genesis, (0, b"r" * 32))
