"""Random numbers that are the same on every machine.

numpy promises the streams of its bit generators and of SeedSequence, and reserves the right to change what the methods of
Generator make of them (NEP 19, "Random number generator policy"). So only `random_raw` is used here, and each number is
made of its bits by integer operations:

    raw word i of the stream gives the 32-bit numbers 2 i (its lower half) and 2 i + 1
    uniform number j = (number j >> 8) / 2**24, in [0, 1), a multiple of 2**-24

A caller passes a Generator, whose stream goes on, or a seed (`run_config.derive_seed`), which stands for a PCG64 of its
own. One seed's streams differ by purpose, so what is rounded up does not depend on which positions were drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from p2pcoord.errors import LocalError

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    from p2pcoord.layout import Float32s

    Random: TypeAlias = np.random.Generator | int

ROUNDING: Final = 1
"""What a seed is used for: which values are rounded up."""

POSITIONS: Final = 2
"""What a seed is used for: which elements are sent."""

MAX_SEED: Final = (1 << 64) - 1

_WIDE = (np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)
"""Bit generators whose raw words have 64 bits; MT19937's have 32."""


def seed_of(random: Random | None) -> int:
    """The seed that was given, or the next 64 bits of the Generator. Raises LocalError when there is neither."""
    if isinstance(random, np.random.Generator):
        return int(_raw(random, 1)[0])
    if random is None or not 0 <= random <= MAX_SEED:
        raise LocalError(f"a Generator or a seed from 0 to 2**64 - 1 is needed, not {random!r}")
    return random


class Stream:
    """The random numbers of one purpose. Raises LocalError as `seed_of` does, and for a Generator over 32-bit words."""

    def __init__(self, random: Random | None, purpose: int) -> None:
        if not isinstance(random, np.random.Generator):
            sequence = np.random.SeedSequence(seed_of(random), spawn_key=(purpose,))
            random = np.random.Generator(np.random.PCG64(sequence))
        self._generator = random

    def words(self, count: int) -> NDArray[np.uint32]:
        """The next 32-bit numbers. An odd count leaves the upper half of the last word unused."""
        raw = _raw(self._generator, (count + 1) // 2)
        return raw.astype("<u8", copy=False).view("<u4")[:count]

    def uniforms(self, count: int) -> Float32s:
        """The next uniform numbers."""
        numbers = self.words(count)
        numbers >>= 8
        uniforms = numbers.astype(np.float32)
        uniforms *= np.float32(2.0**-24)
        return uniforms


def _raw(generator: np.random.Generator, count: int) -> NDArray[np.uint64]:
    source = generator.bit_generator
    if not isinstance(source, _WIDE):
        raise LocalError(f"{type(source).__name__} gives no 64-bit words: use PCG64")
    raw: NDArray[np.uint64] = source.random_raw(count)
    return raw
