"""The causal proof: what is silenced where, with numbers from whole forward passes, on scores made by hand."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headtune.analysis.heads.controls import largest
from headtune.analysis.heads.head_set import ROLES, HeadSet, RankedHead
from headtune.analysis.heads.ranking import rule_for
from headtune.analysis.identify import verification
from headtune.analysis.identify.verdict import UNKNOWN
from headtune.analysis.identify.verification import NORM_EXAMPLES, halves, output_norms, verify
from headtune.analysis.methods.scores import Scores
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.reports.dissociation import dissociation_table
from headtune.analysis.reports.dissociation import verdict as verdict_of
from headtune.analysis.tasks.tokenized import Encoded, encode
from helpers.tiny import N_LAYERS, tiny_model, tiny_task, tiny_tokenizer

Heads = Sequence[tuple[int, int]]
N_HEADS = 8
QUANTITIES = {"recall": ("target", 1.0), "suppression": ("previous", -1.0)}
# Heads that the first half of the subjects says have the role, best first, and those that the second half says.
FIRST: dict[str, Heads] = {"recall": [(1, 2), (2, 0), (0, 1)], "suppression": [(1, 0), (2, 2)]}
SECOND: dict[str, Heads] = {"recall": [(0, 5), (2, 3), (0, 1)], "suppression": [(2, 6), (1, 7)]}


@pytest.fixture(scope="module")
def model() -> HeadModel:
    return wrap_model(tiny_model("llama", num_attention_heads=8, num_key_value_heads=4), tiny_tokenizer(), "tiny")


@pytest.fixture(scope="module")
def examples(model: HeadModel) -> list[Encoded]:
    """Eight subjects, two prompts each."""
    return encode(tiny_task(), model.tokenizer).examples


def subjects_of(examples: Sequence[Encoded]) -> list[str]:
    return [each.example.subject for each in examples]


def scores_of(
    examples: Sequence[Encoded],
    first: Mapping[str, Heads] = FIRST,
    second: Mapping[str, Heads] = SECOND,
    seed: int = 0,
    shape: tuple[int, int] = (N_LAYERS, N_HEADS),
) -> Scores:
    """Each half of the subjects (of the split with seed 0) has its own heads; all others have the opposite sign."""
    subjects, generator = subjects_of(examples), np.random.default_rng(seed)
    by_example = {}
    for role, (quantity, sign) in QUANTITIES.items():
        values = -sign * generator.uniform(0.1, 1.0, (len(examples), *shape))
        for rows, heads in zip(halves(subjects, 0), (first, second), strict=True):
            for place, (layer, head) in enumerate(heads.get(role, ())):
                values[rows, layer, head] = sign * (10 - place)
        for row, example in enumerate(examples):
            if quantity == "previous" and not example.previous_tokens:
                values[row] = np.nan
        for method in ("dla.{}", "dla.{}_contrast", "ablation.{}", "ablation.{}_contrast", "ablation.{}_logp"):
            by_example[method.format(quantity)] = values.astype(np.float32)
    return Scores(by_example, subjects)


def a_head_set(model: HeadModel, scores: Scores, roles: Mapping[str, Heads] = FIRST, sign: float = 1.0) -> HeadSet:
    """Heads of all subjects; how many of a role there are says how many each half may choose."""
    rules = {role: rule_for(role, scores).to_json() for role in ROLES}
    ranked = {role: tuple(RankedHead(*pair, sign, (0.5, 1.5)) for pair in roles.get(role, ())) for role in ROLES}
    return HeadSet(model=model.identity(), task={}, method={"parameters": {"rules": rules}}, roles=ranked)


def silenced(
    monkeypatch: pytest.MonkeyPatch, model: HeadModel, examples: Sequence[Encoded], scores: Scores, **options: Any
) -> list[list[Heads]]:
    """What `verify` runs every example with, in the examples' order; no model is run for it."""
    sets: dict[int, list[Heads]] = {}
    places = {id(example): index for index, example in enumerate(examples)}

    def spy(_: HeadModel, example: Encoded, rows: Sequence[Heads]) -> Any:
        sets[places[id(example)]] = [list(row) for row in rows]
        return np.zeros((len(rows), 2), np.float32)

    monkeypatch.setattr(verification, "set_probabilities", spy)
    verify(model, a_head_set(model, scores, options.pop("roles", FIRST)), examples, scores, 2, **options)
    monkeypatch.undo()
    return [sets[index] for index in range(len(examples))]


