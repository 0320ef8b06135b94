"""A run over a sequence of tasks: what is learnt, measured and written, in which order.

For each task of `task.sequence`: learn it (see `continual`), then measure all tasks so far on held-out subjects.
`sequence.json` is written after each; evaluation.json, heads.json and the model at the end. A run that was broken goes
on from the newest complete checkpoint of the task it was in, to the same numbers.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers.trainer_utils import align_special_tokens

from headtune.analysis.heads.head_set import HeadSet, RankedHead
from headtune.analysis.methods.scores import load_means
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.chat import with_chat
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.messages import chat_entry
from headtune.analysis.tasks.prompt_tokens import require_embeddings
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import encode
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.files import write_json
from headtune.analysis.utils.state_files import read_state
from headtune.train.config.methods import EvaluationConfig, SeekrConfig, TaskConfig
from headtune.train.config.resolve_heads import ResolvedHeads, keep_heads, resolve_heads, selected
from headtune.train.config.resolve_tasks import chat_setting, tasks_of
from headtune.train.config.schema import Recipe
from headtune.train.evaluation.evaluate import check_generation_length, perplexity
from headtune.train.evaluation.evaluation_file import peak_memory
from headtune.train.evaluation.multiple_choice import require_choices
from headtune.train.evaluation.run_reader import IMPLIED
from headtune.train.methods.base import method_named
from headtune.train.tracking import results
from headtune.train.trainer import rows as rows_module
from headtune.train.trainer import training, training_rows
from headtune.train.trainer.run_context import RunContext

from .learner import Learner, Stage
from .measurements import PROGRESS, base_of, evaluation_of, identity_of, mean, scores_of


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
        block_of_step = block.model_copy(update={"train": part.train, "eval": part.eval, "sequence": None})
        train, held_out = tasks_of(block_of_step)
        name = part.name or train.name.removesuffix(f":{train.split}").rpartition(":")[2]
        if any(step.name == name for step in steps):
            raise InputError(f"task.sequence names {name!r} twice; give one of them another name")
        steps.append(Step(name, train, held_out))
    return steps


def general_tasks(settings: EvaluationConfig, task: TaskConfig) -> list[Task]:
    """The tasks that are measured before and after, with the sequence's limit on examples and its chat template."""
    chat = chat_setting(task)
    return [
        with_chat(load_task(name, task.split.seed), chat).limited(task.max_eval_examples, seed=0)
        for name in settings.general
    ]


def rows_of(recipe: Recipe, model: HeadModel, steps: Sequence[Step]) -> list[list[rows_module.TrainingRow]]:
    """Each task's training rows."""
    limit, seed = recipe.task.max_train_examples, recipe.seed
    return [
        rows_module.rows_of(step.train.limited(limit, seed), model.tokenizer, index, seed)
        for index, step in enumerate(steps)
    ]


@dataclass(frozen=True)
class PreparedSequence:
    """The tasks of a sequence, checked against the model.

    Attributes:
        general: tasks measured besides, before and after.
        rows: of each step, what is trained on.
        identity: what the measurement before training is of.
        heads: those that the recipe names; None where it names none, or they are identified in the run.
        notes: what was to be told about the heads.
    """

    steps: list[Step]
    general: list[Task]
    rows: list[list[rows_module.TrainingRow]]
    identity: dict[str, Any]
    heads: ResolvedHeads | None
    notes: list[str]


def prepare(recipe: Recipe, model: HeadModel, steps: list[Step]) -> PreparedSequence:
    """Refuse, before anything is written, what does not fit the tokenizer, the tasks, the model or transformers.

    Raises:
        InputError: what does not fit.
    """
    method: SeekrConfig = recipe.method
    general = general_tasks(recipe.evaluation, recipe.task)
    heads, notes = None, []  # type: ResolvedHeads | None, list[str]
    names = [step.name for step in steps] + [task.name for task in general]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two of the tasks measured are called {twice[0]!r}; rename a file, or name the step")
    for task in [step.held_out for step in steps] + general:
        require_choices(task)
        check_generation_length(model.hf, model.tokenizer, task, recipe.evaluation.n_items)
    if recipe.heads is not None and recipe.heads.identify is None:
        heads = resolve_heads(recipe.heads, model, steps[0].train, notify=notes.append)
    elif recipe.heads is not None:
        if steps[0].train.kind == "multiple_choice":
            raise InputError(
                f"task {steps[0].name!r} is multiple choice, on which heads cannot be identified; use heads.from"
            )
        encode(steps[0].train, model.tokenizer, model.positions, model.vocabulary)
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
    rows = rows_of(recipe, model, steps)
    for step, step_rows in zip(steps, rows, strict=True):
        training_rows.check_lengths(step.name, [row.length for row in step_rows], model.positions)
        tokens = [row.input_ids for row in step_rows]
        require_embeddings(model.tokenizer, tokens, model.vocabulary, f"task {step.name!r}")
    for key in ("packing", "loss_type", "label_smoothing_factor", "completion_only_loss", "assistant_only_loss"):
        if recipe.training.get(key):
            raise InputError(f"training.{key} is not read by recipe seekr, whose loss is its own; remove it")
    training.training_arguments(recipe)
    identity = identity_of(recipe.evaluation, model, [*(step.held_out for step in steps), *general])
    if recipe.evaluation.before is not None:
        base_of(Path(recipe.evaluation.before), identity)
    return PreparedSequence(steps, general, rows, identity, heads, notes)


