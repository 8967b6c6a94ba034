"""float32 numbers in Python's floats."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcoord.errors import LocalError
from p2pcoord.float32 import MAX_FLOAT32, float32, is_float32


@given(st.floats(-MAX_FLOAT32, MAX_FLOAT32))
def test_rounding_is_numpys(value):
    assert float32(value) == float(np.float32(value))
    assert is_float32(float32(value))
    assert is_float32(value) == (float(np.float32(value)) == value)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e39, -1e300])
def test_what_float32_does_not_hold_is_refused(value):
    assert not is_float32(value)
    with pytest.raises(LocalError):
        float32(value)


def test_the_largest_float32_is_numpys():
    assert float(np.finfo(np.float32).max) == MAX_FLOAT32
