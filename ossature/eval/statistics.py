"""How sure a number is: intervals of shares and means, the sign test, pass@k.  No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959963984540054
"""Of a 95 % interval."""
RESAMPLES = 2000


class Interval(NamedTuple):
    value: float
    low: float
    """Of the 95 % interval."""
    high: float


def mean(values: Sequence[float], weights: Sequence[int | float] | None = None) -> Interval:
    """The mean, with Wilson's interval if every value is 0 or 1, else with a bootstrap's."""
    if not values:
        raise ValueError("the mean of no value")
    if weights is None and set(values) <= {0, 1}:
        return wilson(round(sum(values)), len(values))
    return bootstrap(values, weights)


def wilson(right: int, count: int) -> Interval:
    """The share of `right` among `count` with the score interval of Wilson (1927)."""
    share = right / count
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count)
    half *= math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    # At 0 and at all of them an end is exact, and rounding would miss it.
    low = 0.0 if right == 0 else middle - half
    return Interval(share, low, 1.0 if right == count else middle + half)


def bootstrap(values: Sequence[float], weights: Sequence[int | float] | None = None) -> Interval:
    """The (weighted) mean with the percentile interval of means of values drawn again.

    The draws are the same in every call.  Of one value there is no telling how sure it is: its
    interval's ends are NaN.
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(x) == 1:
        return Interval(float(x[0]), math.nan, math.nan)
    drawn = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for n in range(RESAMPLES):
        take = drawn.integers(0, len(x), len(x))
        means[n] = (x[take] * w[take]).sum() / w[take].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float((x * w).sum() / w.sum()), float(low), float(high))


def sign_test(wins: int, losses: int) -> float:
    """The probability of a division at least this uneven if both sides were equally likely.

    Two-sided and exact; ties have no part in it.
    """
    count, fewer = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(count, n) for n in range(fewer + 1)) / 2**count)


def pass_at(k: int, samples: int, right: int) -> float:
    """The probability that among k of the samples, drawn without putting back, one is right.

    The unbiased estimator of arXiv 2107.03374, section 2.1.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, not {samples}")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)
