"""Evidence: two signed statements of one peer that contradict each other in one slot.

    statement           slot                                     contradiction
    vote                term                                     another candidate, or another last record
    acknowledgement     term and height                          another record
    record header       term and height                          another record
    contribution        origin round, assignment, incarnation    another content

Nobody signs two of them by mistake. Votes, acknowledgements and contributions are persisted before they leave; a coordinator
that comes back orders nothing more in its term; a voter before whose eyes a coordinator contradicted itself acknowledges
nothing more in that term (`Voter.contradicted`); and a key dies with its disk. Silence and lateness are never evidence.
Whoever holds a pair can show it to anybody, so it excludes by a certified record that all voters check.
"""

from __future__ import annotations

from collections import OrderedDict

from p2pcoord.aggregation.contribution import ContributionHeader
from p2pcoord.consensus.statements import Acknowledgement, Header, Vote
from p2pcoord.errors import LocalError
from p2pcoord.identity import Authority

# Statements remembered, newest last: some hundred rounds of a full committee, and 2 MiB.
MAX_REMEMBERED = 4096

SignedStatement = Vote | Acknowledgement | Header | ContributionHeader
"""What can be evidence."""

Slot = tuple[str, str, int, int, int]


def signer_of(statement: SignedStatement) -> str:
    match statement:
        case Vote() | Acknowledgement():
            return statement.voter
        case Header():
            return statement.coordinator
        case _:
            return statement.contributor


def slot_of(statement: SignedStatement) -> Slot:
    """What may be signed once: (kind, signer, and up to three numbers)."""
    signer = signer_of(statement)
    match statement:
        case Vote():
            return "vote", signer, statement.term, 0, 0
        case Acknowledgement():
            return "acknowledgement", signer, statement.term, statement.height, 0
        case Header():
            return "header", signer, statement.term, statement.height, 0
        case ContributionHeader():
            return "contribution", signer, statement.origin_round, statement.assignment, statement.incarnation
    raise LocalError(f"{type(statement).__name__} has no slot")


def contradict(first: SignedStatement, second: SignedStatement, authority: Authority) -> bool:
    """Whether one peer signed both, in one slot, with different content."""
    return (
        slot_of(first) == slot_of(second)
        and authority.hash(first) != authority.hash(second)
        and authority.verify(signer_of(first), first)
        and authority.verify(signer_of(second), second)
    )


class EvidenceBook:
    """Remembers statements whose signatures were checked, and notices the second one in a slot."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self._seen: dict[str, OrderedDict[Slot, SignedStatement]] = {}
        """By signer, oldest first."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def see(self, statement: SignedStatement) -> tuple[SignedStatement, SignedStatement] | None:
        """The pair, when this statement contradicts one that was seen before."""
        slot = slot_of(statement)
        by_signer = self._seen.setdefault(signer_of(statement), OrderedDict())
        known = by_signer.get(slot)
        if known is None:
            by_signer[slot] = statement
            self._count += 1
            if self._count > MAX_REMEMBERED:
                self._forget_one()
            return None
        return (known, statement) if contradict(known, statement, self._authority) else None

    def _forget_one(self) -> None:
        """The oldest of whoever has the most: who signs without end washes out its own statements and nobody else's."""
        signer, statements = max(self._seen.items(), key=lambda item: len(item[1]))
        statements.popitem(last=False)
        self._count -= 1
        if not statements:
            del self._seen[signer]
