"""Kinds by name: the words of a run file, or of a caller, become a value of one of the classes that are known.

A kind is a frozen msgspec.Struct whose fields are its options; its `__post_init__` requires that they are in range.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from p2pcoord.errors import UserError

Kind = TypeVar("Kind", bound=msgspec.Struct)


def made(
    what: str, known: Mapping[str, type[Kind]], kind: str, options: Mapping[str, object], *, choices: str
) -> Kind:
    """One of the `known` kinds, from its options. `what` and `choices` (what there is instead) are for people.

    Raises UserError for an unknown kind, an option that is missing or that the kind does not have, and values out of range.
    """
    if kind not in known:
        raise UserError(f"there is no {what} {kind!r}: use {choices}")
    chosen = known[kind]
    unknown = sorted(options.keys() - set(chosen.__struct_fields__))
    if unknown:
        has = ", ".join(chosen.__struct_fields__) or "no options"
        raise UserError(f"the {what} {kind!r} has no {unknown[0]!r}: it has {has}")
    try:
        return msgspec.convert(options, chosen)
    except msgspec.ValidationError as error:
        raise UserError(f"the {what} {kind!r}: {error}") from None


def require(condition: bool, otherwise: str) -> None:
    """Raises UserError unless an option is in range."""
    if not condition:
        raise UserError(otherwise)
