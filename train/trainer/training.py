"""From a recipe's method to a model that carries its adapter: configuration, rows, trainer, penalties, prefix cache."""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PrinterCallback, TrainerState, set_seed

from headtune.analysis.models.generation import with_padding_token
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.task import Task
from headtune.analysis.utils.errors import InputError
from headtune.train import distributed
from headtune.train.config import during_training
from headtune.train.config.methods import PruneGates
from headtune.train.config.objective_registry import trl_config_of
from headtune.train.config.schema import Recipe
from headtune.train.losses.label_logits import labelled_positions
from headtune.train.methods.base import method_named
from headtune.train.tracking.tracker import Logs, trainer_callback
from headtune.train.tuners import head_pruning, weights_io
from headtune.train.types import Penalty

from . import attach_regularisers, best_checkpoint, checkpoints, penalised_trainers, signals
from .callbacks import Timer, progress_logger
from .objectives import EvaluationRows, TrainingData, objective_of
from .prefix_cache import PrefixCache, lowest_trained, refusal
from .run_context import RunContext

Pairs = Sequence[tuple[int, int]]


def training_arguments(recipe: Recipe, **changes: Any) -> Any:
    """TRL's configuration of a recipe's training.

    Raises:
        InputError: what only transformers can judge (a schedule, a precision).
    """
    import trl

    method = recipe.method
    kind = getattr(trl, trl_config_of(getattr(method, "objective", "sft")))
    on_gpu = torch.cuda.is_available() and not recipe.training.get("use_cpu", False)
    defaults: dict[str, Any] = {
        "bf16": recipe.model.dtype == "bfloat16",
        "fp16": False,
        "gradient_checkpointing": False,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "per_device_train_batch_size": 16,
        "logging_steps": 5,
        "save_strategy": "steps",
        "save_steps": 50,
        "save_total_limit": 2,
        "logging_nan_inf_filter": False,
        "ddp_find_unused_parameters": False,
        "ddp_timeout": 24 * 3600,  # the others wait while rank 0 measures, or chooses heads
        "disable_tqdm": True,  # told through `notify`
        **({"beta": 0.5} if kind is trl.DPOConfig else {}),
        **during_training.defaults(recipe.training, getattr(method, "objective", "sft")),
    }
    keys, _ = during_training.split_keys(recipe.training)
    fixed: dict[str, Any] = {
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        "run_name": recipe.name,
        "report_to": "none",  # our tracker sends the logs
        "remove_unused_columns": False,
        "max_length": None,  # never a silent truncation
    }
    try:
        return kind(**(defaults | keys | fixed | changes))
    except ValueError as error:
        raise InputError(f"training: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class TrainingResult:
    """What a training leaves.

    Attributes:
        model: a PeftModel, or the whole model after full fine-tuning; in eval mode.
        record: what run.json says: `training_data`, `training`, `parameters`, `pruned`.
    """

    model: Any
    record: dict[str, Any]


def train_adapter(
    context: RunContext,
    config: PeftConfig | None,
    data: TrainingData,
    arguments: Any,
    *,
    logs: Logs | None,
    penalty: Penalty | None = None,
    resume: bool = False,
    regularised: Callable[[Any], contextlib.AbstractContextManager[Any]] | None = None,
    everywhere: bool = False,
    start: Callable[[Any], None] | None = None,
) -> Any:
    """Train `model.hf` with an adapter of this configuration (None: the whole model); returns the finished trainer.

    Args:
        logs: takes the trainer's metrics.
        regularised: a block around the training, given the trainer (see `attach_regularisers.with_regularisers`).
        start: changes the adapter's first values (see `TuningMethod.set_start`).
        everywhere: every process needs the trained model; otherwise rank 0 (see `distributed.gather_full_model`).

    Raises:
        InputError: keys that contradict each other or the data, or a launch that is not what was asked for.
        CheckError: the loss is no number any more.
    """
    recipe, model, notify = context.recipe, context.model, context.notify
    method: Any = recipe.method
    timer, marking = Timer(), checkpoints.Mark(arguments)
    best = best_checkpoint.BestCheckpoint(arguments) if data.evaluated else None
    evaluations = best_checkpoint.callbacks(recipe, notify) if data.evaluated else []
    extra: dict[str, Any] = {}
    if config is None:
        model.hf.requires_grad_(True)
        if objective_of(method).trl_config == "DPOConfig":
            extra["ref_model"] = copy.deepcopy(model.hf).requires_grad_(False)
    # The trainer puts the adapter on the model. Whatever was drawn before, it starts from the seed alone.
    set_seed(recipe.seed)
    try:
        trainer = data.trainer(
            model.hf,
            args=arguments,
            processing_class=model.tokenizer,
            callbacks=[
                *([trainer_callback(logs)] if logs else []),
                *(progress_logger(notify), timer, marking),
                *evaluations,
            ],
            peft_config=config,
            **data.arguments,
            **extra,
        )
    except InputError:
        raise
    except ValueError as error:  # such as packing with answer_set
        raise InputError(f"training: {str(error).splitlines()[0]}") from error
    if start is not None:
        start(trainer.model)
    trainer.penalty = penalty
    trainer.rates = method_named(recipe.recipe).learning_rates(method)
    # What the launch and the recipe do not allow together.
    distributed.require_launch(trainer.accelerator)
    distributed.require_full_state(trainer.accelerator)
    if any(not isinstance(term, PruneGates) for term in method.regularisers):
        attach_regularisers.require_visible_pass(trainer.args)
    trainer.remove_callback(PrinterCallback)
    # Train, with what the loss reads of the model while it runs.
    checkpoint = checkpoints.newest(Path(arguments.output_dir), notify) if resume else None
    cache = _prefix_cache(context, trainer)
    prunes = any(isinstance(term, PruneGates) for term in method.regularisers)
    split = distributed.partitioned(trainer.accelerator)
    empty = distributed.meta_copy(trainer.model) if split else None
    with contextlib.ExitStack() as during:
        if regularised is not None:
            during.enter_context(regularised(trainer))
        if cache is not None:
            during.enter_context(cache.installed())
        if data.trainer is penalised_trainers.SFT:
            during.enter_context(labelled_positions(trainer.model))
        run_trainer(trainer, checkpoint)
    # An engine that split the model over processes puts it together again.
    if empty is not None:
        gated = head_pruning.whole_state(trainer.model) if prunes else None  # `empty` is of the model without gates
        model.hf = distributed.base_of(distributed.gather_full_model(trainer, empty, everywhere or prunes))
        if gated is not None:
            head_pruning.attach_state(trainer.model, gated)
        model.__dict__.pop("layers", None)  # of the model that was split
    if best is not None:
        trainer.best = best.put_back(trainer, notify)
    trainer.timing = timer.summary() | ({} if cache is None else {"prefix_cache": cache.stats.summary()})
    return trainer


def run_trainer(trainer: Any, checkpoint: Path | None) -> None:
    """Train, from a checkpoint or from the start; of one of the last step only what it holds is taken.

    Under every engine the weights are whole both in a checkpoint and in a model that has not been trained yet.
    """
    if checkpoint is None or not (checkpoints.finished(checkpoint) or best_checkpoint.stopped_early(checkpoint)):
        with signals.between_steps(trainer):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return
    weights_io.restore(trainer.model, checkpoint)  # train() would take one step more
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if any(isinstance(callback, head_pruning.GatesInCheckpoints) for callback in trainer.callback_handler.callbacks):
        head_pruning.restore_checkpoint(head_pruning.gates_of(trainer.model), checkpoint)


def _prefix_cache(context: RunContext, trainer: Any) -> PrefixCache | None:
    method: Any = context.recipe.method
    if not method.prefix_cache or method.regularisers:  # which look at what layers below put out, too
        return None
    trained = trainer.model
    reason = refusal(trained, trainer)
    if reason is not None:
        if method_named(context.recipe.recipe).needs_heads(method):  # of the others nobody expects it
            context.notify(f"prefix cache off: {reason}")
        return None
    context.notify(f"prefix cache: layers 0-{lowest_trained(trained) - 1} run once per example")
    return PrefixCache(trained, method.prefix_memory_gb, _cache_folder(context))


def _cache_folder(context: RunContext) -> Path:
    return context.folder / "prefix-cache"


def train(
    context: RunContext, pairs: Pairs, task: Task, rows: Any, validation: EvaluationRows | None = None
) -> TrainingResult:
    """Train a recipe's method on these heads.

    Args:
        rows: what the objective prepared (`TrainingObjective.prepare`).
        validation: what is evaluated during training; None where nothing is.
    """
    recipe, model, notify = context.recipe, context.model, context.notify
    method: Any = recipe.method
    tuning = method_named(recipe.recipe)
    set_pad_token(model)
    config = tuning.peft_config(method, pairs, model.hf)
    data = objective_of(method).data(recipe, model, task, rows, notify)
    gates: head_pruning.HeadGates | None = None

    @contextlib.contextmanager
    def regularised(trainer: Any) -> Iterator[None]:
        nonlocal gates
        with attach_regularisers.with_regularisers(recipe, model, pairs, task, trainer, notify) as gates:
            yield

    if validation is not None:
        data = data.evaluated_on(validation)
        n_rows = len(validation.rows)
        notify(f"evaluating during training on {n_rows} rows of {validation.name}, which are not held out")
    of_task = "" if data.n_rows == len(task.examples) else f", from {len(task.examples)} of the task"
    notify(f"training on {data.n_rows} {'pairs' if method.objective == 'dpo' else 'prompts'}{of_task}")
    trainer = train_adapter(
        context,
        config,
        data,
        training_arguments(recipe),
        logs=context.tracker,
        penalty=tuning.penalty(method),
        resume=context.resume,
        regularised=regularised,
        start=lambda adapted: tuning.set_start(method, model, adapted),
    )
    shutil.rmtree(_cache_folder(context), ignore_errors=True)  # of use to a broken run only
    context.tracker.log({"train/steps": trainer.state.global_step})
    trained = unwrapped(trainer).eval()
    record: dict[str, Any] = {
        "training_data": data.summary,
        "training": {"steps": trainer.state.global_step, **trainer.timing, **getattr(trainer, "best", {})},
        "parameters": sum(p.numel() for p in trained.parameters() if p.requires_grad),
    }
    if gates is not None:
        gates = head_pruning.gates_of(trained)  # as trained: an engine may have put the model together anew
        record["pruned"] = head_pruning.summary(gates)
        notify(f"{record['pruned']['closed']} of {record['pruned']['gated']} heads are closed")
        if isinstance(trained, PeftModel):
            trained = trained.merge_and_unload()
        head_pruning.fold(trained, gates)
        model.hf = trained
    return TrainingResult(trained, record)


def set_pad_token(model: HeadModel) -> None:
    """Let the end of text pad rows where the tokenizer has no token for that, or one that the model lacks."""
    with_padding_token(model.hf, model.tokenizer)


def unwrapped(trainer: Any) -> Any:
    """A trainer's model without what mixed precision wraps around its forward pass: the base was measured without.

    accelerate's own undoing takes off the decorators of transformers as well when a model was prepared twice.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if model.__dict__.pop("_original_forward", None) is not None:
        model.__dict__.pop("forward", None)
        model.__dict__.pop("_is_accelerate_prepared", None)
    return model
