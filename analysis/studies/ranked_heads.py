"""Heads by a number of theirs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headtune.analysis.interventions.intervention import Head
from headtune.analysis.utils.errors import InputError


def head_name(head: Head) -> str:
    """`L2H3`."""
    return f"L{head[0]}H{head[1]}"


def require_top(top: int) -> None:
    """Refuse a `top` below 1 (InputError)."""
    if top < 1:
        raise InputError(f"option 'top' is {top}; expected at least 1 head")


def order(values: NDArray[np.float32]) -> list[Head]:
    """All heads, highest value first."""
    n_heads = values.shape[1]
    return [divmod(int(index), n_heads) for index in np.argsort(-values, axis=None, kind="stable")]
