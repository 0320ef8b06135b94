"""Memory and context heads of a model whose heads are known, from scores to the verdict and the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headtune.analysis.heads.head_set import HeadSet
from headtune.analysis.identify.pipeline import IdentifyResult, identify
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.reports.dissociation import dissociation_table, next_step, verdict
from headtune.analysis.reports.heat_maps import marked_heads
from headtune.analysis.synthetic.planted import PlantedModel, plant
from headtune.analysis.synthetic.planting import Planting
from headtune.analysis.tasks.task import Task
from headtune.analysis.utils.errors import InputError


@pytest.fixture(scope="module")
def conflict() -> tuple[PlantedModel, HeadModel, Task]:
    """Prompts that state an answer of another subject, and a model whose suppression heads write it instead.

    The heads that read the stated answer have their sign turned: they raise it, as context heads do.
    """
    planted = plant(Planting("conflict", n_layers=3, d_model=64))
    examples = []
    for example in planted.task.examples:
        if len(example.previous) == 1:
            stated = next(town for town in planted.planting.answers if town not in example.answers)
            prompt = example.prompt.replace(example.previous[0], stated)
            examples.append(replace(example, prompt=prompt, previous=(stated,), corrupt=None))
    model = planted.view()
    with torch.no_grad():
        for layer, head in planted.roles["suppression"]:
            model.output_weight(layer)[head].mul_(-0.3)  # together about as strong as the recall heads
    return planted, model, Task("conflict", tuple(examples))


@pytest.fixture(scope="module")
def result(conflict: tuple[PlantedModel, HeadModel, Task]) -> IdentifyResult:
    _, model, task = conflict
    return identify(model, task, top=3, verify_top=3, n_random=25, roles=["memory", "context=previous-target:+"])


def test_the_planted_heads(conflict: tuple[PlantedModel, HeadModel, Task], result: IdentifyResult) -> None:
    roles = conflict[0].roles
    heads = result.heads
    assert list(heads.roles) == ["memory", "context"]
    assert set(heads.top("memory")) == set(roles["recall"]) and set(heads.top("context")) == set(roles["suppression"])
    assert heads.stability["memory"] == heads.stability["context"] == 1.0


def test_silencing_changes_the_role_s_quantity(result: IdentifyResult) -> None:
    block = result.heads.verification
    memory, context = (block["dissociation"][role] for role in ("memory", "context"))
    assert (memory["quantity"], memory["expected"]) == ("p_remaining", "lower p_remaining")
    assert (context["quantity"], context["expected"]) == ("p_previous", "lower p_previous")
    for role, other, result_of_role in (("memory", "p_previous", memory), ("context", "p_remaining", context)):
        assert result_of_role["held"] and result_of_role["ablated"] < 0.7 * result_of_role["baseline"]
        assert block[f"ablate_{role}"][other]["mean"] >= block["baseline"][other]["mean"], "the other answer gains"


def test_the_page_says_which(result: IdentifyResult, tmp_path: Path) -> None:
    names = [row.name for row in dissociation_table(result.heads)]
    assert names[1] == "top 3 memory heads silenced" and "top 3 context heads silenced" in names
    matched = result.heads.verification["ablate_random_like_context"]["p_previous"]
    row = next(row for row in reversed(dissociation_table(result.heads)) if "random" in row.name)
    assert row.cells["p_previous"].extreme == matched["lowest_set"], "context heads lower it"
    words = verdict(result.heads)
    assert "Memory (silencing must lower p(remaining)) holds" in words
    assert "Context (silencing must lower p(previous)) holds" in words and next_step(result.heads) == ""
    assert list(marked_heads(result.heads)) == ["memory", "context"]
    result.save(tmp_path / "heads")
    page = (tmp_path / "heads" / "report.html").read_text(encoding="utf-8")
    assert "Context (silencing must lower p(previous))" in page and "dla.previous-target" in page
    data = json.loads((tmp_path / "heads" / "heads.json").read_text())
    assert data["method"]["parameters"]["roles"] == {"memory": "target-previous:+", "context": "previous-target:+"}
    assert HeadSet.load(tmp_path / "heads").top_heads("context", 3) == sorted(result.heads.top("context"))


def test_without_roles_nothing_is_added(conflict: tuple[PlantedModel, HeadModel, Task]) -> None:
    _, model, task = conflict
    plain, named = (
        identify(model, task.limited(8), "dla", top=2, n_random=2, roles=roles)
        for roles in (None, ["recall", "suppression"])
    )
    assert "roles" not in plain.heads.method["parameters"]
    assert replace(plain.heads, created="") == replace(named.heads, created="")
    assert not any("-" in name for name in plain.scores.by_example)


def test_roles_of_previous_answers_want_some(conflict: tuple[PlantedModel, HeadModel, Task]) -> None:
    _, model, task = conflict
    single = Task("facts", tuple(replace(example, previous=()) for example in task.examples[:6]))
    for role in ("memory", "x=previous:+", "y=ablation.previous_logp:-"):
        with pytest.raises(InputError, match=f"role {role.partition('=')[0]}=.* is about previous answers"):
            identify(model, single, roles=[role])
    assert list(identify(model, single, "dla", n_random=2, roles=["suppression"]).heads.roles) == ["suppression"]


def test_a_role_of_a_method_that_does_not_run_is_refused_at_once(
    conflict: tuple[PlantedModel, HeadModel, Task],
) -> None:
    _, model, task = conflict
    with pytest.raises(InputError, match=r"role 'retrieval' is retrieval.copy:.*give --method retrieval"):
        identify(model, task, "dla", roles=["retrieval"])
