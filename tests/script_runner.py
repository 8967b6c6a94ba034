"""Runs readable scripts against a handful of peers: one command, and under it what the machines said.

The form is that of etcd/raft's testdata (datadriven tests): `tests/scripts/*/*.txt` hold blocks

    # a comment
    tick A 200ms
    deliver A->B
    ----
    what the commands above print

The world is manual. Every peer has a letter (A to G, in the order of their peer ids), a clock of its own, a disk and, to
every other peer, a queue of messages. Nothing happens unless a command says so, but for the disk: it is immediate unless
`disk X manual` was said, and then messages are held until `durable X` as a driver would hold them.

    setting up   peers A B C [option...]       fresh peers, all connected; A founds the run
                 committee A B C [members D] [option...]
                                               the same after a history in which A let the others in; the first listed
                                               are voters, the rest members
                 options: rotation=N size=N open secret=LETTER:WORD unconnected
                 gossip (announcements arrive; else they are lost)
                 untended (no coordinator changes the committee by itself)
    time         tick A [B] 150ms              their clocks run so far, with a tick at every deadline
                 timeout A                     A's clock runs to its election timeout
                 sleep A 2s                    A's clock jumps, without a tick
                 run 2s                        all clocks run, and all messages arrive at once; prints events only
    network      deliver A->B [N] | settle     one queue (or its first N); or all messages until there are none
                 drop A->B | drop              forgets queued messages
                 cut A->B | cut A B | heal     messages sent from now on are lost (one way, both ways)
                 replay A->B                   what was delivered last on this way arrives again
                 connect A B | disconnect A B  what the transport tells both
    disk         disk A manual|immediate       durable A [N]   fail A     (all writes or the first N; the first fails)
                 crash A                       what was not durable is gone, messages held too
                 restart A
    duty         propose A [N]                 N rounds are ordered
                 change A B C D                the coordinator A proposes the joint committee of these and the present one
                                               (with ! although it may not order it now)
                 finish A                      ... and its incoming half
                 learn A D E                   A feeds these learners
                 transfer A B   rotate A   leave A
                 verdict B wait|ok|WORDS       what B's own check says of rounds from now on
                 retry B                       what B waited for may have come
    lies         inject X->Y WHAT ...          see `_inject`; `B~X` is a statement in B's name signed by X
    reading      status [A ...]   rejected A
    output       `quietly COMMAND` prints nothing

A record prints as HEIGHT@TERM. Peer ids print as letters.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from p2pcoord.consensus.batches import certified_from
from p2pcoord.consensus.ledger import Ledger
from p2pcoord.consensus.messages import (
    Append,
    AppendReply,
    Grants,
    PreVoteReply,
    PreVoteRequest,
    Records,
    RecordsRequest,
    TermNotice,
    TransferRequest,
    VoteReply,
    VoteRequest,
    Votes,
)
from p2pcoord.consensus.quorum import Committee
from p2pcoord.consensus.record import (
    Admission,
    CommitteeChange,
    Members,
    Opening,
    Record,
    Round,
    make_genesis,
    make_record,
)
from p2pcoord.consensus.statements import (
    Acknowledgement,
    Certificate,
    Farewell,
    Grant,
    Transfer,
    Vote,
    certificate_of,
)
from p2pcoord.consensus.voter import Appended, Certified, Owner, Standing, Truncated
from p2pcoord.effects import Announce, Done, Effect, Emit, Failed, Halt, Outcome, Persist, Send
from p2pcoord.frames import PeerFrame
from p2pcoord.identity import Authority, Ed25519Signer, verify_ed25519
from p2pcoord.messages import AnyMessage, decode_message
from p2pcoord.peer import LATE_TICK_NS, Peer
from p2pcoord.peer_settings import PeerSettings, Restored
from p2pcoord.rounds.frames import Life
from p2pcoord.rounds.messages import JoinReply, JoinRequest, LeaveRequest
from p2pcoord.rounds.participation import join_proof
from p2pcoord.wire import decode, encode

LETTERS = "ABCDEFG"
CONFIG = b"a scripted run"
RUN = sha256(CONFIG).digest()
SECRET = b"secret"

# In `run` these are told once, by the coordinator.
COMMON_EVENTS = ("certified", "admitted", "left", "excluded")

# A peer whose deadline does not move although it was ticked would spin a real driver: the scripts refuse it.
MAX_TICKS_AT_ONCE = 10
MAX_TICKS = 10_000
# Messages delivered by one command: an exchange that does not end is a finding, not a test.
MAX_DELIVERIES = 5_000


def _signers() -> dict[str, Ed25519Signer]:
    signers = [Ed25519Signer(sha256(b"script %d" % i).digest()) for i in range(len(LETTERS))]
    return dict(zip(LETTERS, sorted(signers, key=lambda signer: signer.peer_id), strict=True))


SIGNERS = _signers()
LETTER_OF = {signer.peer_id: letter for letter, signer in SIGNERS.items()}
_PEER_IDS = re.compile("|".join(LETTER_OF))


def peer_id(letter: str) -> str:
    return SIGNERS[letter].peer_id


def authority_of(letter: str) -> Authority:
    return Authority(SIGNERS[letter], verify_ed25519, RUN)


def readable(text: str) -> str:
    """Letters for peer ids, and no hashes."""
    text = _PEER_IDS.sub(lambda match: LETTER_OF[match.group()], text)
    text = re.sub(r"Certificate\(.*\)", "<certificate>", text)
    return re.sub(r"\b[0-9a-f]{16,}\b", "<hash>", text)


def letter_of(peer: str | None) -> str:
    return "-" if peer is None else LETTER_OF.get(peer, peer[:8] + "...")


def duration_ns(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(ms|s)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"ms": 1_000_000, "s": 1_000_000_000}[unit]


class ScriptedWork:
    """The rounds of a script: bodies without meaning, judged as the script says."""

    def __init__(self) -> None:
        self.verdict: str | None = ""
        self.tended = True

    def check(self, record: Record, body: Round, now: int) -> str | None:
        return self.verdict

    def certified(self, records: Sequence[Record], now: int) -> None:
        pass

    def receive(self, sender: str, message: AnyMessage, now: int) -> bool:
        return False

    def complete(self, effect_id: int, outcome: Outcome, now: int) -> None:
        pass

    def progress(self, now: int) -> None:
        pass

    def connected(self, peer: str, now: int) -> None:
        pass

    def tick(self, now: int) -> None:
        pass

    def next_deadline(self) -> int:
        return 1 << 62

    @property
    def idle(self) -> bool:
        return True

    @property
    def reconfigurable(self) -> bool:
        return self.tended

    @property
    def holds_state(self) -> bool:
        return True

    def local_progress(self) -> None:
        return None

    def frames(self) -> Sequence[msgspec.Struct]:
        return ()


def make_peer(letter: str, genesis: Record, settings: PeerSettings) -> Peer:
    """The one place where scripts and tests build a peer."""
    peer = Peer(authority_of(letter), genesis, settings)
    peer.work = ScriptedWork()
    return peer


class Seen(msgspec.Struct, frozen=True):
    """What can be seen of a peer's place in the agreement."""

    role: str
    term: int
    coordinator: str | None
    height: int
    certified: int
    lineage: bytes
    voters: tuple[str, ...]
    outgoing: tuple[str, ...]
    members: tuple[str, ...]


