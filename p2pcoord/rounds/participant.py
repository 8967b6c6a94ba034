"""A member's side of a round: train what the plan assigns, offer it, combine, step, validate; and judge the record.

    on           does                                                            waits for                      in
    plan         accept it; train each own assignment once (a slot is persisted  the state of version - 1       training
                 before its header is sent); offer again what is finished
    attempt      cancel what the attempt before it needed; with children or      children's bytes, checked      summing
                 several contributions: fetch, combine, send the partial sum     against the signed roots
                 to the parent; at the root: sign the result
    result       fetch it from the parent, pass it on to the children, step,     the bytes                      stepping
                 report the state, validate the own share
    record       compare it with what was done here, before it is appended       attempt, result, state         judging
    certificate  adopt the state (fetch it when it is another than computed)     -                              holdings

The parts share `Holdings` (the newest version, and the content on this disk) and the `AttemptBook` (what was done in each
attempt).
"""

from __future__ import annotations

from collections.abc import Sequence

from p2pcoord.aggregation.contribution import ContributionHeader
from p2pcoord.consensus.record import Round
from p2pcoord.content import ContentRef
from p2pcoord.errors import RemoteError
from p2pcoord.optimization.optimizer import agrees
from p2pcoord.rounds.attempt import Attempt, check_attempt
from p2pcoord.rounds.attempt_book import AttemptBook, Attempted
from p2pcoord.rounds.frames import Checked, Slot
from p2pcoord.rounds.holdings import Holdings
from p2pcoord.rounds.judging import Judge
from p2pcoord.rounds.messages import (
    AttemptMessage,
    AttemptRequest,
    PartialMessage,
    PlanMessage,
    Progress,
    Reoffer,
    Report,
    ResultMessage,
)
from p2pcoord.rounds.plan import Plan, shares, size
from p2pcoord.rounds.setting import Setting
from p2pcoord.rounds.stepping import Stepping
from p2pcoord.rounds.summing import Summing
from p2pcoord.rounds.training import Training
from p2pcoord.rounds.transfers import Transfers
from p2pcoord.wire import Message

# To one peer an attempt is shown this often: a little more often than a voter asks for it (judging.ASK_AGAIN_NS).
ANSWER_INTERVAL_NS = 200_000_000

# One sign of life a second for an attempt whose bytes are still moving.
PROGRESS_INTERVAL_NS = 1_000_000_000


