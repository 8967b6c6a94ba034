import contextlib

import cbor2
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.errors import RemoteError
from p2pcoord.messages import AnyMessage
from p2pcoord.wire import MAX_MESSAGE_BYTES, MAX_NESTING, decode, encode


class Point(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="point"):
    x: int
    label: str
    data: bytes = b""
    weight: float = 0.5
    more: tuple[int, ...] = ()
    inner: "Point | None" = None


class Twin(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="twin"):
    x: int
    label: str


points = st.recursive(
    st.builds(
        Point,
        st.integers(-(2**64), 2**64 - 1),  # what 64 bits hold; more is refused
        st.text(),
        st.binary(),
        st.floats(allow_nan=False),
        st.lists(st.integers(0, 9)).map(tuple),
    ),
    lambda inner: st.builds(Point, st.just(1), st.just("nested"), inner=inner),
    max_leaves=4,
)


@given(points)
def test_decoding_what_was_encoded_gives_the_value_and_encoding_it_again_the_bytes(point: Point) -> None:
    data = encode(point)
    assert decode(data, Point) == point
    assert encode(decode(data, Point)) == data


def test_a_struct_travels_as_an_array_with_its_tag_first() -> None:
    assert cbor2.loads(encode(Twin(1, "a"))) == ["twin", 1, "a"]


def test_a_tag_tells_kinds_with_the_same_fields_apart() -> None:
    union = Point | Twin
    assert decode(encode(Twin(1, "a")), union) == Twin(1, "a")  # type: ignore[arg-type]
    with pytest.raises(RemoteError, match="bad_type"):
        decode(encode(Twin(1, "a")), Point)
    with pytest.raises(RemoteError, match="bad_type"):
        decode(encode(["another", 1, "a"]), union)  # type: ignore[arg-type]


def refused(data: bytes, kind: type = Twin, **limits: int) -> str:
    with pytest.raises(RemoteError) as caught:
        decode(data, kind, **limits)
    return caught.value.kind


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "malformed"),
        (b"\xff", "malformed"),
        (encode(Twin(1, "a"))[:-1], "malformed"),
        (encode(Twin(1, "a")) + b"\x00", "not_canonical"),
        (b"\x9f" + encode(Twin(1, "a"))[1:] + b"\xff", "malformed"),  # an array of indefinite length
        (cbor2.dumps({"type": "twin", "x": 1, "label": "a"}), "bad_type"),
        (cbor2.dumps(["twin", 1]), "bad_type"),
        (cbor2.dumps(["twin", 1, "a", "unknown"]), "bad_type"),
        (cbor2.dumps(["twin", "1", "a"]), "bad_type"),
        (cbor2.dumps(["twin", 1, b"a"]), "bad_type"),
        (cbor2.dumps(["twin", 1.0, "a"]), "bad_type"),
        (cbor2.dumps(["twin", True, "a"]), "bad_type"),
        (cbor2.dumps(["twin", None, "a"]), "bad_type"),
        (b"\x83\x64twin\x18\x01\x61a", "not_canonical"),  # 1 in two bytes
        (b"\x83\x64twin\x01\x78\x01a", "not_canonical"),  # a length in two bytes
        (b"\xd9\xd9\xf7" + encode(Twin(1, "a")), "not_canonical"),  # self-described CBOR
        (b"\x83\x64twin\xc2\x41\x01\x61a", "malformed"),  # 1 as a big number
    ],
)
def test_any_form_but_the_canonical_one_is_refused(data: bytes, kind: str) -> None:
    assert refused(data) == kind


def test_size_is_checked_before_anything_is_parsed() -> None:
    assert refused(b"\xff" * (MAX_MESSAGE_BYTES + 1)) == "oversized"
    assert refused(b"\xff" * MAX_MESSAGE_BYTES) == "malformed"
    assert refused(encode(Twin(1, "a")), limit=8) == "oversized"


@pytest.mark.parametrize("opening", [b"\x81", b"\xa1\x01", b"\xc1", b"\xd8\x2a"])
def test_nesting_is_bounded(opening: bytes) -> None:
    assert refused(opening * (MAX_NESTING + 2) + b"\x01") in ("malformed", "bad_type")
    assert refused(opening * 200_000 + b"\x01") == "malformed"


def test_a_huge_claimed_length_costs_nothing() -> None:
    for head in (b"\x9b", b"\xbb", b"\x5b", b"\x7b"):  # array, map, bytes, text of 2**62 items
        assert refused(head + (2**62).to_bytes(8, "big")) == "malformed"


def test_references_to_shared_values_do_not_explode() -> None:
    doubled = b"\x01"
    for _ in range(20):
        doubled = b"\x82" + doubled + b"\xd8\x1d\x00"
    assert refused(b"\xd8\x1c" + doubled) in ("malformed", "bad_type", "not_canonical")


@given(st.binary(max_size=200))
def test_nothing_but_a_remote_error_comes_of_any_bytes(data: bytes) -> None:
    try:
        message = decode(data, AnyMessage)  # type: ignore[arg-type,var-annotated]
    except RemoteError:
        return
    assert encode(message) == data


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.sampled_from(["append", "vote?", "pre-vote?", "records", "join?", "grants", "votes", "certificate"]),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=30,
)


@given(
    st.lists(values, max_size=8), st.sampled_from(["append", "vote?", "records", "term", "join?", "leave"])
)
def test_nothing_but_a_remote_error_comes_of_any_value(fields: list[object], tag: str) -> None:
    data = cbor2.dumps([tag, *fields], canonical=True)
    try:
        message = decode(data, AnyMessage)  # type: ignore[arg-type,var-annotated]
    except RemoteError:
        return
    assert encode(message) == data


@given(st.data())
def test_no_flipped_byte_gives_the_same_message(data: st.DataObject) -> None:
    original = encode(Point(5, "label", b"data", 0.25, (1, 2)))
    at = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(RemoteError):
        assert decode(bytes(changed), Point) != decode(original, Point)
