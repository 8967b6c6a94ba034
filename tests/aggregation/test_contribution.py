"""Headers of contributions: which are believed, and which are refused."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.aggregation.contribution import MAX_COUNT, ContributionHeader, check_header
from p2pcoord.content import ContentRef
from p2pcoord.errors import RemoteError
from p2pcoord.float32 import MAX_FLOAT32
from p2pcoord.wire import decode, encode
from tests.script_runner import authority_of, peer_id

SIZE = 44


def header(letter: str = "B", /, **changes: object) -> ContributionHeader:
    """Signed by the letter, whatever it says."""
    said = ContributionHeader(
        3, 1, 2, peer_id(letter), bytes(32), ContentRef(bytes(32), SIZE), 10, 3, 0.5, 1.25, 7
    )
    return authority_of(letter).sign(msgspec.structs.replace(said, **changes))


def refusal(said: ContributionHeader) -> str:
    with pytest.raises(RemoteError) as caught:
        check_header(said, authority_of("A"), SIZE)
    return caught.value.kind


counts = st.integers(1, MAX_COUNT)
numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(counts, counts, st.integers(0, MAX_COUNT), numbers, numbers)
def test_possible_numbers_are_believed_after_a_trip_over_the_wire(
    samples: int, steps: int, time_ns: int, norm: float, loss: float
) -> None:
    loss = max(-MAX_FLOAT32, min(loss, MAX_FLOAT32))
    said = header(samples=samples, steps=steps, computation_ns=time_ns, norm=abs(norm), loss=loss)
    read = decode(encode(said), ContributionHeader)
    assert read == said
    check_header(read, authority_of("A"), SIZE)


@pytest.mark.parametrize("field", ["samples", "steps"])
@pytest.mark.parametrize("count", [0, -1, MAX_COUNT + 1])
def test_no_samples_no_steps_and_more_than_can_be_are_refused(field: str, count: int) -> None:
    assert refusal(header(**{field: count})) == "bad_contribution"


@pytest.mark.parametrize("time_ns", [-1, MAX_COUNT + 1])
def test_impossible_times_are_refused(time_ns: int) -> None:
    assert refusal(header(computation_ns=time_ns)) == "bad_contribution"


@pytest.mark.parametrize("field", ["norm", "loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(field: str, value: float) -> None:
    assert refusal(header(**{field: value})) == "bad_contribution"


def test_a_loss_that_would_make_every_mean_infinite_is_refused() -> None:
    with pytest.raises(RemoteError, match="loss 1e"):
        check_header(header(loss=1e307), authority_of("A"), SIZE)


def test_a_negative_norm_is_refused_and_a_negative_loss_is_not() -> None:
    assert refusal(header(norm=-0.5)) == "bad_contribution"
    check_header(header(loss=-0.5), authority_of("A"), SIZE)


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 0])
def test_content_of_another_size_is_refused(size: int) -> None:
    assert refusal(header(content=ContentRef(bytes(32), size))) == "bad_contribution"


def test_a_header_is_signed_by_its_contributor_for_this_run_as_it_stands() -> None:
    assert refusal(msgspec.structs.replace(header(), contributor=peer_id("C"))) == "bad_signature"
    assert refusal(msgspec.structs.replace(header(), samples=11)) == "bad_signature"
    assert refusal(msgspec.structs.replace(header(), signature=b"")) == "bad_signature"


def test_a_slot_is_what_may_count_once_whoever_did_it() -> None:
    assert header("B").slot == header("C", samples=99, incarnation=7).slot == (3, 1)
