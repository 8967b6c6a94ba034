"""verify: what a quorum signed passes, and each way in which a directory can be wrong is named with its place."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from node.storage.identity_key import FILE_NAME as KEY_FILE
from node.storage.log_replay import Problem, Replay, Wrong
from node.storage.store import Store
from node.storage.verify import Verified, verify
from p2pcoord.consensus.messages import Votes
from p2pcoord.consensus.record import Admission, Counted, Exclusion, Members, Record, Round
from p2pcoord.consensus.statements import Farewell
from p2pcoord.consensus.voter import Appended, Certified, Owner, Standing, Truncated
from p2pcoord.errors import UserError
from p2pcoord.frames import PeerFrame
from p2pcoord.rounds.frames import Life
from p2pcoord.run_config import RunSettings, found_run
from p2pcoord.run_config import encode as encode_config
from p2pcoord.wire import encode
from tests.node.storage.model_files import write_model
from tests.node.storage.signed_run import STATES, SignedRun, replaced


@pytest.fixture
def run() -> SignedRun:
    return SignedRun().complete()


def checked(directory: Path) -> Verified:
    return verify(directory, wait=lambda seconds: None)


def problem_of(frames: list[PeerFrame]) -> Problem | None:
    return first_problem([encode(frame) for frame in frames])


def first_problem(payloads: list[bytes]) -> Problem | None:
    replay = Replay()
    try:
        for payload in payloads:
            replay.take(payload)
        replay.end()
    except Wrong as wrong:
        return wrong.problem
    return None


def only_problem(report: Verified) -> Problem:
    assert len(report.problems) == 1, report.lines()
    return report.problems[0]


def test_a_whole_directory_passes_and_its_figures_are_told(run: SignedRun, tmp_path: Path) -> None:
    report = checked(run.write(tmp_path / "a", states=(0, 1)))
    assert report.ok, report.lines()
    assert (report.peer_id, report.run_id) == (run.peers[0], run.run.hex())
    assert (report.frames, report.records, report.certified, report.certificates) == (
        len(run.frames),
        6,
        5,
        5,
    )
    assert (report.term, report.votes, report.slots, report.version) == (1, 1, 1, 1)
    assert report.state == run.states[1].root.hex()
    assert report.lineage == run.ledger.hashes[-1].hex()
    assert (report.objects, report.object_bytes) == (2, 6000)
    assert report.lines()[-1] == "all is well"
    assert json.loads(msgspec.json.encode(report.as_dict()))["ok"] is True


def test_the_model_file_is_whole_and_shows_a_certified_state(run: SignedRun, tmp_path: Path) -> None:
    directory = run.write(tmp_path / "a")
    report = checked(directory)
    assert (report.ok, report.model) == (True, -1)
    assert (
        "model file  model/latest.safetensors is missing. Start the node: it writes the file anew"
        in report.lines()
    )
    for version in (1, 0):  # the newest, and between certificate and replacement the one before
        path = write_model(directory, version, run.states[version].root.hex())
        report = checked(directory)
        assert report.ok, report.lines()
        assert report.model == version
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert only_problem(checked(directory)).what.startswith("model/latest.safetensors is damaged: "), at
    for cut in (0, 5, 60, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert only_problem(checked(directory)).what.startswith("model/latest.safetensors is damaged: "), cut
    write_model(directory, 1, run.states[2].root.hex())
    assert only_problem(checked(directory)).what == (
        f"model/latest.safetensors shows state {run.states[2].root.hex()} of version 1, certified is {run.states[1].root.hex()}"
    )


def test_an_unfinished_append_of_a_running_node_is_no_fault(run: SignedRun, tmp_path: Path) -> None:
    directory = run.write(tmp_path / "a")
    with Store.open(directory):  # a node holds the lock
        log = directory / "log"
        whole = log.read_bytes()
        with log.open("ab") as file:
            file.write(whole[:100])
        report = checked(directory)
        assert report.ok, report.lines()
        assert report.unfinished_tail
        assert log.stat().st_size == len(whole) + 100  # nothing was repaired


@pytest.mark.parametrize("at", [5, 60, 100, 700])
def test_a_flipped_byte_of_one_copy_is_named_by_its_place(run: SignedRun, tmp_path: Path, at: int) -> None:
    directory = run.write(tmp_path / "a")
    data = bytearray((directory / "log").read_bytes())
    data[at] ^= 0x10
    (directory / "log").write_bytes(data)
    problem = only_problem(checked(directory))
    assert "one of a frame's two copies is damaged" in problem.what


def test_both_copies_damaged_is_named_by_its_frame(run: SignedRun, tmp_path: Path) -> None:
    directory = run.write(tmp_path / "a")
    data = bytearray((directory / "log").read_bytes())
    data[70] ^= 1
    half = len(encode(run.frames[0])) + 64
    data[half + 70] ^= 1
    (directory / "log").write_bytes(data)
    problem = only_problem(checked(directory))
    assert problem.frame == 0
    assert "both copies are damaged" in problem.what


def test_a_forged_certificate_is_named_by_frame_and_height(run: SignedRun, tmp_path: Path) -> None:
    last = run.frames[-1]
    assert isinstance(last, Certified)
    (a, good), (b, _) = last.certificate.signatures
    forged = msgspec.structs.replace(last.certificate, signatures=((a, good), (b, bytes(64))))
    directory = run.write(
        tmp_path / "a", frames=replaced(run.frames, -1 % len(run.frames), Certified(forged))
    )
    problem = only_problem(checked(directory))
    assert (problem.frame, problem.height) == (len(run.frames) - 1, 5)
    assert "a signature that is none of its committee's" in problem.what
    assert str(problem).startswith(f"frame {len(run.frames) - 1}, height 5: ")


def test_a_certificate_by_a_minority_is_no_certificate(run: SignedRun) -> None:
    run.append(run.round(2))
    run.frames.append(Certified(run.certificate((0,))))
    problem = problem_of(run.frames)
    assert problem is not None
    assert "no quorum at height 6" in problem.what


def test_two_votes_in_one_term_are_named(run: SignedRun) -> None:
    standing = next(f for f in run.frames if isinstance(f, Standing))
    for second in (
        Standing(standing.term, run.peers[1], standing.voted_last, standing.proof),
        Standing(standing.term, standing.voted_for, b"x" * 32, standing.proof),
        Standing(standing.term, None, b"", standing.proof),
    ):
        problem = problem_of([*run.frames, second])
        assert problem is not None
        assert problem.frame == len(run.frames)
        assert problem.what.startswith(f"two votes in term 1: {run.peers[0]}, then ")


def test_a_term_without_proof_and_a_falling_term_are_named(run: SignedRun) -> None:
    standing = next(f for f in run.frames if isinstance(f, Standing))
    higher = problem_of([*run.frames, Standing(7, None, b"", standing.proof)])
    assert higher is not None
    assert "term 7 stands on a proof of term 1" in higher.what
    lower = problem_of([*run.frames, Standing(0, None, b"", None)])
    assert lower is not None
    assert "term 0 after term 1" in lower.what
    run.term = 9
    liar = Votes(run.votes(run.peers[1], b"x" * 32, (1,)))
    alone = problem_of([*run.frames, Standing(9, None, b"", liar)])
    assert alone is not None
    assert "unproven" in alone.what


def test_a_missing_state_object_is_named_with_its_height(run: SignedRun, tmp_path: Path) -> None:
    waited: list[float] = []
    report = verify(run.write(tmp_path / "a", states=(0,)), wait=waited.append)
    problem = only_problem(report)
    assert problem.height == 5
    assert problem.what.startswith(f"the state of version 1 is not here: object {run.states[1].root.hex()}")
    assert waited  # a running node might have been about to store it


def test_a_state_that_comes_while_verify_waits_is_found(run: SignedRun, tmp_path: Path) -> None:
    directory = run.write(tmp_path / "a", states=(0,))

    def store_it(seconds: float) -> None:
        with Store.open(directory) as store:
            store.put(STATES[1])

    assert verify(directory, wait=store_it).ok


def test_a_state_that_goes_while_the_log_is_checked_was_here(run: SignedRun, tmp_path: Path) -> None:
    """As a node does that has the next one already."""
    directory = run.write(tmp_path / "a", states=(0, 1))
    root = run.states[1].root.hex()
    file = directory / "objects" / root[:2] / root

    def drop_it(line: str) -> None:
        if line.endswith("frames"):
            file.unlink()

    report = verify(directory, wait=lambda seconds: None, progress=drop_it)
    assert report.ok
    assert not file.exists()
    assert not checked(directory).ok


def test_a_damaged_state_object_is_named(run: SignedRun, tmp_path: Path) -> None:
    directory = run.write(tmp_path / "a", states=(0, 1))
    root = run.states[1].root.hex()
    file = directory / "objects" / root[:2] / root
    data = bytearray(file.read_bytes())
    data[1234] ^= 1
    file.chmod(0o600)
    file.write_bytes(data)
    problem = only_problem(checked(directory))
    assert root in problem.what
    assert "changed on the disk" in problem.what


def test_a_record_that_was_changed_after_signing_is_named(run: SignedRun) -> None:
    at = next(
        i for i, f in enumerate(run.frames) if isinstance(f, Appended) and isinstance(f.record.body, Round)
    )
    frame = run.frames[at]
    assert isinstance(frame, Appended)
    body = msgspec.structs.replace(frame.record.body, metrics=(("loss", 0.1),))
    problem = problem_of(replaced(run.frames, at, Appended(Record(frame.record.header, body))))
    assert problem is not None
    assert (problem.frame, problem.height) == (at, 5)
    assert "header and body disagree" in problem.what
    header = msgspec.structs.replace(frame.record.header, signature=bytes(64))
    problem = problem_of(replaced(run.frames, at, Appended(Record(header, frame.record.body))))
    assert problem is not None
    assert "bad_signature" in problem.what


def test_certified_records_are_never_cut_off(run: SignedRun) -> None:
    problem = problem_of([*run.frames, Truncated(3)])
    assert problem is not None
    assert problem.height == 3
    assert "below the certified height 5" in problem.what


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"version": 3}, "version 3 after version 1"),
        ({"parent": b"p" * 32}, "was not made from the version before it"),
        ({"contributors": (Counted(0, "A", 1, 1.0),)}, "assignment 0 of round 1 counts twice"),
        ({"contributors": (Counted(0, "A", 9, 1.0),)}, "a contribution of round 9 in version 2"),
        ({"contributors": (Counted(0, "stranger", 2, 1.0),)}, "contributed and is no member"),
        ({"contributors": (Counted(0, "A", 2, 0.5),)}, "add up to 0.5, not to 1"),
    ],
)
def test_a_round_that_a_quorum_signed_is_still_checked_for_what_it_says(
    run: SignedRun, changes: dict[str, object], told: str
) -> None:
    if "contributors" in changes:
        (counted,) = changes["contributors"]  # type: ignore[misc]
        peer = run.peers[0] if counted.contributor == "A" else counted.contributor
        changes = {"contributors": (msgspec.structs.replace(counted, contributor=peer),)}
    run.certify(msgspec.structs.replace(run.round(2), **changes), (0, 1))
    problem = problem_of(run.frames)
    assert problem is not None
    assert problem.height == 6
    assert told in problem.what


def test_goodbyes_are_checked_for_their_signature(run: SignedRun) -> None:
    farewell = Farewell(run.peers[2], 5, bytes(64))
    run.certify(Members(left=(farewell,)), (0, 1))
    problem = problem_of(run.frames)
    assert problem is not None
    assert "is not signed by it" in problem.what


def test_members_that_left_or_are_excluded_do_not_contribute(run: SignedRun) -> None:
    run.certify(Members(excluded=(Exclusion(run.peers[1], "late", 3),)), (0, 1))
    run.certify(run.round(2), (0, 1))
    problem = problem_of(run.frames)
    assert problem is not None
    assert f"{run.peers[1]} contributed and is no member" in problem.what


def test_two_headers_in_one_slot_are_named(run: SignedRun) -> None:
    assert problem_of([*run.frames, run.slot()]) is None  # the same one again is none
    problem = problem_of([*run.frames, run.slot(samples=11)])
    assert problem is not None
    assert "two headers in one slot: round 1, assignment 0, life 1" in problem.what


def test_a_header_by_another_or_unsigned_is_named(run: SignedRun) -> None:
    slot = run.slot(1)
    header = msgspec.structs.replace(slot.header, signature=bytes(64))
    problem = problem_of([*run.frames, msgspec.structs.replace(slot, header=header)])
    assert problem is not None
    assert "bad_signature" in problem.what
    header = msgspec.structs.replace(slot.header, contributor=run.peers[1])
    problem = problem_of([*run.frames, msgspec.structs.replace(slot, header=header)])
    assert problem is not None
    assert "in the log of" in problem.what


def test_lives_only_rise(run: SignedRun) -> None:
    assert problem_of([*run.frames, Life(2)]) is None
    problem = problem_of([*run.frames, Life(1)])
    assert problem is not None
    assert "life 1 after life 1" in problem.what


def test_the_run_id_is_the_hash_of_the_config(run: SignedRun) -> None:
    problem = problem_of([Owner(run.peers[0], b"r" * 32), *run.frames[1:]])
    assert problem is not None
    assert problem.frame == 1
    assert "this is genesis of run" in problem.what


def test_a_log_beside_another_key_is_refused(run: SignedRun, tmp_path: Path) -> None:
    run.seeds[0] = b"9" * 32
    problem = only_problem(checked(run.write(tmp_path / "a")))
    assert "the log belongs to" in problem.what
    assert problem.frame == 0


def test_a_damaged_key_is_no_fault_of_a_frame(run: SignedRun, tmp_path: Path) -> None:
    directory = run.write(tmp_path / "a")
    (directory / KEY_FILE).write_bytes(b"damage")
    report = checked(directory)
    assert only_problem(report).frame is None
    assert str(directory / KEY_FILE) in only_problem(report).what
    assert report.objects == 1, "the log is sound, and what it names is checked"


def test_a_frame_of_another_program_is_named(run: SignedRun) -> None:
    problem = first_problem([encode(f) for f in run.frames] + [encode(["future", 1])])
    assert problem is not None
    assert problem.frame == len(run.frames)
    assert "no frame of this program" in problem.what


def test_logs_that_do_not_begin_as_ours_are_named(run: SignedRun) -> None:
    for frames, told in (
        (run.frames[1:], "does not begin with its owner"),
        (run.frames[:1], "ends before its genesis"),
        ([run.frames[0], *run.frames[3:]], "does not begin with genesis"),
        ([*run.frames, run.frames[0]], "a second owner"),
    ):
        problem = problem_of(frames)
        assert problem is not None
        assert told in problem.what


def test_an_empty_log_and_no_directory_are_told(tmp_path: Path) -> None:
    with Store.open(tmp_path / "a"):
        pass
    assert "the log is empty" in only_problem(checked(tmp_path / "a")).what
    with pytest.raises(UserError, match="no node has run there"):
        verify(tmp_path / "nowhere")


def test_a_config_by_another_founder_is_named(run: SignedRun) -> None:
    from p2pcoord.consensus.record import make_genesis
    from p2pcoord.identity import Authority, Ed25519Signer, verify_ed25519
    from p2pcoord.run_config import run_id

    config = found_run(RunSettings(), founder=run.peers[1], nonce=b"n" * 16, workload_spec="text")
    authority = Authority(Ed25519Signer(run.seeds[0]), verify_ed25519, run_id(config))
    genesis = make_genesis(authority, encode_config(config), state=run.states[0])
    problem = problem_of([Owner(run.peers[0], run_id(config)), Appended(genesis)])
    assert problem is not None
    assert "the config was founded by" in problem.what


def compacted(run: SignedRun, upto: int) -> list[PeerFrame]:
    """The log after a compaction in term 2, with the frames in the order in which a node writes them."""
    run.open_term((0, 2))
    run.certify(run.round(2), (0, 1))
    standing = next(f for f in reversed(run.frames) if isinstance(f, Standing))
    run.ledger.compact(upto)
    frames: list[PeerFrame] = [*run.frames[:2], standing]
    for height, record in enumerate(run.ledger.records[1:], 1):
        frames.append(Appended(record))
        if height in run.ledger.certificates:
            frames.append(Certified(run.ledger.certificates[height]))
    return [*frames, Life(4), run.slot()]


def test_a_compacted_log_passes(run: SignedRun, tmp_path: Path) -> None:
    frames = compacted(run, 5)
    assert any(isinstance(f, Appended) and f.record.body is None for f in frames)
    report = checked(run.write(tmp_path / "a", frames=frames, states=(2,)))
    assert report.ok, report.lines()
    assert (report.version, report.term, report.certified) == (2, 2, 7)


def test_a_compacted_logs_term_is_still_proven_by_its_own_voters(run: SignedRun) -> None:
    frames = compacted(run, 5)
    standing = frames[2]
    assert isinstance(standing, Standing)
    liar = Votes(run.votes(run.peers[0], standing.voted_last, (2,)))
    problem = problem_of(replaced(frames, 2, msgspec.structs.replace(standing, proof=liar)))
    assert problem is not None
    assert problem.frame == 2
    assert "no quorum" in problem.what


def test_admissions_twice_are_named(run: SignedRun) -> None:
    run.certify(Members(admitted=(Admission(run.peers[1], "again", b""),)), (0, 1))
    problem = problem_of(run.frames)
    assert problem is not None
    assert "is a member already" in problem.what
