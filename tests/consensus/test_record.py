"""One record: its header, its name, and how large it may be."""

from __future__ import annotations

import msgspec
import pytest

from p2pcoord.consensus.quorum import Committee
from p2pcoord.consensus.record import (
    MAX_BODY_BYTES,
    AnyBody,
    CommitteeChange,
    Exclusion,
    Members,
    Record,
    body_hash,
    make_genesis,
    make_record,
)
from p2pcoord.errors import LocalError
from tests.script_runner import CONFIG, authority_of, peer_id, scripted_round

A, B = peer_id("A"), peer_id("B")


def record(body: AnyBody) -> Record:
    return make_record(authority_of("B"), height=7, term=2, previous=b"p" * 32, committee=4, body=body)


def test_a_header_names_the_body_and_is_signed_by_who_made_the_record() -> None:
    body = scripted_round(1)
    header = record(body).header
    assert (header.kind, header.body, header.coordinator) == ("round", body_hash(body), B)
    authority_of("A").check(B, header)


def test_a_record_s_name_is_the_hash_of_its_header_without_the_signature() -> None:
    header = record(scripted_round(1)).header
    unsigned = msgspec.structs.replace(header, signature=b"")
    assert authority_of("B").hash(header) == authority_of("B").hash(unsigned)


def test_a_committee_record_counts_over_itself_and_any_other_over_the_one_below() -> None:
    assert record(CommitteeChange(Committee((A,)))).header.committee == 7
    assert record(scripted_round(1)).header.committee == 4
    assert make_genesis(authority_of("A"), CONFIG).header.committee == 0


def test_a_body_over_its_size_is_our_own_mistake_to_make() -> None:
    with pytest.raises(LocalError, match="at most"):
        record(Members(excluded=(Exclusion(A, "x" * MAX_BODY_BYTES, 0),)))
