"""From a recipe's method to a model that carries its adapter: configuration, rows, trainer, penalties, prefix cache."""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainerState, set_seed

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import encode
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.progress import Notify
from headtune.train import distributed
from headtune.train.config.methods import PruneGates
from headtune.train.config.schema import Recipe
from headtune.train.losses.label_logits import labelled_positions
from headtune.train.methods.base import method_of
from headtune.train.tracking.tracker import Logs, Tracker, trainer_callback
from headtune.train.tuners import head_pruning, weights_io
from headtune.train.types import Penalty

from . import (
    answer_set_trainer,
    attach_regularisers,
    checkpoints,
    on_policy_lists,
    penalised_trainers,
    signals,
    training_rows,
)
from .prefix_cache import PrefixCache, lowest_trained, refusal

Pairs = Sequence[tuple[int, int]]


def training_arguments(recipe: Recipe, **changes: Any) -> Any:
    """TRL's configuration of a recipe's training.

    Raises:
        InputError: what only transformers can judge (a schedule, a precision).
    """
    import trl

    method = recipe.method
    kind = trl.DPOConfig if getattr(method, "objective", "sft") == "dpo" else trl.SFTConfig
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
    }
    own: dict[str, Any] = {
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        "run_name": recipe.name,
        "report_to": "none",  # our tracker sends the logs
        "remove_unused_columns": False,
        "max_length": None,  # never a silent truncation
    }
    try:
        return kind(**(defaults | recipe.training | own | changes))
    except ValueError as error:
        raise InputError(f"training: {str(error).splitlines()[0]}") from error


@dataclass
class Material:
    """What a trainer trains on: its class, the keyword arguments of the objective, how many rows."""

    kind: Any
    arguments: dict[str, Any]
    n_rows: int


def text_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, train: Task) -> datasets.Dataset:
    """The rows of TRL's own objectives: text, which it tokenises and ends, or, of lists, tokens without an end."""
    method: Any = recipe.method
    part = train.limited(recipe.task.max_train_examples, recipe.seed)
    if method.objective == "dpo":
        return training_rows.dpo_rows(part, method.dpo.pairs)
    rows = training_rows.sft_rows(part, recipe.seed)
    if part.kind != "lists":
        return rows
    return training_rows.open_rows(rows, tokenizer, whole=recipe.training.get("completion_only_loss") is False)


def material(recipe: Recipe, model: HeadModel, train: Task, state: dict[str, Any], notify: Notify) -> Material:
    """The rows of a recipe's objective; notes what they are in `state["training_data"]`."""
    method: Any = recipe.method
    tokenizer = model.tokenizer
    limit = recipe.task.max_train_examples
    if method.objective == "answer_set":
        notify("writing the model's own lists" if method.answer_set.own_lists else "preparing prompts")
        task = on_policy_lists.answer_set_task(
            model.hf,
            tokenizer,
            train,
            method.answer_set,
            limit or len(train.examples),
            recipe.seed,
            recipe.evaluation.batch_size,
            model.weights_sha256,
        )
        encoded = encode(task, tokenizer, model.positions)
        state["training_data"] = encoded.summary()
        rows = training_rows.answer_set_rows(encoded)
        collator = answer_set_trainer.AnswerSetCollator(tokenizer.pad_token_id)
        own = {"train_dataset": rows, "data_collator": collator, "block": method.answer_set}
        return Material(answer_set_trainer.AnswerSetTrainer, own, len(rows))
    rows, part = text_rows(recipe, tokenizer, train), train.limited(limit, recipe.seed)
    state["training_data"] = {"name": part.name, "sha256": part.sha256, "n_examples": len(part.examples)}
    kind = penalised_trainers.SFT if method.objective == "sft" else penalised_trainers.DPO
    return Material(kind, {"train_dataset": rows}, len(rows))


