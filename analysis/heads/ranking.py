"""From scores to heads: attribution finds, interventions confirm, resampling says how stable the choice is.

Heads are ranked by contrast: how far a head raises this subject's answers above the other subjects' answers. A logit
that all tokens share, or all city names, is no reason to prefer an answer, and a softmax does not feel it.

Three ways to say how many: the best k (`rank`), all beyond a threshold (`rank` with `threshold`), or up to where the
cumulative effect bends (`elbow`). What they are compared with is in `controls`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headtune.analysis.methods.registry import METHODS
from headtune.analysis.methods.scores import Array, Scores
from headtune.analysis.utils.errors import InputError, nearest
from headtune.analysis.utils.stats import false_discovery

from .head_set import RankedHead
from .roles import DEFAULT_ROLES, Role, role_of

SIGNS = {role.name: role.sign for role in DEFAULT_ROLES}
FDR = 0.05  # of the heads that are confirmed, of all roles together, so many may be confirmed by chance
RankBy = Literal["contrast", "centred", "raw"]
RANKINGS = {
    "contrast": "less the other subjects' answers",
    "centred": "less the vocabulary's mean",
    "raw": "the mean logit itself, which a softmax does not feel",
}


@dataclass(frozen=True)
class Rule:
    """By what a role is ranked and confirmed.

    Attributes:
        rank: the quantity that ranks.
        sign: which sign counts: 1 or -1.
        confirm: the quantities that must have this sign too.
    """

    rank: str
    sign: float
    confirm: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"confirm": list(self.confirm)}


def with_differences(scores: Scores, roles: Sequence[Role]) -> Scores:
    """The scores, and what roles that are a difference rank by: `<method>.A-B = <method>.A - <method>.B`.

    NaN where an example lacks one of the two. Raw logits: what a contrast takes away, both terms have.
    """
    by_example, whole = dict(scores.by_example), dict(scores.whole)
    for role in roles:
        if role.less is None:
            continue
        for values in (by_example, whole):
            for method in METHODS:
                first, second = _name(method, role.quantity), _name(method, role.less)
                if first in values and second in values:
                    values[_difference(method, role)] = values[first] - values[second]
    return replace(scores, by_example=by_example, whole=whole)


def _name(method: str, quantity: str) -> str:
    """The score's name: a quantity that names its method is the score itself."""
    return quantity if "." in quantity else f"{method}.{quantity}"


def _difference(method: str, role: Role) -> str:
    return f"{_name(method, role.quantity)}-{role.less}"


def rule_for(role: Role | str, scores: Scores, by: str = "contrast") -> Rule:
    """The quantities by which a role is ranked and confirmed on these scores, and the sign that counts.

    Recall heads raise the remaining answers (`.target`), suppression heads lower the previous ones (`.previous`); on
    single facts, where there are none, they lower the correct answer. For other roles see `roles`. Ranked by direct
    attribution where it was run, else by the first method that was, in the form `by` asks for, where the method has it
    (gates, for one, have the raw form alone). Confirmed by exact ablation where it was run, else by the first
    intervention that was (and has values by example, so a test), in the same form and in the log-probability of the
    answers, which is what a softmax makes of it; else by the ranking itself.

    A difference ranks by itself, and is confirmed by that of the intervention and by the log-probability of its first
    quantity, which the heads must raise (or lower) too. A quantity of one named method is confirmed by itself.

    Args:
        scores: `with_differences` of the role, where it is one.
        by: `contrast`, `centred` or `raw`: see RANKINGS.

    Raises:
        InputError: no scores that rank heads, or an unknown `by`.
    """
    role = role_of(role)
    if by not in RANKINGS:
        raise InputError(f"rank_by {by!r} is unknown; {nearest(by, RANKINGS)}")
    if "." in role.quantity:
        name = role.quantity if role.less is None else _difference("", role)
        if name not in scores:
            raise InputError(f"role {role.name}: the scores hold no {name!r}; {_held(scores)}")
        return Rule(name, role.sign, (name,))

    quantity = role.quantity if role.less is None else f"{role.quantity}-{role.less}"
    ran = [name for name in METHODS if f"{name}.{quantity}" in scores]
    if not ran and role.without_previous:
        quantity = role.without_previous
        ran = [name for name in METHODS if f"{name}.{quantity}" in scores]
    if not ran:
        raise InputError(
            f"the scores hold no {quantity!r} quantity of any method, so {role.name} heads cannot be ranked; "
            f"{_held(scores)}; run another method, or ask for a role of these (--role NAME=QUANTITY:+)"
        )

    def form(method: str) -> str:
        name_of_form = f"{method}.{quantity}_{by}"
        return name_of_form if name_of_form in scores else f"{method}.{quantity}"

    causal = [name for name in ran if METHODS[name].causal and f"{name}.{quantity}" in scores.by_example]
    finder = "dla" if "dla" in ran else ran[0]
    if not causal:
        return Rule(form(finder), role.sign, (form(finder),))
    probability = f"{causal[0]}.{quantity if role.less is None else role.quantity}_logp"
    confirm = [form(causal[0]), *([probability] if probability in scores and by != "raw" else [])]
    return Rule(form(finder), role.sign, tuple(confirm))


