"""Suspicion: what is held of each member, alive, suspect or dead, from answers, rumors and incarnations.

Theory of operation
    State    Event                                                            Next     Output
    alive    our probe failed; a suspicion or death heard from another        suspect  Suspect
    suspect  an ack (direct or relayed) of a ping sent after it began         alive    Alive
    suspect  a higher incarnation (from itself, or in its signed record)      alive    Alive
    suspect  the suspicion's time is over, and it did not answer us either    dead     Dead
    dead     a higher incarnation; a direct ack                               alive    Alive

    Only a round trip or a higher incarnation clears a suspicion: that it speaks is not enough, a peer that sends and
    cannot receive takes no part. Who hears itself suspected raises its incarnation (RaiseIncarnation), once a period; its newly
    signed record is the refutation, and travels with our messages.

    Suspicion's time is long for one accuser and falls to its minimum as independent ones confirm (Lifeguard). A death
    that others report shortens it likewise, and no more. Rumors are not signed, so nobody dies of what others say: who
    has not failed a probe of ours gets one when its time is over (SWIM would believe the rumor).

    Who asks and who answers is `probing.py`'s matter, how rumors spread that of `rumors.py`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence

import msgspec

from p2pcoord.errors import LocalError
from p2pcoord.gossip.rumors import MAX_RECORDS, MAX_RUMORS, Rumor, Rumors
from p2pcoord.gossip.version_vector import MAX_COUNTER

SECOND_NS = 1_000_000_000

PERIOD_NS = SECOND_NS
"""The period of probing; a suspicion's time is counted in it."""

SUSPICION_MULTIPLIER = 5
"""The least time of a suspicion is this * log10(n) periods (memberlist: LAN 4, WAN 6). Our rumors ride only on probes, so a
refutation needs a little more than a LAN's."""

MAX_SUSPICION_MULTIPLIER = 6
"""A lone accuser waits this many times as long (memberlist: 6)."""

CONFIRMATIONS = 3
"""Independent accusers besides the first that bring a suspicion's time down to the least (memberlist: multiplier - 2)."""

MAX_HEARD = 32
"""Rumors remembered for each member, so that none is taken in or sent on twice."""

MAX_MEMBERS = 16_384


