"""On scores made by hand: who is ranked, in which order, who is turned away, and how stable the choice is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from headtune.analysis.heads.head_set import ROLES
from headtune.analysis.heads.ranking import FDR, RANKINGS, Rule, elbow, p_values, rank, rule_for, stability
from headtune.analysis.methods.scores import Scores
from headtune.analysis.utils.errors import InputError

SHAPE = (4, 5)
Effects = dict[tuple[int, int], float]


def scores_of(n_subjects: int = 12, noise: float = 0.05, background: float = 0.0, **quantities: Effects) -> Scores:
    """Two examples a subject; every head has noise around `background`, those named noise around their own effect.

    Quantities are named `dla_target`, `ablation_previous_contrast` and so on.
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
    assert set(best.effect) == {"dla.target", "dla.previous", "ablation.target", "ablation.previous", "p", "q"}
    assert 0 < best.effect["p"] < best.effect["q"] < 1e-6
    assert best.effect["ablation.previous"] == pytest.approx(-4.0, abs=0.05)
    assert best.effect["dla.target"] == pytest.approx(0.0, abs=0.05)


def test_attribution_orders_and_ablation_confirms() -> None:
    """The order is attribution's; a head whose ablation does nothing, or the opposite, is turned away."""
    ablation = {(1, 2): 9.0, (3, 4): -3.0, (0, 0): 1.0, (2, 2): 0.5}
    scores = scores_of(dla_target=RECALL, ablation_target=ablation)
    assert names(scores, "recall") == ["L1H2", "L0H0", "L2H2"]
    ablation = {(3, 3): -1.0, (1, 1): 4.0, (2, 0): -2.0}
    scores = scores_of(dla_target={}, ablation_target={}, dla_previous=SUPPRESSION, ablation_previous=ablation)
    assert names(scores, "suppression") == ["L2H0", "L3H3"]


def test_ablation_of_one_quantity_does_not_confirm_the_other() -> None:
    scores = scores_of(dla_target=RECALL, ablation_target={}, ablation_previous=RECALL, dla_previous={})
    assert not {"L3H4", "L1H2"} & set(names(scores, "recall", top=20))


def test_effects_within_their_noise_are_not_confirmed() -> None:
    """A large mean that hangs on one subject is no evidence, however many of its prompts there are."""
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
    assert rule_for("suppression", scores) == Rule("dla.target", -1.0, ("ablation.target",))
    assert names(scores, "suppression", 2) == ["L3H3", "L3H1"]
    assert rule_for("suppression", clear()) == Rule("dla.previous", -1.0, ("ablation.previous",))
    assert rule_for("recall", clear()) == Rule("dla.target", 1.0, ("ablation.target",))
    assert rule_for("suppression", scores_of(ablation_target=single)).rank == "ablation.target"


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


# --- contrast ---------------------------------------------------------------------------------------------------------

FORMS = ("", "_contrast", "_centred", "_logp", "_p")
EVERY_FORM = {f"{method}_{name}{form}": {} for method in ("dla", "ablation") for name in ("target", "previous")
              for form in FORMS if method == "ablation" or form not in ("_logp", "_p")}  # fmt: skip


def formed(**quantities: Effects) -> Scores:
    """Scores in every form; those not named are noise around 0."""
    return scores_of(**EVERY_FORM | quantities)


def test_heads_are_ranked_by_contrast() -> None:
    """The raw logits order them the other way round."""
    turned = {(3, 4): 1.0, (1, 2): 2.0, (0, 0): 3.0}
    scores = formed(
        dla_target=RECALL, dla_target_contrast=turned, ablation_target_contrast=turned, ablation_target_logp=turned
    )
    assert names(scores, "recall", 9) == ["L0H0", "L1H2", "L3H4"]
    low = {head: -effect for head, effect in turned.items()}
    scores = formed(
        dla_previous=SUPPRESSION,
        dla_previous_contrast=low,
        ablation_previous_contrast=low,
        ablation_previous_logp=low,
    )
    assert names(scores, "suppression", 9) == ["L0H0", "L1H2", "L3H4"]
    assert rank(scores, "suppression", 1)[0].score == pytest.approx(-3.0, abs=0.05)


