"""What a peer asks of the world. Every decision of `Peer` leaves it as a tuple of these values, and as nothing else.

An effect with an `id` is answered exactly once by `Peer.complete(id, outcome)`, with `Done`, `Failed` or `Cancelled`; the
others are not answered. Effects name bytes by their content hash; bulk bytes never pass through a peer.

    Send, Announce        leave only when the Persist numbered `after` (0: none) is durable
    Persist               frames for the log; Persists run in order of id, and a failed one stops the node
    Dial, Disconnect      links; what comes of a Dial is also told by Peer.connected / Peer.disconnected
    Fetch, Offer, Discard content-addressed bytes: get from others, let others get, forget
    Train, Combine, Step, Validate    tensor work, done by threads and the trainer process
    Adopt                 this state is now the certified one
    Halt, Emit, Cancel
"""

from __future__ import annotations

from typing import Any

import msgspec

from p2pcoord.aggregation.mean import Factors
from p2pcoord.content import ContentRef
from p2pcoord.optimization.optimizer import StepParameters

NEVER = 1 << 62
"""What `next_deadline` says when nothing waits for the clock."""


class Effect(msgspec.Struct, frozen=True):
    """Base of all effects."""


class Send(Effect, frozen=True):
    to: str
    data: bytes
    after: int


class Announce(Effect, frozen=True):
    """Tell every member that is connected by gossipsub; losing one is harmless."""

    data: bytes
    after: int


class Dial(Effect, frozen=True):
    """Connect to a peer at any of these multiaddrs. `peer` may be empty for an address whose owner is not known yet."""

    id: int
    peer: str
    addresses: tuple[str, ...]


class AnswerStatus(Effect, frozen=True):
    """Send a StatusReply with the status document to this peer."""

    peer: str


class Reach(Effect, frozen=True):
    """Can this peer be reached at these addresses, by a new connection? Done carries True or False."""

    id: int
    peer: str
    addresses: tuple[str, ...]


class Disconnect(Effect, frozen=True):
    peer: str
    reason: str


class Cancel(Effect, frozen=True):
    """The outcome of this effect is no longer wanted; it is still answered (usually with Cancelled)."""

    effect_id: int


class Persist(Effect, frozen=True):
    """Frames behind the log, durably; with `replace` they become the whole log, at once or not at all (compaction)."""

    id: int
    frames: tuple[bytes, ...]
    replace: bool = False


class Halt(Effect, frozen=True):
    """Stop the node for good and say why."""

    reason: str


class Emit(Effect, frozen=True):
    """An event for people: events file, log lines, metrics."""

    event: str
    fields: dict[str, Any]


# Outcomes ------------------------------------------------------------------------------------------------------------


class Outcome(msgspec.Struct, frozen=True):
    """Base of all outcomes."""


class Done(Outcome, frozen=True):
    value: Any = None


class Failed(Outcome, frozen=True):
    reason: str
    value: Any = None


class Cancelled(Outcome, frozen=True):
    pass


# Content and tensors: what they ask for is `rounds/`, what they mean is `layout.py` ----------------------------------


class Fetch(Effect, frozen=True):
    """Get content from these peers and store it durably. Done carries a FetchReport, Failed too."""

    id: int
    ref: ContentRef
    sources: tuple[str, ...]
    purpose: str


class Offer(Effect, frozen=True):
    """From now on members may fetch this content from here."""

    ref: ContentRef


class Discard(Effect, frozen=True):
    """This content is no longer needed here."""

    roots: tuple[bytes, ...]


class Adopt(Effect, frozen=True):
    """`state` is the certified state of `version`: what the model file shows and what joiners get."""

    version: int
    state: ContentRef


class Train(Effect, frozen=True):
    """Local training of one assignment from the state `base`. Done carries Trained.

    `ranges` are half-open intervals of the training data, empty in mode own.
    """

    id: int
    version: int
    assignment: int
    base: ContentRef
    ranges: tuple[tuple[int, int], ...]
    seed: int


class Combine(Effect, frozen=True):
    """Weighted sum in the written order. Done carries Combined."""

    id: int
    inputs: tuple[tuple[ContentRef, Factors], ...]


class Step(Effect, frozen=True):
    """A new state from the old one and a combined result. Done carries Stepped."""

    id: int
    state: ContentRef
    result: ContentRef
    parameters: StepParameters


class Validate(Effect, frozen=True):
    """Evaluate a state on half-open intervals of the validation data (empty: this machine's own). Done carries Validated."""

    id: int
    state: ContentRef
    ranges: tuple[tuple[int, int], ...]


class FetchReport(msgspec.Struct, frozen=True):
    """Where content came from, in bytes; and which sources were dropped, and why."""

    bytes_by_source: dict[str, int]
    bad_sources: dict[str, str]


class Trained(msgspec.Struct, frozen=True):
    """A contribution object, durable here. `norm`: L2 of the pseudo-gradient; `loss`: mean training loss."""

    content: ContentRef
    samples: int
    steps: int
    norm: float
    loss: float
    wall_ns: int


class Combined(msgspec.Struct, frozen=True):
    """`norm`: L2 of the parameters' section. When `finite` is False the sum is of no use, and `nonfinite` are the roots of
    the inputs to blame (none when finite inputs overflowed)."""

    content: ContentRef
    norm: float
    finite: bool = True
    nonfinite: tuple[bytes, ...] = ()


class Stepped(msgspec.Struct, frozen=True):
    content: ContentRef
    finite: bool


class Validated(msgspec.Struct, frozen=True):
    """Sums over samples, so that shares add up to the whole."""

    samples: int
    loss_sum: float
    measure_sums: dict[str, float]
