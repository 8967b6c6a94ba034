"""A coordinator's attempts at one round: who is in the sum, what is lost on the way, and when it must be made anew.

loss                                   answer
one member cannot have another's bytes attempt n + 1, in which they are not parent and child (`reliability`)
a contributor's bytes are lost before  attempt n + 1 without it; losses that come together are batched
its ancestors have summed them
the root, before its result is known   attempt n + 1 without it
one whose subtree is summed            nothing
receivers of the result                nothing, as long as a quorum of voters has stepped
"""

from __future__ import annotations

from collections.abc import Iterable

from p2pcoord.aggregation.tree import Tree, build_tree
from p2pcoord.content import ContentRef
from p2pcoord.errors import RemoteError
from p2pcoord.rounds.attempt import Attempt, Result, make_attempt
from p2pcoord.rounds.collection import Headers
from p2pcoord.rounds.messages import AttemptMessage, Obstacle, PartialMessage, Progress, ResultMessage
from p2pcoord.rounds.plan import shares
from p2pcoord.rounds.reliability import Reliability
from p2pcoord.rounds.setting import Setting

# Of an attempt in which nothing was heard for QUIET_NS, so many members that still owe something are told it again: a
# message lost with its link is rare, and an attempt over a thousand members is a large message.
QUIET_NS = 1_000_000_000
RESENT_AT_ONCE = 8

# Losses come in crowds (a site's link fails): attempts wait this long for the next loss before they are made anew.
BATCH_LOSSES_NS = 50_000_000

# From the second attempt of a round on, the next one waits until 100, 200, 400 ms ... after its signing: whatever makes one
# after the other fail, each costs every member a message and transfers.
MAX_ATTEMPT_BACKOFF_NS = 5_000_000_000

# An attempt in which nothing at all was heard for this long is stuck on somebody frozen that is not yet suspected. Longer
# than a transfer may go without a byte (2.5 s in node/driver.py): its receiver knows better who is frozen.
STALL_NS = 4_000_000_000

# Of what a member says; it is told in events, and in the record that excludes somebody (MAX_REASON_LENGTH).
MAX_REASON = 200

UNREACHABLE = "unreachable"


