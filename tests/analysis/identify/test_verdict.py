"""On made-up probabilities: what makes a verdict hold, what makes it fail, and what makes it impossible to tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from headtune.analysis.heads.head_set import ROLES, HeadSet, RankedHead
from headtune.analysis.identify.verdict import (
    FAILS,
    FEWEST_SETS,
    HOLDS,
    LEVEL,
    SMALLEST_CHANGE,
    SMALLEST_RATIO,
    SUBJECTS_TO_FAIL,
    UNKNOWN,
    dissociation,
    ratio_of_means,
)
from headtune.analysis.utils.stats import change_interval

HEAD = (RankedHead(0, 0, 1.0, (0.5, 1.5)),)
N = 16  # subjects, one example each
ENOUGH = SUBJECTS_TO_FAIL  # to say that there is nothing
T6 = 2.446912  # Student's quantile of a 95% interval with 6 degrees of freedom, from the tables
INDISTINCT = "the change is not distinguishable from none"
SMALL = "the change is smaller than the smallest that counts (x1.1, 0.1%)"


def spread(mean: float, n: int = N, by: float = 0.05) -> list[float]:
    """`n` probabilities around a mean, half a `by` part below, half above."""
    return [mean * (1 + by * (-1) ** i) for i in range(n)]


def judged(
    role: str,
    before: Sequence[float],
    after: Sequence[float],
    sets: Sequence[float] = (),
    largest: float | None = None,
    subjects: Sequence[str] | None = None,
    lists: bool = True,
    chosen: bool = True,
    silenced: bool = True,
) -> dict[str, Any]:
    """The verdict of a role.

    Args:
        before, after: the role's quantity in every example; the other one does nothing.
        sets: the means of the random sets; by default 50 that do nothing.
        lists: there are previous answers.
        chosen, silenced: there are heads of the role, in all subjects and in both halves.
    """
    n = len(before)
    sets = list(sets) or [float(np.mean(before))] * 50
    column = int(role == "suppression" and lists)
    names = ["p_remaining", *(["p_previous"] if lists else [])]

    def array(values: Sequence[float]) -> Any:
        both = np.full((2, n), 0.3, np.float32)
        both[column] = values
        return both

    by_name = {"baseline": array(before), f"ablate_{role}": array(after)}
    by_name |= {f"random_{role}_{index}": array([mean] * n) for index, mean in enumerate(sets)}
    block: dict[str, Any] = {f"ablate_random_like_{role}": {"sets": len(sets), "reason": "of the block"}}
    if silenced:
        block[f"ablate_{role}"] = {}
    if largest is not None:
        block[f"ablate_largest_like_{role}"] = {names[column]: {"mean": largest}}
    heads = HeadSet(model={}, task={}, method={}, roles={each: HEAD if chosen else () for each in ROLES})
    rows_of = {name: list(range(n)) for name in names}
    subjects = subjects or [f"s{i}" for i in range(n)]
    result = dissociation(role, heads, block, by_name, rows_of, subjects, len(sets) if sets != [-1] else 0)
    assert result["held"] == (result["verdict"] == HOLDS) == (result["reason"] == "")
    assert result["verdict"] in (HOLDS, FAILS, UNKNOWN)
    return result


def stated(*arguments: Any, **options: Any) -> tuple[str, str]:
    result = judged(*arguments, **options)
    return result["verdict"], result["reason"]


def few(n: int) -> str:
    return f"{n} subjects are few to choose heads on one half and test them on the other; give more"


# --- holds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "lists", "quantity", "before", "after"),
    [
        ("suppression", True, "p_previous", 0.2, 0.4),
        ("suppression", False, "p_remaining", 0.2, 0.4),
        ("recall", True, "p_remaining", 0.4, 0.2),
        ("recall", False, "p_remaining", 0.4, 0.2),
    ],
)
def test_what_holds_and_its_numbers(role: str, lists: bool, quantity: str, before: float, after: float) -> None:
    sets = [before + 0.001 * index for index in range(-25, 25)]
    result = judged(role, spread(before), spread(after), sets, before, lists=lists)
    assert (result["verdict"], result["reason"], result["quantity"]) == (HOLDS, "", quantity)
    assert result["baseline"] == pytest.approx(before) and result["ablated"] == pytest.approx(after)
    assert result["ratio"] == pytest.approx(after / before)
    assert result["change"] == pytest.approx(after - before)
    assert result["most_extreme_random_set"] == pytest.approx(max(sets) if after > before else min(sets))
    assert (result["largest_other"], result["p_value"], result["sets"]) == (before, 1 / 51, 50)
    # The same heads in the other direction do the opposite of what the role says.
    verdict, reason = stated(role, spread(after), spread(before), lists=lists)
    assert (verdict, reason) == (FAILS, "the change goes the other way and 50 of 50 random sets go as far (p = 1)")
    # A clear change is told among few subjects too.
    assert stated(role, spread(after, 4), spread(before, 4), lists=lists)[0] == FAILS


def test_a_quantity_that_falls_to_nothing_or_rises_from_it_holds() -> None:
    fallen = judged("recall", spread(0.4), [0.0] * N)
    assert (fallen["verdict"], fallen["ratio"], fallen["ratio_ci"]) == (HOLDS, 0.0, None)
    risen = judged("suppression", [0.0] * N, spread(0.4))
    assert (risen["verdict"], risen["ratio"], risen["ratio_ci"]) == (HOLDS, None, None)


def test_only_the_examples_that_have_the_quantity_count() -> None:
    values = {
        "baseline": [[0.3] * 20, spread(0.2) + [0.0] * 4],
        "ablate_suppression": [[0.3] * 20, spread(0.4) + [0.0] * 4],
    }
    by_name = {name: np.array(value, np.float32) for name, value in values.items()}
    by_name |= {f"random_suppression_{index}": by_name["baseline"] for index in range(50)}
    heads = HeadSet(model={}, task={}, method={}, roles=dict.fromkeys(ROLES, HEAD))
    rows_of = {"p_remaining": list(range(20)), "p_previous": list(range(N))}
    block = {"ablate_suppression": {}, "ablate_random_like_suppression": {}}
    subjects = [f"s{i}" for i in range(20)]
    result = dissociation("suppression", heads, block, by_name, rows_of, subjects, 50)
    alone = judged("suppression", spread(0.2), spread(0.4))
    for name in ("baseline", "ablated", "ratio", "change", "ratio_ci", "change_ci", "most_extreme_random_set"):
        assert result[name] == pytest.approx(alone[name])


# --- does not hold ----------------------------------------------------------------------------------------------------


def test_the_smallest_ratio_that_counts() -> None:
    """A change that is clear beyond doubt is still none worth a name."""
    assert stated("suppression", spread(0.2), spread(0.2 * 1.09)) == (FAILS, SMALL)
    assert stated("suppression", spread(0.2), spread(0.2 * 1.11)) == (HOLDS, "")
    assert stated("recall", spread(0.2), spread(0.2 / 1.09)) == (FAILS, SMALL)
    assert stated("recall", spread(0.2), spread(0.2 / 1.11)) == (HOLDS, "")
    assert SMALLEST_RATIO == 1.1


def test_the_smallest_change_that_counts() -> None:
    """Twice of almost nothing is almost nothing."""
    assert stated("suppression", spread(0.0007), spread(0.0014)) == (FAILS, SMALL)
    assert stated("suppression", spread(0.0011), spread(0.0022)) == (HOLDS, "")
    assert stated("recall", spread(0.0014), spread(0.0007)) == (FAILS, SMALL)
    assert stated("recall", [0.0014] * N, [0.0] * N) == (HOLDS, "")
    assert SMALLEST_CHANGE == 0.001


@pytest.mark.parametrize(
    ("n", "as_far", "p", "verdict"),
    [
        (50, 0, 1 / 51, HOLDS),
        (50, 1, 2 / 51, HOLDS),
        (50, 2, 3 / 51, FAILS),
        (50, 50, 1.0, FAILS),
        (19, 0, 1 / 20, HOLDS),
        (19, 1, 2 / 20, FAILS),
        (100, 4, 5 / 101, HOLDS),
        (100, 5, 6 / 101, FAILS),
    ],
)
def test_the_share_of_random_sets_that_go_as_far(n: int, as_far: int, p: float, verdict: str) -> None:
    for role, before, after, beyond in (("suppression", 0.2, 0.4, 0.5), ("recall", 0.4, 0.2, 0.1)):
        result = judged(role, spread(before), spread(after), [beyond] * as_far + [before] * (n - as_far))
        assert (result["p_value"], result["verdict"]) == (p, verdict)
        assert result["most_extreme_random_set"] == pytest.approx(beyond if as_far else before)
        if verdict == FAILS:
            assert result["reason"] == f"{as_far} of {n} random sets go as far (p = {p:.2g})"
    assert LEVEL == 0.05


def test_a_random_set_or_the_largest_heads_that_reach_the_same_go_as_far() -> None:
    same = np.full(N, 0.4, np.float32)
    assert stated("suppression", spread(0.2), same, [0.4] * 2 + [0.2] * 48)[0] == FAILS
    for role, before, less in (("suppression", 0.2, 0.399), ("recall", 0.6, 0.401)):
        reason = "the largest other heads of the same layers go as far"
        assert stated(role, spread(before), same, largest=float(same.astype(np.float64).mean())) == (FAILS, reason)
        assert stated(role, spread(before), same, largest=2 * 0.4 - less) == (FAILS, reason)
        assert stated(role, spread(before), same, largest=less) == (HOLDS, "")
        assert judged(role, spread(before), same)["largest_other"] is None


def test_a_change_that_is_not_distinguishable_from_none() -> None:
    """Half of the subjects rise by far, half fall by less: the mean rises, and says nothing."""
    mixed = [0.2 + (0.15 if i % 2 else -0.1) for i in range(N)]
    result = judged("suppression", [0.2] * N, mixed)
    assert result["ratio"] > 1.1 and result["change_ci"][0] < 0 < result["change_ci"][1]
    assert (result["verdict"], result["reason"]) == (FAILS, INDISTINCT)
    assert stated("recall", [0.2] * N, [0.4 - p for p in mixed]) == (FAILS, INDISTINCT)


def test_the_intervals_of_change_and_of_ratio_both_count() -> None:
    """A change can be clear where the ratio is not, and the other way round where few subjects have the most."""
    before = [0.34, 0.54, 0.2, 0.06, 0.53, 0.5, 0.41, 0.27, 0.24, 0.08, 0.44, 0.45, 0.22, 0.43, 0.09, 0.54]
    after = [0.43, 0.63, 0.22, 0.05, 0.55, 0.48, 0.36, 0.3, 0.48, 0.15, 0.44, 0.39, 0.42, 0.46, 0.17, 0.53]
    result = judged("suppression", before, after)
    assert result["ratio"] > 1.1 and result["change_ci"][0] > 0 and result["ratio_ci"][0] < 1 < result["ratio_ci"][1]
    assert (result["verdict"], result["reason"]) == (FAILS, INDISTINCT)
    before = [0.02, 0.13, 0.01, 0.09, 0.08, 0.02, 0.02, 0.15, 0.01, 0.21, 0.07, 0.05]
    after = [0.1, 0.1, 0.03, 0.07, 0.17, 0.04, 0.02, 0.6, 0.03, 0.2, 0.35, 0.05]
    result = judged("suppression", before, after)
    assert result["ratio_ci"][0] > 1.05 and result["change_ci"][0] < 0 < result["change_ci"][1]
    assert not result["held"] and result["reason"].startswith(INDISTINCT)


def test_all_reasons_are_given() -> None:
    assert stated("suppression", spread(0.2), spread(0.21), [0.3] * 50, largest=0.4) == (
        FAILS,
        f"{SMALL} and 50 of 50 random sets go as far (p = 1) and the largest other heads of the same layers go as far",
    )


def test_prompts_of_one_subject_are_one_subject() -> None:
    """32 prompts, one subject that changes: no change that can be told from none."""
    subjects = [f"s{i // 2}" for i in range(2 * N)]
    before, after = [0.2] * 2 * N, [0.9] * 2 + [0.2] * (2 * N - 2)
    assert stated("suppression", before, after, subjects=subjects)[1] == INDISTINCT
    once = judged("suppression", spread(0.2), spread(0.4, by=0.3))
    twice = judged("suppression", np.repeat(spread(0.2), 2), np.repeat(spread(0.4, by=0.3), 2), subjects=subjects)
    assert twice["change_ci"] == pytest.approx(once["change_ci"]) and twice["ratio_ci"] == pytest.approx(
        once["ratio_ci"]
    )


# --- cannot be told ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "verdict"), [(4, UNKNOWN), (ENOUGH - 1, UNKNOWN), (ENOUGH, FAILS), (40, FAILS)])
def test_nothing_seen_among_few_subjects_is_no_proof_of_nothing(n: int, verdict: str) -> None:
    less = f" ({few(n)})" if verdict == UNKNOWN else ""
    for role in ROLES:
        assert stated(role, spread(0.2, n), spread(0.4, n), chosen=False) == (verdict, f"no confirmed heads{less}")
        assert stated(role, spread(0.2, n), spread(0.4, n), silenced=False) == (
            verdict,
            "no head has the role's sign on both halves of the subjects",
        )
    less = f", and {few(n)}" if verdict == UNKNOWN else ""
    assert stated("suppression", spread(0.2, n), spread(0.2, n)[::-1])[1].startswith(f"{INDISTINCT}{less}")
    assert stated("suppression", spread(0.2, n), spread(0.2, n)[::-1])[0] == verdict
    # A clear change is told whatever the number, and so is one that is clearly too small, or no more than others do.
    assert stated("suppression", spread(0.2, n), spread(0.4, n)) == (HOLDS, "")
    assert stated("suppression", spread(0.2, n), spread(0.21, n)) == (FAILS, SMALL)
    assert stated("suppression", spread(0.2, n), spread(0.4, n), largest=0.5)[0] == FAILS


@pytest.mark.parametrize("n", [1, 2, 3])
def test_two_subjects_in_each_half_are_the_least(n: int) -> None:
    result = judged("suppression", spread(0.2, n), spread(0.4, n))
    assert (result["verdict"], result["reason"]) == (UNKNOWN, few(n))
    assert result["ratio"] == pytest.approx(2) and (result["change_ci"] is None) == (n == 1)
    assert stated("suppression", spread(0.2, 4), spread(0.4, 4)) == (HOLDS, "")


@pytest.mark.parametrize("n", [1, 18])
def test_too_few_random_sets_cannot_tell(n: int) -> None:
    """Even if none goes as far, p is above 0.05."""
    result = judged("suppression", spread(0.2), spread(0.4), [0.2] * n)
    reason = f"{n} random sets of heads are all there is to compare with, and 19 are needed to tell"
    assert (result["verdict"], result["reason"], result["sets"]) == (UNKNOWN, reason, n)
    assert result["p_value"] == 1 / (1 + n) > LEVEL >= 1 / (1 + FEWEST_SETS)


def test_no_random_sets_is_the_reason_of_the_block() -> None:
    assert judged("suppression", spread(0.2), spread(0.4), [-1]) == {
        "verdict": UNKNOWN,
        "held": False,
        "reason": "of the block",
    }


def test_answers_that_the_model_does_not_give_cannot_tell() -> None:
    for role, before, after in (("suppression", 0.0004, 0.0009), ("recall", 0.0009, 0.0004)):
        result = judged(role, spread(before), spread(after))
        assert (result["verdict"], result["reason"]) == (UNKNOWN, "the model gives these answers less than 0.1%")
    assert stated("suppression", spread(0.0004), spread(0.4)) == (HOLDS, ""), (
        "it gives them once they are not held back"
    )


# --- intervals --------------------------------------------------------------------------------------------------------


def test_intervals_against_a_plain_recomputation() -> None:
    """Seven subjects with one to four examples each: leave one out, by loops; t from the tables."""
    generator = np.random.default_rng(0)
    subjects = [f"s{i}" for i in (0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 6, 6, 6)]
    before = generator.uniform(0.1, 0.3, len(subjects))
    after = before * generator.uniform(1.2, 2.0, len(subjects))
    names, change = sorted(set(subjects)), after - before

    def without(name: str) -> float:
        return float(np.mean([value for value, subject in zip(change, subjects, strict=True) if subject != name]))

    left = [without(name) for name in names]
    error = math.sqrt(6 / 7 * sum((value - np.mean(left)) ** 2 for value in left))
    result = change_interval(before, after, subjects)
    assert result["mean"] == pytest.approx(change.mean())
    assert result["ci"] == pytest.approx([change.mean() - T6 * error, change.mean() + T6 * error], rel=1e-5)

    total = 0.0
    for name in names:
        rows = [i for i, subject in enumerate(subjects) if subject == name]
        total += (sum(after[rows]) / sum(after) - sum(before[rows]) / sum(before)) ** 2
    width = T6 * math.sqrt(7 / 6 * total)
    ratio, interval = ratio_of_means(before, after, subjects)
    assert ratio == pytest.approx(sum(after) / sum(before))
    assert interval == pytest.approx([ratio * math.exp(-width), ratio * math.exp(width)], rel=1e-5)
    # And they are what a verdict has.
    verdict = judged("suppression", before, after, subjects=subjects)
    assert verdict["change_ci"] == pytest.approx(result["ci"], rel=1e-5)
    assert verdict["ratio_ci"] == pytest.approx(interval, rel=1e-5)


def test_the_interval_of_a_ratio_holds_the_true_one_about_as_often_as_it_says() -> None:
    """16 subjects whose probabilities differ tenfold, each with a ratio of its own: 95 of 100 intervals hold 1.5."""
    generator = np.random.default_rng(0)
    subjects, inside = [f"s{i}" for i in range(N)], 0
    for _ in range(400):
        before = generator.uniform(0.03, 0.3, N)
        after = before * generator.uniform(1.0, 2.0, N)
        low, high = ratio_of_means(before, after, subjects)[1]
        inside += low < 1.5 < high
    assert 0.92 <= inside / 400 <= 0.98


def test_a_ratio_of_one_subject_or_of_nothing_has_no_interval() -> None:
    assert ratio_of_means(np.array([0.1, 0.3]), np.array([0.2, 0.4]), ["a", "a"]) == (pytest.approx(1.5), None)
    assert ratio_of_means(np.zeros(2), np.ones(2), ["a", "b"]) == (None, None)
    assert ratio_of_means(np.ones(2), np.zeros(2), ["a", "b"]) == (0.0, None)
