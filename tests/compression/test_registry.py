"""Compressors by name, and what is refused."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given

from p2pcoord.compression import compressor
from p2pcoord.compression.registry import COMPRESSORS, Identity
from p2pcoord.errors import RemoteError, UserError
from tests.compression.subjects import OPTIONS, vectors


def test_every_kind_has_a_name_and_a_number_of_its_own():
    assert {kind: chosen.number for kind, chosen in COMPRESSORS.items()} == {
        "none": 0,
        "quantization": 1,
        "top_k": 2,
        "random_k": 3,
        "adaptive": 4,
        "composition": 5,
    }
    assert {kind for kind, _ in OPTIONS} == set(COMPRESSORS)


@given(vectors)
def test_what_is_not_enabled_sends_everything(vector):
    c = compressor("quantization", enabled=False, bits=4)
    assert c == Identity() == compressor("none")
    data, kept = c.compress(vector)
    assert data[10:] == vector.tobytes()
    assert c.decompress(data).tobytes() == vector.tobytes()
    assert not kept.any()


def test_a_value_that_is_not_finite_is_refused_without_compression_too():
    c = Identity()
    data, _ = c.compress(np.ones(3, np.float32))
    with pytest.raises(RemoteError, match="bad_compression: a value is not finite"):
        c.decompress(data[:-4] + np.float32(math.nan).tobytes(), 3)


def test_compressors_are_frozen_values():
    for kind, options in OPTIONS:
        assert compressor(kind, **options) == compressor(kind, **options)
    with pytest.raises(AttributeError):
        compressor("quantization", bits=4).bits = 5


TOP_K = ("top_k", {"k": 3})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "powersgd",
            {},
            "there is no compressor 'powersgd': use adaptive or composition or none or quantization or random_k or top_k",
        ),
        ("none", {"bits": 4}, "the compressor 'none' has no 'bits': it has no options"),
        ("quantization", {}, "the compressor 'quantization': Object missing required field `bits`"),
        (
            "quantization",
            {"bit": 4},
            "the compressor 'quantization' has no 'bit': it has bits, stochastic, block",
        ),
        ("quantization", {"bits": 4.5}, "Expected `int`, got `float`"),
        ("quantization", {"bits": 0}, "bits must be from 1 to 8, they are 0"),
        ("quantization", {"bits": 9}, "bits must be from 1 to 8, they are 9"),
        ("quantization", {"bits": 4, "block": 48}, "block must be a power of two from 32 to 32768, it is 48"),
        ("quantization", {"bits": 4, "block": 16}, "block must be a power of two from 32 to 32768, it is 16"),
        (
            "quantization",
            {"bits": 4, "block": 65536},
            "block must be a power of two from 32 to 32768, it is 65536",
        ),
        ("top_k", {}, "top_k needs k or ratio, and not both"),
        ("top_k", {"k": 1, "ratio": 0.1}, "top_k needs k or ratio, and not both"),
        ("top_k", {"k": 0}, "k must be from 1 to"),
        (
            "top_k",
            {"ratio": 0.0},
            "ratio, the share of elements that are sent, must be above 0 and at most 1, it is 0.0",
        ),
        ("top_k", {"ratio": math.nan}, "must be above 0 and at most 1, it is nan"),
        ("random_k", {}, "missing required field `sparsity`"),
        ("random_k", {"sparsity": 1.0}, "must be at least 0 and below 1, it is 1.0"),
        ("random_k", {"sparsity": math.nan}, "must be at least 0 and below 1, it is nan"),
        ("adaptive", {"min_bits": 5, "max_bits": 4, "target_ratio": 0.2}, "in this order, they are 5 and 4"),
        ("adaptive", {"min_bits": 0, "max_bits": 4, "target_ratio": 0.2}, "must be from 1 to 8"),
        (
            "adaptive",
            {"min_bits": 4, "max_bits": 8, "target_ratio": 0.1},
            "target_ratio, the share of the uncompressed size, must be at most 1 and at least what min_bits take, 0.1273, it",
        ),
        ("adaptive", {"min_bits": 4, "max_bits": 8, "target_ratio": 8.0}, "it is 8.0"),
        (
            "adaptive",
            {"min_bits": 4, "max_bits": 8, "target_ratio": 0.2, "importance_metric": "gradient"},
            "Invalid enum value 'gradient'",
        ),
        ("composition", {"stages": [TOP_K]}, "Expected `array` of length 2"),
        (
            "composition",
            {"stages": [("quantization", {"bits": 4}), TOP_K]},
            "there is no compressor to begin with 'quantization': use random_k or top_k",
        ),
        (
            "composition",
            {"stages": [TOP_K, TOP_K]},
            "there is no compressor to go on with 'top_k': use quantization",
        ),
        (
            "composition",
            {"stages": [TOP_K, ("quantization", {"bits": 9})]},
            "bits must be from 1 to 8, they are 9",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_words(kind, options, message):
    for enabled in (True, False):
        with pytest.raises(UserError) as error:
            compressor(kind, enabled=enabled, **options)
        assert message in str(error.value)


def test_options_may_come_from_a_file():
    for kind, options in OPTIONS:
        assert compressor(kind, **msgspec.json.decode(msgspec.json.encode(options))) == compressor(
            kind, **options
        )
