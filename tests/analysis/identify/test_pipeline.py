"""The identify stage from a model and a task to files, on a model with heads that recall and suppress."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headtune.analysis.heads.head_set import ROLES, HeadSet, RankedHead
from headtune.analysis.heads.ranking import rank
from headtune.analysis.identify import pipeline
from headtune.analysis.identify.pipeline import IdentifyResult
from headtune.analysis.identify.verdict import FAILS, HOLDS, UNKNOWN
from headtune.analysis.methods import head_gating
from headtune.analysis.methods.scores import load_means
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import load_model, wrap_model
from headtune.analysis.reports.dissociation import dissociation_table
from headtune.analysis.reports.dissociation import verdict as verdict_of
from headtune.analysis.reports.head_profiles import read_profiles
from headtune.analysis.synthetic.planted import PlantedModel
from headtune.analysis.tasks.task import Example, Task
from headtune.analysis.tasks.tokenized import Encoded
from headtune.analysis.utils.errors import InputError
from headtune.cli import console
from headtune.cli.commands.identify import print_heads
from helpers.tiny import tiny_model, tiny_task, tiny_tokenizer

SOME = (RankedHead(1, 2, 1.0, (0.5, 1.5)), RankedHead(2, 0, 0.5, (0.1, 0.9)))
OTHER = (RankedHead(1, 0, -1.0, (-1.5, -0.5)),)


SHAPE = (3, 8)
FEW = tiny_task(subjects=2)


@pytest.fixture(scope="module")
def model() -> HeadModel:
    """A random model: nothing to find."""
    return wrap_model(tiny_model("llama", num_attention_heads=8, num_key_value_heads=4), tiny_tokenizer(), "tiny")


@pytest.fixture(scope="module")
def found(lists: HeadModel, towns: Task) -> IdentifyResult:
    return pipeline.identify(lists, towns, top=3, verify_top=2, n_random=19)


def shown(found: IdentifyResult, folder: Path) -> str:
    """Everything a person sees of a head set: files, terminal, page. Returns the page."""
    found.save(folder)
    heads = HeadSet.load(folder)
    assert heads == found.heads
    with console.console.capture() as printed:
        print_heads(replace(found, heads=heads))
    for ranked in heads.roles.values():
        assert all(entry.name in printed.get() for entry in ranked)
    assert verdict_of(heads)
    return (folder / "report.html").read_text()


def test_the_head_set_describes_model_task_and_method(lists: HeadModel, towns: Task, found: IdentifyResult) -> None:
    heads = found.heads
    assert heads.model == lists.identity()
    assert heads.task["name"] == towns.name and heads.task["sha256"] == towns.sha256
    assert heads.task["n_examples"] == len(found.examples) == heads.task["n_subjects"] == 8
    assert heads.method["name"] == "all" and heads.method["seed"] == 0
    parameters = heads.method["parameters"]
    assert (parameters["rank_by"], parameters["false_discovery_rate"]) == ("contrast", 0.05)
    assert parameters["rules"]["suppression"] == {
        "rank": "dla.previous_contrast",
        "sign": -1.0,
        "confirm": ["ablation.previous_contrast", "ablation.previous_logp"],
    }
    assert set(heads.roles) == set(ROLES)
    assert set(heads.stability) == {*ROLES, "bootstrap"}
    assert all(0 <= heads.stability[role] <= 1 for role in ROLES)
    assert heads.check_model(lists.identity()) == []


def test_the_planted_heads_are_ranked_confirmed_and_verified(planted: PlantedModel, found: IdentifyResult) -> None:
    """By contrast; every number that confirms a head is with it."""
    for role, sign, quantity in (("recall", 1, "target"), ("suppression", -1, "previous")):
        ranked = found.heads.roles[role]
        assert {(entry.layer, entry.head) for entry in ranked} == set(planted.roles[role])
        for entry in ranked:
            assert entry.ci[0] < entry.score < entry.ci[1] and sign * entry.ci[0] > 0 < sign * entry.ci[1]
            assert entry.score == entry.effect[f"dla.{quantity}_contrast"]
            assert (
                sign * entry.effect[f"ablation.{quantity}_contrast"]
                > 0
                < sign * entry.effect[f"ablation.{quantity}_logp"]
            )
            assert 0 < entry.effect["p"] <= entry.effect["q"] <= 0.05
        result = found.heads.verification["dissociation"][role]
        assert (result["verdict"], result["held"], result["reason"]) == (HOLDS, True, "")
        assert result["p_value"] == 1 / 20 and result["sets"] == 19
    assert found.heads.verification["halves"] == 2


def test_scores_are_one_value_an_example_and_head(found: IdentifyResult) -> None:
    for name in (
        "dla.target",
        "dla.previous_contrast",
        "ablation.target_logp",
        "ablation.previous",
        "lens.subject.target",
    ):
        assert found.scores.by_example[name].shape == (len(found.examples), *SHAPE)
        assert np.isfinite(found.scores.by_example[name]).all()
    assert list(found.scores.subjects) == [example.example.subject for example in found.examples]


def test_files(found: IdentifyResult, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    found.save(folder)
    files = {file.name for file in folder.iterdir()}
    assert files == {"heads.json", "portraits.json", "report.html", "scores.safetensors"}
    profiles = read_profiles(folder / "portraits.json")
    assert [(profile.layer, profile.head) for profile in profiles] == found.ranked()
    assert HeadSet.load(folder) == found.heads
    means = load_means(folder / "scores.safetensors")
    assert set(means) == set(found.scores.by_example)
    for role, name in {"recall": "dla.target_contrast", "suppression": "dla.previous_contrast"}.items():
        assert len(found.heads.roles[role]) == 3
        for entry in found.heads.roles[role]:
            assert entry.score == pytest.approx(means[name][entry.layer, entry.head], abs=1e-6)


def test_an_existing_folder_is_refused_and_left_alone(found: IdentifyResult, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty; choose another --out"):
        found.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["note"]
    with pytest.raises(InputError, match="is a file; choose another --out"):
        found.save(tmp_path / "note")
    with pytest.raises(InputError, match="is a file; choose another --out"):
        found.save(tmp_path / "note" / "out")
    (tmp_path / "empty").mkdir()
    found.save(tmp_path / "empty")


def test_identify_is_reproducible(lists: HeadModel, towns: Task, found: IdentifyResult) -> None:
    again = pipeline.identify(lists, towns, top=3, verify_top=2, n_random=19)
    assert replace(again.heads, created="", command="") == replace(found.heads, created="", command="")
    other = pipeline.identify(lists, towns, top=3, verify_top=2, n_random=19, seed=1)
    assert other.heads.roles == found.heads.roles  # the seed divides and draws, it does not score
    name = "ablate_random_like_recall"
    assert other.heads.verification[name] != found.heads.verification[name]


def test_a_model_folder_is_enough(tiny_llama: Path, tmp_path: Path) -> None:
    loaded = load_model(str(tiny_llama), device="cpu")
    found = pipeline.identify(loaded, tiny_task(subjects=4), top=1, verify_top=1, n_random=2)
    found.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "heads.json").read_text())["model"]["name"] == str(tiny_llama)


@pytest.mark.parametrize(("method", "prefixes"), [("dla", {"dla", "lens", "attention"}), ("ablation", {"ablation"})])
def test_one_method_alone(model: HeadModel, method: str, prefixes: set[str]) -> None:
    found = pipeline.identify(model, tiny_task(subjects=3), method, top=2, verify_top=1, n_random=2)
    assert {name.split(".")[0] for name in found.scores.by_example} == prefixes
    assert found.heads.method["name"] == method


def test_an_unknown_method_is_refused(model: HeadModel) -> None:
    with pytest.raises(InputError, match="method 'patching' is unknown; did you mean"):
        pipeline.identify(model, tiny_task(), "patching")


def test_an_unknown_ranking_is_refused_before_anything_is_computed(model: HeadModel) -> None:
    with pytest.raises(InputError, match="rank_by 'contrasts' is unknown; did you mean 'contrast'"):
        pipeline.identify(model, tiny_task(), rank_by="contrasts", progress=lambda *_: pytest.fail("it began to work"))


def test_single_facts(model: HeadModel) -> None:
    """No previous answers: no quantity about them, and suppression is of the correct answer."""
    found = pipeline.identify(model, tiny_task(previous=(0,)), top=2, verify_top=1, n_random=2)
    assert not [name for name in found.scores.by_example if "previous" in name]
    assert "p_previous" not in found.heads.verification["baseline"]
    rule = found.heads.method["parameters"]["rules"]["suppression"]
    assert rule["rank"] == "dla.target_contrast" and rule["sign"] == -1.0
    verdict = found.heads.verification["dissociation"]["suppression"]
    assert verdict.get("quantity", "p_remaining") == "p_remaining"


@pytest.mark.parametrize("method", ["dla", "all"])
def test_the_table_of_single_facts_has_no_empty_and_no_doubled_column(
    lists: HeadModel, planted: PlantedModel, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recall heads of lists recall single facts too."""
    facts = {example.subject: example.answers for example in planted.task.examples}
    single = tuple(Example(f"List {name}:\n1.", name, answers) for name, answers in facts.items())
    found = pipeline.identify(lists, Task("single", single), method, top=2, verify_top=1, n_random=2)
    assert len(found.heads.roles["recall"]) == 2
    monkeypatch.setattr(console.console, "width", 300)  # whatever the terminal is that tests run in
    with console.console.capture() as printed:
        print_heads(found)
    assert ".previous" not in printed.get()
    tables = [line for line in printed.get().splitlines() if "dla.target_contrast [95%]" in line]
    assert tables and all(line.count("dla.target_contrast") == 1 for line in tables)
    for line, role in zip(tables, found.heads.roles, strict=True):
        assert ("ablation.target_logp" in line) == (method == "all" and bool(found.heads.roles[role]))
        assert line.count("ablation.target_logp") <= 1


