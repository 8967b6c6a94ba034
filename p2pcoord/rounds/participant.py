"""A member's side of a round: train what the plan assigns, offer it, combine, step, validate; and judge the record.

    on           does                                                            waits for
    plan         accept it; train each own assignment once (a slot is persisted  the state of version - 1
                 before its header is sent); offer again what is finished
    attempt      cancel what the attempt before it needed; with children or      children's bytes, checked against the
                 several contributions: fetch, combine, send the partial sum     signed roots
                 to the parent; at the root: sign the result
    result       fetch it from the parent, pass it on to the children, step,     the bytes
                 report the state, validate the own share
    certificate  adopt the state (fetch it when it is another than computed)     -

Nothing is trained twice: what was finished under an earlier coordinator, or in an earlier life, is offered again as long as
its base is the current state. What was fetched for an attempt stays until the round is certified, so the next attempt does
not fetch it again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from p2pcoord.aggregation.contribution import ContributionHeader
from p2pcoord.aggregation.mean import PARTIAL, Factors
from p2pcoord.consensus.record import Record, Round
from p2pcoord.content import ContentRef
from p2pcoord.effects import (
    Adopt,
    Cancelled,
    Combine,
    Combined,
    Discard,
    Done,
    Failed,
    Fetch,
    FetchReport,
    Offer,
    Outcome,
    Step,
    Stepped,
    Train,
    Trained,
    Validate,
    Validated,
)
from p2pcoord.errors import RemoteError
from p2pcoord.frames import Checked, Slot
from p2pcoord.messages import (
    AttemptMessage,
    AttemptRequest,
    Obstacle,
    Offering,
    PartialMessage,
    PlanAccepted,
    PlanMessage,
    Progress,
    Reoffer,
    Reoffered,
    Report,
    ResultMessage,
    Share,
    TrainingFailed,
)
from p2pcoord.optimization.optimizer import agrees
from p2pcoord.rounds.attempt import Attempt, Partial, Result, check_attempt
from p2pcoord.rounds.plan import Assignment, Plan, check_plan
from p2pcoord.rounds.setting import Setting
from p2pcoord.run_config import derive_seed

# A fetch of a state that failed everywhere is tried again after this long, with whoever is there by then.
REFETCH_NS = 1_000_000_000

# A result that its first sources did not give is asked of all members of the tree after this long.
REFETCH_RESULT_NS = 300_000_000

# What is finished is offered again this often until an attempt shows that it arrived: a link may break where only the other
# side sees it.
REOFFER_NS = 5_000_000_000

# A neighbour in the tree to whom there is no connection yet (a run is no full mesh) is dialled, and no obstacle for so long.
LINK_PATIENCE_NS = 2_000_000_000

# One sign of life a second for an attempt whose bytes are still moving.
PROGRESS_INTERVAL_NS = 1_000_000_000

# Attempts whose headers are kept, newest first: the one that is certified is among the last few.
MAX_ATTEMPTS_KEPT = 8


class _Attempted(msgspec.Struct):
    """What this peer holds and did in one attempt."""

    attempt: Attempt
    headers: dict[bytes, ContributionHeader]
    partials: dict[str, Partial] = {}
    combining: bool = False
    summed: bool = False
    partial: Partial | None = None
    result: Result | None = None
    stepping: bool = False
    state: ContentRef | None = None
    finite: bool = True
    share: Share | None = None
    kept: bool = False
    """Whether a Checked frame holds it."""


class Participant:
    """One member's side. The newest certified version is `version`, its state `state`; `held` when its bytes are here."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.version = 0
        self.state = setting.rules.state_zero
        self.held = False
        self.plan: Plan | None = None
        self.slots: dict[tuple[int, int], ContributionHeader] = {}
        self.local_steps = 0
        """Optimizer steps made in this life."""
        self.last_trained: Trained | None = None
        self.mismatches = 0
        """How often the state computed here was not the certified one; after the second this peer never acknowledges."""
        self._later_plan: tuple[str, PlanMessage] | None = None
        self._later_reoffer: tuple[str, Reoffer] | None = None
        self._training: tuple[Assignment, int] | None = None
        self._failed: set[int] = set()
        self._attempts: dict[bytes, _Attempted] = {}
        self._current = b""
        self._fetching: dict[bytes, int] = {}
        self._unlinked: dict[tuple[bytes, str], int] = {}
        """(Attempt, member): since when bytes are wanted from it, and there is no connection to it."""
        self._content: dict[bytes, str] = {}
        """Roots held here, and what for; all but the newest states go when the round is certified."""
        self._refetch_at: int | None = None
        self._last_round: Round | None = None
        self._progress_at = 0
        self._offer_at = 0
        self._asked, self._asked_at = b"", 0

    # What was before

    def restore(
        self,
        slots: dict[tuple[int, int], ContributionHeader],
        checked: Sequence[Checked],
        contents: frozenset[bytes],
    ) -> None:
        """Takes up what an earlier life signed, checked and stored, after its certified rounds were followed.

        `contents`: roots of what the disk holds; what is of no use any more is let go.
        """
        for slot, header in slots.items():
            if header.content.root in contents and slot[0] > self.version:
                self.slots[slot] = header
        useful = {
            self.state.root,
            *self.setting.rules.pinned,
            *(header.content.root for header in self.slots.values()),
        }
        for body in self._uncertified():
            useful |= {body.state, body.result}
        if old := tuple(sorted(contents - useful)):
            self.setting.outbox.put(Discard(old))
        contents &= useful
        self._content = dict.fromkeys(contents, "kept")
        self.held = self.state.root in contents
        for frame in checked:
            self._restore_attempt(frame)

    def _uncertified(self) -> list[Round]:
        """The rounds in this log that may come to be certified yet: an acknowledgement promised that they can be made."""
        ledger = self.setting.voter.ledger
        return [
            record.body for record in ledger.records[ledger.certified + 1 :] if isinstance(record.body, Round)
        ]

    def _restore_attempt(self, frame: Checked) -> None:
        attempt = frame.attempt
        if attempt.version != self.version + 1:
            return
        name = self.setting.authority.hash(attempt)
        headers = {self.setting.authority.hash(header): header for header in frame.headers}
        entry = _Attempted(attempt, headers, summed=True, result=frame.result, kept=True)
        for body in self._uncertified():
            if body.attempt == name and body.state in self._content:
                entry.state, entry.stepping = ContentRef(body.state, body.state_bytes), True
        self._attempts[name] = entry
        if self.current is None or attempt.rank > self.current.rank:
            self._current = name

    def checked(self) -> list[Checked]:
        """What of the log's frames is this peer's to keep when the log is compacted."""
        return [
            Checked(entry.attempt, tuple(entry.headers.values()), entry.result)
            for entry in self._attempts.values()
            if entry.kept and entry.result is not None
        ]

    def keep(self, name: bytes) -> None:
        """Makes an attempt and its result durable, before the round made of it enters this log."""
        entry = self._attempts.get(name)
        if entry is not None and entry.result is not None and not entry.kept:
            entry.kept = True
            frame = Checked(entry.attempt, tuple(entry.headers.values()), entry.result)
            self.setting.outbox.persist([frame])

    @property
    def coordinator(self) -> str:
        return self.setting.newest_opening.coordinator

    @property
    def current(self) -> Attempt | None:
        entry = self._attempts.get(self._current)
        return entry.attempt if entry else None

    # Plans and training

    def on_plan(self, sender: str, message: PlanMessage, now: int) -> None:
        plan, ledger = message.plan, self.setting.voter.ledger
        if message.certified > ledger.certified or plan.version > self.version + 1:
            self._later_plan = (sender, message)
            self.setting.ask_records(sender, now)
            return
        if plan.version != self.version + 1 or (self.plan is not None and plan.rank < self.plan.rank):
            return
        if not self.setting.coordinates(plan.coordinator, plan.term):
            raise RemoteError("not_coordinator", f"a plan by {plan.coordinator} in term {plan.term}")
        self.setting.authority.check(plan.coordinator, plan)
        check_plan(plan, self.setting.rules.train_length)
        if plan.parent != self.state.root:
            raise RemoteError("bad_plan", f"trains from another state than version {self.version}")
        if self.plan is None or plan.rank > self.plan.rank:
            self._failed.clear()
        self.plan = plan
        self.setting.send(sender, PlanAccepted(plan.version, plan.term, plan.revision))
        self._offer_again(sender)
        self._train(now)

    def _offer_again(self, coordinator: str) -> None:
        """All that is finished for this round, whoever it is assigned to by now: an assignment counts once anyhow."""
        for (origin_round, _), header in sorted(self.slots.items()):
            if origin_round == self.version + 1:
                self.setting.send(coordinator, Offering(header))

    def on_reoffer(self, sender: str, message: Reoffer, now: int) -> None:
        if message.certified > self.setting.voter.ledger.certified or message.version > self.version + 1:
            self._later_reoffer = (sender, message)
            self.setting.ask_records(sender, now)
            return
        if message.version != self.version + 1 or not self.setting.coordinates(sender, message.term):
            return
        headers = tuple(header for slot, header in sorted(self.slots.items()) if slot[0] == message.version)
        plan = self.plan if self.plan is not None and self.plan.version == message.version else None
        training = (self._training[0].index,) if self._training is not None else ()
        self.setting.send(sender, Reoffered(message.term, message.version, plan, headers, training))

    def _train(self, now: int) -> None:
        """Begins the next assignment of the plan that is not done, one at a time."""
        plan, setting = self.plan, self.setting
        if plan is None or plan.version != self.version + 1:
            return
        mine = plan.of(setting.me)
        if self._training is not None:
            if self._training[0].index not in {assignment.index for assignment in mine}:
                setting.cancel(self._training[1])  # somebody else was given it
                self._training = None
            else:
                return
        if not self.held:
            self.fetch_state(now)
            return
        for assignment in mine:
            slot = (plan.version, assignment.index)
            if slot not in self.slots and assignment.index not in self._failed:
                self._begin(plan.version, assignment)
                return

    def _begin(self, version: int, assignment: Assignment) -> None:
        setting = self.setting
        seed = derive_seed(setting.authority.run, "train", version, assignment.index, setting.rules.seed)
        effect = Train(
            setting.outbox.new_id(), version, assignment.index, self.state, assignment.ranges, seed
        )
        number = setting.start(effect, lambda outcome, at: self._trained(version, assignment, outcome, at))
        self._training = (assignment, number)

    def _trained(self, version: int, assignment: Assignment, outcome: Outcome, now: int) -> None:
        setting = self.setting
        self._training = None
        if version != self.version + 1 or isinstance(outcome, Cancelled):
            self._train(now)
            return
        if not isinstance(outcome, Done) or not isinstance(outcome.value, Trained):
            reason = outcome.reason if isinstance(outcome, Failed) else "no result"
            self._failed.add(assignment.index)
            setting.outbox.emit(
                "training-failed", version=version, assignment=assignment.index, reason=reason
            )
            setting.send(self.coordinator, TrainingFailed(version, assignment.index, reason))
            self._train(now)
            return
        trained = outcome.value
        self.last_trained = trained
        self.local_steps += trained.steps
        header = setting.authority.sign(
            ContributionHeader(
                version,
                assignment.index,
                setting.incarnation,
                setting.me,
                self.state.root,
                trained.content,
                trained.samples,
                trained.steps,
                trained.norm,
                trained.loss,
                trained.wall_ns,
            )
        )
        self.slots[header.slot] = header
        self._content[trained.content.root] = "contribution"
        setting.outbox.persist([Slot(header)])
        setting.outbox.put(Offer(trained.content))
        setting.outbox.emit(
            "trained", version=version, assignment=assignment.index, steps=trained.steps, loss=trained.loss
        )
        setting.send(self.coordinator, Offering(header))
        self._offer_at = now + REOFFER_NS
        self._train(now)

    # Attempts

    def on_attempt(self, sender: str, message: AttemptMessage, now: int) -> None:
        attempt, setting = message.attempt, self.setting
        if attempt.version != self.version + 1:
            return
        if not setting.coordinates(attempt.coordinator, attempt.term):
            raise RemoteError(
                "not_coordinator", f"an attempt by {attempt.coordinator} in term {attempt.term}"
            )
        setting.authority.check(attempt.coordinator, attempt)
        if attempt.parent != self.state:
            raise RemoteError("bad_attempt", f"steps from another state than version {self.version}")
        name = setting.authority.hash(attempt)
        if name in self._attempts:
            if name == self._current:
                self._tell_again()
                self._gather(now)
            return
        headers = {setting.authority.hash(header): header for header in message.headers}
        check_attempt(
            attempt,
            headers,
            setting.authority,
            mean=setting.rules.mean,
            fan_out=setting.rules.fan_out,
            content_bytes=setting.rules.contribution_bytes,
        )
        if not agrees(setting.rules.step_parameters(attempt.version), attempt.step):
            raise RemoteError("bad_attempt", "the scalars of the step do not follow from the run's rules")
        self._attempts[name] = _Attempted(attempt, headers)
        while len(self._attempts) > MAX_ATTEMPTS_KEPT:
            del self._attempts[min(self._attempts, key=lambda n: self._attempts[n].attempt.rank)]
        current = self.current
        if current is None or attempt.rank > current.rank:
            self._current = name
            for root, effect_id in list(self._fetching.items()):
                if root != self.state.root:
                    setting.cancel(effect_id)
                    del self._fetching[root]
        self._gather(now)
        setting.retry(now)

    def _gather(self, now: int) -> None:
        """Fetches what this member has to sum in the current attempt; combines when all is here."""
        entry = self._attempts.get(self._current)
        if entry is None or entry.combining or entry.summed:
            return
        attempt, me = entry.attempt, self.setting.me
        if me not in attempt.tree or not (attempt.sends_partial(me) or attempt.tree.root == me):
            return
        inputs: list[tuple[ContentRef, Factors]] = [(own.content, own.factors) for own in attempt.of(me)]
        missing = False
        for child in attempt.tree.children(me):
            if attempt.sends_partial(child):
                partial = entry.partials.get(child)
                wanted = [(partial.content, PARTIAL)] if partial else []
                missing = missing or partial is None
            else:
                wanted = [(leaf.content, leaf.factors) for leaf in attempt.of(child)]
            for content, factors in wanted:
                inputs.append((content, factors))
                if content.root not in self._content:
                    missing = True
                    self._fetch(content, (child,), "contribution", child, now)
        if missing or any(content.root not in self._content for content, _ in inputs):
            return
        entry.combining = True
        name = self._current
        effect = Combine(self.setting.outbox.new_id(), tuple(inputs))
        self.setting.start(effect, lambda outcome, at: self._combined(name, outcome, at))

    def _fetch(
        self, content: ContentRef, sources: tuple[str, ...], purpose: str, culprit: str, now: int
    ) -> None:
        if content.root in self._fetching or content.root in self._content:
            return
        for source in sources:
            self.setting.link(source)
        name = self._current
        effect = Fetch(self.setting.outbox.new_id(), content, sources, purpose)
        self._fetching[content.root] = self.setting.start(
            effect, lambda outcome, at: self._fetched(name, content, purpose, culprit, outcome, at)
        )

    def _fetched(
        self, name: bytes, content: ContentRef, purpose: str, culprit: str, outcome: Outcome, now: int
    ) -> None:
        self._fetching.pop(content.root, None)
        if isinstance(outcome, Done):
            self._content[content.root] = purpose
            if isinstance(outcome.value, FetchReport):
                self.setting.outbox.emit(
                    "fetched",
                    purpose=purpose,
                    size_bytes=content.size_bytes,
                    sources=outcome.value.bytes_by_source,
                )
            if purpose == "result":
                self._have_result(name, now)
            else:
                self._gather(now)
        elif isinstance(outcome, Failed) and name == self._current:
            if not self.setting.link(culprit):
                since = self._unlinked.setdefault((name, culprit), now)
                if now < since + LINK_PATIENCE_NS:
                    self._refetch_at = now + REFETCH_RESULT_NS
                    return
            self.setting.outbox.emit("fetch-failed", purpose=purpose, source=culprit, reason=outcome.reason)
            self.setting.send(self.coordinator, Obstacle(name, culprit, outcome.reason[:200]))
            if purpose == "result":
                self._refetch_at = now + REFETCH_RESULT_NS

    def on_partial(self, sender: str, message: PartialMessage, now: int) -> None:
        partial = message.partial
        entry = self._attempts.get(partial.attempt)
        if entry is None or partial.sender not in entry.attempt.tree:
            return
        if entry.attempt.tree.parent(partial.sender) != self.setting.me:
            return
        self.setting.authority.check(partial.sender, partial)
        if partial.content.size_bytes != self.setting.rules.contribution_bytes:
            raise RemoteError("bad_partial", f"{partial.content.size_bytes} bytes")
        entry.partials.setdefault(partial.sender, partial)
        self._gather(now)

    def _combined(self, name: bytes, outcome: Outcome, now: int) -> None:
        entry, setting = self._attempts.get(name), self.setting
        if entry is None or name != self._current:
            return
        entry.combining = False
        attempt = entry.attempt
        if not isinstance(outcome, Done) or not isinstance(outcome.value, Combined):
            reason = outcome.reason if isinstance(outcome, Failed) else "cancelled"
            setting.send(self.coordinator, Obstacle(name, setting.me, f"could not combine: {reason}"[:200]))
            return
        combined = outcome.value
        if not combined.finite:
            self._blame_nonfinite(name, entry, combined.nonfinite)
            return
        entry.summed = True
        self._content[combined.content.root] = "partial"
        setting.outbox.put(Offer(combined.content))
        parent = attempt.tree.parent(setting.me)
        if parent is None:
            result = setting.authority.sign(Result(name, setting.me, combined.content, combined.norm))
            setting.send(self.coordinator, ResultMessage(result))
            if self.coordinator != setting.me:
                self.on_result(setting.me, ResultMessage(result), now)
            return
        entry.partial = partial = setting.authority.sign(Partial(name, setting.me, combined.content))
        for peer in dict.fromkeys((parent, self.coordinator)):
            setting.send(peer, PartialMessage(partial))

    def _blame_nonfinite(self, name: bytes, entry: _Attempted, roots: tuple[bytes, ...]) -> None:
        by_root = {e.content.root: e.contributor for e in entry.attempt.entries}
        by_root |= {partial.content.root: partial.sender for partial in entry.partials.values()}
        culprits = {by_root.get(root, self.setting.me) for root in roots} or {self.setting.me}
        for culprit in sorted(culprits):
            self.setting.send(self.coordinator, Obstacle(name, culprit, "not finite"))

    # The result and the new state

    def on_result(self, sender: str, message: ResultMessage, now: int) -> None:
        result = message.result
        entry, setting = self._attempts.get(result.attempt), self.setting
        if entry is None or entry.result is not None or result.attempt != self._current:
            return
        if result.sender != entry.attempt.tree.root:
            raise RemoteError("bad_result", f"a result by {result.sender}, which is not the root")
        setting.authority.check(result.sender, result)
        if result.content.size_bytes != setting.rules.contribution_bytes or not math.isfinite(result.norm):
            raise RemoteError("bad_result", f"{result.content.size_bytes} bytes, norm {result.norm}")
        entry.result = result
        if result.content.root in self._content:
            self._have_result(result.attempt, now)
        else:
            parent = entry.attempt.tree.parent(setting.me) if setting.me in entry.attempt.tree else None
            self._fetch_result(result, [sender, parent or result.sender, result.sender], now)

    def _fetch_result(self, result: Result, preferred: list[str], now: int) -> None:
        sources = tuple(peer for peer in dict.fromkeys(preferred) if peer != self.setting.me)
        self._fetch(result.content, sources, "result", result.sender, now)

    def _have_result(self, name: bytes, now: int) -> None:
        """The result is here: let the children have it, and make the new state."""
        entry, setting = self._attempts.get(name), self.setting
        if entry is None or entry.result is None or entry.stepping or name != self._current:
            return
        setting.outbox.put(Offer(entry.result.content))
        if setting.me in entry.attempt.tree:
            for child in entry.attempt.tree.children(setting.me):
                setting.send(child, ResultMessage(entry.result))
        if not self.held:
            self.fetch_state(now)
            return
        entry.stepping = True
        effect = Step(setting.outbox.new_id(), self.state, entry.result.content, entry.attempt.step)
        setting.start(effect, lambda outcome, at: self._stepped(name, outcome, at))

    def _stepped(self, name: bytes, outcome: Outcome, now: int) -> None:
        entry, setting = self._attempts.get(name), self.setting
        if entry is None or entry.attempt.version != self.version + 1:
            return
        if not isinstance(outcome, Done) or not isinstance(outcome.value, Stepped):
            entry.stepping = False
            reason = outcome.reason if isinstance(outcome, Failed) else "cancelled"
            setting.outbox.emit("step-failed", version=entry.attempt.version, reason=reason)
            return
        stepped = outcome.value
        entry.state, entry.finite = stepped.content, stepped.finite
        self._content[stepped.content.root] = "state"
        setting.outbox.put(Offer(stepped.content))
        setting.send(self.coordinator, Report(name, stepped.content, stepped.finite))
        setting.retry(now)
        if stepped.finite and setting.me in entry.attempt.tree:
            self._validate(name, entry)

    def _validate(self, name: bytes, entry: _Attempted) -> None:
        attempt, setting = entry.attempt, self.setting
        if entry.state is None:
            return
        ranges = attempt.validation[attempt.tree.members.index(setting.me)] if attempt.validation else ()
        if attempt.validation and not ranges:
            setting.send(self.coordinator, Share(name, 0, 0.0, ()))
            return
        effect = Validate(setting.outbox.new_id(), entry.state, ranges)
        setting.start(effect, lambda outcome, at: self._validated(name, outcome, at))

    def _validated(self, name: bytes, outcome: Outcome, now: int) -> None:
        if isinstance(outcome, Done) and isinstance(outcome.value, Validated):
            value = outcome.value
            share = Share(name, value.samples, value.loss_sum, tuple(sorted(value.measure_sums.items())))
        else:
            reason = outcome.reason if isinstance(outcome, Failed) else "cancelled"
            share = Share(name, 0, 0.0, (), reason[:200] or "failed")
        entry = self._attempts.get(name)
        if entry is not None:
            entry.share = share
        self.setting.send(self.coordinator, share)

    # Judging the record

    def check(self, record: Record, body: Round, now: int) -> str | None:
        """Why a voter does not append this round ("" when it may; None: not yet). See following.Check."""
        setting = self.setting
        if body.version <= self.version:
            return f"version {body.version} is certified already"
        if body.version > self.version + 1:
            return None
        if body.parent != self.state.root:
            return f"its parent is not the state of version {self.version}"
        if setting.voter.silenced:
            return setting.voter.silenced
        if not all(math.isfinite(value) for _, value in body.metrics):
            return "a metric is not finite"
        entry = self._attempts.get(body.attempt)
        if entry is None:
            self._ask_attempt(record, body.attempt, now)
            return None
        claimed = [(c.origin_round, c.assignment, c.contributor, c.weight) for c in body.contributors]
        signed = [
            (e.origin_round, e.assignment, e.contributor, e.factors.float_buffers)
            for e in entry.attempt.entries
        ]
        if claimed != signed:
            return "its contributors are not those of its attempt"
        strangers = [c.contributor for c in body.contributors if not setting.roster.is_member(c.contributor)]
        if strangers:
            return f"{strangers[0]} does not count: {setting.roster.excluded(strangers[0]) or 'no member'}"
        if any(c.origin_round != body.version for c in body.contributors):
            return "a contribution to another version"
        if entry.result is None:
            self._ask_attempt(record, body.attempt, now)
            return None
        if entry.state is None:
            self._go_on(record, body.attempt, entry.result, now)
            return None
        if entry.result.content.root != body.result:
            return "its result is not the one that the tree's root signed"
        if (entry.state.root, entry.state.size_bytes) != (body.state, body.state_bytes):
            setting.outbox.emit("state-differs", version=body.version, here=entry.state.root.hex())
            return f"another state was computed here: {entry.state.root.hex()[:16]}"
        self.keep(body.attempt)
        return ""

    def _go_on(self, record: Record, name: bytes, result: Result, now: int) -> None:
        """From the result to the state, if nothing of this is under way: an earlier life may have ended in between."""
        if result.content.root in self._content:
            self._have_result(name, now)
            return
        sources = [record.header.coordinator, self.setting.voter.coordinator, result.sender]
        self._fetch_result(result, [peer for peer in sources if peer and self.setting.alive(peer)], now)

    def _ask_attempt(self, record: Record, name: bytes, now: int) -> None:
        """Asks for an attempt and its result: whoever ordered the round, and whoever sends its record now, has them."""
        if name == self._asked and now < self._asked_at + REFETCH_RESULT_NS:
            return
        self._asked, self._asked_at = name, now
        for peer in dict.fromkeys((record.header.coordinator, self.setting.voter.coordinator)):
            if peer is not None and peer != self.setting.me:
                self.setting.send(peer, AttemptRequest(name))

    def connected(self, peer: str, now: int) -> None:
        """What a broken link may have swallowed is told again; what could not be had over it is asked for again."""
        if entry := self._attempts.get(self._current):
            self._gather(now)
            tree = entry.attempt.tree
            if self.setting.me in tree and peer == tree.parent(self.setting.me) and entry.partial is not None:
                self.setting.send(peer, PartialMessage(entry.partial))
            if (
                entry.result is not None
                and self.setting.me in tree
                and peer in tree.children(self.setting.me)
            ):
                self.setting.send(peer, ResultMessage(entry.result))
        if peer != self.coordinator:
            return
        if self.plan is not None and self.plan.version == self.version + 1:
            self._offer_again(peer)
        self._tell_again()

    def _tell_again(self) -> None:
        """Tells the coordinator once more what this member has come to in the current attempt."""
        name, entry = self._current, self._attempts.get(self._current)
        setting, coordinator = self.setting, self.coordinator
        if entry is None:
            return
        if entry.combining or (entry.stepping and entry.state is None):
            setting.send(coordinator, Progress(name))  # tensor work of many seconds is not a stall
        if entry.result is not None and entry.result.sender == setting.me:
            setting.send(coordinator, ResultMessage(entry.result))
        if entry.partial is not None:
            setting.send(coordinator, PartialMessage(entry.partial))
        if entry.state is not None:
            setting.send(coordinator, Report(name, entry.state, entry.finite))
        if entry.share is not None:
            setting.send(coordinator, entry.share)

    def attempt_message(self, name: bytes) -> AttemptMessage | None:
        entry = self._attempts.get(name)
        return AttemptMessage(entry.attempt, tuple(entry.headers.values())) if entry else None

    def result_of(self, name: bytes) -> Result | None:
        entry = self._attempts.get(name)
        return entry.result if entry else None

    # Certified

    def certified(self, body: Round, now: int) -> None:
        """Version `body.version` is certified: what was made on the way there goes, its state is adopted."""
        setting = self.setting
        entry = self._attempts.get(body.attempt)
        computed = entry.state if entry else None
        old = self.state
        self.version = body.version
        self.state = ContentRef(body.state, body.state_bytes)
        self._last_round = body
        if computed is not None and computed != self.state:
            self._note_mismatch(computed)
        if self._training is not None:
            setting.cancel(self._training[1])
            self._training = None
        for effect_id in self._fetching.values():
            setting.cancel(effect_id)
        self._fetching.clear()
        self._unlinked.clear()
        self._attempts.clear()
        self._current = b""
        self._failed.clear()
        if self.plan is not None and self.plan.version <= self.version:
            self.plan = None
        self.slots = {slot: header for slot, header in self.slots.items() if slot[0] > self.version}
        self.held = self.state.root in self._content
        kept = {
            self.state.root,
            old.root,
            *setting.rules.pinned,
            *(header.content.root for header in self.slots.values()),
        }
        gone = tuple(sorted(root for root in self._content if root not in kept))
        if gone:
            setting.outbox.put(Discard(gone))
        self._content = {root: what for root, what in self._content.items() if root in kept}

    def _note_mismatch(self, computed: ContentRef) -> None:
        """The certified state is fetched; a voter to whom this happens twice has hardware or libraries to look at."""
        self.mismatches += 1
        self.setting.outbox.emit(
            "state-differs", version=self.version, here=computed.root.hex(), certified=self.state.root.hex()
        )
        if self.mismatches > 1:
            self.setting.voter.silenced = (
                "this voter computed other states than those certified, and votes no more"
            )

    def settle(self, now: int) -> None:
        """After one or several certified rounds: show the newest state, or get it; take up what waited for it."""
        if self.held:
            self.setting.outbox.put(Adopt(self.version, self.state))
        else:
            self.fetch_state(now)
        later_plan, self._later_plan = self._later_plan, None
        later_reoffer, self._later_reoffer = self._later_reoffer, None
        if later_plan is not None:
            self.on_plan(later_plan[0], later_plan[1], now)
        if later_reoffer is not None:
            self.on_reoffer(later_reoffer[0], later_reoffer[1], now)

    def fetch_state(self, now: int) -> None:
        """Gets the state of the newest version from those who made it, and from the committee."""
        if self.held or self.state.root in self._fetching:
            return
        setting = self.setting
        made = [c.contributor for c in self._last_round.contributors] if self._last_round else []
        voters = list(setting.voter.ledger.committee.everyone)
        sources = tuple(p for p in dict.fromkeys([*made, *voters]) if p != setting.me and setting.alive(p))
        if not sources:
            self._refetch_at = now + REFETCH_NS
            return
        version, state = self.version, self.state
        effect = Fetch(setting.outbox.new_id(), state, sources, "state")
        self._fetching[state.root] = setting.start(
            effect, lambda outcome, at: self._state_fetched(version, state, outcome, at)
        )

    def _state_fetched(self, version: int, state: ContentRef, outcome: Outcome, now: int) -> None:
        self._fetching.pop(state.root, None)
        setting = self.setting
        if isinstance(outcome, Done):
            self._content[state.root] = "state"
            if isinstance(outcome.value, FetchReport):
                setting.outbox.emit(
                    "fetched",
                    purpose="state",
                    version=version,
                    size_bytes=state.size_bytes,
                    sources=outcome.value.bytes_by_source,
                    refused=outcome.value.bad_sources,
                )
            if version == self.version:
                self.held = True
                setting.outbox.put(Offer(state))
                setting.outbox.put(Adopt(version, state))
                self._train(now)
                if self._current:
                    self._have_result(self._current, now)
        else:
            if isinstance(outcome, Failed):
                report = outcome.value
                setting.outbox.emit(
                    "fetch-failed",
                    purpose="state",
                    version=version,
                    reason=outcome.reason,
                    sources=report.bytes_by_source if isinstance(report, FetchReport) else {},
                    refused=report.bad_sources if isinstance(report, FetchReport) else {},
                )
            if version == self.version:
                self._refetch_at = now + REFETCH_NS

    def _owes_offers(self) -> bool:
        """Something is finished for the round that is being collected."""
        collecting = self.plan is not None and not self._current and self.coordinator != self.setting.me
        return collecting and any(origin_round == self.version + 1 for origin_round, _ in self.slots)

    def tick(self, now: int) -> None:
        if self._owes_offers() and now >= self._offer_at:
            self._offer_at = now + REOFFER_NS
            self._offer_again(self.coordinator)
        if self._refetch_at is None or now < self._refetch_at:
            return
        self._refetch_at = None
        self.fetch_state(now)
        self._gather(now)
        entry = self._attempts.get(self._current)
        if entry is not None and entry.result is not None and entry.result.content.root not in self._content:
            members = [m for m in entry.attempt.tree.members if self.setting.alive(m)]
            self._fetch_result(entry.result, members, now)

    def next_deadline(self) -> int | None:
        times = [self._refetch_at, self._offer_at if self._owes_offers() else None]
        return min((at for at in times if at is not None), default=None)

    def progress(self, now: int) -> None:
        """Bytes arrived, or a sum advanced: tell the coordinator, not too often, that the attempt is not stuck."""
        if self._current and now - self._progress_at >= PROGRESS_INTERVAL_NS:
            self._progress_at = now
            self.setting.send(self.coordinator, Progress(self._current))

    @property
    def busy(self) -> bool:
        return self._training is not None or bool(self._fetching)
