"""A run made by hand: records, votes and certificates with real Ed25519 keys, and the data directory that one peer has of it.

It goes the shortest way that has everything: A founds and opens term 1 alone, B and C are admitted, the committee grows to
three, and a round is certified.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from node.storage.directory import FORMAT
from node.storage.identity_key import _PRIVATE_KEY_PREFIX, FILE_NAME
from node.storage.store import Store
from p2pcoord.aggregation.contribution import ContributionHeader
from p2pcoord.consensus.ledger import Ledger
from p2pcoord.consensus.messages import Grants, Votes
from p2pcoord.consensus.quorum import Committee
from p2pcoord.consensus.record import (
    Admission,
    AnyBody,
    CommitteeChange,
    Counted,
    Members,
    Opening,
    Record,
    Round,
    make_genesis,
    make_record,
)
from p2pcoord.consensus.statements import Acknowledgement, Certificate, Grant, Vote, certificate_of
from p2pcoord.consensus.voter import Appended, Certified, Owner, Standing
from p2pcoord.content import ContentRef, manifest_of
from p2pcoord.frames import PeerFrame
from p2pcoord.identity import Authority, Ed25519Signer, verify_ed25519
from p2pcoord.rounds.frames import Life, Slot
from p2pcoord.run_config import RunSettings, found_run, run_id
from p2pcoord.run_config import encode as encode_config
from p2pcoord.wire import encode

STATES = tuple(bytes([version]) * 3000 for version in range(4))


class SignedRun:
    """`frames` are what A's log holds; `certify` and the rest add to it."""

    def __init__(self) -> None:
        self.seeds = [bytes([number]) * 32 for number in (1, 2, 3)]
        signers = [Ed25519Signer(seed) for seed in self.seeds]
        self.peers = tuple(signer.peer_id for signer in signers)
        config = found_run(RunSettings(), founder=self.peers[0], nonce=b"n" * 16, workload_spec="text")
        self.run = run_id(config)
        self.authorities = [Authority(signer, verify_ed25519, self.run) for signer in signers]
        self.states = [manifest_of(state).ref for state in STATES]
        genesis = make_genesis(self.authorities[0], encode_config(config), state=self.states[0])
        self.ledger = Ledger(self.authorities[0], genesis)
        self.frames: list[PeerFrame] = [Owner(self.peers[0], self.run), Appended(genesis), Life(1)]
        self.term = 0

    # Building

    def open_term(self, voters: Sequence[int] = (0,)) -> None:
        """A becomes coordinator of the next term by these voters' grants and votes."""
        self.term += 1
        a, last = self.peers[0], self.ledger.hashes[-1]
        grants = Grants(tuple(self.authorities[v].sign(Grant(self.term, a, self.peers[v])) for v in voters))
        votes = self.votes(a, last, voters)
        self.frames += [Standing(self.term, a, last, grants), Standing(self.term, a, last, Votes(votes))]
        self.certify(Opening(votes), voters)

    def votes(self, candidate: str, last: bytes, voters: Sequence[int]) -> tuple[Vote, ...]:
        return tuple(
            self.authorities[v].sign(Vote(self.term, candidate, last, self.peers[v])) for v in voters
        )

    def append(self, body: AnyBody) -> Record:
        record = make_record(
            self.authorities[0],
            height=self.ledger.height + 1,
            term=self.term,
            previous=self.ledger.hashes[-1],
            committee=self.ledger.committee_height,
            body=body,
        )
        self.ledger.append(record)
        self.frames.append(Appended(record))
        return record

    def certificate(self, voters: Sequence[int]) -> Certificate:
        """Of the last record, by these voters."""
        height, name = self.ledger.height, self.ledger.hashes[-1]
        return certificate_of(
            self.authorities[v].sign(Acknowledgement(self.term, height, name, self.peers[v])) for v in voters
        )

    def certify(self, body: AnyBody, voters: Sequence[int] = (0,)) -> None:
        self.append(body)
        certificate = self.certificate(voters)
        self.ledger.certify(certificate)
        self.frames.append(Certified(certificate))

    def grow(self) -> None:
        """B and C join and become voters."""
        a, b, c = self.peers
        self.certify(Members(admitted=(Admission(b, "lab2", b""), Admission(c, "lab3", b""))))
        self.certify(CommitteeChange(Committee((a, b, c), (a,))), (0, 1))
        self.certify(CommitteeChange(Committee((a, b, c))), (0, 2))

    def round(self, version: int) -> Round:
        """A round by A and B."""
        counted = tuple(
            Counted(number, self.peers[number], version, weight) for number, weight in ((0, 0.25), (1, 0.75))
        )
        state = self.states[version]
        return Round(
            version,
            self.states[version - 1].root,
            b"attempt" * 4 + b"0000",
            counted,
            b"r" * 32,
            state.root,
            state.size_bytes,
            (("loss", 1.5),),
        )

    def slot(self, number: int = 0, *, samples: int = 10) -> Slot:
        """A's header for one assignment of round 1."""
        content = ContentRef(b"c" * 32, 100)
        header = ContributionHeader(
            1, number, 1, self.peers[0], self.states[0].root, content, samples, 5, 0.5, 1.5, 1000
        )
        return Slot(self.authorities[0].sign(header))

    def complete(self) -> SignedRun:
        """All of it: term 1, three voters, version 1."""
        self.open_term()
        self.grow()
        self.frames.append(self.slot())
        self.certify(self.round(1), (0, 1))
        return self

    # On disk

    def write(
        self, directory: Path, *, states: Sequence[int] = (1,), frames: Sequence[PeerFrame] = ()
    ) -> Path:
        """A data directory with these frames (all, by default), each in an append of its own, and states."""
        with Store.open(directory) as store:
            for frame in frames or self.frames:
                store.append([encode(frame)])
            for version in states:
                store.put(STATES[version])
        key = directory / FILE_NAME
        key.write_bytes(_PRIVATE_KEY_PREFIX + self.seeds[0] + bytes(_public(self.seeds[0])))
        key.chmod(0o600)
        assert (directory / "format").read_bytes() == FORMAT
        return directory


def _public(seed: bytes) -> bytes:
    from nacl.signing import SigningKey

    return bytes(SigningKey(seed).verify_key)


def replaced(frames: Sequence[PeerFrame], at: int, frame: PeerFrame) -> list[PeerFrame]:
    return [*frames[:at], frame, *frames[at + 1 :]]


def with_fields(struct: msgspec.Struct, **fields: object) -> msgspec.Struct:
    return msgspec.structs.replace(struct, **fields)
