"""Where tensors lie in flat bytes, what is refused, and how a difference is told."""

import math
import subprocess
import sys

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.content import MAX_CONTENT_BYTES
from p2pcoord.errors import LocalError, RemoteError, UserError
from p2pcoord.layout import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    Layout,
    TensorSpec,
    buffer_spec,
    difference,
    parameter_spec,
)
from p2pcoord.wire import decode, encode

MIXED = Layout(
    (
        TensorSpec("conv.weight", (2, 3), "float32", "parameter"),
        TensorSpec("norm.running_mean", (3,), "bfloat16", "float_buffer"),
        TensorSpec("norm.num_batches_tracked", (), "int64", "integer_buffer"),
        TensorSpec("embedding", (5,), "float32", "frozen"),
        TensorSpec("scale", (), "float16", "parameter"),
        TensorSpec("mask", (2, 1), "bool", "integer_buffer"),
        TensorSpec("nothing", (0, 4), "float32", "parameter"),
    )
)

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
tensors = st.one_of(
    st.tuples(shapes, st.sampled_from(sorted(FLOAT_DTYPES)), st.sampled_from(["parameter", "float_buffer"])),
    st.tuples(shapes, st.sampled_from(sorted(INTEGER_DTYPES)), st.just("integer_buffer")),
    st.tuples(shapes, st.just("complex64"), st.just("frozen")),
)
layouts = st.lists(tensors, max_size=8).map(
    lambda found: Layout(tuple(TensorSpec(f"t{at}", *tensor) for at, tensor in enumerate(found)))
)


def state_of(layout: Layout, slots: int) -> np.ndarray:
    return np.zeros(layout.state_bytes(slots), np.uint8)


def test_sections_follow_each_other_without_padding():
    assert (MIXED.parameter_count, MIXED.float_buffer_count, MIXED.integer_count) == (7, 3, 3)
    assert (MIXED.float_buffer_offset, MIXED.integer_offset) == (28, 40)
    assert MIXED.contribution_bytes == 28 + 12 + 24
    assert MIXED.state_bytes(2) == 64 + 2 * 28
    assert MIXED.tensor_offsets == {
        "conv.weight": 0,
        "scale": 24,
        "nothing": 28,
        "norm.running_mean": 28,
        "norm.num_batches_tracked": 40,
        "mask": 48,
    }


def test_bytes_are_little_endian_float32_and_int64():
    octets = state_of(MIXED, 0)
    MIXED.tensor_views(octets)["scale"][...] = 1.0
    MIXED.tensor_views(octets)["norm.num_batches_tracked"][...] = 258
    assert octets[24:28].tobytes() == b"\x00\x00\x80\x3f"
    assert octets[40:48].tobytes() == b"\x02\x01" + bytes(6)


@given(layouts, st.integers(0, 2))
def test_views_cover_every_byte_once_and_copy_nothing(layout, slots):
    octets = state_of(layout, slots)
    for at, view in enumerate(layout.tensor_views(octets).values()):
        assert not view.any()
        view[...] = at + 1
    assert layout.parameters(octets).size == layout.parameter_count
    for slot in layout.slots(octets):
        slot[...] = 1
    expected = [
        at + 1 for at, view in enumerate(layout.tensor_views(octets).values()) for _ in range(view.size)
    ]
    sections = (layout.parameters(octets), layout.float_buffers(octets), layout.integers(octets))
    assert sorted(np.concatenate([section.astype(int) for section in sections])) == expected
    assert all((slot == 1).all() for slot in layout.slots(octets))
    if layout.parameter_count:
        assert len(layout.slots(octets)) == slots


@given(layouts)
def test_a_layout_survives_the_wire(layout):
    assert decode(encode(layout), Layout) == layout


def test_views_of_a_read_only_array_are_read_only():
    octets = np.frombuffer(bytes(MIXED.contribution_bytes), np.uint8)
    with pytest.raises(ValueError):
        MIXED.parameters(octets)[0] = 1


def test_an_array_that_is_too_short_or_not_of_bytes_is_misuse():
    octets = state_of(MIXED, 0)
    for wrong in (octets[:-1], octets.reshape(2, -1), octets.view(np.float32)):
        with pytest.raises(LocalError):
            MIXED.integers(wrong)
    with pytest.raises(LocalError):
        MIXED.slots(np.zeros(MIXED.state_bytes(1) - 1, np.uint8))


