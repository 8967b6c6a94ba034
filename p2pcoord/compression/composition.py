"""Composition: some elements are chosen, and their values are quantized.

What the quantization does not send of a chosen element is kept beside the elements that were not chosen, so the residual
law holds for both stages together. A quantization that keeps nothing (stochastic, at most two bits) owes nothing of the
chosen elements; the others are still kept.

On the wire, behind the common header: the sparse stage's parameters and positions as in sparsification.py, then the
quantization's data, its own header included, whose length is the number of chosen elements.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from p2pcoord.compression.forms import EntriesCompressor, SparseCompressor
from p2pcoord.compression.quantization import Quantization
from p2pcoord.compression.sparsification import RandomK, TopK
from p2pcoord.compression.wire_format import HEADER
from p2pcoord.kinds import made

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from p2pcoord.compression.randomness import Random
    from p2pcoord.compression.wire_format import Data
    from p2pcoord.layout import Float32s

SPARSE: Final[dict[str, type[SparseCompressor]]] = {chosen.kind: chosen for chosen in (TopK, RandomK)}
DENSE: Final[dict[str, type[Quantization]]] = {Quantization.kind: Quantization}

Option = int | float | bool | str
Stage = tuple[str, dict[str, Option]]
"""A kind and its options, as `compressor` takes them."""


class Composition(EntriesCompressor, frozen=True, kw_only=True, dict=True):
    """Two `stages`: top_k or random_k, then quantization."""

    kind: ClassVar[str] = "composition"
    number: ClassVar[int] = 5

    stages: tuple[Stage, Stage]

    def __post_init__(self) -> None:
        _ = self.first, self.second  # refuses what they cannot be

    @cached_property
    def first(self) -> SparseCompressor:
        """What chooses the elements."""
        kind, options = self.stages[0]
        return made("compressor to begin with", SPARSE, kind, options, choices=" or ".join(sorted(SPARSE)))

    @cached_property
    def second(self) -> Quantization:
        """What the values go through."""
        kind, options = self.stages[1]
        return made("compressor to go on with", DENSE, kind, options, choices=" or ".join(sorted(DENSE)))

    @property
    def exact(self) -> bool:
        return self.first.exact and self.second.exact

    @property
    def accumulates(self) -> bool:
        return self.first.accumulates

    @property
    def is_unbiased(self) -> bool:
        return self.first.is_unbiased and self.second.is_unbiased

    def max_bytes(self, length: int) -> int:
        values = self.second.max_bytes(self.first.count(length))
        return HEADER.size + self.first.max_position_bytes(length) + values

    def compress(
        self, vector: Float32s, residual: Float32s | None = None, random: Random | None = None
    ) -> tuple[bytes, Float32s]:
        chosen = self.first.choose(vector, residual, random)
        data, unsent = self.second.compress(chosen.values, None, random)
        if self.first.accumulates:
            chosen.kept[chosen.positions] = unsent
        return b"".join((self._header(vector.size), chosen.header, data)), chosen.kept

    def _entries(self, data: Data, length: int | None) -> tuple[int, NDArray[np.int64], Float32s]:
        length, reader = self._open(data, length)
        positions = self.first.read_positions(reader, length)
        return length, positions, self.second.decompress(reader.rest(), positions.size)
