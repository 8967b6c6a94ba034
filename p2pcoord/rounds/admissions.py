"""How peers come in, go, and are put out: the requests, and the coordinator's list of what to order next.

    a peer wants         it sends, once a second               until
    to be admitted       JoinRequest, to anyone it knows       a certified record names it (or a refusal says why not)
    to leave             LeaveRequest, towards the coordinator a certified record lets it go
    another put out      EvidenceMessage, to the coordinator;  a certified record excludes the other
                         to all voters where it is the
                         other, or this peer

A request goes on from whoever got it from its author, and once more from a voter that got it from a member without a vote: at
most three steps, never round. All of them are made of statements that speak for themselves, so it does not matter who passes
them on. What the coordinator orders (`pending`) is only what every voter's own check accepts: a record that nobody
acknowledges would block the log.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from p2pcoord.consensus.agreement import Agreement
from p2pcoord.consensus.evidence import EvidenceBook, SignedStatement, contradict, signer_of
from p2pcoord.consensus.record import Admission, Exclusion, Members
from p2pcoord.consensus.statements import Farewell
from p2pcoord.effects import NEVER
from p2pcoord.errors import RemoteError
from p2pcoord.gossip.records import CapabilityProfile
from p2pcoord.identity import Authority
from p2pcoord.outbox import Outbox
from p2pcoord.rounds.messages import EvidenceMessage, JoinReply, JoinRequest, LeaveRequest
from p2pcoord.rounds.participation import (
    MAX_ADDRESSES_LENGTH,
    MAX_ADMISSIONS,
    MAX_NAME_LENGTH,
    Roster,
    join_proof,
)
from p2pcoord.wire import Message

# A joiner repeats its request until a certified record names it; a member that leaves likewise.
REQUEST_INTERVAL_NS = 1_000_000_000

# Exclusions in one record: each may carry two statements of a few hundred bytes.
MAX_EXCLUSIONS = 16


class JoinSettings(msgspec.Struct, frozen=True):
    """This peer's own request (name, secret, machine), and what it asks of others while it coordinates."""

    name: str
    secret: bytes | None
    profile: CapabilityProfile
    minimum_memory_bytes: int
    addresses: tuple[str, ...] = ()