def seen(peer: Peer) -> Seen:
    voter, ledger, committee = peer.agreement.voter, peer.agreement.voter.ledger, peer.agreement.committee
    return Seen(
        str(voter.role) if voter.is_voter() else "member" if peer.is_member else "stranger",
        voter.term,
        voter.coordinator,
        ledger.height,
        ledger.certified,
        ledger.hashes[ledger.certified],
        committee.voters,
        committee.outgoing,
        peer.roster.members,
    )


def settings_of(
    letter: str, *, secret: bytes | None = SECRET, size: int = 7, rotation: int = 1000
) -> PeerSettings:
    return PeerSettings(name=letter.lower(), secret=secret, committee_size=size, rotation_rounds=rotation)


def scripted_round(version: int, note: bytes = b"") -> Round:
    return Round(
        version, sha256(b"state %d" % (version - 1)).digest(), sha256(note).digest(), (), b"", b"", 0
    )


def history(
    voters: str, members: str, secret: bytes | None
) -> tuple[Record, list[Record], dict[int, Certificate]]:
    """Genesis, and the certified records by which A let `members` in and the committee became `voters`."""
    founder = authority_of("A")
    genesis = make_genesis(founder, CONFIG)
    ledger = Ledger(founder, genesis)
    certificates: dict[int, Certificate] = {}

    def add(body: Opening | Members | CommitteeChange, signers: str) -> None:
        record = make_record(
            founder,
            height=ledger.height + 1,
            term=1,
            previous=ledger.hashes[-1],
            committee=ledger.committee_height,
            body=body,
        )
        ledger.append(record)
        certificate = certificate_by(signers, record)
        ledger.certify(certificate)
        certificates[ledger.height] = certificate

    vote = founder.sign(Vote(1, founder.peer_id, ledger.hashes[0], founder.peer_id))
    add(Opening((vote,)), "A")
    others = [letter for letter in members if letter != "A"]
    if others:
        add(
            Members(
                tuple(
                    Admission(
                        peer_id(letter),
                        letter.lower(),
                        join_proof(secret, RUN, peer_id(letter)) if secret is not None else b"",
                    )
                    for letter in others
                )
            ),
            "A",
        )
    if voters != "A":
        ids = tuple(peer_id(letter) for letter in voters)
        signers = "".join(sorted({"A", *voters}))
        add(CommitteeChange(Committee(ids, (founder.peer_id,))), signers)
        add(CommitteeChange(Committee(ids)), voters)
    return genesis, ledger.records[1:], certificates


def certificate_by(signers: Sequence[str], record: Record) -> Certificate:
    """By these letters; "B~X" is B's place, signed by X."""
    header = record.header
    name = authority_of("A").hash(header)
    return certificate_of(
        authority_of(x[-1]).sign(Acknowledgement(header.term, header.height, name, peer_id(x[0])))
        for x in signers
    )