# --- the whole run ----------------------------------------------------------------------------------------------------


def learn_sequence(
    context: RunContext, prepared: PreparedSequence
) -> tuple[dict[str, Any], ResolvedHeads, dict[str, Any]]:
    """Learn all tasks of a recipe.

    Returns:
        The content of evaluation.json (empty but on rank 0), the heads, and what run.json says of the sequence.

    Raises:
        InputError: a run that is taken up with other data or another model than it was started with.
    """
    recipe, model, tracker, folder = context.recipe, context.model, context.tracker, context.folder
    method: SeekrConfig = recipe.method
    steps, general, path = prepared.steps, prepared.general, folder / PROGRESS
    # What a trainer does to a model's special tokens would change what it writes: before anything is measured.
    training.set_pad_token(model)
    align_special_tokens(model.hf, model.tokenizer)
    measured = functools.partial(scores_of, model.tokenizer, recipe.evaluation)
    # What a broken run has measured, or the base model's measurement.
    saved = _saved_progress(context, prepared)
    if not saved:
        saved = _start(context, prepared, measured)
    # One task after the other: learn it, measure all so far.
    together = method.strategy == "multitask"
    stages = [Stage(step.name, step.train, rows) for step, rows in zip(steps, prepared.rows, strict=True)]
    if together:
        stages = [Stage("all", steps[0].train, [row for rows in prepared.rows for row in rows])]
    learner = Learner(context, stages, prepared.heads)
    for line in prepared.notes:
        context.notify(line)
    learner.start()
    done = len(saved["after"])
    if done:
        chosen = [[(layer, head) for layer, head in pairs] for pairs in saved["heads"]]
        learner.resume_from(done, chosen, saved["timing"], saved["n_steps"])
    for index in range(done, len(stages)):
        learner.learn(index)
        if context.is_main:
            so_far = steps if together else steps[: index + 1]
            context.notify(f"measuring {len(so_far)} tasks")
            scores = [measured(learner.model, step.held_out) for step in so_far]
            saved["after"].append(scores)
            saved |= {"heads": learner.chosen, "timing": learner.timing, "n_steps": learner.n_steps}
            tracker.log(
                {f"sequence/{step.name}": mean(task) for step, task in zip(so_far, scores, strict=True)}
                | {"sequence/task": index + 1},
                step=learner.n_steps,
            )
            write_json(path, saved)
        PartialState().wait_for_everyone()
        learner.cleanup(index)
    record = _record(recipe, learner, steps)
    if not context.is_main:
        return {}, ResolvedHeads([]), record
    # The end: general tasks, evaluation.json, heads.json, the model.
    if "general_after" not in saved:
        saved["general_after"] = {task.name: measured(learner.model, task) for task in general}
        saved["perplexity_after"] = perplexity(learner.model, model.tokenizer)
        write_json(path, saved)
    evaluation = evaluation_of(prepared.identity, folder, [step.name for step in steps], general, saved, together)
    if learner.chosen and learner.fixed is None:
        _keep_heads(recipe, model, learner)
    tracker.table("sequence", ["learnt", *(step.name for step in steps)], _matrix_rows(stages, saved["after"]))
    if method.keep != "none":
        method_named(recipe.recipe).save(method, learner.model, model.tokenizer, folder)
    return evaluation, _heads_of_folder(folder), record


def _saved_progress(context: RunContext, prepared: PreparedSequence) -> dict[str, Any]:
    """sequence.json of the run that is taken up; empty where there is none."""
    path = context.folder / PROGRESS
    saved = read_state(path) if context.resume and path.is_file() else {}
    now = _what_is_learnt(prepared)
    was = IMPLIED | (saved["identity"] if saved else {})
    if saved and (odd := sorted(key for key, value in now.items() if was[key] != value)):
        raise InputError(f"{path}: the run was started with another {odd[0]}; start it anew in another output_dir")
    return saved


def _what_is_learnt(prepared: PreparedSequence) -> dict[str, Any]:
    # Spelled out as version 0.1.0 wrote it, so that no name of a class is part of the digest.
    tasks = (
        ", ".join(f"Row(key={row.key!r}, input_ids={row.input_ids!r}, labels={row.labels!r})" for row in rows)
        for rows in prepared.rows
    )
    text = "[" + ", ".join(f"[{rows}]" for rows in tasks) + "]"
    return prepared.identity | {"train_sha256": hashlib.sha256(text.encode()).hexdigest()}


