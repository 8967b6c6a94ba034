"""State records: what survives the wire and what a signature covers."""

import math

import msgspec
import pytest

from p2pcoord.gossip.records import CapabilityProfile, PeerRecord, urgent_part, weigh
from p2pcoord.identity import Authority, Ed25519Signer, verify_ed25519
from p2pcoord.wire import decode, encode

replace = msgspec.structs.replace


def test_a_record_signed_with_ed25519_survives_the_wire_and_not_a_changed_byte():
    authority = Authority(Ed25519Signer(bytes(range(32))), verify_ed25519, b"run" * 8)
    profile = CapabilityProfile("cuda:0", 80 << 30, 16)
    signed = authority.sign(
        PeerRecord(
            authority.peer_id, 1, 1, "lab", ("/ip4/10.0.0.1/tcp/4001",), profile=profile, local_loss=2.5
        )
    )
    assert authority.verify(signed.peer, decode(encode(signed), PeerRecord))
    assert not authority.verify(signed.peer, replace(signed, queue_length=1))
    assert len(encode(signed)) < 400


@pytest.mark.parametrize("signature", [b"", b"x" * 23, b"x" * 24, b"x" * 64])
def test_a_record_weighs_what_it_has_on_the_wire_and_its_content_is_hashed_without_the_signature(signature):
    record = PeerRecord("a", 1, 1, "name", local_loss=math.nan)
    content, size = weigh(replace(record, signature=signature))
    assert size == len(encode(replace(record, signature=signature)))
    assert content == weigh(record)[0] != weigh(replace(record, local_step=1))[0]


@pytest.mark.parametrize(
    ("change", "urgent"),
    [
        ({"name": "other"}, True),
        ({"addresses": ("/ip4/10.0.0.1/tcp/1",)}, True),
        ({"reachable": False}, True),
        ({"links": ("b",)}, True),
        ({"leaving": True}, True),
        ({"incarnation": 2}, True),
        ({"version": 2}, False),
        ({"local_step": 5, "local_loss": 1.0, "queue_length": 2}, False),
        ({"profile": CapabilityProfile("cuda:0")}, False),
    ],
)
def test_how_a_peer_is_reached_and_whether_it_stays_is_urgent(change, urgent):
    record = PeerRecord("a", 1, 1, "name")
    assert (urgent_part(replace(record, **change)) != urgent_part(record)) is urgent
