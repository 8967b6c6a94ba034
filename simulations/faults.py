"""What goes wrong, when, and for how long: written in a scenario file, or drawn from a seed.

    kind              what happens                                                        ends with
    crash             machines die; after `for_s` they start again from their disks       the restart
    crash-after-send  the one chosen dies right after the `nth` message of `message` that it sends; for `for_s`
    crash-at-phase    the coordinator dies when its round enters `phase`, or a moment later; for `for_s`
    crash-loop        dies and starts again several times within `for_s`                  the last restart
    double-vote-bait  voters die after their next vote, and are back within a moment      for_s
    disk-loss         a machine is gone with its key; a fresh one joins in its place      -
    rot               a machine dies, one byte of its log flips, it starts again          the restart
    join, leave       a fresh machine joins; a machine asks to be let go
    freeze            machines stand still, as by SIGSTOP or a closed lid                 the thaw
    drift             clocks run fast or slow by up to 10%                                true again
    slow-disk         every write takes up to 400 ms more
    loss              messages (of the kind `message`, or any) vanish, links are reset,   calm
                      late copies haunt
    partition         two sides do not hear each other                                    healing
    one-way           what goes from some machines to others is lost                      healing
    split-off         the coordinator with a minority on one side                         healing

`who` chooses when the fault strikes, not before: coordinator, voter, voters, member, one, some, half, all.
A fault that would leave no quorum of honest voters with their disks is not carried out: nobody survives that.
"""

from __future__ import annotations

from random import Random
from typing import Literal, get_args

import msgspec

from p2pcoord.rounds.phases import Phase
from simulations.randomness import stream

Kind = Literal[
    "crash",
    "crash-after-send",
    "crash-at-phase",
    "crash-loop",
    "double-vote-bait",
    "disk-loss",
    "rot",
    "join",
    "leave",
    "freeze",
    "drift",
    "slow-disk",
    "loss",
    "partition",
    "one-way",
    "split-off",
]

Who = Literal["coordinator", "voter", "voters", "member", "one", "some", "half", "all"]


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that goes wrong, in seconds of world time."""

    at_s: float
    kind: Kind
    who: Who = "one"
    for_s: float = 1.0
    message: str = ""
    """crash-after-send, loss: the kind of message; empty for any."""
    nth: int = 1
    drop: float = 0.0
    reset: float = 0.0
    ghost: float = 0.0
    phase: str = ""
    """crash-at-phase: which of a round's (p2pcoord/rounds/phases.py)."""
    after_ms: int = 0
    """crash-at-phase: how long after its entry."""

    @property
    def end_s(self) -> float:
        return self.at_s + self.for_s


FAMILIES: dict[str, tuple[Kind, ...]] = {
    "none": (),
    "crashes": ("crash", "crash-after-send", "crash-loop", "double-vote-bait", "disk-loss", "rot", "freeze"),
    "loss": ("loss", "one-way", "slow-disk", "drift"),
    "partitions": ("partition", "one-way", "split-off", "freeze"),
    "all": tuple(kind for kind in get_args(Kind) if kind != "crash-at-phase"),
}

SPOKEN = ("", "append", "appended", "vote-reply", "vote?", "pre-vote?", "transfer", "records")
"""Messages after which a machine dies: each kind of consensus, and any."""


TRAINING_MESSAGES = (
    *(
        "plan",
        "plan-accepted",
        "offer",
        "reoffer?",
        "reoffer",
        "attempt",
        "attempt?",
        "partial",
        "result",
        "obstacle",
    ),
    *(
        "progress",
        "report",
        "share",
        "training-failed",
        "syn",
        "syn-ack",
        "syn-end",
        "ping",
        "ping?",
        "ping-ack",
    ),
    *(
        "ping-nack",
        "reach?",
        "reach",
        "evidence",
        "append",
        "appended",
        "records?",
        "records",
        "join?",
        "join",
        "leave",
    ),
    *("pre-vote?", "pre-vote", "vote?", "vote-reply", "term", "transfer"),
)
"""Kinds of messages of which a loss may take nearly all."""

RARE_MESSAGES = ("reach?", "reach", "training-failed", "ping-nack", "join", "leave")
"""Kinds that few runs have many of: each seed loses one of them for as long as there are faults."""

RAREST_MESSAGES = ("attempt?", "obstacle")
"""Kinds that most runs send none of, and none of it twice: every seed loses one of them, besides."""


