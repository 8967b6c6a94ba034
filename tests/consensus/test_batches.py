"""What goes into one message of records, and what may stay uncertified so that it always fits."""

from __future__ import annotations

import pytest

from p2pcoord.consensus import batches
from p2pcoord.consensus.batches import MAX_UNCERTIFIED, certified_from, has_room, records_from
from p2pcoord.consensus.ledger import BATCH_BYTES, Ledger
from p2pcoord.consensus.record import MAX_BODY_BYTES, AnyBody, Exclusion, Members, make_record
from p2pcoord.wire import encode
from tests.script_runner import SECRET, authority_of, certificate_by, history, peer_id, scripted_round


@pytest.fixture
def ledger() -> Ledger:
    """A certified history of A, B and C: heights 0 to 4, each with its certificate."""
    genesis, records, certificates = history("ABC", "ABC", SECRET)
    ledger = Ledger(authority_of("A"), genesis)
    for record in records:
        ledger.append(record)
        ledger.certify(certificates[record.header.height])
    return ledger


def order(ledger: Ledger, body: AnyBody) -> None:
    ledger.append(
        make_record(
            authority_of("A"),
            height=ledger.height + 1,
            term=1,
            previous=ledger.hashes[-1],
            committee=ledger.committee_height,
            body=body,
        )
    )


def test_a_batch_respects_its_limits_and_holds_at_least_one_record(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert records_from(ledger, 1) == tuple(ledger.records[1:])
    assert records_from(ledger, 5) == ()
    monkeypatch.setattr(batches, "BATCH_RECORDS", 2)
    assert records_from(ledger, 1) == tuple(ledger.records[1:3])
    monkeypatch.setattr(batches, "BATCH_BYTES", 1)
    assert records_from(ledger, 1) == (ledger.records[1],)


def test_certified_records_end_with_their_certificate(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in range(1, 4):
        order(ledger, scripted_round(version))
    ledger.certify(certificate_by("AB", ledger.records[6]))  # of 5 and 6; 7 stays uncertified
    answer = certified_from(ledger, 1)
    assert answer is not None
    assert answer.records == tuple(ledger.records[1:7])
    assert (answer.certificate, answer.more) == (ledger.certificates[6], 6)
    monkeypatch.setattr(batches, "BATCH_RECORDS", 3)
    answer = certified_from(ledger, 3)  # 3, 4, 5: back to the last that has a certificate
    assert answer is not None
    assert answer.records == tuple(ledger.records[3:5])
    assert (answer.certificate, answer.more) == (ledger.certificates[4], 6)
    monkeypatch.setattr(batches, "BATCH_RECORDS", 1)
    answer = certified_from(ledger, 5)  # only 5: on to the certificate that covers it
    assert answer is not None
    assert answer.records == tuple(ledger.records[5:7])
    assert answer.certificate == ledger.certificates[6]


@pytest.mark.parametrize("start", [-1, 0, 5, 99])
def test_there_are_no_certified_records_above_the_certificate_nor_is_genesis_one(
    ledger: Ledger, start: int
) -> None:
    order(ledger, scripted_round(1))
    assert certified_from(ledger, start) is None


def test_no_more_stays_uncertified_than_fits_one_message(ledger: Ledger) -> None:
    while has_room(ledger):
        order(ledger, Members(excluded=(Exclusion(peer_id("C"), "x" * (MAX_BODY_BYTES - 200), 0),)))
    assert sum(len(encode(record)) for record in ledger.records[5:]) <= BATCH_BYTES
    ledger.certify(certificate_by("AB", ledger.records[-1]))
    assert has_room(ledger)
    answer = certified_from(ledger, 5)
    assert answer is not None
    assert answer.records == tuple(ledger.records[5:])


def test_no_more_records_than_one_message_takes_stay_uncertified(ledger: Ledger) -> None:
    for version in range(MAX_UNCERTIFIED):
        assert has_room(ledger)
        order(ledger, scripted_round(version))
    assert not has_room(ledger)
