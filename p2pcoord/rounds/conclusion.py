"""What the members made of an attempt: the states and shares of the validation that they report, and the record of it all.

A quorum of voters must have computed one state. A share that does not come in time is left out, and the metrics say how many
samples they cover. A state or metric that is not finite, or a validation that fails, refuses the attempt.
"""

from __future__ import annotations

import math
from collections import Counter

import msgspec

from p2pcoord.aggregation.contribution import MAX_COUNT
from p2pcoord.consensus.record import Counted, Round, Totals
from p2pcoord.content import ContentRef
from p2pcoord.rounds.aggregating import Aggregation
from p2pcoord.rounds.messages import Report, Share
from p2pcoord.rounds.plan import size
from p2pcoord.rounds.setting import Setting
from p2pcoord.synchronization.state_tracker import totals_after

# What a workload measures: its names, in this many bytes together, end up in the record, beside MAX_ASSIGNMENTS contributors.
MAX_MEASURES = 64
MAX_MEASURES_BYTES = 2048

Metrics = tuple[tuple[str, float], ...]


class Conclusion:
    """Of the present attempt of `aggregation`."""

    def __init__(self, setting: Setting, aggregation: Aggregation) -> None:
        self.setting = setting
        self.aggregation = aggregation
        self.reports: dict[str, tuple[ContentRef, bool]] = {}
        """Member -> (the state it computed, whether that is finite)."""
        self.shares: dict[str, Share] = {}

    # The state

    def on_report(self, sender: str, message: Report) -> bool:
        """Takes a report of who stepped; False when it is of another attempt, or of somebody who has no part in this one."""
        aggregation = self.aggregation
        if message.attempt != aggregation.name or aggregation.result is None:
            return False
        if sender not in aggregation.audience():
            return False
        self.reports[sender] = (message.state, message.finite)
        return True

    def broken(self) -> bool:
        """Whether the new state is not finite, here or at a quorum of voters."""
        broken = {peer for peer, (_, finite) in self.reports.items() if not finite}
        return self.setting.me in broken or self.setting.voter.ledger.committee.is_quorum(broken)

    def agreed_state(self) -> ContentRef | None:
        """The state that a quorum of voters has computed."""
        committee = self.setting.voter.ledger.committee
        for state in {state for state, _ in self.reports.values()}:
            if committee.is_quorum(
                {peer for peer, (reported, finite) in self.reports.items() if reported == state and finite}
            ):
                return state
        return None

    def all_voters_reported(self) -> bool:
        voters = self.setting.voter.ledger.committee.everyone
        return all(voter in self.reports or not self.setting.neighbours.alive(voter) for voter in voters)

    # The validation

    def on_share(self, sender: str, message: Share) -> bool:
        """Takes a member's share; False when it is of another attempt, or of somebody who has no part in this one."""
        attempt = self.aggregation.attempt
        if message.attempt != self.aggregation.name or attempt is None or sender not in attempt.tree:
            return False
        dealt = MAX_COUNT  # of own data nobody knows how much there is
        if attempt.validation:
            dealt = size(attempt.validation[attempt.tree.members.index(sender)])
        share = usable(message, dealt)
        self.shares[sender] = share
        if share.failed:
            self.setting.outbox.emit("validation-failed", peer=sender, reason=share.failed)
        return True

    def without_share(self) -> list[str]:
        attempt = self.aggregation.attempt
        return [member for member in attempt.tree.members if member not in self.shares] if attempt else []

    def failure(self) -> str:
        """Why the validation as a whole failed: here, or at more than half of the members ("" when it did not)."""
        failed = {member: share.failed for member, share in self.shares.items() if share.failed}
        attempt = self.aggregation.attempt
        if attempt is None or not (self.setting.me in failed or 2 * len(failed) > len(attempt.tree.members)):
            return ""
        return f"validation failed: {failed.get(self.setting.me) or next(iter(failed.values()))}"

    # The record

    def metrics(self, *, started_at: int, stepped_at: int, now: int) -> Metrics:
        """Every metric of the specification that must be agreed; see metrics/training_metrics.py for their meaning."""
        attempt, result = self.aggregation.attempt, self.aggregation.result
        if attempt is None or result is None:
            return ()
        good = [share for share in self.shares.values() if not share.failed and share.samples > 0]
        samples = sum(share.samples for share in good)
        headers = [self.aggregation.headers[entry.slot] for entry in attempt.entries]
        trained = sum(header.samples for header in headers)
        neighbours = self.setting.neighbours
        living = [member for member in self.setting.roster.members if neighbours.alive(member)]
        values: dict[str, float] = {
            "training_loss": sum(h.loss * h.samples for h in headers) / trained,
            "gradient_norm": result.norm,
            "learning_rate": attempt.step.learning_rate,
            "node_participation": len(attempt.tree.members) / max(len(living), 1),
            "communication_time": (stepped_at - self.aggregation.signed_at) / 1e9,
            "computation_time": max(header.computation_ns for header in headers) / 1e9,
            "round_time": (now - started_at) / 1e9,
            "training_samples": float(trained),
            "training_steps": float(sum(header.steps for header in headers)),
            "validation_samples": float(samples),
        }
        if samples:
            values["loss"] = sum(share.loss_sum for share in good) / samples
            # What most of them measure, and of two the coordinator's: whoever measures something else neither fills the record
            # nor spoils a mean.
            kinds = Counter(names_of(share) for share in good)
            own = self.shares.get(self.setting.me)
            mine = names_of(own) if own is not None else None
            names = max(sorted(kinds), key=lambda kind: (kinds[kind], kind == mine))
            counted = [share for share in good if names_of(share) == names]
            measured = [dict(share.measure_sums) for share in counted]
            covered = sum(share.samples for share in counted)
            for name in names:
                values[f"measure.{name}"] = sum(sums[name] for sums in measured) / covered
        return tuple(sorted(values.items()))

    def record(self, state: ContentRef, metrics: Metrics, before: Totals) -> Round | None:
        """The round as it is to be certified, after what the run came to `before` it; None without a result."""
        attempt, result = self.aggregation.attempt, self.aggregation.result
        if attempt is None or result is None:
            return None
        return Round(
            attempt.version,
            attempt.parent.root,
            self.aggregation.name,
            tuple(
                Counted(e.assignment, e.contributor, e.origin_round, e.factors.float_buffers)
                for e in attempt.entries
            ),
            result.content.root,
            state.root,
            state.size_bytes,
            metrics,
            totals_after(before, attempt.version, state.root, dict(metrics)),
        )


def names_of(share: Share) -> tuple[str, ...]:
    """What a share measures."""
    return tuple(sorted(name for name, _ in share.measure_sums))


def usable(share: Share, dealt: int = MAX_COUNT) -> Share:
    """The share of who was dealt so many samples, or what is wrong with it as its `failed`: one member's numbers neither stop
    a round nor fill its record."""
    names = [name for name, _ in share.measure_sums]
    values = [share.loss_sum, *(value for _, value in share.measure_sums)]
    wrong = share.failed
    if not 0 <= share.samples <= dealt:
        wrong = f"it counts {share.samples} samples, of {dealt}"
    elif not all(math.isfinite(value) for value in values):
        wrong = "its sums are not finite"
    elif (
        len(names) > MAX_MEASURES
        or len(set(names)) != len(names)
        or sum(len(name.encode()) for name in names) > MAX_MEASURES_BYTES
    ):
        wrong = "it measures too much, or one thing twice"
    return msgspec.structs.replace(share, failed=wrong)
