"""docs/protocol.md lists what there is: every message, statement, body and frame, with exactly its fields."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from node.network import bulk, hello, link
from p2pcoord.aggregation.mean import Factors
from p2pcoord.aggregation.tree import Tree
from p2pcoord.consensus.messages import Grants, Votes
from p2pcoord.consensus.record import AnyBody, Counted
from p2pcoord.consensus.statements import Certificate
from p2pcoord.frames import PeerFrame
from p2pcoord.gossip.records import CapabilityProfile
from p2pcoord.gossip.rumors import Rumor
from p2pcoord.gossip.version_vector import OtherStamp, Stamp
from p2pcoord.identity import Statement
from p2pcoord.messages import AnyMessage
from p2pcoord.optimization.optimizer import StepParameters

PAGE = (Path(__file__).parents[1] / "docs" / "protocol.md").read_text(encoding="utf-8")

Kind = type[msgspec.Struct]


def tag_of(kind: Kind) -> str:
    return str(kind.__struct_config__.tag)


def statements(base: type[Statement] = Statement) -> Iterator[type[Statement]]:
    for kind in base.__subclasses__():
        if kind.__module__.startswith("p2pcoord."):
            yield kind
            yield from statements(kind)


MESSAGES: tuple[Kind, ...] = get_args(AnyMessage)
STATEMENTS: tuple[Kind, ...] = tuple(statements())
FRAMES: tuple[Kind, ...] = get_args(PeerFrame)
WITHIN: tuple[Kind, ...] = (*get_args(AnyBody), Grants, Votes, Certificate)
EXPECTED = {
    "Messages": MESSAGES,
    "Signed statements": STATEMENTS,
    "Frames of the log": FRAMES,
    "Encoding": WITHIN,
}


@cache
def part(title: str) -> str:
    """The text under a heading of the second level."""
    found = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no part {title}"
    return found.group(1)


@cache
def sections(title: str) -> dict[tuple[str, str], str]:
    """(tag, name of the type) -> text, of the headings of the third level that begin with a tag."""
    found = re.findall(r"^### `([^`]+)` (\w+)$(.*?)(?=^### |\Z)", part(title), re.MULTILINE | re.DOTALL)
    assert len({(tag, name) for tag, name, _ in found}) == len(found), "a kind is described twice"
    return {(tag, name): text for tag, name, text in found}


def rows(text: str) -> list[str]:
    """The first cells of tables whose first column is headed `field`."""
    table = re.search(r"^\| field \|.*?\n\|---\|---\|\n((?:\|.*\n?)+)", text, re.MULTILINE)
    assert table is not None, "no table of fields"
    return re.findall(r"^\| `(\w+)` \|", table.group(1), re.MULTILINE)


@pytest.mark.parametrize("title", EXPECTED)
def test_the_page_describes_every_kind_and_no_other(title: str) -> None:
    assert set(sections(title)) == {(tag_of(kind), kind.__name__) for kind in EXPECTED[title]}


@pytest.mark.parametrize("title", EXPECTED)
def test_each_kind_is_described_with_exactly_its_fields_in_their_order(title: str) -> None:
    for kind in EXPECTED[title]:
        described = rows(sections(title)[tag_of(kind), kind.__name__])
        assert described == list(kind.__struct_fields__), kind.__name__


def nested(kind: Any) -> Iterator[Kind]:
    """Every struct that a value of this type may hold, itself included."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
        info = msgspec.inspect.type_info(kind)
        assert isinstance(info, msgspec.inspect.StructType)
        for field in info.fields:
            yield from _held(field.type)


def _held(info: msgspec.inspect.Type) -> Iterator[Kind]:
    match info:
        case msgspec.inspect.StructType():
            yield from nested(info.cls)
        case msgspec.inspect.VarTupleType():
            yield from _held(info.item_type)
        case msgspec.inspect.TupleType():
            for item in info.item_types:
                yield from _held(item)
        case msgspec.inspect.UnionType():
            for item in info.types:
                yield from _held(item)


def test_values_without_a_tag_are_described_with_exactly_their_fields() -> None:
    described = {
        name: re.findall(r"(?:^|[;,] )`(\w+)`", fields)
        for name, fields in re.findall(r"^\| `([A-Z]\w+)` \| (.*) \|$", part("Encoding"), re.MULTILINE)
    }
    held = {kind for message in (*MESSAGES, *FRAMES) for kind in nested(message)}
    values = held - {*MESSAGES, *STATEMENTS, *FRAMES, *WITHIN}
    # Two that the walk must reach, or it shows nothing.
    assert {Counted, Factors, Tree, Rumor, CapabilityProfile, OtherStamp, Stamp, StepParameters} <= values
    expected = {kind.__name__: list(kind.__struct_fields__) for kind in values}
    assert expected.pop("Record") == ["header", "body"]
    assert described == expected


@pytest.mark.parametrize(
    ("number", "name"),
    [(getattr(link, name), name) for name in ("HELLO", "REFUSED", "MESSAGE", "PING", "PONG", "RETIRE")]
    + [
        (getattr(bulk, name), name)
        for name in ("WANT_MANIFEST", "WANT_CHUNK", "MANIFEST", "CHUNK", "UNAVAILABLE")
    ],
)
def test_the_kinds_of_stream_frames_are_those_of_the_code(number: int, name: str) -> None:
    assert re.search(rf"^\| {number} \| `{name}` \|", PAGE, re.MULTILINE)


def test_hello_and_token_are_described_in_the_order_of_their_fields() -> None:
    for kind, heading in ((hello.Hello, "The hello"), (hello.JoinToken, "The proof and the join token")):
        found = re.search(rf"^### {heading}$(.*?)(?=^### )", PAGE, re.MULTILINE | re.DOTALL)
        assert found is not None
        places = [found.group(1).index(f"`{name}`") for name in kind.__struct_fields__]
        assert places == sorted(places), kind.__name__