@torch.no_grad()
def by_whole_passes(model: HeadModel, example: Encoded, heads: Heads) -> tuple[float, float]:
    """p(remaining) and p(previous) with heads silenced at the last token, by a whole forward pass with hooks."""
    with hooks.ablate(model, heads, positions=torch.tensor([example.end])):
        p = model.hf(example.tokens[None]).logits[0, -1].softmax(-1)
    return p[list(example.target_tokens)].sum().item(), p[list(example.previous_tokens)].sum().item()


# --- halves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 8, 15])
def test_halves_divide_the_subjects(n: int) -> None:
    subjects = [f"s{i % n}" for i in range(3 * n)]
    splits = []
    for seed in range(10):
        first, second = halves(subjects, seed)
        assert sorted(first + second) == list(range(3 * n))
        names = [{subjects[i] for i in rows} for rows in (first, second)]
        assert not names[0] & names[1] and len(names[0]) == n - n // 2 and len(names[1]) == n // 2
        assert halves(subjects, seed) == (first, second)
        backwards = halves(subjects[::-1], seed)
        assert {subjects[::-1][i] for i in backwards[0]} == names[0], "whatever the order of the prompts"
        splits.append(frozenset(names[0]))
    assert len(set(splits)) > 1


# --- nothing is verified on subjects that it was chosen on ------------------------------------------------------------