class Participant:
    """One member's side, composed of the parts above."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.holdings = Holdings(setting, self._have_state)
        self.book = AttemptBook(setting)
        self.training = Training(setting, self.holdings, self.book)
        self.transfers = Transfers(setting, self.holdings, self.book)
        self.stepping = Stepping(setting, self.holdings, self.book, self.transfers)
        self.summing = Summing(setting, self.holdings, self.book, self.transfers, self.stepping)
        self.judge = Judge(setting, self.holdings, self.book, self.stepping)
        self._progress_at = 0
        self._answered: dict[str, int] = {}
        """To whom an attempt was shown in this round, and when last."""

    # Reading

    @property
    def version(self) -> int:
        """The newest certified one."""
        return self.holdings.version

    @property
    def state(self) -> ContentRef:
        return self.holdings.state

    @property
    def held(self) -> bool:
        """Whether the state's bytes are here."""
        return self.holdings.held

    @property
    def plan(self) -> Plan | None:
        return self.training.plan

    @property
    def current(self) -> Attempt | None:
        """The newest attempt at the round under way."""
        entry = self.book.current
        return entry.attempt if entry else None

    # What was before

    def restore(
        self,
        slots: dict[tuple[int, int], ContributionHeader],
        checked: Sequence[Checked],
        contents: frozenset[bytes],
    ) -> None:
        """Takes up what an earlier life signed, checked and stored, after its certified rounds were followed."""
        self.training.restore(slots, contents)
        self.holdings.restore(contents, self.training.contributions())
        for frame in checked:
            self.book.restore(frame, self.holdings)

    def frames(self) -> list[Slot | Checked]:
        """What of the log's frames is this peer's to keep when the log is compacted."""
        return [*(Slot(header) for header in self.training.slots.values()), *self.book.kept()]

    # Messages

    def receive(self, sender: str, message: Message, now: int) -> bool:
        """Handles what is for a member; False when it is not. Raises RemoteError."""
        match message:
            case PlanMessage():
                self.training.on_plan(sender, message, now)
            case Reoffer():
                self.training.on_reoffer(sender, message, now)
            case AttemptMessage():
                self._on_attempt(message, now)
            case AttemptRequest():
                self._on_attempt_request(sender, message, now)
            case PartialMessage():
                self.summing.on_partial(message, now)
            case ResultMessage():
                self.stepping.on_result(sender, message, now)
            case _:
                return False
        return True

    def _on_attempt(self, message: AttemptMessage, now: int) -> None:
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
        if name in self.book:
            if name == self.book.current_name:
                self._tell_again(now)
                self.summing.gather(now)
            return
        if setting.busy:  # each attempt begins fetches and a sum; this one is told again
            raise RemoteError("overloaded", f"attempt {attempt.number}, and the ones before it are not done")
        headers = {setting.authority.hash(header): header for header in message.headers}
        plan = self.plan
        shown = plan.assignments if plan and plan.rank[:2] == attempt.rank[:2] else ()
        dealt = {assignment.index: size(assignment.ranges) for assignment in shown}
        check_attempt(
            attempt,
            headers,
            setting.authority,
            mean=setting.rules.mean,
            fan_out=setting.rules.fan_out,
            content_bytes=setting.rules.contribution_bytes,
            most_samples=lambda assignment: setting.rules.most_samples(dealt.get(assignment, 0)),
        )
        if not agrees(setting.rules.step_parameters(attempt.version), attempt.step):
            raise RemoteError("bad_attempt", "the scalars of the step do not follow from the run's rules")
        if attempt.validation != shares(setting.rules.validation_length, len(attempt.tree.members)):
            raise RemoteError("bad_attempt", "the validation is not dealt over the tree's members")
        if self.book.add(name, Attempted(attempt, headers)):
            self.holdings.stop_fetching()
        self.summing.gather(now)
        setting.agreement.following.retry(now)

    def _on_attempt_request(self, sender: str, message: AttemptRequest, now: int) -> None:
        """Somebody was shown the record of a round, and not its attempt. The answer is a hundred times as long as the question,
        so each has only so many; who missed one asks again."""
        entry = self.book.get(message.attempt)
        again_at = self._answered.get(sender, now - ANSWER_INTERVAL_NS) + ANSWER_INTERVAL_NS
        if entry is not None and self.setting.roster.is_listed(sender) and now >= again_at:
            self._answered[sender] = now
            self.setting.neighbours.send(sender, entry.message(), now)
            if entry.result is not None:
                self.setting.neighbours.send(sender, ResultMessage(entry.result), now)

    # Links

    def connected(self, peer: str, now: int) -> None:
        """What a broken link may have swallowed is told again; what could not be had over it is asked for again."""
        me, neighbours = self.setting.me, self.setting.neighbours
        if entry := self.book.current:
            self.summing.gather(now)
            tree = entry.attempt.tree
            if me in tree and peer == tree.parent(me) and entry.partial is not None:
                neighbours.send(peer, PartialMessage(entry.partial), now)
            if me in tree and peer in tree.children(me) and entry.result is not None:
                neighbours.send(peer, ResultMessage(entry.result), now)
        if peer == self.setting.coordinator:
            self.training.connected(peer, now)
            self._tell_again(now)

    def _tell_again(self, now: int) -> None:
        """Tells the coordinator once more what this member has come to in the current attempt."""
        name, entry = self.book.current_name, self.book.current
        if entry is None:
            return
        told: list[Message] = []
        if entry.combining or (entry.stepping and entry.state is None):
            told.append(Progress(name))  # tensor work of many seconds is not a stall
        if entry.result is not None and entry.result.sender == self.setting.me:
            told.append(ResultMessage(entry.result))
        if entry.partial is not None:
            told.append(PartialMessage(entry.partial))
        if entry.state is not None:
            told.append(Report(name, entry.state, entry.finite))
        if entry.share is not None:
            told.append(entry.share)
        for message in told:
            self.setting.neighbours.send(self.setting.coordinator, message, now)

    # Certified

    def certified(self, body: Round) -> None:
        """Version `body.version` is certified: what was made on the way there goes, its state is adopted."""
        entry, before = self.book.get(body.attempt), self.state
        self.holdings.follow(body)
        if entry is not None and entry.result is not None and entry.state is not None:
            # A root that signs two results must not make honest voters doubt themselves.
            if entry.result.content.root == body.result:
                self.judge.compare(entry.state)
        self.training.certified()
        self.transfers.certified()
        self.book.clear()
        self._answered.clear()
        self.holdings.let_go(before, self.training.contributions())

    def settle(self, now: int) -> None:
        """After one or several certified rounds: show the newest state, or get it; take up what waited for it."""
        self.holdings.show(now)
        self.training.take_up_later(now)

    def _have_state(self, now: int) -> None:
        """The newest state had to be fetched, and is here."""
        self.training.go_on(now)
        if self.book.current_name:
            self.stepping.step(self.book.current_name, now)

    # Time

    def tick(self, now: int) -> None:
        self.training.tick(now)
        self.stepping.tick(now)
        if self.holdings.refetch(now):
            self.summing.gather(now)
            self.stepping.look_again(now)

    def next_deadline(self) -> int | None:
        times = (self.holdings.refetch_at, self.training.next_deadline(), self.stepping.next_deadline())
        return min((at for at in times if at is not None), default=None)

    def progress(self, now: int) -> None:
        """Bytes arrived, or a sum advanced: tell the coordinator, not too often, that the attempt is not stuck."""
        if self.book.current_name and now - self._progress_at >= PROGRESS_INTERVAL_NS:
            self._progress_at = now
            self.setting.neighbours.send(self.setting.coordinator, Progress(self.book.current_name), now)
