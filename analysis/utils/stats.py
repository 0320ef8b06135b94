"""Statistics of few examples: intervals and tests over subjects, false discovery rate, ranks and correlations.

Examples of one subject are not independent, so subjects are what is counted: a mean's standard error is the jackknife's
over subjects, and its interval Student's with one degree of freedom fewer than there are subjects. Where a resampling
is needed (differences of runs, orders), it draws subjects, each with all of its examples; the same seed draws the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

# From the first on 95% intervals of scores and of rates hold the true value in at least 93 of 100 simulated tasks (see
# tests/analysis/utils/test_stats.py); from the second on they are narrow enough to compare anything.
FEW_SUBJECTS, ENOUGH_SUBJECTS = 5, 20

Floats = NDArray[np.float64]


# --- means over subjects ----------------------------------------------------------------------------------------------


def by_subject(values: ArrayLike, subjects: Sequence[str]) -> tuple[Floats, Floats]:
    """Sums and counts of each subject's examples, `[n_subjects, ...]` each; a NaN counts as no example."""
    array = np.asarray(values, dtype=np.float64)
    _, index = np.unique(np.asarray(subjects), return_inverse=True)
    order = np.argsort(index, kind="stable")
    first = np.flatnonzero(np.diff(index[order], prepend=-1))  # of each subject, in this order
    present = ~np.isnan(array)
    total = np.add.reduceat(np.where(present, array, 0.0)[order], first, axis=0)
    return total, np.add.reduceat(present.astype(np.float64)[order], first, axis=0)


def standard_error(values: ArrayLike, subjects: Sequence[str]) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Mean over examples, its jackknife standard error over subjects, and how many subjects have the quantity.

    With m the mean over all examples and m_s that without subject s's, `se^2 = (n - 1)/n sum_s (m_s - mean m_s)^2`
    (Efron & Stein 1981).

    Args:
        values: `[n_examples, ...]`; NaN where an example does not have the quantity.

    Returns:
        Three arrays `[...]`; the standard error is NaN where fewer than two subjects have the quantity.
    """
    total, count = by_subject(values, subjects)
    n = (count > 0).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total.sum(0) / count.sum(0)
        without = np.where(count > 0, (total.sum(0) - total) / (count.sum(0) - count), np.nan)
        spread = np.where(count > 0, (without - np.nansum(without, 0) / n) ** 2, 0.0).sum(0)
        error = np.where(n > 1, np.sqrt((n - 1) / n * spread), np.nan)
    return mean, error, n


def t_interval(values: ArrayLike, subjects: Sequence[str], level: float = 0.95) -> tuple[Floats, Floats]:
    """Student's interval of a mean over subjects (see `standard_error`): low and high, `[...]` each.

    A quantity that one subject alone has gets an interval without bounds.
    """
    mean, error, n = standard_error(values, subjects)
    with np.errstate(invalid="ignore"):  # no bounds times no error, where one subject or none has the quantity
        width = np.where(n > 1, _quantiles(n - 1, level) * np.nan_to_num(error), np.inf)
    return mean - width, mean + width


def mean_interval(
    values: Sequence[float], subjects: Sequence[str], level: float = 0.95
) -> dict[str, float | list[float]]:
    """`{"mean", "ci": [low, high]}` of one number per example, over subjects.

    Numbers that all lie in 0..1 (rates, probabilities) get `rate_interval`, others `t_interval`. For differences, which
    may all lie in 0..1 by chance, see `change_interval`. A single subject has no interval: 0..1, or the mean itself.
    """
    array = np.asarray(values, dtype=np.float64)
    mean, _, n = standard_error(array, subjects)
    rates = bool(((array >= 0) & (array <= 1 + 1e-6)).all())  # a sum of probabilities may exceed 1 by its rounding
    if n < 2 and not rates:
        return {"mean": float(mean), "ci": [float(mean), float(mean)]}
    low, high = (rate_interval if rates else t_interval)(array, subjects, level)
    return {"mean": float(mean), "ci": [float(low), float(high)]}


def rate_interval(values: ArrayLike, subjects: Sequence[str], level: float = 0.95) -> tuple[Floats, Floats]:
    """Wilson's interval of means of numbers in 0..1, over subjects: low and high, `[...]` each.

    With Student's quantile t, and for the number of trials `N = mean (1 - mean) / se^2`, the number of independent
    trials that would have this standard error; the number of subjects where all are alike:

        (mean + t^2/2N +- t sqrt(mean (1 - mean)/N + t^2/4N^2)) / (1 + t^2/N)

    so that a rate of 0 of 10 has an upper bound. 0..1 where fewer than two subjects have the quantity.
    """
    mean, error, n = standard_error(values, subjects)
    mean = np.clip(mean, 0.0, 1.0)
    spread, t = mean * (1 - mean), _quantiles(n - 1, level)
    with np.errstate(invalid="ignore", divide="ignore"):
        trials = np.where(error > 1e-6 * spread, spread / error**2, n)  # else nothing but rounding
        middle, width = mean + t**2 / (2 * trials), t * np.sqrt(spread / trials + t**2 / (4 * trials**2))
        low, high = (middle - width) / (1 + t**2 / trials), (middle + width) / (1 + t**2 / trials)
    # Rounded, 0 of 10 could begin above 0.
    return np.where(n > 1, np.clip(low, 0.0, mean), 0.0), np.where(n > 1, np.clip(high, mean, 1.0), 1.0)


def change_interval(
    before: ArrayLike, after: ArrayLike, subjects: Sequence[str], level: float = 0.95
) -> dict[str, float | list[float]]:
    """`{"mean", "ci"}` of after - before, paired by example: Student's interval over subjects, `[nan, nan]` of one."""
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    mean, error, n = (each.item() for each in standard_error(differences, subjects))
    width = t_quantile(n - 1, level) * error if n > 1 else math.nan
    return {"mean": mean, "ci": [mean - width, mean + width]}


