"""On scores made by hand: who is ranked, in which order, who is turned away, and how stable the choice is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from headtune.analysis.heads.controls import lowest
from headtune.analysis.heads.ranking import elbow, rank, rule_for, stability
from headtune.analysis.methods.scores import Scores
from headtune.analysis.utils.errors import InputError

SHAPE = (4, 5)
Effects = dict[tuple[int, int], float]


def scores_of(n_subjects: int = 12, noise: float = 0.05, background: float = 0.0, **quantities: Effects) -> Scores:
    """Two examples a subject; every head has noise around `background`, those named noise around their own effect.

    Quantities are named `dla_target`, `ablation_previous` and so on.
    """
    generator = np.random.default_rng(0)
    by_example = {}
    for name, effects in quantities.items():
        mean = np.full(SHAPE, background)
        for head, effect in effects.items():
            mean[head] = effect
        values = mean + generator.normal(0, noise, (2 * n_subjects, *SHAPE))
        by_example[name.replace("_", ".", 1)] = values.astype(np.float32)
    return Scores(by_example, [f"s{i // 2}" for i in range(2 * n_subjects)])


def names(scores: Scores, role: str, top: int | None = 3) -> list[str]:
    return [head.name for head in rank(scores, role, top)]


RECALL = {(1, 2): 2.0, (3, 4): 3.0, (0, 0): 1.0, (2, 2): 0.5}
SUPPRESSION = {(3, 3): -1.0, (1, 1): -4.0, (2, 0): -2.0}


def clear() -> Scores:
    return scores_of(dla_target=RECALL, ablation_target=RECALL, dla_previous=SUPPRESSION, ablation_previous=SUPPRESSION)


def test_best_first() -> None:
    assert names(clear(), "recall") == ["L3H4", "L1H2", "L0H0"]
    assert names(clear(), "suppression") == ["L1H1", "L2H0", "L3H3"]
    assert names(clear(), "recall", top=1) == ["L3H4"]


def test_what_speaks_for_a_head() -> None:
    best = rank(clear(), "suppression", 1)[0]
    assert best.score == pytest.approx(-4.0, abs=0.05)
    assert best.ci[0] < best.score < best.ci[1] < 0
    assert set(best.effect) == {"dla.target", "dla.previous", "ablation.target", "ablation.previous"}
    assert best.effect["ablation.previous"] == pytest.approx(-4.0, abs=0.05)
    assert best.effect["dla.target"] == pytest.approx(0.0, abs=0.05)


def test_attribution_orders_and_ablation_confirms() -> None:
    """The order is attribution's; a head whose ablation does nothing, or the opposite, is turned away."""
    ablation = {(1, 2): 9.0, (3, 4): -3.0, (0, 0): 1.0, (2, 2): 0.5}
    scores = scores_of(dla_target=RECALL, ablation_target=ablation)
    assert names(scores, "recall") == ["L1H2", "L0H0", "L2H2"]
    ablation = {(3, 3): -1.0, (1, 1): 4.0, (2, 0): -2.0}
    scores = scores_of(dla_previous=SUPPRESSION, ablation_previous=ablation)
    assert names(scores, "suppression") == ["L2H0", "L3H3"]


def test_ablation_of_one_quantity_does_not_confirm_the_other() -> None:
    scores = scores_of(dla_target=RECALL, ablation_target={}, ablation_previous=RECALL, dla_previous={})
    assert not {"L3H4", "L1H2"} & set(names(scores, "recall", top=20))


def test_effects_within_their_noise_are_not_confirmed() -> None:
    """A large mean that hangs on one subject has an interval that reaches zero."""
    scores = scores_of(dla_target=RECALL, ablation_target=RECALL)
    scores.by_example["ablation.target"][:, 3, 4] = 0
    scores.by_example["ablation.target"][:2, 3, 4] = 50
    assert names(scores, "recall") == ["L1H2", "L0H0", "L2H2"]


def test_no_head_has_both_roles() -> None:
    target = {(0, 1): 2.0, (3, 3): -2.0}
    scores = scores_of(dla_target=target, ablation_target=target)
    recall, suppression = (set(names(scores, role, 20)) for role in ("recall", "suppression"))
    assert "L0H1" in recall and "L3H3" in suppression and not recall & suppression


def test_fewer_than_top_where_fewer_are_confirmed() -> None:
    scores = scores_of(background=-1.0, dla_target=RECALL, ablation_target=RECALL)
    assert names(scores, "recall", top=20) == ["L3H4", "L1H2", "L0H0", "L2H2"]


def test_without_ablation_attribution_decides() -> None:
    assert names(scores_of(dla_target=RECALL, dla_previous=SUPPRESSION), "suppression") == ["L1H1", "L2H0", "L3H3"]


def test_without_attribution_ablation_ranks() -> None:
    scores = scores_of(ablation_target=RECALL, ablation_previous=SUPPRESSION)
    assert names(scores, "recall") == ["L3H4", "L1H2", "L0H0"]
    assert names(scores, "suppression") == ["L1H1", "L2H0", "L3H3"]


