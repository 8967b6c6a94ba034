"""What a run pins of a workload, and how a difference is told."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import p2pcoord
from p2pcoord.errors import RemoteError
from p2pcoord.layout import Layout, TensorSpec
from p2pcoord.wire import decode, encode
from p2pcoord.workload import SAMPLED, DataPins, Workload, WorkloadPins, compare_pins, sampled_indices

WEIGHT = TensorSpec("weight", (2, 3), "float32", "parameter")
FROZEN = TensorSpec("embedding", (4,), "float32", "frozen")


def pins(**changes: Any) -> WorkloadPins:
    said: dict[str, Any] = {
        "layout": Layout((WEIGHT, FROZEN)),
        "frozen": bytes(32),
        "source": bytes(32),
        "train": DataPins(3, (b"1" * 8, b"2" * 8, b"3" * 8)),
        "validation": DataPins(1, (b"4" * 8,)),
    }
    return WorkloadPins(**{**said, **changes})


def test_importing_p2pcoord_loads_nothing_until_a_name_is_used() -> None:
    code = (
        "import sys, p2pcoord; assert 'msgspec' not in sys.modules; p2pcoord.Workload; p2pcoord.RunConfig; "
        "assert 'p2pcoord.run_config' in sys.modules and 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_name_that_p2pcoord_does_not_export_is_an_attribute_error() -> None:
    assert p2pcoord.Workload is Workload
    with pytest.raises(AttributeError, match="no attribute 'Workloads'"):
        _ = p2pcoord.Workloads


def test_equal_pins_differ_in_nothing() -> None:
    told = compare_pins(pins(), pins())
    assert (told.refused, told.warned) == ((), ())


def test_another_source_only_warns() -> None:
    told = compare_pins(pins(source=b"1" * 32), pins())
    assert told.refused == ()
    assert told.warned[0].startswith(
        "the workload's source differs from the founder's (SHA-256 313131313131 here, 000000"
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"layout": Layout((msgspec.structs.replace(WEIGHT, shape=(3, 2)), FROZEN))},
            "the model differs: 'weight' has shape [3, 2] here and [2, 3] in the run",
        ),
        (
            {"layout": Layout((msgspec.structs.replace(WEIGHT, dtype="bfloat16"), FROZEN))},
            "the model differs: 'weight' is bfloat16 here and float32 in the run",
        ),
        ({"frozen": b"1" * 32}, "the frozen parameters have other values here than in the run ('embedding')"),
        ({"train": DataPins(4, ())}, "train data has 4 samples here and 3 in the run"),
        (
            {"train": DataPins(3, (b"1" * 8, b"x" * 8, b"3" * 8))},
            "train data differs: of 3 samples compared, those at 1 are others here than in the run",
        ),
        ({"validation": DataPins(1, ())}, "validation data has 0 hashed samples here and 1 in the run"),
        ({"validation": None}, "validation data is own here and dealt in the run"),
    ],
)
def test_a_difference_is_refused_by_its_name(change: dict[str, Any], told: str) -> None:
    [refused] = compare_pins(pins(**change), pins()).refused
    assert refused.startswith(told)


def test_pins_survive_the_wire_and_hostile_ones_are_refused() -> None:
    assert decode(encode(pins()), WorkloadPins) == pins()
    hostile = [
        pins(source=b"short"),
        pins(train=DataPins(-1, ())),
        pins(train=DataPins(100, (b"1" * 8,) * (SAMPLED + 1))),
        pins(train=DataPins(1, (b"1" * 9,))),
    ]
    for wrong in hostile:
        with pytest.raises(RemoteError, match="bad_type"):
            decode(encode(wrong), WorkloadPins)


@given(st.integers(0, 10_000))
def test_sampled_indices_are_spread_and_hold_the_first_and_the_last(length: int) -> None:
    indices = sampled_indices(length)
    assert len(indices) == min(length, SAMPLED)
    assert sorted(set(indices)) == list(indices)
    if length:
        assert indices[0] == 0 and indices[-1] == length - 1


def test_optional_methods_have_answers_of_their_own() -> None:
    workload = Workload()
    assert workload.metrics(None, None) == {}  # type: ignore[arg-type]
    assert workload.optimizer([]) is None
    assert workload.dataset_bytes() is None
    assert Workload.run_defaults() == {}
    assert (workload.collate, workload.batch_size, workload.dataset) == (None, None, None)
