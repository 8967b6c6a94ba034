"""Coordinate-wise rules: each column by itself, block after block.

Theory of operation
    In each column the values x_1 ... x_m are sorted by a network (sorting_network.py), then

        trimmed_mean(cut)         (x_(cut+1) + x_(cut+2) + ... + x_(m-cut)) / (m - 2 cut), added in this order. The median is
                                  what is left when all but one or two are cut
        mean_around_median(cut)   with c the median and b = m - cut, the window x_(s+1) ... x_(s+b) of which no value is farther
                                  from c than one outside; of two equally far the smaller. Its mean

    all in float32, element-wise, correctly rounded; so neither the order of contributors nor the width of blocks changes a bit.
    The sign of a zero does depend on the order in minimum and maximum, so it is made positive at the end. A mean is held
    between the smallest and the largest value that entered it: rounding leaves it there in any case but for a last bit,
    and where the sum is beyond float32 the result is the end of that range.

    The window: moving it up by one is right while its upper neighbour is nearer to c than its lowest value, so its s is the
    number of k with x_(k+b) - c < c - x_k. Differences are rounded, but rounding keeps order, so these k come first. Exactly
    one of x_r, x_(r+b), x_(r+2b), ... lies in the window: b selections, no index per column.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

import numpy as np

from p2pcoord.aggregation.sorting_network import program, run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from p2pcoord.aggregation.combination import Combination, Row
    from p2pcoord.layout import Float32s

CACHE_BYTES: Final = 1 << 21
"""What all lanes of a block may fill. For the median of 16, on a core with 1 MiB of second-level cache, 1 MiB takes a sixth
longer, because blocks are shorter, and 4 MiB is no faster; on a smaller one the third level helps out."""

MAX_BLOCK: Final = 1 << 14
MIN_BLOCK: Final = 1 << 10
"""Columns in a block: 64 KiB of float32 are where more is no faster; at 4 KiB half of the time is numpy's 1 us a call."""


def combine_columns(combination: Combination, vectors: Sequence[Float32s], out: Float32s) -> bool:
    """out = the combination (trimmed_mean or mean_around_median, already checked) of these vectors' columns. Returns whether
    all that entered it, and all that comes of it, is finite."""
    rows, cut = combination.rows, combination.cut
    count = len(rows)
    around = combination.operation == "mean_around_median"
    kept = range(count) if around else range(cut, count - cut)
    chosen = program(count, frozenset((0, *kept, count - 1)))
    plain = all(len(row) == 1 and row[0][1] == 1 for row in rows)
    entering = sorted({at for row in rows for at, _ in row})
    mixer = None if plain else _Mixer(rows)
    lanes = max(count, chosen.buffers) if mixer is None else mixer.buffers + chosen.buffers
    width = min(max(_power_of_two(CACHE_BYTES // (4 * lanes)), MIN_BLOCK), MAX_BLOCK, max(out.size, 1))
    mixing = [np.empty(width, np.float32) for _ in range(mixer.buffers if mixer else 0)]
    buffers = [np.empty(width, np.float32) for _ in range(chosen.buffers + 2)]
    flags = np.empty(width, np.bool_)
    all_finite = True
    with np.errstate(all="ignore"):
        for start in range(0, out.size, width):
            part = slice(start, min(start + width, out.size))
            used = part.stop - start
            columns = [vector[part] for vector in vectors]
            if mixer is None:
                inputs = [columns[row[0][0]] for row in rows]
            else:
                # What is beyond float32 in a mean is one more value that may be cut; NaN does not come of it.
                inputs = mixer.means(columns, [buffer[:used] for buffer in mixing])
            scratch = [buffer[:used] for buffer in buffers]
            sorted_lanes = dict(zip(chosen.lanes, run(chosen, inputs, scratch[2:]), strict=True))
            ends = [sorted_lanes[0], sorted_lanes[count - 1]]
            for checked in ends if plain else [columns[at] for at in entering]:
                all_finite &= bool(np.isfinite(checked, out=flags[:used]).all())
            values = [sorted_lanes[at] for at in kept]
            if around and cut:
                values = _window(values, count - cut, scratch[0], scratch[1], out[part], flags[:used])
            _mean(values, out[part], scratch[0], ordered=not around)
            if not plain:
                all_finite &= bool(np.isfinite(out[part], out=flags[:used]).all())
    return all_finite


def _mean(values: Sequence[Float32s], out: Float32s, scratch: Float32s, *, ordered: bool) -> None:
    """out = the mean of these, held between the smallest and the largest of them (the first and the last if `ordered`)."""
    if len(values) == 1:
        np.add(values[0], np.float32(0), out=out)
        return
    np.add(values[0], values[1], out=out)
    for value in values[2:]:
        np.add(out, value, out=out)
    np.divide(out, np.float32(len(values)), out=out)
    for bound, hold in ((np.minimum, np.maximum), (np.maximum, np.minimum)):
        if ordered:
            hold(out, values[0] if bound is np.minimum else values[-1], out=out)
        else:
            bound(values[0], values[1], out=scratch)
            for value in values[2:]:
                bound(scratch, value, out=scratch)
            hold(out, scratch, out=out)
    np.add(out, np.float32(0), out=out)


def _window(
    lanes: Sequence[Float32s],
    kept: int,
    above: Float32s,
    below: Float32s,
    centre: Float32s,
    nearer: NDArray[np.bool_],
) -> list[Float32s]:
    """The `kept` values nearest to the median of sorted lanes, one of each residue of their positions by `kept`. The first
    `kept` lanes and the other arguments are overwritten; lanes are buffers, for at least three are sorted."""
    _mean(lanes[(len(lanes) - 1) // 2 : len(lanes) // 2 + 1], centre, above, ordered=True)
    for low in range(len(lanes) - kept):
        np.subtract(lanes[low + kept], centre, out=above)
        np.subtract(centre, lanes[low], out=below)
        np.less(above, below, out=nearer)
        np.copyto(lanes[low % kept], lanes[low + kept], where=nearer)
    return list(lanes[:kept])


class _Mixer:
    """Computes rows of more than one vector, as summation.weighted_sum does: the first product, then each product added.

    Where all rows weigh a vector alike, which is usual, its product is computed once for all.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        uses = Counter(pair for row in rows for pair in row[1:])
        self._shared = [pair for pair, times in uses.items() if times > 1]
        if len(self._shared) > 2 * len({at for at, _ in uses}):  # no memory for all, and little gain
            self._shared = []
        self.buffers = len(rows) + len(self._shared) + 1

    def means(self, columns: Sequence[Float32s], buffers: Sequence[Float32s]) -> list[Float32s]:
        """The rows, in the first of these buffers."""
        results, scratch = buffers[: len(self._rows)], buffers[len(self._rows) :]
        products = dict(zip(self._shared, scratch[1:], strict=True))
        for (at, factor), product in products.items():
            np.multiply(columns[at], np.float32(factor), out=product)
        for row, result in zip(self._rows, results, strict=True):
            (first, factor), *others = row
            np.multiply(columns[first], np.float32(factor), out=result)
            for at, factor in others:
                term = products.get((at, factor))
                if term is None:
                    term = np.multiply(columns[at], np.float32(factor), out=scratch[0])
                np.add(result, term, out=result)
        return list(results)


def _power_of_two(value: int) -> int:
    return 1 << (max(value, 1).bit_length() - 1)