@pytest.mark.parametrize(
    ("method", "rank_by", "said"),
    [("path", "centred", ""), ("attribution_patching", "centred", "raw"), ("dla", "raw", "")],
)
def test_a_method_without_the_scores_asked_for_says_by_what_it_ranks(
    lists: HeadModel, towns: Task, caplog: pytest.LogCaptureFixture, method: str, rank_by: str, said: str
) -> None:
    pipeline.identify(lists, towns.limited(4), method, top=1, verify_top=1, n_random=1, rank_by=rank_by)
    lines = [line for line in caplog.messages if "ranked by raw ones" in line]
    assert len(lines) == bool(said)
    assert not lines or (f"{method}.target" in lines[0] and "no centred scores" in lines[0])


def test_progress_sees_every_example_of_both_stages(model: HeadModel) -> None:
    seen: list[tuple[str, int]] = []

    def progress(examples: Sequence[Encoded], what: str) -> Iterable[Encoded]:
        seen.append((what, len(examples)))
        return examples

    pipeline.identify(model, tiny_task(subjects=2), top=1, verify_top=1, n_random=1, progress=progress)
    assert seen == [("scoring heads", 4), ("verifying", 4)]


def test_one_subject_is_refused_and_few_are_named(model: HeadModel, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match="prompts about one subject alone, 'Italy', and heads are confirmed by interv"):
        pipeline.identify(model, tiny_task(subjects=1))
    assert not caplog.messages
    found = pipeline.identify(model, tiny_task(subjects=2), "dla", top=1, verify_top=1, n_random=1)
    assert "about 2 subjects alone: intervals over so few say little; give 20 or more" in caplog.messages[0]
    assert found.heads.task["n_subjects"] == 2
    for role in ROLES:
        assert found.heads.verification["dissociation"][role]["verdict"] == UNKNOWN


