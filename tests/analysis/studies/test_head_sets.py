"""Studies of sets and paths of heads, against slow references and on a model whose heads are known."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from headtune.analysis.heads.ranking import elbow, rank
from headtune.analysis.interventions.counterfactuals import Counterfactuals
from headtune.analysis.methods.patching import INPUTS, every_head, path_effects
from headtune.analysis.methods.scores import Scores
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.studies import base, faithfulness
from headtune.analysis.studies import elbow as elbow_module
from headtune.analysis.studies.base import Analysis, Figure, Table
from headtune.analysis.studies.path_patching import parse_receivers
from headtune.analysis.synthetic.metrics import Head
from headtune.analysis.synthetic.planted import KINDS, PlantedModel, plant
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.errors import InputError
from helpers.tiny import N_HEADS, N_LAYERS, tiny_model, tiny_task, tiny_tokenizer

TASK = tiny_task(subjects=3)


@pytest.fixture(scope="module")
def model() -> HeadModel:
    return wrap_model(tiny_model("llama", 1), tiny_tokenizer(), "tiny")


@pytest.fixture(scope="module")
def planted() -> PlantedModel:
    return plant(next(kind for kind in KINDS if kind.name == "gqa"))


@pytest.fixture(scope="module")
def known(planted: PlantedModel) -> HeadModel:
    return planted.view()


def some(planted: PlantedModel, n: int = 12) -> Task:
    return planted.task.limited(n)


def tables(found: Analysis) -> list[Table]:
    return [part for part in found.parts if isinstance(part, Table)]


def refuse_work(*_: Any) -> Any:
    pytest.fail("it began to work")


@torch.no_grad()
def end_logits(model: HeadModel, encoded: Encoded, values: dict[Head, torch.Tensor]) -> torch.Tensor:
    """Slow: one forward pass with heads' outputs at END put to `values`."""
    with hooks.replace(model, values, positions=torch.tensor([encoded.end])):
        return model.hf(encoded.tokens[None]).logits[0, -1].float()


# --- how heads add up -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_elbow_study_against_forward_passes(planted: PlantedModel, known: HeadModel) -> None:
    task = some(planted)
    found = base.run("elbow", known, task, methods="dla", top=4)
    examples = encode(task, known.tokenizer).examples
    silent = torch.zeros(known.head_dim)
    for role, quantity, column in (
        ("recall", "p_remaining", "target_tokens"),
        ("suppression", "p_previous", "previous_tokens"),
    ):
        of_role = found.data[role]
        heads = [tuple(head) for head in of_role["heads"]]
        assert 2 <= len(heads) <= 4 and of_role["quantity"] == quantity
        for k, interval in enumerate(of_role["curve"]):
            p = [
                end_logits(known, one, dict.fromkeys(heads[:k], silent)).softmax(-1)[list(getattr(one, column))].sum()
                for one in examples
            ]
            assert interval["mean"] == pytest.approx(np.mean(p), abs=1e-4)
            assert interval["ci"][0] <= interval["mean"] <= interval["ci"][1]
        assert len(of_role["curve"]) == len(heads) + 1
        assert of_role["elbow"] == elbow([interval["mean"] for interval in of_role["curve"]])
    assert [table.title.split(":")[0] for table in tables(found)] == ["Recall", "Suppression"]
    assert [row[0] for row in tables(found)[0].rows] == [str(k) for k in range(len(found.data["recall"]["heads"]) + 1)]
    assert tables(found)[0].rows[0][1] == "nothing"
    assert tables(found)[0].rows[1][1] == "L{}H{}".format(*found.data["recall"]["heads"][0])


def test_the_elbow_of_planted_suppression_is_in_the_planted_heads(planted: PlantedModel, known: HeadModel) -> None:
    """Silencing what is beyond the planted heads changes next to nothing, so the bend cannot lie there."""
    found = base.run("elbow", known, some(planted), top=8)
    heads = [tuple(head) for head in found.data["suppression"]["heads"]]
    real = planted.roles["suppression"]
    assert set(heads[: len(real)]) == set(real)
    assert 1 <= found.data["suppression"]["elbow"] <= len(real)