def frames_of(
    letter: str, genesis: Record, records: Sequence[Record], certificates: dict[int, Certificate]
) -> list[bytes]:
    """The log file of a peer that lived through a history."""
    frames: list[msgspec.Struct] = [Owner(peer_id(letter), RUN), Appended(genesis)]
    for record in records:
        if isinstance(record.body, Opening):
            votes = record.body.votes
            own = next((vote for vote in votes if vote.voter == peer_id(letter)), None)
            frames.append(
                Standing(
                    record.header.term,
                    own.candidate if own else None,
                    own.last if own else b"",
                    Votes(votes),
                )
            )
        frames.append(Appended(record))
        if record.header.height in certificates:
            frames.append(Certified(certificates[record.header.height]))
    return [encode(frame) for frame in frames]


class Machine:
    """One peer with its clock, its disk and what its driver holds back."""

    def __init__(self, letter: str, genesis: Record, settings: PeerSettings, frames: Sequence[bytes]) -> None:
        self.letter = letter
        self.genesis = genesis
        self.settings = settings
        self.clock = 0
        self.disk: list[bytes] = list(frames)
        self.manual = False
        self.lives = 0
        self.peer: Peer | None = None
        self.pending: deque[Persist] = deque()
        self.held: list[Send] = []
        self.durable = 0
        self.seen: tuple[str, int] | None = None
        self.verdict: str | None = ""


