"""Shampoo's blocks: they cover every tensor once, and the work on them is shared out evenly and alike everywhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.errors import LocalError
from p2pcoord.optimization.blocks import blocks, preconditioner_work, squeezed

shapes = st.lists(st.lists(st.integers(0, 7), max_size=4).map(tuple), max_size=5)


@given(shapes, st.integers(1, 8))
def test_blocks_cover_every_element_once_and_no_side_is_longer_than_asked(given_, size):
    seen = [np.zeros(squeezed(shape), int) for shape in given_]
    for block in blocks(given_, size):
        part = seen[block.tensor][block.parts]
        assert part.shape == block.sides
        assert 1 <= min(block.sides) <= max(block.sides) <= size
        part += 1
    assert all((counts == 1).all() for counts in seen)


def test_blocks_come_in_the_tensors_own_order():
    found = blocks([(3,), (2, 1, 3)], 2)
    assert [(block.tensor, block.starts, block.sides) for block in found] == [
        (0, (0,), (2,)),
        (0, (2,), (1,)),
        (1, (0, 0), (2, 2)),
        (1, (0, 2), (2, 1)),
    ]
    assert [block.packed_count for block in found] == [3, 1, 6, 4]
    assert [block.work for block in found] == [8, 1, 16, 9]


@given(shapes, st.integers(1, 8), st.integers(1, 6))
def test_each_block_is_given_to_one_member_and_nobody_has_much_more_than_its_share(given_, size, count):
    members = [f"member{index}" for index in range(count)]
    work = preconditioner_work(given_, members, block_size=size)
    assert list(work) == members
    cut = blocks(given_, size)
    assert sorted(number for numbers in work.values() for number in numbers) == list(range(len(cut)))
    loads = [sum(cut[number].work for number in numbers) for numbers in work.values()]
    longest = max((block.work for block in cut), default=0)
    assert max(loads) <= sum(loads) / count + longest  # Graham's bound for any order
    assert work == preconditioner_work(given_, members, block_size=size)


def test_the_longest_work_is_given_out_first():
    assert preconditioner_work([(2,), (3,), (2,), (3,)], ["a", "b"], block_size=3) == {
        "a": (0, 1),
        "b": (2, 3),
    }
    assert preconditioner_work([(2,)], ["a", "b"], block_size=3) == {"a": (0,), "b": ()}


def test_what_cannot_be_divided_is_misuse():
    for members in ([], ["a", "a"]):
        with pytest.raises(LocalError, match="the work needs different members, at least one"):
            preconditioner_work([(2,)], members, block_size=3)
    with pytest.raises(LocalError, match="a block's side is at least 1, not 0"):
        blocks([(2,)], 0)
