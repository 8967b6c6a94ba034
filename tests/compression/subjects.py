"""Vectors that compressors meet, and compressors of every kind."""

import numpy as np
from hypothesis import strategies as st

from p2pcoord.compression import compressor

OPTIONS = [
    ("none", {}),
    *(
        ("quantization", {"bits": bits, "stochastic": stochastic, "block": 32})
        for bits in range(1, 9)
        for stochastic in (False, True)
    ),
    ("quantization", {"bits": 4}),
    ("top_k", {"k": 5}),
    *(("top_k", {"ratio": ratio}) for ratio in (0.002, 0.05, 0.3, 1.0)),
    ("top_k", {"ratio": 0.1, "accumulate_residuals": False}),
    *(
        ("random_k", {"sparsity": sparsity, "unbiased": unbiased})
        for sparsity in (0.0, 0.9, 0.997)
        for unbiased in (False, True)
    ),
    *(
        (
            "adaptive",
            {
                "min_bits": low,
                "max_bits": high,
                "target_ratio": ratio,
                "importance_metric": metric,
                "block": 32,
            },
        )
        for low, high, ratio in ((1, 8, 0.12), (2, 8, 0.2), (4, 4, 0.25), (2, 6, 1.0))
        for metric in ("norm", "variance")
    ),
    *(
        (
            "composition",
            {"stages": [first, ("quantization", {"bits": bits, "stochastic": stochastic, "block": 32})]},
        )
        for first in (("top_k", {"ratio": 0.1}), ("random_k", {"sparsity": 0.8}))
        for bits, stochastic in ((1, False), (4, False), (2, True), (8, True))
    ),
    (
        "composition",
        {
            "stages": [
                ("random_k", {"sparsity": 0.8, "unbiased": True}),
                ("quantization", {"bits": 4, "stochastic": True}),
            ]
        },
    ),
]
"""Every kind, with its options."""

COMPRESSORS = [compressor(kind, **options) for kind, options in OPTIONS]

lengths = st.one_of(st.integers(0, 70), st.sampled_from([255, 256, 257, 1000, 2048, 32768, 40000]))


def vector_of(length: int, style: int, seed: int) -> np.ndarray:
    """A float32 vector: normal numbers, of all magnitudes that can be scaled up, mostly zeros, all with few values, or tiny."""
    random = np.random.default_rng(seed)
    normal = random.standard_normal(length)
    if style == 1:
        normal *= np.exp2(random.uniform(-140, 110, length))
    elif style == 2:
        normal[random.random(length) < 0.98] = 0
    elif style == 3:
        normal = np.round(normal)
    elif style == 4:
        normal *= 2.0**-140
    return normal.astype(np.float32)


vectors = st.builds(vector_of, lengths, st.integers(0, 4), st.integers(0, 1000))


def pinned_vector(length: int, seed: int) -> np.ndarray:
    """A vector made of integer operations alone, the same bits on every machine: 20 random bits, 8 binary orders of magnitude."""
    words = np.random.PCG64(seed).random_raw(length)
    significands = (words >> np.uint64(44)).astype(np.int64) - (1 << 19)
    exponents = (words & np.uint64(7)).astype(np.int32)
    return np.ldexp(significands.astype(np.float32), -20 - exponents)
