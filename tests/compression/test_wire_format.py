"""The bytes themselves: pinned, the same whatever the processor can do, and read with suspicion."""

import hashlib
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from p2pcoord.compression import compressor
from p2pcoord.compression.wire_format import MAX_LENGTH
from p2pcoord.errors import RemoteError
from tests.compression.subjects import COMPRESSORS, pinned_vector

PINNED = "5b93e5a8cd080aa0c8c9f3eaa83bd40d5eaca9ad5b4b27a35bf618978d88c494"
"""SHA-256 over the data and the kept residuals of all COMPRESSORS, as numpy 2.4.6 made them on x86-64 with AVX-512."""


def digest():
    """Of all compressors' bytes and residuals, for vectors that integer operations made."""
    total = hashlib.sha256()
    for length in (1, 33, 1000, 70_001):
        vector, residual = pinned_vector(length, 1), pinned_vector(length, 2)
        for c in COMPRESSORS:
            data, kept = c.compress(vector, residual, 12345)
            kept += np.float32(0)  # zeros lose their sign
            total.update(data + kept.tobytes() + c.decompress(data).tobytes())
    return total.hexdigest()


def test_the_bytes_do_not_change_by_accident():
    assert digest() == PINNED


FEATURES = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
"""What this processor can do and numpy has loops of its own for, from old to new."""


@pytest.mark.skipif(not FEATURES, reason="numpy has one set of loops here")
@pytest.mark.parametrize("left", [0, 1])
def test_the_bytes_are_the_same_on_a_processor_that_can_do_less(left):
    without = " ".join(FEATURES[left:])
    code = "from tests.compression.test_wire_format import digest; print(digest())"
    environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": without}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == digest()


@pytest.mark.parametrize("c", COMPRESSORS, ids=repr)
def test_a_promise_of_a_long_vector_costs_nothing(c):
    data, _ = c.compress(pinned_vector(300, 1), None, 1)
    long = data[:2] + (1 << 30).to_bytes(8, "little") + data[10:]
    tracemalloc.start()
    if data[10:18] != (5).to_bytes(
        8, "little"
    ):  # five elements of any vector are five, and without a length all is believed
        with pytest.raises(RemoteError):
            c.decompress(long)
    with pytest.raises(RemoteError):
        c.decompress(long, 300)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_longest_vector_is_a_layouts_longest():
    data, _ = compressor("top_k", k=1).compress(np.ones(1, np.float32))
    for length in (MAX_LENGTH + 1, 1 << 63):
        with pytest.raises(RemoteError, match="oversized"):
            compressor("top_k", k=1).decompress(data[:2] + length.to_bytes(8, "little") + data[10:])
