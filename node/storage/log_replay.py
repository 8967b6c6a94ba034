"""The log of a node, replayed by somebody who believes nothing of it: the checks of `verify` on its frames.

A `Replay` is given the frames one after the other. Each is decoded, and judged by the core's own rules on what the frames before
it built up: the ledger, the term and its one vote, the roster, the lives and their slots. The first frame that cannot be right
raises `Wrong`; what follows it means nothing.

A compacted log (`Voter.compacted_frames`) begins with genesis and the standing, before the records that made its voters; and old
rounds have lost their bodies, so that only their headers are checked.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from p2pcoord.consensus.ledger import Ledger
from p2pcoord.consensus.record import Genesis, Members, Record, Round
from p2pcoord.consensus.voter import Appended, Certified, Owner, Standing, Truncated, Voter
from p2pcoord.content import ContentRef
from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.frames import PeerFrame
from p2pcoord.identity import Authority, Signer, Verify, verify_ed25519
from p2pcoord.outbox import Outbox
from p2pcoord.rounds.frames import Checked, Life, Slot
from p2pcoord.rounds.participation import Roster
from p2pcoord.run_config import decode as decode_config
from p2pcoord.run_config import run_id
from p2pcoord.wire import decode

WEIGHT_TOLERANCE: Final = 1e-3
"""Weights are float32 shares of one: rounding a thousand of them adds up to less."""


class Problem(msgspec.Struct, frozen=True):
    """What is wrong, and where: the log's frame and the record's height, as far as they apply."""

    what: str
    frame: int | None = None
    height: int | None = None

    def __str__(self) -> str:
        places = [
            f"{name} {at}" for name, at in (("frame", self.frame), ("height", self.height)) if at is not None
        ]
        return f"{', '.join(places)}: {self.what}" if places else self.what


class Wrong(Exception):
    """The log makes no sense from here on. Caught by `verify`."""

    def __init__(self, what: str, frame: int | None, height: int | None = None) -> None:
        super().__init__(what)
        self.problem = Problem(what, frame, height)


class _Nobody:
    """The owner's place in an `Authority` that signs nothing."""

    def __init__(self, peer_id: str) -> None:
        self.peer_id = peer_id

    def sign(self, data: bytes) -> bytes:
        raise LocalError("verifying signs nothing")


