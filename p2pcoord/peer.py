"""The centre: one peer of a run, as a state machine without I/O.

    inputs    start, receive, complete, tick, connected, disconnected, leave      each returns effects (`effects.py`)
    reading   next_deadline, status                                               change nothing

`Peer` composes the agreement (`consensus/`), the roster of members (`rounds/participation.py`) and the work of the run
(`Work`: the rounds), gives every message to the part it is meant for, and is the edge at which a `RemoteError` stops: what a
peer sent wrongly is counted by kind and by peer, and goes no further. Everything random is derived by hash from the entropy
given at start and a purpose, so one more draw in one place moves nothing in another.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from hashlib import sha256
from random import Random
from typing import Any, Protocol

import msgspec

from p2pcoord.consensus.agreement import Agreement
from p2pcoord.consensus.election import NEVER
from p2pcoord.consensus.evidence import EvidenceBook, contradict, signer_of
from p2pcoord.consensus.ledger import (
    Admission,
    CommitteeChange,
    Exclusion,
    Farewell,
    Fork,
    Members,
    Record,
    Round,
    SignedStatement,
)
from p2pcoord.consensus.voter import Timing
from p2pcoord.effects import AnswerStatus, Done, Effect, Failed, Halt, Outcome, Reach
from p2pcoord.errors import LocalError, RemoteError
from p2pcoord.frames import Life, PeerFrame, Slot
from p2pcoord.gossip.gossip import Gossip
from p2pcoord.gossip.membership import Changed, PeerState
from p2pcoord.gossip.records import CapabilityProfile, PeerRecord
from p2pcoord.identity import Authority
from p2pcoord.links import FULL_MESH, Links
from p2pcoord.messages import (
    AnyMessage,
    Append,
    AppendReply,
    EvidenceMessage,
    GenesisReply,
    GenesisRequest,
    JoinReply,
    JoinRequest,
    LeaveRequest,
    ReachReply,
    ReachRequest,
    RecordsRequest,
    StatusRequest,
    decode_message,
)
from p2pcoord.outbox import Outbox
from p2pcoord.rounds.participation import MAX_ADMISSIONS, MAX_NAME_LENGTH, Roster, join_proof
from p2pcoord.rounds.rounds import Rounds
from p2pcoord.rounds.setting import Rules, Setting
from p2pcoord.wire import decode

# A tick this late means that the machine slept, not that the others did (architecture: effects).
LATE_TICK_NS = 500_000_000

# A joiner repeats its request until a certified record names it; a member that leaves likewise.
REQUEST_INTERVAL_NS = 1_000_000_000

# A member outside the committee that has heard of nothing new asks somebody this often whether it missed an announcement.
CATCH_UP_INTERVAL_NS = 2_000_000_000

# The coordinator looks at its committee this often; a change takes two certificates anyway.
TEND_INTERVAL_NS = 500_000_000

# While it waits for learners it looks more often: one that has all is ready for a moment only, until the next record.
LEARNING_INTERVAL_NS = 50_000_000

# Messages that one input may cause a peer to send itself; a round needs about ten.
MAX_LOCAL_MESSAGES = 10_000

# Exclusions in one record: each may carry two statements of a few hundred bytes.
MAX_EXCLUSIONS = 16

# Members that an unreachable leaf names as those it can be probed through.
MAX_LEAF_LINKS = 8

# Rejected messages are counted for this many peers at most; the rest are counted together.
MAX_COUNTED_PEERS = 1024
OTHERS = "others"


class Restored(msgspec.Struct, frozen=True):
    """What an earlier life left: the log's frames (empty on the first start), the roots of the content on the disk, and
    fresh entropy for this life."""

    frames: tuple[bytes, ...]
    entropy: bytes
    contents: frozenset[bytes] = frozenset()


class PeerSettings(msgspec.Struct, frozen=True):
    """What this machine brings, and what the run agreed. `secret` is None in an open run."""

    name: str
    secret: bytes | None
    committee_size: int = 7
    rotation_rounds: int = 20
    timing: Timing = Timing()
    rules: Rules | None = None
    """The run's rules for rounds; None when the owner gives the peer another `work`."""
    gossip: bool = False
    """Whether this peer gossips, probes and dials; False in tests of the agreement alone, where links are given."""
    addresses: tuple[str, ...] = ()
    """Multiaddrs at which others may reach this peer."""
    bootstrap: tuple[str, ...] = ()
    """Addresses (multiaddr or host:port) to dial while this peer knows nobody."""
    profile: CapabilityProfile = CapabilityProfile()
    program_version: str = ""
    minimum_memory_bytes: int = 0
    """What the run asks of a joiner's device."""
    trusted: tuple[int, bytes] | None = None
    """(height, record) that the inviter had certified: a chain without it is refused."""


