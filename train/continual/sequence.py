"""A run over a sequence of tasks: what is learnt, measured and written, in which order.

For each task of `task.sequence`: learn it (see `continual`), then measure all tasks so far on held-out subjects.
`sequence.json` is written after each; evaluation.json, heads.json and the model at the end. A run that was broken goes
on from the newest complete checkpoint of the task it was in, to the same numbers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftModel
from transformers.trainer_utils import align_special_tokens

from headtune.analysis.heads.head_set import HeadSet, RankedHead
from headtune.analysis.identify import pipeline
from headtune.analysis.methods.scores import load_means
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.reports import head_report
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import encode
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.files import write_json
from headtune.analysis.utils.progress import Notify
from headtune.analysis.utils.state_files import read_state
from headtune.analysis.utils.stats import mean_interval
from headtune.train.config.methods import EvaluationConfig, SeekrConfig, TaskConfig
from headtune.train.config.resolve_heads import keep_heads, resolve_heads, selected
from headtune.train.config.resolve_tasks import tasks_of
from headtune.train.config.schema import Recipe
from headtune.train.evaluation.evaluate import check_generation_length, perplexity, score_task
from headtune.train.evaluation.evaluation_file import (
    flatten_metrics,
    new_folder,
    peak_memory,
    read_before,
    to_row,
    write_evaluation,
)
from headtune.train.evaluation.multiple_choice import require_choices, truthfulqa_preamble
from headtune.train.tracking import media
from headtune.train.tracking.tracker import Tracker
from headtune.train.trainer import rows as rows_module
from headtune.train.trainer import training, training_rows
from headtune.train.tuners import weights_io

from .learner import Learner, Unit
from .metrics import sequence_metrics


@dataclass(frozen=True)
class Step:
    """One task of the sequence: its name, what is trained on, what is held out."""

    name: str
    train: Task
    held_out: Task


def steps_of(block: TaskConfig) -> list[Step]:
    """The tasks of a sequence, in order.

    Raises:
        InputError: no such task, one without held-out subjects, or two with the same name.
    """
    steps: list[Step] = []
    for part in block.sequence or []:
        own = block.model_copy(update={"train": part.train, "eval": part.eval, "sequence": None})
        train, held_out = tasks_of(own)
        name = part.name or train.name.removesuffix(f":{train.split}").rpartition(":")[2]
        if any(step.name == name for step in steps):
            raise InputError(f"task.sequence names {name!r} twice; give one of them another name")
        steps.append(Step(name, train, held_out))
    return steps


def general_tasks(recipe: Recipe) -> list[Task]:
    """The tasks that are measured before and after, with the sequence's limit on examples."""
    return [
        load_task(name, recipe.task.split.seed).limited(recipe.task.max_eval_examples, seed=0)
        for name in recipe.evaluation.general
    ]


def rows_of(recipe: Recipe, model: HeadModel, steps: Sequence[Step]) -> list[list[rows_module.TrainingRow]]:
    """Each task's training rows."""
    limit, seed = recipe.task.max_train_examples, recipe.seed
    return [
        rows_module.rows_of(step.train.limited(limit, seed), model.tokenizer, index, seed)
        for index, step in enumerate(steps)
    ]


def require_usable(recipe: Recipe, model: HeadModel, steps: Sequence[Step]) -> None:
    """Refuse, before anything is written, what does not fit the tokenizer, the tasks, the model or transformers."""
    method = recipe.method
    assert isinstance(method, SeekrConfig)
    general = general_tasks(recipe)
    names = [step.name for step in steps] + [task.name for task in general]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two of the tasks measured are called {twice[0]!r}; rename a file, or name the step")
    for task in [step.held_out for step in steps] + general:
        require_choices(task)
        check_generation_length(model.hf, model.tokenizer, task, recipe.evaluation.n_items)
    if recipe.heads is not None and recipe.heads.identify is None:
        resolve_heads(recipe.heads, model, steps[0].train, notify=lambda _line: None)
    elif recipe.heads is not None:
        if steps[0].train.kind == "multiple_choice":
            raise InputError(
                f"task {steps[0].name!r} is multiple choice, on which heads cannot be identified; use heads.from"
            )
        encode(steps[0].train, model.tokenizer, model.positions)
    distil = method.distil
    everywhere = model.n_layers * model.n_heads
    if method.strategy == "seekr" and recipe.heads is None:
        layers = model.n_layers if distil.layers == "all" else distil.layers
        for key, value, most in (("layers", layers, model.n_layers), ("heads", distil.heads, everywhere)):
            if value > most:
                raise InputError(f"method.distil.{key} is {value}, and the model has {most}; lower it")
        if distil.heads > layers * model.n_heads:
            raise InputError(
                f"method.distil.heads is {distil.heads}, and {layers} layers have {layers * model.n_heads}; lower it"
            )
    vocabulary = model.hf.get_output_embeddings().weight.shape[0]
    if distil.logits_top is not None and distil.logits_top >= vocabulary:
        raise InputError(f"method.distil.logits_top is {distil.logits_top} of {vocabulary} logits; lower or remove it")
    for step, rows in zip(steps, rows_of(recipe, model, steps), strict=True):
        training_rows.check_lengths(step.name, [row.length for row in rows], model.positions)
    for key in ("packing", "loss_type", "label_smoothing_factor", "completion_only_loss", "assistant_only_loss"):
        if recipe.training.get(key):
            raise InputError(f"training.{key} is not read by recipe seekr, whose loss is its own; remove it")
    training.training_arguments(recipe)
    if recipe.evaluation.before is not None:
        base_of(Path(recipe.evaluation.before), identity_of(recipe, model, steps, general))