def test_a_task_that_cannot_be_scored_is_refused(model: HeadModel) -> None:
    with pytest.raises(InputError, match="no example can be scored on first tokens"):
        pipeline.identify(model, Task("empty", ()))


# --- contrast ---------------------------------------------------------------------------------------------------------


def test_a_logit_that_all_tokens_share_changes_nothing_but_raw_logits(
    lists: HeadModel, planted: PlantedModel, towns: Task, found: IdentifyResult
) -> None:
    """What a head without a role writes, added to every row of the unembedding: it now lifts the logits of all tokens,
    no probability changes, and no head's place by contrast."""
    writes = dict.fromkeys(planted.roles["background"], torch.tensor(0.0))
    for example in found.examples:
        with hooks.capture(lists, positions=torch.tensor([example.end])) as z, torch.no_grad():
            lists.hf(example.tokens[None])
        for layer, head in writes:
            writes[layer, head] = writes[layer, head] + z[layer][0, head] @ lists.output_weight(layer)[head]
    stranger = max(writes, key=lambda head: writes[head].detach().norm().item())
    written = writes[stranger]
    hf: Any = deepcopy(planted.model)
    with torch.no_grad():
        hf.lm_head.weight += 30 * written / written.norm()
    shifted = wrap_model(hf, planted.tokenizer, "shifted")
    again = pipeline.identify(shifted, towns, top=3, verify_top=2, n_random=19)
    for name, values in found.scores.means().items():
        if name.endswith(("_contrast", "_centred", "_logp", "_p")):
            assert again.scores.mean(name) == pytest.approx(values, abs=2e-3), name
    for role in ROLES:
        assert again.heads.top(role) == found.heads.top(role)
        numbers, expected = (each.heads.verification["dissociation"][role] for each in (again, found))
        assert numbers["verdict"] == expected["verdict"]
        assert numbers["change"] == pytest.approx(expected["change"], abs=1e-4)
    # By raw logits that head is the best.
    raw = pipeline.identify(shifted, towns, top=3, verify_top=2, n_random=0, rank_by="raw")
    assert raw.heads.top("recall", 1) == [stranger]
    assert raw.heads.roles["recall"][0].score > 2 * found.heads.roles["recall"][0].score
    assert all(pairs[0] == list(stranger) for pairs in raw.heads.verification["ablate_recall"]["folds"])