def test_without_previous_answers_suppression_is_of_the_correct_one() -> None:
    single = {(0, 1): 2.0, (3, 3): -2.0, (3, 1): -1.0}
    scores = scores_of(dla_target=single, ablation_target=single)
    assert rule_for("suppression", scores) == ("dla.target", -1.0, "ablation.target")
    assert names(scores, "suppression", 2) == ["L3H3", "L3H1"]
    assert rule_for("suppression", clear()) == ("dla.previous", -1.0, "ablation.previous")
    assert rule_for("recall", clear()) == ("dla.target", 1.0, "ablation.target")
    assert rule_for("suppression", scores_of(ablation_target=single))[0] == "ablation.target"


def test_some_examples_without_previous_answers() -> None:
    scores = clear()
    for name in ("dla.previous", "ablation.previous"):
        scores.by_example[name][:10] = np.nan
    assert names(scores, "suppression") == ["L1H1", "L2H0", "L3H3"]
    assert stability(scores, "suppression", 3) == 1.0


def test_stability_of_a_clear_choice_and_of_noise() -> None:
    assert stability(clear(), "recall", 4) == 1.0
    assert stability(clear(), "suppression", 3) == 1.0
    noise = scores_of(noise=1.0, dla_target={}, ablation_target={})
    assert stability(noise, "recall", 4) < 0.7
    assert stability(noise, "recall", 4) == stability(noise, "recall", 4)


def test_stability_counts_confirmed_heads_only() -> None:
    """Heads turned away must neither fill up the choice nor make it look stable."""
    one = {(3, 4): 3.0}
    scores = scores_of(background=-1.0, dla_target=one, ablation_target=one)
    assert stability(scores, "recall", 8) == 1.0
    # Now the only confirmed head is confirmed in about half of the resamplings.
    scores.by_example["ablation.target"][:, 3, 4] = 0.001 + np.repeat([1, -1], 12)
    assert 0.2 < stability(scores, "recall", 8) < 0.8
    scores.by_example["ablation.target"][:] = -1
    assert stability(scores, "recall", 8) == 0.0
    assert rank(scores, "recall", 8) == []


def test_stability_where_few_subjects_have_previous_answers() -> None:
    """A resampling without any of them says nothing and is not counted against the choice."""
    scores = clear()
    for name in ("dla.previous", "ablation.previous"):
        scores.by_example[name][2:] = np.nan
    assert stability(scores, "suppression", 3) == 1.0


# --- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "bend"),
    [
        ([10, 4, 1, 0.9, 0.8, 0.7], 2),  # falls, then flat
        ([0, 6, 9, 9.1, 9.2, 9.3], 2),  # rises, then flat
        ([0, 0.1, 0.2, 0.3, 5, 10], 3),  # late: farthest below the chord
        ([0, -6, -9, -9.1, -9.2], 2),
        ([1, 1, 1, 0], 2),
        ([1, 0, 0, 0], 1),
        ([3, 2, 1, 0], 3),  # the chord itself
        ([0.3, 0.2, 0.1, 0.0], 3),  # and with rounding
        ([5, 5, 5], 1),  # nothing happens
        ([0, 1, 0], 1),  # it comes back: no chord to be far from
        ([7], 1),
        ([7, 3], 1),
        ([1e-30, 5e-31, 1e-31, 0.9e-31], 2),  # probabilities may be tiny
    ],
)
def test_elbow(curve: list[float], bend: int) -> None:
    assert elbow(curve) == bend


def test_the_elbow_does_not_depend_on_unit_or_sign() -> None:
    curve = np.array([10, 4, 2, 1.5, 1.2, 1])
    assert len({elbow((scale * curve + shift).tolist()) for scale in (1, -3, 1e-6) for shift in (0, 5)}) == 1


def test_top_none_is_every_confirmed_head() -> None:
    ranked = rank(scores_of(background=-1.0, dla_target=RECALL, ablation_target=RECALL), "recall", None)
    assert [head.name for head in ranked] == ["L3H4", "L1H2", "L0H0", "L2H2"]
    assert rank(scores_of(background=-1.0, dla_target={}, ablation_target={}), "recall", None) == []


def test_threshold() -> None:
    scores = clear()

    def kept(role: str, threshold: float) -> list[str]:
        return [head.name for head in rank(scores, role, None, threshold=threshold)]

    assert kept("recall", 0.75) == ["L3H4", "L1H2", "L0H0"] and kept("recall", 5.0) == []
    assert kept("suppression", 1.5) == ["L1H1", "L2H0"], "a distance from zero: positive for both roles"
    assert [head.name for head in rank(scores, "recall", 2, threshold=0.75)] == ["L3H4", "L1H2"]
    assert rank(scores, "recall", 3, threshold=0.0) == rank(scores, "recall", 3)


