"""The log's frames: what survives of them under flips, torn writes, truncation and garbage."""

import random
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcoord.consensus import log
from p2pcoord.errors import LocalError

SALT = b"\x5a\x01\x9c\xe7\x33\x80\xff\x10"
SECTOR_BYTES = 64  # far below a disk's 512, so that small logs are torn in many places

PEER = b"12D3KooWGRYZDHBembyGJQqJgBRQ8pKjF6vQf3rYpYt7c1fyrtXm"
APPENDS = [
    [PEER],
    [b"\xa2dtermg\x07dvotex" + PEER],
    [b"\xa3frecord" + bytes(range(200)), b"", b"\xa1hcommitted\x18\x2a"],
    [b"\xa2dtermg\x08dvote\xf6"],
    [b"\xa3frecord" + bytes(range(255, 100, -1)), b"\xa3icertificate" + b"\x11" * 64],
    [b"\xa1hcommitted\x18\x2b"],
]


class Written:
    """A log as it was written: its bytes, and where each frame and each append lies in them."""

    def __init__(self, appends: list[list[bytes]], salt: bytes = SALT) -> None:
        self.data = b""
        self.payloads: list[bytes] = []
        self.appended: list[int] = []  # for each frame, the number of its append
        self.spans: list[tuple[int, int, int]] = []  # first copy, second copy, end
        self.ends = [0]  # of each append
        self.tail = log.start(salt)
        for number, payloads in enumerate(appends):
            at = self.tail.offset
            more, self.tail = log.append(payloads, self.tail)
            self.data += more
            self.ends.append(len(self.data))
            for payload in payloads:
                size = log.HEADER_BYTES + len(payload)
                self.spans.append((at, at + size, at + 2 * size))
                at += 2 * size
                self.payloads.append(payload)
                self.appended.append(number)

    def damaged(self, *spans: tuple[int, int]) -> bytes:
        """The bytes with every bit flipped in these (start, end)."""
        changed = bytearray(self.data)
        for start, end in spans:
            changed[start:end] = bytes(byte ^ 0xFF for byte in changed[start:end])
        return bytes(changed)


def repaired(data: bytes, recovery: log.Recovery) -> bytes:
    """What the file holds once the recovery is written to it."""
    file = bytearray(data)
    for offset, copy in recovery.repairs:
        file[offset : offset + len(copy)] = copy
    return bytes(file[: recovery.valid_length])


def test_what_was_appended_is_recovered_and_the_tail_goes_on_where_it_ended():
    written = Written(APPENDS)
    recovery = log.recover(written.data)
    assert recovery.payloads == tuple(written.payloads)
    assert recovery.tail == written.tail
    assert recovery.tail.frames == len(written.payloads)
    assert recovery.valid_length == len(written.data)
    assert recovery.proven_length == written.ends[-2]
    assert (recovery.repairs, recovery.cut, recovery.damaged) == ((), False, ())
    more, tail = log.append([b"next"], recovery.tail)
    assert log.recover(written.data + more).tail == tail


def test_an_empty_log_begins_with_the_salt_it_is_given():
    assert log.recover(b"", SALT).tail == log.start(SALT)
    assert log.recover(bytes(4096), SALT) == log.Recovery((), log.start(SALT), 0, 0, (), True)


