"""A recipe checked as far as it can be without training: what it trains, on what, how long, in how much memory."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from peft import get_peft_model
from transformers import set_seed

from headtune.analysis.heads.head_set import ROLES, HeadSet
from headtune.analysis.models.generation import with_padding_token
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.reports.dissociation import next_step, verdict_of
from headtune.analysis.tasks.chat import as_chat
from headtune.analysis.tasks.task import scored
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.processes import world_size
from headtune.train.config import resolve_tasks
from headtune.train.config.methods import HeadsConfig
from headtune.train.config.schema import Recipe
from headtune.train.memory import model_shape
from headtune.train.methods.base import method_named
from headtune.train.trainer import training
from headtune.train.trainer.objectives import objective_of

from . import batch_preview, memory_of_recipe
from .deep_heads import slowed_by
from .memory_of_recipe import Stage
from .prepare import PreparedRun, prepare
from .run import require_free_folder


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Attributes:
        heads: in words; None where the method asks for none.
        parameters: trained, by kind of weight; empty where nothing is trained.
        model_parameters: of the whole model.
        examples: trained on and held out.
        tasks: they are of, and how their answers are scored, in words.
        batch: rows of a step; steps: of the whole run.
        longest: tokens of the longest row.
        stages: with their memory on this machine, in one process.
        rows: the first batch.
        prompt: the first training prompt as the model gets it, of chats; None for plain prompts.
        notes: what the run will find out, and what was taken in its place.
    """

    heads: str | None
    parameters: dict[str, int]
    model_parameters: int
    examples: tuple[int, int]
    tasks: str = ""
    batch: int = 0
    steps: int = 0
    longest: int = 0
    stages: Sequence[Stage] = ()
    rows: Sequence[batch_preview.PreviewRow] = ()
    notes: list[str] = field(default_factory=list)
    device: str = "cpu"
    prompt: str | None = None

    @property
    def free(self) -> int:
        """Bytes that are free now, of the GPU or of this machine."""
        if self.device == "cuda":
            return int(torch.cuda.mem_get_info()[0])
        return int(psutil.virtual_memory().available)

    def as_json(self, recipe: Recipe) -> dict[str, Any]:
        """Plain data; sizes in bytes."""
        data = {key: value for key, value in vars(self).items() if key not in ("stages", "rows", "examples")}
        data |= {"train_examples": self.examples[0], "held_out_examples": self.examples[1]}
        data["memory"] = {stage.name: {"peak": stage.memory.peak, **stage.memory.parts} for stage in self.stages}
        data["free_memory"] = self.free
        data["batch_rows"] = [asdict(row) for row in self.rows]
        result: dict[str, Any] = json.loads(json.dumps({"name": recipe.name, "output_dir": recipe.output_dir, **data}))
        return result


def dry_run(recipe: Recipe) -> DryRun:
    """Check a recipe, its data and its model, and look at the first batch. Nothing is trained, nothing is written.

    Raises:
        InputError: what a run would refuse before it starts; more than one process.
    """
    if world_size() > 1:
        raise InputError("--dry-run is for one process; headtune plan estimates several")
    require_free_folder(recipe.folder)
    ready = prepare(recipe)
    result = _look(recipe, ready)
    if ready.train.chat_template:
        first = replace(ready.train, examples=ready.train.examples[:1])
        result = replace(result, prompt=as_chat(first, ready.model.tokenizer).examples[0].prompt)
    return result