def test_a_head_that_lifts_all_answers_alike_has_no_role_unless_raw_logits_rank() -> None:
    alike = {(2, 1): 5.0}
    both = RECALL | alike
    scores = formed(
        dla_target=both,
        dla_target_contrast=RECALL,
        dla_target_centred=both,  # it lifts the answers of all subjects above the rest of the vocabulary
        ablation_target=both,
        ablation_target_contrast=RECALL,
        ablation_target_centred=both,
        ablation_target_logp=both,
    )
    assert names(scores, "recall", 9) == ["L3H4", "L1H2", "L0H0", "L2H2"]
    for by in ("raw", "centred"):
        ranked = rank(scores, "recall", 9, by=by)
        assert [head.name for head in ranked] == ["L2H1", "L3H4", "L1H2", "L0H0", "L2H2"]
        assert ranked[0].score == pytest.approx(5.0, abs=0.05)
    assert stability(scores, "recall", 4) == stability(scores, "recall", 5, by="raw") == 1.0


@pytest.mark.parametrize("quantity", ["dla_target_contrast", "ablation_target_contrast", "ablation_target_logp"])
def test_attribution_effect_and_probability_must_all_have_the_sign(quantity: str) -> None:
    """Each can turn a head away: with no effect, and with the opposite one."""
    right = dict.fromkeys(("dla_target_contrast", "ablation_target_contrast", "ablation_target_logp"), RECALL)
    for wrong in (0.0, -3.0):
        scores = formed(**right | {quantity: RECALL | {(3, 4): wrong}})
        assert names(scores, "recall", 9) == ["L1H2", "L0H0", "L2H2"]
    # What does not rank or confirm, the raw logits among it, has no say.
    scores = formed(**right | {"ablation_target": {(3, 4): -3.0}, "dla_target": {(3, 4): -3.0}})
    assert names(scores, "recall", 1) == ["L3H4"]


def test_the_rule_of_each_ranking() -> None:
    scores = formed()
    for role, quantity, sign in (("recall", "target", 1.0), ("suppression", "previous", -1.0)):

        def rule(form: str, *more: str, at: tuple[str, float] = (quantity, sign)) -> Rule:
            name, direction = at
            return Rule(
                f"dla.{name}{form}", direction, (f"ablation.{name}{form}", *(f"ablation.{name}{m}" for m in more))
            )

        assert rule_for(role, scores) == rule_for(role, scores, "contrast") == rule("_contrast", "_logp")
        assert rule_for(role, scores, "centred") == rule("_centred", "_logp")
        assert rule_for(role, scores, "raw") == rule(""), "as it was before there was a contrast"
        assert rule_for(role, scores).to_json() == {
            "rank": f"dla.{quantity}_contrast",
            "sign": sign,
            "confirm": [f"ablation.{quantity}_contrast", f"ablation.{quantity}_logp"],
        }


def test_a_method_without_that_form_ranks_by_the_form_it_has() -> None:
    scores = scores_of(dla_target=RECALL, dla_target_contrast=RECALL, mean_target=RECALL, mean_target_logp=RECALL)
    assert rule_for("recall", scores) == Rule("dla.target_contrast", 1.0, ("mean.target", "mean.target_logp"))
    assert rule_for("recall", scores, "centred").rank == "dla.target"


@pytest.mark.parametrize("by", ["contrsat", "mean", ""])
def test_an_unknown_ranking_is_one_clear_error(by: str) -> None:
    for call in (lambda: rule_for("recall", formed(), by), lambda: rank(formed(), "recall", 3, by=by)):
        with pytest.raises(InputError, match=f"rank_by '{by}' is unknown; ") as error:
            call()
        assert ("contrast" in str(error.value)) and "\n" not in str(error.value)
    assert set(RANKINGS) == {"contrast", "centred", "raw"}


# --- how sure ---------------------------------------------------------------------------------------------------------


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """q by the definition: the least rate at which a test is among those rejected."""
    q = []
    for mine in p:
        rates = [other * len(p) / sum(each <= other for each in p) for other in p if other >= mine]
        q.append(min(1.0, *rates))
    return q


def test_p_is_the_largest_of_the_tests_and_q_is_over_all_heads_and_both_roles() -> None:
    scores = formed(
        dla_target_contrast=RECALL, ablation_target_contrast=RECALL, ablation_target_logp=RECALL,
        dla_previous_contrast=SUPPRESSION, ablation_previous_contrast=SUPPRESSION, ablation_previous_logp=SUPPRESSION,
    )  # fmt: skip
    p = {}
    for role, name, sign in (("recall", "target", 1.0), ("suppression", "previous", -1.0)):
        parts = [f"dla.{name}_contrast", f"ablation.{name}_contrast", f"ablation.{name}_logp"]
        p[role] = np.max([scores.p_values(part, sign) for part in parts], axis=0)
        assert np.array_equal(p_values(scores, rule_for(role, scores)), p[role])
    q = np.reshape(benjamini_hochberg([*p["recall"].flat, *p["suppression"].flat]), (2, *SHAPE))
    for index, role in enumerate(ROLES):
        ranked = rank(scores, role, None, fdr=None)
        assert len(ranked) > 4
        for head in ranked:
            assert head.effect["p"] == pytest.approx(p[role][head.layer, head.head])
            assert head.effect["q"] == pytest.approx(q[index, head.layer, head.head])
        confirmed = [head for head in ranked if head.effect["q"] <= FDR]
        assert rank(scores, role, None) == confirmed and len(confirmed) < len(ranked)
        strict = sorted(head.effect["q"] for head in ranked)[0]
        assert rank(scores, role, None, fdr=strict) == [head for head in ranked if head.effect["q"] <= strict]
        assert len(rank(scores, role, None, fdr=strict)) < len(confirmed)


