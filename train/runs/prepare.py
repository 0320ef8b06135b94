"""A recipe checked against its model and data, before anything is written; what the checks build, the run uses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headtune.analysis.methods.in_context import few_shot_prompts
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import load_model
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import encode
from headtune.analysis.utils.errors import InputError
from headtune.train.config.during_training import evaluates
from headtune.train.config.resolve_heads import ResolvedHeads, resolve_heads
from headtune.train.config.resolve_tasks import tasks_of, validation_of
from headtune.train.config.schema import Recipe
from headtune.train.continual import sequence
from headtune.train.evaluation.evaluate import check_generation_length
from headtune.train.evaluation.evaluation_file import evaluation_identity, read_before
from headtune.train.evaluation.multiple_choice import require_choices
from headtune.train.methods.base import method_named
from headtune.train.tracking.other_trackers import require_installed
from headtune.train.trainer import attach_regularisers, training
from headtune.train.trainer.objectives import EvaluationRows, no_first_tokens, objective_of
from headtune.train.tuners.convert import why_not_stock


@dataclass(frozen=True)
class PreparedRun:
    """A recipe's model and data, checked against each other.

    Attributes:
        train, held_out: the tasks; of a sequence, the first one's.
        identity: what the measurement before training is of.
        rows: what the objective prepared; None where the method does not train.
        validation: what is evaluated during training; None where nothing is.
        heads: those that are known before the run; None where it has to find them, or names none.
        notes: what was to be told about the heads.
        not_exported: why no stock checkpoint can be made of the run; None where one can.
        sequence: the tasks, where they are learnt in order.
    """

    model: HeadModel
    train: Task
    held_out: Task
    identity: dict[str, Any] = field(default_factory=dict)
    rows: Any = None
    heads: ResolvedHeads | None = None
    notes: list[str] = field(default_factory=list)
    sequence: sequence.PreparedSequence | None = None
    not_exported: str | None = None
    validation: EvaluationRows | None = None


def prepare(recipe: Recipe) -> PreparedRun:
    """Load what a recipe names, and refuse what does not fit together; nothing is written.

    Raises:
        InputError: the task, the model, the tokenizer, the heads or the training arguments do not go together.
    """
    require_installed(recipe.tracking.report_to)
    method = method_named(recipe.recipe)
    steps = sequence.steps_of(recipe.task) if method.learns_sequence else []
    train, held_out = (steps[0].train, steps[0].held_out) if steps else tasks_of(recipe.task)
    block = recipe.model
    model = load_model(block.name, block.dtype, None, block.revision, block.trust_remote_code)
    if method.learns_sequence:
        in_order = sequence.prepare(recipe, model, steps)
        prepared = PreparedRun(model, train, held_out, heads=in_order.heads, sequence=in_order)
    else:
        prepared = _prepare_single(recipe, model, train, held_out)
    attach_regularisers.require_usable(recipe, model, train)
    return replace(prepared, not_exported=_why_not_exported(recipe, model))


def _why_not_exported(recipe: Recipe, model: HeadModel) -> str | None:
    method = method_named(recipe.recipe)
    if method.stops_after_heads(recipe.method):
        return None
    reason = why_not_stock(model.hf, method.carries_offsets(recipe.method), range(model.n_layers))
    return None if reason is None else f"headtune export will not write a checkpoint of this run: {reason}"


def _prepare_single(recipe: Recipe, model: HeadModel, train: Task, held_out: Task) -> PreparedRun:
    block, method = recipe.heads, method_named(recipe.recipe)
    rows = heads = validation = None
    notes: list[str] = []
    if method.trains:
        rows = objective_of(recipe.method).prepare(recipe, model, train)
        if evaluates(recipe.training):
            aside = validation_of(recipe.task, train, held_out)
            evaluated = objective_of(recipe.method).evaluation_rows(recipe, model, aside)
            validation = EvaluationRows(aside.name, aside.sha256, evaluated)
    if block is not None and block.identify is not None:
        if train.kind == "multiple_choice":
            raise InputError(no_first_tokens(train))
        encode(train, model.tokenizer, model.positions, model.vocabulary)
    require_choices(held_out)
    check_generation_length(model.hf, model.tokenizer, held_out, recipe.evaluation.n_items)
    if block is not None and block.identify is None and not block.learnt:
        heads = resolve_heads(block, model, train, notify=notes.append)
    if method.trains:
        # Not kept: while a ZeRO-3 configuration lives, a generation waits for all ranks, and rank 0 measures alone.
        training.training_arguments(recipe)
    method.require_usable(recipe, model, train, None if heads is None else heads.pairs)
    if block is not None and block.in_context is not None:
        few_shot_prompts(model, train, block.in_context.shots, 1)
    identity = evaluation_identity(recipe.evaluation, model, held_out)
    if recipe.evaluation.before is not None:
        read_before(Path(recipe.evaluation.before), identity)
    return PreparedRun(model, train, held_out, identity, rows, heads, notes, validation=validation)
