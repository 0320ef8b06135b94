"""The best checkpoint of a training that is evaluated as it goes, put back when it ends; and early stopping.

transformers would look for the checkpoint where the folder was when the run began, load into some engines' parts of a
model, and only warn where it is not there. So its `load_best_model_at_end` is taken over: the trainer notes which step
is best, as ever, and what is put back afterwards is the whole checkpoint, checked against its sums.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, IntervalStrategy, TrainerCallback, TrainerState

from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.progress import Notify
from headtune.train.config.during_training import PATIENCE, split_keys
from headtune.train.config.schema import Recipe
from headtune.train.tuners import weights_io

from . import checkpoints


class _Stopping(EarlyStoppingCallback):
    """transformers' own, which would warn that the best checkpoint is not put back: it is, by `BestCheckpoint`."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self.early_stopping_patience_counter = saved.get("early_stopping_patience_counter", 0)


class _Evaluations(TrainerCallback):
    """Tells what is measured, and refuses a training that would end before anything is."""

    def __init__(self, notify: Notify) -> None:
        self.notify = notify

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.eval_strategy == IntervalStrategy.STEPS and state.eval_steps > state.max_steps:
            raise InputError(
                f"training.eval_steps {state.eval_steps} is more than the {state.max_steps} steps of this training: "
                "nothing would be evaluated; lower it"
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics: dict[str, float] = kwargs["metrics"]
        values = {name.removeprefix("eval_"): value for name, value in metrics.items() if name not in _TIMES}
        for name, value in values.items():
            if name == "loss" and not math.isfinite(value):
                raise CheckError(f"the loss on the validation rows is {value} at step {state.global_step}")
        shown = [f"{name} {value:.4g}" for name, value in values.items() if name in self.names(args)]
        self.notify(f"step {state.global_step}/{state.max_steps}, validation: {', '.join(shown)}")

    @staticmethod
    def names(args: Any) -> set[str]:
        """The loss, and the metric that chooses."""
        return {"loss", str(args.metric_for_best_model or "loss").removeprefix("eval_")}


_TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


def callbacks(recipe: Recipe, notify: Notify) -> list[TrainerCallback]:
    """What a trainer that evaluates as it goes is given, early stopping among it where the recipe asks for it."""
    _, keys = split_keys(recipe.training)
    return [_Evaluations(notify), *([_Stopping(**keys)] if PATIENCE in keys else [])]


def stopped_early(checkpoint: Path) -> bool:
    """Whether a training ended at this checkpoint because what it measured had not become better."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return _out_of_patience(state.stateful_callbacks.get(_Stopping.__name__))


def _out_of_patience(saved: Mapping[str, Any] | None) -> bool:
    """Whether early stopping, as a checkpoint keeps it, has waited as long as it may."""
    if not saved:
        return False
    return bool(saved["attributes"]["early_stopping_patience_counter"] >= saved["args"][PATIENCE])


class BestCheckpoint:
    """Takes over the arguments' `load_best_model_at_end`.

    Args:
        arguments: the trainer's, before it is made.
    """

    def __init__(self, arguments: Any) -> None:
        self.put_it_back: bool = arguments.load_best_model_at_end
        arguments.load_best_model_at_end = False

    def put_back(self, trainer: Any, notify: Notify) -> dict[str, Any]:
        """The weights of the best checkpoint, in the trained model, where they are asked for.

        Returns:
            What run.json says of it: `{"best": {"step", "metric", "value"}, "stopped_early": whether}`.

        Raises:
            CheckError: no evaluation came before the end, or the checkpoint is damaged.
        """
        state, arguments = trainer.state, trainer.args
        stopping = [each for each in trainer.callback_handler.callbacks if isinstance(each, _Stopping)]
        # The second is all there is where a training that had stopped is taken up.
        waited = [*(each.state() for each in stopping), state.stateful_callbacks.get(_Stopping.__name__)]
        early = any(map(_out_of_patience, waited))
        metric = arguments.metric_for_best_model
        record: dict[str, Any] = {"stopped_early": early} if stopping else {}
        if early:
            notify(f"stopped early at step {state.global_step} of {state.max_steps}: {metric} had not become better")
        if not self.put_it_back:
            return record
        if not state.best_global_step:
            raise CheckError(
                f"no checkpoint was evaluated in {state.global_step} steps, so none is the best; lower "
                "training.eval_steps, or set training.load_best_model_at_end to false"
            )
        # By its name: the folder may have been moved since.
        folder = Path(arguments.output_dir) / f"checkpoint-{state.best_global_step}"
        reason = checkpoints.damage(folder, logging.getLogger(__name__).info) if folder.is_dir() else "it is missing"
        if reason is not None:
            raise CheckError(f"the best checkpoint {str(folder)!r} cannot be put back: {reason}")
        model = trainer.accelerator.unwrap_model(trainer.model)
        if not any(parameter.is_meta for parameter in model.parameters()):  # as on ranks that an engine left empty
            weights_io.restore(model, folder)
        notify(f"best {metric} {state.best_metric:.4g} at step {state.best_global_step}: its weights are put back")
        return record | {"best": {"step": state.best_global_step, "metric": metric, "value": state.best_metric}}