def test_more_prompts_about_the_same_subjects_are_no_more_evidence() -> None:
    scores = formed(dla_target_contrast=RECALL, ablation_target_contrast=RECALL, ablation_target_logp=RECALL)
    twice = Scores(
        {name: np.concatenate([values, values]) for name, values in scores.by_example.items()}, [*scores.subjects] * 2
    )
    once, again = (rank(each, "recall", None) for each in (scores, twice))
    assert [head.name for head in once] == [head.name for head in again]
    for head, other in zip(once, again, strict=True):
        assert other.effect["p"] == pytest.approx(head.effect["p"], rel=1e-4)
        assert other.ci == pytest.approx(head.ci, rel=1e-4)


def random_scores(generator: np.random.Generator, shape: tuple[int, int], confirmed: bool) -> Scores:
    """Noise around 0 for 20 subjects, alone or with what confirms it: as much noise again."""
    parts = ["dla.{}", "dla.{}_contrast"]
    parts += ["ablation.{}", "ablation.{}_contrast", "ablation.{}_logp"] if confirmed else []
    names = [part.format(quantity) for part in parts for quantity in ("target", "previous")]
    by_example = {name: generator.normal(size=(20, *shape)).astype(np.float32) for name in names}
    return Scores(by_example, [f"s{i}" for i in range(20)])


@pytest.mark.parametrize(("confirmed", "tasks", "at_most"), [(False, 200, 17), (True, 30, 0)])
def test_noise_confirms_a_head_in_one_of_twenty_tasks_at_most(confirmed: bool, tasks: int, at_most: int) -> None:
    """Tasks without any head of either role. One test: 10 of 200 are expected, more than 17 in one of 100 tries.
    Three that must agree by chance are stricter."""
    generator = np.random.default_rng(1)
    wrong = 0
    for _ in range(tasks):
        scores = random_scores(generator, (6, 8), confirmed)
        wrong += bool(rank(scores, "recall", 1) or rank(scores, "suppression", 1))
    assert wrong <= at_most
    assert confirmed or wrong > 1, "nor is it so strict that nothing ever passes"
    assert rank(scores, "recall", None, fdr=None), "the signs of the means alone would do"


def test_of_the_heads_that_are_confirmed_few_are_so_by_chance() -> None:
    """Five true heads of 48, an effect of 1.2 standard deviations: most are confirmed, few others are."""
    generator = np.random.default_rng(0)
    rates, recalled = [], []
    true = [(0, 0), (1, 3), (3, 5), (4, 4), (5, 7)]
    for _ in range(40):
        scores = random_scores(generator, (6, 8), confirmed=False)
        for layer, head in true:
            scores.by_example["dla.target_contrast"][:, layer, head] += 1.2
        heads = [(each.layer, each.head) for each in rank(scores, "recall", None)]
        others = rank(scores, "suppression", None)
        wrong = len(set(heads) - set(true)) + len(others)
        rates.append(wrong / max(1, len(heads) + len(others)))
        recalled.append(len(set(heads) & set(true)) / len(true))
    assert np.mean(rates) <= 0.07 and np.mean(recalled) >= 0.9


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
        assert rule == Rule(f"{finder}.{quantity}", sign, (f"{confirms}.{quantity}",))
        single = rule_for(role, several(*methods, whole=whole, quantities=["target"]))
        assert single == Rule(f"{finder}.target", sign, (f"{confirms}.target",))


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
    assert not {"p", "q"} & set(ranked[0].effect), "one fit for the task has no test"
    assert [head.name for head in rank(scores, "suppression", 8)] == ["L3H3", "L1H2"]
    assert stability(scores, "recall", 2) is None
    assert [head.name for head in rank(scores, "recall", 8, threshold=0.6)] == ["L3H3"]
