"""Statements, directions and probes, each against a slow reference."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import load_model
from headtune.analysis.tasks.task import Example, Task, canonical
from headtune.analysis.tasks.tokenized import as_chat
from headtune.analysis.utils.errors import InputError
from headtune.train.config.methods import ItiConfig
from headtune.train.tuners.iti_probes import (
    ACCURACY,
    logistic,
    mass_mean,
    probe_correct,
    probe_heads,
    question_folds,
    read_ends,
    statements,
    tokenised,
)
from headtune.train.tuners.steering import steer
from helpers.statements import FAMILIES, LAST, family_model, listed_task, z_one_by_one
from helpers.tiny import N_HEADS, N_LAYERS, quick_among, tiny_task, tiny_tokenizer


def _data(n: int = 60, d: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, list[str]]:
    """z `[n, 3, d]` where the second head knows a little, labels, and subjects of six statements each."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.rand(n, generator=generator) < 0.4
    z = torch.randn(n, 3, d, generator=generator)
    z[:, 1] += 0.9 * true[:, None] * torch.randn(d, generator=generator)
    z[:, 2] = 100 + 50 * z[:, 2]
    return z, true, [f"subject {i % (n // 6)}" for i in range(n)]


# --- statements -------------------------------------------------------------------------------------------------------


def test_listed_answers_are_all_used() -> None:
    task = listed_task(2)
    found, note = statements(task)
    assert [(s.text, s.true) for s in found[:5]] == [
        ("I know cities in Spain: Rome", True),
        ("I know cities in Spain: Milan", True),
        ("I know cities in Spain: Tokyo", False),
        ("I know cities in Spain: Osaka", False),
        ("I know cities in Spain: Kobe", False),
    ]
    assert {s.subject for s in found} == {"Spain", "Germany"} and len(found) == 10
    assert (note["true"], note["false"], note["false_answers"], note["prompts_left_out"]) == (4, 6, "listed", 0)


def test_an_example_without_listed_answers_is_left_out_and_counted() -> None:
    task = listed_task(3)
    bare = replace(task.examples[1], incorrect=())
    found, note = statements(replace(task, examples=(task.examples[0], bare, task.examples[2])))
    assert {s.subject for s in found} == {"Spain", "England"} and note["prompts_left_out"] == 1


def test_false_answers_of_lists_are_those_given_and_others_drawn_in_the_same_wording() -> None:
    task = tiny_task(previous=(1, 2))
    strange = Example("Some stars: ", "stars", ("Sirius", "Vega", "Rigel"))
    found, note = statements(replace(task, examples=(*task.examples, strange)), seed=1)
    for example in task.examples:
        mine = [
            s for s in found if s.text.startswith(example.prompt + " ") and "\n" not in s.text[len(example.prompt) :]
        ]
        words = {label: [s.text[len(example.prompt) + 1 :] for s in mine if s.true is label] for label in (True, False)}
        assert sorted(words[True]) == sorted(example.remaining)
        assert set(example.previous) < set(words[False]) and len(words[False]) == len(words[True])
        accepted = {canonical(answer, example.subject) for answer in example.answers}
        drawn = set(words[False]) - set(example.previous)
        assert not drawn & accepted and not drawn & {"Sirius", "Vega", "Rigel"}
    of_stars = [s.text.removeprefix("Some stars: ") for s in found if s.subject == "stars" and not s.true]
    assert len(of_stars) == 3 and note["prompts_drawn_from_any_wording"] == 1  # no other list of stars to draw from
    assert found == statements(replace(task, examples=(*task.examples, strange)), seed=1)[0]
    assert found != statements(replace(task, examples=(*task.examples, strange)), seed=2)[0]


def test_nothing_that_may_be_true_is_drawn() -> None:
    """Neither another name of an accepted answer, nor an answer to something else about the same subject."""
    examples = (
        Example("Cities in Canada:", "Canada", ("Quebec", "Ottawa", "Calgary")),
        Example("Cities in America:", "America", ("Quebec City", "Boston")),
        Example("Some famous lakes in Canada:", "Canada", ("Louise",)),
    )
    found, note = statements(Task("few", examples))
    drawn = {(s.text.split(":")[0], s.text.split(": ")[1]) for s in found if not s.true}
    assert {answer for prompt, answer in drawn if prompt == "Cities in Canada"} == {"Boston"}
    assert {answer for prompt, answer in drawn if "lakes" in prompt} <= {"Quebec City", "Boston"}
    assert (note["prompts_drawn_from_any_wording"], note["true"], note["false"]) == (1, 6, 4)


def test_statements_a_prompt_can_be_limited() -> None:
    found, note = statements(tiny_task(), per_prompt=1)
    assert len(found) == 2 * len(tiny_task().examples) and note["true"] == note["false"] == len(tiny_task().examples)
    assert {s.text for s in found} < {s.text for s in statements(tiny_task())[0]} | {s.text for s in found}


