"""Planted models: they do the task, the planted heads are what makes them do it, and the metrics count right."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from headtune.analysis.identify.pipeline import IdentifyResult, identify
from headtune.analysis.methods.patching import silenced_logits
from headtune.analysis.methods.scores import Array
from headtune.analysis.models import hooks
from headtune.analysis.models.attention import record_rows
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import load_model
from headtune.analysis.synthetic import metrics
from headtune.analysis.synthetic.metrics import Head
from headtune.analysis.synthetic.planted import KINDS, PlantedModel, plant
from headtune.analysis.synthetic.planting import Planting
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.errors import InputError

BY_NAME = {kind.name: kind for kind in KINDS}
EVERY = [*((name, 0) for name in BY_NAME), ("gqa", 1), ("redundant", 1)]


@functools.cache
def planted(name: str, seed: int = 0) -> PlantedModel:
    return plant(replace(BY_NAME[name], seed=seed))


@functools.cache
def view_of(name: str, seed: int = 0) -> HeadModel:
    return planted(name, seed).view()


@functools.cache
def found(name: str, seed: int = 0) -> IdentifyResult:
    model = planted(name, seed)
    return identify(view_of(name, seed), some(model), top=len(model.truth("recall")[0]), verify_top=3)


def some(model: PlantedModel) -> Task:
    return model.task.limited(24)


def examples_of(name: str, seed: int = 0) -> list[Encoded]:
    return found(name, seed).examples


def score(name: str, seed: int, quantity: str, heads: Sequence[Head]) -> Array:
    mean = found(name, seed).scores.mean(quantity)
    return np.array([mean[head] for head in heads])


@pytest.mark.parametrize(("name", "seed"), EVERY)
def test_the_model_gives_a_remaining_answer_and_the_suppression_heads_hold_back_the_others(
    name: str, seed: int
) -> None:
    model, heads = planted(name, seed), view_of(name, seed)
    right, lowered, gap = [], [], []
    for example in encode(model.task, heads.tokenizer).examples:
        clean, unsuppressed = silenced_logits(heads, example.tokens, [(), model.roles["suppression"]]).float()
        right.append(int(clean.argmax()) in example.target_tokens)
        previous = list(example.previous_tokens)
        lowered.append(float((unsuppressed[previous] - clean[previous]).min()))
        gap.append(float(unsuppressed[previous].mean() - unsuppressed[list(example.target_tokens)].mean()))
    assert np.mean(right) >= 0.95
    assert min(lowered) > 1 and np.mean(lowered) > 5
    # Recall does not know what was given: without suppression, previous answers stand as high as remaining ones.
    assert abs(np.mean(gap)) < 0.5


@pytest.mark.parametrize(("name", "seed"), EVERY)
@pytest.mark.parametrize("method", ["ablation", "dla"])
def test_exact_ablation_and_attribution_separate_the_roles(name: str, seed: int, method: str) -> None:
    model, scores = planted(name, seed), found(name, seed).scores
    perfect = {"auroc": 1.0, "average_precision": 1.0, "precision_at_k": 1.0, "sign_accuracy": 1.0}
    assert model.grade("recall", scores.mean(f"{method}.target")) == perfect
    assert model.grade("suppression", scores.mean(f"{method}.previous")) == perfect
    # By a margin, not by luck.
    recall = score(name, seed, f"{method}.target", model.roles["recall"])
    suppression = score(name, seed, f"{method}.previous", model.roles["suppression"])
    decoys = (*model.roles["decoy_attends"], *model.roles["decoy_writes"], *model.roles["background"])
    for quantity in ("target", "previous"):
        others = np.abs(score(name, seed, f"{method}.{quantity}", decoys)).max()
        assert others < min(recall.min(), -suppression.max()) / 3
    assert np.abs(score(name, seed, f"{method}.target", model.roles["suppression"])).max() < recall.min() / 4


@pytest.mark.parametrize("seed", range(2, 4))
def test_other_seeds_are_no_worse(seed: int) -> None:
    for kind in ("mqa", "narrow", "redundant"):
        model = plant(replace(BY_NAME[kind], seed=seed))
        scores = identify(model.view(), model.task.limited(8), "ablation", top=3, verify_top=1, n_random=2).scores
        assert model.grade("recall", scores.mean("ablation.target"))["auroc"] >= 0.95
        assert model.grade("suppression", scores.mean("ablation.previous"))["auroc"] == 1.0


@pytest.mark.parametrize(("name", "seed"), EVERY)
def test_identify_finds_exactly_the_planted_heads(name: str, seed: int) -> None:
    model, heads = planted(name, seed), found(name, seed).heads
    for role, sign in (("recall", 1), ("suppression", -1)):
        positives, _ = model.truth(role)
        assert set(heads.top(role, len(positives))) == set(positives)
        assert all(entry.score * sign > 0 for entry in heads.roles[role][: len(positives)])
        assert heads.verification["dissociation"][role]["held"]


@pytest.mark.parametrize(("name", "seed"), EVERY)
def test_a_helper_acts_through_others(name: str, seed: int) -> None:
    for quantity, helper, sign in zip(
        ("target", "previous"), planted(name, seed).roles["helper"], (1, -1), strict=True
    ):
        direct, total = (score(name, seed, f"{method}.{quantity}", [helper])[0] for method in ("dla", "ablation"))
        assert abs(direct) < 0.15
        assert sign * total > 1.5


@pytest.mark.parametrize(("name", "seed"), EVERY)
def test_recall_heads_promote_previous_answers_too(name: str, seed: int) -> None:
    heads = planted(name, seed).roles["recall"]
    target, previous = (score(name, seed, f"dla.{quantity}", heads) for quantity in ("target", "previous"))
    assert np.allclose(target, previous, rtol=0.15)


@pytest.mark.parametrize(("name", "seed"), EVERY)
def test_decoys_look_or_write_but_not_both(name: str, seed: int) -> None:
    roles = planted(name, seed).roles
    at_subject, at_previous = roles["decoy_attends"]
    assert score(name, seed, "attention.subject", [at_subject])[0] > 0.8
    assert score(name, seed, "attention.previous", [at_previous])[0] > 0.8
    assert score(name, seed, "attention.first", roles["decoy_writes"]).min() > 0.9
    model = view_of(name, seed)
    recall, writes = roles["recall"][0], roles["decoy_writes"][0]
    norm = {head: model.output_weight(head[0])[head[1]].norm() for head in (recall, writes, at_subject)}
    assert norm[at_subject] == 0 and norm[writes] > 2 * norm[recall]
    # At the first digit after the subject it does read the subject.
    example = examples_of(name, seed)[0]
    after_subject = torch.tensor([example.subject[-1] + 1])
    with torch.no_grad(), record_rows(after_subject) as rows:
        model.hf(example.tokens[None])
    assert rows.pattern[writes[0]][0, writes[1], example.subject[0]] > 0.8


@pytest.mark.parametrize("seed", [0, 1])
def test_a_backup_steps_in_for_its_primary(seed: int) -> None:
    primary, backup = planted("redundant", seed).roles["redundant"]
    model = view_of("redundant", seed)
    direct = score("redundant", seed, "dla.target", [primary, backup])
    alone = score("redundant", seed, "ablation.target", [primary, backup])
    assert alone[0] < 0.6 * direct[0], "silencing the primary alone costs less than what it writes"

    def subject_attention(silenced: Sequence[Head], example: Encoded) -> float:
        end = torch.tensor([example.end])
        with torch.no_grad(), hooks.ablate(model, silenced, end), record_rows(end) as rows:
            model.hf(example.tokens[None])
        return float(rows.pattern[backup[0]][0, backup[1], list(example.subject)].sum())

    def cost(silenced: Sequence[Head], example: Encoded) -> float:
        clean, without = silenced_logits(model, example.tokens, [(), silenced]).float()
        return float((clean - without)[list(example.target_tokens)].mean())

    examples = examples_of("redundant", seed)
    together = np.mean([cost([primary, backup], example) for example in examples])
    assert together > 1.3 * alone.sum()
    for example in examples[:6]:
        assert subject_attention([], example) < 0.7 < 0.85 < subject_attention([primary], example)


def test_an_amplifying_mlp_makes_total_effects_larger_than_direct_ones() -> None:
    for name, ratio in (("gqa", 1.0), ("amplified", 1.5)):
        heads = planted(name).roles["recall"]
        direct, total = (score(name, 0, f"{method}.target", heads) for method in ("dla", "ablation"))
        assert np.allclose(total / direct, ratio, rtol=0.05)


def test_the_kinds_are_what_they_say() -> None:
    sizes = {
        name: (model.n_kv_heads, model.head_dim * model.n_heads == model.d_model)
        for name, model in ((name, view_of(name)) for name in BY_NAME)
    }
    assert sizes["mha"] == (8, True) and sizes["gqa"] == (2, True) and sizes["mqa"] == (1, True)
    assert sizes["narrow"] == (2, False)
    for name in BY_NAME:
        roles = planted(name).roles
        everyone = [head for heads in roles.values() for head in heads]
        assert sorted(everyone) == [(layer, head) for layer in range(4) for head in range(8)]
        assert len(roles["redundant"]) == 2 * BY_NAME[name].n_pairs


def test_a_planted_model_is_a_model_like_any_other(tmp_path: Path) -> None:
    model = planted("narrow")
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    example = model.task.examples[0]
    tokens: Tensor = loaded.tokenizer(example.prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(loaded.hf(tokens).logits, model.model(tokens).logits, atol=1e-5)
    assert loaded.weights_sha256 == view_of("narrow").weights_sha256
    assert loaded.tokenizer.convert_ids_to_tokens(tokens[0])[:4] == ["<bos>", "List", example.subject, ":"]


def test_every_example_is_scored_and_its_counterpart_lines_up() -> None:
    model, heads = planted("gqa"), view_of("gqa")
    encoded = encode(model.task, heads.tokenizer)
    assert not encoded.dropped and not encoded.ambiguous_tokens
    facts = {example.subject: set(example.answers) for example in model.task.examples}
    for item in encoded.examples:
        assert item.example.corrupt is not None
        corrupt = heads.tokenizer(item.example.corrupt).input_ids
        assert len(corrupt) == len(item.tokens)
        spans = {*item.subject, *(position for span in item.previous for position in span)}
        changed = {
            index for index, pair in enumerate(zip(corrupt, item.tokens.tolist(), strict=True)) if len({*pair}) > 1
        }
        assert set(item.subject) <= changed <= spans
        words = heads.tokenizer.convert_ids_to_tokens(corrupt)
        other = words[item.subject[0]]
        given = {words[position] for span in item.previous for position in span}
        assert other in facts and other != item.example.subject
        assert len(given) == len(item.previous) and given <= facts[other]
        # Answers that the clean subject has too come last.
        shared, own = given & facts[item.example.subject], facts[other] - facts[item.example.subject]
        assert len(shared) == max(0, len(given) - len(own))
        with torch.no_grad():
            best = int(heads.hf(torch.tensor([corrupt])).logits[0, -1].argmax())
        assert heads.tokenizer.convert_ids_to_tokens(best) in facts[other] - given


def test_the_same_seed_gives_the_same_model_and_nobody_elses_randomness_is_used() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    again = plant(BY_NAME["gqa"])
    assert torch.equal(torch.rand(3), expected)
    first = planted("gqa")
    assert again.roles == first.roles and again.task == first.task
    assert again.view().weights_sha256 == view_of("gqa").weights_sha256
    other = planted("gqa", 1)
    assert other.roles != first.roles and other.task.examples != first.task.examples


def test_truth_leaves_a_role_its_own_helper_to_choose() -> None:
    model = planted("redundant")
    recall_helper, suppression_helper = model.roles["helper"]
    positives, negatives = model.truth("recall")
    assert set(positives) == {*model.roles["recall"], *model.roles["redundant"]}
    assert recall_helper not in negatives and suppression_helper in negatives
    assert len(positives) + len(negatives) == 31
    assert recall_helper in model.truth("recall", "positive")[0]
    assert recall_helper in model.truth("recall", "negative")[1]
    assert suppression_helper in model.truth("suppression", "positive")[0]
    scores = found("redundant").scores
    causal, direct = scores.mean("ablation.target"), scores.mean("dla.target")
    assert model.grade("recall", causal, "positive")["auroc"] == 1 > model.grade("recall", direct, "positive")["auroc"]
    assert model.grade("recall", direct, "negative")["auroc"] == 1 > model.grade("recall", causal, "negative")["auroc"]
    with pytest.raises(InputError, match="role 'helper' has no truth; choose one of recall, suppression"):
        model.truth("helper")


def test_a_flipped_sign_is_a_bad_grade() -> None:
    model, scores = planted("gqa"), found("gqa").scores
    grade = model.grade("suppression", -scores.mean("ablation.previous"))
    assert grade["auroc"] < 0.1 and grade["sign_accuracy"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 2}, "n_layers=2; expected at least 3"),
        ({"n_kv_heads": 3}, "n_kv_heads=3; expected a divisor of n_heads=8"),
        ({"d_model": 100}, "d_model=100; expected a multiple of n_heads=8"),
        ({"d_model": 32}, "d_model=32; expected at least 39, the number of features"),
        ({"head_dim": 25}, "head_dim=25; expected an even number"),
        ({"head_dim": 20}, "head_dim=20; expected at least 21, the number of values"),
        ({"n_recall": 0}, "n_recall=0; expected at least 1"),
        ({"answers_per_subject": 3}, "answers_per_subject=3; expected 4 to n_answers=12"),
        ({"n_recall": 17}, "more roles than n_heads=8 in layer"),
    ],
)
def test_a_planting_that_does_not_fit_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plant(replace(Planting("bad"), **change))  # type: ignore[arg-type]


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_against_slow_references() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        table = generator.integers(0, 6, (3, 5)).astype(np.float32)  # few values: many ties
        heads = [(layer, head) for layer in range(3) for head in range(5)]
        generator.shuffle(heads)
        positives, negatives = [tuple(h) for h in heads[:4]], [tuple(h) for h in heads[4:12]]
        wins = [
            1.0 if table[p] > table[n] else 0.5 if table[p] == table[n] else 0.0 for p in positives for n in negatives
        ]
        assert metrics.auroc(table, positives, negatives) == pytest.approx(sum(wins) / len(wins))

        ranked = sorted([*positives, *negatives], key=lambda head: (-table[head], head in positives))
        hits = [head in positives for head in ranked]
        for k in (1, 4, 12):
            assert metrics.precision_at_k(table, positives, negatives, k) == pytest.approx(sum(hits[:k]) / k)
        assert metrics.precision_at_k(table, positives, negatives) == pytest.approx(sum(hits[:4]) / 4)

        precisions = []
        for positive in positives:
            above = [head for head in ranked if table[head] >= table[positive]]
            precisions.append(sum(head in positives for head in above) / len(above))
        assert metrics.average_precision(table, positives, negatives) == pytest.approx(np.mean(precisions))


def test_metrics_by_hand() -> None:
    table = np.array([[3.0, 2.0, 1.0, 0.0]])
    assert metrics.auroc(table, [(0, 0), (0, 2)], [(0, 1), (0, 3)]) == 0.75
    assert metrics.average_precision(table, [(0, 0), (0, 2)], [(0, 1), (0, 3)]) == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.precision_at_k(table, [(0, 0), (0, 2)], [(0, 1), (0, 3)]) == 0.5
    assert metrics.auroc(np.zeros((1, 4)), [(0, 0)], [(0, 1)]) == 0.5, "nothing said is chance"
    assert metrics.average_precision(np.zeros((1, 4)), [(0, 0)], [(0, 1), (0, 2), (0, 3)]) == 0.25
    assert metrics.precision_at_k(np.zeros((1, 4)), [(0, 0)], [(0, 1)]) == 0
    assert metrics.sign_accuracy(table - 1.5, [(0, 0), (0, 3)], 1.0) == 0.5
    assert metrics.sign_accuracy(table, [(0, 3)], -1.0) == 0, "zero has no sign"


def test_metrics_refuse_what_cannot_be_judged() -> None:
    table = np.array([[1.0, np.nan, 0.0]])
    with pytest.raises(InputError, match="1 of 1 scores of negatives are not finite"):
        metrics.auroc(table, [(0, 0)], [(0, 1)])
    with pytest.raises(InputError, match="no positives"):
        metrics.average_precision(table, [], [(0, 2)])
    with pytest.raises(InputError, match=r"heads \[\(0, 0\)\] are positives and negatives at once"):
        metrics.auroc(table, [(0, 0)], [(0, 0)])
    with pytest.raises(InputError, match=r"head L1H0 is not among the scores of shape \(1, 3\)"):
        metrics.auroc(table, [(1, 0)], [(0, 0)])
    with pytest.raises(InputError, match="k=3 is out of range; expected 1 to 2"):
        metrics.precision_at_k(table, [(0, 0)], [(0, 2)], 3)
