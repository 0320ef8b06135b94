"""Statistics of few examples: intervals by cluster bootstrap over subjects, ranks and correlations.

Examples of one subject are not independent, so a resampling draws subjects, each with all of its examples. The same
seed gives the same resamplings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

FEW_SUBJECTS, ENOUGH_SUBJECTS = 5, 20  # intervals over fewer than the first say little; over the second they do

Floats = NDArray[np.float64]


def subject_weights(subjects: Sequence[str], n: int, seed: int) -> Floats:
    """How often each example counts in each of `n` resamplings of the subjects: `[n, n_examples]`."""
    names, index = np.unique(np.asarray(subjects), return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=n)
    return draws[:, index].astype(np.float64)


def subject_shares(subjects: Sequence[str], n: int, seed: int) -> Floats:
    """`subject_weights`, each resampling's divided by their sum: `shares @ values` are the means of resamplings."""
    if not subjects:
        return np.zeros((n, 0))
    weights = subject_weights(subjects, n, seed)
    return weights / weights.sum(1, keepdims=True)


def tails(level: float) -> tuple[float, float]:
    """The two percentiles between which an interval of a level lies."""
    tail = 100 * (1 - level) / 2
    return tail, 100 - tail


def percentile_interval(draws: Floats, percentiles: tuple[float, float] = (2.5, 97.5)) -> tuple[float, float]:
    """The percentile interval of resampled numbers, `[n]`."""
    low, high = np.percentile(draws, percentiles)
    return float(low), float(high)


def mean_interval(
    values: Sequence[float], subjects: Sequence[str], n: int = 2000, seed: int = 0, level: float = 0.95
) -> dict[str, float | list[float]]:
    """`{"mean", "ci": [low, high]}` of one number per example, bootstrapped over subjects."""
    array = np.asarray(values, dtype=np.float64)
    weights = subject_weights(subjects, n, seed)
    means = weights @ array / weights.sum(1)
    return {"mean": float(array.mean()), "ci": list(percentile_interval(means, tails(level)))}


def ranks(values: ArrayLike) -> Floats:
    """Ranks from 0, ties sharing their mean: Pearson's correlation of ranks is Spearman's."""
    _, inverse, count = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    mean: Floats = np.cumsum(count) - (count + 1) / 2
    return mean[inverse]


def pearson(a: ArrayLike, b: ArrayLike) -> float | None:
    """Pearson's correlation of two vectors; None with fewer than two values, or where one does not vary."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / np.sqrt((x @ x) * (y @ y)))


def spearman(a: ArrayLike, b: ArrayLike) -> float | None:
    """Spearman's rank correlation of two vectors; None as for `pearson`."""
    return pearson(ranks(a), ranks(b))