def mean_of_means_interval(
    values: Sequence[ArrayLike], subjects: Sequence[Sequence[str]], level: float = 0.95, rates: bool = False
) -> list[float] | None:
    """`[low, high]` of `1/T sum_i mean_i`, the mean over T independent tasks of each one's mean over examples.

    `se^2 = sum_i se_i^2 / T^2` with Satterthwaite's degrees of freedom `(sum_i se_i^2)^2 / sum_i se_i^4/(n_i - 1)`;
    Student's interval, or with `rates` Wilson's form of it (see `rate_interval`), whose number of trials is that of
    subjects in all where no example differs.

    Returns:
        Where a task has one subject `[0, 1]` for rates, else None.
    """
    errors, numbers, means = [], [], []
    for task, names in zip(values, subjects, strict=True):
        mean, error, n = (each.item() for each in standard_error(task, names))
        means.append(mean)
        errors.append(error**2)
        numbers.append(n)
    mean = float(np.mean(means))
    if min(numbers) < 2:
        return [0.0, 1.0] if rates else None
    square = sum(errors) / len(means) ** 2
    varying = sum(error**2 / (n - 1) for error, n in zip(errors, numbers, strict=True))
    df = max(1, int(sum(errors) ** 2 / varying)) if varying else sum(numbers) - len(numbers)
    t = t_quantile(df, level)
    if not rates:
        return [mean - t * math.sqrt(square), mean + t * math.sqrt(square)]
    mean = min(max(mean, 0.0), 1.0)
    spread = mean * (1 - mean)
    trials = spread / square if square > 1e-12 * spread else float(sum(numbers))
    middle, width = mean + t**2 / (2 * trials), t * math.sqrt(spread / trials + t**2 / (4 * trials**2))
    low, high = ((middle + sign * width) / (1 + t**2 / trials) for sign in (-1, 1))
    return [max(0.0, min(low, mean)), min(1.0, max(high, mean))]