@pytest.mark.parametrize("rank_by", ["centred", "raw"])
def test_other_rankings(lists: HeadModel, planted: PlantedModel, towns: Task, tmp_path: Path, rank_by: str) -> None:
    found = pipeline.identify(lists, towns, top=3, verify_top=2, n_random=19, rank_by=rank_by)
    form = "" if rank_by == "raw" else "_centred"
    parameters = found.heads.method["parameters"]
    assert parameters["rank_by"] == rank_by
    assert parameters["rules"]["recall"] == {
        "rank": f"dla.target{form}",
        "sign": 1.0,
        "confirm": [f"ablation.target{form}", *([] if rank_by == "raw" else ["ablation.target_logp"])],
    }
    assert set(found.heads.top("suppression")) == set(planted.roles["suppression"])
    assert found.heads.stability["suppression"] > 0.8
    shown(found, tmp_path / "out")


def test_subjects_with_the_same_answers_are_ranked_against_the_vocabulary(
    model: HeadModel, caplog: pytest.LogCaptureFixture
) -> None:
    """There is nothing to contrast with, which is said."""
    names = ("Italy", "Japan", "France", "Spain", "Germany")
    alike = Task("alike", tuple(Example(f"Some cities in {name}:", name, ("Rome", "Milan")) for name in names))
    found = pipeline.identify(model, alike, top=1, verify_top=1, n_random=1)
    assert caplog.messages[-1] == (
        "task alike: all subjects have the same answers, so heads are ranked against the vocabulary"
    )
    for method in ("dla", "ablation"):
        contrast, centred = (found.scores.mean(f"{method}.target_{form}") for form in ("contrast", "centred"))
        assert contrast == pytest.approx(centred, abs=1e-5)
    caplog.clear()
    pipeline.identify(model, alike, "dla", top=1, verify_top=1, n_random=1, rank_by="raw")
    assert not [message for message in caplog.messages if "vocabulary" in message]