def test_no_false_answers_is_refused() -> None:
    with pytest.raises(InputError, match=r"'cities' has no false answers.*add 'incorrect'"):
        statements(tiny_task(previous=(0,), subjects=1))


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", quick_among(FAMILIES, ["llama"]))
@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_read_what_single_rows_read(family: str, side: str) -> None:
    heads = family_model(family)
    heads.tokenizer.padding_side, heads.tokenizer.pad_token = side, None  # batches do not depend on either
    generator = random.Random(0)
    rows = [[generator.randrange(3, 300) for _ in range(generator.randint(1, 24))] for _ in range(50)]
    found = read_ends(heads, rows, [0, LAST])
    assert set(found) == {0, LAST}
    for layer in found:
        torch.testing.assert_close(found[layer], z_one_by_one(heads, rows, layer), atol=1e-5, rtol=1e-5)


def test_a_chat_template_writes_its_own_special_tokens() -> None:
    heads = family_model()
    heads.tokenizer = tiny_tokenizer(bos=True)
    heads.tokenizer.chat_template = (
        "<bos>{% for m in messages %}{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    plain = tokenised(heads, ["List"], listed_task())
    chat = as_chat(replace(listed_task(), chat_template=True), heads.tokenizer)
    written = tokenised(heads, [s.text for s in statements(chat)[0]], chat)
    assert all(row.count(1) == 1 and row[0] == 1 for row in [*plain, *written])
    assert heads.tokenizer.decode(written[0]) == "<bos>I know cities in Spain:\n> Rome"


# --- directions and probes --------------------------------------------------------------------------------------------


def test_direction_and_spread_are_those_of_a_loop() -> None:
    z, true, _ = _data()
    theta, sigma = mass_mean(z, true)
    for head in range(3):
        up = [z[i, head] for i in range(len(z)) if true[i]]
        down = [z[i, head] for i in range(len(z)) if not true[i]]
        d = sum(up) / len(up) - sum(down) / len(down)  # type: ignore[operator]
        d = d / float((d * d).sum()) ** 0.5
        along = [float((z[i, head] * d).sum()) for i in range(len(z))]
        mean = sum(along) / len(along)
        spread = (sum((x - mean) ** 2 for x in along) / len(along)) ** 0.5
        torch.testing.assert_close(theta[head], d, atol=1e-5, rtol=1e-4)
        assert float(sigma[head]) == pytest.approx(spread, rel=1e-4)


def test_a_head_that_says_nothing_has_no_direction() -> None:
    theta, sigma = mass_mean(torch.zeros(6, 2, 4), torch.tensor([True, False] * 3))
    assert not theta.any() and not sigma.any()


def _plain_logistic(x: Tensor, y: Tensor) -> Tensor:
    """One logistic regression by L-BFGS and autograd: `[d + 1]`."""
    beta = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([beta], max_iter=1000, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = x @ beta[:-1] + beta[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, y.double(), reduction="sum")
        value = value + beta[:-1].square().sum() / 2
        value.backward()
        return value

    optimiser.step(loss)  # type: ignore[arg-type]
    return beta.detach()


def test_the_batched_regression_is_the_plain_one() -> None:
    z, true, _ = _data()
    x = z.double().transpose(0, 1).clone()
    x[2] = (x[2] - 100) / 50
    found = logistic(x, true)
    for head in range(3):
        torch.testing.assert_close(found[head], _plain_logistic(x[head], true), atol=1e-5, rtol=1e-5)
    apart = torch.stack([true * 2.0 - 1, torch.ones(len(true))], 1).double()[None]  # separable without the penalty
    torch.testing.assert_close(logistic(apart, true)[0], _plain_logistic(apart[0], true), atol=1e-5, rtol=1e-5)


def test_probe_accuracy_is_that_of_plain_regressions_fold_by_fold() -> None:
    z, true, subjects = _data()
    folds = question_folds(subjects, 4, seed=3)
    found = probe_correct(z, true, folds)
    for head in range(3):
        for fold in range(4):
            inside = [i for i in range(len(z)) if folds[i] != fold]
            outside = [i for i in range(len(z)) if folds[i] == fold]
            mean = z[inside, head].double().mean(0)
            size = (z[inside, head].double() - mean).square().mean().sqrt()
            beta = _plain_logistic((z[inside, head].double() - mean) / size, true[inside])
            for i in outside:
                guess = float(((z[i, head].double() - mean) / size) @ beta[:-1] + beta[-1]) > 0
                assert bool(found[i, head]) == (guess == bool(true[i]))
    assert found[:, 1].float().mean() > found[:, 0].float().mean() + 0.1
    assert torch.equal(found, probe_correct(1e-3 * z, true, folds))  # a head's size does not matter


def test_no_question_is_in_two_folds() -> None:
    _, _, subjects = _data()
    folds = question_folds(subjects, 4, seed=0)
    fold_of = {subject: {int(f) for s, f in zip(subjects, folds, strict=True) if s == subject} for subject in subjects}
    assert all(len(of) == 1 for of in fold_of.values()) and set().union(*fold_of.values()) == {0, 1, 2, 3}
    assert not torch.equal(folds, question_folds(subjects, 4, seed=1))
    with pytest.raises(InputError, match="10 subjects are too few for 11 folds"):
        question_folds(subjects, 11, seed=0)


@torch.no_grad()
def _plant(model: HeadModel, at: tuple[int, int]) -> None:
    """Make one head read the token it stands on, and all others put out zero."""
    for layer in range(model.n_layers):
        query, key, value = (model.attention(layer).get_submodule(f"{name}_proj").weight for name in "qkv")
        rows = slice(at[1] * model.head_dim, (at[1] + 1) * model.head_dim)
        kept = value[rows].clone()  # type: ignore[index]
        value.zero_()  # type: ignore[operator]
        if layer == at[0]:
            value[rows] = kept  # type: ignore[index, operator]
            query[rows] = 3 * key[rows]  # type: ignore[index, operator]


def test_a_planted_head_is_found_and_steered() -> None:
    model = family_model(num_key_value_heads=N_HEADS, head_dim=8)
    _plant(model, (1, 2))
    task = Task("two", tuple(replace(e, answers=("Rome",), incorrect=("Tokyo",)) for e in listed_task().examples))
    result = probe_heads(model, task, seed=0, folds=4)
    assert result.accuracy.shape == (N_LAYERS, N_HEADS) and result.directions.shape == (N_LAYERS, N_HEADS, 8)
    assert result.scores.mean(ACCURACY).dtype.name == "float32"
    (best,) = result.ranked(1)
    assert (best.layer, best.head, best.score) == (1, 2, 1.0)
    assert best.ci is not None and 0.5 < best.ci[0] < 1 == best.ci[1], "so few subjects do not prove it for all"
    others = result.accuracy.flatten().tolist()
    others.remove(1.0)
    assert others == [0.5] * (N_LAYERS * N_HEADS - 1)
    found = steer(model, ItiConfig(kind="iti", alpha=2.0), [(1, 2)], task, probed=result)
    assert found.pairs == [(1, 2)]
    (offset,) = found.values.values()
    torch.testing.assert_close(offset[0], 2.0 * result.sigma[1, 2] * result.directions[1, 2])
    rows = [model.tokenizer(s.text).input_ids for s in statements(task)[0]]
    along = z_one_by_one(model, rows, 1)[:, 2] @ offset[0]
    assert along[::2].mean() > along[1::2].mean()  # from wrong answers towards right ones


def test_probed_scores_are_those_of_the_slow_route() -> None:
    heads, task = family_model(), tiny_task()
    result = probe_heads(heads, task, seed=5, folds=3, per_prompt=2)
    found, _ = statements(task, 5, 2)
    z = z_one_by_one(heads, [heads.tokenizer(s.text).input_ids for s in found], 1)
    true = torch.tensor([s.true for s in found])
    theta, sigma = mass_mean(z, true)
    torch.testing.assert_close(result.directions[1], theta, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result.sigma[1], sigma, atol=1e-4, rtol=1e-4)
    folds = question_folds([s.subject for s in found], 3, 5)
    slow = probe_correct(z, true, folds).float().mean(0)
    assert (result.accuracy[1] - slow).abs().max() <= 1.5 / len(found)  # rounding may turn a statement on the border
    assert json.loads(json.dumps(result.note))["seed"] == 5
    again = probe_heads(heads, task, seed=5, folds=3, per_prompt=2)
    assert torch.equal(again.accuracy, result.accuracy) and torch.equal(again.directions, result.directions)


# --- a real model -----------------------------------------------------------------------------------------------------


CAPITALS = """
France:Paris Italy:Rome Spain:Madrid Germany:Berlin Japan:Tokyo China:Beijing Russia:Moscow Egypt:Cairo Greece:Athens
Poland:Warsaw Austria:Vienna Portugal:Lisbon Sweden:Stockholm Norway:Oslo Denmark:Copenhagen Finland:Helsinki
Ireland:Dublin Hungary:Budapest Cuba:Havana Peru:Lima Chile:Santiago Kenya:Nairobi Iran:Tehran Iraq:Baghdad India:Delhi
"""


@pytest.mark.slow
def test_some_heads_of_smollm2_know_true_capitals_from_false_ones() -> None:
    """Every capital is right once and wrong about once: the name alone does not tell."""
    try:
        model = load_model("smollm2-135m")
    except InputError as error:
        pytest.skip(str(error))
    facts = [pair.split(":") for pair in CAPITALS.split()]
    examples = (Example(f"The capital of {country} is", country, (capital,)) for country, capital in facts)
    result = probe_heads(model, Task("capitals", tuple(examples)))
    assert result.note["true"] == result.note["false"] == len(facts)
    assert result.accuracy.max() > 0.9 and result.accuracy[0].max() < 0.8  # found in the middle, not at the entrance