class Work(Protocol):
    """What the agreement is for: makes rounds while this peer coordinates, and judges those of others."""

    def check(self, record: Record, body: Round, now: int) -> str | None: ...
    def certified(self, records: Sequence[Record], now: int) -> None: ...
    def receive(self, sender: str, message: AnyMessage, now: int) -> bool: ...
    def complete(self, effect_id: int, outcome: Outcome, now: int) -> None: ...
    def progress(self, now: int) -> None: ...
    def tick(self, now: int) -> None: ...
    def next_deadline(self) -> int: ...
    @property
    def idle(self) -> bool: ...
    @property
    def reconfigurable(self) -> bool: ...


class Peer:
    """One peer. Create it with its identity and the run's genesis, give it its `work`, then call start once."""

    def __init__(self, authority: Authority, genesis: Record, settings: PeerSettings) -> None:
        self.authority = authority
        self.me = authority.peer_id
        self.settings = settings
        self.outbox = Outbox(self.me)
        self.genesis = genesis
        self.roster = Roster(authority, settings.secret)
        self.connections: set[str] = set()
        self.rejected: dict[str, dict[str, int]] = {}
        self.halted = ""
        self.agreement: Agreement
        self.work: Work
        self._persists: dict[int, None] = {}
        self._joiners: dict[str, Admission] = {}
        self._readers: set[str] = set()
        """Connected peers that have shown they may join, and have not asked for it yet."""
        self._farewells: dict[str, Farewell] = {}
        self._exclusions: dict[str, Exclusion] = {}
        """Proposed by this peer and not yet certified."""
        self._evidence = EvidenceBook(authority)
        self._leaving: Farewell | None = None
        self._request_at = NEVER
        self._catch_up_at = NEVER
        self._tend_at = NEVER
        self._next_source = 0
        self._now = 0
        self.incarnation = 0
        self.gossip: Gossip | None = None
        self.links: Links | None = None
        self._reaching: dict[int, str] = {}
        self._work_due = False

    def _rounds(self, rules: Rules, frames: Sequence[PeerFrame], contents: frozenset[bytes]) -> Rounds:
        setting = Setting(
            self.authority,
            self.agreement.voter,
            self.roster,
            self.outbox,
            rules,
            incarnation=self.incarnation,
            alive=self.alive,
            fit=self.fit,
            send=self.send,
            between_rounds=self._tend,
            see=self.see,
            exclude=self.exclude,
            ask_records=self.agreement.replication.ask,
            retry=self.agreement.replication.retry,
        )
        rounds = Rounds(setting, self.agreement)
        slots = {frame.header.slot: frame.header for frame in frames if isinstance(frame, Slot)}
        ledger = self.agreement.voter.ledger
        rounds.restore(ledger.records[: ledger.certified + 1], slots, contents, self._now)
        return rounds

    def alive(self, peer: str) -> bool:
        """Not known to be gone: what it was given to do is waited for."""
        if self.gossip is None or peer == self.me:
            return peer == self.me or peer in self.connections
        return self.gossip.membership.alive(peer)

    def fit(self, peer: str) -> bool:
        """Alive beyond suspicion, by what is known now: new work may rest on it."""
        if self.gossip is None or peer == self.me:
            return peer == self.me or peer in self.connections
        if self.gossip.membership.state(peer) is not PeerState.ALIVE:
            return False
        return peer in self.connections or len(self.roster.members) > FULL_MESH

    def _begin_incarnation(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.outbox.persist([Life(incarnation)])

    def send(self, peer: str, message: msgspec.Struct) -> None:
        """Sends; a peer without a connection is dialled, and what it misses is sent again by whoever needs it."""
        if self.links is not None and peer != self.me:
            self.links.dial(peer, self._now)
        self.outbox.send(peer, message)

    # Inputs

    def start(self, restored: Restored, now: int) -> list[Effect]:
        """Begins, or goes on after a restart. Raises LocalError when the log is not this peer's or contradicts itself."""
        self._entropy = restored.entropy
        self.agreement = Agreement(
            self.authority,
            self.outbox,
            self.genesis,
            self.random("election"),
            timing=self.settings.timing,
            committee_size=self.settings.committee_size,
            trusted=self.settings.trusted,
            check=self._check,
            certified=self._on_certified,
            see=self.see,
            holds_state=lambda: not isinstance(self.work, Rounds) or self.work.participant.held,
        )
        frames: list[PeerFrame]
        try:
            frames = [decode(frame, PeerFrame) for frame in restored.frames]  # type: ignore[arg-type]
        except RemoteError as error:
            raise LocalError(f"the log holds what is no frame of this program: {error}") from error
        self._now = now
        self.agreement.start([f for f in frames if not isinstance(f, Life | Slot)], now)
        self.incarnation = 1 + max((f.incarnation for f in frames if isinstance(f, Life)), default=0)
        self.outbox.persist([Life(self.incarnation)])
        if self.settings.gossip:
            self._start_gossip(now)
        ledger = self.agreement.voter.ledger
        known = ledger.records[: ledger.certified + 1]
        self.roster.apply(known)
        if self.settings.rules is not None:
            self.work = self._rounds(self.settings.rules, frames, restored.contents)
        else:
            self.work.certified(known, now)
        self._follow_members(now)
        self._request_at = self._catch_up_at = self._tend_at = now
        return self._finish(now)

    def _start_gossip(self, now: int) -> None:
        settings = self.settings
        first = PeerRecord(
            self.me,
            self.incarnation,
            1,
            settings.name[:MAX_NAME_LENGTH],
            settings.addresses,
            reachable=self.genesis.header.coordinator == self.me,
            profile=settings.profile,
            program_version=settings.program_version,
        )
        self.gossip = gossip = Gossip(
            self.authority,
            self.outbox,
            first,
            self.random,
            now,
            began=self._begin_incarnation,
            changed=self._on_membership_changed,
            reject=self.reject,
            evidence=lambda first, second: self.outbox.emit(
                "equivocation", peer=first.peer, stamp=first.version
            ),
        )
        self.links = Links(
            self.me,
            self.outbox,
            self.random("links"),
            settings.bootstrap,
            addresses=lambda peer: (
                record.addresses if (record := gossip.book.get(peer)) and record.reachable else ()
            ),
            failed=gossip.redial_failed,
        )
        self.links.start(now)

    def receive(self, sender: str, data: bytes, now: int) -> list[Effect]:
        """A message from an authenticated peer. Whatever it holds, this returns."""
        if self.halted:
            return []
        self._now = now
        try:
            message = decode_message(data)
        except RemoteError as error:
            self.reject(sender, error)
        else:
            self._handle(sender, message, now)
        return self._finish(now)

    def _handle(self, sender: str, message: AnyMessage, now: int) -> None:
        if self.gossip is not None and sender != self.me:
            self.gossip.heard(sender, now)
            if isinstance(message, Append) and message.term == self.agreement.voter.term:
                self.gossip.heartbeat(sender, message.interval_ns, now)
            elif isinstance(message, AppendReply) and self.agreement.is_coordinator:
                self.gossip.heartbeat(sender, self.agreement.replication.interval_ns, now)
        try:
            self._dispatch(sender, message, now)
        except RemoteError as error:
            self.reject(sender, error)
        except Fork as fork:
            self._halt(str(fork))

    def complete(self, effect_id: int, outcome: Outcome, now: int) -> list[Effect]:
        """The outcome of an effect; ids of an earlier life are ignored."""
        if self.halted:
            return []
        self._now = now
        if effect_id in self._persists:
            del self._persists[effect_id]
            if isinstance(outcome, Done):
                self.outbox.durable = effect_id
                self.agreement.durable(now)
            else:
                reason = outcome.reason if isinstance(outcome, Failed) else "cancelled"
                self._halt(f"the log could not be written: {reason}")
        elif effect_id in self._reaching:
            asker = self._reaching.pop(effect_id)
            self.outbox.send(asker, ReachReply(isinstance(outcome, Done) and outcome.value is True))
        elif self.links is None or not self.links.complete(effect_id, outcome, now):
            self.work.complete(effect_id, outcome, now)
            self.tell_own_state(now)
        return self._finish(now)

    def progress(
        self, effect_id: int, now: int, *, step: int | None = None, loss: float | None = None
    ) -> list[Effect]:
        """A long effect (Fetch, Train, Combine, Step, Validate) goes on: bytes moved, or local steps were made."""
        if self.halted:
            return []
        self._now = now
        if self.gossip is not None and step is not None:
            before = self.work.participant.local_steps if isinstance(self.work, Rounds) else 0
            self.gossip.update(now, local_step=before + step, local_loss=loss)
        self.work.progress(now)
        return self._finish(now)

    def tick(self, now: int) -> list[Effect]:
        """Time has passed: call at next_deadline(), or later."""
        if self.halted:
            return []
        self._now = now
        if now - self.next_deadline() > LATE_TICK_NS:
            self.outbox.emit("late-tick", late_ns=now - self.next_deadline())
            self.agreement.postpone(now)
            if self.gossip is not None:
                self.gossip.gap(now)
        self.agreement.tick(now)
        if self.gossip is not None and self.links is not None:
            self._watch_links(now)
            self.gossip.tick(now)
            self.links.tick(now)
        self._request(now)
        self._catch_up(now)
        if self.agreement.replication.opened and now >= self._tend_at:
            self._tend(now)
            learning = bool(self.agreement.replication.learners)
            self._tend_at = now + (LEARNING_INTERVAL_NS if learning else TEND_INTERVAL_NS)
        self.work.tick(now)
        return self._finish(now)

    def connected(self, peer: str, now: int) -> list[Effect]:
        if self.halted:
            return []
        self._now = now
        self.connections.add(peer)
        if self.gossip is not None and self.links is not None:
            self.links.on_connected(peer, now)
            self.gossip.connected(peer, now)
            if not self.gossip.book.own.reachable and self.settings.addresses:
                self.outbox.send(peer, ReachRequest(self.settings.addresses))
        self._request_at = min(self._request_at, now)
        self._catch_up_at = min(self._catch_up_at, now)
        return self._finish(now)

    def disconnected(self, peer: str, now: int) -> list[Effect]:
        if self.halted:
            return []
        self._now = now
        self.connections.discard(peer)
        self._readers.discard(peer)
        if self.gossip is not None and self.links is not None:
            self.gossip.disconnected(peer, now)
            self.links.on_disconnected(peer, now)
            self.work.tick(now)
        return self._finish(now)

    def _on_membership_changed(self, changes: Sequence[Changed], now: int) -> None:
        """What the detectors know, the round uses in the same step."""
        for change in changes:
            if change.after is PeerState.DEAD:
                self.outbox.emit("failed", peer=change.peer, was=change.before.value)
            elif change.before in (PeerState.DEAD, PeerState.SUSPECT, PeerState.UNKNOWN):
                self.outbox.emit("alive", peer=change.peer, was=change.before.value, now=change.after.value)
        self._work_due = True

    def _watch_links(self, now: int) -> None:
        """Heartbeats are expected of the coordinator, and by the coordinator of the voters."""
        if self.gossip is None:
            return
        agreement = self.agreement
        if agreement.is_coordinator:
            self.gossip.watch_only(agreement.committee.everyone, now)
        else:
            self.gossip.watch_only([agreement.voter.coordinator] if agreement.voter.coordinator else [], now)

    def _follow_members(self, now: int) -> None:
        """Gossip and links follow the certified roster."""
        if self.gossip is None or self.links is None:
            return
        members = self.roster.everyone
        for peer in members:
            if peer == self.me or self.gossip.membership.state(peer) is PeerState.UNKNOWN:
                self.gossip.admit(peer, now)
                if peer in self.connections:
                    self.gossip.connected(peer, now)
        for peer in self.gossip.membership.peers():
            if peer not in members:
                self.gossip.remove(peer, now)
        self.links.want(members, self.agreement.committee.everyone)

    def leave(self, now: int) -> list[Effect]:
        """Say goodbye: hand over the duty, then ask to be let go. `left` tells when that is certified."""
        if self._leaving is None and not self.halted:
            height = self.agreement.voter.ledger.certified
            self._leaving = self.authority.sign(Farewell(self.me, height))
            self._farewells[self.me] = self._leaving
            self._request_at = self._tend_at = now
            if self.agreement.is_coordinator:
                self.agreement.rotate(now)
        return self._finish(now)

    # Reading

    def next_deadline(self) -> int:
        tend = self._tend_at if self.agreement.replication.opened else NEVER
        if self.gossip is not None and self.links is not None:
            tend = min(tend, self.gossip.next_deadline(), self.links.next_deadline())
        return min(
            self.agreement.next_deadline(),
            self.work.next_deadline(),
            self._request_at,
            self._catch_up_at,
            tend,
        )

    @property
    def is_member(self) -> bool:
        return self.roster.is_member(self.me)

    @property
    def left(self) -> bool:
        """The run has let this peer go: it is no voter and no member any more."""
        committee = self.agreement.voter.ledger.committee_at(self.agreement.voter.ledger.certified)
        return self._leaving is not None and not self.is_member and self.me not in committee.everyone

    def random(self, purpose: str) -> Random:
        """A stream of its own for one purpose."""
        return Random(sha256(self._entropy + self.me.encode() + purpose.encode()).digest())

    # Messages

    def _dispatch(self, sender: str, message: AnyMessage, now: int) -> None:
        # Who was let go or excluded, and was away then, learns it from the records and from nowhere else.
        known = self.may_read(sender) or self.roster.was_admitted(sender)
        if isinstance(message, RecordsRequest) and not known:
            return  # a stranger, or a joiner whose proof has not arrived yet: it gets nothing, and asks again
        if self.agreement.receive(sender, message, now) or self.work.receive(sender, message, now):
            return
        if self.gossip is not None and self.gossip.receive(sender, message, now):
            return
        if isinstance(message, JoinRequest):
            self._on_join_request(sender, message, now)
        elif isinstance(message, JoinReply):
            if message.refused:
                self.outbox.emit("join-refused", by=sender, reason=message.refused)
        elif isinstance(message, LeaveRequest):
            self._on_leave_request(sender, message, now)
        elif isinstance(message, EvidenceMessage):
            self._on_evidence(message)
        elif isinstance(message, GenesisRequest):
            self._check_proof(message.admission, sender)
            self._readers.add(sender)
            self.outbox.send(sender, GenesisReply(self.genesis))
        elif isinstance(message, StatusRequest):
            self._check_proof(message.admission, sender)
            self.outbox.put(AnswerStatus(sender))
        elif isinstance(message, ReachRequest):
            number = self.outbox.new_id()
            self._reaching[number] = sender
            self.outbox.put(Reach(number, sender, message.addresses))
        elif isinstance(message, ReachReply) and self.gossip is not None:
            self._on_reach_reply(sender, message, now)

    def may_read(self, peer: str) -> bool:
        """Strangers get nothing: ledger and content are for members, and for joiners that have shown their proof."""
        return self.roster.is_member(peer) or peer in self._joiners or peer in self._readers

    def see(self, statement: SignedStatement) -> None:
        """A statement whose signature was checked: with an earlier one it may be evidence against its signer."""
        pair = self._evidence.see(statement)
        if pair is not None and signer_of(statement) not in self._exclusions:
            peer = signer_of(statement)
            reason = f"signed two {type(statement).__name__} statements in one slot"
            self.outbox.emit("evidence", peer=peer, reason=reason)
            self.exclude(Exclusion(peer, reason, 0, pair))

    def exclude(self, exclusion: Exclusion) -> None:
        """Asks for a certified record that excludes a member; whoever coordinates proposes it."""
        if self.roster.is_member(exclusion.peer):
            self._exclusions[exclusion.peer] = exclusion
            self._tend_at = min(self._tend_at, self._now)
            if not self.agreement.is_coordinator and exclusion.evidence is not None:
                self._to_coordinator(EvidenceMessage(exclusion.evidence))

    def _on_evidence(self, message: EvidenceMessage) -> None:
        first, second = message.evidence
        if not contradict(first, second, self.authority):
            raise RemoteError("bad_evidence", "two statements that do not contradict each other")
        for statement in (first, second):
            self.see(statement)

    def reject(self, sender: str, error: RemoteError) -> None:
        """Counts what a peer sent wrongly."""
        by_peer = self.rejected.setdefault(error.kind, {})
        known = sender in by_peer or len(by_peer) < MAX_COUNTED_PEERS
        by_peer[sender if known else OTHERS] = by_peer.get(sender if known else OTHERS, 0) + 1
        self.outbox.emit("rejected", kind=error.kind, peer=sender, detail=error.detail)

    def _check_proof(self, admission: Admission, sender: str) -> None:
        """Raises RemoteError unless the sender shows, for itself, that it knows the run's secret."""
        reason = "not its own" if admission.peer != sender else self.roster.proves(admission)
        if reason:
            raise RemoteError("wrong_secret", reason)

    def _on_reach_reply(self, sender: str, message: ReachReply, now: int) -> None:
        """Whether others can dial this peer: one that did is proof; one that could not may have its own reasons."""
        if self.gossip is None or self.gossip.book.own.reachable:
            return
        self.outbox.emit("reachable" if message.reachable else "unreachable", by=sender)
        links = () if message.reachable else tuple(sorted(self.connections))[:MAX_LEAF_LINKS]
        self.gossip.update(now, reachable=message.reachable, links=links)

    # Joining and leaving

    def _request(self, now: int) -> None:
        """Repeats what this peer asks of the run: to be admitted, or to be let go."""
        if now < self._request_at:
            return
        self._request_at = NEVER
        if self._leaving is not None and not self.left:
            self._to_coordinator(LeaveRequest(self._leaving))
            self._request_at = now + REQUEST_INTERVAL_NS
        elif self._leaving is None and not self.is_member and not self.roster.excluded(self.me):
            secret = self.settings.secret
            proof = join_proof(secret, self.authority.run, self.me) if secret is not None else b""
            admission = Admission(self.me, self.settings.name[:MAX_NAME_LENGTH], proof)
            request = JoinRequest(admission, self.settings.profile)
            source = self._some_connection()
            if source:
                self.outbox.send(source, request)
                self.agreement.replication.ask(source, now)
                self._request_at = now + REQUEST_INTERVAL_NS

    def _to_coordinator(self, message: AnyMessage) -> None:
        """To the coordinator where it is known and connected, else to a voter in turn: a member without a vote follows
        announcements, and those do not say who coordinates now."""
        coordinator = self.agreement.voter.coordinator
        if coordinator == self.me:
            return
        if coordinator in self.connections:
            self.outbox.send(coordinator, message)
        elif voters := [peer for peer in self.agreement.committee.everyone if peer in self.connections]:
            self._next_source += 1
            self.outbox.send(voters[self._next_source % len(voters)], message)

    def _passes_on(self, sender: str, author: str) -> bool:
        """Whether a request goes on from here: once from whoever got it from its author, and once more from a voter that
        got it from a member without a vote. So it takes three steps at most, and never goes round."""
        agreement = self.agreement
        relayed_to_voter = agreement.voter.is_voter() and not agreement.voter.is_voter(sender)
        return sender == author or (relayed_to_voter and agreement.voter.coordinator in self.connections)

    def _some_connection(self) -> str:
        """Each connection in turn; nobody when there is none."""
        if not self.connections:
            return ""
        order = sorted(self.connections)
        self._next_source += 1
        return order[self._next_source % len(order)]

    def _on_join_request(self, sender: str, message: JoinRequest, now: int) -> None:
        admission = message.admission
        if self.roster.is_member(admission.peer):
            return
        reason = self.roster.excluded(admission.peer) or self.roster.proves(admission)
        if reason := reason or self.roster.check(Members(admitted=(admission,))):
            self.outbox.send(sender, JoinReply(reason))
            raise RemoteError("wrong_secret" if reason == "wrong secret" else "not_admitted", reason)
        if reason := self._lacks(message.profile):
            self.outbox.send(sender, JoinReply(reason))
            self.outbox.emit("join-refused", peer=admission.peer, reason=reason)
            return
        self._joiners.pop(admission.peer, None)
        self._joiners[admission.peer] = admission
        if len(self._joiners) > MAX_ADMISSIONS:  # the longest silent goes; who still waits asks every second
            del self._joiners[next(iter(self._joiners))]
        if self.agreement.is_coordinator:
            self._tend_at = min(self._tend_at, now)
        elif self._passes_on(sender, admission.peer):
            self._to_coordinator(message)
        if sender == admission.peer:
            self.outbox.send(sender, JoinReply(""))

    def _lacks(self, profile: CapabilityProfile) -> str:
        """What a machine lacks for this run ("" when it can take part). 0 in a profile means: not known, and is let in."""
        needed = self.settings.minimum_memory_bytes
        if 0 < profile.memory_bytes < needed:
            return (
                f"this run needs {needed >> 20} MiB of memory; the machine has {profile.memory_bytes >> 20}"
            )
        return ""

    def _on_leave_request(self, sender: str, message: LeaveRequest, now: int) -> None:
        farewell = message.farewell
        self.authority.check(farewell.peer, farewell)
        if not self.roster.is_member(farewell.peer):
            return
        if reason := self.roster.check(Members(left=(farewell,))):
            raise RemoteError("bad_farewell", reason)
        if self.agreement.is_coordinator:
            self._farewells[farewell.peer] = farewell
            self._tend_at = min(self._tend_at, now)
        elif self._passes_on(sender, farewell.peer):
            self._to_coordinator(message)

    # Records

    def _check(self, record: Record) -> str | None:
        """What a voter checks before it acknowledges (Replication.Check)."""
        body = record.body
        if isinstance(body, Round):
            return self.work.check(record, body, self._now)
        if isinstance(body, Members):
            return self.roster.check(body)
        if isinstance(body, CommitteeChange):
            # Only who becomes a voter is asked for: what a joint committee began, its incoming half must be able to end.
            new = set(body.committee.voters) - set(self.agreement.committee.everyone)
            strangers = [peer for peer in sorted(new) if not self.roster.is_member(peer)]
            return f"{strangers[0]} is no member and cannot vote" if strangers else ""
        return ""

    def _on_certified(self, records: Sequence[Record], now: int) -> None:
        was_member = self.is_member
        self.roster.apply(records)
        for record in records:
            self._tell(record)
        if self.is_member and not was_member:
            self.outbox.emit("joined", peer=self.me)
        self._joiners = {peer: a for peer, a in self._joiners.items() if not self.roster.is_member(peer)}
        self._exclusions = {peer: e for peer, e in self._exclusions.items() if self.roster.is_member(peer)}
        self._farewells = {peer: f for peer, f in self._farewells.items() if self.roster.is_member(peer)}
        self._catch_up_at = now + CATCH_UP_INTERVAL_NS
        if any(record.header.kind in ("members", "committee") for record in records):
            self._follow_members(now)
        if self.agreement.is_coordinator:
            answer = self.agreement.replication.certified_from(records[0].header.height)
            if answer is not None:
                self.outbox.announce(answer, after=self.agreement.voter.term_persist)
            self._tend_at = now
        self.work.certified(records, now)
        self.tell_own_state(now)

    def tell_own_state(self, now: int) -> None:
        """Gossips which version this peer holds, and what its last training came to (coalesced to every few seconds)."""
        if self.gossip is None or not isinstance(self.work, Rounds):
            return
        participant = self.work.participant
        trained = participant.last_trained
        self.gossip.update(
            now,
            last_sync=participant.version if participant.held else self.gossip.book.draft.last_sync,
            base_version=participant.version,
            queue_length=len(participant.plan.of(self.me)) if participant.plan else 0,
            local_step=participant.local_steps,
            local_loss=trained.loss if trained else None,
            gradient_norm=trained.norm if trained else None,
        )

    def _tell(self, record: Record) -> None:
        body = record.body
        height, term = record.header.height, record.header.term
        self.outbox.emit("certified", height=height, term=term, kind=record.header.kind)
        if isinstance(body, Members):
            for admission in body.admitted:
                self.outbox.emit("admitted", peer=admission.peer, name=admission.name)
            for farewell in body.left:
                self.outbox.emit("left", peer=farewell.peer)
            for exclusion in body.excluded:
                self.outbox.emit(
                    "excluded", peer=exclusion.peer, reason=exclusion.reason, until=exclusion.until
                )

    def _catch_up(self, now: int) -> None:
        """A member outside the committee depends on announcements, and those may be lost."""
        if now < self._catch_up_at:
            return
        self._catch_up_at = now + CATCH_UP_INTERVAL_NS
        if not self.agreement.quorum_held(now):
            source = self._some_connection()
            if source and self.is_member:
                self.agreement.replication.ask(source, now)

    # The coordinator's care for who is in

    def _tend(self, now: int) -> None:
        agreement = self.agreement
        gone = {peer for peer in agreement.committee.everyone if not self.roster.is_member(peer)} | set(
            self._farewells
        )
        if not self.work.reconfigurable:
            return
        # Only what every voter's own check accepts is proposed: a record that nobody acknowledges would block the log.
        roster, voters = self.roster, agreement.committee.everyone
        joiners = [a for a in self._joiners.values() if not roster.check(Members(admitted=(a,)))]
        admitted = tuple(joiners[:MAX_ADMISSIONS])
        leaving = tuple(
            f
            for f in self._farewells.values()
            if f.peer not in voters and not roster.check(Members(left=(f,)))
        )
        excluded = tuple(e for e in self._exclusions.values() if not roster.check(Members(excluded=(e,))))[
            :MAX_EXCLUSIONS
        ]
        ledger = agreement.voter.ledger
        if (admitted or leaving or excluded) and ledger.certified == ledger.height:
            agreement.propose(Members(admitted, leaving[: MAX_ADMISSIONS - len(admitted)], excluded), now)
            return
        agreement.tend_committee(self._voter_candidates(gone), gone, now)
        due = 0 < self.settings.rotation_rounds <= agreement.rounds_in_term()
        if self.work.idle and (due or self._leaving is not None):
            agreement.rotate(now)

    def _voter_candidates(self, gone: Collection[str]) -> list[str]:
        """Living, reachable members outside the committee, in order of admission."""
        voters = self.agreement.committee.everyone
        candidates = [
            p for p in self.roster.members if p in self.connections and p not in voters and p not in gone
        ]
        if self.gossip is None:
            return candidates
        book = self.gossip.book
        return [
            p for p in candidates if self.fit(p) and (record := book.get(p)) is not None and record.reachable
        ]

    # Ends

    def _halt(self, reason: str) -> None:
        if not self.halted:
            self.halted = reason
            self.outbox.put(Halt(reason))

    def _finish(self, now: int) -> list[Effect]:
        for _ in range(MAX_LOCAL_MESSAGES):
            if self._work_due:
                self._work_due = False
                self.work.tick(now)
            if not self.outbox.local or self.halted:
                break
            self._handle(self.me, self.outbox.local.popleft(), now)  # type: ignore[arg-type]
        else:
            raise LocalError(f"over {MAX_LOCAL_MESSAGES} messages to itself in one input")
        effects = self.outbox.take()
        for effect in effects:
            if type(effect).__name__ == "Persist":
                self._persists[effect.id] = None  # type: ignore[attr-defined]
        return effects

    def status(self, now: int) -> dict[str, Any]:
        """A pure read of what this peer knows; docs/protocol.md lists the fields."""
        voter, ledger = self.agreement.voter, self.agreement.voter.ledger
        committee = self.agreement.committee
        return {
            "peer_id": self.me,
            "name": self.settings.name,
            "role": str(voter.role) if voter.is_voter() else "member" if self.is_member else "stranger",
            "term": voter.term,
            "coordinator": voter.coordinator,
            "height": ledger.height,
            "certified": ledger.certified,
            "lineage": ledger.hashes[ledger.certified].hex(),
            "voters": list(committee.voters),
            "outgoing": list(committee.outgoing),
            "quorum_held": self.agreement.quorum_held(now),
            "members": list(self.roster.members),
            "rejected": {kind: dict(by_peer) for kind, by_peer in self.rejected.items()},
        }