class State(enum.Enum):
    """What the prober holds of a member."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"


class Output(msgspec.Struct, frozen=True):
    """Base of what probing asks for and tells."""


class Suspect(Output, frozen=True):
    """A member did not answer `origin` (perhaps ourselves)."""

    peer: str
    incarnation: int
    origin: str


class Alive(Output, frozen=True):
    """A suspect or dead member lives."""

    peer: str
    incarnation: int


class Dead(Output, frozen=True):
    """A suspicion was not refuted."""

    peer: str
    incarnation: int


class RaiseIncarnation(Output, frozen=True):
    """We are suspected: our incarnation is now this. Make it durable and sign our record anew under it before the
    outputs that follow leave."""

    incarnation: int


class Suspicion:
    """Why a member is suspect, and until when."""

    __slots__ = ("asked", "began", "confirmed", "deadline", "least_ns", "origins")

    def __init__(self, now: int, least_ns: int) -> None:
        self.began = now
        self.least_ns = least_ns
        self.origins: dict[str, None] = {}
        self.confirmed = False  # another declared it dead
        self.asked = False  # its time is over and our own last probe is under way
        self.deadline = now + least_ns * MAX_SUSPICION_MULTIPLIER

    def over_at(self, wanted: int) -> int:
        """When its time is over, of `wanted` confirmations (Lifeguard, section IV-B): from the most to the least time as
        log(confirmations + 1) / log(wanted + 1)."""
        if wanted == 0:
            return self.began + self.least_ns
        confirmations = wanted if self.confirmed else len(self.origins) - 1
        share = math.log(confirmations + 1) / math.log(wanted + 1)
        most_ns = self.least_ns * MAX_SUSPICION_MULTIPLIER
        return self.began + max(self.least_ns, int(most_ns - share * (most_ns - self.least_ns)))


class Member:
    """One of the others. `links`: only of a leaf, the members it stays connected to."""

    __slots__ = ("heard", "incarnation", "links", "peer", "state", "suspicion")

    def __init__(self, peer: str, incarnation: int, links: tuple[str, ...]) -> None:
        self.peer = peer
        self.incarnation = incarnation
        self.links = links
        self.state = State.ALIVE
        self.suspicion: Suspicion | None = None
        self.heard: dict[Rumor, None] = {}


class Suspicions:
    """The states of all `members`, and our own incarnation.

    `expire(at, peer)` asks that at this time the peer's suspicion is looked at: it is over if its deadline is still then.
    """

    def __init__(self, own: str, incarnation: int, expire: Callable[[int, str], None]) -> None:
        self.incarnation = incarnation
        self.members: dict[str, Member] = {}
        self._own = own
        self._expire = expire
        self._rumors = Rumors()
        self._dead_count = 0
        self._refuted_ahead: dict[Rumor, None] = {}
        self._refuted_at: int | None = None

    # Who there is ----------------------------------------------------------------------------------------------------

    def state(self, peer: str) -> State | None:
        """What is held of a member; None for who is no member."""
        member = self.members.get(peer)
        return member.state if member else None

    def add(self, peer: str, incarnation: int, links: tuple[str, ...]) -> None:
        """Raises LocalError beyond MAX_MEMBERS."""
        if len(self.members) >= MAX_MEMBERS:
            raise LocalError(f"more than {MAX_MEMBERS} members")
        self.members[peer] = Member(peer, incarnation, links)

    def remove(self, peer: str) -> None:
        """Whatever is rumored of it is ignored from now on."""
        member = self.members.pop(peer, None)
        if member is None:
            return
        if member.state is State.DEAD:
            self._dead_count -= 1
        self._rumors.drop(peer)

    # What clears a suspicion -----------------------------------------------------------------------------------------

    def raise_incarnation(self, incarnation: int) -> None:
        """Ours was raised elsewhere; our record goes along from now on."""
        if incarnation > self.incarnation:
            self.incarnation = incarnation
            self._rumors.spread_record(self._own)

    def alive(self, peer: str, incarnation: int, now: int) -> list[Output]:
        """A member's own word that it lives in `incarnation`. News only above the one known."""
        member = self.members.get(peer)
        if member is None or incarnation <= member.incarnation:
            return []
        member.incarnation = incarnation
        if member.state is State.ALIVE:
            return []
        self._rumors.spread_record(peer)
        outputs = self._revive(member)
        # Accusations of this very incarnation that came before it hold; those of the ones before are refuted.
        later = [rumor for rumor in member.heard if rumor.incarnation >= incarnation]
        member.heard = {rumor: None for rumor in later if rumor.incarnation > incarnation}
        for rumor in later:
            if rumor.incarnation == incarnation:
                outputs += self._accuse(member, rumor, now)
        return outputs

    def answered(self, member: Member, asked_at: int) -> list[Output]:
        """A member's answer to a question of `asked_at`: one from before its suspicion clears nothing."""
        began = member.suspicion.began if member.suspicion else 0
        if member.state is State.ALIVE or asked_at < began:
            return []
        member.heard.clear()  # whoever accuses it again is to be heard
        return self._revive(member)

    def _revive(self, member: Member) -> list[Output]:
        if member.state is State.DEAD:
            self._dead_count -= 1
        member.state = State.ALIVE
        member.suspicion = None
        self._rumors.drop(member.peer, rumors_only=True)
        return [Alive(member.peer, member.incarnation)]

    # Accusations -----------------------------------------------------------------------------------------------------

    def hear(self, rumors: Sequence[Rumor], now: int) -> list[Output]:
        """Rumors that came with a message."""
        outputs: list[Output] = []
        for rumor in rumors[:MAX_RUMORS]:
            # Accusers are other members: nobody may accuse in our name, or multiply by inventing names.
            if rumor.origin not in self.members or rumor.origin == rumor.peer:
                continue
            member = self.members.get(rumor.peer)
            if rumor.peer == self._own:
                outputs += self._refute(rumor, now)
            elif member is not None:
                outputs += self._accuse(member, rumor, now)
        return outputs

    def failed(self, member: Member, now: int) -> list[Output]:
        """It did not answer our own probe."""
        if member.state is State.DEAD:
            return []
        return self._accuse(member, Rumor(member.peer, member.incarnation, self._own, False), now)

    def _accuse(self, member: Member, rumor: Rumor, now: int) -> list[Output]:
        # An incarnation above the one known is no proof that it exists; as an accusation it counts all the same.
        if rumor.incarnation < member.incarnation:
            return []
        if rumor in member.heard and rumor.origin != self._own:
            return []
        if rumor not in member.heard and len(member.heard) >= MAX_HEARD:
            del member.heard[next(iter(member.heard))]
        member.heard[rumor] = None
        if member.state is State.DEAD:
            return []
        outputs: list[Output] = []
        if member.suspicion is None:
            member.state = State.SUSPECT
            member.suspicion = Suspicion(now, self._least_ns())
            self._rumors.drop(member.peer)
            outputs.append(Suspect(member.peer, member.incarnation, rumor.origin))
        suspicion = member.suspicion
        wanted = self._confirmations()
        # The first accuser and `wanted` more are passed on; whoever comes after them brings nothing.
        room = len(suspicion.origins) <= wanted or rumor.origin == self._own
        if rumor.origin not in suspicion.origins and room:
            suspicion.origins[rumor.origin] = None
            self._rumors.spread(rumor)
        elif rumor.dead and not suspicion.confirmed:
            self._rumors.spread(rumor)
        suspicion.confirmed = suspicion.confirmed or rumor.dead
        if suspicion.asked and self._own not in suspicion.origins:
            return outputs  # its answer to us decides
        # Never before now: what is overdue counts as slept through.
        self._ends(member.peer, suspicion, max(now, suspicion.over_at(wanted)))
        return outputs

    def _ends(self, peer: str, suspicion: Suspicion, deadline: int) -> None:
        suspicion.deadline = deadline
        self._expire(deadline, peer)

    def _confirmations(self) -> int:
        """How many independent accusers are to be had: none in a run of two or three."""
        others = len(self.members) - self._dead_count - 1
        return CONFIRMATIONS if others >= CONFIRMATIONS else 0

    def _least_ns(self) -> int:
        scale = max(1.0, math.log10(max(1, len(self.members) - self._dead_count + 1)))
        return int(SUSPICION_MULTIPLIER * scale * PERIOD_NS)

    def _refute(self, rumor: Rumor, now: int) -> list[Output]:
        if rumor.incarnation < self.incarnation or rumor in self._refuted_ahead:
            return []  # refuted already
        if self._refuted_at is not None and now - self._refuted_at < PERIOD_NS:
            return []  # each costs a write to the disk; who suspects us says so again with its next ping
        self._refuted_at = now
        if rumor.incarnation > self.incarnation:
            # An incarnation we never had: someone guessed ahead. It costs one step, however often it comes.
            self._refuted_ahead[rumor] = None
            if len(self._refuted_ahead) > MAX_HEARD:
                del self._refuted_ahead[next(iter(self._refuted_ahead))]
        if self.incarnation >= MAX_COUNTER:
            raise LocalError("incarnations are used up: this key cannot go on")
        self.incarnation += 1
        self._rumors.spread_record(self._own)
        return [RaiseIncarnation(self.incarnation)]

    # Verdicts --------------------------------------------------------------------------------------------------------

    def accused_by_us(self, member: Member) -> bool:
        """Whether it is suspect and did not answer a probe of ours."""
        return member.suspicion is not None and self._own in member.suspicion.origins

    def had_its_chance(self, member: Member) -> bool:
        """Whether a suspect was asked by ourselves and did not answer."""
        return self.accused_by_us(member) or (member.suspicion is not None and member.suspicion.asked)

    def wait_for_answer(self, member: Member, until: int) -> None:
        """Its time is over, but it is asked a last time: it may answer us until then."""
        if member.suspicion is None:
            raise LocalError(f"{member.peer} is condemned without a suspicion")
        member.suspicion.asked = True
        self._ends(member.peer, member.suspicion, until)

    def declare_dead(self, member: Member) -> list[Output]:
        """Its time is over, and it did not answer us."""
        member.state = State.DEAD
        member.suspicion = None
        self._dead_count += 1
        self._rumors.drop(member.peer)
        self._rumors.spread(Rumor(member.peer, member.incarnation, self._own, True))
        return [Dead(member.peer, member.incarnation)]

    def gap(self, late_ns: int, now: int) -> None:
        """This process slept until now, for `late_ns`. Refutations were missed too: everybody gets the least time anew."""
        for member in self.members.values():
            suspicion = member.suspicion
            if suspicion is not None:
                suspicion.began += late_ns
                suspicion.asked = False
                self._ends(
                    member.peer, suspicion, max(suspicion.deadline + late_ns, now + suspicion.least_ns)
                )

    # What a message carries ------------------------------------------------------------------------------------------

    def news_for(self, to: str) -> tuple[tuple[Rumor, ...], tuple[str, ...]]:
        """Rumors for a message to `to`, and whose records go along; counted as sent."""
        rumors, records_of = self._rumors.take(to, len(self.members))
        member = self.members.get(to)
        if member is not None and member.state is not State.ALIVE:
            # Lifeguard's buddy system: tell it, so that it can refute. It cannot be told too often.
            told = Rumor(to, member.incarnation, self._own, member.state is State.DEAD)
            rumors = [told, *(rumor for rumor in rumors if rumor != told)][:MAX_RUMORS]
        return tuple(rumors), tuple(records_of)

    def answer_to(self, to: str, heard: Sequence[Rumor]) -> tuple[tuple[Rumor, ...], tuple[str, ...]]:
        """The same for an answer to who said `heard`: what it missed goes along first."""
        rumors, records_of = self.news_for(to)
        # Who suspects late whom all others hold dead would wait for confirmations in vain.
        dead = [
            Rumor(rumor.peer, rumor.incarnation, self._own, True)
            for rumor in heard[:MAX_RUMORS]
            if self.state(rumor.peer) is State.DEAD and rumor.peer != to and not rumor.dead
        ]
        rumors = tuple(dict.fromkeys((*rumors[:1], *dead, *rumors[1:])))[:MAX_RUMORS]
        return rumors, tuple(dict.fromkeys((*self._refuted(heard), *records_of)))

    def _refuted(self, rumors: Sequence[Rumor]) -> tuple[str, ...]:
        """Of whom the sender of these rumors has missed a refutation: it is told again, or it would let them die."""
        known = {
            peer: member.incarnation for rumor in rumors if (member := self.members.get(peer := rumor.peer))
        }
        known[self._own] = self.incarnation
        behind = (rumor.peer for rumor in rumors[:MAX_RUMORS] if rumor.incarnation < known.get(rumor.peer, 0))
        return tuple(dict.fromkeys(behind))[:MAX_RECORDS]