def train_with(
    recipe: Recipe,
    model: HeadModel,
    config: PeftConfig | None,
    data: Material,
    arguments: Any,
    tracker: Logs | None,
    penalty: Penalty | None,
    resume: bool,
    notify: Notify,
    held: Callable[[Any], contextlib.AbstractContextManager[Any]] | None = None,
    everywhere: bool = False,
) -> Any:
    """Train `model.hf` with an adapter of this configuration (None: the whole model); returns the finished trainer.

    Args:
        held: a block around the training, given the trainer (see `attach_regularisers`).
        everywhere: every process needs the trained model; otherwise rank 0 (see `distributed.gather_full_model`).

    Raises:
        InputError: keys that contradict each other or the data, or a launch that is not what was asked for.
        CheckError: the loss is no number any more.
    """
    method: Any = recipe.method
    timer, marking = Timer(), checkpoints.Mark(arguments)
    extra: dict[str, Any] = {}
    if config is None:
        model.hf.requires_grad_(True)
        if method.objective == "dpo":
            extra["ref_model"] = copy.deepcopy(model.hf).requires_grad_(False)
    set_seed(recipe.seed)  # whatever was drawn before, an adapter starts from the seed alone
    try:
        trainer = data.kind(
            model.hf,
            args=arguments,
            processing_class=model.tokenizer,
            callbacks=[*([trainer_callback(tracker)] if tracker else []), told(notify), timer, marking],
            peft_config=config,
            **data.arguments,
            **extra,
        )
    except InputError:
        raise
    except ValueError as error:  # such as packing with answer_set
        raise InputError(f"training: {str(error).splitlines()[0]}") from error
    trainer.penalty = penalty
    trainer.rates = method_of(recipe).learning_rates(method)
    distributed.require_launch(trainer.accelerator)
    distributed.require_full_state(trainer.accelerator)
    if any(not isinstance(term, PruneGates) for term in method.regularisers):
        _require_visible_pass(trainer.args)
    trainer.remove_callback(PrinterCallback)
    checkpoint = checkpoints.newest(Path(arguments.output_dir), notify) if resume else None
    cache = _prefix_cache(recipe, model, trainer, notify)
    prunes = any(isinstance(term, PruneGates) for term in method.regularisers)
    split = distributed.partitioned(trainer.accelerator)
    empty = distributed.meta_copy(trainer.model) if split else None
    with contextlib.ExitStack() as during:
        if held is not None:
            during.enter_context(held(trainer))
        if cache is not None:
            during.enter_context(cache.installed())
        if method.objective == "sft":
            during.enter_context(labelled_positions(trainer.model))
        carry_out(trainer, checkpoint)
    if empty is not None:
        gated = head_pruning.whole_state(trainer.model) if prunes else None  # `empty` is of the model without gates
        model.hf = distributed.base_of(distributed.gather_full_model(trainer, empty, everywhere or prunes))
        if gated is not None:
            head_pruning.attach_state(trainer.model, gated)
        model.__dict__.pop("layers", None)  # of the model that was split
    trainer.timing = timer.summary() | ({} if cache is None else {"prefix_cache": cache.stats.summary()})
    return trainer


def carry_out(trainer: Any, checkpoint: Path | None) -> None:
    """Train, from a checkpoint or from the start; of one of the last step only what it holds is taken.

    Under every engine the weights are whole both in a checkpoint and in a model that has not been trained yet.
    """
    if checkpoint is None or not checkpoints.finished(checkpoint):
        with signals.between_steps(trainer):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return
    weights_io.restore(trainer.model, checkpoint)  # train() would take one step more
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if any(isinstance(callback, head_pruning.GatesInCheckpoints) for callback in trainer.callback_handler.callbacks):
        head_pruning.restore_checkpoint(head_pruning.gates_of(trainer.model), checkpoint)


def _require_visible_pass(args: Any) -> None:
    """Refuse checkpointing that hides from penalties what a training pass computed.

    Raises:
        InputError: re-entrant checkpointing, which adapters under ZeRO-3 are given by TRL.
    """
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise InputError(
            "method.regularisers read the training pass, which re-entrant checkpointing hides (adapters under ZeRO-3 "
            "have no other); set training.gradient_checkpointing to false, or launch with ZeRO-2 or FSDP2"
        )


