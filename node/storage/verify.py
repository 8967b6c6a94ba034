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
    model          the model file against its checksum, and the state that it says it shows against the certified one of its
                   version. A node may have written no newer one yet

A running node changes the directory meanwhile: an unfinished last append is no fault, nor is an object that goes while it is
read. It stores its state some time after the certificate, and drops it once it has the next one, which may be sooner than
the log is checked: so objects are looked at from when the log was read on, again and again.

The log stops being checkable where it stops making sense, so its first fault is told, with frame and height. Damaged copies
and objects are independent of each other and are all told.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

from node.storage.export import MODEL_FILE, WRITTEN_ANEW
from node.storage.identity_key import FILE_NAME as KEY_FILE
from node.storage.identity_key import load as load_key
from node.storage.log_replay import Problem, Replay, Wrong
from node.storage.model_checksum import DamagedModel, check_model
from node.storage.objects import DamagedObject, MissingObject
from node.storage.store import Store
from p2pcoord.consensus.log import CorruptLog
from p2pcoord.content import ContentRef
from p2pcoord.errors import UserError

MAX_PROBLEMS: Final = 50
"""Problems told; a disk with more of them needs no longer list."""

LOOK_EVERY: Final = 100
"""Frames of the log between two looks at the objects: about a tenth of a second."""

LOOKS: Final = 20
LOOK_S: Final = 0.05
ATTEMPTS: Final = 4
"""A node stores its state within a second or two of certifying it, unless it fetches a later one at once; only a state that
stays away is a fault."""


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
    model: int = -1
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
            f"model file  {self._model_file()}",
        ]
        told += [f"WRONG       {problem}" for problem in self.problems]
        return [*told, "all is well" if self.ok else f"{len(self.problems)} wrong"]

    def _model_file(self) -> str:
        if self.model >= 0:
            return f"version {self.model}"
        # No fault: a node that has just joined, or was killed with its first certificate, has not come to write one.
        missing = self.version > 0 and not any(str(MODEL_FILE) in problem.what for problem in self.problems)
        return f"{MODEL_FILE} is missing. {WRITTEN_ANEW}" if missing else "-"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": self.ok, **msgspec.to_builtins(self)}


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
    for _ in range(ATTEMPTS):
        report = Verified(str(directory))
        with Store.open(directory, read_only=True) as store, _model_file(directory) as model:
            objects = _Objects(store, report)
            progress("objects")
            objects.look()
            states: dict[int, bytes] = {}
            state = _verify_log(store, report, states, objects, progress)
            if state is None or objects.come_to_hold(state, wait):
                _verify_model(model, states, report)
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


def _verify_log(
    store: Store,
    report: Verified,
    states: dict[int, bytes],
    objects: _Objects,
    progress: Callable[[str], object],
) -> ContentRef | None:
    """The state that must be here, when the log says so; `states` gets the state hashes of certified versions."""
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
        for number, payload in enumerate(recovery.payloads, 1):
            replay.take(payload)
            if number % LOOK_EVERY == 0:
                objects.look()
        replay.end()
        _check_key(store.path, replay)
    except Wrong as wrong:
        report.problems.append(wrong.problem)
    _fill(report, replay)
    states.update(replay.states)
    return None if any(p.frame is not None for p in report.problems) else replay.state


def _check_key(directory: Path, replay: Replay) -> None:
    if not (directory / KEY_FILE).exists():
        return  # a copy without its key can be checked all the same
    try:
        peer_id = load_key(directory).peer_id
    except UserError as error:
        raise Wrong(str(error), None) from None
    if peer_id != replay.owner:
        raise Wrong(f"the log belongs to {replay.owner}, the key beside it to {peer_id}", 0)


def _fill(report: Verified, replay: Replay) -> None:
    """What was seen so far."""
    report.peer_id, report.run_id, report.frames = replay.owner, replay.run.hex(), replay.frame
    report.term, report.votes, report.slots = replay.term, replay.votes, replay.slots
    report.version = replay.version
    report.state = replay.state.root.hex() if replay.state is not None else ""
    if (ledger := replay.ledger) is not None:
        report.records, report.certified = ledger.height + 1, ledger.certified
        report.certificates = len(ledger.certificates)
        report.lineage = ledger.hashes[ledger.certified].hex()


# Objects -------------------------------------------------------------------------------------------------------------


class _Objects:
    """The objects of a directory in which a node may run: each is checked when it is seen first."""

    def __init__(self, store: Store, report: Verified) -> None:
        self._store = store
        self._report = report
        self._seen: set[ContentRef] = set()

    def look(self) -> None:
        self._store.look_again()
        for ref in sorted(self._store.refs() - self._seen, key=lambda ref: ref.root):
            try:
                self._store.check(ref)
            except MissingObject:
                continue  # the node beside us needed it no more
            except DamagedObject as damaged:
                self._report.problems.append(Problem(str(damaged)))
            else:
                self._report.objects += 1
                self._report.object_bytes += ref.size_bytes
            self._seen.add(ref)

    def come_to_hold(self, state: ContentRef, wait: Callable[[float], object]) -> bool:
        """Whether the state was here at some time since the log was read, or comes within a moment."""
        for _ in range(LOOKS):
            if state in self._seen:
                return True
            wait(LOOK_S)
            self.look()
        return state in self._seen


# The model file -------------------------------------------------------------------------------------------------------


def _model_file(directory: Path) -> AbstractContextManager[BinaryIO | None]:
    """Opened before the log is read, so that the log is as new as the file; a node replaces the file, and never changes it."""
    try:
        return (directory / MODEL_FILE).open("rb")
    except FileNotFoundError:
        return nullcontext()
    except OSError as error:
        raise UserError(f"cannot read {directory / MODEL_FILE}: {error.strerror or error}") from error


def _verify_model(file: BinaryIO | None, states: dict[int, bytes], report: Verified) -> None:
    if file is None:
        return
    try:
        model = check_model(file)
    except DamagedModel as damaged:
        report.problems.append(
            Problem(f"{MODEL_FILE} is damaged: {damaged} (the node writes it anew when it starts)")
        )
        return
    report.model = model.version
    # Of a version that is not here nothing can be said: its round was compacted away, or the node was killed before the
    # certificate was on the disk.
    certified = states.get(model.version)
    if certified is not None and certified.hex() != model.state:
        report.problems.append(
            Problem(
                f"{MODEL_FILE} shows state {model.state} of version {model.version}, certified is {certified.hex()}"
            )
        )