def _held(scores: Scores) -> str:
    """What the scores hold, in short."""
    names = sorted({*scores.by_example, *scores.whole})
    return f"they hold {', '.join(names[:8])}{' and others' if len(names) > 8 else ''}"


def p_values(scores: Scores, rule: Rule) -> NDArray[np.float64]:
    """`[n_layers, n_heads]` p of each head not having the role: the largest of the one-sided p's of the quantities that
    rank and confirm, all of which must have the role's sign.

    Quantities of the task as a whole have no test: 0 where the sign is right, 1 where it is not.
    """
    p = np.zeros(scores.mean(rule.rank).shape)
    for name in dict.fromkeys((rule.rank, *rule.confirm)):
        if name in scores.whole:
            p = np.maximum(p, rule.sign * scores.mean(name) <= 0)
        else:
            p = np.maximum(p, scores.p_values(name, rule.sign))
    return p


def rank(
    scores: Scores,
    role: Role | str,
    top: int | None,
    threshold: float | None = None,
    by: str = "contrast",
    fdr: float | None = FDR,
    roles: Sequence[Role] = DEFAULT_ROLES,
) -> list[RankedHead]:
    """The heads of a role: by attribution, among those whose effects are confirmed to have the role's sign.

    Confirmed are the heads whose q-value (Benjamini & Hochberg over all heads and all roles, see `p_values`) is at most
    `fdr`.

    Args:
        top: at most so many; None = all that are confirmed.
        threshold: only heads whose score is at least this far from zero, in the score's unit; default: the role's.
        fdr: None: the signs of the means are enough, nothing is tested. For heads that others are to be judged on.
        roles: all that are asked for, over which the false discovery rate is.

    Returns:
        Best first; fewer than `top` where fewer are confirmed. `effect` holds the means of all methods' quantities, `p`
        and `q`.
    """
    role = role_of(role)
    rule = rule_for(role, scores, by)
    threshold = role.threshold if threshold is None else threshold
    means = scores.means()
    mean = means[rule.rank]
    p, q = _tested(scores, role, by, roles)
    eligible = np.logical_and.reduce([rule.sign * means[name] > 0 for name in (rule.rank, *rule.confirm)])
    if fdr is not None:
        eligible &= q <= fdr
    if threshold is not None:
        eligible &= rule.sign * mean >= threshold
    bounds = None if rule.rank in scores.whole else scores.interval(rule.rank)
    methods = tuple(f"{name}." for name in METHODS)
    ranked = []
    for index in np.argsort(-rule.sign * mean, axis=None, kind="stable"):
        layer, head = divmod(int(index), mean.shape[1])
        if not eligible[layer, head]:
            continue
        effect = {name: float(value[layer, head]) for name, value in means.items() if name.startswith(methods)}
        if bounds is not None:
            effect |= {"p": float(p[layer, head]), "q": float(q[layer, head])}
        interval = None if bounds is None else (float(bounds[0][layer, head]), float(bounds[1][layer, head]))
        ranked.append(RankedHead(layer, head, float(mean[layer, head]), interval, effect))
        if len(ranked) == top:
            break
    return ranked


def _tested(
    scores: Scores, role: Role, by: str, roles: Sequence[Role]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """p and q of every head for a role; q over all roles together."""
    everyone = tuple(roles) if role in roles else (*roles, role)
    p = np.stack([p_values(scores, rule_for(each, scores, by)) for each in everyone])
    index = everyone.index(role)
    return p[index], false_discovery(p)[index]


def stability(
    scores: Scores, role: Role | str, top: int, n: int = 200, seed: int = 0, by: str = "contrast"
) -> float | None:
    """Mean Jaccard overlap between the top heads by attribution and those of `n` resamplings of the subjects.

    Confirmation is by the signs of the effects, in the whole sample and in each resampling. 0 where no head is
    confirmed; None where the ranking method has one value for the whole task, which cannot be resampled.
    """
    rule = rule_for(role, scores, by)
    if rule.rank in scores.whole:
        return None
    draws = rule.sign * scores.bootstrap(rule.rank, n, seed)
    present = ~np.isnan(draws).any(axis=(1, 2))  # resamplings with an example to judge by
    mean = rule.sign * scores.mean(rule.rank)
    for name in rule.confirm:
        if name != rule.rank:
            draws = np.where(rule.sign * scores.bootstrap(name, n, seed) > 0, draws, -np.inf)
            mean = np.where(rule.sign * scores.mean(name) > 0, mean, -np.inf)
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
