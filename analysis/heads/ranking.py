"""From scores to heads: attribution finds, ablation confirms, resampling says how stable the choice is.

Three ways to say how many: the best k (`rank`), all beyond a threshold (`rank` with `threshold`), or up to where the
cumulative effect bends (`elbow`). What they are compared with is in `controls`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headtune.analysis.methods.registry import METHODS
from headtune.analysis.methods.scores import Array, Scores
from headtune.analysis.utils.errors import InputError

from .head_set import RankedHead

SIGNS = {"recall": 1.0, "suppression": -1.0}
_QUANTITIES = {"recall": "target", "suppression": "previous"}


def rule_for(role: str, scores: Scores) -> tuple[str, float, str]:
    """The quantities by which a role is ranked and confirmed on these scores, and the sign that counts.

    Recall heads raise the remaining answers (`.target`), suppression heads lower the previous ones (`.previous`); on
    single facts, where there are none, they lower the correct answer. Ranked by direct attribution where it was run,
    else by the first method that was; confirmed by exact ablation where it was run, else by the first intervention that
    was (and has a value by example, so an interval), else by the ranking itself. Both are in logits: a head's direct
    part and its whole effect.

    Raises:
        InputError: no scores that rank heads.
    """
    quantity = _QUANTITIES[role]
    ran = [name for name in METHODS if f"{name}.{quantity}" in scores]
    if not ran and quantity == "previous":
        quantity = "target"
        ran = [name for name in METHODS if f"{name}.{quantity}" in scores]
    if not ran:
        raise InputError(f"the scores hold no {quantity!r} quantity of any method, so heads cannot be ranked")
    causal = [name for name in ran if METHODS[name].causal and f"{name}.{quantity}" in scores.by_example]
    finder = "dla" if "dla" in ran else ran[0]
    return f"{finder}.{quantity}", SIGNS[role], f"{causal[0] if causal else finder}.{quantity}"


def rank(
    scores: Scores, role: str, top: int | None, n_bootstrap: int = 1000, seed: int = 0, threshold: float | None = None
) -> list[RankedHead]:
    """The heads of a role: by attribution, among those whose ablation effect has the same sign.

    A head counts as confirmed when ablating it moves the quantity the way its attribution says, with a 95% interval
    on the right side of zero. Without ablation scores the attribution alone decides.

    Args:
        top: at most so many; None = all that are confirmed.
        threshold: only heads whose score is at least this far from zero, in the score's unit.

    Returns:
        Best first; fewer than `top` where fewer are confirmed.
    """
    attribution, sign, ablation = rule_for(role, scores)
    means = scores.means()
    mean = means[attribution]
    eligible = _confirmed(scores, attribution, sign, ablation, n_bootstrap, seed)
    if threshold is not None:
        eligible = eligible & (sign * mean >= threshold)
    bounds = None if attribution in scores.whole else scores.interval(attribution, n_bootstrap, seed)
    methods = tuple(f"{name}." for name in METHODS)
    ranked = []
    for index in np.argsort(-sign * mean, axis=None, kind="stable"):
        layer, head = divmod(int(index), mean.shape[1])
        if not eligible[layer, head]:
            continue
        effect = {name: float(value[layer, head]) for name, value in means.items() if name.startswith(methods)}
        interval = None if bounds is None else (float(bounds[0][layer, head]), float(bounds[1][layer, head]))
        ranked.append(RankedHead(layer, head, float(mean[layer, head]), interval, effect))
        if len(ranked) == top:
            break
    return ranked


def _confirmed(scores: Scores, attribution: str, sign: float, ablation: str, n: int, seed: int) -> NDArray[np.bool_]:
    right = np.ones(scores.mean(attribution).shape, dtype=bool)
    for name in {attribution, ablation}:
        if name in scores.whole:
            right &= sign * scores.mean(name) > 0
        else:
            low, high = scores.interval(name, n, seed)
            right &= (low > 0) if sign > 0 else (high < 0)
    return right


def stability(scores: Scores, role: str, top: int, n: int = 200, seed: int = 0) -> float | None:
    """Mean Jaccard overlap between the top heads by attribution and those of `n` resamplings of the subjects.

    Confirmation is by the sign of the ablation effect, in the whole sample and in each resampling (intervals within
    resamplings would cost a bootstrap each). 0 where no head is confirmed; None where the ranking method has one value
    for the whole task, which cannot be resampled.
    """
    attribution, sign, ablation = rule_for(role, scores)
    if attribution in scores.whole:
        return None
    draws = sign * scores.bootstrap(attribution, n, seed)
    present = ~np.isnan(draws).any(axis=(1, 2))  # resamplings with an example to judge by
    mean = sign * scores.mean(attribution)
    if ablation != attribution:
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


def elbow(effects: Sequence[float]) -> int:
    """Where a cumulative effect bends: the k whose point lies farthest from the chord between first and last.

    Args:
        effects: the quantity with the best 0, 1, 2, ... heads silenced.

    Returns:
        k, at least 1 (Satopaa et al. 2011, "kneedle", without smoothing). A curve that never leaves the chord gives the
        largest k.
    """
    values = np.asarray(effects, dtype=np.float64)
    if len(values) < 3:
        return max(1, len(values) - 1)
    span = values[-1] - values[0]
    if span == 0:
        return 1
    gap = np.abs((values - values[0]) / span - np.linspace(0, 1, len(values)))
    best = int(np.argmax(gap))
    return best if best > 0 and gap[best] > 1e-9 else len(values) - 1
