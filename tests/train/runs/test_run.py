"""Runs from start to end, through the command line, on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from headtune.analysis.models import loading
from headtune.analysis.tasks.tokenized import encode
from headtune.analysis.utils.errors import CheckError
from headtune.cli.main import main
from headtune.train.config import recipe as recipes
from headtune.train.config.resolve_tasks import tasks_of
from headtune.train.evaluation.evaluate import answer_mass
from headtune.train.runs.load_run import load_run
from headtune.train.trainer import training
from helpers.paths import ROOT
from helpers.small_runs import STEPS, head_set, save_planted, train, write_recipe, write_task
from helpers.tiny import FACTS, N_HEADS, N_LAYERS, save_tiny, tiny_model, tiny_tokenizer

HEADS = [[0, 1], [2, 0], [2, 3]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The folder of one finished run. Read-only."""
    folder = tmp_path_factory.mktemp("first")
    assert train(write_recipe(folder, tiny_llama)) == 0
    return folder / "run"


def adapter_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def heads_of(run: Path) -> list[list[int]]:
    found: list[list[int]] = read(run / "run.json")["heads"]
    return found


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("headtune: ")]) == 1
    return lines[-1]


# --- what a run leaves behind -----------------------------------------------------------------------------------------


def test_the_folder_holds_what_a_run_is(first: Path) -> None:
    recipe = recipes.load_recipe(str(first / "recipe.yaml"))
    asked = recipes.load_recipe(str(first.parent / "recipe.yaml"))
    assert recipe == asked and recipe.folder == first

    state = read(first / "run.json")
    assert (state["state"], state["name"], state["recipe"], state["seed"]) == ("done", recipe.name, "lofit", 0)
    assert state["heads"] == HEADS
    assert state["parameters"] == 3 * 8 * 2  # three heads, eight dimensions, scale and offset
    base_parameters = sum(p.numel() for p in loading.load_plain(recipe.model.name)[0].parameters())
    assert state["model_parameters"] == base_parameters
    assert state["parameters_share"] == pytest.approx(state["parameters"] / base_parameters)
    assert set(state["versions"]) >= {"headtune", "torch", "transformers", "peft", "trl"}
    assert state["training_data"]["n_examples"] == 10  # five of eight subjects, two templates

    lines = metrics(first)
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert all(
        {"train/recall", "train/suppression", "train/retention"} <= set(line) for line in lines if "train/loss" in line
    )
    assert any(line.get("train/steps") == STEPS for line in lines)

    evaluation = read(first / "evaluation.json")
    assert (
        evaluation["before"]["n"]["examples"]
        == evaluation["after"]["n"]["examples"]
        == len(evaluation["examples"])
        == 4
    )
    for when in ("before", "after"):
        rates = [evaluation[when][f"{kind}_rate"]["mean"] for kind in ("repeat", "correct_new", "wrong", "missing")]
        assert sum(rates) == pytest.approx(1.0)
        logged = {key: value for line in lines for key, value in line.items()}
        assert logged[f"{when}/p_remaining"] == pytest.approx(evaluation[when]["p_remaining"]["mean"])
    assert evaluation["before"]["neutral_perplexity"] != evaluation["after"]["neutral_perplexity"]

    stored = adapter_of(first)
    assert sum(tensor.numel() for tensor in stored.values()) == state["parameters"]
    assert all(tensor.abs().max() > 0 for tensor in stored.values())
    assert read(first / "adapter" / "adapter_config.json")["heads"] == HEADS
    assert sorted(path.name for path in first.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert not list(first.rglob("README.md")), "cards of TRL and PEFT, which know nothing of the run"
    weights = [path for path in first.rglob("*.safetensors") if path.parent.name.startswith(("adapter", "checkpoint-"))]
    assert len(weights) == 3
    assert {path.stat().st_mode for path in weights} == {(first / "recipe.yaml").stat().st_mode}, "a group can read all"


def test_training_learns(first: Path) -> None:
    """The objective on what was trained on: batches of few rows differ too much to compare their losses."""
    model, tokenizer, recipe = load_run(first)
    encoded = encode(tasks_of(recipe.task)[0], tokenizer)
    after = sum(answer_mass(model, encoded)[0])
    with model.disable_adapter():
        before = sum(answer_mass(model, encoded)[0])
    assert after > 1.2 * before


def test_the_saved_adapter_is_the_one_that_was_measured(first: Path) -> None:
    model, tokenizer, recipe = load_run(first)
    held_out = tasks_of(recipe.task)[1]
    remaining, _ = answer_mass(model, encode(held_out, tokenizer))
    after = read(first / "evaluation.json")["after"]["p_remaining"]["mean"]
    assert sum(remaining) / len(remaining) == pytest.approx(after, rel=1e-4)
    with model.disable_adapter():
        base, _ = answer_mass(model, encode(held_out, tokenizer))
    before = read(first / "evaluation.json")["before"]["p_remaining"]["mean"]
    assert sum(base) / len(base) == pytest.approx(before, rel=1e-4)
    assert abs(after - before) > 1e-6


def test_no_subject_is_trained_and_measured(first: Path) -> None:
    prompts = [example["prompt"] for example in read(first / "evaluation.json")["examples"]]
    measured = {subject for subject in FACTS for prompt in prompts if f"in {subject}" in prompt}
    assert len(measured) == 2
    trained = read(first / "run.json")["training_data"]["n_examples"] // 2
    assert trained + len(measured) <= len(FACTS)


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(
    first: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    again = write_recipe(tmp_path, tiny_llama)
    assert train(again) == 0
    assert train(again, "seed=1", f"output_dir={tmp_path / 'other'}") == 0
    one, two, other = adapter_of(first), adapter_of(tmp_path / "run"), adapter_of(tmp_path / "other")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert read(first / "evaluation.json")["after"] == read(tmp_path / "run" / "evaluation.json")["after"]


# --- stopping and going on --------------------------------------------------------------------------------------------


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next training dies at the end of `step`, after what it saves there."""
    original: Callable[[Any], Any] = training.trainer_callback

    def dying(tracker: Any) -> Any:
        callback = original(tracker)

        def on_step_begin(_args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == step:
                raise RuntimeError("the machine went away")

        callback.on_step_begin = on_step_begin
        return callback

    monkeypatch.setattr(training, "trainer_callback", dying)


@pytest.mark.parametrize("step", [1, 3])  # before and after the first checkpoint
def test_a_stopped_run_goes_on_to_the_same_adapter(
    step: int, first: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    with monkeypatch.context() as patched:
        stop_after(step, patched)
        with pytest.raises(RuntimeError, match="went away"):
            train(recipe)
    run = tmp_path / "run"
    assert read(run / "run.json")["state"] == "failed"
    assert not (run / "adapter").exists()
    assert (run / "checkpoint-2").is_dir() == (step == 3)
    before = len(metrics(run))

    assert train(recipe, "--resume") == 0
    assert read(run / "run.json")["state"] == "done"
    unbroken, resumed = adapter_of(first), adapter_of(run)
    assert resumed.keys() == unbroken.keys()
    for name, tensor in resumed.items():
        torch.testing.assert_close(tensor, unbroken[name], atol=1e-6, rtol=1e-6)
    assert len(metrics(run)) > before, "the record goes on in the same file"
    steps = [line["step"] for line in metrics(run)[before:] if "train/loss" in line]
    assert steps == (list(range(3, STEPS + 1)) if step == 3 else list(range(1, STEPS + 1)))
    assert read(run / "evaluation.json")["after"] == read(first / "evaluation.json")["after"]


def test_a_run_is_resumed_with_its_own_recipe_only(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(first.parent / "recipe.yaml", "--resume", "training.max_steps=9") == 2
    assert "training" in one_line(capsys)


def test_nothing_to_resume(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(write_recipe(tmp_path, tiny_llama), "--resume") == 2
    assert "nothing to resume" in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_what_was_killed_before_there_was_a_run_is_begun_anew(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = write_recipe(tmp_path, tiny_llama), tmp_path / "run"
    folder.mkdir()
    cut_off = folder / ".recipe.yaml.k3x_9abc"
    cut_off.write_text("recipe: lof")
    foreign = folder / ".recipe.yaml.swp"
    foreign.write_text("an editor's")
    assert train(recipe) == 2
    assert "is not empty" in one_line(capsys) and cut_off.exists()
    foreign.unlink()
    assert train(recipe) == 0
    assert (folder / "recipe.yaml").is_file() and not cut_off.exists()


def test_an_existing_run_is_not_overwritten(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert train(first.parent / "recipe.yaml") == 2
    message = one_line(capsys)
    assert "exists and is not empty" in message and "--resume" in message
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before


def test_the_base_measurement_of_another_run_is_taken_over(
    first: Path, tiny_llama: Path, tmp_path: Path, capsys: Any
) -> None:
    taken = {"n_items": 1, "before": str(first / "evaluation.json")}
    recipe = write_recipe(tmp_path, tiny_llama, recipe="steer", method={"factor": 2.0}, training=None, evaluation=taken)
    assert train(recipe) == 0
    evaluation = read(tmp_path / "run" / "evaluation.json")
    assert evaluation["before"] == read(first / "evaluation.json")["before"]
    assert [e["before"] for e in evaluation["examples"]] == [
        e["before"] for e in read(first / "evaluation.json")["examples"]
    ]
    capsys.readouterr()
    assert train(recipe, "evaluation.n_items=2", f"output_dir={tmp_path / 'other'}") == 2
    assert "n_items" in one_line(capsys) and not (tmp_path / "other").exists()


# --- heads ------------------------------------------------------------------------------------------------------------


def steer(folder: Path, model: Path, heads: Any, **changes: Any) -> Path:
    """The quickest recipe there is: nothing is trained."""
    return write_recipe(folder, model, recipe="steer", heads=heads, method={"factor": 1.5}, training=None, **changes)


@pytest.fixture
def heads_file(tiny_llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "heads"
    head_set(loading.load_model(str(tiny_llama)).identity()).save(folder / "heads.json")
    return folder / "heads.json"


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"all": True}, [[layer, head] for layer in range(N_LAYERS) for head in range(N_HEADS)]),
        ({"list": [[2, 1], [0, 3]]}, [[0, 3], [2, 1]]),
        ({"from": "FILE"}, [[0, 0], [1, 2], [2, 1]]),
        ({"from": "FOLDER", "role": "recall", "top": 1}, [[0, 0]]),
        ({"from": "FILE", "role": "suppression", "top": 1}, [[2, 1]]),
    ],
    ids=str,
)
def test_the_heads_of_a_run(block: Any, expected: Any, heads_file: Path, tiny_llama: Path, tmp_path: Path) -> None:
    if "from" in block:
        block = block | {"from": str(heads_file if block["from"] == "FILE" else heads_file.parent)}
    assert train(steer(tmp_path, tiny_llama, block)) == 0
    run = tmp_path / "run"
    assert heads_of(run) == expected
    assert read(run / "adapter" / "adapter_config.json")["heads"] == expected
    if "from" in block:
        assert read(run / "heads.json")["roles"] == read(heads_file)["roles"]
        assert (run / "report.html").is_file()


def test_random_heads_are_like_the_chosen_ones(heads_file: Path, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = steer(tmp_path, tiny_llama, {"random": {"like": str(heads_file), "seed": 0}})
    assert train(recipe) == 0
    drawn = [tuple(pair) for pair in heads_of(tmp_path / "run")]
    chosen = {(0, 0), (1, 2), (2, 1)}
    assert sorted(layer for layer, _ in drawn) == [0, 1, 2] and not chosen & set(drawn)
    others = []
    for seed in range(1, 4):
        assert train(recipe, f"heads.random.seed={seed}", f"output_dir={tmp_path / str(seed)}") == 0
        others.append([tuple(pair) for pair in heads_of(tmp_path / str(seed))])
    assert any(other != drawn for other in others)


def test_heads_are_identified_where_a_recipe_asks_for_it(tmp_path: Path) -> None:
    model, task = save_planted(tmp_path / "model")
    recipe = steer(tmp_path, model, {"identify": {"method": "dla", "max_examples": 24}, "top": 2}, task=task)
    assert train(recipe) == 0
    run = tmp_path / "run"
    found = read(run / "heads.json")
    ranked = [[entry["layer"], entry["head"]] for role in found["roles"].values() for entry in role]
    assert heads_of(run) == sorted(ranked) and ranked
    assert (run / "scores.safetensors").is_file() and (run / "report.html").is_file()
    assert found["task"]["name"].endswith(":train"), "heads are found on what is trained on"


def test_a_role_beyond_the_two_is_identified_and_silenced(tmp_path: Path) -> None:
    model, task = save_planted(tmp_path / "model")
    block = {"identify": {"method": "dla", "max_examples": 24}, "role": "memory", "top": 2}
    assert train(steer(tmp_path, model, block, task=task), "method.factor=0.0") == 0
    run = tmp_path / "run"
    assert list(read(run / "heads.json")["roles"]) == ["memory"]
    entries = read(run / "heads.json")["roles"]["memory"]
    assert heads_of(run) == sorted([entry["layer"], entry["head"]] for entry in entries) and entries
    assert "dla.target-previous" in entries[0]["effect"]


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"list": [[0, 4]]}, ["L0H4", "heads 0-3"]),
        ({"list": [[3, 0]]}, ["L3H0", "layers 0-2"]),
        ({"list": [[0, 1], [0, 1]]}, ["twice"]),
        ({"from": "OTHER"}, ["n_layers", "5", "3"]),
        ({"random": {"like": "OTHER"}}, ["n_layers", "5", "3"]),
        ({"from": "MISSING"}, ["does not exist"]),
    ],
    ids=str,
)
def test_heads_that_do_not_fit_are_refused_before_anything_is_written(
    block: Any, words: list[str], tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    head_set(loading.load_model(str(tiny_llama)).identity(), n_layers=5).save(other)
    text = json.dumps(block).replace("OTHER", str(other)).replace("MISSING", str(tmp_path / "none.json"))
    recipe = steer(tmp_path, tiny_llama, json.loads(text))
    capsys.readouterr()
    assert train(recipe) == 2
    message = one_line(capsys)
    assert all(word in message for word in words)
    assert not (tmp_path / "run").exists()


# --- the other recipes ------------------------------------------------------------------------------------------------


def test_steer_multiplies_and_trains_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    assert train(steer(tmp_path, tiny_llama, {"list": HEADS})) == 0
    run = tmp_path / "run"
    stored = adapter_of(run)
    assert [tensor.shape[1] for tensor in stored.values()] == [1, 1]
    assert all(torch.equal(tensor, torch.full_like(tensor, 0.5)) for tensor in stored.values())
    assert not list(run.glob("checkpoint-*"))
    # By hand: the heads' columns of the projections, one and a half times.
    model, tokenizer, _ = load_run(run)
    base, _ = loading.load_plain(str(tiny_llama))
    with torch.no_grad():
        for layer, head in HEADS:
            base.get_submodule(f"model.layers.{layer}.self_attn.o_proj").weight[:, head * 8 : head * 8 + 8] *= 1.5
        tokens = tokenizer("List five cities in Italy.", return_tensors="pt").input_ids
        torch.testing.assert_close(model(tokens).logits, base(tokens).logits, atol=1e-5, rtol=1e-5)


def test_lora(tiny_llama: Path, tmp_path: Path) -> None:
    method = {"r": 2, "answer_set": {"own_lists": 0.0}}
    assert train(write_recipe(tmp_path, tiny_llama, recipe="lora", heads=None, method=method)) == 0
    state = read(tmp_path / "run" / "run.json")
    assert state["heads"] == [] and state["state"] == "done"
    page = tmp_path / "run" / "report.html"
    own = page.read_text()
    assert "Before and after" in own and "recipe: lora" in own
    page.unlink()
    assert main(["report", str(page.parent)]) == 0 and page.read_text() == own
    (tmp_path / "run" / "evaluation.json").unlink()
    assert main(["report", str(page.parent)]) == 2  # nothing was measured
    # q, k, v, o: 32 -> 32; gate, up: 32 -> 48; down: 48 -> 32; three layers
    assert state["parameters"] == 3 * 2 * (4 * 64 + 3 * 80)
    load_run(tmp_path / "run")


def test_sft(tiny_llama: Path, tmp_path: Path) -> None:
    assert train(write_recipe(tmp_path, tiny_llama, method={"objective": "sft"})) == 0
    lines = [line for line in metrics(tmp_path / "run") if "train/loss" in line]
    assert len(lines) == STEPS and lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert "train/suppression" not in lines[0]


def test_subjects_shared_by_train_and_eval_are_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = write_task(tmp_path / "a"), write_task(tmp_path / "b", subjects=2)
    recipe = write_recipe(tmp_path, tiny_llama, task={"train": str(one), "eval": str(two)})
    assert train(recipe) == 2
    assert "share 2 subjects" in one_line(capsys) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("objective", ["answer_set", "sft"])
@pytest.mark.parametrize("side", ["train", "eval"])
def test_prompts_too_long_for_the_model_are_refused_before_anything_is_written(
    side: str, objective: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """gpt2's learned positions would end in an IndexError, rotary ones in what the model was not made for."""
    model = tmp_path / "model"
    tiny_model("gpt2", n_positions=64).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    short, long = write_task(tmp_path / "short"), write_task(tmp_path / "long", subjects=1)
    rows = [json.loads(line) for line in long.read_text().splitlines()]
    long.write_text("".join(json.dumps(row | {"prompt": "so " * 50 + row["prompt"]}) + "\n" for row in rows))
    files = {"train": str(short), "eval": str(short)} | {side: str(long)}
    method = {"objective": objective}
    recipe = write_recipe(tmp_path, model, task={**files, "split": {"by": "file"}}, method=method)
    assert train(recipe) == 2
    said = one_line(capsys)
    assert "takes 64" in said or "the 64 tokens that the model takes" in said
    assert not (tmp_path / "run").exists()


def test_a_model_that_lacks_weights_is_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.2.self_attn.o_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert train(write_recipe(tmp_path, model)) == 2
    assert "lacks 1 of its weights, such as model.layers.2.self_attn.o_proj.weight; give a whole" in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_a_torn_evaluation_is_one_line(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, run = write_recipe(tmp_path, tiny_llama), tmp_path / "run"
    assert train(recipe) == 0
    capsys.readouterr()
    (run / "evaluation.json").write_bytes((run / "evaluation.json").read_bytes()[:200])
    assert main(["report", str(run)]) == 2
    assert "evaluation.json' is damaged" in one_line(capsys)
    assert train(recipe, "--resume") == 2
    assert "evaluation.json' is damaged" in one_line(capsys)


def test_what_only_transformers_can_judge_is_refused_before_anything_is_written(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, training={"load_best_model_at_end": True})
    assert train(recipe) == 2
    one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_settings_that_contradict_each_other_end_in_one_line(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"fp16": True, "bf16": True, "use_cpu": True}
    recipe = write_recipe(tmp_path, tiny_llama, training={"max_steps": 1, **changes})
    assert train(recipe) == 2
    assert one_line(capsys).startswith("headtune: training: ")


def test_a_failed_run_without_a_checkpoint_does_not_block_its_folder(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise CheckError("the loss is nan")

    recipe, run = write_recipe(tmp_path, tiny_llama), tmp_path / "run"
    for n in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(training, "train_adapter", fail)
            assert train(recipe) == 1
        assert read(run / "run.json")["state"] == "failed"
        assert train(recipe, "--dry-run") == 0
        assert not (tmp_path / f"run.failed-{n}").exists()
    capsys.readouterr()
    assert train(recipe) == 0
    assert f"{run} held a failed run without a checkpoint; it is now {run}.failed-2" in " ".join(
        capsys.readouterr().err.split()
    )
    assert read(run / "run.json")["state"] == "done"
    assert read(tmp_path / "run.failed-1" / "run.json")["state"] == "failed"
    # With something to continue, and after a run that is done, the folder stays what it is.
    assert train(recipe) == 2 and "--resume" in one_line(capsys)
    record = read(run / "run.json") | {"state": "failed"}
    (run / "run.json").write_text(json.dumps(record))
    assert train(recipe) == 2
    assert "--resume" in one_line(capsys)


def test_evaluate_and_compare_read_a_run(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = yaml.safe_load((first / "recipe.yaml").read_text())["task"]["train"]
    assert main(["evaluate", str(first), "--task", f"{task}:test", "--items", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["p_remaining"]["mean"] == pytest.approx(
        read(first / "evaluation.json")["after"]["p_remaining"]["mean"], rel=1e-4
    )
    assert main(["compare", str(first.parent), "--json"]) == 0
    base, group = json.loads(capsys.readouterr().out)["groups"]
    assert base["name"] == "base" and group["runs"][0]["after"] == read(first / "evaluation.json")["after"]


def test_what_is_no_run_is_called_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    task = ["--task", "country_cities"]
    assert main(["evaluate", str(tmp_path / "nope"), *task]) == 2
    assert "there is no run" in one_line(capsys)
    (tmp_path / "heads.json").write_text("{}")
    assert main(["evaluate", str(tmp_path), *task]) == 2
    assert "is a head set, neither a run nor a model" in one_line(capsys)
    assert main(["report", str(tmp_path / "nope")]) == 2
    assert "neither a run (recipe.yaml) nor a head set (heads.json)" in one_line(capsys)


# --- through accelerate -----------------------------------------------------------------------------------------------


def launch(config: str, recipe: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` with one of the shipped configurations, as its header says."""
    command = [str(Path(sys.executable).parent / "accelerate"), "launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / config), "-m", "headtune.train", str(recipe), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"ACCELERATE_USE_CPU": "true"} if "ddp" in config else {})
    return subprocess.run(command, capture_output=True, text=True, cwd=recipe.parent, env=environment)


@pytest.mark.slow
def test_accelerate_launch_is_the_same_code_path(first: Path, tiny_llama: Path, tmp_path: Path) -> None:
    done = launch("cpu.yaml", write_recipe(tmp_path, tiny_llama), "seed=0")
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = adapter_of(first), adapter_of(tmp_path / "run")
    # Equal to the bit with as many threads; another number of them sums in another order.
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


def test_gpt2_runs_too(tmp_path: Path) -> None:
    """Another family from start to end: learnt positions (long enough for the neutral text), Conv1D."""
    model = save_tiny(tmp_path / "gpt2", "gpt2", n_positions=600)
    assert train(write_recipe(tmp_path, model)) == 0
    assert read(tmp_path / "run" / "run.json")["parameters"] == 3 * 8 * 2
