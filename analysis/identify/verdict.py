"""Whether a role's heads do what its name says: holds, does not hold, or cannot be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headtune.analysis.heads.head_set import HeadSet
from headtune.analysis.heads.roles import Role, role_of
from headtune.analysis.methods.scores import Array
from headtune.analysis.utils.stats import Floats, by_subject, change_interval, t_quantile

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told"
LEVEL = 0.05  # of the comparison with random sets
SMALLEST_RATIO = 1.1  # p(previous) must rise by a tenth, p(remaining) fall by as much,
SMALLEST_CHANGE = 0.001  # and by this much probability
FEWEST_SUBJECTS = 4  # two in each half
SUBJECTS_TO_FAIL = 16  # eight in each half: with fewer, that nothing is seen does not say that nothing is there
FEWEST_SETS = 19  # of which none may reach the chosen heads, for p = 0.05


def dissociation(
    role: Role | str,
    heads: HeadSet,
    block: Mapping[str, Any],
    by_name: Mapping[str, Array],
    rows_of: Mapping[str, list[int]],
    subjects: Sequence[str],
    n_sets: int,
) -> dict[str, Any]:
    """Compare what silencing a role's heads does with what it should do, and with the controls.

    Silencing suppression heads must raise p(previous) (on single facts p(remaining)), silencing recall heads must lower
    p(remaining); silencing others must lower (or raise) the probability of their quantity, see `Role.probability`:
    p(remaining) falls for memory heads, p(previous) for context heads. It holds if all of these do:

    - p <= LEVEL, the share of random sets (and the chosen one) that go as far: `(1 + #{as far}) / (1 + sets)`;
    - the ratio of the means is SMALLEST_RATIO or more in the role's direction, and its 95% interval over subjects is on
      the right side of 1;
    - the change is SMALLEST_CHANGE or more, its interval on the right side of 0;
    - the largest other heads of the same layers do not go as far.

    It cannot be told with fewer than FEWEST_SUBJECTS subjects, with too few different random sets, or where the model
    gives the answers less than SMALLEST_CHANGE before and after; nor, with fewer than SUBJECTS_TO_FAIL, where no head
    is confirmed or the change is not distinguishable from none. Else it does not hold: also where the change goes the
    other way.

    Args:
        block: the verification block so far.
        by_name: what was silenced -> `[2, examples]`.
        rows_of: quantity -> the examples that have it.

    Returns:
        `verdict`, `held` (verdict == holds), `reason` (empty where it holds) and, where anything was silenced,
        `quantity`, `baseline`, `ablated`, `ratio`, `ratio_ci`, `change`, `change_ci`, `most_extreme_random_set`,
        `largest_other`, `p_value`, `sets`. `expected` says what silencing must do (`lower p_remaining`), of roles other
        than recall and suppression.
    """
    tested = role_of(role)
    role, raises = tested.name, tested.raises
    quantity = tested.probability if tested.probability in rows_of else "p_remaining"
    n_subjects = len({subjects[i] for i in rows_of[quantity]})
    few = f"{n_subjects} subjects are few to choose heads on one half and test them on the other; give more"
    nothing = UNKNOWN if n_subjects < SUBJECTS_TO_FAIL else FAILS
    if not heads.roles[role]:
        return _result(nothing, "no confirmed heads" + (f" ({few})" if nothing == UNKNOWN else ""))
    if f"ablate_{role}" not in block:
        return _result(nothing, "no head has the role's sign on both halves of the subjects")
    if not n_sets:
        return _result(UNKNOWN, block[f"ablate_random_like_{role}"]["reason"])

    # The effect, with its interval over subjects.
    rows = rows_of[quantity]
    column, names = int(quantity == "p_previous"), [subjects[i] for i in rows]
    before, after = (by_name[name][column, rows].astype(np.float64) for name in ("baseline", f"ablate_{role}"))
    change = change_interval(before, after, names)
    ratio, ratio_interval = ratio_of_means(before, after, names)
    # The controls.
    means = np.array([by_name[f"random_{role}_{index}"][column, rows].mean() for index in range(n_sets)])
    as_far = (means >= after.mean()) if raises else (means <= after.mean())
    p_value = (1 + int(as_far.sum())) / (1 + n_sets)
    largest = block.get(f"ablate_largest_like_{role}", {}).get(quantity, {}).get("mean")
    numbers = {
        "quantity": quantity,
        "baseline": float(before.mean()),
        "ablated": float(after.mean()),
        "ratio": ratio,
        "ratio_ci": ratio_interval,
        "change": change["mean"],
        "change_ci": change["ci"] if n_subjects > 1 else None,
        "most_extreme_random_set": float(means.max() if raises else means.min()),
        "largest_other": largest,
        "p_value": p_value,
        "sets": n_sets,
    }
    sign = 1 if raises else -1
    low = min(sign * bound for bound in change["ci"])  # type: ignore[union-attr]
    # An interval of the ratio is missing where before or after is 0, and 1 is then outside.
    overlaps = ratio_interval is not None and min(sign * (bound - 1) for bound in ratio_interval) <= 0
    if n_subjects < FEWEST_SUBJECTS:
        return _result(UNKNOWN, few, numbers)
    if n_sets < FEWEST_SETS:
        reason = f"{n_sets} random sets of heads are all there is to compare with, and {FEWEST_SETS} are needed to tell"
        return _result(UNKNOWN, reason, numbers)
    if max(before.mean(), after.mean()) < SMALLEST_CHANGE:
        return _result(UNKNOWN, f"the model gives these answers less than {SMALLEST_CHANGE:.1%}", numbers)
    reasons = []
    factor = None if ratio is None else (ratio if raises else 1 / ratio if ratio else np.inf)
    if max(sign * bound for bound in change["ci"]) < 0:  # type: ignore[union-attr]
        reasons.append("the change goes the other way")
    elif low <= 0 or overlaps:
        if n_subjects < SUBJECTS_TO_FAIL:
            return _result(UNKNOWN, f"the change is not distinguishable from none, and {few}", numbers)
        reasons.append("the change is not distinguishable from none")
    elif abs(change["mean"]) < SMALLEST_CHANGE or (factor is not None and factor < SMALLEST_RATIO):  # type: ignore[arg-type]
        reasons.append(
            f"the change is smaller than the smallest that counts (x{SMALLEST_RATIO}, {SMALLEST_CHANGE:.1%})"
        )
    if p_value > LEVEL:
        reasons.append(f"{int(as_far.sum())} of {n_sets} random sets go as far (p = {p_value:.2g})")
    if largest is not None and (largest >= after.mean() if raises else largest <= after.mean()):
        reasons.append("the largest other heads of the same layers go as far")
    return _result(FAILS if reasons else HOLDS, " and ".join(reasons), numbers)


def _result(verdict: str, reason: str, numbers: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"verdict": verdict, "held": verdict == HOLDS, "reason": reason} | (numbers or {})


def ratio_of_means(before: Floats, after: Floats, subjects: Sequence[str]) -> tuple[float | None, list[float] | None]:
    """mean(after) / mean(before) with a 95% interval over subjects, by the delta method on its logarithm:

        se(log R)^2 = n/(n - 1) sum_s (a_s / A - b_s / B)^2

    with a_s, b_s the sums of subject s and A, B the totals. None where the base is 0.
    """
    (sums_before, _), (sums_after, _) = by_subject(before, subjects), by_subject(after, subjects)
    total_before, total_after, n = sums_before.sum(), sums_after.sum(), len(sums_before)
    if total_before <= 0:
        return None, None
    ratio = float(total_after / total_before)
    if n < 2 or total_after <= 0:
        return ratio, None
    terms = sums_after / total_after - sums_before / total_before
    width = t_quantile(n - 1) * float(np.sqrt(n / (n - 1) * (terms**2).sum()))
    return ratio, [ratio * float(np.exp(-width)), ratio * float(np.exp(width))]