def _look(recipe: Recipe, ready: PreparedRun) -> DryRun:
    """All but the prompt."""
    heads = ready.model
    total = sum(p.numel() for p in heads.hf.parameters())
    notes = [] if ready.not_exported is None else [ready.not_exported]
    pairs: list[tuple[int, int]] = []
    words = None
    if recipe.heads is not None:
        pairs, words = _heads(recipe.heads, ready, notes)
        if ready.heads is not None and (slow := slowed_by(recipe, heads, pairs)) is not None:
            notes.append(slow)
    examples = (len(ready.train.examples), len(ready.held_out.examples))
    tasks = f"{resolve_tasks.in_words(recipe.task, ready.train, ready.held_out, ready.validation is not None)}, "
    tasks += scored(ready.held_out.kind, recipe.evaluation.n_items)
    family = method_named(recipe.recipe)
    if family.stops_after_heads(recipe.method):
        notes.append("method.select_only: the run ends when heads are chosen")
    if family.learns_sequence:
        return _in_order(recipe, ready, words, total, notes)
    if not family.trains:
        notes.append(f"recipe {recipe.recipe} trains nothing: what it adds is computed from the training prompts")
        return DryRun(words, {}, total, examples, tasks, notes=notes)
    return _trained(recipe, ready, pairs, words, total, tasks, notes)


def _trained(
    recipe: Recipe,
    ready: PreparedRun,
    pairs: list[tuple[int, int]],
    words: str | None,
    total: int,
    tasks: str,
    notes: list[str],
) -> DryRun:
    heads, method = ready.model, recipe.method
    with_padding_token(heads.hf, heads.tokenizer)
    limit = recipe.task.max_train_examples
    shown_recipe = recipe
    if method.objective == "answer_set" and method.answer_set.own_lists:
        share = f"{100 * method.answer_set.own_lists:.0f}%"
        notes.append(f"{share} of the prompts will be lists that the model writes itself; the batch shows the task's")
        block = method.answer_set.model_copy(update={"own_lists": 0.0})
        shown_recipe = recipe.model_copy(update={"method": method.model_copy(update={"answer_set": block})})
    data = objective_of(method).data(shown_recipe, heads, ready.train, ready.rows, lambda _line: None)
    if ready.validation is not None:
        data = data.evaluated_on(ready.validation)
        notes.append(f"{len(ready.validation.rows)} rows of {ready.validation.name} are evaluated during training")
    with tempfile.TemporaryDirectory() as folder:  # a trainer makes its output folder
        arguments = training.training_arguments(recipe, output_dir=folder)
        config: Any = method_named(recipe.recipe).peft_config(method, pairs, heads.hf)
        if config is None:
            heads.hf.requires_grad_(True)
        set_seed(recipe.seed)
        try:
            trainer = data.trainer(
                heads.hf,
                args=arguments,
                processing_class=heads.tokenizer,
                peft_config=config,
                **data.arguments,
            )
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"training: {str(error).splitlines()[0]}") from error
        batch = next(iter(trainer.get_train_dataloader()))
    longest, labels = _sizes(trainer.train_dataset)
    rows = batch_preview.rows_of(batch, heads.tokenizer)
    n_rows = data.n_rows
    if n_rows != len(ready.train.examples):
        notes.append(f"{n_rows} rows are made from the {len(ready.train.examples)} prompts of the task")
    at_once = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return DryRun(
        words,
        by_kind(trainer.model),
        total,
        (n_rows, len(ready.held_out.examples)),
        tasks,
        at_once,
        _steps(arguments, n_rows, at_once),
        longest,
        _stages(recipe, heads, arguments, longest, labels, min(limit or n_rows, n_rows)),
        rows,
        notes,
        _device(arguments),
    )


def _in_order(recipe: Recipe, ready: PreparedRun, words: str | None, total: int, notes: list[str]) -> DryRun:
    """A sequence of tasks: the batch shows the first task's rows in their order, which training shuffles."""
    heads = ready.model
    assert ready.sequence is not None
    tasks = ready.sequence.rows
    arguments = training.training_arguments(recipe)
    config = method_named(recipe.recipe).peft_config(recipe.method, [], heads.hf)
    model: Any = heads.hf.requires_grad_(True) if config is None else get_peft_model(heads.hf, config)
    at_once = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    steps = sum(_steps(arguments, len(rows), at_once) for rows in tasks)
    longest = max(row.length for rows in tasks for row in rows)
    labels = max(sum(label != -100 for label in row.labels) for rows in tasks for row in rows)
    notes.append(f"{len(tasks)} tasks in order: {', '.join(step.name for step in ready.sequence.steps)}")
    notes.append("the batch shows the first task's rows in the order of its file")
    shown = [
        batch_preview.PreviewRow(
            batch_preview.parts(row.input_ids, [label != -100 for label in row.labels], heads.tokenizer)
        )
        for row in tasks[0][: arguments.per_device_train_batch_size]
    ]
    examples = (sum(map(len, tasks)), sum(len(step.held_out.examples) for step in ready.sequence.steps))
    stages = _stages(recipe, heads, arguments, longest, labels, max(map(len, tasks)))
    task = scored(ready.held_out.kind, recipe.evaluation.n_items)
    return DryRun(
        words, by_kind(model), total, examples, task, at_once, steps, longest, stages, shown, notes, _device(arguments)
    )


