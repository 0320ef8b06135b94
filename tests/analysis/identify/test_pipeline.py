"""The identify stage from a model and a task to files, on a tiny random model: nothing to find, and it says so."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headtune.analysis.heads.head_set import ROLES, HeadSet, RankedHead
from headtune.analysis.identify import pipeline, verification
from headtune.analysis.identify.pipeline import IdentifyResult
from headtune.analysis.identify.verification import dissociation
from headtune.analysis.methods.scores import load_means
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import load_model, wrap_model
from headtune.analysis.reports import head_report
from headtune.analysis.reports.dissociation import dissociation_table
from headtune.analysis.reports.dissociation import verdict as verdict_of
from headtune.analysis.reports.head_profiles import read_profiles
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.errors import InputError
from headtune.cli import console
from headtune.cli.commands.identify import print_heads
from helpers.tiny import N_HEADS, N_LAYERS, tiny_model, tiny_task, tiny_tokenizer

SOME = (RankedHead(1, 2, 1.0, (0.5, 1.5)), RankedHead(2, 0, 0.5, (0.1, 0.9)))
OTHER = (RankedHead(1, 0, -1.0, (-1.5, -0.5)),)


@pytest.fixture(scope="module")
def model() -> HeadModel:
    """Eight heads a layer, so that every choice leaves enough others for the matched random sets."""
    return wrap_model(tiny_model("llama", num_attention_heads=8, num_key_value_heads=4), tiny_tokenizer(), "tiny")


@pytest.fixture(scope="module")
def found(model: HeadModel) -> IdentifyResult:
    return pipeline.identify(model, tiny_task(), top=3, verify_top=2, n_random=4)


def by_hand(model: HeadModel, chosen: dict[str, Any], examples: Sequence[Encoded], n_random: int = 4) -> dict[str, Any]:
    """The verification block of heads chosen by hand."""
    heads = HeadSet(model=model.identity(), task={}, method={}, roles=chosen)
    return verification.verify(model, heads, examples, top=2, n_random=n_random, seed=0).verification


def test_the_head_set_describes_model_task_and_method(model: HeadModel, found: IdentifyResult) -> None:
    heads, task = found.heads, tiny_task()
    assert heads.model == model.identity()
    assert heads.task["name"] == "cities" and heads.task["sha256"] == task.sha256
    assert heads.task["n_examples"] + heads.task["n_dropped"] == len(task.examples)
    assert heads.task["n_examples"] == len(found.examples) > 0
    assert heads.method["name"] == "all" and heads.method["seed"] == 0
    assert heads.method["parameters"]["rules"]["suppression"] == {
        "rank": "dla.previous",
        "sign": -1.0,
        "confirm": "ablation.previous",
    }
    assert set(heads.roles) == set(ROLES) and all(len(ranked) <= 3 for ranked in heads.roles.values())
    assert set(heads.stability) == {*ROLES, "bootstrap"}
    assert all(0 <= heads.stability[role] <= 1 for role in ROLES)
    assert heads.check_model(model.identity()) == []


def test_scores_are_one_value_an_example_and_head(found: IdentifyResult) -> None:
    for name in ("dla.target", "dla.previous", "ablation.target", "ablation.previous", "lens.subject.target"):
        assert found.scores.by_example[name].shape == (len(found.examples), N_LAYERS, 8)
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
    for role, (name, *_) in {"recall": ("dla.target",), "suppression": ("dla.previous",)}.items():
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


def test_identify_is_reproducible(model: HeadModel, found: IdentifyResult) -> None:
    again = pipeline.identify(model, tiny_task(), top=3, verify_top=2, n_random=4)
    assert replace(again.heads, created="", command="") == replace(found.heads, created="", command="")
    other = pipeline.identify(model, tiny_task(), top=3, verify_top=2, n_random=4, seed=1)
    assert other.heads.top("recall", 1) == found.heads.top("recall", 1)  # the seed resamples, it does not score


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


def test_single_facts(model: HeadModel) -> None:
    """No previous answers: no quantity about them, and suppression is of the correct answer."""
    found = pipeline.identify(model, tiny_task(previous=(0,)), top=2, verify_top=1, n_random=2)
    assert not [name for name in found.scores.by_example if "previous" in name]
    assert "p_previous" not in found.heads.verification["baseline"]
    verdict = found.heads.verification["dissociation"]["suppression"]
    assert verdict.get("quantity", "p_remaining") == "p_remaining"


@pytest.mark.parametrize("method", ["dla", "all"])
def test_the_table_of_single_facts_has_no_empty_and_no_doubled_column(model: HeadModel, method: str) -> None:
    found = pipeline.identify(model, tiny_task(previous=(0,)), method, top=2, verify_top=1, n_random=2)
    with console.console.capture() as printed:
        print_heads(found)
    assert ".previous" not in printed.get()
    tables = [line for line in printed.get().splitlines() if "dla.target [95%]" in line]
    assert tables and all(line.count("dla.target") == 1 for line in tables)
    assert all(
        ("ablation.target" in line) == (method == "all" and bool(found.heads.roles[role]))
        for line, role in zip(tables, found.heads.roles, strict=True)
    )


def test_progress_sees_every_example_of_both_stages(model: HeadModel) -> None:
    seen: list[tuple[str, int]] = []

    def progress(examples: Sequence[Encoded], what: str) -> Iterable[Encoded]:
        seen.append((what, len(examples)))
        return examples

    pipeline.identify(model, tiny_task(subjects=2), top=1, verify_top=1, n_random=1, progress=progress)
    assert seen == [("scoring heads", 4), ("verifying", 4)]


# --- verification -----------------------------------------------------------------------------------------------------


def test_verification_block(model: HeadModel, found: IdentifyResult) -> None:
    block = by_hand(model, {"recall": SOME, "suppression": OTHER}, found.examples)
    assert set(block) == {
        "baseline",
        "ablate_recall",
        "ablate_random_like_recall",
        "ablate_suppression",
        "ablate_random_like_suppression",
        "dissociation",
    }
    assert block["ablate_recall"]["heads"] == [[1, 2], [2, 0]]
    for name in ("baseline", "ablate_recall", "ablate_suppression"):
        for quantity in ("p_remaining", "p_previous"):
            low, high = block[name][quantity]["ci"]
            assert 0 <= low <= block[name][quantity]["mean"] <= high <= 1
    for role in ROLES:
        matched = block[f"ablate_random_like_{role}"]
        assert matched["sets"] == 4
        for quantity in ("p_remaining", "p_previous"):
            assert matched[quantity]["lowest_set"] <= matched[quantity]["mean"] <= matched[quantity]["highest_set"]
    json.dumps(block, allow_nan=False)


@torch.no_grad()
def test_verification_numbers_are_those_of_whole_forward_passes(model: HeadModel, found: IdentifyResult) -> None:
    block = by_hand(model, {"recall": SOME, "suppression": OTHER}, found.examples)
    for name, chosen in (("baseline", ()), ("ablate_recall", [(1, 2), (2, 0)]), ("ablate_suppression", [(1, 0)])):
        remaining, previous = [], []
        for example in found.examples:
            with hooks.ablate(model, chosen, positions=torch.tensor([example.end])):
                p = model.hf(example.tokens[None]).logits[0, -1].softmax(-1)
            remaining.append(p[list(example.target_tokens)].sum().item())
            previous.append(p[list(example.previous_tokens)].sum().item())
        assert block[name]["p_remaining"]["mean"] == pytest.approx(np.mean(remaining), abs=1e-5)
        assert block[name]["p_previous"]["mean"] == pytest.approx(np.mean(previous), abs=1e-5)


def test_random_sets_match_layers_and_avoid_the_heads_of_both_roles(
    model: HeadModel, found: IdentifyResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    right = verification.probabilities

    def spy(model: HeadModel, examples: Iterable[Encoded], sets: dict[str, Any], *rest: Any) -> Any:
        given.update(sets)
        return right(model, examples, sets, *rest)

    monkeypatch.setattr(verification, "probabilities", spy)
    by_hand(model, {"recall": SOME, "suppression": OTHER}, found.examples[:2], n_random=8)
    drawn = [given[f"random_recall_{i}"] for i in range(8)]
    assert all([layer for layer, _ in pairs] == [1, 2] for pairs in drawn)
    assert not {pair for pairs in drawn for pair in pairs} & {(1, 2), (2, 0), (1, 0)}
    assert len({tuple(pairs) for pairs in drawn}) > 1
    assert all([layer for layer, _ in given[f"random_suppression_{i}"]] == [1] for i in range(8))


def test_verification_goes_on_where_only_some_examples_have_previous_answers(model: HeadModel) -> None:
    """p(previous) is over the examples that have some: the others would only dilute it with zeros."""
    listing = encode(tiny_task(), model.tokenizer).examples
    single = encode(tiny_task(previous=(0,)), model.tokenizer).examples
    alone = by_hand(model, {"recall": SOME, "suppression": OTHER}, listing)
    mixed = by_hand(model, {"recall": SOME, "suppression": OTHER}, [*listing, *single])
    matched = mixed["ablate_random_like_recall"]["p_previous"]
    assert matched["lowest_set"] <= matched["mean"] <= matched["highest_set"]
    for name in ("baseline", "ablate_recall", "ablate_suppression"):
        assert mixed[name]["p_previous"]["mean"] == pytest.approx(alone[name]["p_previous"]["mean"])
        assert mixed[name]["p_previous"]["ci"] == pytest.approx(alone[name]["p_previous"]["ci"])
        assert mixed[name]["p_remaining"]["mean"] != pytest.approx(alone[name]["p_remaining"]["mean"])


def test_a_layer_with_too_few_other_heads_does_not_cost_the_scores(tiny_llama: Path) -> None:
    """Three of four heads of a layer chosen: no matched random set exists, which the block says."""
    model = load_model(str(tiny_llama), device="cpu")
    examples = encode(tiny_task(subjects=2), model.tokenizer).examples
    crowd = tuple(RankedHead(1, head, 1.0, (0.5, 1.5)) for head in range(N_HEADS - 1))
    heads = HeadSet(model=model.identity(), task={}, method={}, roles={"recall": crowd, "suppression": OTHER})
    block = verification.verify(model, heads, examples, top=3, n_random=2, seed=0).verification
    verdict = block["dissociation"]["recall"]
    assert not verdict["held"] and "layer 1 has 3 of its 4 heads chosen" in verdict["reason"]
    assert block["ablate_random_like_recall"] == {"sets": 0, "reason": verdict["reason"]}
    page = replace(heads, verification=block)
    assert "the recall heads cannot be compared with random ones: layer 1 has 3" in verdict_of(page)
    assert [row.name.split()[0] for row in dissociation_table(page)] == ["nothing", "top", "1", "top"]
    assert 0 < block["ablate_recall"]["p_remaining"]["mean"] < 1
    assert block["dissociation"]["suppression"]["most_extreme_random_set"] > 0


def test_a_random_model_is_not_said_to_recall_or_suppress(model: HeadModel, found: IdentifyResult) -> None:
    """Heads named at random are no better than the other random sets, and the verdict says so."""
    verdicts = []
    for head in range(6):
        roles = {
            "recall": (RankedHead(0, head, 1.0, (0.5, 1.5)),),
            "suppression": (RankedHead(1, head, -1.0, (-1.5, -0.5)),),
        }
        block = by_hand(model, roles, found.examples, n_random=8)
        verdicts += [block["dissociation"][role]["held"] for role in ROLES]
    assert verdicts.count(True) <= len(verdicts) / 3


def test_no_confirmed_heads_is_a_verdict(model: HeadModel, found: IdentifyResult) -> None:
    block = by_hand(model, {"recall": (), "suppression": ()}, found.examples)
    assert set(block) == {"baseline", "dissociation"}
    for role in ROLES:
        assert block["dissociation"][role] == {"held": False, "reason": "no confirmed heads"}


def a_block(previous: float | None, suppressed: float, recalled: float, low: float, high: float) -> dict[str, Any]:
    """Baseline p(remaining) 0.5; `low` and `high` are the extreme random sets of every quantity."""
    sets = {"mean": 0.0, "lowest_set": low, "highest_set": high}
    quantities = ["p_remaining"] if previous is None else ["p_remaining", "p_previous"]
    baseline = {"p_remaining": {"mean": 0.5}} | ({} if previous is None else {"p_previous": {"mean": previous}})
    return {
        "baseline": baseline,
        "ablate_suppression": {name: {"mean": suppressed} for name in quantities},
        "ablate_random_like_suppression": dict.fromkeys(quantities, sets),
        "ablate_recall": {name: {"mean": recalled} for name in quantities},
        "ablate_random_like_recall": dict.fromkeys(quantities, sets),
    }


@pytest.mark.parametrize(
    ("block", "suppression", "recall"),
    [
        (a_block(0.1, suppressed=0.4, recalled=0.1, low=0.3, high=0.3), True, True),
        (a_block(0.1, suppressed=0.2, recalled=0.1, low=0.3, high=0.3), False, True),  # a random set rises more
        (a_block(0.1, suppressed=0.4, recalled=0.2, low=0.1, high=0.3), True, False),  # a random set falls more
        (a_block(0.4, suppressed=0.35, recalled=0.1, low=0.3, high=0.3), False, True),  # not even above the baseline
        (a_block(0.1, suppressed=0.4, recalled=0.6, low=0.7, high=0.3), True, False),  # not even below the baseline
        (a_block(None, suppressed=0.6, recalled=0.1, low=0.3, high=0.55), True, True),  # single facts
        (a_block(None, suppressed=0.45, recalled=0.1, low=0.3, high=0.3), False, True),
    ],
)
def test_dissociation(block: dict[str, Any], suppression: bool, recall: bool) -> None:
    verdict = dissociation(block)
    assert (verdict["suppression"]["held"], verdict["recall"]["held"]) == (suppression, recall)
    quantity = "p_previous" if "p_previous" in block["baseline"] else "p_remaining"
    assert verdict["suppression"]["quantity"] == quantity and verdict["recall"]["quantity"] == "p_remaining"
    assert verdict["recall"]["ratio"] == block["ablate_recall"]["p_remaining"]["mean"] / 0.5


def test_one_subject_is_refused_and_few_are_named(model: HeadModel, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match="prompts about one subject alone, 'Italy', and heads are confirmed by interv"):
        pipeline.identify(model, tiny_task(subjects=1))
    assert not caplog.messages
    found = pipeline.identify(model, tiny_task(subjects=2), "dla", top=1, verify_top=1, n_random=1)
    assert "about 2 subjects alone: intervals over so few say little; give 20 or more" in caplog.messages[0]
    assert found.heads.task["n_subjects"] == 2


def test_a_task_that_cannot_be_scored_is_refused(model: HeadModel) -> None:
    with pytest.raises(InputError, match="no example can be scored on first tokens"):
        pipeline.identify(model, Task("empty", ()))


# --- methods ----------------------------------------------------------------------------------------------------------


FEW = tiny_task(subjects=2)


@pytest.fixture(scope="module")
def chance() -> HeadModel:
    """A random model that has, on FEW, heads of both roles, by direct attribution and by ablation."""
    return wrap_model(tiny_model("llama", 10, num_attention_heads=8, num_key_value_heads=4), tiny_tokenizer(), "chance")


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
    head_report.write_report(folder / "report.html", heads, found.scores.means())
    return (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("method", "rank", "confirm"),
    [
        ("dla,mean", "dla", "mean"),
        ("ablation,attribution_patching", "ablation", "ablation"),
        ("attribution_patching", "attribution_patching", "attribution_patching"),
        ("path,ablation_all", "ablation_all", "ablation_all"),
        ("resample, corrupt", "resample", "resample"),
        ("integrated_gradients,dla", "dla", "dla"),
        ("mean_all,resample_all,corrupt_all,integrated_gradients_corrupt,attribution_patching_corrupt",)
        + ("mean_all",) * 2,
    ],
)
def test_lists_of_methods(chance: HeadModel, tmp_path: Path, method: str, rank: str, confirm: str) -> None:
    found = pipeline.identify(chance, FEW, method, top=2, verify_top=1, n_random=2)
    ran = {name.strip() for name in method.split(",")}
    assert ran == {name.split(".")[0] for name in found.scores.by_example} - {"lens", "attention"}
    assert found.heads.method["name"] == method
    assert found.heads.method["parameters"]["rules"] == {
        "recall": {"rank": f"{rank}.target", "sign": 1.0, "confirm": f"{confirm}.target"},
        "suppression": {"rank": f"{rank}.previous", "sign": -1.0, "confirm": f"{confirm}.previous"},
    }
    assert set(found.heads.method["parameters"]["examples_scored"]) == ran | (
        {"lens", "attention"} if "dla" in ran else set()
    )
    shown(found, tmp_path / "out")


def test_gates_alone(chance: HeadModel, tmp_path: Path) -> None:
    """One fit for the task: no intervals, no stability, and both are null in the file."""
    found = pipeline.identify(chance, FEW, "gates", top=2, verify_top=1, n_random=2)
    assert found.scores.by_example == {}
    assert found.heads.roles["recall"], "this model must show a head for the test to say anything"
    assert all(entry.ci is None for ranked in found.heads.roles.values() for entry in ranked)
    assert found.heads.stability == {"recall": None, "suppression": None, "bootstrap": 200}
    assert found.heads.method["parameters"]["rules"]["recall"]["rank"] == "gates.target"
    shown(found, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "heads.json").read_text())
    assert stored["stability"]["recall"] is None and stored["roles"]["recall"][0]["ci"] is None
    assert set(load_means(tmp_path / "out" / "scores.safetensors")) == set(found.scores.whole)


# --- how many heads ---------------------------------------------------------------------------------------------------


def test_threshold(chance: HeadModel, tmp_path: Path) -> None:
    def names(**options: Any) -> dict[str, list[str]]:
        found = pipeline.identify(chance, FEW, "dla", verify_top=1, n_random=1, **options)
        kept[str(options)] = found
        return {role: [entry.name for entry in ranked] for role, ranked in found.heads.roles.items()}

    kept: dict[str, IdentifyResult] = {}
    every = names(top=24)
    scores = {role: [entry.score for entry in next(iter(kept.values())).heads.roles[role]] for role in ROLES}
    assert len(every["recall"]) >= 3 and len(every["suppression"]) >= 2
    second = scores["recall"][1]
    some = names(top=24, threshold=second)
    assert some["recall"] == every["recall"][:2]
    assert some["suppression"] == [
        name for name, score in zip(every["suppression"], scores["suppression"], strict=True) if score <= -second
    ]
    nothing = names(top=24, threshold=1000.0)
    assert nothing == {"recall": [], "suppression": []}
    found = kept[str({"top": 24, "threshold": 1000.0})]
    assert found.heads.method["parameters"]["threshold"] == 1000.0
    assert "no confirmed heads" in verdict_of(found.heads)
    shown(found, tmp_path / "out")


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
    chance: HeadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the slow way: silence the best 1, 2, ... with forward passes, mean over examples, and bend by hand."""
    every = pipeline.identify(chance, FEW, top=16, verify_top=1, n_random=1)
    curves: list[Sequence[float]] = []
    right = pipeline.elbow

    def spy(curve: Sequence[float]) -> int:
        curves.append(curve)
        return right(curve)

    monkeypatch.setattr(pipeline, "elbow", spy)
    found = pipeline.identify(chance, FEW, top="elbow", verify_top=1, n_random=1)
    assert found.heads.method["parameters"]["top"] == "elbow"
    for role, column in (("recall", "target_tokens"), ("suppression", "previous_tokens")):
        ranked = every.heads.top(role)
        assert len(ranked) >= 3
        curve = []
        for k in range(len(ranked) + 1):
            p = []
            for example in every.examples:
                with hooks.ablate(chance, ranked[:k], positions=torch.tensor([example.end])), torch.no_grad():
                    logits = chance.hf(example.tokens[None]).logits[0, -1]
                p.append(float(logits.softmax(-1)[list(getattr(example, column))].sum()))
            curve.append(np.mean(p))
        assert curves[ROLES.index(role)] == pytest.approx(curve, rel=1e-4)
        gaps = [
            abs((value - curve[0]) / (curve[-1] - curve[0]) - k / (len(curve) - 1)) for k, value in enumerate(curve)
        ]
        bend = int(np.argmax(gaps))
        assert 0 < bend < len(ranked), "a model where the elbow says something"
        assert found.heads.top(role) == ranked[:bend]
        assert found.heads.stability[role] is not None
    shown(found, tmp_path / "out")