def test_every_example_is_run_with_what_the_other_half_chose(
    model: HeadModel, examples: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = np.random.default_rng(0).uniform(size=(N_LAYERS, N_HEADS)).astype(np.float32)
    for pairs in (*FIRST.values(), *SECOND.values()):
        norms[tuple(zip(*pairs, strict=True))] += 1  # the chosen ones are the largest: of the others, they are none
    scores = scores_of(examples)
    with monkeypatch.context() as patch:
        patch.setattr(verification, "output_norms", lambda *_: norms)
        sets = silenced(patch, model, examples, scores, n_random=8)
    first, second = halves(subjects_of(examples), 0)
    for rows, chosen in ((second, FIRST), (first, SECOND)):
        recall, suppression = chosen["recall"][:2], chosen["suppression"]
        assert len({str(sets[index]) for index in rows}) == 1 and len(rows) == 8
        nothing, of_recall, of_largest, of_lowest, of_suppression, *rest = sets[rows[0]]
        assert (nothing, of_recall, of_suppression) == ([], recall, suppression)
        assert of_largest == largest(norms, recall, [*recall, *suppression])
        assert sorted(layer for layer, _ in of_largest) == sorted(layer for layer, _ in recall)
        assert not set(of_largest) & {*recall, *suppression}, "the heads of neither role"
        assert sorted(layer for layer, _ in of_lowest) == sorted(layer for layer, _ in recall)
        drawn = {"recall": rest[2:10], "suppression": rest[10:]}
        for role, like in (("recall", recall), ("suppression", suppression)):
            assert len(drawn[role]) == len({str(each) for each in drawn[role]}) == 8
            for each in drawn[role]:
                assert sorted(layer for layer, _ in each) == sorted(layer for layer, _ in like)
                assert not set(each) & {*recall, *suppression}


def test_the_scores_of_a_half_change_nothing_that_it_is_run_with(
    model: HeadModel, examples: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chosen heads, and all that they are compared with: whatever the scores of the half that is run."""
    other = {"recall": [(0, 0), (1, 1)], "suppression": [(2, 7), (0, 2)]}
    before = silenced(monkeypatch, model, examples, scores_of(examples), n_random=8)
    changed = scores_of(examples, second=other, seed=1)
    right = scores_of(examples)
    first, second = halves(subjects_of(examples), 0)
    for name, values in changed.by_example.items():
        values[first] = right.by_example[name][first]
    after = silenced(monkeypatch, model, examples, changed, n_random=8)
    assert [after[index] for index in second] == [before[index] for index in second]
    assert all(after[index][1] == other["recall"] for index in first)


def test_another_seed_is_another_split_and_other_random_sets(
    model: HeadModel, examples: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    same: Mapping[str, Heads] = {"recall": [(1, 2), (2, 0)], "suppression": [(1, 0), (2, 2)]}
    scores = scores_of(examples, same, same)
    runs = [silenced(monkeypatch, model, examples, scores, n_random=8, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] and runs[0][0][7:] != runs[2][0][7:]
    assert runs[0][0][1] == runs[2][0][1] == same["recall"]


def test_a_half_chooses_as_many_as_are_confirmed_and_at_most_as_many_as_are_verified(
    model: HeadModel, examples: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = {"recall": [(2, 5)], "suppression": FIRST["suppression"]}
    sets = silenced(monkeypatch, model, examples, scores_of(examples), n_random=2, roles=roles)
    assert {str(each[1]) for each in sets} == {str(half["recall"][:1]) for half in (FIRST, SECOND)}
    assert all(len(each[4]) == 2 for each in sets)


def test_numbers_are_those_of_whole_forward_passes(
    model: HeadModel, examples: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = scores_of(examples)
    sets = silenced(monkeypatch, model, examples, scores, n_random=3)
    block = verify(model, a_head_set(model, scores), examples, scores, 2, n_random=3).verification
    # [sets, examples, 2], each example with the sets of the half that it is not in
    slow = np.array(
        [[by_whole_passes(model, e, heads) for heads in row] for e, row in zip(examples, sets, strict=True)]
    ).swapaxes(0, 1)
    kinds = [f"ablate_{each}{role}" for role in ROLES for each in ("", "largest_like_", "lowest_like_")]
    for index, name in enumerate(["baseline", *kinds]):
        for column, quantity in enumerate(("p_remaining", "p_previous")):
            assert block[name][quantity]["mean"] == pytest.approx(slow[index, :, column].mean(), abs=1e-6)
            low, high = block[name][quantity]["ci"]
            assert 0 <= low <= block[name][quantity]["mean"] <= high <= 1
    for place, role in enumerate(ROLES):
        random = slow[7 + 3 * place : 10 + 3 * place].mean(1)  # [sets, 2]
        matched = block[f"ablate_random_like_{role}"]
        assert matched["sets"] == 3
        for column, quantity in enumerate(("p_remaining", "p_previous")):
            assert matched[quantity]["set_means"] == pytest.approx(random[:, column], abs=1e-6)
            assert matched[quantity]["mean"] == pytest.approx(random[:, column].mean(), abs=1e-6)
            assert matched[quantity]["lowest_set"] == pytest.approx(random[:, column].min(), abs=1e-6)
            assert matched[quantity]["highest_set"] == pytest.approx(random[:, column].max(), abs=1e-6)
        # The verdict's own numbers.
        column = int(role == "suppression")
        before, after = slow[0, :, column].mean(), slow[1 + 3 * place, :, column].mean()
        as_far = random[:, column] >= after if role == "suppression" else random[:, column] <= after
        verdict = block["dissociation"][role]
        assert verdict["p_value"] == (1 + as_far.sum()) / 4 and verdict["sets"] == 3
        assert verdict["baseline"] == pytest.approx(before, abs=1e-6)
        assert verdict["ablated"] == pytest.approx(after, abs=1e-6)
        assert verdict["ratio"] == pytest.approx(after / before, abs=1e-4)
        assert verdict["change"] == pytest.approx(after - before, abs=1e-6)
        assert verdict["largest_other"] == pytest.approx(slow[2 + 3 * place, :, column].mean(), abs=1e-6)
        assert verdict["most_extreme_random_set"] == pytest.approx(
            random[:, column].max() if role == "suppression" else random[:, column].min(), abs=1e-6
        )


def test_the_block(model: HeadModel, examples: list[Encoded]) -> None:
    scores = scores_of(examples)
    block = verify(model, a_head_set(model, scores), examples, scores, 2, n_random=4).verification
    assert set(block) == {"halves", "subjects", "baseline", "dissociation"} | {
        f"ablate_{name}{role}" for role in ROLES for name in ("", "random_like_", "largest_like_", "lowest_like_")
    }
    assert (block["halves"], block["subjects"]) == (2, [4, 4])
    for role in ROLES:
        entry = block[f"ablate_{role}"]
        assert entry["heads"] == [list(pair) for pair in FIRST[role][:2]], "those of all subjects"
        assert entry["folds"] == [[list(pair) for pair in half[role][:2]] for half in (FIRST, SECOND)]
    json.dumps(block, allow_nan=False)


# --- controls ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sizes_of_heads_against_their_own_columns_of_the_output_projection(
    model: HeadModel, examples: list[Encoded]
) -> None:
    many = [*examples, *examples[:3]]
    total = np.zeros((N_LAYERS, N_HEADS))
    for example in many[:NORM_EXAMPLES]:
        inputs: dict[int, Tensor] = {}
        layers: Any = model.hf.model.layers

        def keep(index: int, inputs: dict[int, Tensor]) -> Any:
            return lambda _module, args: inputs.__setitem__(index, args[0][0, -1].clone())

        handles = [
            layer.self_attn.o_proj.register_forward_pre_hook(keep(index, inputs)) for index, layer in enumerate(layers)
        ]
        model.hf(example.tokens[None])
        for handle in handles:
            handle.remove()
        for layer in range(N_LAYERS):
            weight = layers[layer].self_attn.o_proj.weight  # [d_model, n_heads * head_dim]
            dim = weight.shape[1] // N_HEADS
            for head in range(N_HEADS):
                part = slice(head * dim, (head + 1) * dim)
                total[layer, head] += (weight[:, part] @ inputs[layer][part]).norm().item()
    assert output_norms(model, many) == pytest.approx(total / NORM_EXAMPLES, rel=1e-4)


def test_the_lowest_are_those_of_the_half_that_chose(
    model: HeadModel, examples: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads whose scores are 0 in one half, and large in the other."""
    scores = scores_of(examples)
    first, second = halves(subjects_of(examples), 0)
    for name in scores.by_example:
        scores.by_example[name][first, :, 4] = 0
        scores.by_example[name][second, :, 1] = 0
    sets = silenced(monkeypatch, model, examples, scores, n_random=2)
    assert all(sets[index][3] == [(1, 4), (2, 4)] for index in second)
    assert all(sets[index][3] == [(0, 1), (2, 1)] for index in first)


def test_a_crowded_layer_is_compared_with_its_neighbours(model: HeadModel, examples: list[Encoded]) -> None:
    """Seven of its eight heads chosen: the layer holds no other such set, and the verification goes on."""
    crowd: Mapping[str, Heads] = {"recall": [(0, head) for head in range(7)], "suppression": [(2, 0)]}
    scores = scores_of(examples, crowd, crowd)
    heads = verify(model, a_head_set(model, scores, crowd), examples, scores, 7, n_random=20)
    assert heads.verification["ablate_random_like_recall"]["sets"] == 20
    assert len(heads.verification["ablate_largest_like_recall"]["heads"]) == 1
    assert heads.verification["dissociation"]["recall"]["sets"] == 20


def test_a_model_without_other_heads_cannot_be_compared(examples: list[Encoded]) -> None:
    """Ten of its twelve heads chosen: two are no set like them, which the block says, and the page shows."""
    small = wrap_model(tiny_model("llama"), tiny_tokenizer(), "small")
    every: Mapping[str, Heads] = {
        "recall": [(layer, head) for layer in range(3) for head in range(4)][:10],
        "suppression": [(2, 2)],
    }
    some = examples[:8]
    scores = scores_of(some, every, every, shape=(3, 4))
    heads = verify(small, a_head_set(small, scores, every), some, scores, 10, n_random=20)
    reason = "the layers hold no other heads to draw from"
    assert heads.verification["ablate_random_like_recall"] == {"sets": 0, "reason": reason}
    assert heads.verification["dissociation"]["recall"] == {"verdict": UNKNOWN, "held": False, "reason": reason}
    assert f"Recall cannot be told: {reason}" in verdict_of(heads)
    assert 0 < heads.verification["ablate_recall"]["p_remaining"]["mean"] < 1
    # One head is left that is of neither role.
    result = heads.verification["dissociation"]["suppression"]
    assert result["sets"] == 1 and result["verdict"] == UNKNOWN
    assert [row.name for row in dissociation_table(heads)][:3] == [
        "nothing silenced",
        "top 1 suppression heads silenced",
        "1 random head of the same layers silenced (1 sets)",
    ]


# --- roles without heads ----------------------------------------------------------------------------------------------


def test_no_confirmed_heads_is_a_verdict(model: HeadModel, examples: list[Encoded]) -> None:
    scores = scores_of(examples)
    block = verify(model, a_head_set(model, scores, {}), examples, scores, 2, n_random=4).verification
    assert set(block) == {"baseline", "dissociation", "halves", "subjects"}
    for role in ROLES:
        assert block["dissociation"][role]["verdict"] == UNKNOWN
        assert block["dissociation"][role]["reason"].startswith("no confirmed heads (8 subjects are few")


def test_a_half_without_heads_of_the_sign_is_a_verdict(model: HeadModel, examples: list[Encoded]) -> None:
    """Suppression is seen in the first half alone: nothing of it is silenced, and nothing that is like it."""
    scores = scores_of(examples, second=SECOND | {"suppression": []})
    heads = verify(model, a_head_set(model, scores), examples, scores, 2, n_random=4)
    block = heads.verification
    assert not [name for name in block if "suppression" in name]
    assert block["dissociation"]["suppression"] == {
        "verdict": UNKNOWN,
        "held": False,
        "reason": "no head has the role's sign on both halves of the subjects",
    }
    assert block["dissociation"]["recall"]["sets"] == 4, "the other role is verified"
    assert "no head has the role's sign on both halves" in verdict_of(heads)
    json.dumps(block, allow_nan=False)


# --- prompts with and without previous answers ------------------------------------------------------------------------


def test_p_previous_is_over_the_examples_that_have_previous_answers(model: HeadModel, examples: list[Encoded]) -> None:
    """The others would only dilute it with zeros."""
    single = encode(tiny_task(previous=(0,)), model.tokenizer).examples
    both = [*examples, *single]
    alone, mixed = (
        verify(model, a_head_set(model, scores), some, scores, 2, n_random=4).verification
        for some, scores in ((examples, scores_of(examples)), (both, scores_of(both)))
    )
    assert alone["ablate_recall"]["folds"] == mixed["ablate_recall"]["folds"]
    matched = mixed["ablate_random_like_recall"]["p_previous"]
    assert matched["lowest_set"] <= matched["mean"] <= matched["highest_set"]
    for name in ("baseline", "ablate_recall", "ablate_suppression"):
        assert mixed[name]["p_previous"]["mean"] == pytest.approx(alone[name]["p_previous"]["mean"])
        assert mixed[name]["p_previous"]["ci"] == pytest.approx(alone[name]["p_previous"]["ci"])
        assert mixed[name]["p_remaining"]["mean"] != pytest.approx(alone[name]["p_remaining"]["mean"])


@pytest.mark.parametrize("listing", [1, 4])
def test_subjects_with_previous_answers_may_all_be_in_one_half(
    model: HeadModel, examples: list[Encoded], listing: int
) -> None:
    """Then suppression cannot be told; nothing breaks, warns or is no number."""
    names = sorted({subjects_of(examples)[index] for index in halves(subjects_of(examples), 0)[0]})[:listing]
    single = encode(tiny_task(previous=(0,)), model.tokenizer).examples
    some = [each for each in examples if each.example.subject in names]
    some += [each for each in single if each.example.subject not in names]
    scores = scores_of(some)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heads = verify(model, a_head_set(model, scores), some, scores, 2, n_random=4)
    assert heads.verification["dissociation"]["suppression"]["verdict"] == UNKNOWN
    assert heads.verification["dissociation"]["recall"]["sets"] == 4
    json.dumps(heads.verification, allow_nan=False)


# --- quantities of the task as a whole --------------------------------------------------------------------------------


def test_what_cannot_be_halved_has_the_same_heads_in_both_halves(
    model: HeadModel, examples: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_task = np.zeros((N_LAYERS, N_HEADS), np.float32)
    scores = Scores({}, subjects_of(examples), {"gates.target": of_task, "gates.previous": of_task})
    sets = silenced(monkeypatch, model, examples, scores, n_random=8)
    assert all(each[1] == FIRST["recall"][:2] and each[4] == FIRST["suppression"] for each in sets)
    block = verify(model, a_head_set(model, scores), examples, scores, 2, n_random=2).verification
    assert (block["halves"], block["subjects"]) == (1, [4, 4])
    for role in ROLES:
        pairs = [list(pair) for pair in FIRST[role][:2]]
        assert block[f"ablate_{role}"]["folds"] == [pairs, pairs] and block[f"ablate_{role}"]["heads"] == pairs
    for quantity, column in (("p_remaining", 0), ("p_previous", 1)):
        slow = [by_whole_passes(model, example, FIRST["recall"][:2])[column] for example in examples]
        assert block["ablate_recall"][quantity]["mean"] == pytest.approx(np.mean(slow), abs=1e-6)


# --- another task's heads ---------------------------------------------------------------------------------------------


def test_another_tasks_heads_are_silenced_as_they_are(
    model: HeadModel, examples: list[Encoded], caplog: pytest.LogCaptureFixture
) -> None:
    """They were chosen elsewhere: the same in both halves. A role that they lack is told once."""
    scores = scores_of(examples)
    other = replace(a_head_set(model, scores, {"recall": [(0, 3), (2, 4), (1, 1)]}), task={"name": "other"})
    block = verify(
        model, a_head_set(model, scores), examples, scores, 2, n_random=2, controls={"x": other}
    ).verification
    assert block["ablate_control_x_recall"]["folds"] == [[[0, 3], [2, 4]]] * 2
    assert "ablate_control_x_suppression" not in block
    assert caplog.messages == ["control x has no suppression heads: there is nothing of it to silence"]
    slow = [by_whole_passes(model, example, [(0, 3), (2, 4)])[0] for example in examples]
    assert block["ablate_control_x_recall"]["p_remaining"]["mean"] == pytest.approx(np.mean(slow), abs=1e-6)
