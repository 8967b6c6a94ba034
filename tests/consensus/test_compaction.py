import msgspec
import pytest

from p2pcoord.consensus.batches import BATCH_RECORDS, certified_from
from p2pcoord.consensus.ledger import BATCH_BYTES, CERTIFICATE_SPACING, Ledger
from p2pcoord.consensus.record import MAX_BODY_BYTES, Exclusion, Members, Record, Round, make_record
from p2pcoord.consensus.statements import Certificate
from p2pcoord.consensus.voter import AnyFrame, Appended, Certified, Frame, Owner, Standing, Voter
from p2pcoord.outbox import Outbox
from p2pcoord.wire import decode, encode
from tests.script_runner import RUN, authority_of, certificate_by, history, peer_id, scripted_round

ROUNDS = 200


@pytest.fixture(scope="module")
def lived() -> tuple[Record, list[Frame]]:
    """What A, B and C have certified together: a committee of three and 200 rounds, each with its certificate."""
    genesis, records, certificates = history("ABC", "ABC", b"secret")
    ledger = Ledger(authority_of("A"), genesis)
    frames: list[Frame] = [Owner(peer_id("A"), RUN), Appended(genesis)]

    def add(record: Record, certificate: Certificate) -> None:
        ledger.append(record)
        ledger.certify(certificate)
        frames.extend((Appended(record), Certified(certificate)))

    for record in records:
        add(record, certificates[record.header.height])
    for version in range(1, ROUNDS + 1):
        record = make_record(
            authority_of("A"),
            height=ledger.height + 1,
            term=1,
            previous=ledger.hashes[-1],
            committee=ledger.committee_height,
            body=scripted_round(version),
        )
        add(record, certificate_by("AB", record))
    return genesis, frames


def voter_of(genesis: Record, frames: list[Frame]) -> Voter:
    voter = Voter(authority_of("A"), Outbox(), genesis)
    voter.restore([decode(encode(frame), AnyFrame) for frame in frames])  # type: ignore[arg-type]
    return voter


def test_a_compacted_log_has_the_same_chain_and_fewer_bytes(lived: tuple[Record, list[Frame]]) -> None:
    genesis, frames = lived
    voter = voter_of(genesis, frames)
    before = list(voter.ledger.hashes)
    voter.ledger.compact(voter.ledger.certified - 20)
    compacted = voter.compacted_frames()
    again = voter_of(genesis, compacted)
    assert again.ledger.hashes == before
    assert again.ledger.certified == voter.ledger.certified
    assert again.ledger.committee == voter.ledger.committee
    assert sum(len(encode(f)) for f in compacted) < 0.7 * sum(len(encode(f)) for f in frames)


def test_only_bodies_of_old_rounds_go(lived: tuple[Record, list[Frame]]) -> None:
    voter = voter_of(*lived)
    height = voter.ledger.certified - 20
    voter.ledger.compact(height)
    for at, record in enumerate(voter.ledger.records):
        is_old_round = record.header.kind == "round" and at <= height
        assert (record.body is None) == is_old_round
    kept = [r.body.version for r in voter.ledger.records if isinstance(r.body, Round)]
    assert kept == list(range(ROUNDS - 19, ROUNDS + 1))


def test_every_batch_still_ends_with_a_certificate(lived: tuple[Record, list[Frame]]) -> None:
    voter = voter_of(*lived)
    voter.ledger.compact(voter.ledger.certified - 20)
    heights = sorted(voter.ledger.certificates)
    gaps = [after - before for before, after in zip([0, *heights], heights, strict=False)]
    assert max(gaps) <= CERTIFICATE_SPACING < BATCH_RECORDS
    assert heights[-1] == voter.ledger.certified


def test_step_by_step_as_much_is_dropped_as_at_once(lived: tuple[Record, list[Frame]]) -> None:
    step_by_step, at_once = voter_of(*lived).ledger, voter_of(*lived).ledger
    for height in range(at_once.certified - 20):
        step_by_step.compact(height + 1)
    at_once.compact(at_once.certified - 20)
    assert step_by_step.records == at_once.records
    assert step_by_step.certificates == at_once.certificates
    assert len(at_once.certificates) < 20 + ROUNDS / CERTIFICATE_SPACING + 5


def test_what_one_certificate_covers_fits_one_message_however_large_its_records() -> None:
    genesis, records, certificates = history("ABC", "ABC", b"secret")
    ledger = Ledger(authority_of("A"), genesis)
    for record in records:
        ledger.append(record)
        ledger.certify(certificates[record.header.height])
    for _ in range(30):
        body = Members(excluded=(Exclusion(peer_id("C"), "x" * (MAX_BODY_BYTES - 200), 1),))
        height, previous = ledger.height + 1, ledger.hashes[-1]
        record = make_record(
            authority_of("A"), height=height, term=1, previous=previous, committee=4, body=body
        )
        ledger.append(record)
        ledger.certify(certificate_by("AB", record))
    ledger.compact(ledger.certified - 2)
    assert len(ledger.certificates) < 10
    for start in range(1, ledger.certified + 1):
        answer = certified_from(ledger, start)
        assert answer is not None
        assert sum(len(encode(record)) for record in answer.records) <= BATCH_BYTES


def test_the_vote_and_the_proof_of_the_term_stay(lived: tuple[Record, list[Frame]]) -> None:
    genesis, frames = lived
    proof = next(f.certificate for f in reversed(frames) if isinstance(f, Certified))
    voter = voter_of(genesis, [*frames, Standing(1, peer_id("B"), b"l" * 32, proof)])
    voter.ledger.compact(voter.ledger.certified)
    again = voter_of(genesis, voter.compacted_frames())
    assert (again.term, again.voted_for, again.voted_last, again.proof) == (1, peer_id("B"), b"l" * 32, proof)


def test_what_is_not_certified_is_never_dropped(lived: tuple[Record, list[Frame]]) -> None:
    genesis, frames = lived
    voter = voter_of(genesis, frames[:-1])  # the last record without its certificate
    voter.ledger.compact(voter.ledger.height + 5)
    assert voter.ledger.records[-1].body is not None


def test_a_chain_whose_old_bodies_are_gone_is_still_checked(lived: tuple[Record, list[Frame]]) -> None:
    genesis, frames = lived
    voter = voter_of(genesis, frames)
    voter.ledger.compact(voter.ledger.certified - 20)
    at = voter.ledger.certified - 50
    forged = msgspec.structs.replace(voter.ledger.records[at].header, body=bytes(32))
    records = [*voter.ledger.records[1:at], Record(forged, None), *voter.ledger.records[at + 1 :]]
    joiner = Ledger(authority_of("B"), genesis)
    with pytest.raises(Exception, match=r"bad_signature|does not extend"):
        joiner.adopt(records, voter.ledger.certificates[voter.ledger.certified])
    assert joiner.height == 0
