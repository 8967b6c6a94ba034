"""The status document: what is known of others, and no more."""

import msgspec

from node.reporting.document import proven_version
from p2pcoord.consensus.record import Counted, make_record
from tests.script_runner import authority_of, peer_id, scripted_round

A, B, C, D = (peer_id(letter) for letter in "ABCD")


def counted(peer: str, origin_round: int) -> Counted:
    return Counted(0, peer, origin_round, 0.5)


def test_the_newest_commit_shows_which_version_its_coordinator_and_contributors_have() -> None:
    contributors = (counted(B, 8), counted(C, 6))
    body = msgspec.structs.replace(scripted_round(8), contributors=contributors)
    record = make_record(authority_of("A"), height=9, term=1, previous=bytes(32), committee=0, body=body)
    assert [proven_version(record, member) for member in (A, B, C, D)] == [8, 7, 5, 0]
    assert proven_version(None, A) == 0
