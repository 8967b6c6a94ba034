"""A contribution's signed header: what a member did for one assignment, without the bytes.

The bytes (`layout.py`: pseudo-gradient, float buffers, integer buffers) stay with the member, named by their root, until
the round is certified. The header is signed once per slot (run, origin round, assignment, incarnation) and its slot is
persisted before the header is sent: two headers in one slot are evidence against their signer.
"""

from __future__ import annotations

import math

from p2pcoord.content import ContentRef
from p2pcoord.errors import RemoteError
from p2pcoord.float32 import MAX_FLOAT32
from p2pcoord.identity import Authority, PeerId, Sha256, Signature, Statement

# 2**53 samples, steps or nanoseconds: exact as a float, and more than any round has.
MAX_COUNT = 1 << 53


class ContributionHeader(Statement, frozen=True, tag="contribution"):
    """`base` is the root of the state trained from; `norm` is the L2 norm of the pseudo-gradient; `loss` the mean training
    loss over `samples` samples seen in `steps` steps."""

    origin_round: int
    assignment: int
    incarnation: int
    contributor: PeerId
    base: Sha256
    content: ContentRef
    samples: int
    steps: int
    norm: float
    loss: float
    computation_ns: int
    signature: Signature = b""

    @property
    def slot(self) -> tuple[int, int]:
        """(origin round, assignment): what may count once in a run."""
        return self.origin_round, self.assignment


def check_header(
    header: ContributionHeader, authority: Authority, content_bytes: int, most_samples: int = MAX_COUNT
) -> None:
    """Raises RemoteError: "bad_contribution" for impossible numbers, more samples than `most_samples` or a size that no
    contribution of this run has, "bad_signature"."""
    counts = (header.samples, header.steps, header.computation_ns)
    if (
        not 1 <= header.samples <= most_samples
        or header.steps < 1
        or not all(0 <= count <= MAX_COUNT for count in counts)
    ):
        raise RemoteError("bad_contribution", f"{header.samples} samples in {header.steps} steps")
    # A loss that has no float32 would make the mean of all losses infinite, and with it every attempt.
    if not (math.isfinite(header.norm) and header.norm >= 0 and abs(header.loss) <= MAX_FLOAT32):
        raise RemoteError("bad_contribution", f"norm {header.norm}, loss {header.loss}")
    if header.content.size_bytes != content_bytes:
        raise RemoteError("bad_contribution", f"{header.content.size_bytes} bytes, not {content_bytes}")
    authority.check(header.contributor, header)