# --- controls ---------------------------------------------------------------------------------------------------------


def other_task(model: HeadModel, **changes: Any) -> HeadSet:
    """The heads of another task of the same model."""
    roles = {"recall": (*SOME, RankedHead(0, 5, 0.1, None)), "suppression": OTHER}
    return HeadSet(model=model.identity() | changes, task={"name": "capitals"}, method={}, roles=roles)


def test_another_tasks_heads_are_a_control(chance: HeadModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = pipeline.identify(
        chance,
        FEW,
        top=3,
        verify_top=2,
        n_random=2,
        controls={"capitals": other_task(chance), "x_recall": other_task(chance)},
    )
    (few,) = caplog.messages
    assert "about 2 subjects alone" in few
    block = found.heads.verification
    assert set(block) == {"baseline", "dissociation"} | {
        f"ablate_{name}"
        for role in ROLES
        for name in (
            role,
            f"random_like_{role}",
            f"lowest_like_{role}",
            f"control_capitals_{role}",
            f"control_x_recall_{role}",
        )
    }
    assert block["ablate_control_capitals_recall"]["heads"] == [[1, 2], [2, 0]], "as many as are verified"
    assert block["ablate_control_capitals_suppression"]["heads"] == [[1, 0]]
    alone = by_hand(chance, {"recall": SOME, "suppression": OTHER}, found.examples)
    for role in ROLES:
        for quantity in ("p_remaining", "p_previous"):
            numbers, expected = (
                block[f"ablate_{of}{role}"] for block, of in ((block, "control_capitals_"), (alone, ""))
            )
            assert numbers[quantity]["mean"] == pytest.approx(expected[quantity]["mean"], rel=1e-5)
            assert numbers[quantity]["ci"] == pytest.approx(expected[quantity]["ci"], rel=1e-5)
    assert found.heads.method["parameters"]["controls"] == {"capitals": "capitals", "x_recall": "capitals"}
    rows = [condition.name for condition in dissociation_table(found.heads)]
    assert "top 2 recall heads of capitals silenced" in rows and "top 1 suppression heads of x_recall silenced" in rows
    page = shown(found, tmp_path / "out")
    assert "recall heads of capitals" in page


def test_a_control_without_heads_of_a_role_says_so(
    chance: HeadModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    control = replace(other_task(chance, weights_sha256="f" * 64), roles={"recall": (), "other": SOME})
    found = pipeline.identify(chance, FEW, "dla", top=1, verify_top=1, n_random=1, controls={"odd": control})
    assert [role for role in ROLES if f"ablate_control_odd_{role}" in found.heads.verification] == []
    text = "\n".join(caplog.messages)
    assert "control odd: the heads were identified on other weights" in text
    assert all(f"control odd has no {role} heads" in text for role in ROLES)
    shown(found, tmp_path / "out")


def test_a_control_of_another_model_is_refused_before_anything_is_computed(chance: HeadModel) -> None:
    with pytest.raises(InputError, match="has n_heads 4, but 'chance' has 8"):
        pipeline.identify(
            chance,
            tiny_task(),
            controls={"small": other_task(chance, n_heads=4)},
            progress=lambda *_: pytest.fail("it began to work"),
        )


def test_heads_of_the_least_evidence_are_a_control(chance: HeadModel) -> None:
    found = pipeline.identify(chance, FEW, top=3, verify_top=2, n_random=2)
    block = found.heads.verification
    for role in ROLES:
        pairs = [tuple(pair) for pair in block[f"ablate_lowest_like_{role}"]["heads"]]
        chosen = found.heads.top(role)[:2]
        assert sorted(layer for layer, _ in pairs) == sorted(layer for layer, _ in chosen)
        size = np.abs(found.scores.mean(found.heads.method["parameters"]["rules"][role]["rank"]))
        for layer, head in pairs:
            assert (layer, head) not in chosen
            smaller = {(layer, other) for other in range(8) if size[layer, other] < size[layer, head]}
            assert smaller <= {*pairs, *chosen}
        again = by_hand(
            chance, {"recall": tuple(RankedHead(*pair, 0.0, None) for pair in pairs), "suppression": ()}, found.examples
        )
        numbers = block[f"ablate_lowest_like_{role}"]["p_remaining"]
        assert numbers["mean"] == pytest.approx(again["ablate_recall"]["p_remaining"]["mean"], rel=1e-5)


def test_no_random_sets_were_asked_for(chance: HeadModel, tmp_path: Path) -> None:
    found = pipeline.identify(chance, FEW, top=2, verify_top=1, n_random=0)
    for role in ROLES:
        reason = {"sets": 0, "reason": "no random sets were asked for"}
        assert found.heads.verification[f"ablate_random_like_{role}"] == reason
        assert found.heads.verification["dissociation"][role] == {"held": False, "reason": reason["reason"]}
    assert "cannot be compared with random ones: no random sets were asked for" in verdict_of(found.heads)
    shown(found, tmp_path / "out")
