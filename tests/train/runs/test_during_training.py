"""Evaluation during training on the part that is set aside: the best checkpoint is what is measured and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headtune.analysis.tasks.task import Example, to_jsonl
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.files import write_text
from headtune.cli.main import main
from headtune.train.config.recipe import load_recipe, parse
from headtune.train.config.resolve_tasks import tasks_of, validation_of
from headtune.train.runs import run as runs
from headtune.train.trainer import checkpoints, training
from helpers.small_runs import train, write_recipe

SETTINGS = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "use_cpu": True,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
}
SPLIT = ["country_cities:train", "country_cities:validation", "country_cities:test"]


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def state_of(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((run / "run.json").read_text())
    return state


def same(folder: Path, other: Path) -> bool:
    mine, theirs = (load_file(path / "adapter_model.safetensors") for path in (folder, other))
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in mine.items())


@pytest.mark.parametrize("objective", ["answer_set", "sft", "dpo"])
def test_the_best_checkpoint_is_what_is_left(objective: str, llama: Path, tmp_path: Path) -> None:
    method: dict[str, Any] = {"objective": objective, "answer_set": {"own_lists": 0.0}}
    changes: dict[str, Any] = {}
    if objective == "dpo":
        facts = [(f"item {n}", "Rome" if n % 2 else "Paris") for n in range(16)]
        rows = [Example(f"Where is {name}?", name, (city,), incorrect=("Berlin",)) for name, city in facts]
        write_text(tmp_path / "pairs.jsonl", to_jsonl(rows))
        changes["task"] = {"train": str(tmp_path / "pairs.jsonl"), "kind": "multiple_choice"}
    recipe = write_recipe(tmp_path, llama, method=method, training=SETTINGS | {"save_total_limit": 1}, **changes)
    assert train(recipe) == 0
    run = tmp_path / "run"
    evaluated = {line["step"]: line["eval/loss"] for line in lines_of(run) if "eval/loss" in line}
    assert sorted(evaluated) == [2, 4, 6, 8]
    best = min(evaluated, key=lambda step: evaluated[step])
    record = state_of(run)["training"]["best"]
    assert (record["step"], record["metric"]) == (best, "loss") and record["value"] == pytest.approx(evaluated[best])
    assert same(run / "adapter", run / f"checkpoint-{best}")
    aside = state_of(run)["training_data"]["validation"]
    loaded = load_recipe(str(recipe))
    parts = tasks_of(loaded.task)
    validation = validation_of(loaded.task, *parts)
    assert aside["sha256"] == validation.sha256 and aside["n_rows"] == len(validation.examples)
    assert not set(validation.subjects) & {name for part in parts for name in part.subjects}


def test_a_last_step_that_is_not_the_best(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what is evaluated during training changes nothing of the training."""
    method = {"objective": "answer_set", "answer_set": {"own_lists": 0.0}}
    settings = SETTINGS | {"learning_rate": 2.0, "max_steps": 16, "save_total_limit": 8}
    recipe = write_recipe(tmp_path, llama, method=method, training=settings)
    assert train(recipe) == 0
    run, printed = tmp_path / "run", capsys.readouterr()
    losses = {line["step"]: line["eval/loss"] for line in lines_of(run) if "eval/loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert best < 16, f"choose another learning rate: {losses}"
    text = " ".join((printed.out + printed.err).split())
    assert f"at step {best}: its weights are put back" in text
    assert "evaluating during training on 2 rows of cities:validation, which are not held out" in text
    plain = {key: value for key, value in settings.items() if "eval" not in key and "best" not in key}
    other = write_recipe(tmp_path, llama, method=method, training=plain | {"save_steps": 2})
    assert train(other, f"output_dir={tmp_path}/plain") == 0
    assert same(run / "checkpoint-16", tmp_path / "plain" / "checkpoint-16")
    assert not same(run / "adapter", run / "checkpoint-16")
    assert "best" not in state_of(tmp_path / "plain")["training"]


def test_early_stopping_and_its_resume(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    early = SETTINGS | {"max_steps": 40, "early_stopping_patience": 2, "early_stopping_threshold": 0.0}
    recipe = write_recipe(tmp_path, llama, training=early | {"learning_rate": 2.0, "save_total_limit": 3})
    run = tmp_path / "run"

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after the training, before anything of it is written
        patch.setattr(training.best_checkpoint.BestCheckpoint, "put_back", killed)
        with pytest.raises(KeyboardInterrupt):
            runs.run_recipe(load_recipe(str(recipe)))
    steps = sorted(checkpoints.by_step(run))
    assert steps[-1] < 40, "it was to stop early"
    assert train(recipe, "--resume") == 0
    record = state_of(run)["training"]
    assert record["steps"] == steps[-1], "a training that had stopped is not taken up"
    assert record["stopped_early"] and record["best"]["step"] == steps[-1] - 4
    assert same(run / "adapter", run / f"checkpoint-{steps[-1] - 4}")


def test_a_best_checkpoint_that_is_damaged_is_no_result(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, llama, training=SETTINGS | {"max_steps": 2})
    put_back = training.best_checkpoint.BestCheckpoint.put_back

    def damaged(self: Any, trainer: Any, notify: Any) -> Any:
        path = tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
        return put_back(self, trainer, notify)

    monkeypatch.setattr(training.best_checkpoint.BestCheckpoint, "put_back", damaged)
    with pytest.raises(CheckError, match=r"best checkpoint '.*checkpoint-2' cannot be put back: .*other bytes"):
        runs.run_recipe(load_recipe(str(recipe)))


# --- which rows -------------------------------------------------------------------------------------------------------


def test_the_rows_of_named_parts_and_of_a_task_of_its_own(tmp_path: Path) -> None:
    def validation(**task: Any) -> Any:
        block = parse({"recipe": "lora", "task": task, "training": {"eval_strategy": "epoch"}}).task
        return validation_of(block, *tasks_of(block))

    train_part, aside, test = SPLIT
    assert validation(train="country_cities").name == aside
    assert validation(train=train_part, eval=test).name == aside
    assert validation(train=train_part, eval=test, validation=aside, max_eval_examples=3).name == aside
    with pytest.raises(InputError, match=r"share \d+ subjects or prompts with task.eval"):
        validation(train=train_part, eval=aside)
    with pytest.raises(InputError, match=r"share \d+ subjects or prompts with task.eval"):
        validation(train="country_cities", validation=test)
    with pytest.raises(InputError, match=r"share \d+ subjects or prompts with task.train"):
        validation(train="country_cities", validation=train_part)
    for name, city in (("a", "Rome"), ("b", "Paris")):
        rows = [Example(f"Where is {name}{n}?", f"{name}{n}", (city,)) for n in range(4)]
        write_text(tmp_path / f"{name}.jsonl", to_jsonl(rows))
    both = {"train": str(tmp_path / "a.jsonl"), "eval": str(tmp_path / "b.jsonl")}
    with pytest.raises(InputError, match=r"has no validation part beside task\.eval; name them: task\.validation="):
        validation(**both)
    with pytest.raises(InputError, match=r"subjects or prompts with task\.eval"):  # also where subjects may recur
        validation(**both, split={"by": "file"}, validation=both["eval"])


REFUSED = [
    ({"eval_strategy": "sometimes"}, "training.eval_strategy 'sometimes' is unknown"),
    ({"eval_steps": 5}, "training.eval_steps needs evaluation during training; set training.eval_strategy"),
    ({"load_best_model_at_end": True}, "training.load_best_model_at_end needs evaluation during training"),
    ({"early_stopping_patience": 2}, "training.early_stopping_patience needs evaluation during training"),
    ({"save_strategy": "best"}, "'best' needs training.eval_strategy"),
    (SETTINGS | {"early_stopping_patience": 0}, "must be a whole number of evaluations, at least 1, found 0"),
    (SETTINGS | {"early_stopping_threshold": 0.1}, "needs training.early_stopping_patience"),
    (SETTINGS | {"early_stopping_patience": 1, "early_stopping_threshold": -1.0}, "must be at least 0, found -1.0"),
    ({"eval_strategy": "epoch", "early_stopping_patience": 1}, "set load_best_model_at_end=true"),
    (SETTINGS | {"metric_for_best_model": "accuracy"}, "'accuracy' is not measured by sft"),
    (SETTINGS | {"metric_for_best_model": "rewards/accuracies"}, "is not measured by sft"),
    (SETTINGS | {"greater_is_better": True}, "training.greater_is_better must be false for loss"),
    ({"eval_strategy": "epoch", "metric_for_best_model": "loss"}, "is read by load_best_model_at_end or"),
    (SETTINGS | {"save_steps": 4}, "training.save_steps 4 keeps checkpoints at other steps than are measured (2)"),
    (SETTINGS | {"save_strategy": "epoch"}, "training.save_strategy 'epoch' keeps checkpoints at other steps"),
    (SETTINGS | {"eval_steps": 9}, "training.eval_steps 9 is more than max_steps 8"),
    (SETTINGS | {"early_stoping_patience": 2}, "did you mean 'training.early_stopping_patience'?"),
]


@pytest.mark.parametrize("settings, message", REFUSED)
def test_keys_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        parse({"recipe": "lora", "method": {"objective": "sft"}, "training": settings})
    assert message in str(refused.value)


def test_methods_that_cannot_be_evaluated_during_training() -> None:
    def refusal(recipe: dict[str, Any]) -> str:
        with pytest.raises(InputError) as refused:
            parse(recipe)
        return str(refused.value)

    during = {"eval_strategy": "epoch"}
    sequence = {"sequence": ["a.jsonl", "b.jsonl"]}
    assert "is not for recipe seekr" in refusal({"recipe": "seekr", "task": sequence, "training": during})
    chooses = {"recipe": "lofit", "heads": {"lofit": {}}, "method": {"select_only": True}, "training": during}
    assert "it ends when heads are chosen" in refusal(chooses)
    prunes = {
        "recipe": "regularise",
        "heads": {"all": True},
        "method": {"regularisers": [{"kind": "prune", "weight": 1.0}]},
        "training": SETTINGS,
    }
    assert "would not bring the gates of kind prune back" in refusal(prunes)
    unread = {"recipe": "lora", "task": {"train": "one_to_many", "validation": "country_cities:test"}}
    assert "task.validation is read by evaluation during training" in refusal(unread)


def test_metrics_are_read_the_right_way_round() -> None:
    """transformers takes all that does not end in "loss" for something to raise; an answer set's terms are losses."""

    def arguments(objective: str, metric: str) -> Any:
        method = {"objective": objective}
        keys = SETTINGS | {"metric_for_best_model": metric}
        return training.training_arguments(parse({"recipe": "lora", "method": method, "training": keys}))

    assert arguments("answer_set", "recall").greater_is_better is False
    assert arguments("answer_set", "eval_loss").greater_is_better is False
    assert arguments("sft", "mean_token_accuracy").greater_is_better is True
    assert arguments("dpo", "rewards/accuracies").greater_is_better is True


def test_a_metric_besides_the_loss(llama: Path, tmp_path: Path) -> None:
    method = {"objective": "sft"}
    keys = SETTINGS | {"metric_for_best_model": "mean_token_accuracy", "save_strategy": "best", "max_steps": 4}
    assert train(write_recipe(tmp_path, llama, method=method, training=keys)) == 0
    lines = lines_of(tmp_path / "run")
    values = {line["step"]: line["eval/mean_token_accuracy"] for line in lines if "eval/mean_token_accuracy" in line}
    record = state_of(tmp_path / "run")["training"]["best"]
    assert record["value"] == max(values.values()) and sorted(values) == [2, 4]


def test_the_dry_run_says_what_is_evaluated(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, llama, training=SETTINGS)
    assert main(["train", str(recipe), "--dry-run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "validation (1 subject) evaluated during training" in printed
    assert "2 rows of cities:validation are evaluated during training" in printed
