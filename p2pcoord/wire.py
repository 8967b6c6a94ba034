"""Structs to bytes and back: canonical CBOR, checked by type, bounded before it is parsed.

Structs travel as arrays in field order (`array_like`), tagged by kind where several are possible. Decoding refuses: too many
bytes, nesting beyond what our types need, wrong types, unknown fields, and any encoding but the canonical one. The last
rule makes "the bytes that were received" and "the bytes of this value" one thing, which is what signatures rest on.
"""

from __future__ import annotations

from typing import Any, TypeVar

import cbor2
import msgspec

from p2pcoord.errors import RemoteError

# One message or log frame. Bodies up to 64 KiB travel inside records, several records in one message; tensors never do.
MAX_MESSAGE_BYTES = 1 << 20

# The deepest of our types (a message holding records holding bodies holding signed statements) nests 9 levels. cbor2's own
# bound is 400.
MAX_NESTING = 24

T = TypeVar("T")


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages."""


def _refuse_big_integer(*_: object) -> None:
    """CBOR's tags 2 and 3 carry integers of any size; none of ours needs more than 64 bits, and no float holds them."""
    raise ValueError("an integer beyond 64 bits")


_NO_BIG_INTEGERS = {2: _refuse_big_integer, 3: _refuse_big_integer}


def encode(value: Any) -> bytes:
    """Canonical CBOR of a struct (or of builtins)."""
    return cbor2.dumps(msgspec.to_builtins(value, builtin_types=(bytes,)), canonical=True)


def decode(data: bytes, kind: type[T], *, limit: int = MAX_MESSAGE_BYTES) -> T:
    """The value of type `kind` in `data`.

    Raises RemoteError: "oversized", "malformed" (not CBOR, trailing bytes, nested too deep), "bad_type" (wrong or unknown
    fields), "not_canonical".
    """
    if len(data) > limit:
        raise RemoteError("oversized", f"{len(data)} bytes, at most {limit}")
    try:
        value = cbor2.loads(
            data,
            max_depth=MAX_NESTING,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
            semantic_decoders=_NO_BIG_INTEGERS,
        )
    except Exception as error:  # the decoder raises what it likes on hostile bytes
        raise RemoteError("malformed", f"no CBOR: {error}") from None
    try:
        result = msgspec.convert(value, kind, builtin_types=(bytes,))
    except (msgspec.ValidationError, RecursionError, TypeError, ValueError, OverflowError) as error:
        raise RemoteError("bad_type", str(error)) from None
    try:
        again = encode(result)
    except Exception as error:  # a value that cannot be encoded was not encoded by us
        raise RemoteError("not_canonical", str(error)) from None
    if again != data:
        raise RemoteError("not_canonical", f"{len(data)} bytes decode to a value of {len(again)} bytes")
    return result
