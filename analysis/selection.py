"""From scores to ranked heads: attribution finds, ablation confirms, resampling says how stable the choice is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .headset import RankedHead
from .scores import Array, Scores

# role -> (attribution that ranks, its sign, ablation that confirms), both in logits: a head's direct part and its whole
# effect. Probabilities, in which what is common to all answers cancels, are what `identify.verify` judges sets by.
# A suppression head lowers previous answers; on single facts, where there are none, it lowers the correct answer.
_RULES = {
    "recall": ("dla.target", 1.0, "ablation.target"),
    "suppression": ("dla.previous", -1.0, "ablation.previous"),
}


def rule_for(role: str, scores: Scores) -> tuple[str, float, str]:
    """The quantities by which a role is ranked and confirmed on these scores."""
    attribution, sign, ablation = _RULES[role]
    if attribution not in scores.by_example and ablation not in scores.by_example:  # no previous answers
        attribution, ablation = "dla.target", "ablation.target"
    return (attribution if attribution in scores.by_example else ablation), sign, ablation


def rank(scores: Scores, role: str, top: int, n_bootstrap: int = 1000, seed: int = 0) -> list[RankedHead]:
    """The `top` heads of a role: by attribution, among those whose ablation effect has the same sign.

    A head counts as confirmed when ablating it moves the quantity the way its attribution says, with a 95% interval
    on the right side of zero. Without ablation scores the attribution alone decides.

    Returns:
        Best first; fewer than `top` where fewer are confirmed.
    """
    attribution, sign, ablation = rule_for(role, scores)
    mean = scores.mean(attribution)
    low, high = scores.interval(attribution, n_bootstrap, seed)
    eligible = _confirmed(scores, attribution, sign, ablation, n_bootstrap, seed)
    n_heads = mean.shape[1]
    ranked = []
    for index in np.argsort(-sign * mean, axis=None, kind="stable"):
        layer, head = divmod(int(index), n_heads)
        if not eligible[layer, head]:
            continue
        effect = {
            name: float(value[layer, head])
            for name, value in scores.means().items()
            if name.startswith(("dla.", "ablation."))
        }
        interval = (float(low[layer, head]), float(high[layer, head]))
        ranked.append(RankedHead(layer, head, float(mean[layer, head]), interval, effect))
        if len(ranked) == top:
            break
    return ranked


def _confirmed(scores: Scores, attribution: str, sign: float, ablation: str, n: int, seed: int) -> NDArray[np.bool_]:
    low, high = scores.interval(attribution, n, seed)
    right = (low > 0) if sign > 0 else (high < 0)
    if ablation in scores.by_example:
        low, high = scores.interval(ablation, n, seed)
        right = right & ((low > 0) if sign > 0 else (high < 0))
    return right


def stability(scores: Scores, role: str, top: int, n: int = 200, seed: int = 0) -> float:
    """Mean Jaccard overlap between the top heads by attribution and those of `n` resamplings of the subjects.

    Confirmation is by the sign of the ablation effect, in the whole sample and in each resampling (intervals within
    resamplings would cost a bootstrap each). 0 where no head is confirmed.
    """
    attribution, sign, ablation = rule_for(role, scores)
    draws = sign * scores.bootstrap(attribution, n, seed)
    present = ~np.isnan(draws).any(axis=(1, 2))  # resamplings with an example to judge by
    mean = sign * scores.mean(attribution)
    if ablation in scores.by_example:
        draws = np.where(sign * scores.bootstrap(ablation, n, seed) > 0, draws, -np.inf)
        mean = np.where(sign * scores.mean(ablation) > 0, mean, -np.inf)
    chosen = _top(mean, top)
    if not chosen:
        return 0.0
    others = [_top(draw, top) for draw in draws[present]]
    return float(np.mean([len(chosen & other) / len(chosen | other) for other in others]))


def _top(values: Array, top: int) -> set[int]:
    """Flat indices of the `top` largest values, less those that are ruled out (-inf)."""
    best = np.argsort(-values, axis=None, kind="stable")[:top]
    return set(best[np.isfinite(values.flat[best])].tolist())
