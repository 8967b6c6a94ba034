"""Bulk synchronous parallel: a round closes when all have arrived, or when the barrier's time is over.

The rule of closing only; admission is "the base is the current state". Valiant, "A Bridging Model for Parallel
Computation" (1990), with the time-out and the straggler policies of the specification:

    leave_out   at the time-out, close with those who arrived
    extend      wait once more as long, then leave out
    reassign    give what is missing to those who are done, wait once more as long, then leave out

Whatever the policy, a round never closes with less than the minimum share of its assignments: what is missing is then given to
those who are done, and it waits on.
"""

from __future__ import annotations

from enum import StrEnum


class StragglerPolicy(StrEnum):
    LEAVE_OUT = "leave_out"
    EXTEND = "extend"
    REASSIGN = "reassign"


class Closing(StrEnum):
    WAIT = "wait"
    CLOSE = "close"
    EXTEND = "extend"
    REASSIGN = "reassign"


def closing(
    *,
    assigned: int,
    arrived: int,
    waited_ns: int,
    barrier_ns: int,
    extensions: int,
    policy: StragglerPolicy,
    minimum_share: float,
) -> Closing:
    """What to do now. `waited_ns` counts from the plan or from the last extension; `extensions` made so far."""
    if arrived >= assigned:
        return Closing.CLOSE
    if waited_ns < barrier_ns:
        return Closing.WAIT
    enough = arrived > 0 and arrived >= minimum_share * assigned
    if not enough:
        return Closing.REASSIGN
    if extensions == 0 and policy is StragglerPolicy.EXTEND:
        return Closing.EXTEND
    if extensions == 0 and policy is StragglerPolicy.REASSIGN:
        return Closing.REASSIGN
    return Closing.CLOSE
