"""Pings under way: an answer counts only from whom it was expected, and once."""

from p2pcoord.gossip.pings import MAX_PROBES, MAX_RELAYS, Pings, Relay


def test_a_probe_is_ended_by_its_target_or_by_a_helper_that_was_asked():
    for sender, ends in (("target", True), ("helper", True), ("stranger", False)):
        pings = Pings()
        sequence = pings.open_probe("target", 0, 10, expects_verdict=True)
        probe = pings.probes[sequence]
        probe.helpers = ("helper",)
        assert pings.acked(sender, sequence, "another") is None
        assert pings.acked(sender, sequence + 1, "target") is None
        assert pings.acked(sender, sequence, "target") is (probe if ends else None)
        assert ("target" in pings.probed) is not ends
        assert pings.acked("target", sequence, "target") is (None if ends else probe)


def test_a_relay_is_ended_by_its_target_alone_and_says_whom_to_answer():
    pings = Pings()
    ours = pings.open_relay("asker", 77, "target")
    assert ours is not None
    assert pings.acked("stranger", ours, "target") is None
    assert pings.acked("target", ours, "target") == Relay("asker", 77, "target")
    assert pings.acked("target", ours, "target") is None


def test_nacks_count_from_helpers_that_were_asked():
    pings = Pings()
    sequence = pings.open_probe("target", 0, 10, expects_verdict=True)
    probe = pings.probes[sequence]
    probe.helpers = ("helper",)
    pings.nacked("stranger", sequence, "target")
    pings.nacked("helper", sequence, "another")
    assert not probe.nacks
    pings.nacked("helper", sequence, "target")
    assert list(probe.nacks) == ["helper"]


def test_all_that_is_under_way_is_bounded_and_can_be_forgotten():
    pings = Pings()
    for index in range(MAX_PROBES):
        assert not pings.busy
        pings.open_probe(str(index), 0, 10, expects_verdict=True)
    assert pings.busy
    relays = [pings.open_relay("asker", index, "target") for index in range(MAX_RELAYS + 1)]
    assert relays[-1] is None
    assert None not in relays[:-1]
    pings.end_probe("0")
    pings.end_probe("0")
    assert not pings.busy
    pings.clear()
    assert not pings.probes
    assert not pings.probed
    assert not pings.relays
