"""On scores made by hand: who is ranked, in which order, who is turned away, and how stable the choice is."""

from __future__ import annotations

import numpy as np
import pytest

from headtune.analysis.scores import Scores
from headtune.analysis.selection import rank, rule_for, stability

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


def names(scores: Scores, role: str, top: int = 3) -> list[str]:
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
