"""The table of what was refused, and its bound."""

from node.network.rejections import MAX_ENTRIES, OTHERS, Rejections


def test_counts_are_told_by_kind_and_by_name() -> None:
    rejections = Rejections()
    for kind, who in [("oversized", "a"), ("oversized", "b"), ("bad_hello", "a")]:
        rejections.count(kind, who)
    assert rejections.total == 3
    assert rejections.by_kind() == {"oversized": 2, "bad_hello": 1}
    assert rejections.by_peer() == {"a": 2, "b": 1}
    assert rejections.of("a") == {"oversized": 1, "bad_hello": 1}
    assert rejections.of("c") == {}


def test_a_flood_of_names_takes_bounded_memory_and_loses_no_count() -> None:
    rejections = Rejections()
    for number in range(3 * MAX_ENTRIES):
        rejections.count("bad_handshake", f"10.0.{number >> 8}.{number & 255}")
    rejections.count("oversized", "late")
    assert rejections.total == 3 * MAX_ENTRIES + 1
    assert len(rejections.by_peer()) == MAX_ENTRIES + 1
    assert rejections.of(OTHERS) == {"bad_handshake": 2 * MAX_ENTRIES, "oversized": 1}