def _heads(block: HeadsConfig, ready: PreparedRun, notes: list[str]) -> tuple[list[tuple[int, int]], str]:
    """The heads, or as many others where the run has yet to find them; and in words."""
    heads = ready.model
    if block.identify is None and not block.learnt:
        resolved = ready.heads
        assert resolved is not None
        notes += ready.notes
        if resolved.head_set is not None and not (block.random or block.control):
            notes += _not_dissociated(block, resolved.head_set)
        pairs = resolved.pairs
        names = [f"L{layer}H{head}" for layer, head in pairs]
        return pairs, f"{len(pairs)}: {' '.join(names[:16])}{' ...' if len(names) > 16 else ''}"
    how = "identify" if block.identify else block.first_stage
    pairs = memory_of_recipe.heads_of(block, model_shape.of_config(heads.hf.config, heads.name))
    notes.append(f"heads.{how} finds the heads when the run starts; parameters are counted for {len(pairs)} of them")
    return pairs, f"{'up to ' if block.role == 'both' else ''}{len(pairs)}, to be found by {how}"


def _not_dissociated(block: HeadsConfig, heads: HeadSet) -> list[str]:
    """One line where the head set's own check failed for a role that is trained, with what to do."""
    tested = heads.verification.get("dissociation") or {}
    roles = ROLES if block.role == "both" else (block.role,)
    failed = [role for role in roles if role in tested and not tested[role]["held"]]
    if not failed:
        return []
    stated = " and ".join(f"{role} {verdict_of(tested[role])}" for role in failed)
    message = f"the head set's own check: {stated}, and these heads are trained"
    return [f"{message}. {next_step(heads)}"]


def by_kind(model: Any) -> dict[str, int]:
    """Numbers of trained parameters: `o_proj.head_tuning_scale`, `q_proj.lora_A`, `up_proj`, largest first."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[_kind(name)] += parameter.numel()
    return dict(counts.most_common())


def _kind(name: str) -> str:
    words = [word for word in name.split(".") if not word.isdigit() and word not in ("default", "weight")]
    return ".".join(words[-2:] if re.match(r"bias$|lora_|head_", words[-1]) else words[-1:])


def _device(arguments: Any) -> str:
    return "cuda" if torch.cuda.is_available() and not arguments.use_cpu else "cpu"


def _steps(arguments: Any, rows: int, at_once: int) -> int:
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    return math.ceil(arguments.num_train_epochs * math.ceil(rows / at_once))


def _sizes(rows: Any) -> tuple[int, int]:
    """Tokens of the longest row, and the most of one row that carry loss."""
    longest = labels = 1
    for row in rows:
        if "chosen_ids" in row:
            answer = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
            longest, labels = max(longest, len(row["prompt_ids"]) + answer), max(labels, answer)
            continue
        longest = max(longest, len(row["input_ids"]))
        marked = row["labels"] if "labels" in row else row.get("completion_mask", row["input_ids"])
        learnt = sum(value != -100 if "labels" in row else bool(value) for value in marked)
        labels = max(labels, learnt)
    return longest, labels


def _stages(recipe: Recipe, model: HeadModel, arguments: Any, longest: int, labels: int, rows: int) -> list[Stage]:
    setup = memory_of_recipe.setup_of(recipe, "single", 1, longest, labels, _device(arguments))
    shape = model_shape.of_config(model.hf.config, model.name)
    return memory_of_recipe.stages(recipe, shape, setup, rows)
