"""Compressors by name: what a run chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from p2pcoord.compression.adaptive import Adaptive
from p2pcoord.compression.composition import Composition
from p2pcoord.compression.forms import (
    TILE,
    Compressor,
    DenseCompressor,
    add_residual,
    check_input,
    refuse,
)
from p2pcoord.compression.quantization import Quantization
from p2pcoord.compression.sparsification import RandomK, TopK
from p2pcoord.compression.wire_format import HEADER, Reader, bad, little_endian
from p2pcoord.kinds import made
from p2pcoord.layout import FLOAT_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from p2pcoord.compression.randomness import Random
    from p2pcoord.layout import Float32s


class Identity(DenseCompressor, frozen=True, kw_only=True):
    """Every element as it is: `enabled = false`. Behind the common header: float32 values."""

    kind: ClassVar[str] = "none"
    number: ClassVar[int] = 0

    @property
    def accumulates(self) -> bool:
        """All is sent, and zeros are kept."""
        return False

    @property
    def is_unbiased(self) -> bool:
        return True

    def max_bytes(self, length: int) -> int:
        return HEADER.size + FLOAT_BYTES * length

    def compress(
        self, vector: Float32s, residual: Float32s | None = None, random: Random | None = None
    ) -> tuple[bytes, Float32s]:
        check_input(vector, residual)
        computed = vector
        if residual is not None:
            computed = np.empty(vector.size, np.float32)
            add_residual(vector, residual, computed)
        for start in range(0, computed.size, TILE):
            if not np.isfinite(computed[start : start + TILE]).all():
                raise refuse(vector, residual)
        return b"".join((self._header(vector.size), little_endian(computed))), np.zeros(
            vector.size, np.float32
        )

    def _tiles(self, reader: Reader, length: int) -> Iterator[tuple[int, Float32s]]:
        values = reader.take(np.float32, length)
        reader.end()
        for start in range(0, length, TILE):
            if not np.isfinite(values[start : start + TILE]).all():
                raise bad("a value is not finite")
        return ((start, values[start : start + TILE].copy()) for start in range(0, length, TILE))


COMPRESSORS: Final[dict[str, type[Compressor]]] = {
    chosen.kind: chosen for chosen in (Identity, Quantization, TopK, RandomK, Adaptive, Composition)
}
"""By name."""


def compressor(kind: str, *, enabled: bool = True, **options: object) -> Compressor:
    """The compressor of this kind; options are the fields of its class. Without `enabled` the vectors are sent as they are.

    Raises UserError for an unknown kind, options that are missing or that the kind does not have, and values out of
    range, whether it is enabled or not.
    """
    chosen = made("compressor", COMPRESSORS, kind, options, choices=" or ".join(sorted(COMPRESSORS)))
    return chosen if enabled else Identity()
