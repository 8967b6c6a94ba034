"""What this peer has of the run: the newest certified version, its state, and the content on its disk that rounds need.

Content is named by its root. What was fetched or made for an attempt stays until the round is certified, so the next attempt
does not fetch it again; then all goes but the two newest states, what the run pins, and contributions that may count yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from p2pcoord.consensus.record import Round, Totals
from p2pcoord.content import ContentRef
from p2pcoord.effects import Adopt, Discard, Done, Failed, Fetch, FetchReport, Offer, Outcome
from p2pcoord.rounds.setting import Setting, Then

# A fetch of a state that failed everywhere is tried again after this long, with whoever is there by then.
REFETCH_NS = 1_000_000_000


class Holdings:
    """`version` is the newest certified one, `state` its state, `held` whether the bytes of that are here, `totals` what the
    run came to with it.

    `arrived(now)` is called when the state had to be fetched and is here.
    """

    def __init__(self, setting: Setting, arrived: Callable[[int], None]) -> None:
        self.setting = setting
        self.version = 0
        self.state = setting.rules.state_zero
        self.totals = Totals()
        self.held = False
        self._arrived = arrived
        self._roots: set[bytes] = set()
        """Content held here."""
        self._fetching: dict[bytes, int] = {}
        """Root -> the effect that fetches it."""
        self._last_round: Round | None = None
        self._refetch_at: int | None = None

    def has(self, root: bytes) -> bool:
        return root in self._roots

    def add(self, content: ContentRef) -> None:
        """Something was made here."""
        self._roots.add(content.root)

    def promised(self) -> list[Round]:
        """The rounds in this log that may come to be certified yet: an acknowledgement promised that they can be made."""
        ledger = self.setting.voter.ledger
        return [
            record.body for record in ledger.records[ledger.certified + 1 :] if isinstance(record.body, Round)
        ]

    def restore(self, contents: frozenset[bytes], contributions: Iterable[bytes]) -> None:
        """Takes up what an earlier life stored; what is of no use any more is let go.

        `contents`: roots of what the disk holds; `contributions`: roots of those that may count yet.
        """
        useful = {self.state.root, *self.setting.rules.pinned, *contributions}
        for body in self.promised():
            useful |= {body.state, body.result}
        if old := tuple(sorted(contents - useful)):
            self.setting.outbox.put(Discard(old))
        self._roots = set(contents & useful)
        self.held = self.has(self.state.root)

    # Certified

    def follow(self, body: Round) -> None:
        """The next version is certified."""
        self.version = body.version
        self.state = ContentRef(body.state, body.state_bytes)
        self.totals = body.totals
        self._last_round = body

    def let_go(self, before: ContentRef, contributions: Iterable[bytes]) -> None:
        """Drops what was fetched and made on the way to the newest version; `before` is the state of the one before."""
        self._cancel(self._fetching)
        self.held = self.has(self.state.root)
        kept = {self.state.root, before.root, *self.setting.rules.pinned, *contributions}
        if gone := tuple(sorted(self._roots - kept)):
            self.setting.outbox.put(Discard(gone))
        self._roots &= kept

    def show(self, now: int) -> None:
        """Adopts the newest state, or gets it."""
        if self.held:
            self.setting.outbox.put(Adopt(self.version, self.state))
        else:
            self.fetch_state(now)

    # Getting content

    def fetch(self, content: ContentRef, sources: Sequence[str], purpose: str, then: Then) -> None:
        """Gets content that is not here; `then` hears how that ended."""
        effect = Fetch(self.setting.outbox.new_id(), content, tuple(sources), purpose)

        def fetched(outcome: Outcome, now: int) -> None:
            self._fetching.pop(content.root, None)
            if isinstance(outcome, Done):
                self._roots.add(content.root)
            then(outcome, now)

        self._fetching[content.root] = self.setting.start(effect, fetched)

    def fetches(self, root: bytes) -> bool:
        return root in self._fetching

    def stop_fetching(self) -> None:
        """Of what an earlier attempt needed nothing is wanted any more; the state is."""
        self._cancel([root for root in self._fetching if root != self.state.root])

    def _cancel(self, roots: Iterable[bytes]) -> None:
        for root in list(roots):
            self.setting.cancel(self._fetching.pop(root))

    def fetch_state(self, now: int) -> None:
        """Gets the state of the newest version from those who made it, and from the committee."""
        if self.held or self.fetches(self.state.root):
            return
        setting = self.setting
        made = [c.contributor for c in self._last_round.contributors] if self._last_round else []
        voters = list(setting.voter.ledger.committee.everyone)
        sources = [
            p for p in dict.fromkeys([*made, *voters]) if p != setting.me and setting.neighbours.alive(p)
        ]
        if not sources:
            self.refetch_after(REFETCH_NS, now)
            return
        version, state = self.version, self.state
        self.fetch(state, sources, "state", lambda outcome, at: self._got_state(version, state, outcome, at))

    def _got_state(self, version: int, state: ContentRef, outcome: Outcome, now: int) -> None:
        outbox = self.setting.outbox
        if isinstance(outcome, Done):
            if isinstance(outcome.value, FetchReport):
                outbox.emit(
                    "fetched",
                    purpose="state",
                    version=version,
                    size_bytes=state.size_bytes,
                    sources=outcome.value.bytes_by_source,
                    refused=outcome.value.bad_sources,
                )
            if version == self.version:
                self.held = True
                outbox.put(Offer(state))
                outbox.put(Adopt(version, state))
                self._arrived(now)
            return
        if isinstance(outcome, Failed):
            report = outcome.value
            outbox.emit(
                "fetch-failed",
                purpose="state",
                version=version,
                superseded=version != self.version,
                reason=outcome.reason,
                sources=report.bytes_by_source if isinstance(report, FetchReport) else {},
                refused=report.bad_sources if isinstance(report, FetchReport) else {},
            )
        if version == self.version:
            self.refetch_after(REFETCH_NS, now)

    # Trying again

    @property
    def refetch_at(self) -> int | None:
        """When to look again for what could not be had: the state, or what the attempt needs."""
        return self._refetch_at

    def refetch_after(self, span_ns: int, now: int) -> None:
        self._refetch_at = now + span_ns

    def refetch(self, now: int) -> bool:
        """Gets the state if it is time to look again; then True, and the rest is to be looked for too."""
        if self._refetch_at is None or now < self._refetch_at:
            return False
        self._refetch_at = None
        self.fetch_state(now)
        return True
