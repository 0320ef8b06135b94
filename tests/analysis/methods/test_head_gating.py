"""Learned gates: the loss is the model's own, and on models with known heads the roles come out."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from headtune.analysis.methods import head_gating
from headtune.analysis.methods.head_gating import Gates, answer_log_probability, fit_gates, gate_scores
from headtune.analysis.methods.scores import Array
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.synthetic.planted import PlantedModel, Planting, plant
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.progress import silent
from helpers.tiny import KINDS, N_HEADS, N_LAYERS, tiny_model, tiny_task, tiny_tokenizer


@pytest.fixture(
    scope="module", params=("llama-gqa", "mistral-sliding", "gpt2", "opt", "gpt_neox", "phi", "gemma2-caps")
)
def model(request: pytest.FixtureRequest) -> HeadModel:
    kind = KINDS[request.param]
    return wrap_model(tiny_model(kind.family, **kind.config), tiny_tokenizer(), request.param)


def examples_of(model: HeadModel, previous: Sequence[int] = (1, 3)) -> list[Encoded]:
    return encode(tiny_task(previous=tuple(previous), subjects=3), model.tokenizer).examples


# --- the loss ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_padded_batch_is_every_prompt_alone(model: HeadModel) -> None:
    """Prompts of several lengths, gates of every size; the slow way takes one prompt, and heads scaled by hooks."""
    batch = examples_of(model)
    assert len({len(example.tokens) for example in batch}) > 2
    levels = torch.rand(N_LAYERS, N_HEADS, generator=torch.Generator().manual_seed(0))
    factors = {(layer, head): levels[layer, head].item() for layer in range(N_LAYERS) for head in range(N_HEADS)}
    for quantity in ("target", "previous"):
        found = answer_log_probability(model, batch, levels, quantity)  # type: ignore[arg-type]
        for value, example in zip(found, batch, strict=True):
            with hooks.scale(model, factors):
                logits = model.hf(example.tokens[None], use_cache=False).logits[0, -1]
            tokens = set(example.target_tokens if quantity == "target" else example.previous_tokens)
            expected = logits.softmax(-1)[list(tokens)].sum().log()
            assert value.item() == pytest.approx(expected.item(), abs=2e-5)


def test_its_gradient_is_the_finite_difference(llama: HeadModel) -> None:
    batch, levels = examples_of(llama)[:3], torch.full((N_LAYERS, N_HEADS), 0.7, requires_grad=True)
    answer_log_probability(llama, batch, levels, "target").sum().backward()
    assert levels.grad is not None
    for head in ((0, 1), (2, 3)):
        ends = []
        for sign in (1, -1):
            moved = levels.detach().clone()
            moved[head] += sign * 1e-2
            with torch.no_grad():
                ends.append(answer_log_probability(llama, batch, moved, "target").sum())
        assert levels.grad[head].item() == pytest.approx((ends[0] - ends[1]).item() / 2e-2, abs=2e-3)
    llama.hf.zero_grad()


def test_open_gates_are_the_model(llama: HeadModel) -> None:
    batch = examples_of(llama)[:2]
    with torch.no_grad():
        found = answer_log_probability(llama, batch, torch.ones(N_LAYERS, N_HEADS), "target")
        logits = llama.hf(batch[0].tokens[None]).logits[0, -1]
    expected = logits.softmax(-1)[list(batch[0].target_tokens)].sum().log()
    assert found[0].item() == pytest.approx(expected.item(), abs=1e-5)


# --- the fit ----------------------------------------------------------------------------------------------------------


def test_without_a_task_gates_go_where_they_are_pushed(llama: HeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = torch.zeros(1, requires_grad=True)
    monkeypatch.setattr(head_gating, "answer_log_probability", lambda *_args: flat)
    found = fit_gates(llama, examples_of(llama), steps=40)
    bound = torch.tensor(head_gating.BOUND).sigmoid().item()
    torch.testing.assert_close(found.pushed_open, torch.full((N_LAYERS, N_HEADS), bound))
    torch.testing.assert_close(found.pushed_shut, torch.full((N_LAYERS, N_HEADS), 1 - bound))


def test_without_a_push_the_fit_lowers_the_loss(llama: HeadModel) -> None:
    examples = examples_of(llama)
    found = fit_gates(llama, examples, steps=30, batch_size=len(examples), weight=0.0)
    assert torch.equal(found.pushed_open, found.pushed_shut)
    start = torch.full((N_LAYERS, N_HEADS), head_gating.OPEN).sigmoid()
    with torch.no_grad():
        before, after = (
            answer_log_probability(llama, examples, levels, "target").mean() for levels in (start, found.pushed_open)
        )
    assert after > before + 0.1


def test_roles_are_made_of_both_fits() -> None:
    found = Gates(pushed_open=torch.tensor([0.9, 0.9, 0.1]), pushed_shut=torch.tensor([0.8, 0.1, 0.1]))
    for name, expected in {
        "facilitating": [0.8, 0.1, 0.1],
        "interfering": [0.1, 0.1, 0.9],
        "irrelevant": [0.9 * 0.2, 0.9 * 0.9, 0.1 * 0.9],
        "signed": [0.7, 0.0, -0.8],
    }.items():
        torch.testing.assert_close(getattr(found, name), torch.tensor(expected))


def test_a_seed_is_a_result(llama: HeadModel) -> None:
    examples = examples_of(llama)
    torch.manual_seed(1)
    first = fit_gates(llama, examples, steps=5, batch_size=2, seed=3)
    torch.manual_seed(2)
    again, other = (fit_gates(llama, examples, steps=5, batch_size=2, seed=seed) for seed in (3, 4))
    assert torch.equal(first.pushed_open, again.pushed_open) and torch.equal(first.pushed_shut, again.pushed_shut)
    assert not torch.equal(first.pushed_shut, other.pushed_shut)


def test_every_prompt_takes_its_turn(llama: HeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    examples, seen = examples_of(llama), []
    inner = head_gating.answer_log_probability

    def counted(model: HeadModel, batch: Sequence[Encoded], levels: Tensor, quantity: head_gating.Quantity) -> Tensor:
        seen.append([example.example.prompt for example in batch])
        return inner(model, batch, levels, quantity)

    monkeypatch.setattr(head_gating, "answer_log_probability", counted)
    fit_gates(llama, examples, steps=6, batch_size=4)
    prompts = {example.example.prompt for example in examples}
    assert len(seen) == 12 and all(len(batch) == 4 for batch in seen)
    assert {*seen[0], *seen[1], *seen[2]} == prompts == {*seen[3], *seen[4], *seen[5]}
    assert seen[:6] == seen[6:]  # both fits see the same
    seen.clear()
    fit_gates(llama, examples[:3], steps=2, batch_size=8)
    assert [len(batch) for batch in seen] == [3, 3, 3, 3]


def test_nothing_is_left_behind(llama: HeadModel) -> None:
    parameters = list(llama.hf.requires_grad_(True).parameters())
    parameters[3].requires_grad_(False)
    asking = [parameter.requires_grad for parameter in parameters]
    values = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        fit_gates(llama, examples_of(llama), steps=2)
    assert [parameter.requires_grad for parameter in parameters] == asking
    assert all(parameter.grad is None for parameter in parameters)
    assert all(torch.equal(now, before) for now, before in zip(parameters, values, strict=True))
    assert not any(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in llama.hf.modules())
    llama.hf.requires_grad_(True)


def test_bad_input_is_refused(llama: HeadModel) -> None:
    single = examples_of(llama, previous=(0,))
    with pytest.raises(InputError, match="none of 6 examples has previous answers to fit gates to; add such examples"):
        fit_gates(llama, single, "previous")
    with pytest.raises(InputError, match="steps=0, batch_size=8; expected at least 1 of each"):
        fit_gates(llama, single, steps=0)
    with pytest.raises(InputError, match="batch_size=0"):
        fit_gates(llama, single, batch_size=0)


# --- known heads ------------------------------------------------------------------------------------------------------

PLANTED = {"gqa": Planting(), "redundant": Planting("redundant", n_pairs=1, seed=1)}
NAMES = [pytest.param("gqa", marks=pytest.mark.slow), "redundant"]


@functools.cache
def scored(name: str) -> tuple[PlantedModel, dict[str, Array]]:
    model = plant(PLANTED[name])
    heads = model.view()
    return model, gate_scores(heads, encode(model.task.limited(24), heads.tokenizer).examples, 0, silent)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_recall_heads_facilitate_and_suppression_heads_interfere(name: str) -> None:
    model, scores = scored(name)
    facilitating = scores["gates.facilitating"]
    for head in model.roles["recall"]:
        assert facilitating[head] > 0.3 and scores["gates.interfering"][head] < 0.1
        assert scores["gates.target"][head] > 0.3 and scores["gates.previous"][head] > 0.2
    for head in model.roles["suppression"]:
        assert scores["gates.previous"][head] < -0.9
    # Of the suppression heads, those that remain after the others are shut are needed to give *remaining* answers.
    assert max(facilitating[head] for head in model.roles["suppression"]) > 0.3
    first, second = model.roles["helper"]
    assert facilitating[first] > 0.3 and scores["gates.previous"][second] < -0.5
    grade = model.grade("suppression", scores["gates.previous"])
    assert grade["auroc"] == 1.0 and grade["sign_accuracy"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_decoys_and_background_are_irrelevant(name: str) -> None:
    model, scores = scored(name)
    for role in ("decoy_attends", "decoy_writes", "background"):
        for head in model.roles[role]:
            assert scores["gates.irrelevant"][head] > 0.9
            assert abs(scores["gates.target"][head]) < 0.1 and abs(scores["gates.previous"][head]) < 0.2


def test_of_a_redundant_pair_one_is_enough() -> None:
    model, scores = scored("redundant")
    kept = sorted(scores["gates.facilitating"][head] for head in model.roles["redundant"])
    assert kept[0] < 0.1 and kept[1] > 0.3


def test_scores_are_float32_by_layer_and_head() -> None:
    model, scores = scored("redundant")
    names = ("facilitating", "interfering", "irrelevant", "target", "previous")
    assert set(scores) == {f"gates.{name}" for name in names}
    for value in scores.values():
        assert value.dtype == np.float32 and value.shape == (model.planting.n_layers, model.planting.n_heads)


def test_without_previous_answers_there_is_no_such_score(monkeypatch: pytest.MonkeyPatch, llama: HeadModel) -> None:
    short = functools.partial(fit_gates, steps=1)
    monkeypatch.setattr(head_gating, "fit_gates", short)
    told: list[str] = []
    scores = gate_scores(llama, examples_of(llama, previous=(0,)), 0, lambda items, what: told.append(what) or items)
    assert "gates.target" in scores and "gates.previous" not in scores
    assert told == [f"fitting gates pushed {way} (target answers)" for way in ("open", "shut")]
    mixed = [*examples_of(llama, previous=(0,)), *examples_of(llama, previous=(1,))]
    assert "gates.previous" in gate_scores(llama, mixed, 0, silent)
