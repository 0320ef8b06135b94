"""What a training minimises: an objective's rows, and the trainer that computes its loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.answer_starts import beginnings
from headtune.analysis.tasks.chat import as_chat, turn_end
from headtune.analysis.tasks.messages import chat_entry
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import encode
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.progress import Notify
from headtune.train.config.objective_registry import ObjectiveRules, objective_rules, register_objective
from headtune.train.config.schema import Recipe

from . import answer_set_trainer, on_policy_lists, penalised_trainers, training_rows


@dataclass(frozen=True)
class EvaluationRows:
    """What is evaluated during training: the rows of a task, as the trainer takes them, and what they are."""

    name: str
    sha256: str
    rows: Any


@dataclass(frozen=True)
class TrainingData:
    """What a trainer trains on.

    Attributes:
        trainer: its class, a subclass of `penalised_trainers.SFT`, `DPO` or `AnswerSetTrainer`.
        arguments: what it takes besides the model, such as `train_dataset`.
        n_rows: of the training data.
        summary: JSON-able, what the data are; run.json holds it as `training_data`.
    """

    trainer: Any
    arguments: dict[str, Any]
    n_rows: int
    summary: dict[str, Any]

    @property
    def evaluated(self) -> bool:
        """Whether something is evaluated during training."""
        return "eval_dataset" in self.arguments

    def evaluated_on(self, validation: EvaluationRows) -> TrainingData:
        """The same, with rows to evaluate during training."""
        entry = {"name": validation.name, "sha256": validation.sha256, "n_rows": len(validation.rows)}
        return replace(
            self,
            arguments=self.arguments | {"eval_dataset": validation.rows},
            summary=self.summary | {"validation": entry},
        )


class TrainingObjective(ObjectiveRules):
    """An objective: cross-entropy on the rows' answers, unless a subclass has another `trainer` or other rows."""

    trainer: Any = penalised_trainers.SFT

    def rows(self, recipe: Recipe, task: Task, tokenizer: Any) -> Any:
        """The training rows, a Dataset of tokens: answers end with the end of the text (of chats: of the assistant's
        turn), the items of lists do not."""
        whole = recipe.training.get("completion_only_loss") is False
        if task.chat_template:
            return training_rows.chat_rows(task, tokenizer, recipe.seed, whole)
        rows = training_rows.sft_rows(task, recipe.seed)
        end = "" if task.kind == "lists" else _end_of_text(recipe, tokenizer)
        return training_rows.open_rows(rows, tokenizer, whole, end=end)

    def prepare(self, recipe: Recipe, model: HeadModel, train: Task) -> Any:
        """The rows, checked before the run begins and taken up by `data` when it trains.

        Raises:
            InputError: the task is not what the objective can learn from, or a row is longer than the model's context.
        """
        part = train.limited(recipe.task.max_train_examples, recipe.seed)
        rows = self.rows(recipe, part, model.tokenizer)
        training_rows.check_row_length(train.name, rows, model.tokenizer, model.positions, model.vocabulary)
        return rows

    def evaluation_rows(self, recipe: Recipe, model: HeadModel, task: Task) -> Any:
        """The rows, a Dataset, that the trainer evaluates during training.

        Raises:
            InputError: as `prepare`, or an objective with data of its own and no rows of its own here.
        """
        if type(self).data is not TrainingObjective.data:
            raise InputError(
                f"objective {self.name!r} has no evaluation_rows, so nothing can be evaluated during training; "
                "set training.eval_strategy=no"
            )
        rows = self.rows(recipe, task, model.tokenizer)
        training_rows.check_row_length(task.name, rows, model.tokenizer, model.positions)
        return rows

    def data(self, recipe: Recipe, model: HeadModel, train: Task, rows: Any, notify: Notify) -> TrainingData:
        """What is trained on."""
        part = train.limited(recipe.task.max_train_examples, recipe.seed)
        summary = {"name": part.name, "sha256": part.sha256, "n_examples": len(part.examples)}
        summary |= chat_entry(part.chat_template)
        return TrainingData(self.trainer, {"train_dataset": rows}, len(rows), summary)


@register_objective
class Sft(TrainingObjective):
    """Cross-entropy on an answer."""

    name = "sft"


@register_objective
class Dpo(TrainingObjective):
    """Preference of right over wrong answers."""

    name, trl_config, trainer = "dpo", "DPOConfig", penalised_trainers.DPO

    def rows(self, recipe: Recipe, task: Task, tokenizer: Any) -> Any:
        method: Any = recipe.method
        if task.chat_template:
            rows = training_rows.dpo_rows(as_chat(task, tokenizer), method.dpo.pairs)
            return training_rows.dpo_tokens(rows, tokenizer, special=False, end=turn_end(task, tokenizer))
        rows = training_rows.dpo_rows(task, method.dpo.pairs)
        return training_rows.dpo_tokens(rows, tokenizer, end=_end_of_text(recipe, tokenizer))


@register_objective
class AnswerSet(TrainingObjective):
    """Any answer that is not given yet (see `headtune.train.losses.answer_set`)."""

    name, trainer = "answer_set", answer_set_trainer.AnswerSetTrainer

    def prepare(self, recipe: Recipe, model: HeadModel, train: Task) -> None:
        if train.kind == "multiple_choice":
            raise InputError(no_first_tokens(train))
        encode(train, model.tokenizer, model.positions, model.vocabulary)

    def evaluation_rows(self, recipe: Recipe, model: HeadModel, task: Task) -> Any:
        """The task's prompts as they are: none of the model's own lists."""
        return training_rows.answer_set_rows(encode(task, model.tokenizer, model.positions))

    def data(self, recipe: Recipe, model: HeadModel, train: Task, rows: Any, notify: Notify) -> TrainingData:
        method: Any = recipe.method
        notify("writing the model's own lists" if method.answer_set.own_lists else "preparing prompts")
        task = on_policy_lists.answer_set_task(
            model.hf,
            model.tokenizer,
            train,
            method.answer_set,
            recipe.task.max_train_examples or len(train.examples),
            recipe.seed,
            recipe.evaluation.batch_size,
            model.weights_sha256,
        )
        encoded = encode(task, model.tokenizer, model.positions, model.vocabulary)
        if note := beginnings(encoded.summary()):
            notify(note)
        rows = training_rows.answer_set_rows(encoded)
        collator = answer_set_trainer.AnswerSetCollator(model.tokenizer.pad_token_id)
        arguments = {"train_dataset": rows, "data_collator": collator, "block": method.answer_set}
        return TrainingData(self.trainer, arguments, len(rows), encoded.summary())


def _end_of_text(recipe: Recipe, tokenizer: Any) -> str:
    """What TRL would put behind a text."""
    return str(recipe.training.get("eos_token") or tokenizer.eos_token or "")


def no_first_tokens(task: Task) -> str:
    """Why a multiple-choice task is refused where answers' first tokens count."""
    return (
        f"task {task.name!r} is multiple choice, whose answers are no first tokens; set method.objective "
        "to sft or dpo, and choose heads on another task (heads.from)"
    )


def objective_of(method: Any) -> TrainingObjective:
    """The objective of a recipe's `method`."""
    objective = objective_rules(method.objective)
    if not isinstance(objective, TrainingObjective):
        raise InputError(f"objective {method.objective!r} is no subclass of headtune.train.trainer.objectives")
    return objective
