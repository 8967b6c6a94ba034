"""What was refused, by kind of failure and by whom: the numbers behind `rejected` in `p2pcoord status`.

A bounded table: strangers choose the names in it (addresses, peer ids), so beyond MAX_ENTRIES new names are counted
together under "others", and totals stay exact.
"""

from __future__ import annotations

from collections import Counter

# Ten kinds from 400 names fill it; a table of this size takes under 1 MiB.
MAX_ENTRIES = 4_096
OTHERS = "others"


class Rejections:
    """Counts of (kind, who). `who` is a peer id where the other side proved one, else its IP address."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def count(self, kind: str, who: str) -> None:
        key = (kind, who)
        if key not in self._counts and len(self._counts) >= MAX_ENTRIES:
            key = (kind, OTHERS)
        self._counts[key] += 1

    @property
    def total(self) -> int:
        return self._counts.total()

    def by_kind(self) -> dict[str, int]:
        kinds: Counter[str] = Counter()
        for (kind, _), number in self._counts.items():
            kinds[kind] += number
        return dict(kinds)

    def by_peer(self) -> dict[str, int]:
        names: Counter[str] = Counter()
        for (_, who), number in self._counts.items():
            names[who] += number
        return dict(names)

    def snapshot(self) -> dict[str, dict[str, int]]:
        """kind -> who -> count."""
        table: dict[str, dict[str, int]] = {}
        for (kind, who), number in self._counts.items():
            table.setdefault(kind, {})[who] = number
        return table

    def of(self, who: str) -> dict[str, int]:
        """The counts of one peer id or address, by kind."""
        return {kind: number for (kind, name), number in self._counts.items() if name == who}