def draw_faults(
    seed: int, family: str, start_s: float, end_s: float, *, training: bool = False
) -> tuple[Fault, ...]:
    """Faults of this family between two moments, of at least three kinds where the family has so many. Where rounds are
    real (`training`), coordinators also die at their phases, and losses may be of one kind of message."""
    kinds = FAMILIES[family]
    if not kinds:
        return ()
    random = stream(seed, "faults")
    if training:
        return _draw_training(random, seed, kinds, start_s, end_s)
    chosen = random.sample(kinds, min(len(kinds), random.randint(3, 6)))
    # Each kind once at least; then more of them, a fault every two seconds or so.
    more = [random.choice(chosen) for _ in range(random.randint(2, int((end_s - start_s) / 2)))]
    faults = [_draw(random, kind, start_s, end_s) for kind in chosen + more]
    return tuple(sorted(faults, key=lambda fault: fault.at_s))


def _draw_training(
    random: Random, seed: int, kinds: tuple[Kind, ...], start_s: float, end_s: float
) -> tuple[Fault, ...]:
    """As above, with the faults of real rounds: each phase and each kind of message comes in its turn with the seed."""
    if "crash" in kinds:
        kinds = (*kinds, "crash-at-phase")
    chosen = random.sample(kinds, min(len(kinds), random.randint(3, 6)))
    more = [random.choice(chosen) for _ in range(random.randint(2, int((end_s - start_s) / 3)))]
    faults = [_draw(random, kind, start_s, end_s) for kind in chosen + more]
    if "crash" in kinds:
        phases = list(Phase)
        for turn in range(2):
            at = random.uniform(start_s, end_s - 2)
            phase = phases[(seed + turn * 3) % len(phases)]
            span = random.choice((0.1, 1.0, 4.0))
            after_ms = random.choice((0, 0, 2, 10, 60))
            faults.append(Fault(at, "crash-at-phase", "coordinator", span, phase=phase, after_ms=after_ms))
    if "loss" in kinds:
        at, span = random.uniform(start_s, end_s - 2), random.uniform(1, 5)
        message = TRAINING_MESSAGES[seed % len(TRAINING_MESSAGES)]
        faults.append(Fault(at, "loss", "all", min(span, end_s - at), message, 1, 0.4, 0.2, 0.0))
        rare = RARE_MESSAGES[seed % len(RARE_MESSAGES)]
        rarest = RAREST_MESSAGES[seed // len(RARE_MESSAGES) % len(RAREST_MESSAGES)]
        always = end_s - start_s
        faults += [Fault(start_s, "loss", "all", always, lost, 1, 0.4, 0.4, 0.0) for lost in (rare, rarest)]
    return tuple(sorted(faults, key=lambda fault: fault.at_s))


def _draw(random: Random, kind: Kind, start_s: float, end_s: float) -> Fault:
    at = random.uniform(start_s, end_s - 1)
    span = min(random.choice((0.05, 0.2, 1.0, 3.0, 8.0)) * random.uniform(0.5, 1.5), end_s - at)
    whoever: tuple[Who, ...] = ("coordinator", "coordinator", "voter", "one", "some", "half")
    match kind:
        case "crash":
            return Fault(at, kind, random.choice((*whoever, "all", "voters")), span)
        case "crash-after-send":
            who: Who = random.choice(("coordinator", "coordinator", "voter"))
            return Fault(at, kind, who, span, random.choice(SPOKEN), random.randint(1, 6))
        case "crash-at-phase":
            phase = random.choice(list(Phase))
            return Fault(
                at, kind, "coordinator", span, phase=phase, after_ms=random.choice((0, 0, 2, 10, 60))
            )
        case "crash-loop":
            return Fault(at, kind, random.choice(whoever), min(random.uniform(1, 6), end_s - at))
        case "double-vote-bait":
            return Fault(at, kind, "all", min(random.uniform(2, 8), end_s - at), "vote-reply")
        case "freeze":
            return Fault(at, kind, random.choice(whoever), span)
        case "drift" | "slow-disk":
            return Fault(at, kind, random.choice(("some", "all", "voter")), random.uniform(1, end_s - at))
        case "loss":
            drop, reset = random.choice(((0.05, 0.0), (0.0, 0.02), (0.02, 0.01), (0.2, 0.0), (0.0, 0.1)))
            return Fault(at, kind, "all", random.uniform(1, end_s - at), "", 1, drop, reset, 0.02)
        case "partition" | "one-way" | "split-off":
            return Fault(at, kind, random.choice(("some", "half")), random.uniform(1, end_s - at))
        case _:
            return Fault(at, kind, random.choice(("voter", "member", "one", "coordinator")), span)