def _start(
    context: RunContext, prepared: PreparedSequence, measured: Callable[[Any, Task], dict[str, Any]]
) -> dict[str, Any]:
    """sequence.json before anything is learnt: the base model's measurement, this run's or another's."""
    model, before = context.model, context.recipe.evaluation.before
    saved: dict[str, Any] = {"identity": _what_is_learnt(prepared)}
    saved |= {"after": [], "heads": [], "timing": [], "n_steps": 0}
    if before is not None:
        saved |= base_of(Path(before), prepared.identity)
    elif context.is_main:
        context.notify(f"measuring the base model on {len(prepared.steps)} tasks")
        saved |= {
            "before": [measured(model.hf, step.held_out) for step in prepared.steps],
            "general_before": {task.name: measured(model.hf, task) for task in prepared.general},
            "perplexity_before": perplexity(model.hf, model.tokenizer),
        }
    if context.is_main:
        write_json(context.folder / PROGRESS, saved)
    PartialState().wait_for_everyone()
    return saved


def _heads_of_folder(folder: Path) -> ResolvedHeads:
    """The head set in a run's folder, for its report."""
    if not (folder / "heads.json").is_file():
        return ResolvedHeads([])
    heads, scores = HeadSet.load(folder), folder / "scores.safetensors"
    return ResolvedHeads([], heads, load_means(scores) if scores.is_file() else {})


def _record(recipe: Recipe, learner: Learner, steps: Sequence[Step]) -> dict[str, Any]:
    """What run.json says of a sequence."""
    everything = sum(parameter.numel() for parameter in learner.model.parameters())
    trained = sum(parameter.numel() for parameter in learner.model.parameters() if parameter.requires_grad)
    total = everything - (trained if isinstance(learner.model, PeftModel) else 0)
    record = results.parameter_counts(trained, total)
    record |= {"peak_memory_gib": peak_memory(), "heads": learner.chosen[-1] if learner.chosen else []}
    # A task that was taken up again has timed the steps since then only.
    timed = [part for part in learner.timing if part]
    record["training"] = {"steps": learner.n_steps, "seconds": sum(part["seconds"] for part in timed)}
    if timed:
        record["training"]["seconds_per_step"] = sum(part["seconds_per_step"] for part in timed) / len(timed)
    if recipe.method.strategy == "ewc":
        rows_of_stage = zip(learner.stages, learner.fisher, strict=True)
        record["fisher_rows"] = {stage.name: len(rows) for stage, rows in list(rows_of_stage)[:-1]}  # no task follows
    record["buffer"] = {stage.name: len(share) for stage, share in zip(learner.stages, learner.buffer, strict=True)}
    limited = [(step.name, step.train.limited(recipe.task.max_train_examples, recipe.seed)) for step in steps]
    record["training_data"] = {
        "tasks": [{"name": name, "sha256": part.sha256, "n_examples": len(part.examples)} for name, part in limited]
    }
    return record


def clear(folder: Path, keep: str) -> None:
    """Remove what only a run that is not done needs: teachers, checkpoints, anchors, models that `keep` does not name.

    And what a killed process left half written (see `atomic_folder`).
    """
    names = [
        "teachers",
        "checkpoints",
        "remembered",
        "anchor.safetensors",
        ".*",
        *([] if keep == "all" else ["model", "adapter"]),
    ]
    for pattern in ["teachers", ".model.*", ".adapter.*", *(f"tasks/*/{name}" for name in names)]:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _keep_heads(recipe: Recipe, model: HeadModel, learner: Learner) -> None:
    """heads.json and its scores: the heads chosen last, by the importance that chose them."""
    importance, chosen = learner.importance, learner.chosen[-1]
    values = {
        "importance": importance.value(),
        "sensitivity": importance.sensitivity,
        "forgetting": importance.forgetting,
    }
    scores = {f"seekr.{name}": tensor for name, tensor in values.items()}
    by = recipe.method.distil.choice
    drawn = by.startswith("random")  # whose rank would mean nothing
    ranking = torch.zeros_like(importance.value()) if drawn else scores[f"seekr.{by}"]
    ranked = tuple(
        RankedHead(layer, head, float(ranking[layer, head]), None)
        for layer, head in sorted(chosen, key=lambda pair: -float(ranking[pair]))
    )
    task = {
        "name": "+".join(stage.name for stage in learner.stages),
        "sha256": hashlib.sha256(" ".join(stage.task.sha256 for stage in learner.stages).encode()).hexdigest(),
        "n_examples": sum(len(stage.rows) for stage in learner.stages),
        "n_dropped": 0,
        "dropped": {},
        **chat_entry(learner.stages[0].task.chat_template),
    }
    method = {"parameters": recipe.method.distil.model_dump()}
    keep_heads(
        selected("random" if drawn else "seekr", scores, ranked, recipe.seed, model, task, method), recipe.folder
    )


def _matrix_rows(learnt: Sequence[Stage], after: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[Any]]:
    width = max(len(row) for row in after)
    return [
        [step.name, *(mean(of) for of in row), *[None] * (width - len(row))]
        for step, row in zip(learnt, after, strict=True)
    ]