# --- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rank", "confirm"),
    [
        ("dla,mean", "dla", "mean"),
        pytest.param("ablation,attribution_patching", "ablation", "ablation", marks=pytest.mark.slow),
        ("attribution_patching", "attribution_patching", "attribution_patching"),
        pytest.param("path,ablation_all", "ablation_all", "ablation_all", marks=pytest.mark.slow),
        ("resample, corrupt", "resample", "resample"),
        pytest.param("integrated_gradients,dla", "dla", "dla", marks=pytest.mark.slow),
        ("mean_all,resample_all,corrupt_all,integrated_gradients_corrupt,attribution_patching_corrupt",)
        + ("mean_all",) * 2,
    ],
)
def test_lists_of_methods(lists: HeadModel, towns: Task, tmp_path: Path, method: str, rank: str, confirm: str) -> None:
    found = pipeline.identify(lists, towns, method, top=2, verify_top=1, n_random=2)
    ran = {name.strip() for name in method.split(",")}
    assert ran == {name.split(".")[0] for name in found.scores.by_example} - {"lens", "attention"}
    assert found.heads.method["name"] == method

    def confirms(quantity: str) -> list[str]:
        probability = f"{confirm}.{quantity}_logp"
        return [f"{confirm}.{quantity}_contrast", *([probability] if probability in found.scores else [])]

    assert found.heads.method["parameters"]["rules"] == {
        "recall": {"rank": f"{rank}.target_contrast", "sign": 1.0, "confirm": confirms("target")},
        "suppression": {"rank": f"{rank}.previous_contrast", "sign": -1.0, "confirm": confirms("previous")},
    }
    assert (len(confirms("target")) == 2) == (confirm in ("mean", "ablation", "ablation_all", "resample", "mean_all"))
    assert set(found.heads.method["parameters"]["examples_scored"]) == ran | (
        {"lens", "attention"} if "dla" in ran else set()
    )
    assert all(len(ranked) == 2 for ranked in found.heads.roles.values())
    shown(found, tmp_path / "out")