def one_sided_p(values: ArrayLike, subjects: Sequence[str], sign: float) -> Floats:
    """P(T >= t) of Student's t of a mean over subjects, against "the mean times `sign` is at most 0": `[...]`.

    1 where fewer than two subjects have the quantity, or where it does not vary and is not of that sign.
    """
    mean, error, n = standard_error(values, subjects)
    with np.errstate(invalid="ignore", divide="ignore"):
        t = sign * mean / error
    t = np.where((error == 0) & (mean != 0), np.sign(sign * mean) * 1e9, t)
    return np.where((n > 1) & ~np.isnan(t), student_tail(np.nan_to_num(t, posinf=1e9, neginf=-1e9), n - 1), 1.0)


def false_discovery(p_values: ArrayLike) -> Floats:
    """Benjamini & Hochberg's (1995) q-values: the least rate of false discoveries at which each test counts as one.

    `q_(i) = min over j >= i of p_(j) m / j`, in the order of the p-values; of the shape of `p_values`.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, axis=None, kind="stable")
    scaled = p.flat[order] * p.size / np.arange(1, p.size + 1)
    q = np.empty(p.size)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q.reshape(p.shape)


# --- Student's distribution -------------------------------------------------------------------------------------------


def student_tail(t: ArrayLike, df: ArrayLike) -> Floats:
    """P(T >= t) of Student's distribution: half the regularised incomplete beta function at `df / (df + t^2)`.

    By its continued fraction (Abramowitz & Stegun 26.5.8, modified Lentz), to 1e-10.
    """
    t, df = np.broadcast_arrays(np.asarray(t, dtype=np.float64), np.maximum(np.asarray(df, dtype=np.float64), 1.0))
    x, a, b = df / (df + t * t), df / 2, np.full(t.shape, 0.5)
    half = 0.5 * _regularised_beta(x, a, b)
    return np.where(t >= 0, half, 1 - half)


_log_gamma = np.vectorize(math.lgamma, otypes=[np.float64])


def _regularised_beta(x: Floats, a: Floats, b: Floats) -> Floats:
    x = np.clip(x, 1e-300, 1.0)
    swap = x > (a + 1) / (a + b + 2)
    y = np.where(swap, 1 - x, x)
    first, second = np.where(swap, b, a), np.where(swap, a, b)
    with np.errstate(divide="ignore"):
        logs = first * np.log(y) + second * np.log1p(-y)
    front = np.exp(logs + _log_gamma(a + b) - _log_gamma(a) - _log_gamma(b)) / first
    d = 1 / _away_from_0(1 - (first + second) * y / (first + 1))
    c, result = np.ones_like(y), d
    for m in range(1, 300):
        for numerator in (
            m * (second - m) * y / ((first + 2 * m - 1) * (first + 2 * m)),
            -(first + m) * (first + second + m) * y / ((first + 2 * m) * (first + 2 * m + 1)),
        ):
            d, c = 1 / _away_from_0(1 + numerator * d), _away_from_0(1 + numerator / c)
            result = result * d * c
        if np.abs(d * c - 1).max(initial=0) < 1e-13:
            break
    value = np.where(y <= 0, 0.0, front * result)
    return np.where(swap, 1 - value, value)


def _away_from_0(values: Floats) -> Floats:
    return np.where(np.abs(values) < 1e-300, 1e-300, values)


@functools.cache
def t_quantile(df: int, level: float = 0.95) -> float:
    """The t with `P(|T| <= t) = level`, by bisection: 12.7 for one degree of freedom, 1.96 for very many."""
    low, high, tail = 0.0, 1e6, (1 - level) / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if float(student_tail(middle, df)) > tail else (low, middle)
    return high


def _quantiles(df: NDArray[np.int64], level: float) -> Floats:
    table = {int(each): t_quantile(int(each), level) for each in np.unique(df) if each > 0}
    return np.vectorize(lambda each: table.get(int(each), np.inf), otypes=[np.float64])(df)


# --- resampling -------------------------------------------------------------------------------------------------------


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


# --- ranks and correlations -------------------------------------------------------------------------------------------


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
