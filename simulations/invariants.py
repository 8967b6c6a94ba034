"""What must hold after every event, whatever the network, the disks and a liar do.

    chain        one record per height is certified, each follows the one before, everywhere the same
    certificate  a quorum of the committee at its height signed it: counted here anew, from the chain, by other code
    durable      who signed a certificate has the record on its disk, until the disk is lost
    coordinator  one a term
    vote         one a term, also across restarts: of the votes and candidacies that left a machine, or that an opening shows
    acknowledged one record per term and height and voter, and only in the voter's own term, when that is persisted
    term         rises by one at a time: who enters a higher one found a quorum of the one before
    version      v follows v-1 from its state, has one state; an assignment counts once
    attempt      a certified round has the contributors and weights of the attempt that it names, which spans just them
    sum          its state is, bit for bit, what these contributions and factors give in the tree's order
    trained      who has signed a contribution to an assignment of a round on its disk, or in this life, does not train it again
    vectors      no member of a tree gets more than fan_out + 1 vectors for one attempt
    back         what a peer holds certified never shrinks; after a restart it is at least what its disk held
    side         a record born during a cut is certified by the side that has a quorum, and its signers are on that side
    log          recovery gives back every frame that was synced
    content      what a peer adopts is durable on its disk
    evidence     nobody finds any against a machine that does not lie, and no certified record excludes one for good
    halt         no peer stops

They look at peers from outside and keep their own account, so they cost little: most events change nothing that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from p2pcoord.consensus.messages import AppendReply, VoteReply, VoteRequest
from p2pcoord.consensus.quorum import Committee
from p2pcoord.consensus.record import CommitteeChange, Members, Opening, Record, Round
from p2pcoord.consensus.statements import Acknowledgement, Certificate, Vote
from p2pcoord.consensus.voter import Appended, Certified, Role, Standing, Truncated
from p2pcoord.frames import PeerFrame
from p2pcoord.identity import signed_bytes, statement_hash
from p2pcoord.messages import decode_message
from p2pcoord.peer import Peer
from p2pcoord.rounds.attempt import Attempt
from p2pcoord.rounds.frames import Slot
from p2pcoord.rounds.rounds import Rounds
from p2pcoord.wire import decode
from simulations.signatures import Keyring

if TYPE_CHECKING:
    from simulations.machine import Machine

SETTLE_NS = 1_000_000_000
"""After a cut begins, what was on its way before has arrived."""


class Violation(msgspec.Struct, frozen=True):
    at_ns: int
    invariant: str
    detail: str


class DiskAccount(msgspec.Struct):
    """What one machine's log holds durably."""

    records: list[bytes]
    """Names by height."""
    term: int = 0
    certified: int = 0
    slots: set[tuple[int, int]] = msgspec.field(default_factory=set)
    """(origin round, assignment) of the contributions that it signed."""


