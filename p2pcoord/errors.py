"""Three kinds of error, told apart by whose mistake it is.

    LocalError    a bug or misuse on this side; raised, it stops what was being done
    RemoteError   another peer broke the protocol; caught at the edge of `Peer`, counted by kind and by peer, answered
                  where an answer helps, and never raised through the process
    UserError     the person at the keyboard gave something that cannot work (flag, file, address, secret); shown as one
                  message that says what is wrong and what to do, without a traceback

The split between the first two is h11's (`h11/_util.py`): code that reads from a peer must never be able to crash on what
it reads, and code that misuses our own API must never be blamed on a peer.
"""


class P2PCoordError(Exception):
    """Base class of everything p2pcoord raises on purpose."""


class LocalError(P2PCoordError):
    """A bug or a misuse on this side. Raised; never caught to carry on."""


class RemoteError(P2PCoordError):
    """A peer broke the protocol.

    `kind` is a short stable word ("oversized", "bad_signature", ...): rejected messages are counted by it.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail


class UserError(P2PCoordError):
    """A user's mistake: the message names what is wrong and what to do. `exit_code` is 1 (failed) or 2 (usage)."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
