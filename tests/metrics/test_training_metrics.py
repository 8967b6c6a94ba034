"""What a round's record says of itself, read for people."""

from p2pcoord.consensus.record import Counted, Round
from p2pcoord.metrics.training_metrics import RING_SIZE, MetricsRing, metrics_of


def certified(version: int, contributors: tuple[Counted, ...] = (), **metrics: float) -> Round:
    named = {name.replace("__", "."): value for name, value in metrics.items()}
    return Round(
        version, bytes(32), bytes(32), contributors, bytes(32), bytes(32), 8, tuple(sorted(named.items()))
    )


def test_all_metrics_of_the_record_are_there_under_their_names() -> None:
    metrics = metrics_of(
        certified(
            3,
            loss=0.5,
            training_loss=0.75,
            gradient_norm=2.0,
            learning_rate=0.7,
            node_participation=1.0,
            communication_time=0.25,
            computation_time=1.5,
            round_time=2.0,
            validation_samples=40.0,
            measure__accuracy=0.9,
            measure__perplexity=7.0,
        )
    )
    assert metrics.version == 3
    assert (metrics.loss, metrics.training_loss) == (0.5, 0.75)
    assert metrics.measures == {"accuracy": 0.9, "perplexity": 7.0}
    assert (metrics.gradient_norm, metrics.learning_rate, metrics.node_participation) == (2.0, 0.7, 1.0)
    assert (metrics.communication_time, metrics.computation_time, metrics.round_time) == (0.25, 1.5, 2.0)
    assert metrics.validation_samples == 40
    assert isinstance(metrics.validation_samples, int)


def test_without_validation_the_loss_is_the_training_loss_over_no_validation_samples() -> None:
    metrics = metrics_of(certified(1, training_loss=0.75))
    assert (metrics.loss, metrics.training_loss, metrics.validation_samples) == (0.75, 0.75, 0)


def test_who_made_several_contributions_is_named_once_in_order() -> None:
    body = certified(1, (Counted(0, "b", 1, 0.25), Counted(1, "a", 1, 0.5), Counted(2, "b", 1, 0.25)))
    assert metrics_of(body).contributors == ("b", "a")


def test_the_ring_keeps_the_newest_rounds_and_no_more() -> None:
    ring = MetricsRing()
    assert ring.newest is None
    for version in range(1, RING_SIZE + 6):
        assert ring.certified(certified(version)).version == version
    versions = [metrics.version for metrics in ring]
    assert versions == list(range(6, RING_SIZE + 6))
    assert ring.newest is not None
    assert ring.newest.version == RING_SIZE + 5