class Replay:
    """Takes a log's frames one after the other, and raises `Wrong` at the first that cannot be right.

    `verify_signature` and `check_config` are for logs of the simulated world, whose keys and run ids are made up.
    """

    def __init__(self, verify_signature: Verify = verify_ed25519, *, check_config: bool = True) -> None:
        self._verify = verify_signature
        self._check_config = check_config
        self.owner = ""
        self.run = b""
        self.state: ContentRef | None = None
        self.version = 0
        self.states: dict[int, bytes] = {}
        """The certified state hash of each version whose round is here."""
        self.frame = 0
        self._authority: Authority
        self._voter: Voter | None = None
        self._roster: Roster
        self._term = 0
        self._vote: tuple[str, bytes] | None = None
        self._votes: dict[int, tuple[str, bytes]] = {}
        self._early: tuple[int, Standing] | None = None
        """The standing of a compacted log, and its frame: its proof is checked at the end."""
        self._life = 0
        self._slots: dict[tuple[int, int, int], bytes] = {}
        self._counted: set[tuple[int, int]] = set()

    @property
    def ledger(self) -> Ledger | None:
        return self._voter.ledger if self._voter is not None else None

    def take(self, payload: bytes) -> None:
        """The next frame."""
        try:
            frame: PeerFrame = decode(payload, PeerFrame, limit=len(payload))  # type: ignore[arg-type]  # a union is a type
        except RemoteError as error:
            raise self._wrong(f"no frame of this program: {error}") from None
        try:
            self._take(frame)
        except (RemoteError, LocalError) as error:
            raise self._wrong(str(error), _height_of(frame)) from None
        self.frame += 1

    def end(self) -> None:
        """After the last frame."""
        if self._voter is None:
            raise self._wrong("the log ends before its genesis")
        if self._early is not None:
            at, standing = self._early
            try:
                _check_proof(standing, self._voter)
            except (RemoteError, LocalError) as error:
                raise Wrong(str(error), at) from None

    def _wrong(self, what: str, height: int | None = None) -> Wrong:
        return Wrong(what, self.frame, height)

    def _take(self, frame: PeerFrame) -> None:
        if isinstance(frame, Owner):
            if self.frame:
                raise LocalError("a second owner")
            self.owner, self.run = frame.peer_id, frame.run
            signer: Signer = _Nobody(frame.peer_id)
            self._authority = Authority(signer, self._verify, frame.run)
            self._roster = Roster(self._authority, None)
        elif not self.frame:
            raise LocalError("the log does not begin with its owner")
        elif isinstance(frame, Life):
            if frame.incarnation <= self._life:
                raise LocalError(f"life {frame.incarnation} after life {self._life}")
            self._life = frame.incarnation
        elif self._voter is None:
            if not isinstance(frame, Appended):
                raise LocalError("the log does not begin with genesis")
            self._begin(frame.record)
        elif isinstance(frame, Standing):
            self._stand(frame, self._voter)
        elif isinstance(frame, Appended):
            if not self._voter.ledger.fill(frame.record):
                self._voter.ledger.append(frame.record)
            elif isinstance(frame.record.body, Round):  # certified before, its version counted
                self.version -= 1
                self._check_round(frame.record.body, frame.record.header.height)
        elif isinstance(frame, Truncated):
            self._voter.ledger.truncate(frame.height)
        elif isinstance(frame, Certified):
            for record in self._voter.ledger.certify(frame.certificate):
                self._certified(record)
        elif isinstance(frame, Slot):
            self._slot(frame)
        else:
            self._checked(frame)

    def _begin(self, genesis: Record) -> None:
        body = genesis.body
        if not isinstance(body, Genesis):
            raise LocalError("the log does not begin with genesis")
        if self._check_config:
            config = decode_config(body.config)
            if run_id(config) != self.run:
                raise LocalError(
                    f"this is genesis of run {run_id(config).hex()}, the log is of {self.run.hex()}"
                )
            if config.founder != body.founder:
                raise LocalError(f"the config was founded by {config.founder}, genesis by {body.founder}")
        self._voter = Voter(self._authority, Outbox(self.owner), genesis)
        self._roster.apply([genesis])
        self.state = body.state
        if body.state is not None:
            self.states[0] = body.state.root

    def _stand(self, frame: Standing, voter: Voter) -> None:
        if frame.term < self._term:
            raise LocalError(f"term {frame.term} after term {self._term}")
        if voter.ledger.height == 0 and frame.term > 1:
            self._early = (
                self.frame,
                frame,
            )  # a compacted log: who proved the term became voters in what follows
        else:
            _check_proof(frame, voter)
        vote = None if frame.voted_for is None else (frame.voted_for, frame.voted_last)
        if frame.term == self._term and self._vote is not None and vote != self._vote:
            told = (
                "nobody"
                if vote is None
                else vote[0]
                if vote[0] != self._vote[0]
                else f"{vote[0]} with another log"
            )
            raise LocalError(f"two votes in term {frame.term}: {self._vote[0]}, then {told}")
        self._term, self._vote = frame.term, vote
        if vote is not None:
            self._votes[frame.term] = vote

    def _slot(self, frame: Slot) -> None:
        header = frame.header
        if header.contributor != self.owner:
            raise LocalError(f"a header of {header.contributor} in the log of {self.owner}")
        self._authority.check(self.owner, header)
        if header.incarnation > self._life:
            raise LocalError(f"a header of life {header.incarnation} in life {self._life}")
        place, name = (*header.slot, header.incarnation), self._authority.hash(header)
        if self._slots.setdefault(place, name) != name:
            raise LocalError(
                f"two headers in one slot: round {header.origin_round}, assignment {header.assignment}, "
                f"life {header.incarnation}"
            )

    def _checked(self, frame: Checked) -> None:
        self._authority.check(frame.attempt.coordinator, frame.attempt)
        self._authority.check(frame.result.sender, frame.result)
        for header in frame.headers:
            self._authority.check(header.contributor, header)

    def _certified(self, record: Record) -> None:
        """What a record says, once the chain before it is certain."""
        body, height = record.body, record.header.height
        if isinstance(body, Round):
            self._check_round(body, height)
        elif isinstance(body, Members):
            if reason := self._roster.check(body):
                raise self._wrong(reason, height)
        elif body is None:
            self.version += 1  # its body was compacted away; the next one that has a body says which version is its parent
            self.state = None
        self._roster.apply([record])

    def _check_round(self, body: Round, height: int) -> None:
        if body.version != self.version + 1:
            raise self._wrong(f"version {body.version} after version {self.version}", height)
        if self.state is not None and body.parent != self.state.root:
            raise self._wrong(f"version {body.version} was not made from the version before it", height)
        for counted in body.contributors:
            slot = (counted.origin_round, counted.assignment)
            if slot in self._counted:
                raise self._wrong(
                    f"assignment {counted.assignment} of round {counted.origin_round} counts twice", height
                )
            if counted.origin_round > body.version:
                raise self._wrong(
                    f"a contribution of round {counted.origin_round} in version {body.version}", height
                )
            if not self._roster.is_member(counted.contributor):
                raise self._wrong(f"{counted.contributor} contributed and is no member", height)
            self._counted.add(slot)
        self._check_weights(body, height)
        self.version = body.version
        self.state = ContentRef(body.state, body.state_bytes)
        self.states[body.version] = body.state

    def _check_weights(self, body: Round, height: int) -> None:
        weights = [counted.weight for counted in body.contributors]
        if not all(math.isfinite(w) and w >= 0 for w in weights) or abs(sum(weights) - 1) > WEIGHT_TOLERANCE:
            raise self._wrong(
                f"the weights of version {body.version} add up to {sum(weights)}, not to 1", height
            )

    @property
    def term(self) -> int:
        return self._term

    @property
    def votes(self) -> int:
        """In how many terms this peer voted."""
        return len(self._votes)

    @property
    def slots(self) -> int:
        """How many headers it signed."""
        return len(self._slots)


def _check_proof(frame: Standing, voter: Voter) -> None:
    """Raises unless a quorum that the log knows proved the term."""
    proven = voter.check_proof(frame.proof)
    if proven != frame.term:
        raise LocalError(f"term {frame.term} stands on a proof of term {proven}")


def _height_of(frame: PeerFrame) -> int | None:
    if isinstance(frame, Appended):
        return frame.record.header.height
    if isinstance(frame, Certified):
        return frame.certificate.height
    return frame.height if isinstance(frame, Truncated) else None
