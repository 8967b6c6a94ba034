"""Federated averaging: by which factor each contribution enters the sum.

Theory of operation
    The mean of contributions x_1 ... x_n is computed as a sum of products, so that a tree may add on the way and no
    division follows:

        weight_i = float32(samples_i / (samples_1 + ... + samples_n))       weighted (FedAvg, McMahan et al. 2017, alg. 1)
        weight_i = float32(1 / n)                                           unweighted
        clip_i   = 1 if norm_i <= clip_norm, else float32(clip_norm / norm_i)
        factor_i = float32(weight_i * clip_i)

    The parameters' section (pseudo-gradients) enters with factor_i, the float buffers' section (values) with weight_i:
    a running mean has no norm to clip. Integers enter a maximum. Interior partial sums, where factors are already in,
    enter with 1 (`PARTIAL`). Rounded weights add up to 1 within n * 2**-25.

    Clipping bounds what one contribution can do, as in differentially private averaging (McMahan et al. 2018, alg. 1:
    min(1, S / norm)); unlike torch's clip_grad_norm_ nothing is added to the norm below.

    The coordinator computes the factors once and signs them. Every operation here is exactly rounded (quotient of
    integers, quotient and product of float64, rounding to float32), so that a voter that computes them again from the
    signed headers gets the same bits on any machine and may compare with ==. What does the sums is
    aggregation/summation.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import msgspec

from p2pcoord.errors import LocalError
from p2pcoord.float32 import float32

if TYPE_CHECKING:
    from collections.abc import Sequence


class Factors(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """By what one input of a sum is multiplied; both are float32 numbers in [0, 1]."""

    parameters: float
    float_buffers: float


PARTIAL: Final = Factors(1.0, 1.0)
"""A partial sum carries its factors inside."""


class Mean(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The mean as the run file states it: by samples or by head, clipped to `clip_norm` (None: not clipped)."""

    weighted: bool = True
    clip_norm: float | None = None

    def factors(self, samples: Sequence[int], norms: Sequence[float]) -> tuple[Factors, ...]:
        """The factors of contributions with these numbers of samples and L2 norms of the pseudo-gradient, in their order.

        Raises LocalError for no contribution, a negative or no sample at all, and a norm that is negative or not finite:
        admission refuses such headers before.
        """
        if len(samples) != len(norms):
            raise LocalError(f"{len(samples)} numbers of samples for {len(norms)} norms")
        weights = normalised_weights(samples, weighted=self.weighted)
        clips = [clip_factor(norm, self.clip_norm) for norm in norms]
        return tuple(
            Factors(float32(weight * clip), weight) for weight, clip in zip(weights, clips, strict=True)
        )


def normalised_weights(samples: Sequence[int], *, weighted: bool) -> tuple[float, ...]:
    """The share of each in the sum of all, as float32. See `Mean.factors`."""
    if not samples or min(samples) < 0 or (weighted and not any(samples)):
        raise LocalError(f"no weights for samples {list(samples)[:8]}")
    if not weighted:
        return (float32(1 / len(samples)),) * len(samples)
    total = sum(samples)
    return tuple(float32(count / total) for count in samples)


def clip_factor(norm: float, clip_norm: float | None) -> float:
    """What a vector of this L2 norm is multiplied by so that its norm is at most `clip_norm`, as float32."""
    if not (math.isfinite(norm) and norm >= 0):
        raise LocalError(f"a contribution's norm cannot be {norm}")
    if clip_norm is None:
        return 1.0
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise LocalError(f"clip_norm must be a positive number, not {clip_norm}")
    return 1.0 if norm <= clip_norm else float32(clip_norm / norm)