def test_a_frame_encodes_the_same_with_frame_and_with_append():
    both, chain = log.frame(b"one", log.start(SALT).chain)
    assert log.append([b"one"], log.start(SALT)) == (both, log.Tail(chain, len(both)))
    assert both[: len(both) // 2] == both[len(both) // 2 :]


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_a_flip_of_any_byte_loses_nothing_and_is_repaired(mask: int):
    written = Written(APPENDS)
    for at in range(len(written.data)):
        changed = bytearray(written.data)
        changed[at] ^= mask
        recovery = log.recover(bytes(changed))
        assert recovery.payloads == tuple(written.payloads), at
        assert recovery.tail == written.tail
        assert len(recovery.repairs) == 1
        assert not recovery.cut
        assert repaired(bytes(changed), recovery) == written.data
        assert bool(recovery.damaged) == (at < written.ends[-2])


def test_a_flip_of_any_bit_of_a_length_field_does_not_lose_the_frames_behind_it():
    written = Written(APPENDS)
    for first, second, _ in written.spans:
        for copy in (first, second):
            for bit in range(32):
                changed = bytearray(written.data)
                changed[copy + 56 + bit // 8] ^= 1 << bit % 8
                assert log.recover(bytes(changed)).payloads == tuple(written.payloads)


def test_one_flip_in_each_frame_at_once_loses_nothing():
    written, rng = Written(APPENDS), random.Random(4)
    for _ in range(300):
        hits = [rng.randrange(*rng.choice([(a, b), (b, end)])) for a, b, end in written.spans]
        changed = written.damaged(*((at, at + 1) for at in hits))
        recovery = log.recover(changed)
        assert recovery.payloads == tuple(written.payloads)
        assert repaired(changed, recovery) == written.data


def test_any_two_flips_give_all_payloads_or_a_refusal_or_cut_only_the_newest_append():
    written, rng = Written(APPENDS), random.Random(5)
    durable = written.ends[-2]
    outcomes = {"all": 0, "refused": 0, "cut": 0}
    for _ in range(6000):
        first, second, end = rng.choice(written.spans)
        one, two = rng.randrange(first, second), rng.randrange(second, end)
        try:
            recovery = log.recover(written.damaged((one, one + 1), (two, two + 1)))
        except log.CorruptLog as refusal:
            assert refusal.offset == first < durable
            assert refusal.index == written.spans.index((first, second, end))
            outcomes["refused"] += 1
            continue
        if recovery.payloads == tuple(written.payloads):
            outcomes["all"] += 1
        else:
            assert first >= durable
            assert recovery.payloads == tuple(written.payloads[:-1])
            outcomes["cut"] += 1
    assert outcomes["all"] == 0 and outcomes["refused"] > 0 and outcomes["cut"] > 0


def test_both_copies_bad_before_a_later_append_is_refused_and_named():
    written = Written(APPENDS)
    for index, (first, _, end) in enumerate(written.spans[:-1]):
        if written.appended[index] == len(APPENDS) - 1:
            continue
        with pytest.raises(log.CorruptLog, match=f"log frame {index} at byte {first}: .*") as refusal:
            log.recover(written.damaged((first, end)))
        assert isinstance(refusal.value, LocalError)
        assert (refusal.value.index, refusal.value.offset) == (index, first)


def test_both_copies_bad_at_the_end_are_an_append_that_was_never_synced():
    written = Written(APPENDS)
    first, _, end = written.spans[-1]
    recovery = log.recover(written.damaged((first, end)))
    assert recovery.payloads == tuple(written.payloads[:-1])
    assert (recovery.cut, recovery.valid_length) == (True, first)
    assert recovery.tail.frames == len(written.payloads) - 1


def test_an_intact_frame_of_the_same_append_proves_no_sync_but_one_of_a_later_append_does():
    appends = [[b"first"], [b"a" * 100, b"b" * 100, b"c" * 100]]
    written = Written(appends)
    first, _, end = written.spans[2]
    recovery = log.recover(written.damaged((first, end)))
    assert recovery.payloads == (b"first", b"a" * 100)
    assert recovery.cut and recovery.valid_length == first
    later = Written([*appends, [b"later"]])
    with pytest.raises(log.CorruptLog, match="frame 4 of a later write is intact"):
        log.recover(later.damaged((first, end)))


def test_truncation_anywhere_in_the_newest_append_keeps_everything_before_it():
    written = Written(APPENDS[:5])
    for length in range(written.ends[-2], len(written.data) + 1):
        recovery = log.recover(written.data[:length])
        kept = sum(1 for _, second, _ in written.spans if second <= length)
        assert recovery.payloads == tuple(written.payloads[:kept])
        assert kept >= len(written.payloads) - len(APPENDS[4])
        again = log.recover(repaired(written.data[:length], recovery))
        assert (again.payloads, again.repairs, again.cut) == (recovery.payloads, (), False)


def test_a_file_read_at_any_moment_while_it_grows_is_never_called_damaged():
    written = Written(APPENDS)
    for length in range(len(written.data)):
        recovery = log.recover(written.data[:length])
        synced = max(number for number, end in enumerate(written.ends) if end <= length)
        assert recovery.payloads[: sum(map(len, APPENDS[:synced]))] == tuple(
            payload for payloads in APPENDS[:synced] for payload in payloads
        )
        assert recovery.damaged == ()


stale = Written([[b"stale" * 9] for _ in range(12)], salt=b"old salt").data
TAILS = [
    bytes(1),
    bytes(5000),
    log.MAGIC * 700,
    (log.MAGIC + SALT) * 300,
    random.Random(6).randbytes(9000),
    stale,
    stale[len(stale) // 2 :],
    log.MAGIC + SALT + bytes(40) + b"\xff" * 12,
]


@pytest.mark.parametrize("tail", TAILS, ids=range(len(TAILS)))
@pytest.mark.parametrize("torn", [0, 1, 70, 150])
def test_zeros_garbage_and_an_older_log_behind_the_end_are_cut(tail: bytes, torn: int):
    written = Written(APPENDS)
    unfinished, _ = log.append([b"never synced" * 10], written.tail)
    data = written.data + unfinished[:torn] + tail
    recovery = log.recover(data)
    assert recovery.payloads == tuple(written.payloads)
    assert recovery.cut and recovery.valid_length == len(written.data)
    assert repaired(data, recovery) == written.data


def test_bytes_that_are_only_garbage_are_no_log():
    for tail in TAILS[:5]:
        recovery = log.recover(tail, SALT)
        assert (recovery.payloads, recovery.tail) == ((), log.start(SALT))
    with pytest.raises(log.CorruptLog, match="log frame 0 at byte 0"):
        log.recover(Written(APPENDS).data[1:])


def test_frames_inside_a_payload_do_not_pass_for_the_logs_own():
    inner = Written([[b"forged"] for _ in range(4)], salt=b"attacker").data
    written = Written([[PEER], [inner], [b"last", inner]])
    for first, second, end in written.spans:
        for span in ((first, first + 1), (first, second), (second, end), (first + 5, first + 60)):
            assert log.recover(written.damaged(span)).payloads == tuple(written.payloads)
    first, _, end = written.spans[-1]
    torn = written.damaged((first, first + 64), (end - 1, end))
    assert log.recover(torn).payloads == tuple(written.payloads[:-1])


def test_a_frame_that_is_missing_doubled_or_moved_is_refused():
    written = Written([[bytes([number]) * 40] for number in range(5)])
    frames = [written.data[first:end] for first, _, end in written.spans]
    for order in ([0, 1, 3, 4], [0, 1, 1, 2], [0, 2, 1, 3], [1, 2, 3]):
        with pytest.raises(log.CorruptLog):
            log.recover(b"".join(frames[index] for index in order))
    one_copy = frames[2][: len(frames[2]) // 2]
    with pytest.raises(log.CorruptLog):
        log.recover(frames[0] + frames[1] + one_copy + frames[3] + frames[4])


def test_a_log_of_other_content_cannot_be_spliced_in():
    one, two = Written([[b"a"], [b"b"], [b"c"]]), Written([[b"x"], [b"b"], [b"c"]])
    with pytest.raises(log.CorruptLog, match="log frame 1 "):
        log.recover(one.data[: one.ends[1]] + two.data[two.ends[1] :])


def test_two_intact_copies_that_differ_are_refused():
    written = Written([[b"vote: A"], [b"last"]])
    first, second, end = written.spans[0]
    header = written.data[second : second + 60]
    other = b"vote: B"
    forged = header + struct.pack(">I", zlib.crc32(other, zlib.crc32(header))) + other
    with pytest.raises(log.CorruptLog, match="log frame 0 at byte 0: its copies are intact and differ"):
        log.recover(written.data[:second] + forged + written.data[end:])
    assert first == 0


def test_very_many_damaged_frame_starts_end_in_a_refusal_and_not_in_a_long_search():
    written = Written(APPENDS)
    with pytest.raises(log.CorruptLog, match="damaged frames follow"):
        log.recover(written.data + (log.MAGIC + SALT) * (log.MAX_FALSE_STARTS + 1))


def test_a_frame_beyond_the_bound_is_not_read_even_if_its_checksum_is_right():
    chain, payload = log.start(SALT).chain, bytes(log.MAX_PAYLOAD_BYTES + 1)
    header = log.MAGIC + chain + struct.pack(">II", 0, len(payload))
    copy = header + struct.pack(">I", zlib.crc32(payload, zlib.crc32(header))) + payload
    assert log.recover(copy + copy, SALT) == log.Recovery((), log.start(SALT), 0, 0, (), True)


def test_the_largest_payload_passes_and_a_larger_one_is_refused():
    largest = bytes(log.MAX_PAYLOAD_BYTES)
    written = Written([[PEER], [largest], [b"end"]])
    first, _, _ = written.spans[1]
    assert log.recover(written.damaged((first, first + 64))).payloads == (PEER, largest, b"end")
    with pytest.raises(LocalError, match="at most"):
        log.frame(largest + b"x", log.start().chain)
    with pytest.raises(LocalError, match="a chain has 48 bytes"):
        log.frame(b"", b"short")
    with pytest.raises(LocalError, match="a log's salt has 8 bytes"):
        log.start(b"short")


many_appends = st.lists(st.lists(st.binary(max_size=150), min_size=1, max_size=4), min_size=1, max_size=6)


@given(many_appends, st.binary(min_size=8, max_size=8))
def test_recovery_is_the_inverse_of_appending(appends: list[list[bytes]], salt: bytes):
    written = Written(appends, salt)
    recovery = log.recover(written.data)
    assert recovery.payloads == tuple(written.payloads)
    assert recovery.tail == written.tail
    assert not recovery.cut and not recovery.repairs


@settings(max_examples=400)
@given(many_appends, st.data())
def test_a_torn_append_loses_nothing_synced_and_leaves_a_prefix(
    appends: list[list[bytes]], data: st.DataObject
):
    """Each sector of the newest append is written, or still zero, or garbage; in any combination."""
    written = Written(appends)
    synced = written.ends[-2]
    file = bytearray(written.data)
    for at in range(synced, len(file), SECTOR_BYTES):
        end = min(at + SECTOR_BYTES, len(file))
        fate = data.draw(st.sampled_from(["written", "zero", "garbage"]))
        if fate != "written":
            file[at:end] = bytes(end - at) if fate == "zero" else random.Random(at).randbytes(end - at)
    recovery = log.recover(bytes(file))
    durable = sum(map(len, appends[:-1]))
    assert len(recovery.payloads) >= durable
    assert recovery.payloads == tuple(written.payloads[: len(recovery.payloads)])
    assert recovery.damaged == ()
    more, _ = log.append([b"after the crash"], recovery.tail)
    after = log.recover(repaired(bytes(file), recovery) + more)
    assert after.payloads == (*recovery.payloads, b"after the crash")


@settings(max_examples=400)
@given(many_appends, st.data())
def test_after_any_damage_what_is_missing_was_hit_in_both_copies(
    appends: list[list[bytes]], data: st.DataObject
):
    """Fewer payloads come back only when nothing intact of a later append could have told that there were
    more.
    """
    written = Written(appends)
    places = st.integers(0, len(written.data) - 1)
    starts = data.draw(st.lists(places, min_size=1, max_size=8))
    spans = [(at, min(len(written.data), at + data.draw(st.integers(1, 120)))) for at in starts]
    spans = [(a, b) for i, (a, b) in enumerate(spans) if all(b <= c or d <= a for c, d in spans[:i])]

    def hit(start: int, end: int) -> bool:
        return any(a < end and start < b for a, b in spans)

    lost = [hit(first, second) and hit(second, end) for first, second, end in written.spans]
    try:
        recovery = log.recover(written.damaged(*spans))
    except log.CorruptLog as refusal:
        assert refusal.index == lost.index(True)
        assert refusal.offset == written.spans[refusal.index][0]
        return
    count = len(recovery.payloads)
    assert recovery.payloads == tuple(written.payloads[:count])
    if count == len(written.payloads):
        assert not any(lost)
        return
    assert lost.index(True) == count
    for (first, second, end), number in zip(written.spans, written.appended, strict=True):
        if number > written.appended[count]:
            assert hit(first, second) and hit(second, end)