class Admissions:
    """`connections` are those this peer has now; `due(now)` is called when something waits for the coordinator's care."""

    def __init__(
        self,
        authority: Authority,
        outbox: Outbox,
        roster: Roster,
        agreement: Agreement,
        connections: set[str],
        settings: JoinSettings,
        due: Callable[[], None],
    ) -> None:
        self._authority = authority
        self._me = authority.peer_id
        self._outbox = outbox
        self._roster = roster
        self._agreement = agreement
        self._connections = connections
        self._settings = settings
        self._due = due
        self._evidence = EvidenceBook(authority)
        self._joiners: dict[str, Admission] = {}
        self._readers: set[str] = set()
        """Connected peers that have shown they may join, and have not asked for it yet."""
        self._farewells: dict[str, Farewell] = {}
        self._exclusions: dict[str, Exclusion] = {}
        self._leaving: Farewell | None = None
        self._request_at = NEVER
        self._accuse_at = NEVER
        self._turn = 0

    # This peer's own wishes

    def wake(self, now: int) -> None:
        """A connection was made, or the peer starts: ask now."""
        self._request_at = min(self._request_at, now)

    def next_deadline(self) -> int:
        return min(self._request_at, self._accuse_at)

    def tick(self, now: int) -> None:
        """Repeats what this peer asks of the run: to be admitted, or to be let go, or that a liar is put out."""
        if now >= self._accuse_at:
            for exclusion in self._accused()[:MAX_EXCLUSIONS]:
                self._accuse(exclusion)
            self._accuse_at = NEVER
        if self._accuse_at == NEVER and self._accused():
            self._accuse_at = now + REQUEST_INTERVAL_NS
        if now < self._request_at:
            return
        self._request_at = NEVER
        if self._leaving is not None:
            if not self.left:
                self._to_coordinator(LeaveRequest(self._leaving))
                self._request_at = now + REQUEST_INTERVAL_NS
        elif not self._roster.is_member(self._me) and not self._roster.excluded(self._me):
            source = self.some_connection()
            if source:
                self._outbox.send(source, JoinRequest(self._own_admission(), self._settings.profile))
                self._agreement.catch_up.ask(source, now)
                self._request_at = now + REQUEST_INTERVAL_NS

    def _own_admission(self) -> Admission:
        secret = self._settings.secret
        proof = join_proof(secret, self._authority.run, self._me) if secret is not None else b""
        addresses: tuple[str, ...] = ()
        for address in self._settings.addresses:
            if sum(map(len, (*addresses, address))) <= MAX_ADDRESSES_LENGTH:
                addresses = (*addresses, address)
        return Admission(self._me, self._settings.name[:MAX_NAME_LENGTH], proof, addresses)

    def leave(self, now: int) -> None:
        """Say goodbye. The duty is handed over first where somebody can take it."""
        if self._leaving is not None:
            return
        self._leaving = self._authority.sign(Farewell(self._me, self._agreement.voter.ledger.certified))
        self._farewells[self._me] = self._leaving
        self._request_at = now
        self._due()
        if self._agreement.is_coordinator:
            self._agreement.rotate(now)

    @property
    def leaving(self) -> bool:
        return self._leaving is not None

    @property
    def left(self) -> bool:
        """The run has let this peer go: it is no voter and no member any more."""
        ledger = self._agreement.voter.ledger
        voters = ledger.committee_at(ledger.certified).everyone
        return self._leaving is not None and not self._roster.is_member(self._me) and self._me not in voters

    def some_connection(self) -> str:
        """Each connection in turn; nobody when there is none."""
        return self._next_of(sorted(self._connections))

    def _next_of(self, peers: list[str]) -> str:
        self._turn += 1
        return peers[self._turn % len(peers)] if peers else ""

    def _to_coordinator(self, message: Message) -> None:
        """To the coordinator where it is known and connected, else to a voter in turn: a member without a vote follows
        announcements, and those do not say who coordinates now."""
        coordinator = self._agreement.voter.coordinator
        if coordinator == self._me:
            return
        voters = [peer for peer in self._agreement.committee.everyone if peer in self._connections]
        target = coordinator if coordinator in self._connections else self._next_of(voters)
        if target:
            self._outbox.send(target, message)

    def _passes_on(self, sender: str, author: str) -> bool:
        """Whether a request goes on from here (module docstring)."""
        voter = self._agreement.voter
        relayed_to_voter = voter.is_voter() and not voter.is_voter(sender)
        return sender == author or (relayed_to_voter and voter.coordinator in self._connections)

    # Others' wishes

    def receive(self, sender: str, message: Message, now: int) -> bool:
        """Handles a request; False when the message is none. Raises RemoteError."""
        match message:
            case JoinRequest():
                self._on_join(sender, message)
            case JoinReply():
                if message.refused:
                    self._outbox.emit("join-refused", by=sender, reason=message.refused)
            case LeaveRequest():
                self._on_leave(sender, message)
            case EvidenceMessage():
                self._on_evidence(message)
            case _:
                return False
        return True

    def _on_join(self, sender: str, message: JoinRequest) -> None:
        admission = message.admission
        if self._roster.is_member(admission.peer):
            return
        reason = self._roster.excluded(admission.peer) or self._roster.proves(admission)
        if self.distrusts(admission.peer):
            reason = reason or "there is evidence against it"
        if reason := reason or self._roster.check(Members(admitted=(admission,))):
            self._outbox.send(sender, JoinReply(reason))
            raise RemoteError("wrong_secret" if reason == "wrong secret" else "not_admitted", reason)
        if reason := self._lacks(message.profile):
            self._outbox.send(sender, JoinReply(reason))
            self._outbox.emit("join-refused", peer=admission.peer, reason=reason)
            return
        self._joiners.pop(admission.peer, None)
        self._joiners[admission.peer] = admission
        if len(self._joiners) > MAX_ADMISSIONS:  # the longest silent goes; who still waits asks every second
            del self._joiners[next(iter(self._joiners))]
        self._order_or_pass_on(sender, admission.peer, message)
        if sender == admission.peer:
            self._outbox.send(sender, JoinReply(""))

    def _lacks(self, profile: CapabilityProfile) -> str:
        """What a machine lacks for this run ("" when it can take part). 0 in a profile means: not known, and is let in."""
        needed = self._settings.minimum_memory_bytes
        if 0 < profile.memory_bytes < needed:
            has = profile.memory_bytes >> 20
            return f"this run needs {needed >> 20} MiB of memory; the machine has {has}"
        return ""

    def _on_leave(self, sender: str, message: LeaveRequest) -> None:
        farewell = message.farewell
        self._authority.check(farewell.peer, farewell)
        if not self._roster.is_member(farewell.peer):
            return
        if reason := self._roster.check(Members(left=(farewell,))):
            raise RemoteError("bad_farewell", reason)
        if self._agreement.is_coordinator:
            self._farewells[farewell.peer] = farewell
        self._order_or_pass_on(sender, farewell.peer, message)

    def _order_or_pass_on(self, sender: str, author: str, message: Message) -> None:
        if self._agreement.is_coordinator:
            self._due()
        elif self._passes_on(sender, author):
            self._to_coordinator(message)

    # Exclusion

    def see(self, statement: SignedStatement) -> None:
        """A statement whose signature was checked: with an earlier one it may be evidence against its signer."""
        peer = signer_of(statement)
        if not self._roster.is_listed(peer):
            return  # nobody to exclude; and strangers, of whom there is no end, fill no memory
        pair = self._evidence.see(statement)
        if pair is not None and not self.distrusts(peer):
            reason = f"signed two {type(statement).__name__} statements in one slot"
            self._outbox.emit("evidence", peer=peer, reason=reason)
            self.exclude(Exclusion(peer, reason, 0, pair))

    def exclude(self, exclusion: Exclusion) -> None:
        """Asks for a certified record that excludes a member; whoever coordinates orders it."""
        if not self._wanted(exclusion) or self.distrusts(exclusion.peer):  # evidence is the better reason
            return
        self._exclusions[exclusion.peer] = exclusion
        self._due()
        self._accuse(exclusion)

    def distrusts(self, peer: str) -> bool:
        """Whether there is evidence against it, certified already or not."""
        exclusion = self._exclusions.get(peer)
        return (exclusion is not None and exclusion.evidence is not None) or self._roster.excluded_for_good(
            peer
        )

    def _wanted(self, exclusion: Exclusion) -> bool:
        """Whether no certified record says it yet."""
        peer = exclusion.peer
        if exclusion.evidence is None:
            return self._roster.is_member(peer) and exclusion.until > self._roster.version
        return self._roster.is_listed(peer) and not self._roster.excluded_for_good(peer)

    def _accused(self) -> list[Exclusion]:
        """Against whom there is evidence that no certified record tells yet."""
        return [e for e in self._exclusions.values() if e.evidence is not None and self._wanted(e)]

    def _accuse(self, exclusion: Exclusion) -> None:
        """Evidence goes to the coordinator, again and again until it is heard. Against the coordinator itself it goes to all
        voters: they follow it no longer, and whom they elect orders the exclusion. By the coordinator, too: it may end before
        the record is certified."""
        if exclusion.evidence is None:
            return
        coordinator = self._agreement.voter.coordinator
        message = EvidenceMessage(exclusion.evidence)
        if coordinator not in (None, self._me) and not self.distrusts(coordinator):
            self._to_coordinator(message)
            return
        for peer in self._agreement.committee.everyone:
            if peer in self._connections and peer != exclusion.peer:
                self._outbox.send(peer, message)

    def _on_evidence(self, message: EvidenceMessage) -> None:
        first, second = message.evidence
        if not contradict(first, second, self._authority):
            raise RemoteError("bad_evidence", "two statements that do not contradict each other")
        self.see(first)
        self.see(second)

    # Who may read

    def check_proof(self, admission: Admission, sender: str) -> None:
        """Raises RemoteError unless the sender shows, for itself, that it knows the run's secret."""
        reason = "not its own" if admission.peer != sender else self._roster.proves(admission)
        if reason:
            raise RemoteError("wrong_secret", reason)

    def let_read(self, peer: str) -> None:
        self._readers.add(peer)

    def disconnected(self, peer: str) -> None:
        self._readers.discard(peer)

    def may_read(self, peer: str) -> bool:
        """Strangers get nothing: ledger and content are for members, and for joiners that have shown their proof."""
        return self._roster.is_member(peer) or peer in self._joiners or peer in self._readers

    # What the coordinator orders next

    def gone(self) -> set[str]:
        """Voters that must lose their vote: they left, are leaving, or are excluded."""
        voters = self._agreement.committee.everyone
        return {peer for peer in voters if not self._roster.is_member(peer)} | set(self._farewells)

    def pending(self) -> Members | None:
        """The next record of members, of those that every voter accepts; None when nothing waits."""
        check, voters = self._roster.check, self._agreement.committee.everyone
        excluded = [e for e in self._exclusions.values() if not check(Members(excluded=(e,)))]
        # Who is to be excluded does not leave before: it could return at once.
        stays = {*voters, *(exclusion.peer for exclusion in excluded)}
        excluded = excluded[:MAX_EXCLUSIONS]
        room = MAX_ADMISSIONS - len(excluded)
        leaving = [
            f for f in self._farewells.values() if f.peer not in stays and not check(Members(left=(f,)))
        ][:room]
        room -= len(leaving)
        admitted = [a for a in self._joiners.values() if not check(Members(admitted=(a,)))][:room]
        while admitted and check(Members(admitted=tuple(admitted))):
            admitted.pop()  # together they are too many for the run
        if not (admitted or leaving or excluded):
            return None
        return Members(tuple(admitted), tuple(leaving), tuple(excluded))

    def certified(self, now: int) -> None:
        """Certified records changed the roster: what they settled is done."""
        member = self._roster.is_member
        if self._leaving is None and not member(self._me) and self._request_at == NEVER:
            self.wake(now)  # let go by the goodbye of an earlier life, or an exclusion is over
        self._joiners = {peer: a for peer, a in self._joiners.items() if not member(peer)}
        # Evidence stays even against who has left, in case it comes again.
        self._exclusions = {
            peer: e
            for peer, e in self._exclusions.items()
            if self._wanted(e) or (e.evidence is not None and not self._roster.excluded_for_good(peer))
        }
        self._farewells = {peer: f for peer, f in self._farewells.items() if member(peer)}