@pytest.mark.parametrize("dtype", sorted(FLOAT_DTYPES - {"float64"}))
def test_float32_masters_hold_every_value_of_the_dtypes_that_are_taken_as_they_are(dtype):
    kind = getattr(torch, dtype)
    if torch.finfo(kind).bits == 16:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(kind)
    else:
        values = torch.randn(1000, dtype=kind)
    assert torch.equal(values.float().to(kind).nan_to_num(), values.nan_to_num())


def test_all_torch_dtypes_are_either_placed_or_refused_by_name():
    placed = {}
    for name in dir(torch):
        if isinstance(getattr(torch, name), torch.dtype):
            dtype = str(getattr(torch, name)).removeprefix("torch.")
            try:
                placed[dtype] = buffer_spec("b", (1,), dtype).role
            except UserError as error:
                assert f"'b' is {dtype}" in str(error)
    assert {dtype for dtype, role in placed.items() if role == "float_buffer"} == FLOAT_DTYPES
    assert {dtype for dtype, role in placed.items() if role == "integer_buffer"} == INTEGER_DTYPES


def test_a_trainable_parameter_is_floating_and_a_frozen_one_may_be_anything():
    assert parameter_spec("w", (2,), "bfloat16", trainable=True).role == "parameter"
    assert parameter_spec("w", (2,), "complex64", trainable=False).role == "frozen"
    with pytest.raises(UserError, match=r"'w' is complex64.*freeze it"):
        parameter_spec("w", (2,), "complex64", trainable=True)


def test_what_no_model_can_have_is_refused_where_it_is_made():
    with pytest.raises(ValueError, match="cannot be int64"):
        TensorSpec("w", (), "int64", "parameter")
    with pytest.raises(ValueError, match="names no dtype"):
        TensorSpec("w", (), "Float 32", "frozen")
    with pytest.raises(ValueError, match="two tensors are named 'w'"):
        Layout((TensorSpec("w", (), "float32", "parameter"),) * 2)
    with pytest.raises(ValueError, match="at most"):
        Layout((TensorSpec("w", (MAX_CONTENT_BYTES // 4 + 1,), "float32", "parameter"),))


@pytest.mark.parametrize(
    "specs",
    [
        [["w", [-1], "float32", "parameter"]],
        [["w", [1 << 60, 1 << 3], "float32", "parameter"]],
        [["w", [2], "int64", "parameter"]],
        [["w", [2], "float32", "gradient"]],
        [["", [2], "float32", "parameter"]],
        [["w", [1] * 17, "float32", "parameter"]],
        [["w", [2], "float32", "parameter"]] * 2,
        [["w", [1 << 34] * 16, "float32", "parameter"]],
    ],
)
def test_an_impossible_layout_from_a_peer_is_the_peers_mistake(specs):
    with pytest.raises(RemoteError) as error:
        decode(encode([specs]), Layout)
    assert error.value.kind == "bad_type"


def changed(at: int, **changes) -> Layout:
    specs = list(MIXED.specs)
    specs[at] = msgspec.structs.replace(specs[at], **changes)
    return Layout(tuple(specs))


def test_a_difference_is_told_in_words():
    assert difference(MIXED, MIXED) == ""
    assert difference(MIXED, changed(0, shape=(3, 2))) == (
        "'conv.weight' has shape [2, 3] here and [3, 2] in the run"
    )
    assert (
        difference(MIXED, changed(0, dtype="float16"))
        == "'conv.weight' is float32 here and float16 in the run"
    )
    assert difference(MIXED, changed(0, role="frozen")) == (
        "'conv.weight' is a trainable parameter here and a frozen parameter in the run"
    )
    assert difference(MIXED, changed(0, name="conv.w")) == (
        "'conv.weight' is not in the run's model; 'conv.w' is missing here"
    )
    assert "another order: number 1 is 'conv.weight' here and 'nothing' in the run" in difference(
        MIXED, Layout(MIXED.specs[::-1])
    )
    told = difference(MIXED, Layout(()))
    assert told.count(";") == 5
    assert told.endswith("and 2 more differences")


@given(layouts, layouts)
def test_a_difference_is_told_exactly_when_there_is_one(ours, theirs):
    assert (difference(ours, theirs) == "") == (ours == theirs)


def test_counts_of_a_scalar_and_of_nothing():
    assert TensorSpec("s", (), "float32", "parameter").count == 1
    assert math.prod(TensorSpec("n", (3, 0), "float32", "parameter").shape) == 0


def test_describing_a_layout_imports_no_numpy():
    code = "import sys, p2pcoord.layout; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
