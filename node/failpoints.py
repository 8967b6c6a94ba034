"""Where a test holds a node: between two effects, or around a write, as if the process were frozen there."""

from __future__ import annotations

import os

from p2pcoord.errors import UserError
from p2pcoord.peer_settings import COMPACT_AFTER_BYTES


def compact_after_bytes() -> int:
    """The size from which the log is rewritten; P2PCOORD_COMPACT_AFTER_BYTES lets a test see that within seconds (0: at every
    certificate)."""
    return int(os.environ.get("P2PCOORD_COMPACT_AFTER_BYTES", COMPACT_AFTER_BYTES))


class Failpoints:
    """Places at which a test holds this process, named in P2PCOORD_FAILPOINTS (comma-separated); none by default.

    "phase:NAME" at the coordinator's entry of a phase, "persist-before:FRAME" and "persist-after:FRAME" around a write of a
    frame of that kind by a coordinator or by a candidate ("owner" begins a log that compaction writes anew). "NAME@VERSION"
    holds only once that version is certified here. A held process answers nothing but its status, as if it were frozen.
    """

    def __init__(self, names: str) -> None:
        self._since: dict[str, int] = {}
        for name in filter(None, (part.strip() for part in names.split(","))):
            place, _, version = name.partition("@")
            if version and not version.isdecimal():
                raise UserError(f"P2PCOORD_FAILPOINTS: {name}: a version after @, as in phase:aggregation@3")
            self._since[place] = int(version or 0)
        self.held = ""

    def __bool__(self) -> bool:
        return bool(self._since)

    def reached(self, place: str, version: int) -> bool:
        if not self.held and version >= self._since.get(place, version + 1):
            self.held = place
        return bool(self.held)