PRIMARY = {"exact_match": "exact_match", "lists": "correct_new_rate", "multiple_choice": "mc1"}


# --- the whole run ----------------------------------------------------------------------------------------------------

PROGRESS = "sequence.json"


def learn_sequence(
    recipe: Recipe,
    model: HeadModel,
    steps: Sequence[Step],
    tracker: Tracker,
    state: dict[str, Any],
    resume: bool,
    progress: pipeline.Progress,
    notify: Notify,
) -> dict[str, Any]:
    """Learn all tasks of a recipe; returns the content of evaluation.json (empty but on rank 0).

    Writes into `state` what run.json says.

    Raises:
        InputError: a run that is taken up with other data or another model than it was started with.
    """
    folder, method = recipe.folder, recipe.method
    assert isinstance(method, SeekrConfig)
    main, path, general = tracker.is_main, folder / PROGRESS, general_tasks(recipe)
    identity = identity_of(recipe, model, steps, general)
    # What a trainer does to a model's special tokens would change what it writes: before anything is measured.
    if model.tokenizer.pad_token is None:
        model.tokenizer.pad_token = model.tokenizer.eos_token
    align_special_tokens(model.hf, model.tokenizer)
    measured = functools.partial(scores_of, model.tokenizer, recipe.evaluation)
    saved = read_state(path) if resume and path.is_file() else {}
    rows = rows_of(recipe, model, steps)
    learnt = {"train_sha256": hashlib.sha256(repr(rows).encode()).hexdigest()}
    if saved and (odd := sorted(key for key, value in (identity | learnt).items() if saved["identity"][key] != value)):
        raise InputError(f"{path}: the run was started with another {odd[0]}; start it anew in another output_dir")
    if not saved:
        saved = {"identity": identity | learnt, "after": [], "heads": [], "timing": [], "n_steps": 0}
        if recipe.evaluation.before is not None:
            saved |= base_of(Path(recipe.evaluation.before), identity)
        elif main:
            notify(f"measuring the base model on {len(steps)} tasks")
            saved |= {
                "before": [measured(model.hf, step.held_out) for step in steps],
                "general_before": {task.name: measured(model.hf, task) for task in general},
                "perplexity_before": perplexity(model.hf, model.tokenizer),
            }
        if main:
            write_json(path, saved)
        PartialState().wait_for_everyone()
    together = method.strategy == "multitask"
    units = [Unit(step.name, step.train, own) for step, own in zip(steps, rows, strict=True)]
    if together:
        units = [Unit("all", steps[0].train, [row for own in rows for row in own])]
    learner = Learner(recipe, model, units, tracker, progress, notify)
    learner.start()
    done = len(saved["after"])
    if done:
        chosen = [[(layer, head) for layer, head in pairs] for pairs in saved["heads"]]
        learner.recall(done, chosen, saved["timing"], saved["n_steps"])
    for index in range(done, len(units)):
        learner.learn(index, resume)
        if main:
            so_far = steps if together else steps[: index + 1]
            notify(f"measuring {len(so_far)} tasks")
            found = [measured(learner.model, step.held_out) for step in so_far]
            saved["after"].append(found)
            saved |= {"heads": learner.chosen, "timing": learner.timing, "n_steps": learner.n_steps}
            tracker.log(
                {f"sequence/{step.name}": mean(of) for step, of in zip(so_far, found, strict=True)}
                | {"sequence/task": index + 1},
                step=learner.n_steps,
            )
            write_json(path, saved)
        PartialState().wait_for_everyone()
        learner.forget(index)
    _note_run(recipe, learner, steps, state)
    if not main:
        PartialState().wait_for_everyone()
        return {}
    if "general_after" not in saved:
        saved["general_after"] = {task.name: measured(learner.model, task) for task in general}
        saved["perplexity_after"] = perplexity(learner.model, model.tokenizer)
        write_json(path, saved)
    evaluation = evaluation_of(identity, folder, steps, general, saved, together)
    if learner.chosen and learner.fixed is None:
        _keep_heads(recipe, model, learner)
    if (folder / "heads.json").is_file():
        heads, scores = HeadSet.load(folder), folder / "scores.safetensors"
        means = load_means(scores) if scores.is_file() else {}
        head_report.write_report(folder / "report.html", heads, means, evaluation, title=recipe.name)
    else:
        media.write_run_page(recipe, folder, evaluation)
    tracker.log(flatten_metrics("after", evaluation["after"]))
    tracker.summary(flatten_metrics("after", evaluation["after"]) | {"parameters": state["parameters"]})
    tracker.table("sequence", ["learnt", *(step.name for step in steps)], _matrix_rows(units, saved["after"]))
    if method.keep != "none":
        lora = isinstance(learner.model, PeftModel)
        with new_folder(folder / ("adapter" if lora else "model")) as temporary:
            weights_io.write(learner.model, temporary)
            if not lora:
                model.tokenizer.save_pretrained(str(temporary))
    PartialState().wait_for_everyone()
    return evaluation