class Aggregation:
    """Of the round that makes `version` from `parent`. `number` is that of the last attempt."""

    def __init__(
        self,
        setting: Setting,
        reliability: Reliability,
        version: int,
        parent: ContentRef,
        now: int,
        number: int = 0,
    ) -> None:
        self.setting = setting
        self._reliability = reliability
        self.version = version
        self.parent = parent
        self.number = number
        self.attempt: Attempt | None = None
        self.name = b""
        """The attempt's hash; empty when there is none."""
        self.headers: Headers = {}
        """Of the attempt's contributions."""
        self.result: Result | None = None
        self.lost: dict[str, str] = {}
        """Members left out of further attempts of this round, and why."""
        self.signed_at = now
        self._summed: set[str] = set()
        self._heard_at = now
        self._tell_again_at = now
        self._told_again = 0
        self._replan_at: int | None = None
        self._obstructed = False
        """Whether one member of the tree cannot have another's bytes."""
        self._tries = 0
        self.not_before = now
        """When the next attempt may be signed at the earliest."""

    # The attempt

    def tree(self, headers: Headers) -> Tree:
        """The next attempt's tree over those of the contributors that find a place: whoever cannot reach each other, by what
        they say of themselves or by what happened, are not parent and child."""
        setting = self.setting
        contributors = list(dict.fromkeys(header.contributor for _, header in sorted(headers.items())))
        pairs = self._reliability.apart(self.version)
        leaves = {member for member in contributors if setting.neighbours.leaf(member)}
        if not pairs and len(leaves) < 2:
            return build_tree(contributors, setting.rules.fan_out)
        # Who can be a neighbour of few comes last; where that is equal, it is not always the same who finds no place.
        turn = (self.version + self.number) % len(contributors)
        order = contributors[turn:] + contributors[:turn]
        order.sort(key=lambda member: (member in leaves, sum(member in pair for pair in pairs)))

        def apart(one: str, other: str) -> bool:
            return frozenset((one, other)) in pairs or setting.neighbours.apart(one, other)

        return build_tree(order, setting.rules.fan_out, apart=apart)

    def sign(self, headers: Headers, tree: Tree, now: int) -> None:
        """Attempt n + 1, over these contributions and this tree of their contributors."""
        setting, rules = self.setting, self.setting.rules
        self.number += 1
        self.attempt = make_attempt(
            setting.authority,
            list(headers.values()),
            term=setting.voter.term,
            version=self.version,
            number=self.number,
            parent=self.parent,
            mean=rules.mean,
            tree=tree,
            step=rules.step_parameters(self.version),
            validation=shares(rules.validation_length, len(tree.members)),
        )
        self.name = setting.authority.hash(self.attempt)
        self.headers = headers
        self.result = None
        self._summed = set()
        self._replan_at = None
        self._obstructed = False
        self.signed_at = now
        self.not_before = (
            now + min(BATCH_LOSSES_NS << self._tries, MAX_ATTEMPT_BACKOFF_NS) if self._tries else now
        )
        self._tries = min(self._tries + 1, 16)
        self._tell_again_at = now + QUIET_NS

    def give_up(self) -> None:
        """Too little is left for an attempt. What still comes of the one before is of no use: its losses stand, but those that
        live may contribute again."""
        self.attempt, self.name, self.result = None, b"", None
        self._replan_at = None
        alive = self.setting.neighbours.alive
        self.lost = {member: why for member, why in self.lost.items() if not alive(member)}

    def audience(self) -> tuple[str, ...]:
        """Who has to know of the attempt: its tree, and the voters."""
        if self.attempt is None:
            return ()
        voters = self.setting.voter.ledger.committee.everyone
        return tuple(dict.fromkeys((*self.attempt.tree.members, *voters)))

    def tell_all(self, now: int) -> None:
        for member in self.audience():
            if self.setting.neighbours.alive(member):
                self._tell(member, now)

    def connected(self, peer: str, now: int) -> None:
        """A link is there (again): the attempt may have been lost with the old one."""
        if peer in self.audience():
            self._tell(peer, now)

    def _tell(self, member: str, now: int) -> None:
        """The attempt, and its result when that is known. Whoever knows it answers with what it has come to."""
        if self.attempt is None:
            return
        send = self.setting.neighbours.send
        headers = tuple(self.headers[entry.slot] for entry in self.attempt.entries)
        send(member, AttemptMessage(self.attempt, headers), now)
        if self.result is not None and member != self.result.sender:
            send(member, ResultMessage(self.result), now)

    # Silence

    def heard(self, now: int) -> None:
        """Something moved in the attempt."""
        self._heard_at = now

    @property
    def quiet_at(self) -> int:
        """When the attempt has gone quiet for so long that something may have been lost."""
        return max(self._tell_again_at, self._heard_at + QUIET_NS)

    def tell_again(self, owing: Iterable[str], now: int) -> None:
        """Those who owe something hear of the attempt again: a message may be lost with a link that breaks, and whoever sent
        it does not know."""
        self._tell_again_at = now + QUIET_NS
        silent = [m for m in owing if self.setting.neighbours.alive(m)]
        if len(silent) > RESENT_AT_ONCE:  # some others each time: the first may be silent for good
            turn = self._told_again % len(silent)
            silent = (silent[turn:] + silent[:turn])[:RESENT_AT_ONCE]
        self._told_again += len(silent)
        for member in silent:
            self._tell(member, now)

    def stalled(self, now: int) -> bool:
        """Whether nothing at all was heard for long; asked again, it waits as long once more."""
        if now < self._heard_at + STALL_NS or self.attempt is None:
            return False
        self._heard_at = now
        return True

    def blocking(self) -> list[str]:
        """Members that have all that they sum, and have not summed it."""
        return [m for m in self.attempt.tree.members if self._blocks(m)] if self.attempt else []

    def _blocks(self, member: str) -> bool:
        attempt = self.attempt
        if (
            attempt is None
            or member in self._summed
            or not (attempt.sends_partial(member) or member == attempt.tree.root)
        ):
            return False
        waits = [child for child in attempt.tree.children(member) if attempt.sends_partial(child)]
        return all(child in self._summed for child in waits)

    # Losses

    def watch(self, now: int) -> None:
        """What the detectors know is used at once."""
        if self.attempt is None or self.result is not None:
            return
        for member in self.attempt.tree.members:
            if not self.setting.neighbours.fit(member) and self._needed(member):
                self.lose(member, UNREACHABLE, now)

    def lose(self, member: str, reason: str, now: int) -> None:
        if member in self.lost:
            return
        self.lost[member] = reason
        if not reason.startswith(UNREACHABLE):
            self._reliability.failed(member, self.version, reason)
        self.setting.outbox.emit("lost", peer=member, reason=reason, attempt=self.number)
        self._replan(now)

    def _replan(self, now: int) -> None:
        if self._replan_at is None:
            self._replan_at = max(now + BATCH_LOSSES_NS, self.not_before)

    def _needed(self, member: str) -> bool:
        """Whether the sum still depends on this member: no ancestor has summed its subtree, nor is the result known."""
        if self.attempt is None or self.result is not None or member not in self.attempt.tree:
            return False
        at: str | None = self.attempt.tree.parent(member)
        while at is not None:
            if at in self._summed:
                return False
            at = self.attempt.tree.parent(at)
        return True

    def losses_due(self, now: int) -> bool:
        """Whether the losses that come together are all in."""
        return self._replan_at is not None and now >= self._replan_at

    def losses_stand(self, now: int) -> bool:
        """Whether the attempt must be made anew: not if all losses were links that have come back meanwhile."""
        for member, reason in self._reliability.blamed((self.version, self.number)).items():
            self.lose(member, reason, now)
        self._replan_at = None
        self.lost = {
            member: reason
            for member, reason in self.lost.items()
            if not (reason.startswith(UNREACHABLE) and self.setting.neighbours.fit(member))
        }
        if self.attempt is None:
            return False
        return self._obstructed or any(member in self.attempt.tree for member in self.lost)

    def next_deadline(self) -> int:
        due = self._replan_at if self._replan_at is not None else self._heard_at + STALL_NS
        return min(due, self.quiet_at)

    # Messages

    def on_partial(self, sender: str, message: PartialMessage, now: int) -> None:
        partial = message.partial
        if partial.attempt != self.name or self.attempt is None:
            return
        if partial.sender != sender or sender not in self.attempt.tree:
            raise RemoteError("bad_partial", f"{sender} is not in the tree")
        if sender == self.attempt.tree.root:
            raise RemoteError("bad_partial", f"{sender} is the root: it has a result, and passes nothing up")
        self.setting.authority.check(sender, partial)
        self._summed.add(sender)
        self.heard(now)

    def on_obstacle(self, sender: str, message: Obstacle, now: int) -> None:
        if message.attempt != self.name or self.attempt is None or self.result is not None:
            return
        tree = self.attempt.tree
        if sender not in tree:
            return
        related = {sender, *tree.children(sender)}  # whose bytes it has to have
        if message.culprit not in related or not self._needed(message.culprit):
            return
        reason = message.reason[:MAX_REASON]
        if sender == message.culprit:
            self.lose(message.culprit, reason, now)
            return
        self._reliability.accuse(sender, message.culprit, (self.version, self.number))
        self._obstructed = True
        self.setting.outbox.emit(
            "obstacle", peer=message.culprit, by=sender, reason=reason, attempt=self.number
        )
        self._replan(now)

    def on_progress(self, sender: str, message: Progress, now: int) -> None:
        """Only who has a part in the sum speaks for it, and not for longer than the barrier."""
        if message.attempt != self.name or self.attempt is None:
            return
        if sender in self.attempt.tree and now - self.signed_at < self.setting.rules.barrier_ns:
            self.heard(now)

    def take_result(self, message: ResultMessage) -> bool:
        """The root has signed what came out; False when this is no news. Raises RemoteError."""
        result = message.result
        if result.attempt != self.name or self.attempt is None or self.result is not None:
            return False
        if result.sender != self.attempt.tree.root:
            raise RemoteError("bad_result", f"{result.sender} is not the root")
        self.setting.authority.check(result.sender, result)
        self.result = result
        self._replan_at = None
        return True

    def pass_on(self, sender: str, message: ResultMessage, now: int) -> None:
        """The result, to the voters outside the tree and to the root's children."""
        if self.attempt is None:
            return
        tree, setting = self.attempt.tree, self.setting
        outside = [p for p in setting.voter.ledger.committee.everyone if p not in tree]
        for peer in (*outside, *tree.children(tree.root)):
            if peer not in (setting.me, sender) and setting.neighbours.alive(peer):
                setting.neighbours.send(peer, message, now)

    def holders(self, stepped: Iterable[str]) -> set[str]:
        """Who can be reached and has the result's bytes: its root, and those that stepped with it."""
        root = {self.result.sender} if self.result is not None else set()
        return {peer for peer in root | set(stepped) if self.setting.neighbours.fit(peer)}

    def watch_result(self, stepped: Iterable[str], now: int) -> None:
        """A result that nobody has any more is a loss, too."""
        if self.result is not None and not self.holders(stepped):
            self.lose(self.result.sender, f"{UNREACHABLE} with the result", now)
