"""How well a score finds the heads that are known to play a role: the numbers a benchmark of methods reports.

`PlantedModel.grade` takes them all for a model whose heads are known; they judge scores of any other truth as well.

All take scores `[n_layers, n_heads]` in which higher means "more likely to play the role", the heads that do
(`positives`) and those that do not (`negatives`). Heads in neither are not judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headtune.analysis.utils.errors import InputError

Head = tuple[int, int]  # (layer, head)


def auroc(scores: ArrayLike, positives: Sequence[Head], negatives: Sequence[Head]) -> float:
    """Area under the ROC curve: P(a positive scores above a negative), ties counting half; 0.5 is chance.

    Raises:
        InputError: no positives or no negatives, a head in both, a head out of range, or a score that is not finite.
    """
    good, bad = _values(scores, positives, negatives)
    difference = good[:, None] - bad[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def average_precision(scores: ArrayLike, positives: Sequence[Head], negatives: Sequence[Head]) -> float:
    """Mean, over the positives, of the share of positives among the heads that score at least as high.

    Ties count against the method. Raises as `auroc` does.
    """
    good, bad = _values(scores, positives, negatives)
    above = np.array([[(good >= value).sum(), (bad >= value).sum()] for value in good])
    return float((above[:, 0] / above.sum(1)).mean())


def precision_at_k(
    scores: ArrayLike, positives: Sequence[Head], negatives: Sequence[Head], k: int | None = None
) -> float:
    """Share of positives among the `k` highest scores (default: as many as there are positives).

    Ties count against the method. Raises as `auroc` does, and where `k` is not between 1 and the number of heads.
    """
    good, bad = _values(scores, positives, negatives)
    k = len(good) if k is None else k
    if not 1 <= k <= len(good) + len(bad):
        raise InputError(f"k={k} is out of range; expected 1 to {len(good) + len(bad)}, the number of heads judged")
    values = np.concatenate([bad, good])  # a stable sort keeps negatives first among equals
    is_positive = np.arange(len(values)) >= len(bad)
    return float(is_positive[np.argsort(-values, kind="stable")[:k]].mean())


def sign_accuracy(scores: ArrayLike, chosen: Sequence[Head], sign: float) -> float:
    """Share of the chosen heads whose score has the sign that is known to be right; a zero is wrong.

    Raises:
        InputError: no heads, a head out of range, or a score that is not finite.
    """
    return float((_of_heads(scores, chosen, "chosen heads") * sign > 0).mean())


def _values(
    scores: ArrayLike, positives: Sequence[Head], negatives: Sequence[Head]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if both := set(positives) & set(negatives):
        raise InputError(f"heads {sorted(both)} are positives and negatives at once; leave them in one list")
    return _of_heads(scores, positives, "positives"), _of_heads(scores, negatives, "negatives")


def _of_heads(scores: ArrayLike, chosen: Iterable[Head], what: str) -> NDArray[np.float64]:
    table = np.asarray(scores, dtype=np.float64)
    pairs = list(chosen)
    if not pairs:
        raise InputError(f"there are no {what} to judge by; expected at least one head")
    for layer, head in pairs:
        if not (0 <= layer < table.shape[0] and 0 <= head < table.shape[1]):
            raise InputError(f"head L{layer}H{head} is not among the scores of shape {table.shape}; check the model")
    values = np.array([table[pair] for pair in pairs])
    if not np.isfinite(values).all():
        raise InputError(f"{int((~np.isfinite(values)).sum())} of {len(values)} scores of {what} are not finite")
    return values