def _note_run(recipe: Recipe, learner: Learner, steps: Sequence[Step], state: dict[str, Any]) -> None:
    """What run.json says of a sequence."""
    everything = sum(parameter.numel() for parameter in learner.model.parameters())
    trained = sum(parameter.numel() for parameter in learner.model.parameters() if parameter.requires_grad)
    total = everything - (trained if isinstance(learner.model, PeftModel) else 0)
    state |= {"parameters": trained, "model_parameters": total, "parameters_share": trained / total}
    state |= {"peak_memory_gib": peak_memory(), "heads": learner.chosen[-1] if learner.chosen else []}
    # A task that was taken up again has timed the steps since then only.
    timed = [part for part in learner.timing if part]
    state["training"] = {"steps": learner.n_steps, "seconds": sum(part["seconds"] for part in timed)}
    if timed:
        state["training"]["seconds_per_step"] = sum(part["seconds_per_step"] for part in timed) / len(timed)
    if recipe.method.strategy == "ewc":
        of = zip(learner.units, learner.informing, strict=True)
        state["fisher_rows"] = {unit.name: len(rows) for unit, rows in list(of)[:-1]}  # nothing comes after the last
    state["buffer"] = {unit.name: len(share) for unit, share in zip(learner.units, learner.buffer, strict=True)}
    limited = [(step.name, step.train.limited(recipe.task.max_train_examples, recipe.seed)) for step in steps]
    state["training_data"] = {
        "tasks": [{"name": name, "sha256": part.sha256, "n_examples": len(part.examples)} for name, part in limited]
    }


def clear(recipe: Recipe) -> None:
    """Remove what only a run that is not done needs: teachers, checkpoints, anchors, models that `keep` does not name.

    And what a killed process left half written (see `atomic_folder`).
    """
    assert isinstance(recipe.method, SeekrConfig)
    names = [
        "teachers",
        "checkpoints",
        "remembered",
        "anchor.safetensors",
        ".*",
        *([] if recipe.method.keep == "all" else ["model", "adapter"]),
    ]
    for pattern in ["teachers", ".model.*", ".adapter.*", *(f"tasks/*/{name}" for name in names)]:
        for path in recipe.folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def scores_of(tokenizer: Any, settings: EvaluationConfig, model: Any, task: Task) -> dict[str, Any]:
    """A task's main metric by example, with what the model wrote."""
    model.eval()
    preamble = truthfulqa_preamble() if settings.preamble == "truthfulqa" and task.kind == "multiple_choice" else ""
    metrics, scored = score_task(model, tokenizer, task, settings.n_items, settings.batch_size, preamble)
    main = PRIMARY[task.kind]
    return {
        "metric": main,
        "metrics": {name: value["mean"] for name, value in metrics.items() if name != "n"},
        "values": [one.values[main] for one in scored],
        "rows": [to_row(one) for one in scored],
    }


def mean(of: Mapping[str, Any]) -> float:
    return float(np.mean(of["values"]))


def identity_of(recipe: Recipe, model: HeadModel, steps: Sequence[Step], general: Sequence[Task]) -> dict[str, Any]:
    """What two measurements of the base model must share to be the same measurement."""
    tasks = [step.held_out for step in steps] + list(general)
    measured = hashlib.sha256(" ".join(f"{task.name} {task.sha256}" for task in tasks).encode()).hexdigest()
    return {
        "task": "sequence",
        "task_sha256": measured,
        "weights_sha256": model.weights_sha256,
        "n_items": recipe.evaluation.n_items,
        "preamble": recipe.evaluation.preamble,
    }