class Invariants:
    """The account of one world. `violations` is empty as long as all is well."""

    def __init__(
        self, keyring: Keyring, run: bytes, genesis: Record, machines: Mapping[str, Machine]
    ) -> None:
        self.now = 0
        self.violations: list[Violation] = []
        self.chain: list[Record] = [genesis]
        self.names: list[bytes] = [statement_hash(run, genesis.header)]
        self.committed_at: list[int] = [0]
        """When each height was first certified anywhere."""
        self.version = 0
        self.version_at = 0
        self.certificates = 0
        zero = getattr(genesis.body, "state", None)
        self.states: list[bytes] = [zero.root if zero is not None else b""]
        """The certified state of each version; version 0's is in genesis, or empty where work has none."""
        self._adopted: dict[str, tuple[int, int]] = {}
        self._shown: tuple[Machine, int, bytes] | None = None
        self._counted: dict[tuple[int, int], int] = {}
        founder = genesis.header.coordinator
        self._committees: list[tuple[int, tuple[str, ...], tuple[str, ...]]] = [(0, (founder,), ())]
        self._keyring = keyring
        self._run = run
        self._machines = machines
        self._coordinators: dict[int, str] = {}
        self._votes: dict[tuple[str, int], tuple[str, bytes]] = {}
        self._acknowledged: dict[tuple[str, int, int], bytes] = {}
        self._checked: set[tuple[int, frozenset[str]]] = set()
        self._seen: dict[str, tuple[int, int]] = {}
        """Machine -> (life, certified height)."""
        self._disks: dict[str, DiskAccount] = {}
        self._top_term = 0
        self._born: dict[bytes, int] = {}
        self.sides: tuple[int, frozenset[str]] | None = None
        """Since when, and who is on one side, while the network is split in two."""
        self.liars: set[str] = set()
        """Machines that also say what is not so."""
        self._frames: dict[bytes, PeerFrame] = {}
        self.rebuild: Callable[[Attempt], bytes] | None = None
        """The root of the state that an attempt makes, computed anew from its contributions (where rounds are real)."""
        self.attempts: dict[bytes, Attempt] = {}
        """Every attempt that any peer took up, by hash."""
        self._current: dict[str, Attempt] = {}
        self.rebuilt = 0
        """States that were computed anew and were the certified ones."""
        self._made: dict[tuple[str, int], set[tuple[int, int]]] = {}
        """(Machine, life) -> slots whose training ended well."""
        self._vectors: dict[tuple[str, bytes], set[bytes]] = {}
        self.most_vectors = 0
        """That any member fetched for one attempt."""

    def violated(self, invariant: str, detail: str) -> None:
        self.violations.append(Violation(self.now, invariant, detail))

    def newest_committee(self) -> Committee:
        """The last one certified anywhere."""
        _, voters, outgoing = self._committees[-1]
        return Committee(voters, outgoing)

    # After every input

    def observe(self, machine: Machine, peer: Peer) -> None:
        """Looks at a peer that has just had an input."""
        voter = peer.agreement.voter
        if voter.term > self._top_term:
            if voter.term > self._top_term + 1:
                self.violated(
                    "term", f"{machine.name} jumps to {voter.term}, {self._top_term} was the highest"
                )
            self._top_term = voter.term
        if voter.role is Role.COORDINATOR:
            known = self._coordinators.setdefault(voter.term, machine.id)
            if known != machine.id:
                self.violated("coordinator", f"{machine.name} and {known} coordinate term {voter.term}")
        if isinstance(peer.work, Rounds):
            self._take_up(machine, peer.work.participant.current)
        life, height = self._seen.get(machine.id, (0, 0))
        certified = voter.ledger.certified
        if (life, height) != (machine.life, certified):
            self._look_at_ledger(machine, peer, life, height)
        if self._shown is not None:
            self._check_shown(*self._shown)

    def _take_up(self, machine: Machine, attempt: Attempt | None) -> None:
        if attempt is not None and self._current.get(machine.id) is not attempt:
            self._current[machine.id] = attempt
            self.attempts.setdefault(statement_hash(self._run, attempt), attempt)

    def _look_at_ledger(self, machine: Machine, peer: Peer, life: int, height: int) -> None:
        certified = peer.agreement.voter.ledger.certified
        if life == machine.life and certified < height:
            self.violated("back", f"{machine.name} went from height {height} to {certified}")
        self._seen[machine.id] = (machine.life, certified)
        # A restart is compared in whole; else only what is new.
        start = height + 1 if life == machine.life else 1
        self._certified(machine, peer, start, certified)

    def _certified(self, machine: Machine, peer: Peer, start: int, certified: int) -> None:
        ledger = peer.agreement.voter.ledger
        for height in range(start, certified + 1):
            if height < len(self.names):
                if ledger.hashes[height] != self.names[height]:
                    self.violated("chain", f"{machine.name} certified another record at height {height}")
            else:
                self._extend(ledger.records[height])
        certificate = ledger.certificates.get(certified)
        if certificate is not None:
            self._check_certificate(machine, certificate)
        elif certified > 0:
            self.violated("certificate", f"{machine.name} has none for height {certified}")

    def _extend(self, record: Record) -> None:
        header, body = record.header, record.body
        height = len(self.chain)
        if header.previous != self.names[-1] or header.height != height:
            self.violated("chain", f"record {height} does not follow the certified one before")
        self.chain.append(record)
        self.names.append(statement_hash(self._run, header))
        self.committed_at.append(self.now)
        known = self._coordinators.setdefault(header.term, header.coordinator)
        if known != header.coordinator:
            self.violated("coordinator", f"{header.coordinator} and {known} in term {header.term}")
        if isinstance(body, CommitteeChange):
            self._committees.append((height, body.committee.voters, body.committee.outgoing))
        elif isinstance(body, Opening):
            for vote in body.votes:
                self._vote(vote)
        elif isinstance(body, Members):
            for exclusion in body.excluded:
                if exclusion.evidence is not None or exclusion.until == 0:
                    self.accused(header.coordinator, exclusion.peer, exclusion.reason)
        elif isinstance(body, Round):
            self._round(body)

    def accused(self, by: str, peer: str, reason: str) -> None:
        """There is evidence against a machine, says another, or a certified record."""
        if peer not in self.liars:
            self.violated("evidence", f"{by} accuses {peer}: {reason}")

    def _round(self, body: Round) -> None:
        if body.version != self.version + 1:
            self.violated("version", f"{body.version} certified after {self.version}")
        if body.parent != self.states[-1]:
            self.violated("version", f"{body.version} was not made from the state of {self.version}")
        for counted in body.contributors:
            slot = (counted.origin_round, counted.assignment)
            if slot in self._counted:
                self.violated("version", f"{slot} counts in {self._counted[slot]} and in {body.version}")
            self._counted[slot] = body.version
        if self.rebuild is not None:
            self._made_of(body, self.rebuild)
        self.version, self.version_at = body.version, self.now
        self.states.append(body.state)

    def _made_of(self, body: Round, rebuild: Callable[[Attempt], bytes]) -> None:
        """A certified round holds what its attempt says, and nothing else."""
        attempt = self.attempts.get(body.attempt)
        if attempt is None:
            self.violated("attempt", f"version {body.version} names one that nobody took up")
            return
        said = [(c.origin_round, c.assignment, c.contributor, c.weight) for c in body.contributors]
        signed = [
            (e.origin_round, e.assignment, e.contributor, e.factors.float_buffers) for e in attempt.entries
        ]
        if said != signed or {e.contributor for e in attempt.entries} != set(attempt.tree.members):
            self.violated("attempt", f"version {body.version} counts others than its attempt")
        if rebuild(attempt) != body.state:
            self.violated(
                "sum", f"the state of version {body.version} is not made of its attempt's contributions"
            )
        self.rebuilt += 1

    # Training and vectors

    def trains(self, machine: Machine, slot: tuple[int, int]) -> None:
        """A machine begins to train an assignment: (origin round, assignment)."""
        account = self._disks.get(machine.id)
        before = account is not None and slot in account.slots
        if before or slot in self._made.get((machine.id, machine.life), ()):
            self.violated("trained", f"{machine.name} trains {slot} again")

    def trained(self, machine: Machine, slot: tuple[int, int]) -> None:
        """It ended well."""
        self._made.setdefault((machine.id, machine.life), set()).add(slot)

    def receives(self, machine: Machine, root: bytes) -> None:
        """A member asks for a contribution, a partial sum or a result for its current attempt."""
        peer = machine.peer
        if peer is None or not isinstance(peer.work, Rounds):
            return
        attempt = peer.work.participant.current
        if attempt is None or machine.id not in attempt.tree:
            return
        vectors = self._vectors.setdefault((machine.id, statement_hash(self._run, attempt)), set())
        vectors.add(root)
        self.most_vectors = max(self.most_vectors, len(vectors))
        if len(vectors) > peer.work.setting.rules.fan_out + 1:
            self.violated("vectors", f"{machine.name} gets {len(vectors)} in attempt {attempt.rank}")

    def _check_certificate(self, machine: Machine, certificate: Certificate) -> None:
        height = certificate.height
        signers = frozenset(voter for voter, _ in certificate.signatures)
        if (height, signers) in self._checked:
            return
        self._checked.add((height, signers))
        self.certificates += 1
        if certificate.record != self.names[height]:
            self.violated("certificate", f"{machine.name}: of another record at height {height}")
        for ack in certificate.acknowledgements():
            if not self._keyring.verify(ack.voter, signed_bytes(self._run, ack), ack.signature):
                self.violated("certificate", f"{ack.voter} did not sign the one at height {height}")
            signer = self._machines.get(ack.voter)
            if signer is not None and not signer.gone and not self._holds(ack.voter, height):
                self.violated("durable", f"{signer.name} signed height {height} and has it on no disk")
        _, voters, outgoing = next(c for c in reversed(self._committees) if c[0] <= height)
        if not _majority(voters, signers) or (outgoing and not _majority(outgoing, signers)):
            self.violated("certificate", f"{machine.name}: no quorum at height {height}: {sorted(signers)}")
        self._check_side(machine, certificate, signers)

    def _check_side(self, machine: Machine, certificate: Certificate, signers: frozenset[str]) -> None:
        if self.sides is None:
            return
        since, side = self.sides
        if self._born.get(certificate.record, 0) < since + SETTLE_NS:
            return
        if signers & side and signers - side:
            self.violated("side", f"{machine.name}: height {certificate.height} is certified across the cut")

    def adopted(self, machine: Machine, version: int, state: bytes) -> None:
        """A peer shows this state as the certified one of this version (looked at once its input is over)."""
        self._shown = (machine, version, state)

    def _check_shown(self, machine: Machine, version: int, state: bytes) -> None:
        self._shown = None
        if version > self.version:
            self.violated(
                "version", f"{machine.name} adopts {version}, of which {self.version} are certified"
            )
        elif version > 0 and self.states[version] != state:
            self.violated("version", f"{machine.name} adopts another state of version {version}")
        life, before = self._adopted.get(machine.id, (0, 0))
        if life == machine.life and version < before:
            self.violated("back", f"{machine.name} adopts version {version} after {before}")
        self._adopted[machine.id] = (machine.life, version)

    # The disk

    def written(self, frames: Iterable[bytes]) -> None:
        """A machine asks for frames to be written."""
        for data in frames:
            frame = self._frame(data)
            if isinstance(frame, Appended):
                self._born.setdefault(statement_hash(self._run, frame.record.header), self.now)

    def _frame(self, data: bytes) -> PeerFrame:
        frame = self._frames.get(data)
        if frame is None:
            if len(self._frames) > 4096:
                self._frames.clear()
            frame = self._frames[data] = decode(data, PeerFrame)  # type: ignore[arg-type]  # a union
        return frame

    def synced(self, machine: Machine, frames: Iterable[bytes], *, replaced: bool = False) -> None:
        """Frames of a machine are durable now; `replaced`: they are all that its log holds."""
        if replaced:
            self._rebuild(machine)
            return
        account = self._disks.setdefault(machine.id, DiskAccount([]))
        for data in frames:
            self._account(account, self._frame(data))

    def _rebuild(self, machine: Machine) -> None:
        """The account of a log that was recovered or compacted, from the frames on the disk."""
        before = self._disks.get(machine.id, DiskAccount([]))
        account = self._disks[machine.id] = DiskAccount([])
        for data in machine.disk.synced:
            self._account(account, self._frame(data))
        if account.certified < before.certified or account.term < before.term:
            self.violated("back", f"the log of {machine.name} holds less than it did")

    def _account(self, account: DiskAccount, frame: PeerFrame) -> None:
        if isinstance(frame, Appended):
            account.records.append(statement_hash(self._run, frame.record.header))
        elif isinstance(frame, Truncated):
            del account.records[frame.height + 1 :]
        elif isinstance(frame, Standing):
            account.term = max(account.term, frame.term)
        elif isinstance(frame, Slot):
            account.slots.add(frame.header.slot)
        elif isinstance(frame, Certified):
            account.certified = max(account.certified, frame.certificate.height)

    def _holds(self, machine: str, height: int) -> bool:
        account = self._disks.get(machine)
        return (
            account is not None
            and height < len(account.records)
            and (account.records[height] == self.names[height])
        )

    def restarting(self, machine: Machine) -> None:
        """The machine's log was recovered (perhaps with more than had been synced), its peer is about to start."""
        self._rebuild(machine)

    def restarted(self, machine: Machine, peer: Peer) -> None:
        """Its peer has started."""
        account = self._disks[machine.id]
        voter = peer.agreement.voter
        if voter.ledger.certified < account.certified or voter.term < account.term:
            self.violated("back", f"{machine.name} forgot what its disk holds")

    # What is said

    def signed(self, machine: Machine, data: bytes) -> None:
        """A peer wants this message sent; it may have to wait for the disk, and speak of a term that is over by then."""
        if machine.peer is not None and b"appended" in data[:16]:
            own = machine.peer.agreement.voter.term
            reply = decode_message(data)
            if isinstance(reply, AppendReply):
                for ack in reply.acknowledgements:
                    if ack.term != own:
                        self.violated(
                            "acknowledged",
                            f"{machine.name}: a record of term {ack.term} in its own term {own}",
                        )

    def spoken(self, machine: Machine, data: bytes) -> None:
        """A message leaves a machine."""
        if b"vote-reply" in data[:16]:
            reply = decode_message(data)
            if isinstance(reply, VoteReply) and reply.vote is not None:
                self._vote(reply.vote)
        elif b"vote?" in data[:7]:  # not "pre-vote?"
            request = decode_message(data)
            if isinstance(request, VoteRequest):  # who stands has voted for itself
                last = statement_hash(self._run, request.last)
                self._vote(Vote(request.term, machine.id, last, machine.id))
        elif b"appended" in data[:16]:
            answer = decode_message(data)
            if isinstance(answer, AppendReply):
                for ack in answer.acknowledgements:
                    self._acknowledgement(machine, ack)

    def _vote(self, vote: Vote) -> None:
        given = (vote.candidate, vote.last)
        known = self._votes.setdefault((vote.voter, vote.term), given)
        if known != given:
            self.violated("vote", f"{vote.voter} voted twice in term {vote.term}")

    def _acknowledgement(self, machine: Machine, ack: Acknowledgement) -> None:
        known = self._acknowledged.setdefault((ack.voter, ack.term, ack.height), ack.record)
        if known != ack.record:
            self.violated(
                "acknowledged", f"{machine.name}: two records in term {ack.term}, height {ack.height}"
            )
        account = self._disks.get(machine.id)
        if account is None or ack.term > account.term:
            self.violated("acknowledged", f"{machine.name}: term {ack.term} is not on its disk yet")


def _majority(voters: Collection[str], signers: Collection[str]) -> bool:
    return 2 * len([voter for voter in voters if voter in signers]) > len(voters)
