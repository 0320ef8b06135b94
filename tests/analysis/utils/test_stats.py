"""Intervals over subjects and correlations, by slow ways."""

from __future__ import annotations

import numpy as np
import pytest

from headtune.analysis.utils.stats import (
    mean_interval,
    pearson,
    percentile_interval,
    spearman,
    subject_shares,
    subject_weights,
    tails,
)

SUBJECTS = [f"s{index % 5}" for index in range(17)]


def test_shares_make_means_of_resamplings() -> None:
    values = np.random.default_rng(0).normal(size=17)
    weights, shares = (one(SUBJECTS, 50, seed=3) for one in (subject_weights, subject_shares))
    for row, mean in zip(weights, shares @ values, strict=True):
        assert mean == pytest.approx(np.repeat(values, row.astype(int)).mean())
    assert subject_shares([], 4, seed=0).shape == (4, 0)


def test_an_interval_is_of_the_resampled_means() -> None:
    values = np.random.default_rng(1).normal(size=17)
    means = subject_shares(SUBJECTS, 2000, seed=0) @ values
    assert mean_interval(values.tolist(), SUBJECTS)["ci"] == pytest.approx(percentile_interval(means))
    assert tails(0.8) == pytest.approx((10, 90))


def test_spearman_is_pearson_of_ranks_that_ties_share() -> None:
    assert spearman([0, 0, 1], [1, 2, 3]) == pytest.approx(np.corrcoef([1.5, 1.5, 3], [1, 2, 3])[0, 1])
    assert spearman([1, 2, 3], [1, 8, 27]) == pytest.approx(1)
    assert pearson([1], [2]) is None and spearman([1, 1], [1, 2]) is None