def base_of(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The base model's measurement in another run of the same sequence, whose evaluation.json is `path`.

    Raises:
        InputError: the file is missing or measured something else.
    """
    read_before(path, identity)
    other = path.with_name(PROGRESS)
    try:
        saved = json.loads(other.read_text(encoding="utf-8"))
        return {key: saved[key] for key in ("before", "general_before", "perplexity_before")}
    except (OSError, ValueError, KeyError):
        raise InputError(f"evaluation.before {str(path)!r} has no {PROGRESS} beside it; remove the key") from None


def evaluation_of(
    identity: Mapping[str, Any],
    folder: Path,
    steps: Sequence[Step],
    general: Sequence[Task],
    saved: Mapping[str, Any],
    together: bool,
) -> dict[str, Any]:
    """Write evaluation.json: averages over tasks before and after, what was forgotten, and each task by itself."""
    names = [step.name for step in steps]
    last = saved["after"][-1]
    before = _averages(names, saved["before"], saved["general_before"], saved["perplexity_before"])
    after = _averages(names, last, saved["general_after"], saved["perplexity_after"])
    if not together:
        columns = saved["after"]
        found = sequence_metrics(
            [[columns[j][i]["values"] if j >= i else None for j in range(len(steps))] for i in range(len(steps))],
            [_subjects(one) for one in last],
        )
        after |= {"bwt": {"mean": found["bwt"], "ci": found["bwt_ci"]}, "forgetting": found["forgetting"]}
    counts = {name: len(of["values"]) for name, of in zip(names, last, strict=True)}
    before["n"] = after["n"] = {"examples": sum(counts.values()), "by_task": counts}
    parts = [(of["rows"], later["rows"]) for of, later in zip(saved["before"], last, strict=True)]
    parts += [(saved["general_before"][t.name]["rows"], saved["general_after"][t.name]["rows"]) for t in general]
    rows_before, rows_after = ([row for part in parts for row in part[side]] for side in (0, 1))
    return write_evaluation(folder, identity, before, after, rows_before, rows_after)


def _averages(
    names: Sequence[str], of: Sequence[Mapping[str, Any]], general: Mapping[str, Any], perplexity: float
) -> dict[str, Any]:
    """`op`, each task's main metric, the general tasks' metrics, all as `{"mean", "ci"}`, and the perplexity."""
    once = [[None] * i + [one["values"]] * (len(of) - i) for i, one in enumerate(of)]  # as if nothing changed
    found = sequence_metrics(once, [_subjects(one) for one in of])
    result: dict[str, Any] = {"op": {"mean": found["op"], "ci": found["op_ci"]}}
    result |= {
        f"{name}/{one['metric']}": mean_interval(one["values"], _subjects(one))
        for name, one in zip(names, of, strict=True)
    }
    for name, one in general.items():
        for metric in one["rows"][0]["values"]:
            result[f"{name}/{metric}"] = mean_interval([row["values"][metric] for row in one["rows"]], _subjects(one))
    return result | {"neutral_perplexity": perplexity}


def _subjects(of: Mapping[str, Any]) -> list[str]:
    """Of each example of a task, as its values are ordered."""
    return [row["subject"] for row in of["rows"]]


def _keep_heads(recipe: Recipe, model: HeadModel, learner: Learner) -> None:
    """heads.json and its scores: the heads chosen last, by the importance that chose them."""
    found, chosen = learner.importance, learner.chosen[-1]
    values = {"importance": found.value(), "sensitivity": found.sensitivity, "forgetting": found.forgetting}
    scores = {f"seekr.{name}": tensor for name, tensor in values.items()}
    by = recipe.method.distil.choice
    drawn = by.startswith("random")  # whose rank would mean nothing
    ranking = torch.zeros_like(found.value()) if drawn else scores[f"seekr.{by}"]
    ranked = tuple(
        RankedHead(layer, head, float(ranking[layer, head]), None)
        for layer, head in sorted(chosen, key=lambda pair: -float(ranking[pair]))
    )
    task = {
        "name": "+".join(unit.name for unit in learner.units),
        "sha256": hashlib.sha256(" ".join(unit.task.sha256 for unit in learner.units).encode()).hexdigest(),
        "n_examples": sum(len(unit.rows) for unit in learner.units),
        "n_dropped": 0,
        "dropped": {},
    }
    method = {"parameters": recipe.method.distil.model_dump()}
    keep_heads(selected("random" if drawn else "seekr", scores, ranked, recipe, model, task, method), recipe.folder)


def _matrix_rows(learnt: Sequence[Unit], after: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[Any]]:
    width = max(len(row) for row in after)
    return [
        [step.name, *(mean(of) for of in row), *[None] * (width - len(row))]
        for step, row in zip(learnt, after, strict=True)
    ]
