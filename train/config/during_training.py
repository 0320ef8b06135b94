"""Evaluation during training, in a recipe: which keys of `training` it takes, what they need, which metrics there are.

    training: {eval_strategy: steps, eval_steps: 20, load_best_model_at_end: true, early_stopping_patience: 3}

The rows are those of the validation part (see `resolve_tasks.validation_of`), never those held out. Early stopping has
two keys of its own, which transformers takes as arguments of its `EarlyStoppingCallback`; the others are TRL's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from headtune.analysis.utils.errors import nearest

from .errors import Problem
from .method_registry import method_rules
from .regularisers import PruneGates

if TYPE_CHECKING:
    from .schema import Recipe

PATIENCE, THRESHOLD = "early_stopping_patience", "early_stopping_threshold"
# What the trainer of an objective measures on validation rows, and whether more of it is better. The answer set's two
# terms are losses.
METRICS: dict[str, dict[str, bool]] = {
    "sft": {"loss": False, "mean_token_accuracy": True},
    "dpo": {"loss": False, "rewards/accuracies": True, "rewards/margins": True},
    "answer_set": {"loss": False, "recall": False, "suppression": False},
}
_READERS = ("load_best_model_at_end", "save_strategy: best", "a scheduler that reads it")
_NEEDING = (
    *("eval_steps", "eval_delay", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *(PATIENCE, THRESHOLD),
)
_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")  # of transformers, that read the metric


def evaluates(training: Mapping[str, Any]) -> bool:
    """Whether `training` asks for evaluation during it."""
    return training.get("eval_strategy") in ("steps", "epoch")


def metrics_of(objective: Any) -> dict[str, bool]:
    """The metrics of an objective that can choose a checkpoint, and whether more is better."""
    return METRICS.get(str(objective), {"loss": False})


def split_keys(training: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of `training` is TRL's, and what is early stopping's."""
    ours = {key: value for key, value in training.items() if key in (PATIENCE, THRESHOLD)}
    return {key: value for key, value in training.items() if key not in ours}, ours


def defaults(training: Mapping[str, Any], objective: str) -> dict[str, Any]:
    """What keys are where they are left out: checkpoints at the evaluations, the loss, and which way is better."""
    if not evaluates(training):
        return {}
    result: dict[str, Any] = {"eval_steps": 50} if training["eval_strategy"] == "steps" else {}
    if "per_device_train_batch_size" in training:
        result["per_device_eval_batch_size"] = training["per_device_train_batch_size"]
    if training.get("load_best_model_at_end"):  # a checkpoint is best at the step that it was measured at
        result["save_strategy"] = training["eval_strategy"]
        result["save_steps"] = training.get("eval_steps", 50)
    if _chooses(training):
        result["metric_for_best_model"] = "loss"
        name = str(training.get("metric_for_best_model", "loss")).removeprefix("eval_")
        result["greater_is_better"] = metrics_of(objective)[name]
    return result


def _chooses(training: Mapping[str, Any]) -> bool:
    schedule = training.get("lr_scheduler_type") in _SCHEDULERS
    return bool(training.get("load_best_model_at_end")) or training.get("save_strategy") == "best" or schedule


def of_early_stopping(values: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with the types and ranges of the two keys."""
    patience, threshold = values.get(PATIENCE, 1), values.get(THRESHOLD, 0.0)
    if type(patience) is not int or patience < 1:
        message = f"training.{PATIENCE} must be a whole number of evaluations, at least 1, found {patience!r}"
        yield Problem(("training", PATIENCE), message)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < float("inf"):
        yield Problem(("training", THRESHOLD), f"training.{THRESHOLD} must be at least 0, found {threshold!r}")


def contradictions(recipe: Recipe) -> Iterator[Problem]:
    """Keys that need others, a method or an objective that cannot do it, an unknown metric."""
    training, method = recipe.training, recipe.method
    objective = getattr(method, "objective", "sft")

    def problem(key: str, message: str) -> Problem:
        return Problem(("training", key), f"training.{key} {message}")

    if evaluates(training):
        rules = method_rules(recipe.recipe)
        if rules.learns_sequence:
            message = f"is not for recipe {recipe.recipe}, which measures its tasks between them; remove it"
            yield problem("eval_strategy", message)
        elif rules.stops_after_heads(method):
            message = "is read in no training of this run: it ends when heads are chosen; remove it"
            yield problem("eval_strategy", message)
    else:
        for key in _NEEDING:
            if training.get(key) not in (None, False):
                yield problem(key, "needs evaluation during training; set training.eval_strategy to steps or epoch")
        if training.get("save_strategy") == "best":
            yield problem("save_strategy", "'best' needs training.eval_strategy to be steps or epoch")
        if recipe.task.validation is not None:
            message = "task.validation is read by evaluation during training; set training.eval_strategy, or remove it"
            yield Problem(("task", "validation"), message)
        return
    yield from _of_steps(training)
    if PATIENCE in training and not training.get("load_best_model_at_end"):
        yield problem(PATIENCE, "would end with the worse weights of the last step; set load_best_model_at_end=true")
    if THRESHOLD in training and PATIENCE not in training:
        yield problem(THRESHOLD, f"needs training.{PATIENCE}")
    pruned = [term for term in getattr(method, "regularisers", []) if isinstance(term, PruneGates)]
    if training.get("load_best_model_at_end") and pruned:
        message = "would not bring the gates of kind prune back to that step; set it to false"
        yield problem("load_best_model_at_end", message)
    yield from _of_metric(training, objective)


def _of_steps(training: Mapping[str, Any]) -> Iterator[Problem]:
    """Evaluations that never come, and checkpoints at other steps than they."""
    steps, most = training.get("eval_steps", 50), training.get("max_steps", -1)
    numbers = all(isinstance(value, int | float) for value in (steps, most))
    if training["eval_strategy"] == "steps" and numbers and 0 < most < steps:
        message = f"training.eval_steps {steps} is more than max_steps {most}: nothing would be evaluated; lower it"
        yield Problem(("training", "eval_steps"), message)
    if not training.get("load_best_model_at_end") or training.get("save_strategy") == "best":
        return
    for key, value in (("save_strategy", training["eval_strategy"]), ("save_steps", steps)):
        if training.get(key, value) != value:
            message = (
                f"training.{key} {training[key]!r} keeps checkpoints at other steps than are measured ({value!r}), and "
                "load_best_model_at_end needs those; leave it out, or set save_strategy=best"
            )
            yield Problem(("training", key), message)


def _of_metric(training: Mapping[str, Any], objective: str) -> Iterator[Problem]:
    """An unknown metric, one that nothing reads, a wrong way round."""
    metrics, metric = metrics_of(objective), training.get("metric_for_best_model")
    path = ("training", "metric_for_best_model")
    name = str(metric or "loss").removeprefix("eval_")
    if name not in metrics:
        close = nearest(name, metrics)
        yield Problem(path, f"training.metric_for_best_model {metric!r} is not measured by {objective}; {close}")
        return
    for key in ("metric_for_best_model", "greater_is_better"):
        if training.get(key) is not None and not _chooses(training):
            yield Problem(("training", key), f"training.{key} is read by {' or '.join(_READERS)} alone; remove it")
    better = training.get("greater_is_better")
    if better is not None and better != metrics[name]:
        message = f"training.greater_is_better must be {str(metrics[name]).lower()} for {name}; leave it out"
        yield Problem(("training", "greater_is_better"), message)