def _prefix_cache(recipe: Recipe, model: HeadModel, trainer: Any, notify: Notify) -> PrefixCache | None:
    method: Any = recipe.method
    if not method.prefix_cache or method.regularisers:  # which look at what layers below put out, too
        return None
    trained = trainer.model
    reason = refusal(trained, trainer)
    if reason is not None:
        if method_of(recipe).needs_heads(method):  # of the others nobody expects it
            notify(f"prefix cache off: {reason}")
        return None
    notify(f"prefix cache: layers 0-{lowest_trained(trained) - 1} run once per example")
    return PrefixCache(trained, method.prefix_memory_gb, _cache_folder(recipe))


def _cache_folder(recipe: Recipe) -> Path:
    return recipe.folder / "prefix-cache"


def fit(
    recipe: Recipe,
    model: HeadModel,
    pairs: Pairs,
    train: Task,
    tracker: Tracker,
    state: dict[str, Any],
    resume: bool,
    notify: Notify,
) -> Any:
    """The model after a recipe's training: a PeftModel, or the whole model for full fine-tuning; in eval mode.

    Writes into `state` what it trained on, how long a step took, and what the prefix cache did.
    """
    method: Any = recipe.method
    family = method_of(recipe)
    config = family.peft_config(method, pairs, model.hf)
    data = material(recipe, model, train, state, notify)
    penalty = family.penalty(method)
    gates: head_pruning.HeadGates | None = None

    @contextlib.contextmanager
    def held(trainer: Any) -> Iterator[None]:
        nonlocal gates
        with attach_regularisers.with_regularisers(recipe, model, pairs, train, trainer, notify) as gates:
            yield

    notify(f"training on {data.n_rows} {'pairs' if method.objective == 'dpo' else 'prompts'}")
    arguments = training_arguments(recipe)
    trainer = train_with(recipe, model, config, data, arguments, tracker, penalty, resume, notify, held)
    shutil.rmtree(_cache_folder(recipe), ignore_errors=True)  # of use to a broken run only
    tracker.log({"train/steps": trainer.state.global_step})
    state["training"] = {"steps": trainer.state.global_step, **trainer.timing}
    trained = unwrapped(trainer).eval()
    state["parameters"] = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    if gates is not None:
        gates = head_pruning.gates_of(trained)  # as trained: an engine may have put the model together anew
        state["pruned"] = head_pruning.summary(gates)
        notify(f"{state['pruned']['closed']} of {state['pruned']['gated']} heads are closed")
        if isinstance(trained, PeftModel):
            trained = trained.merge_and_unload()
        head_pruning.fold(trained, gates)
        model.hf = trained
    return trained


class Timer(TrainerCallback):
    """Seconds of every optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)

    def summary(self) -> dict[str, float]:
        if not self.seconds:
            return {}
        return {"seconds_per_step": statistics.median(self.seconds), "seconds": sum(self.seconds)}


def told(notify: Notify) -> TrainerCallback:
    """Tells how the training goes, at every logging step, and stops it where the loss is no number any more."""

    class Told(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                # In fp16 a gradient beyond the numbers is skipped by the scaler, and no sign of anything.
                for what, key in (("loss", "loss"), *(() if args.fp16 else (("norm of the gradient", "grad_norm"),))):
                    if not math.isfinite(float(logs.get(key, 0.0))):
                        raise CheckError(
                            f"the {what} is {logs[key]} at step {state.global_step}; lower training.learning_rate "
                            f"(it was {logs.get('learning_rate')})"
                        )
                parts = [f"{name} {float(value):.4g}" for name, value in logs.items() if name not in _UNTOLD]
                notify(f"step {state.global_step}/{state.max_steps}: " + ", ".join(parts))

    return Told()


_UNTOLD = {"epoch", "grad_norm", "learning_rate", "num_tokens", "entropy", "mean_token_accuracy"}
_UNTOLD |= {f"{part}/{which}" for part in ("logps", "logits") for which in ("chosen", "rejected")}


def unwrapped(trainer: Any) -> Any:
    """A trainer's model without what mixed precision wraps around its forward pass: the base was measured without.

    accelerate's own undoing takes off the decorators of transformers as well when a model was prepared twice.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if model.__dict__.pop("_original_forward", None) is not None:
        model.__dict__.pop("forward", None)
        model.__dict__.pop("_is_accelerate_prepared", None)
    return model
