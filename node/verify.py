"""`p2pcoord verify`: is what lies on this disk what a quorum signed?

Everything is checked anew from the bytes, by the core's own rules, with real signatures; nothing that the node remembers is
believed:

    frames         both copies of each, and that they decode to the one frame they can be
    owner          the key in the directory is the one that the log belongs to
    genesis        its signature, and that the run id is the hash of its config
    records        place in the chain, signature, votes behind each term, committees (`Ledger`), and what they say: versions
                   follow each other, an assignment counts once, contributors are members, goodbyes are signed
    certificates   a quorum of the right committee, over the record that is here
    standings      terms do not fall, are proven, and have one vote each
    slots          the owner's signature, one header a slot and life
    objects        every one against the hash it is named by; the certified state must be among them

A running node changes the directory meanwhile: an unfinished last append is no fault, nor is an object that goes while it is
read, and a state that is not here yet is waited for a moment.

The log stops being checkable where it stops making sense, so its first fault is told, with frame and height. Damaged copies
and objects are independent of each other and are all told.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from node.identity_key import FILE_NAME as KEY_FILE
from node.identity_key import load as load_key
from node.objects import DamagedObject, MissingObject
from node.store import Store
from p2pcoord.consensus.ledger import Genesis, Ledger, Members, Record, Round
from p2pcoord.consensus.log import CorruptLog
from p2pcoord.consensus.voter import Appended, Certified, Owner, Standing, Truncated, Voter
from p2pcoord.content import ContentRef
from p2pcoord.errors import LocalError, RemoteError, UserError
from p2pcoord.frames import Life, PeerFrame, Slot
from p2pcoord.identity import Authority, Signer, Verify, verify_ed25519
from p2pcoord.outbox import Outbox
from p2pcoord.rounds.participation import Roster
from p2pcoord.run_config import decode as decode_config
from p2pcoord.run_config import run_id
from p2pcoord.wire import decode

MAX_PROBLEMS: Final = 50
"""Problems told; a disk with more of them needs no longer list."""

ATTEMPTS: Final = 4
PAUSE_S: Final = 0.5
"""A node stores its state within a second or two of certifying it; only then is a missing one a fault."""

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


class Verified(msgspec.Struct):
    """What was found in one directory. `problems` is empty when all is well."""

    directory: str
    peer_id: str = ""
    run_id: str = ""
    frames: int = 0
    records: int = 0
    certified: int = 0
    certificates: int = 0
    term: int = 0
    votes: int = 0
    slots: int = 0
    version: int = 0
    lineage: str = ""
    state: str = ""
    objects: int = 0
    object_bytes: int = 0
    unfinished_tail: bool = False
    problems: list[Problem] = []

    @property
    def ok(self) -> bool:
        return not self.problems

    def lines(self) -> list[str]:
        """For people: what was checked, then what is wrong."""
        told = [
            f"directory   {self.directory}",
            f"peer        {self.peer_id or '-'}",
            f"run         {self.run_id or '-'}",
            f"log         {self.frames} frames, {self.slots} headers, {self.votes} votes, term {self.term}"
            + (", and an append that is not finished" if self.unfinished_tail else ""),
            f"records     {self.records}, certified up to height {self.certified} by {self.certificates} certificates",
            f"version     {self.version}, state {self.state or '-'}",
            f"objects     {self.objects} of {self.object_bytes} bytes",
        ]
        told += [f"WRONG       {problem}" for problem in self.problems]
        return [*told, "all is well" if self.ok else f"{len(self.problems)} wrong"]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": self.ok, **msgspec.to_builtins(self)}


class _Wrong(Exception):
    """The log makes no sense from here on. Never leaves this module."""

    def __init__(self, what: str, frame: int, height: int | None = None) -> None:
        super().__init__(what)
        self.problem = Problem(what, frame, height)


class _Nobody:
    """The owner's place in an `Authority` that signs nothing."""

    def __init__(self, peer_id: str) -> None:
        self.peer_id = peer_id

    def sign(self, data: bytes) -> bytes:
        raise LocalError("verifying signs nothing")


def verify(
    directory: Path,
    *,
    wait: Callable[[float], object] = time.sleep,
    progress: Callable[[str], object] = lambda line: None,
) -> Verified:
    """Checks a data directory, also one in which a node runs.

    Raises UserError when it is no data directory or cannot be read. `progress` is told what is looked at.
    """
    report = Verified(str(directory))
    for attempt in range(ATTEMPTS):
        if attempt:
            wait(PAUSE_S)
        report = Verified(str(directory))
        with Store.open(directory, read_only=True) as store:
            state = _verify_log(store, report, progress)
            if _verify_state(store, state, report):
                _verify_objects(store, state, report, progress)
                break
    else:
        report.problems.append(
            Problem(
                f"the state of version {report.version} is not here: object {report.state} (the node fetches it from "
                "others)",
                height=report.certified,
            )
        )
    del report.problems[MAX_PROBLEMS:]
    return report


# The log -------------------------------------------------------------------------------------------------------------


