"""What of a log goes into one message.

A message of certified records ends with a certificate of its last one (`messages.Records`), so all that one certificate may
come to cover must fit one message. Two rules see to that: nothing is ordered or appended while too much is uncertified
(`has_room`), and compaction keeps a certificate often enough (`Ledger.compact`).
"""

from __future__ import annotations

from p2pcoord.consensus.ledger import BATCH_BYTES, Ledger
from p2pcoord.consensus.messages import Records
from p2pcoord.consensus.record import MAX_BODY_BYTES, Record
from p2pcoord.wire import encode

# Records in flight before the oldest is certified. Rounds need one or two; more would only be lost at the next election.
MAX_UNCERTIFIED = 64

# Records of one Append or Records.
BATCH_RECORDS = 64


def has_room(ledger: Ledger) -> bool:
    """Whether one more record may stay uncertified: all that one certificate may come to cover fits one message."""
    uncertified = ledger.records[ledger.certified + 1 :]
    return (
        len(uncertified) < MAX_UNCERTIFIED
        and sum(len(encode(record)) for record in uncertified) + MAX_BODY_BYTES <= BATCH_BYTES
    )


def records_from(ledger: Ledger, start: int) -> tuple[Record, ...]:
    """Records from height `start` on, as many as one message takes; at least one if there is one."""
    chosen: list[Record] = []
    size = 0
    for record in ledger.records[start : start + BATCH_RECORDS]:
        size += len(encode(record))
        if chosen and size > BATCH_BYTES:
            break
        chosen.append(record)
    return tuple(chosen)


def certified_from(ledger: Ledger, start: int) -> Records | None:
    """Certified records from `start` on that end with a certificate of their own; None when there are none."""
    if not 1 <= start <= ledger.certified:
        return None
    records = records_from(ledger, start)
    end = min(start + len(records) - 1, ledger.certified)
    while end >= start and end not in ledger.certificates:
        end -= 1
    if (
        end < start
    ):  # the batch ends within what one certificate covers: all of that fits a message (has_room)
        end = next(h for h in range(start, ledger.certified + 1) if h in ledger.certificates)
        records = tuple(ledger.records[start : end + 1])
    return Records(records[: end - start + 1], ledger.certificates[end], ledger.certified)
