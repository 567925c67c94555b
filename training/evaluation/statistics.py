"""95% confidence intervals by the percentile bootstrap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS = 2000
LOW, HIGH = 2.5, 97.5
"""Percentiles: 95%."""


def interval(values: Sequence[float] | np.ndarray, draws: int = DRAWS, seed: int = 0) -> tuple[float, float, float]:
    """Mean of the values [G] and its interval: (mean, low, high). Raises ValueError where there is no value."""
    return ratio_interval(values, np.ones(len(values)), draws, seed)


def ratio_interval(
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float, float]:
    """sum(numerators) / sum(denominators) over groups [G], and its interval: (ratio, low, high).

    A group is what was drawn independently, such as a subject with the sum and the number of its pictures'
    scores: whole groups are drawn with replacement, `draws` times. The same seed gives the same interval.
    Denominators are not negative; draws in which they sum to 0 are left out. Raises ValueError where all
    do, or where there is no group.
    """
    numerators, denominators = np.asarray(numerators, float), np.asarray(denominators, float)
    if denominators.sum() <= 0:
        raise ValueError(f"an interval needs something to average: {len(denominators)} groups hold nothing")
    groups = len(denominators)
    chosen = np.random.default_rng(seed).integers(groups, size=(draws, groups))  # [draws, G]
    above, below = numerators[chosen].sum(1), denominators[chosen].sum(1)
    low, high = np.percentile(above[below > 0] / below[below > 0], (LOW, HIGH))
    return float(numerators.sum() / denominators.sum()), float(low), float(high)