def _verify_log(store: Store, report: Verified, progress: Callable[[str], object]) -> ContentRef | None:
    """The state that must be here, when the log says so."""
    try:
        recovery = store.recovered()
    except CorruptLog as corrupt:
        report.problems.append(Problem(f"byte {corrupt.offset} of the log: {corrupt}", frame=corrupt.index))
        return None
    report.unfinished_tail = recovery.cut
    for offset in recovery.damaged:
        report.problems.append(
            Problem(f"byte {offset} of the log: one of a frame's two copies is damaged; the other is intact, and the node "
                    "repairs it when it starts")
        )  # fmt: skip
    if not recovery.payloads:
        report.problems.append(Problem("the log is empty: this node has not begun to take part in a run"))
        return None
    progress(f"{len(recovery.payloads)} frames")
    replay = Replay()
    try:
        for payload in recovery.payloads:
            replay.take(payload)
        replay.end()
        _check_key(store.path, replay)
    except _Wrong as wrong:
        report.problems.append(wrong.problem)
    replay.fill(report)
    return None if any(p.frame is not None for p in report.problems) else replay.state


def _check_key(directory: Path, replay: Replay) -> None:
    if not (directory / KEY_FILE).exists():
        return  # a copy without its key can be checked all the same
    try:
        peer_id = load_key(directory).peer_id
    except UserError as error:
        raise _Wrong(str(error), 0) from None
    if peer_id != replay.owner:
        raise _Wrong(f"the log belongs to {replay.owner}, the key beside it to {peer_id}", 0)


class Replay:
    """Takes a log's frames one after the other, and raises `_Wrong` at the first that cannot be right.

    `verify_signature` and `check_config` are for logs of the simulated world, whose keys and run ids are made up.
    """

    def __init__(self, verify_signature: Verify = verify_ed25519, *, check_config: bool = True) -> None:
        self._verify = verify_signature
        self._check_config = check_config
        self.owner = ""
        self.run = b""
        self.state: ContentRef | None = None
        self.version = 0
        self.frame = 0
        self._authority: Authority
        self._voter: Voter | None = None
        self._roster: Roster
        self._term = 0
        self._vote: tuple[str, bytes] | None = None
        self._votes: dict[int, tuple[str, bytes]] = {}
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

    def _wrong(self, what: str, height: int | None = None) -> _Wrong:
        return _Wrong(what, self.frame, height)

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
            self._voter.ledger.append(frame.record)
        elif isinstance(frame, Truncated):
            self._voter.ledger.truncate(frame.height)
        elif isinstance(frame, Certified):
            for record in self._voter.ledger.certify(frame.certificate):
                self._certified(record)
        else:
            self._slot(frame)

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

    def _stand(self, frame: Standing, voter: Voter) -> None:
        if frame.term < self._term:
            raise LocalError(f"term {frame.term} after term {self._term}")
        proven = voter.check_proof(frame.proof)
        if proven != frame.term:
            raise LocalError(f"term {frame.term} stands on a proof of term {proven}")
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

    def _check_weights(self, body: Round, height: int) -> None:
        weights = [counted.weight for counted in body.contributors]
        if not all(math.isfinite(w) and w >= 0 for w in weights) or abs(sum(weights) - 1) > WEIGHT_TOLERANCE:
            raise self._wrong(
                f"the weights of version {body.version} add up to {sum(weights)}, not to 1", height
            )

    def fill(self, report: Verified) -> None:
        """What was seen so far, for the report."""
        report.peer_id, report.run_id, report.frames = self.owner, self.run.hex(), self.frame
        report.term, report.votes, report.slots = self._term, len(self._votes), len(self._slots)
        report.version = self.version
        report.state = self.state.root.hex() if self.state is not None else ""
        if (ledger := self.ledger) is not None:
            report.records, report.certified = ledger.height + 1, ledger.certified
            report.certificates = len(ledger.certificates)
            report.lineage = ledger.hashes[ledger.certified].hex()


def _height_of(frame: PeerFrame) -> int | None:
    if isinstance(frame, Appended):
        return frame.record.header.height
    if isinstance(frame, Certified):
        return frame.certificate.height
    return frame.height if isinstance(frame, Truncated) else None


def replay_frames(payloads: Sequence[bytes], replay: Replay) -> Problem | None:
    """The first thing wrong in these frames; None when all is well."""
    try:
        for payload in payloads:
            replay.take(payload)
        replay.end()
    except _Wrong as wrong:
        return wrong.problem
    return None


# Objects -------------------------------------------------------------------------------------------------------------


def _verify_state(store: Store, state: ContentRef | None, report: Verified) -> bool:
    """Checks the certified state; False when it is not here, or was replaced while it was read."""
    if state is None:
        return True
    if not store.has(state):
        return False
    return _verify_object(store, state, report)


def _verify_objects(
    store: Store, state: ContentRef | None, report: Verified, progress: Callable[[str], object]
) -> None:
    others = sorted((ref for ref in store.refs() if ref != state), key=lambda ref: ref.root)
    progress(f"{len(others)} objects besides the state")
    for ref in others:
        _verify_object(store, ref, report)


def _verify_object(store: Store, ref: ContentRef, report: Verified) -> bool:
    """False when the object went away: the node beside us needed it no more."""
    try:
        store.check(ref)
    except MissingObject:
        return False
    except DamagedObject as damaged:
        report.problems.append(Problem(str(damaged)))
    else:
        report.objects += 1
        report.object_bytes += ref.size_bytes
    return True