def test_a_role_without_heads_is_said(planted: PlantedModel, known: HeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = rank

    def only_recall(scores: Scores, role: str, *rest: Any, **options: Any) -> Any:
        return [] if role == "suppression" else right(scores, role, *rest, **options)

    monkeypatch.setattr(elbow_module, "rank", only_recall)
    found = base.run("elbow", known, some(planted), methods="dla", top=2)
    assert found.data["suppression"] == {"heads": [], "reason": "no confirmed heads"}
    assert "No suppression heads were confirmed." in found.parts
    assert found.data["recall"]["heads"]


def test_nothing_is_confirmed_in_a_random_model_of_few_subjects(model: HeadModel) -> None:
    found = base.run("elbow", model, TASK, methods="dla", top=2)
    assert found.data == {role: {"heads": [], "reason": "no confirmed heads"} for role in ("recall", "suppression")}


def test_the_elbow_of_single_facts_is_of_the_correct_answer(planted: PlantedModel, known: HeadModel) -> None:
    task = some(planted)
    facts = replace(task, examples=tuple(replace(one, previous=(), corrupt=None) for one in task.examples))
    found = base.run("elbow", known, facts, methods="dla", top=2)
    assert {of_role.get("quantity") for of_role in found.data.values()} <= {"p_remaining", None}
    assert found.data["recall"]["quantity"] == "p_remaining"


# --- what heads carry alone -------------------------------------------------------------------------------------------


def test_faithfulness_curves_against_forward_passes(model: HeadModel) -> None:
    examples = encode(TASK, model.tokenizer).examples
    references = Counterfactuals(model, examples, 0)
    ranking = [(2, 1), (0, 3), (1, 0), *(head for head in every_head(model) if head not in [(2, 1), (0, 3), (1, 0)])]
    proportions = (0.0, 0.25, 1.0)  # 0, 3 and all 12 heads
    found = faithfulness.faithfulness_curves(model, references, {"mine": ranking}, lambda items, _: items, proportions)
    assert found["mine"].shape == (len(examples), 3)
    for index, encoded in enumerate(examples):
        mean = references.mean(index)
        for column, kept in enumerate(([], ranking[:3], ranking)):
            logits = end_logits(model, encoded, {head: mean[head] for head in ranking if head not in kept})
            assert found["mine"][index, column] == pytest.approx(
                float(faithfulness.behaviour(logits[None], encoded)), abs=1e-4
            )


def test_behaviour_is_the_mean_logit_of_the_remaining_answers_above_the_vocabulary(model: HeadModel) -> None:
    encoded = encode(TASK, model.tokenizer).examples[0]
    logits = torch.randn(2, len(model.tokenizer), generator=torch.Generator().manual_seed(0))
    expected = logits[:, list(encoded.target_tokens)].mean(-1) - logits.mean(-1)
    torch.testing.assert_close(faithfulness.behaviour(logits, encoded), expected)
    torch.testing.assert_close(
        faithfulness.behaviour(logits + 3, encoded), expected
    )  # what moves all logits is taken out


def test_faithfulness_of_by_hand() -> None:
    values = np.array([[0.0, 1.0, 4.0], [2.0, 3.0, 2.0]])
    assert faithfulness.faithfulness_of(values) == pytest.approx([0.0, 0.5, 1.0])  # of means 1, 2, 3
    assert faithfulness.faithfulness_of(-values) == pytest.approx([0.0, 0.5, 1.0])
    with pytest.raises(InputError, match="changes nothing here, so faithfulness is undefined"):
        faithfulness.faithfulness_of(np.array([[1.0, 5.0, 1.0]]))


def test_area_by_hand() -> None:
    assert faithfulness.area([0.0, 0.5, 1.0], np.array([0.0, 1.0, 1.0])) == pytest.approx(0.75)
    assert faithfulness.area([0.0, 0.1, 1.0], np.array([2.0, 0.0, 0.0])) == pytest.approx(0.1)


@functools.cache
def faithful(seed: int = 0) -> Analysis:
    planted = plant(next(kind for kind in KINDS if kind.name == "gqa"))
    return base.run("faithfulness", planted.view(), some(planted), methods="ablation, dla", seed=seed)


@pytest.mark.slow
def test_faithfulness_starts_at_nothing_and_ends_at_everything() -> None:
    data = faithful().data
    assert data["proportions"][0] == 0 and data["proportions"][-1] == 1
    assert list(data["methods"]) == ["ablation", "dla", "random"]
    for of_method in data["methods"].values():
        for curve in (of_method["signed"], of_method["absolute"]):
            assert len(curve) == len(data["proportions"])
            assert curve[0] == 0 and curve[-1] == pytest.approx(1)
        shortfall = np.abs(1 - np.array(of_method["absolute"]))
        assert of_method["CMD"] == pytest.approx(np.trapezoid(shortfall, data["proportions"]))
        assert of_method["CPR"] == pytest.approx(np.trapezoid(of_method["signed"], data["proportions"]))
    assert data["methods"]["random"]["signed"] == data["methods"]["random"]["absolute"]


@pytest.mark.slow
def test_a_ranking_that_knows_the_heads_is_more_faithful_than_a_random_one() -> None:
    random = [faithful(seed).data["methods"]["random"] for seed in range(3)]
    assert len({found["CMD"] for found in random}) == 3, "other draws"
    for name in ("ablation", "dla"):
        found = faithful().data["methods"][name]
        assert found["CMD"] < 0.6 * min(of_random["CMD"] for of_random in random)
        assert found["CPR"] > 1.2 * max(of_random["CPR"] for of_random in random)
    (table,) = tables(faithful())
    assert [row[0] for row in table.rows] == ["ablation", "dla", "random"]


def test_faithfulness_of_every_kind_of_method(model: HeadModel) -> None:
    found = base.run("faithfulness", model, TASK, methods="attribution_patching,mean")
    assert list(found.data["methods"]) == ["attribution_patching", "mean", "random"]
    assert list(base.run("faithfulness", model, TASK, methods="all").data["methods"]) == [
        "dla",
        "ablation",
        "random",
    ]


def test_faithfulness_needs_two_subjects(model: HeadModel) -> None:
    with pytest.raises(InputError, match="at least two subjects"):
        base.run("faithfulness", model, tiny_task(subjects=1))


# --- through whom heads act -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["L1H2", "L1H2:output", "1.2:query", "L1H2:query,", "L1H2:query;L1H1:key", ":query", "L-1H0:key", " "]
)
def test_receivers_that_are_none(model: HeadModel, text: str) -> None:
    with pytest.raises(InputError, match=r"receiver '.*' must look like L23H3:query, with one of query, key, value"):
        base.run("path_patching", model, TASK, refuse_work, receivers=text)