def test_gates_alone(
    lists: HeadModel, planted: PlantedModel, towns: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fit for the task: no intervals, no stability, and both are null in the file; one choice for both halves."""
    monkeypatch.setattr(head_gating, "fit_gates", partial(head_gating.fit_gates, steps=12))
    found = pipeline.identify(lists, towns, "gates", top=2, verify_top=1, n_random=19)
    assert found.scores.by_example == {}
    assert set(found.heads.top("recall")) <= set(planted.roles["recall"])
    assert all(
        entry.ci is None and "p" not in entry.effect for ranked in found.heads.roles.values() for entry in ranked
    )
    assert found.heads.stability == {"recall": None, "suppression": None, "bootstrap": 200}
    assert found.heads.method["parameters"]["rules"]["recall"]["rank"] == "gates.target"
    block = found.heads.verification
    assert block["halves"] == 1
    for role in ROLES:
        pairs = [list(pair) for pair in found.heads.top(role)[:1]]
        assert block[f"ablate_{role}"]["folds"] == [pairs, pairs] and pairs
        assert "not chosen on" not in verdict_of(found.heads)
    shown(found, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "heads.json").read_text())
    assert stored["stability"]["recall"] is None and stored["roles"]["recall"][0]["ci"] is None
    assert set(load_means(tmp_path / "out" / "scores.safetensors")) == set(found.scores.whole)


# --- how many heads ---------------------------------------------------------------------------------------------------


def test_threshold(lists: HeadModel, towns: Task, tmp_path: Path) -> None:
    def identified(threshold: float | None) -> IdentifyResult:
        return pipeline.identify(lists, towns, "dla", top=24, threshold=threshold, verify_top=1, n_random=1)

    every = identified(None).heads
    assert all(len(every.roles[role]) == 3 for role in ROLES)
    second = every.roles["recall"][1].score
    some = identified(second).heads
    assert some.roles["recall"] == every.roles["recall"][:2]
    assert some.roles["suppression"] == tuple(e for e in every.roles["suppression"] if e.score <= -second)
    nothing = identified(1000.0)
    assert nothing.heads.roles == {"recall": (), "suppression": ()}
    assert nothing.heads.method["parameters"]["threshold"] == 1000.0
    assert "no confirmed heads" in verdict_of(nothing.heads)
    shown(nothing, tmp_path / "out")


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf")])
def test_a_threshold_that_is_no_distance_is_refused(model: HeadModel, threshold: float) -> None:
    with pytest.raises(InputError, match=r"threshold .* must be a number of at least 0"):
        pipeline.identify(model, tiny_task(), threshold=threshold)


@pytest.mark.parametrize("top", [0, -1, "elbows"])
def test_a_top_that_is_no_number_is_refused(model: HeadModel, top: Any) -> None:
    with pytest.raises(InputError, match=f"top {top!r} must be at least 1, or 'elbow'"):
        pipeline.identify(model, tiny_task(), top=top)


def test_a_top_beyond_the_models_heads_is_refused(model: HeadModel) -> None:
    with pytest.raises(InputError, match="top 25 is more than the 24 heads of tiny; give at most 24"):
        pipeline.identify(model, tiny_task(), top=25)


def test_the_elbow_keeps_the_heads_up_to_the_bend(
    lists: HeadModel, towns: Task, found: IdentifyResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the slow way: silence the best 1, 2, ... with forward passes, mean over examples, and bend by hand."""
    curves: list[Sequence[float]] = []
    right = pipeline.elbow

    def spy(curve: Sequence[float]) -> int:
        curves.append(curve)
        return right(curve)

    monkeypatch.setattr(pipeline, "elbow", spy)
    bent = pipeline.identify(lists, towns, top="elbow", verify_top=4, n_random=1)
    assert bent.heads.method["parameters"]["top"] == "elbow"
    for role, column in (("recall", "target_tokens"), ("suppression", "previous_tokens")):
        ranked = found.heads.top(role)
        assert len(ranked) == len(rank(found.scores, role, None)) == 3
        curve = []
        for k in range(len(ranked) + 1):
            p = []
            for example in found.examples:
                with hooks.ablate(lists, ranked[:k], positions=torch.tensor([example.end])), torch.no_grad():
                    logits = lists.hf(example.tokens[None]).logits[0, -1]
                p.append(float(logits.softmax(-1)[list(getattr(example, column))].sum()))
            curve.append(np.mean(p))
        assert curves[ROLES.index(role)] == pytest.approx(curve, rel=1e-4)
        gaps = [
            abs((value - curve[0]) / (curve[-1] - curve[0]) - k / (len(curve) - 1)) for k, value in enumerate(curve)
        ]
        bend = int(np.argmax(gaps))
        assert 0 < bend < len(ranked), "a model where the elbow says something"
        assert bent.heads.top(role) == ranked[:bend]
        assert bent.heads.stability[role] is not None
        folds = bent.heads.verification[f"ablate_{role}"]["folds"]
        assert [len(pairs) for pairs in folds] == [bend, bend], "as many are verified"
    shown(bent, tmp_path / "out")


# --- controls ---------------------------------------------------------------------------------------------------------


def other_task(model: HeadModel, **changes: Any) -> HeadSet:
    """The heads of another task of the same model."""
    recall = (RankedHead(1, 3, 1.0, (0.5, 1.5)), RankedHead(2, 1, 0.5, (0.1, 0.9)), RankedHead(0, 5, 0.1, None))
    roles = {"recall": recall, "suppression": (RankedHead(1, 0, -1.0, (-1.5, -0.5)),)}
    return HeadSet(model=model.identity() | changes, task={"name": "capitals"}, method={}, roles=roles)


def test_another_tasks_heads_are_a_control(
    lists: HeadModel, towns: Task, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    controls = {"capitals": other_task(lists), "x_recall": other_task(lists)}
    found = pipeline.identify(lists, towns, top=3, verify_top=2, n_random=2, controls=controls)
    assert not caplog.messages
    block = found.heads.verification
    assert set(block) == {"baseline", "dissociation", "halves", "subjects"} | {
        f"ablate_{name}{role}"
        for role in ROLES
        for name in (
            "",
            "random_like_",
            "largest_like_",
            "lowest_like_",
            "control_capitals_",
            "control_x_recall_",
        )
    }
    for role, pairs in (("recall", [(1, 3), (2, 1)]), ("suppression", [(1, 0)])):
        numbers = block[f"ablate_control_capitals_{role}"]
        assert numbers["heads"] == [list(pair) for pair in pairs], "as many as are verified"
        assert numbers == block[f"ablate_control_x_recall_{role}"]
        slow = []
        for example in found.examples:
            with hooks.ablate(lists, pairs, positions=torch.tensor([example.end])), torch.no_grad():
                p = lists.hf(example.tokens[None]).logits[0, -1].softmax(-1)
            slow.append([p[list(tokens)].sum().item() for tokens in (example.target_tokens, example.previous_tokens)])
        for index, quantity in enumerate(("p_remaining", "p_previous")):
            assert numbers[quantity]["mean"] == pytest.approx(np.mean(slow, axis=0)[index], abs=1e-5)
    assert found.heads.method["parameters"]["controls"] == {"capitals": "capitals", "x_recall": "capitals"}
    rows = [condition.name for condition in dissociation_table(found.heads)]
    assert "top 2 recall heads of capitals silenced" in rows and "top 1 suppression heads of x_recall silenced" in rows
    page = shown(found, tmp_path / "out")
    assert "recall heads of capitals" in page


def test_a_control_without_heads_of_a_role_says_so(
    lists: HeadModel, towns: Task, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = other_task(lists, weights_sha256="f" * 64)
    control = replace(other, roles={"recall": (), "other": other.roles["recall"]})
    found = pipeline.identify(lists, towns, "dla", top=1, verify_top=1, n_random=1, controls={"odd": control})
    assert [role for role in ROLES if f"ablate_control_odd_{role}" in found.heads.verification] == []
    text = "\n".join(caplog.messages)
    assert "control odd: the heads were identified on other weights" in text
    assert all(text.count(f"control odd has no {role} heads") == 1 for role in ROLES)
    shown(found, tmp_path / "out")


def test_a_control_of_another_model_is_refused_before_anything_is_computed(lists: HeadModel) -> None:
    with pytest.raises(InputError, match="has n_heads 4, but 'planted-small-0' has 8"):
        pipeline.identify(
            lists,
            tiny_task(),
            controls={"small": other_task(lists, n_heads=4)},
            progress=lambda *_: pytest.fail("it began to work"),
        )


def test_no_random_sets_were_asked_for(lists: HeadModel, towns: Task, tmp_path: Path) -> None:
    found = pipeline.identify(lists, towns, top=2, verify_top=1, n_random=0)
    for role in ROLES:
        reason = {"sets": 0, "reason": "no random sets were asked for"}
        assert found.heads.verification[f"ablate_random_like_{role}"] == reason
        result = {"verdict": UNKNOWN, "held": False, "reason": reason["reason"]}
        assert found.heads.verification["dissociation"][role] == result
    assert "Recall cannot be told: no random sets were asked for" in verdict_of(found.heads)
    shown(found, tmp_path / "out")


def test_one_of_several_heads_that_do_the_same_does_not_hold(lists: HeadModel, towns: Task, tmp_path: Path) -> None:
    """The best recall head alone, of three: it is confirmed, and to silence it changes little. The page says so."""
    found = pipeline.identify(lists, towns, top=1, verify_top=1, n_random=19)
    assert found.heads.roles["recall"][0].effect["q"] < 0.05
    result = found.heads.verification["dissociation"]["recall"]
    assert result["verdict"] == FAILS and not result["held"] and result["reason"]
    assert f"Recall does not hold: {result['reason']}. Silencing" in verdict_of(found.heads)
    shown(found, tmp_path / "out")
