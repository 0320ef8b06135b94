"""`sweep --controls`: identified heads beside every control, and whether the choice paid, in words."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from headtune import identify, load_model, load_task, run_recipe
from headtune.analysis.heads.head_set import HeadSet
from headtune.analysis.utils.errors import InputError
from headtune.cli.main import main
from headtune.train.config import recipe
from headtune.train.config.resolve_heads import _ranking_scores, resolve_heads
from headtune.train.config.resolve_tasks import tasks_of
from headtune.train.evaluation.identification_pays import identification_pays
from headtune.train.evaluation.run_reader import read_runs
from headtune.train.runs import controls, sweep
from helpers.small_runs import save_planted, write_recipe


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], Path]:
    """A model with heads, its task, and the heads that identify finds in it."""
    folder, task = save_planted(tmp_path_factory.mktemp("planted"))
    heads = folder.parent / "planted-heads"
    result = identify(load_model(str(folder)), load_task(task["train"]), "dla,ablation", 2, 1, n_random=1)
    result.save(heads)
    return folder, task, heads


@pytest.fixture
def path(planted: tuple[Path, dict[str, str], Path], tmp_path: Path) -> Path:
    folder, task, heads = planted
    block = {"from": str(heads), "role": "suppression", "top": 1}
    method = {"scale": "head", "offset": False, "answer_set": {"own_lists": 0.0}}
    return write_recipe(tmp_path, folder, heads=block, method=method, task={**task, "max_eval_examples": 8})


def test_every_arm_is_a_checked_recipe(path: Path, planted: Any, tmp_path: Path) -> None:
    overrides = ["training.max_steps=1"]
    cells = controls.control_cells(str(path), ["heads.top=1,2"], 2, tmp_path / "study", overrides, n_draws=3)
    names = [cell.folder.name for cell in cells]
    assert names[:4] == ["identified-top_1-s0", "identified-top_2-s0", "identified-top_1-s1", "identified-top_2-s1"]
    counts = {arm: sum(name.startswith(arm) for name in names) for arm in ("identified-", "random-", "anywhere-")}
    assert counts == {"identified-": 4, "random-": 6, "anywhere-": 6}
    assert {"nearest_zero-top_1-s0", "largest-top_2-s1", "role_recall-top_1-s0", "lora-s1", "norms-s0"} <= {*names}
    loaded = {cell.folder.name: recipe.load_recipe(cell.recipe, cell.overrides) for cell in cells}
    drawn = loaded["random-d2-top_2-s0"]
    assert drawn.heads is not None and drawn.heads.control is not None
    assert (drawn.heads.control.seed, drawn.heads.top, drawn.seed, drawn.heads.role) == (2, 2, 0, "suppression")
    # The same objective, data and steps without heads.
    smallest = loaded["lora_smallest-s0"]
    layer = HeadSet.load(planted[2]).top("suppression", 1)[0][0]
    assert (smallest.recipe, smallest.method.r, smallest.method.layers) == ("lora", 1, [layer])
    assert smallest.training["max_steps"] == 1 and smallest.method.answer_set.own_lists == 0.0
    # The base model is measured once.
    first = str(cells[0].folder / "evaluation.json")
    assert [each.evaluation.before for each in loaded.values()] == [None] + [first] * (len(cells) - 1)


def test_runs_measured_otherwise_have_a_base_of_their_own(path: Path, tmp_path: Path) -> None:
    asked = (str(path), ["evaluation.n_items=1,2"], 1, tmp_path / "study")
    cells = controls.control_cells(*asked, n_draws=1)
    loaded = {cell.folder.name: recipe.load_recipe(cell.recipe, cell.overrides) for cell in cells}
    for name, each in loaded.items():
        first = f"identified-n_items_{each.evaluation.n_items}-s0"
        expected = None if name == first else str(tmp_path / "study" / first / "evaluation.json")
        assert each.evaluation.before == expected, name
    apart = controls.control_cells(*asked, n_draws=1, in_turn=False)  # jobs that may all start at once
    assert not any("evaluation.before" in override for cell in apart for override in cell.overrides)


def test_runs_without_heads_are_filed_as_the_others(path: Path, tmp_path: Path) -> None:
    overrides = ["tracking.wandb=disabled", "tracking.project=mine"]
    for cell in controls.control_cells(str(path), [], 1, tmp_path / "study", overrides, n_draws=1):
        tracking = recipe.load_recipe(cell.recipe, cell.overrides).tracking
        assert (tracking.wandb, tracking.project, tracking.group) == ("disabled", "mine", "study"), cell.folder.name


def test_a_head_set_names_its_roles_itself(path: Path, planted: Any, tmp_path: Path) -> None:
    heads = HeadSet.load(planted[2])
    replace(heads, roles={"mine": heads.roles["suppression"]}).save(tmp_path / "mine")
    block = {"from": str(tmp_path / "mine"), "role": "mine", "top": 1}
    cells = controls.control_cells(str(path), [], 1, tmp_path / "study", [f"heads={json.dumps(block)}"], n_draws=1)
    assert "random-d0-s0" in [cell.folder.name for cell in cells]


def test_controls_share_no_head_with_any_role(path: Path, planted: Any) -> None:
    model, heads = load_model(str(planted[0])), HeadSet.load(planted[2])
    roles = {(entry.layer, entry.head) for entries in heads.roles.values() for entry in entries}
    chosen = heads.top("suppression", 1)
    for kind in ("random", "anywhere", "nearest_zero", "largest"):
        block = {"control": {"like": str(planted[2]), "kind": kind, "seed": 1}, "role": "suppression", "top": 1}
        loaded = recipe.load_recipe(str(path), [f"heads={json.dumps(block)}"])
        assert loaded.heads is not None
        notes: list[str] = []
        pairs = resolve_heads(loaded.heads, model, tasks_of(loaded.task)[0], notify=notes.append).pairs
        assert len(pairs) == 1 and not set(pairs) & roles
        if kind != "anywhere":
            assert [layer for layer, _ in pairs] == [layer for layer, _ in chosen] or "stand in" in notes[-1]


@pytest.mark.parametrize(
    ("override", "grid", "message"),
    [
        ("heads={list: [[1, 0]]}", [], "--controls compares identified heads; give heads: {from: ...}"),
        ("heads.top=1", ["heads={all: true}"], "--controls sets heads itself"),
        ("heads.role=recal", [], "recal"),
    ],
)
def test_what_has_no_controls_is_refused(
    override: str, grid: list[str], message: str, path: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        controls.control_cells(str(path), grid, 1, tmp_path / "study", [override])


@pytest.mark.parametrize("kind", ["random", "anywhere", "nearest_zero", "largest"])
def test_a_layer_whose_other_heads_all_have_roles_is_left(kind: str, path: Path, planted: Any, tmp_path: Path) -> None:
    """The nearest layers stand in, which is said; heads of a role never do."""
    model, heads = load_model(str(planted[0])), HeadSet.load(planted[2])
    chosen = heads.roles["suppression"][0]
    others = [head for head in range(model.n_heads) if head != chosen.head]
    taken = tuple(replace(chosen, head=head) for head in others)
    folder = tmp_path / "crowded"
    shutil.copytree(planted[2], folder)
    replace(heads, roles={"suppression": (chosen,), "recall": taken}, verification={}).save(folder)
    block = {"control": {"like": str(folder), "kind": kind}, "role": "suppression", "top": 1}
    loaded = recipe.load_recipe(str(path), [f"heads={json.dumps(block)}"])
    assert loaded.heads is not None
    notes: list[str] = []
    ((layer, _),) = resolve_heads(loaded.heads, model, tasks_of(loaded.task)[0], notify=notes.append).pairs
    assert layer != chosen.layer
    assert kind == "anywhere" or "have too few others" in notes[-1]


def test_a_head_set_without_scores_has_none_nearest_to_zero(path: Path, planted: Any, tmp_path: Path) -> None:
    HeadSet.load(planted[2]).save(tmp_path / "bare")
    block = {"control": {"like": str(tmp_path / "bare"), "kind": "nearest_zero"}, "role": "recall", "top": 1}
    loaded = recipe.load_recipe(str(path), [f"heads={json.dumps(block)}"])
    assert loaded.heads is not None
    with pytest.raises(InputError, match="nearest_zero needs the scores of all heads"):
        resolve_heads(loaded.heads, load_model(str(planted[0])), tasks_of(loaded.task)[0])


def test_heads_that_a_recipe_identifies_are_identified_once(path: Path, tmp_path: Path) -> None:
    block = {"identify": {"method": "dla,ablation", "max_examples": 24}, "role": "suppression", "top": 1}
    notes: list[str] = []
    asked = (str(path), [], 1, tmp_path / "study", [f"heads={json.dumps(block)}"], 1)
    cells = controls.control_cells(*asked, notify=notes.append)
    assert (tmp_path / "study" / "heads" / "heads.json").is_file() and "identifying heads once" in notes[0]
    loaded = recipe.load_recipe(cells[0].recipe, cells[0].overrides)
    assert loaded.heads is not None and loaded.heads.source == str(tmp_path / "study" / "heads")
    notes.clear()
    controls.control_cells(*asked, notify=notes.append)
    assert not [note for note in notes if "identifying" in note]
    other = [f"heads={json.dumps(block | {'identify': {'method': 'ablation', 'max_examples': 24}})}"]
    with pytest.raises(InputError, match="holds heads that were identified with another method"):
        controls.control_cells(str(path), [], 1, tmp_path / "study", other)
    fewer = [f"heads={json.dumps(block | {'identify': {'method': 'dla,ablation', 'max_examples': 3}})}"]
    with pytest.raises(InputError, match="identified with another training task or max_examples"):
        controls.control_cells(str(path), [], 1, tmp_path / "study", fewer)


def test_equal_draws_are_told(path: Path, planted: Any, tmp_path: Path) -> None:
    """One head of a layer of four, another of a role: two other heads, so that four draws cannot all differ."""
    notes: list[str] = []
    controls.control_cells(str(path), [], 1, tmp_path / "study", n_draws=40, notify=notes.append)
    assert any("40 draws of random heads are only" in note for note in notes)


def test_scores_of_roles_are_brought_to_one_scale(path: Path, planted: Any, tmp_path: Path) -> None:
    """A role whose quantity is tiny counts as much: its best head is far from zero."""
    folder = tmp_path / "heads"
    shutil.copytree(planted[2], folder)
    heads = HeadSet.load(folder)
    names = ("dla.target_contrast", "dla.previous_contrast")
    rules = {role: {"rank": name} for role, name in zip(("recall", "suppression"), names, strict=True)}
    means = {name: np.zeros(heads.shape) for name in names}
    means[names[0]][1, :4] = [100.0, 60.0, 50.0, 40.0]
    means[names[1]][1, -1] = 1e-3
    parameters = {**heads.method.get("parameters", {}), "rules": rules}
    monkey = replace(heads, method={**heads.method, "parameters": parameters})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headtune.train.config.resolve_heads.load_means", lambda *_: means)
        sizes = _ranking_scores(monkey, folder)
    assert sizes[1, -1] == 1.0 and sizes[1, 0] == 1.0 and sizes[1, 2] == 0.5 and sizes[0, 0] == 0.0


def write_run(folder: Path, name: str, seed: int, repeats: list[float], parameters: int = 1, **blocks: Any) -> None:
    run = folder / name
    run.mkdir(parents=True)
    content = {"recipe": "lofit", "seed": seed, "name": name, "output_dir": str(run), **blocks}
    rows = [
        {"subject": f"s{i}", "before_values": {"repeat_rate": 0.5}, "after_values": {"repeat_rate": value}}
        for i, value in enumerate(repeats)
    ]
    mean = sum(repeats) / len(repeats)
    before = {"repeat_rate": {"mean": 0.5, "ci": [0.4, 0.6]}, "neutral_perplexity": 20.0}
    after = {"repeat_rate": {"mean": mean, "ci": [0, 1]}, "neutral_perplexity": 21.0 + seed}
    evaluation = {"task": "t", "task_sha256": "a", "before": before, "after": after, "examples": rows}
    state = {"name": name, "recipe": content["recipe"], "seed": seed, "state": "done", "parameters": parameters}
    for file, value in (("evaluation.json", evaluation), ("run.json", state)):
        (run / file).write_text(json.dumps(value))
    (run / "recipe.yaml").write_text(yaml.safe_dump(content))


IDENTIFIED = {"from": "runs/h", "role": "suppression", "top": 2}


def control(kind: str, seed: int = 0) -> dict[str, Any]:
    return {"control": {"like": "runs/h", "kind": kind, "seed": seed}, "role": "suppression", "top": 2}


@pytest.mark.parametrize("largest", [0.5, 0.1])  # as bad as the base; as good as the identified heads
def test_it_pays_where_every_control_of_heads_is_beaten(largest: float, tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, f"ours-s{seed}", seed, [0.1, 0.1, 0.05, 0.15] * 5, heads=IDENTIFIED)
        write_run(tmp_path, f"random-s{seed}", seed, [0.4, 0.5, 0.5, 0.6] * 5, heads=control("random", seed))
        write_run(tmp_path, f"largest-s{seed}", seed, [largest] * 20, heads=control("largest"))
        write_run(tmp_path, f"lora-s{seed}", seed, [0.0] * 20, 1000, recipe="lora", method={"r": 8})
        write_run(tmp_path, f"top4-s{seed}", seed, [0.0] * 20, heads=IDENTIFIED | {"top": 4})  # no controls of its own
    results = identification_pays(read_runs(tmp_path))
    assert [(each.group, each.metric, each.runs) for each in results] == [("ours", "repeat_rate", 3)]
    (result,) = results
    assert result.paid is (largest == 0.5)
    by_name = {each.control: each for each in result.against}
    assert set(by_name) == {
        "random heads of the same layers",
        "the largest other heads of the same layers",
        "LoRA r=8",
    }
    drawn = by_name["random heads of the same layers"]
    assert drawn.runs == 3 and drawn.difference == pytest.approx(-0.4) and drawn.better is True
    assert by_name["LoRA r=8"].better is False and not by_name["LoRA r=8"].heads
    assert by_name["the largest other heads of the same layers"].better is (True if largest == 0.5 else None)
    assert result.damage["neutral_perplexity"]["identified"] == 22.0
    words = "\n".join(result.sentences())
    assert ("identification paid:" in words) is (largest == 0.5)
    assert "against random heads of the same layers (1 numbers, 3 runs): 0.5, difference -0.4" in words


def test_sweeps_of_two_models_are_told_apart(tmp_path: Path) -> None:
    for model in ("small", "large"):
        for role, top in (("suppression", 2), ("recall", 2), ("recall", 4)):
            write_run(tmp_path / model, f"{role}{top}-s0", 0, [0.1] * 20, heads=IDENTIFIED | {"role": role, "top": top})
        write_run(tmp_path / model, "random-s0", 0, [0.4, 0.6] * 10, heads=control("random"))
        for rate in (1, 2):
            blocks: dict[str, Any] = {"recipe": "lora", "method": {"r": 8}, "training": {"learning_rate": rate}}
            write_run(tmp_path / model, f"lora{rate}-s0", 0, [0.0] * 20, **blocks)
        for file in (tmp_path / model).glob("*/evaluation.json"):
            file.write_text(json.dumps(json.loads(file.read_text()) | {"weights_sha256": model}))
    results = identification_pays(read_runs(tmp_path))
    assert len(results) == 2
    for result in results:
        names = [each.control for each in result.against]
        assert len(set(names)) == 4 and names.count("the recall heads") == 1  # as many heads, not 4
        assert len(result.damage["neutral_perplexity"]["controls"]) == 4


def test_without_controls_nothing_is_said(tmp_path: Path) -> None:
    write_run(tmp_path, "ours-s0", 0, [0.1] * 4, heads=IDENTIFIED)
    write_run(tmp_path, "other-s0", 0, [0.2] * 4, heads=control("random") | {"top": 8})
    assert identification_pays(read_runs(tmp_path)) == []


@pytest.mark.slow
def test_a_sweep_with_controls_end_to_end(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_this_process(name: str, grid: list[sweep.Cell], _notify: Any) -> list[sweep.Cell]:
        for cell in grid:
            run_recipe(recipe.load_recipe(cell.recipe or name, cell.overrides))
        return []

    monkeypatch.setattr(sweep, "carry_out", in_this_process)
    words = ["sweep", str(path), "--controls", "--draws", "1", "--out", str(tmp_path / "study"), "--json"]
    assert main([*words, "training.max_steps=1"]) == 0
    result = json.loads(capsys.readouterr().out)
    kinds = {each["control"] for each in result["identification"][0]["against"]}
    assert {"random heads of any layer", "the recall heads", "LoRA r=8", "the gains of all norms"} <= kinds
    page = tmp_path / "page.html"
    assert main(["compare", str(tmp_path), "--group", "study", "--html", str(page)]) == 0
    assert "Did the choice of heads pay?" in page.read_text() and "LoRA r=1, layers" in capsys.readouterr().out