@pytest.mark.parametrize("text", [f"L{N_LAYERS}H0:query", f"L0H{N_HEADS}:value"])
def test_receivers_that_the_model_does_not_have(model: HeadModel, text: str) -> None:
    with pytest.raises(InputError, match=text.split(":")[0]):
        base.run("path_patching", model, TASK, refuse_work, receivers=text)


def test_parse_receivers(model: HeadModel) -> None:
    assert parse_receivers("L2H3:query, L0H1:value", model) == [((2, 3), "query"), ((0, 1), "value")]


def test_paths_to_chosen_receivers(model: HeadModel) -> None:
    found = base.run("path_patching", model, TASK, receivers="L2H3:query,L1H0:value,L0H1:key", top=3)
    assert found.data["receivers"] == [[2, 3, "query"], [1, 0, "value"], [0, 1, "key"]]
    scores = {name: np.array(values) for name, values in found.data["scores"].items()}
    assert all(values.shape == (N_LAYERS, N_HEADS) and np.isfinite(values).all() for values in scores.values())
    for receiver, layer in (("path_L2H3_query", 2), ("path_L1H0_value", 1), ("path_L0H1_key", 0)):
        for quantity in ("target", "previous"):
            values = scores[f"{receiver}.{quantity}"]
            assert (values[layer:] == 0).all(), "only earlier heads are heard"
            assert (values[:layer] != 0).all()
    titles = {table.title: table for table in tables(found)}
    to_query = titles["To L2H3's query: remaining answers"]
    sizes = [abs(row[1]) for row in to_query.rows]  # type: ignore[arg-type]
    assert len(sizes) == 3 and sizes == sorted(sizes, reverse=True)
    assert sizes[0] == pytest.approx(np.abs(scores["path_L2H3_query.target"]).max(), rel=1e-5)
    assert len(titles["To the logits: previous answers"].rows) == 3
    assert titles["To L0H1's key: previous answers"].rows == []


def test_paths_to_the_logits_are_those_of_the_method(model: HeadModel) -> None:
    found = base.run("path_patching", model, TASK, receivers="L1H0:value", seed=4)
    examples = encode(TASK, model.tokenizer).examples
    references = Counterfactuals(model, examples, 4)
    rows = [path_effects("path", model, one, references.mean(i)) for i, one in enumerate(examples)]
    for name in ("path.target", "path.previous"):
        assert np.array(found.data["scores"][name]) == pytest.approx(np.mean([row[name] for row in rows], 0), abs=1e-5)


def test_the_default_receivers_are_the_strongest_on_the_path_to_the_logits(model: HeadModel) -> None:
    found = base.run("path_patching", model, TASK, top=2)
    scores = {name: np.array(values) for name, values in found.data["scores"].items()}
    up = divmod(int(scores["path.target"].argmax()), N_HEADS)
    down = divmod(int(scores["path.previous"].argmin()), N_HEADS)
    expected = [[*head, through] for head in dict.fromkeys([up, down]) for through in INPUTS]
    assert found.data["receivers"] == expected
    single = base.run("path_patching", model, tiny_task(previous=(0,), subjects=2))
    assert len(single.data["receivers"]) == 3
    assert not [name for name in single.data["scores"] if "previous" in name]


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", ["elbow", "path_patching"])
@pytest.mark.parametrize("top", [0, -2])
def test_a_top_below_one_is_refused_before_any_work(model: HeadModel, study: str, top: int) -> None:
    with pytest.raises(InputError, match=f"option 'top' is {top}; expected at least 1"):
        base.run(study, model, TASK, refuse_work, top=top)


@pytest.mark.parametrize(("study", "option"), [("elbow", "methods"), ("faithfulness", "methods")])
def test_an_unknown_method_is_refused_before_any_work(model: HeadModel, study: str, option: str) -> None:
    with pytest.raises(InputError, match="method 'ablaton' is unknown; did you mean 'ablation'"):
        base.run(study, model, TASK, refuse_work, **{option: "ablaton"})


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("study", ["elbow", "path_patching", "faithfulness"])
def test_pictures_are_pictures_and_the_seed_is_all_that_is_drawn_from(model: HeadModel, study: str) -> None:
    one, two = (base.run(study, model, TASK, seed=3) for _ in range(2))
    assert one.data == two.data
    for part in one.parts:
        if isinstance(part, Figure):
            assert part.png.startswith(b"\x89PNG") and part.caption