# --- which scores -----------------------------------------------------------------------------------------------------


def several(*methods: str, whole: Sequence[str] = (), quantities: Sequence[str] = ("target", "previous")) -> Scores:
    """Scores of these methods, numbers at random."""
    generator = np.random.default_rng(0)
    by_example = {
        f"{m}.{q}": generator.normal(size=(8, *SHAPE)).astype(np.float32) for m in methods for q in quantities
    }
    of_task = {f"{m}.{q}": generator.normal(size=SHAPE).astype(np.float32) for m in whole for q in quantities}
    return Scores(by_example, [f"s{i}" for i in range(8)], of_task)


@pytest.mark.parametrize(
    ("methods", "whole", "finder", "confirms"),
    [
        (["dla", "ablation"], [], "dla", "ablation"),
        (["mean", "dla"], [], "dla", "mean"),
        (["path", "mean", "ablation_all", "dla", "ablation"], [], "dla", "ablation"),
        (["dla", "attribution_patching"], [], "dla", "dla"),  # an estimate confirms nothing
        (["attribution_patching", "mean"], [], "mean", "mean"),
        (["attribution_patching"], [], "attribution_patching", "attribution_patching"),
        (["resample_all", "corrupt"], [], "corrupt", "corrupt"),  # in the order of the table of methods
        ([], ["gates"], "gates", "gates"),
        (["dla"], ["gates"], "dla", "dla"),  # gates have no interval to confirm by
        (["mean"], ["gates"], "mean", "mean"),
    ],
)
def test_rule(methods: list[str], whole: list[str], finder: str, confirms: str) -> None:
    for role, quantity in (("recall", "target"), ("suppression", "previous")):
        sign = 1.0 if role == "recall" else -1.0
        rule = rule_for(role, several(*methods, whole=whole))
        assert rule == (f"{finder}.{quantity}", sign, f"{confirms}.{quantity}")
        single = rule_for(role, several(*methods, whole=whole, quantities=["target"]))
        assert single == (f"{finder}.target", sign, f"{confirms}.target")


def test_scores_that_rank_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="no 'target' quantity of any method"):
        rule_for("suppression", several("lens.subject"))


def test_the_intervention_confirms_where_ablation_was_not_run() -> None:
    """The same heads, the same order; that of another method's effect is the one turned away."""
    effect = {(1, 2): 9.0, (3, 4): -3.0, (0, 0): 1.0, (2, 2): 0.5}
    scores = scores_of(dla_target=RECALL, mean_target=effect)
    assert names(scores, "recall") == ["L1H2", "L0H0", "L2H2"]


def test_gates_rank_without_intervals() -> None:
    values = np.zeros(SHAPE, np.float32)
    values[1, 2], values[3, 3], values[0, 1] = 0.5, 0.9, -0.8
    scores = Scores({}, list("abcd"), {"gates.target": values, "gates.previous": -values, "gates.irrelevant": values})
    ranked = rank(scores, "recall", 8)
    assert [(head.name, head.ci) for head in ranked] == [("L3H3", None), ("L1H2", None)]
    assert ranked[0].score == pytest.approx(0.9) and ranked[0].effect["gates.previous"] == pytest.approx(-0.9)
    assert [head.name for head in rank(scores, "suppression", 8)] == ["L3H3", "L1H2"]
    assert stability(scores, "recall", 2) is None
    assert [head.name for head in rank(scores, "recall", 8, threshold=0.6)] == ["L3H3"]


# --- the control of least evidence ------------------------------------------------------------------------------------


def test_lowest_takes_the_heads_nearest_to_zero_of_the_same_layers() -> None:
    scores = scores_of(
        noise=0.0,
        background=-1.0,
        dla_target=RECALL | {(1, 4): 0.1, (1, 0): -0.2, (3, 0): 0.3, (3, 1): -0.1},
        ablation_target=RECALL,
    )
    assert lowest(scores, "recall", [(1, 2)]) == [(1, 4)]
    assert lowest(scores, "recall", [(3, 4), (1, 2)]) == [(1, 4), (3, 1)]
    assert lowest(scores, "recall", [(1, 2), (1, 4)]) == [(1, 0), (1, 1)], "the chosen are no control of themselves"
    assert lowest(scores, "recall", []) == []


def test_lowest_of_a_crowded_layer_is_what_is_left() -> None:
    scores = scores_of(dla_target={})
    found = lowest(scores, "recall", [(2, head) for head in range(4)])
    assert found == [(2, 4)] and lowest(scores, "recall", [(2, head) for head in range(5)]) == []


def test_lowest_is_by_the_score_that_ranks() -> None:
    scores = scores_of(noise=0.0, background=1.0, dla_previous={(1, 3): 0.0}, dla_target={(1, 4): 0.0})
    assert lowest(scores, "suppression", [(1, 0)]) == [(1, 3)] and lowest(scores, "recall", [(1, 0)]) == [(1, 4)]
