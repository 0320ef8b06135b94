"""Steering without training: each value against a slow reference, each adapter against the edit it stands for."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from headtune.analysis.interventions import last_layer, mlp_regression
from headtune.analysis.interventions.last_layer import Intercept, Sink
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import load_model, wrap_model
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.task import Example, Task, canonical, to_jsonl
from headtune.analysis.tasks.tokenized import as_chat, encode
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.files import write_text
from headtune.train.tuners import steering
from headtune.train.tuners.probing import (
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
from headtune.train.tuners.steering import ITI, Scale, Steered, apply, steer
from helpers.tiny import N_HEADS, N_LAYERS, quick_among, tiny_model, tiny_task, tiny_tokenizer

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "head_dim": 16},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["full_attention", *["sliding_attention"] * 2],
    },
    "gpt2": {},
    "opt": {},
    "gpt_neox": {},
    "gemma2": {},
}
LAST = N_LAYERS - 1


def _heads(family: str = "llama", **config: Any) -> HeadModel:
    return wrap_model(tiny_model(family, **(FAMILIES.get(family, {}) | config)), tiny_tokenizer(), family)


def _listed(n: int = 8) -> Task:
    """Questions with their own wrong answers; right ones are all of one country, wrong ones of another."""
    subjects = ["Spain", "Germany", "England", "Canada", "America", "Italy", "Japan", "France"][:n]
    examples = [
        Example(f"I know cities in {s}:", s, ("Rome", "Milan"), incorrect=("Tokyo", "Osaka", "Kobe")) for s in subjects
    ]
    return Task("listed", tuple(examples), kind="multiple_choice")


@torch.no_grad()
def _one_by_one(model: HeadModel, rows: list[list[int]], layer: int) -> Tensor:
    """`[n, n_heads, head_dim]` z at the last token, every row run on its own."""
    found = []
    for row in rows:
        with hooks.capture(model) as z:
            model.hf(torch.tensor([row]), use_cache=False)
        found.append(z[layer][0, -1])
    return torch.stack(found)


@torch.no_grad()
def _logits(hf: Any, model: HeadModel, prompt: str = "List five cities in Italy.\n1. Rome\n2.") -> Tensor:
    tokens = torch.tensor([model.tokenizer(prompt).input_ids])
    logits: Tensor = hf(tokens, use_cache=False).logits[0]
    return logits


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
    task = _listed(2)
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
    task = _listed(3)
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
    heads = _heads(family)
    heads.tokenizer.padding_side, heads.tokenizer.pad_token = side, None  # batches do not depend on either
    generator = random.Random(0)
    rows = [[generator.randrange(3, 300) for _ in range(generator.randint(1, 24))] for _ in range(50)]
    found = read_ends(heads, rows, [0, LAST])
    assert set(found) == {0, LAST}
    for layer in found:
        torch.testing.assert_close(found[layer], _one_by_one(heads, rows, layer), atol=1e-5, rtol=1e-5)


def test_a_chat_template_writes_its_own_special_tokens() -> None:
    heads = _heads()
    heads.tokenizer = tiny_tokenizer(bos=True)
    heads.tokenizer.chat_template = (
        "<bos>{% for m in messages %}{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    plain = tokenised(heads, ["List"], _listed())
    chat = as_chat(replace(_listed(), chat_template=True), heads.tokenizer)
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
    model = _heads(num_key_value_heads=N_HEADS, head_dim=8)
    _plant(model, (1, 2))
    task = Task("two", tuple(replace(e, answers=("Rome",), incorrect=("Tokyo",)) for e in _listed().examples))
    result = probe_heads(model, task, seed=0, folds=4)
    assert result.accuracy.shape == (N_LAYERS, N_HEADS) and result.directions.shape == (N_LAYERS, N_HEADS, 8)
    assert result.scores.mean(ACCURACY).dtype.name == "float32"
    (best,) = result.ranked(1)
    assert (best.layer, best.head, best.score, best.ci) == (1, 2, 1.0, (1.0, 1.0))
    others = result.accuracy.flatten().tolist()
    others.remove(1.0)
    assert others == [0.5] * (N_LAYERS * N_HEADS - 1)
    found = steer(model, ITI(alpha=2.0, top=1, folds=4), None, task)
    assert found.pairs == [(1, 2)] and found.ranked == (best,) and found.scores is not None
    (offset,) = found.values.values()
    torch.testing.assert_close(offset[0], 2.0 * result.sigma[1, 2] * result.directions[1, 2])
    rows = [model.tokenizer(s.text).input_ids for s in statements(task)[0]]
    along = _one_by_one(model, rows, 1)[:, 2] @ offset[0]
    assert along[::2].mean() > along[1::2].mean()  # from wrong answers towards right ones


def test_probed_scores_are_those_of_the_slow_route() -> None:
    heads, task = _heads(), tiny_task()
    result = probe_heads(heads, task, seed=5, folds=3, per_prompt=2)
    found, _ = statements(task, 5, 2)
    z = _one_by_one(heads, [heads.tokenizer(s.text).input_ids for s in found], 1)
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


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_what_probes_have_read_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, task, pairs = _heads("llama"), _listed(), [(1, 0), (1, 3)]
    probed = probe_heads(heads, task, seed=3, folds=2)
    anew = steer(heads, ITI(), pairs, task, seed=3)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was run again")

    with monkeypatch.context() as patch:
        patch.setattr("headtune.train.tuners.probing.read_ends", refuse)
        taken_over = steer(heads, ITI(), pairs, task, seed=3, probed=probed)
        for other in ({"seed": 4}, {"task": task.limited(4, 0)}):
            with pytest.raises(AssertionError, match="run again"):
                steer(heads, ITI(), pairs, **({"task": task, "seed": 3} | other), probed=probed)  # type: ignore[arg-type]
    assert taken_over.values.keys() == anew.values.keys()
    for name, value in taken_over.values.items():
        torch.testing.assert_close(value, anew.values[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_an_offset_reaches_the_residual_stream_through_w_o(family: str) -> None:
    heads, task, pairs = _heads(family), _listed(), [(1, 3), (1, 0)]
    found = steer(heads, ITI(alpha=15.0), pairs, task)
    assert found.pairs == [(1, 0), (1, 3)] and found.ranked == () and found.scores is None
    rows = [heads.tokenizer(s.text).input_ids for s in statements(task)[0]]
    theta, sigma = mass_mean(_one_by_one(heads, rows, 1), torch.tensor([s.true for s in statements(task)[0]]))
    expected = sum(15.0 * sigma[head] * theta[head] @ heads.output_weight(1)[head] for _, head in pairs)
    attention = heads.attention(1)
    tokens = torch.tensor([rows[0]])
    with torch.no_grad(), hooks.watch([attention]) as before:
        heads.hf(tokens, use_cache=False)
    model = apply(heads.hf, found)
    with torch.no_grad(), hooks.watch([attention]) as after:
        model(tokens, use_cache=False)
    moved = after[attention][1] - before[attention][1]  # [1, seq, d_model], the same everywhere
    torch.testing.assert_close(moved, expected.expand_as(moved), atol=1e-4, rtol=1e-4)  # type: ignore[union-attr]
    assert moved.abs().max() > 0.1


def _settings(tmp_path: Path) -> dict[str, Callable[[HeadModel], Steered]]:
    write_text(tmp_path / "fit.jsonl", to_jsonl(tiny_task((1, 2)).examples))
    task = tiny_task()
    return {
        "scale": lambda heads: steer(heads, Scale(0.3), [(0, 1), (2, 2), (0, 0)], task),
        "iti": lambda heads: steer(heads, ITI(3.0, top=4, folds=3, per_prompt=2), None, task),
        "sink": lambda heads: steer(heads, Sink(0.0, 0.3), None, task),
        "intercept": lambda heads: steer(heads, Intercept(0.7, str(tmp_path / "fit.jsonl")), None, task),
    }


@pytest.mark.parametrize("kind", ["scale", "iti", "sink", "intercept"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_adapter_merges_saves_and_says_what_it_is(kind: str, family: str, tmp_path: Path) -> None:
    heads = _heads(family)
    plain = _logits(heads.hf, heads)
    base = copy.deepcopy(heads.hf)
    found = _settings(tmp_path)[kind](heads)
    assert json.loads(json.dumps(found.note))["kind"] == kind
    assert all(value.dtype == torch.float32 for value in found.values.values())
    torch.testing.assert_close(_logits(heads.hf, heads), plain)  # finding changes nothing
    model = apply(heads.hf, found)
    steered = _logits(model, heads)
    assert (steered - plain).abs().max() > 1e-3
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(_logits(loaded, heads), steered, atol=1e-5, rtol=1e-5)
    merged: Any = model.merge_and_unload()
    torch.testing.assert_close(_logits(merged, heads), steered, atol=1e-4, rtol=1e-4)


def test_scaling_is_the_edit_of_the_same_name() -> None:
    heads, pairs = _heads(), [(2, 1), (0, 3)]
    with hooks.scale(heads, dict.fromkeys(pairs, -0.5)):
        expected = _logits(heads.hf, heads)
    model = apply(heads.hf, steer(heads, Scale(-0.5), pairs, tiny_task()))
    torch.testing.assert_close(_logits(model, heads), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", quick_among(FAMILIES, ["gpt2"]))
def test_sink_heads_are_those_of_whole_attention_matrices(family: str) -> None:
    heads, task = _heads(family), tiny_task((1, 4))
    eager = copy.deepcopy(heads.hf)
    eager.set_attn_implementation("eager")
    mean = torch.zeros(N_HEADS)
    with torch.no_grad():
        for example in task.examples:
            tokens = torch.tensor([heads.tokenizer(example.prompt).input_ids])
            attention = eager(tokens, output_attentions=True, use_cache=False).attentions[LAST]
            mean += attention[0, :, -1, 0] / len(task.examples)
    torch.testing.assert_close(steering.sink_attention(heads, task).float(), mean, atol=1e-5, rtol=1e-4)
    if family == "qwen2":  # the window is shorter than every prompt: nobody sees the first position
        with pytest.raises(
            InputError, match=r"layer 2 attends to the first position with more than tau=0.1 .*lower tau"
        ):
            steer(heads, Sink(0.1, 0.5), None, task)
        return
    tau = float(mean.sort().values[1:3].mean())
    pairs = [(LAST, head) for head in range(N_HEADS) if mean[head] > tau]
    assert len(pairs) == 2
    found = steer(heads, Sink(tau, 0.25), None, task)
    assert found.pairs == pairs and found.note["prompts"] == len(task.examples)
    with hooks.scale(heads, dict.fromkeys(pairs, 0.25)):
        expected = _logits(heads.hf, heads)
    torch.testing.assert_close(_logits(apply(heads.hf, found), heads), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "family", quick_among(["llama", "gpt2", "opt", "gpt_neox", "phi", "phi3", "qwen3"], ["llama", "opt"])
)
def test_an_intercept_is_the_knob(family: str, tmp_path: Path) -> None:
    model = _heads(family)
    write_text(tmp_path / "fit.jsonl", to_jsonl(tiny_task((1, 2)).examples))
    fit = load_task(str(tmp_path / "fit.jsonl"))
    b = mlp_regression.decompose(model, encode(fit, model.tokenizer).examples)[0].intercept[-1]
    with last_layer.subtract_mlp_intercept(model, b, beta=0.7):
        expected = _logits(model.hf, model)
    found = steer(model, Intercept(0.7, str(tmp_path / "fit.jsonl")), None, tiny_task())
    assert found.pairs == [] and found.note["fit_examples"] > 10
    torch.testing.assert_close(_logits(apply(model.hf, found), model), expected, atol=1e-5, rtol=1e-5)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_settings_that_mean_nothing_are_refused() -> None:
    for wrong, words in (
        (lambda: ITI(alpha=float("nan")), "alpha=nan is not a finite number"),
        (lambda: ITI(alpha=float("inf")), "alpha=inf is not a finite number"),
        (lambda: ITI(top=0), "top=0 is too few; give 1"),
        (lambda: ITI(folds=1), "folds=1 is too few; give 2"),
        (lambda: ITI(per_prompt=0), "per_prompt=0 is too few"),
        (lambda: Scale(float("inf")), "factor=inf is not a finite number"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            wrong()
        assert "\n" not in str(caught.value)


def test_what_cannot_be_steered_is_refused_before_the_model_runs(tmp_path: Path) -> None:
    heads, gemma, task = _heads(), _heads("gemma2"), tiny_task()
    write_text(tmp_path / "fit.jsonl", to_jsonl(task.examples))
    fit = Intercept(1.0, str(tmp_path / "fit.jsonl"))
    cases: list[tuple[HeadModel, Any, list[tuple[int, int]] | None, str]] = [
        (heads, Scale(2.0), None, "no heads are given"),
        (heads, ITI(), [], "no heads are given"),
        (heads, Scale(2.0), [(0, 9)], "L0H9 is out of range"),
        (heads, Scale(2.0), [(0, 1), (0, 1)], "name a head twice"),
        (heads, ITI(top=13), None, "asked for the top 13 heads, the model has 12; lower top"),
        (heads, ITI(top=3), [(0, 0)], "leave out top or the 1 heads given"),
        (heads, ITI(top=3, folds=9), None, "8 subjects are too few for 9 folds"),
        (heads, Sink(), [(2, 0)], "'sink' finds what it changes itself; leave out the 1 heads"),
        (heads, fit, [(2, 0)], "'intercept' finds what it changes itself"),
        (gemma, fit, None, "family 'gemma2' has a norm after its MLP"),
    ]

    def stop(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    for model, settings, pairs, words in cases:
        handle = model.hf.register_forward_pre_hook(stop)
        with pytest.raises(InputError, match=words) as caught:
            steer(model, settings, pairs, task)
        handle.remove()
        assert "\n" not in str(caught.value)


def test_values_of_another_adapter_are_refused() -> None:
    model = _heads()
    found = steer(model, Scale(2.0), [(0, 1), (1, 1)], tiny_task())
    less = dict(list(found.values.items())[:1])
    with pytest.raises(CheckError, match="does not hold what was computed"):
        apply(model.hf, replace(found, values=less))


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
