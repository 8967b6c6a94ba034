"""Records: what the log of a run consists of.

A *record* is a signed header (`statements.Header`) and a body. The header names height, term, the hash of the previous
header, the height of the last committee record at or below it, and the hash of the body; the hash of a header (without its
signature) is the record's name. There are five kinds of bodies:

    genesis     height 0, signed by the founder: the run's config, and what version 0 is made of
    opening     the first record of a term: the votes that elected its coordinator
    committee   a joint committee, or the one that ends it
    members     who was admitted, who left, who is excluded
    round       how a version was made from the one before, and out of which contributions

What may follow what in a log is for the ledger to say (`ledger.py`).
"""

from __future__ import annotations

from hashlib import sha256

import msgspec

from p2pcoord.consensus.evidence import SignedStatement
from p2pcoord.consensus.quorum import Committee
from p2pcoord.consensus.statements import Farewell, Header, Vote
from p2pcoord.content import ContentRef
from p2pcoord.errors import LocalError
from p2pcoord.identity import Authority
from p2pcoord.wire import encode

# Bodies travel inside messages and log frames, several at a time (MAX_MESSAGE_BYTES is 1 MiB).
MAX_BODY_BYTES = 64 << 10

# Genesis holds the pins of the workload: about 60 bytes a tensor, so 8,000 tensors.
MAX_GENESIS_BYTES = 512 << 10


# Bodies --------------------------------------------------------------------------------------------------------------


class Body(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all bodies."""


class Genesis(Body, frozen=True, tag="genesis"):
    """`config` is the canonical RunConfig; the run id is its hash. The founder is the first committee.

    `pins` are the canonical WorkloadPins, `state` is version 0, `dataset` and `frozen` the founder's data set and frozen
    parameters where the workload has any.
    """

    config: bytes
    founder: str
    pins: bytes = b""
    state: ContentRef | None = None
    dataset: ContentRef | None = None
    frozen: ContentRef | None = None


class Opening(Body, frozen=True, tag="opening"):
    """The first record of a term: the votes that elected its coordinator."""

    votes: tuple[Vote, ...]


class CommitteeChange(Body, frozen=True, tag="committee"):
    committee: Committee


class Admission(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A peer becomes a member; `proof` is HMAC(secret, run and joiner's id), empty in an open run.

    `addresses` are where it could be reached then: members that never heard its gossip can still dial it.
    """

    peer: str
    name: str
    proof: bytes
    addresses: tuple[str, ...] = ()


class Exclusion(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A member stops counting until the version `until` is certified (0: for good, which needs evidence)."""

    peer: str
    reason: str
    until: int
    evidence: tuple[SignedStatement, SignedStatement] | None = None


class Members(Body, frozen=True, tag="members"):
    admitted: tuple[Admission, ...] = ()
    left: tuple[Farewell, ...] = ()
    excluded: tuple[Exclusion, ...] = ()


class Counted(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One contribution inside a round. An (origin round, assignment) counts once in a run, whoever did it."""

    assignment: int
    contributor: str
    origin_round: int
    weight: float


class Totals(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a run came to so far: carried from round to round, as bodies of old rounds are dropped (compaction)."""

    training_step: int = 0
    """Local optimizer steps of all contributions that count."""
    best_version: int = 0
    best_loss: float | None = None
    """The lowest so far; None before the first loss."""
    best_checkpoint: bytes = b""
    """Root of the state of `best_version`; empty for version 0."""


class Round(Body, frozen=True, tag="round"):
    """Version `version` was made from the state `parent`, by this attempt, out of these contributions."""

    version: int
    parent: bytes
    attempt: bytes
    contributors: tuple[Counted, ...]
    result: bytes
    state: bytes
    state_bytes: int
    metrics: tuple[tuple[str, float], ...] = ()
    totals: Totals = Totals()
    """With this round."""


AnyBody = Genesis | Opening | CommitteeChange | Members | Round


def body_kind(body: AnyBody) -> str:
    return str(body.__struct_config__.tag)


# Records -------------------------------------------------------------------------------------------------------------


class Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`body` is None only for a round whose body was compacted away."""

    header: Header
    body: AnyBody | None


NO_PREVIOUS = bytes(32)


def body_hash(body: AnyBody) -> bytes:
    return sha256(encode(body)).digest()


def make_record(
    authority: Authority, *, height: int, term: int, previous: bytes, committee: int, body: AnyBody
) -> Record:
    """A signed record with the given place in the chain. Raises LocalError for a body over MAX_BODY_BYTES."""
    size = len(encode(body))
    limit = MAX_GENESIS_BYTES if isinstance(body, Genesis) else MAX_BODY_BYTES
    if size > limit:
        raise LocalError(f"a {body_kind(body)} record of {size} bytes; at most {limit}")
    own = height if isinstance(body, (Genesis, CommitteeChange)) else committee
    header = Header(height, term, previous, own, body_kind(body), body_hash(body), authority.peer_id)
    return Record(authority.sign(header), body)


def make_genesis(
    authority: Authority,
    config: bytes,
    pins: bytes = b"",
    state: ContentRef | None = None,
    dataset: ContentRef | None = None,
    frozen: ContentRef | None = None,
) -> Record:
    body = Genesis(config, authority.peer_id, pins, state, dataset, frozen)
    return make_record(authority, height=0, term=0, previous=NO_PREVIOUS, committee=0, body=body)