class World:
    """Everything a script acts on. `execute` runs a command and returns the lines it printed."""

    def __init__(self) -> None:
        self.machines: dict[str, Machine] = {}
        self.queues: dict[tuple[str, str], deque[bytes]] = {}
        self.delivered: dict[tuple[str, str], bytes] = {}
        self.cuts: set[tuple[str, str]] = set()
        self.names: dict[bytes, str] = {}
        self.lines: list[str] = []
        self.events_only = False
        self.quiet = False
        self.gossip = False
        self.tended = True

    # Commands

    def execute(self, line: str) -> list[str]:
        self.lines = []
        word, *arguments = line.split()
        if word == "quietly":
            self.quiet = True
            self.execute(" ".join(arguments))
            self.quiet = False
            return []
        command: Callable[..., None] = getattr(self, f"do_{word}")
        command(*arguments)
        return [readable(text) for text in self.lines]

    def say(self, text: str) -> None:
        if not self.quiet:
            self.lines.append(text)

    def do_peers(self, *words: str) -> None:
        letters = [word for word in words if word in LETTERS]
        genesis = make_genesis(authority_of("A"), CONFIG)
        self._found(letters, genesis, {}, [word for word in words if word not in LETTERS])

    def do_committee(self, *words: str) -> None:
        at = words.index("members") if "members" in words else len(words)
        voters = "".join(word for word in words[:at] if word in LETTERS)
        rest = "".join(word for word in words[at:] if word in LETTERS)
        options = [word for word in words if word not in LETTERS and word != "members"]
        everyone = "".join(sorted({"A", *voters, *rest}))
        genesis, records, certificates = history(voters, everyone, None if "open" in options else SECRET)
        frames = {letter: frames_of(letter, genesis, records, certificates) for letter in everyone}
        self._found(list(everyone), genesis, frames, options)

    def _found(
        self, letters: list[str], genesis: Record, frames: dict[str, list[bytes]], options: list[str]
    ) -> None:
        self.gossip = "gossip" in options
        self.tended = "untended" not in options
        self.machines, self.queues, self.delivered, self.cuts = {}, {}, {}, set()
        values = dict(option.split("=") for option in options if "=" in option)
        secrets = dict([values["secret"].split(":")]) if "secret" in values else {}
        self.quiet = True
        for letter in letters:
            secret = None if "open" in options else secrets.get(letter, SECRET.decode()).encode()
            settings = settings_of(
                letter,
                secret=secret,
                size=int(values.get("size", 7)),
                rotation=int(values.get("rotation", 1000)),
            )
            machine = Machine(letter, genesis, settings, frames.get(letter, ()))
            self.machines[letter] = machine
            self._start(machine)
        for letter in letters:
            for other in letters:
                if letter != other and "unconnected" not in options:
                    self._connected(letter, other)
        self.quiet = False

    def _start(self, machine: Machine) -> None:
        machine.lives += 1
        machine.peer = make_peer(machine.letter, machine.genesis, machine.settings)
        machine.peer.work.verdict = machine.verdict  # type: ignore[attr-defined]
        machine.peer.work.tended = self.tended  # type: ignore[attr-defined]
        machine.pending.clear()
        machine.held.clear()
        machine.durable = 0
        machine.seen = None
        entropy = sha256(f"{machine.letter} {machine.lives}".encode()).digest()
        restored = Restored(tuple(machine.disk), entropy)
        self._apply(machine, lambda peer, now: peer.start(restored, now))

    def do_tick(self, *words: str) -> None:
        letters, span = words[:-1], words[-1]
        if span in LETTERS:
            letters, span = words, "0ms"
        for letter in letters:
            machine = self._machine(letter)
            self._advance(machine, machine.clock + duration_ns(span), at_least_one=True)

    def do_timeout(self, *letters: str) -> None:
        for letter in letters:
            machine = self._machine(letter)
            deadline = self._peer(machine).agreement.election.deadline
            assert machine.clock <= deadline + LATE_TICK_NS, f"{letter} slept over its election timeout"
            self._advance(machine, max(deadline, machine.clock))

    def do_sleep(self, letter: str, span: str) -> None:
        self._machine(letter).clock += duration_ns(span)

    def _advance(self, machine: Machine, target: int, *, at_least_one: bool = False) -> None:
        ticked_at, ticks = -1, 0
        while not self._peer(machine).halted:
            deadline = max(self._peer(machine).next_deadline(), machine.clock)
            if deadline > target:
                break
            ticks = ticks + 1 if deadline == ticked_at else 0
            assert ticks < MAX_TICKS_AT_ONCE, f"{machine.letter}'s deadline does not move on"
            machine.clock = ticked_at = deadline
            self._apply(machine, lambda peer, now: peer.tick(now))
        machine.clock = target
        if at_least_one and ticked_at != target:
            self._apply(machine, lambda peer, now: peer.tick(now))

    def do_run(self, span: str) -> None:
        self.events_only = True
        left = duration_ns(span)
        self._settle()
        for _ in range(MAX_TICKS):
            living = [m for m in self.machines.values() if m.peer is not None and not m.peer.halted]
            waits = {m.letter: max(m.peer.next_deadline() - m.clock, 0) for m in living if m.peer is not None}
            step = min([left, *waits.values()])
            for machine in self.machines.values():
                machine.clock += step
            left -= step
            if left == 0:
                break
            for letter, wait in waits.items():
                if wait == step:
                    self._apply(self.machines[letter], lambda peer, now: peer.tick(now))
            self._settle()
        else:
            raise AssertionError("time does not move on")
        self.events_only = False

    def do_deliver(self, way: str, count: str = "0") -> None:
        source, target = way.split("->")
        queue = self.queues.get((source, target), deque())
        if not queue:
            self.say(f"nothing on its way from {source} to {target}")
        for _ in range(int(count) or len(queue)):
            self._deliver(source, target)

    def do_settle(self) -> None:
        self._settle()

    def _settle(self) -> None:
        for _ in range(MAX_DELIVERIES):
            way = next((way for way in sorted(self.queues) if self.queues[way]), None)
            if way is None:
                return
            self._deliver(*way)
        raise AssertionError("the peers do not stop talking")

    def _deliver(self, source: str, target: str) -> None:
        data = self.queues[source, target].popleft()
        self.delivered[source, target] = data
        self._arrive(source, target, data)

    def _arrive(self, source: str, target: str, data: bytes) -> None:
        machine = self.machines[target]
        if machine.peer is None:
            self._tell(f"{target} is down: lost {self._message(data)}")
            return
        self._tell(f"{target} gets from {source}: {self._message(data)}")
        self._apply(machine, lambda peer, now: peer.receive(peer_id(source), data, now))

    def do_drop(self, *ways: str) -> None:
        chosen = [tuple(way.split("->")) for way in ways] or sorted(self.queues)
        for source, target in chosen:
            queue = self.queues.get((source, target), deque())
            if queue:
                self.say(f"dropped {source}->{target}: " + "; ".join(self._message(data) for data in queue))
            queue.clear()

    def do_cut(self, *words: str) -> None:
        if len(words) == 2:
            self.cuts |= {(words[0], words[1]), (words[1], words[0])}
        else:
            source, target = words[0].split("->")
            self.cuts.add((source, target))

    def do_heal(self) -> None:
        self.cuts.clear()

    def do_replay(self, way: str) -> None:
        source, target = way.split("->")
        self._arrive(source, target, self.delivered[source, target])

    def do_connect(self, one: str, other: str) -> None:
        self._connected(one, other)
        self._connected(other, one)

    def do_disconnect(self, one: str, other: str) -> None:
        self._disconnected(one, other)
        self._disconnected(other, one)

    def _connected(self, letter: str, other: str) -> None:
        if self.machines[letter].peer is not None:
            self._apply(self.machines[letter], lambda peer, now: peer.connected(peer_id(other), now))

    def _disconnected(self, letter: str, other: str) -> None:
        if self.machines[letter].peer is not None:
            self._apply(self.machines[letter], lambda peer, now: peer.disconnected(peer_id(other), now))

    def do_disk(self, letter: str, mode: str) -> None:
        self._machine(letter).manual = mode == "manual"

    def do_durable(self, letter: str, count: str = "0") -> None:
        machine = self._machine(letter)
        if not machine.pending:
            self.say(f"{letter} writes nothing")
        for persist in list(machine.pending)[: int(count) or None]:
            machine.pending.popleft()
            self._write(machine, persist)
            self._tell(f"{letter}'s disk has {self._frames(persist)}")
            self._release(machine)
            self._complete(machine, persist)

    def do_fail(self, letter: str) -> None:
        machine = self._machine(letter)
        persist = machine.pending.popleft()
        self._apply(machine, lambda peer, now: peer.complete(persist.id, Failed("disk full"), now))

    def do_crash(self, letter: str) -> None:
        machine = self._machine(letter)
        for persist in machine.pending:
            self.say(f"{letter} loses {self._frames(persist)}")
        machine.peer = None
        for other in self.machines:
            self._disconnected(other, letter)

    def do_restart(self, letter: str) -> None:
        machine = self._machine(letter)
        machine.manual = False
        self._start(machine)
        for other in self.machines:
            if other != letter and self.machines[other].peer is not None:
                self.do_connect(letter, other)

    def do_propose(self, letter: str, count: str = "1") -> None:
        for _ in range(int(count)):
            self._propose(
                letter, scripted_round(self._peer(self._machine(letter)).agreement.voter.ledger.height)
            )

    def do_change(self, letter: str, *new: str) -> None:
        current = self._peer(self._machine(letter)).agreement.committee.voters
        body = CommitteeChange(Committee(tuple(peer_id(x) for x in new if x != "!"), current))
        if "!" in new:
            self._apply(self._machine(letter), lambda peer, now: self._order(peer, body, now))
        else:
            self._propose(letter, body)

    def _order(self, peer: Peer, body: CommitteeChange, now: int) -> list[Effect]:
        """What an honest coordinator would not order yet."""
        peer.agreement.replication._order(body)
        return peer._finish(now)

    def do_finish(self, letter: str) -> None:
        current = self._peer(self._machine(letter)).agreement.committee
        self._propose(letter, CommitteeChange(Committee(current.voters)))

    def _propose(self, letter: str, body: Round | CommitteeChange) -> None:
        def propose(peer: Peer, now: int) -> list[Effect]:
            if peer.agreement.propose(body) is None:
                self.say(f"{letter} may not order now")
            return peer._finish(now)

        self._apply(self._machine(letter), propose)

    def do_learn(self, letter: str, *learners: str) -> None:
        replication = self._peer(self._machine(letter)).agreement.replication
        replication.learners = tuple(peer_id(x) for x in learners)

    def do_transfer(self, letter: str, target: str) -> None:
        def transfer(peer: Peer, now: int) -> list[Effect]:
            if not peer.agreement.replication.transfer(peer_id(target), now):
                self.say(f"{target} is not fit for it now")
            return peer._finish(now)

        self._apply(self._machine(letter), transfer)

    def do_rotate(self, letter: str) -> None:
        def rotate(peer: Peer, now: int) -> list[Effect]:
            if not peer.agreement.rotate(now):
                self.say("nobody is fit for it now")
            return peer._finish(now)

        self._apply(self._machine(letter), rotate)

    def do_leave(self, letter: str) -> None:
        self._apply(self._machine(letter), lambda peer, now: peer.leave(now))

    def do_verdict(self, letter: str, *words: str) -> None:
        machine = self._machine(letter)
        text = " ".join(words)
        machine.verdict = {"ok": "", "wait": None}.get(text, text)
        self._peer(machine).work.verdict = machine.verdict  # type: ignore[attr-defined]

    def do_retry(self, letter: str) -> None:
        def retry(peer: Peer, now: int) -> list[Effect]:
            peer.agreement.following.retry(now)
            return peer._finish(now)

        self._apply(self._machine(letter), retry)

    def do_status(self, *letters: str) -> None:
        for letter in letters or sorted(self.machines):
            machine = self.machines[letter]
            if machine.peer is None:
                self.say(f"{letter} is down")
                continue
            peer = machine.peer
            status = seen(peer)
            ledger = peer.agreement.voter.ledger
            voters = "".join(letter_of(p) for p in status.voters)
            outgoing = "".join(letter_of(p) for p in status.outgoing)
            self.say(
                f"{letter} {status.role} term {status.term} coordinator {letter_of(status.coordinator)}"
                f" log {ledger.height}@{ledger.last.term} certified {ledger.certified}"
                f" voters {voters}{' outgoing ' + outgoing if outgoing else ''}"
                f" members {''.join(letter_of(p) for p in status.members)}"
                + (" HALTED" if peer.halted else "")
                + (" gone" if peer.left else "")
            )

    def do_rejected(self, letter: str) -> None:
        rejected = self._peer(self._machine(letter)).rejected
        if not rejected:
            self.say(f"{letter} rejected nothing")
        for kind, by_peer in sorted(rejected.items()):
            for sender, count in sorted(by_peer.items()):
                self.say(f"{letter} rejected {kind} from {letter_of(sender)}: {count}")

    def do_log(self, letter: str) -> None:
        """The log as its disk has it, replayed: what a restart would find."""
        records: list[str] = []
        certified = 0
        for data in self.machines[letter].disk:
            frame: PeerFrame = decode(data, PeerFrame)  # type: ignore[arg-type]
            if isinstance(frame, Appended):
                records.append(self._record(frame.record))
            elif isinstance(frame, Truncated):
                del records[frame.height + 1 :]
            elif isinstance(frame, Certified):
                certified = max(certified, frame.certificate.height)
        self.say(f"{letter}'s disk: {', '.join(records[1:])}; certified {certified}")

    # Lies

    def do_inject(self, way: str, what: str, *words: str) -> None:
        """What X sends to Y although no peer of its would:

        inject X->Y garbage
        inject X->Y notice TERM grants A B~X         proof of a term, by these signers
        inject X->Y pre-vote? TERM [transfer-by B~X T]  X stands (with a transfer of term T)
        inject X->Y vote? TERM grants A B            X stands in a term that these grants prove
        inject X->Y join B NAME C                    X asks for B's admission with the proof for C
        inject X->Y records?                         X asks for all records
        inject X->Y long-join B NAME PROOF ID        ... with a name, a proof and more of a peer id of these sizes
        inject X->Y leave B~X HEIGHT                 B's farewell at HEIGHT
        inject X->Y transfer C A~B                   X hands the term's duty to C, in A's name, signed by B
        inject X->Y grant                            X grants the pre-vote of Y's next term, whatever it heard
        inject X->Y tell                             X sends what it has certified beyond Y (no lie, only unasked)
        inject X->Y vote                             X votes for the candidate Y, whatever it voted before
        inject X->Y append TERM [above HEIGHT]       X orders, without showing a right to
        inject X->Y ack HEIGHT by B~X                X sends an acknowledgement
        inject X->Y chain HEIGHT TERM by C signed A C  a certified opening after Y's record HEIGHT - 1
        """
        source, target = way.split("->")
        voter = self._peer(self._machine(source)).agreement.voter
        ledger = voter.ledger
        message: msgspec.Struct | None
        if what == "garbage":
            self._arrive(source, target, b"\xff" * 40)
            return
        if what == "notice":
            term = int(words[0])
            message = TermNotice(term, Grants(self._grants(term, source, words[2:])))
        elif what == "pre-vote?":
            transfer = self._transfer(words[2], int(words[3]), source) if words[1:] else None
            message = PreVoteRequest(int(words[0]), voter.proof, ledger.last, voter.last_votes(), transfer)
        elif what == "vote?":
            term = int(words[0])
            grants = Grants(self._grants(term, source, words[2:]))
            message = VoteRequest(term, grants, ledger.last, voter.last_votes())
        elif what == "join":
            joiner, proof_of = peer_id(words[0]), peer_id(words[2])
            message = JoinRequest(Admission(joiner, words[1], join_proof(SECRET, RUN, proof_of)))
        elif what == "records?":
            message = RecordsRequest(1)
        elif what == "long-join":
            letter, name, proof, extra = words[0], *(int(size) for size in words[1:])
            admission = Admission(peer_id(letter) + "1" * extra, "x" * name, b"x" * proof)
            message = JoinRequest(admission)
        elif what == "leave":
            farewell = authority_of(words[0][-1]).sign(Farewell(peer_id(words[0][0]), int(words[1])))
            message = LeaveRequest(farewell)
        elif what == "transfer":
            message = TransferRequest(self._transfer(words[1], voter.term, words[0]))
        elif what == "grant":
            other = self._peer(self._machine(target)).agreement.voter
            grant = authority_of(source).sign(Grant(other.term + 1, other.me, voter.me))
            message = PreVoteReply(other.term + 1, grant)
        elif what == "tell":
            start = self._peer(self._machine(target)).agreement.voter.ledger.certified + 1
            message = certified_from(self._peer(self._machine(source)).agreement.voter.ledger, start)
            assert message is not None, f"{source} has nothing certified from {start} on"
        elif what == "vote":
            other = self._peer(self._machine(target)).agreement.voter
            vote = Vote(other.term, other.me, other.voted_last, voter.me)
            message = VoteReply(other.term, authority_of(source).sign(vote))
        elif what == "append":
            above = int(words[2]) if words[1:] else ledger.height
            message = Append(
                int(words[0]),
                150_000_000,
                above,
                ledger.hashes[above] if above <= ledger.height else bytes(32),
                (),
                ledger.newest_certificate,
                None,
            )
        elif what == "ack":
            height, (named, signer) = int(words[0]), words[2].split("~")
            held = self._peer(self._machine(target)).agreement.voter.ledger.hashes[height]
            ack = authority_of(signer).sign(Acknowledgement(voter.term, height, held, peer_id(named)))
            message = AppendReply(voter.term, True, height, ledger.certified, (ack,))
        elif what == "chain":
            height, term, by, signers = int(words[0]), int(words[1]), words[3], words[5:]
            base = self._peer(self._machine(target)).agreement.voter.ledger
            previous = base.hashes[height - 1]
            votes = tuple(
                authority_of(x[-1]).sign(Vote(term, peer_id(by), previous, peer_id(x[0]))) for x in signers
            )
            record = make_record(
                authority_of(by),
                height=height,
                term=term,
                previous=previous,
                committee=base.records[height - 1].header.committee,
                body=Opening(votes),
            )
            message = Records((record,), certificate_by(signers, record), height)
        else:
            raise AssertionError(f"inject {what}?")
        self._arrive(source, target, encode(message))

    def _grants(self, term: int, candidate: str, signers: Sequence[str]) -> tuple[Grant, ...]:
        return tuple(
            authority_of(x[-1]).sign(Grant(term, peer_id(candidate), peer_id(x[0]))) for x in signers
        )

    def _transfer(self, by: str, term: int, target: str) -> Transfer:
        named, signer = by[0], by[-1]
        return authority_of(signer).sign(Transfer(term, peer_id(named), peer_id(target)))

    # Machines

    def _machine(self, letter: str) -> Machine:
        return self.machines[letter]

    def _peer(self, machine: Machine) -> Peer:
        assert machine.peer is not None, f"{machine.letter} is down"
        return machine.peer

    def _tell(self, text: str) -> None:
        if not self.events_only:
            self.say(text)

    def _apply(self, machine: Machine, action: Callable[[Peer, int], list[Effect]]) -> None:
        """Gives one input to a peer and does what it asks for, as a driver would."""
        peer = self._peer(machine)
        effects = action(peer, machine.clock)
        voter = peer.agreement.voter
        standing = (str(voter.role), voter.term)
        if machine.seen is not None and standing != machine.seen:
            self.say(f"  {machine.letter} is {standing[0]}, term {standing[1]}")
        machine.seen = standing
        done: list[Persist] = []
        for effect in effects:
            if isinstance(effect, Persist):
                self._tell(f"  {machine.letter} writes {self._frames(effect)}")
                if machine.manual:
                    machine.pending.append(effect)
                else:
                    self._write(machine, effect)
                    done.append(effect)
            elif isinstance(effect, Send):
                if effect.after > machine.durable:
                    assert machine.manual, "a message waits for what nobody writes"
                    machine.held.append(effect)
                    target = letter_of(effect.to)
                    self._tell(f"  {machine.letter}->{target} held: {self._message(effect.data)}")
                else:
                    self._leave(machine, effect)
            elif isinstance(effect, Announce):
                self._tell(f"  {machine.letter} announces {self._message(effect.data)}")
                for other in self.machines if self.gossip else ():
                    linked = peer_id(other) in peer.connections and (machine.letter, other) not in self.cuts
                    if linked:
                        self.queues.setdefault((machine.letter, other), deque()).append(effect.data)
            elif isinstance(effect, Emit):
                if self.events_only and effect.event in COMMON_EVENTS and not peer.agreement.is_coordinator:
                    continue
                fields = " ".join(f"{key}={self._value(value)}" for key, value in effect.fields.items())
                self.say(f"  {machine.letter}: {effect.event} {fields}".rstrip())
            elif isinstance(effect, Halt):
                self.say(f"  {machine.letter} HALTS: {effect.reason}")
            else:
                self._tell(f"  {machine.letter} asks for {effect}")
        for persist in done:
            self._complete(machine, persist)

    def _complete(self, machine: Machine, persist: Persist) -> None:
        self._apply(machine, lambda peer, now: peer.complete(persist.id, Done(), now))

    def _write(self, machine: Machine, persist: Persist) -> None:
        assert persist.id > machine.durable, "writes are numbered and run in order"
        machine.durable = persist.id
        machine.disk.extend(persist.frames)

    def _release(self, machine: Machine) -> None:
        free = [send for send in machine.held if send.after <= machine.durable]
        machine.held = [send for send in machine.held if send.after > machine.durable]
        for send in free:
            self._leave(machine, send)

    def _leave(self, machine: Machine, send: Send) -> None:
        target = letter_of(send.to)
        way = (machine.letter, target)
        lost = way in self.cuts or target not in self.machines
        if not lost:
            self.queues.setdefault(way, deque()).append(send.data)
        self._tell(f"  {machine.letter}->{target}{' LOST' if lost else ''}: {self._message(send.data)}")

    # Words

    def _value(self, value: Any) -> str:
        if isinstance(value, list | tuple):
            return "[" + " ".join(self._value(item) for item in value) + "]"
        text = str(value)
        return repr(text) if " " in text else text

    def _record(self, record: Record) -> str:
        header, body = record.header, record.body
        name = f"{header.height}@{header.term}"
        self.names[authority_of("A").hash(header)] = name
        if isinstance(body, CommitteeChange):
            new = "".join(letter_of(peer) for peer in body.committee.voters)
            old = "".join(letter_of(peer) for peer in body.committee.outgoing)
            return f"{name} {'J' if old else 'N'}({new}{',' + old if old else ''})"
        if isinstance(body, Members):
            parts = [f"+{letter_of(admission.peer)}" for admission in body.admitted]
            parts += [f"-{letter_of(farewell.peer)}" for farewell in body.left]
            parts += [f"!{letter_of(exclusion.peer)}" for exclusion in body.excluded]
            return f"{name} members({' '.join(parts)})"
        return f"{name} {header.kind}"

    def _frames(self, persist: Persist) -> str:
        return "; ".join(self._frame(data) for data in persist.frames)

    def _frame(self, data: bytes) -> str:
        frame: PeerFrame = decode(data, PeerFrame)  # type: ignore[arg-type]
        match frame:
            case Life():
                return f"life {frame.incarnation}"
            case Owner():
                return f"owner {letter_of(frame.peer_id)}"
            case Standing():
                vote = f"vote for {letter_of(frame.voted_for)}" if frame.voted_for else "no vote"
                return f"term {frame.term}, {vote}, proof {self._proof(frame.proof)}"
            case Appended():
                return f"append {self._record(frame.record)}"
            case Truncated():
                return f"truncate to {frame.height}"
            case Certified():
                return f"certified {self._certificate(frame.certificate)}"
        return type(frame).__name__

    def _certificate(self, certificate: Certificate | None) -> str:
        if certificate is None:
            return "0"
        signers = "".join(letter_of(voter) for voter, _ in certificate.signatures)
        return f"{certificate.height}@{certificate.term} by {signers}"

    def _proof(self, proof: Grants | Votes | Certificate | None) -> str:
        match proof:
            case None:
                return "none"
            case Grants():
                return "grants of " + "".join(letter_of(grant.voter) for grant in proof.grants)
            case Votes():
                return "votes of " + "".join(letter_of(vote.voter) for vote in proof.votes)
            case Certificate():
                return "certificate " + self._certificate(proof)

    def _message(self, data: bytes) -> str:
        try:
            message = decode_message(data)
        except Exception:  # a lie
            return f"{len(data)} bytes of garbage"
        match message:
            case PreVoteRequest():
                transfer = (
                    f", transfer by {letter_of(message.transfer.coordinator)}" if message.transfer else ""
                )
                last = f"{message.last.height}@{message.last.term}"
                return f"pre-vote? term {message.term} last {last}{transfer}"
            case PreVoteReply():
                return f"pre-vote term {message.term} {'granted' if message.grant else 'refused: ' + message.reason}"
            case VoteRequest():
                last = f"{message.last.height}@{message.last.term}"
                return f"vote? term {message.term} last {last}, {self._proof(message.proof)}"
            case VoteReply():
                return f"vote term {message.term} {'given' if message.vote else 'refused: ' + message.reason}"
            case TermNotice():
                return f"notice of term {message.term}, {self._proof(message.proof)}"
            case TransferRequest():
                return f"transfer of term {message.transfer.term} to {letter_of(message.transfer.target)}"
            case Append():
                records = (
                    " [" + ", ".join(self._record(r) for r in message.records) + "]"
                    if message.records
                    else ""
                )
                certified = message.certificate.height if message.certificate else 0
                proof = f", {self._proof(message.proof)}" if message.proof else ""
                return f"append term {message.term} after {message.previous_height}{records} certified {certified}{proof}"
            case AppendReply():
                if not message.matched:
                    return f"appended term {message.term} NO MATCH, certified {message.certified_height}"
                acks = ",".join(str(ack.height) for ack in message.acknowledgements)
                return (
                    f"appended term {message.term} match {message.match_height} certified {message.certified_height}"
                    + (f" acks {acks}" if acks else "")
                    + (f", waits: {message.waiting}" if message.waiting else "")
                )
            case RecordsRequest():
                return f"records? from {message.from_height}"
            case Records():
                records = ", ".join(self._record(record) for record in message.records)
                return f"records [{records}] certified {self._certificate(message.certificate)}, up to {message.more}"
            case JoinRequest():
                return f"join? {letter_of(message.admission.peer)}"
            case JoinReply():
                return f"join {'refused: ' + message.refused if message.refused else 'on its way'}"
            case LeaveRequest():
                farewell: Farewell = message.farewell
                return f"leave {letter_of(farewell.peer)} at {farewell.height}"
        return type(message).__name__


