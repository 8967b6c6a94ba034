"""Random numbers that are the same on every machine."""

import numpy as np
import pytest

from p2pcoord.compression.randomness import POSITIONS, ROUNDING, Stream, seed_of
from p2pcoord.errors import LocalError


def test_numbers_are_the_halves_of_raw_words():
    words = Stream(np.random.Generator(np.random.PCG64(5)), ROUNDING).words(5)
    raw = np.random.PCG64(5).random_raw(3).tolist()
    assert words.tolist() == [half for word in raw for half in (word & 0xFFFFFFFF, word >> 32)][:5]
    uniforms = Stream(np.random.Generator(np.random.PCG64(5)), ROUNDING).uniforms(4)
    assert uniforms.tolist() == [(word >> 8) / 2**24 for word in words.tolist()[:4]]
    assert uniforms.dtype == np.float32


def test_a_seeds_streams_are_what_numpy_2_4_made():
    assert Stream(1, ROUNDING).words(3).tolist() == [4042397434, 2043393047, 617412200]
    assert Stream(1, POSITIONS).words(3).tolist() == [1832170131, 1001450238, 162171870]


def test_a_generators_stream_goes_on():
    generator = np.random.Generator(np.random.PCG64(5))
    stream = Stream(generator, ROUNDING)
    assert [*stream.words(2), *stream.words(2)] == [
        *Stream(np.random.Generator(np.random.PCG64(5)), ROUNDING).words(4)
    ]
    assert seed_of(generator) == np.random.PCG64(5).random_raw(3)[2]
    assert seed_of(17) == 17


def test_what_gives_no_numbers_is_misuse():
    for wrong in (None, -1, 1 << 64):
        with pytest.raises(LocalError, match="a Generator or a seed from 0 to"):
            Stream(wrong, ROUNDING)
    with pytest.raises(LocalError, match="MT19937 gives no 64-bit words"):
        Stream(np.random.Generator(np.random.MT19937(1)), ROUNDING).words(1)
