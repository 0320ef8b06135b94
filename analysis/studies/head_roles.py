"""Yan & Jia's rule of which heads promote and which suppress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headtune.analysis.utils.errors import InputError

Values = NDArray[np.float64]


@dataclass(frozen=True)
class HeadRoles:
    """Yan & Jia's rule: in a layer, a head promotes (suppresses) where it writes more than m + s (less than m - s).

    Attributes:
        mean, std: `[n_layers]` m and s, over examples, heads and names.
        promotes, suppresses: `[n_layers, n_heads, n_names]` share of the examples that have the name; NaN if none has.
    """

    mean: Values
    std: Values
    promotes: Values
    suppresses: Values


def head_roles(logits: NDArray[Any]) -> HeadRoles:
    """Apply the rule.

    Args:
        logits: `[n_examples, n_layers, n_heads, n_names]` what heads write at END toward the subject and the answers;
            NaN where an example has no such name.

    Raises:
        InputError: a layer without any number.
    """
    values = np.asarray(logits, dtype=np.float64)
    present = ~np.isnan(values)
    if not present.any((0, 2, 3)).all():
        raise InputError("head roles need at least one number in each layer; give logits of at least one example")
    mean, std = np.nanmean(values, (0, 2, 3)), np.nanstd(values, (0, 2, 3))
    low, high = (mean - std)[None, :, None, None], (mean + std)[None, :, None, None]
    count = present.sum(0)

    def share(selected: NDArray[np.bool_]) -> Values:
        return np.where(count > 0, selected.sum(0) / np.maximum(count, 1), np.nan)

    return HeadRoles(mean, std, share(values > high), share(values < low))