# Files ---------------------------------------------------------------------------------------------------------------


class Block(msgspec.Struct):
    """Comments, commands, and what they are expected to print."""

    comments: list[str]
    commands: list[str]
    expected: list[str]


def parse(text: str) -> list[Block]:
    """The blocks of a script, which are separated by empty lines. Commands without `----` expect nothing yet."""
    blocks = []
    for part in re.split(r"\n\s*\n", text.strip()):
        lines = part.splitlines()
        at = lines.index("----") if "----" in lines else len(lines)
        head, expected = lines[:at], lines[at + 1 :]
        comments = [line for line in head if line.startswith("#")]
        commands = [line for line in head if not line.startswith("#")]
        assert head == comments + commands, f"comments come first in a block: {head}"
        blocks.append(Block(comments, commands, expected))
    return blocks


def play(blocks: Sequence[Block]) -> list[Block]:
    """The blocks with what the commands really print."""
    world = World()
    played = []
    for block in blocks:
        printed: list[str] = []
        for command in block.commands:
            try:
                printed += world.execute(command)
            except Exception as error:
                error.add_note(f"in the script's command: {command}")
                raise
        played.append(Block(block.comments, block.commands, (printed or ["ok"]) if block.commands else []))
    return played


def render(blocks: Sequence[Block]) -> str:
    parts = []
    for block in blocks:
        result = ["----", *block.expected] if block.commands else []
        parts.append("\n".join([*block.comments, *block.commands, *result]))
    return "\n\n".join(parts) + "\n"


def scripts() -> list[Path]:
    """All but those about rounds, which have commands of their own (`round_runner`)."""
    folder = Path(__file__).parent / "scripts"
    return sorted(path for path in folder.glob("*/*.txt") if path.parent.name != "rounds")
