"""A recipe's regularisers in a trainer of one's own, of TRL or transformers:

    class MyTrainer(HeadRegulariserMixin, SFTTrainer):
        pass

    hold = {"kind": "output_drift", "weight": 1.0, "heads": {"from": "runs/heads", "role": "recall", "top": 8}}
    trainer = MyTrainer(model, args=..., train_dataset=..., peft_config=..., regularisers=[hold])
    trainer.train()

The terms are those of `method.regularisers`, read, checked and computed by the same code; each is logged by its name. A
loss that is evaluated has none of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.tasks.task import Task
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.progress import Notify
from headtune.train.config.methods import PruneGates, WeightDrift
from headtune.train.config.recipe import parse
from headtune.train.config.regularisers import Regulariser
from headtune.train.config.schema import Recipe

from . import attach_regularisers
from .penalised_trainers import PenalisedLoss

log = logging.getLogger(__name__)
Term = Mapping[str, Any] | Regulariser


class HeadRegulariserMixin(PenalisedLoss):
    """Adds penalties on heads to a trainer's loss; stands before the trainer's class.

    Args:
        regularisers: one mapping for each term, as in a recipe, or a configuration such as `OutputDrift(...)`. `heads`
            may also be a list of (layer, head) pairs.
        notify: told what is to be known of the heads, a line at a time.

    Raises:
        InputError: no terms, a term that a recipe would refuse, heads that the model does not have, a kind that prunes,
            Fisher information without a task, or a model that is no causal language model of a supported family.
    """

    def __init__(self, *args: Any, regularisers: Sequence[Term], notify: Notify = log.info, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        this: Any = self
        self._recipe = _recipe_of(regularisers, this.args.seed)
        self._notify = notify
        self._terms_seen: dict[str, list[float]] = defaultdict(list)
        attach_regularisers.require_visible_pass(this.args)
        self._heads = _heads_of(this.accelerator.unwrap_model(this.model), this.processing_class)
        attach_regularisers.require_usable(self._recipe, self._heads, _NO_TASK)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own, with the penalties on."""
        with attach_regularisers.with_regularisers(self._recipe, self._heads, [], _NO_TASK, self, self._notify):
            try:
                return super().train(*args, **kwargs)  # type: ignore[misc]
            finally:
                self.penalty = None

    def note(self, name: str, mean: float) -> None:
        if hasattr(self, "_metrics"):
            super().note(name, mean)
        else:  # transformers' own Trainer has no such place
            self._terms_seen[name].append(mean)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._terms_seen.items()}
            self._terms_seen.clear()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


_NO_TASK = Task("the trainer's rows", ())


def _recipe_of(terms: Sequence[Term], seed: int) -> Recipe:
    """A recipe with these terms and nothing else that is read, checked as any."""
    if not terms:
        raise InputError("regularisers names none; give one term at least, or use the trainer without the mixin")
    blocks = []
    for term in terms:
        block = term.model_dump(by_alias=True, exclude_none=True) if isinstance(term, Regulariser) else dict(term)
        if isinstance(block.get("heads"), Sequence) and not isinstance(block["heads"], str):
            block["heads"] = {"list": [list(pair) for pair in block["heads"]]}
        blocks.append(block)
    try:
        recipe = parse({"recipe": "lora", "method": {"regularisers": blocks}, "seed": seed}, "regularisers")
    except InputError as error:
        raise InputError(str(error).replace("method.regularisers", "regularisers")) from error
    method: Any = recipe.method
    for index, term in enumerate(method.regularisers):
        if isinstance(term, PruneGates):
            raise InputError(f"regularisers.{index}: kind prune is for recipe regularise, which folds the gates")
        if isinstance(term, WeightDrift) and term.fisher and term.task is None:
            raise InputError(f"regularisers.{index}: fisher=true takes it from a task; give its name: task=...")
    return recipe


def _heads_of(model: Any, tokenizer: Any) -> HeadModel:
    """The head view of what a trainer trains, checked with its adapter off; the model is what it was."""
    adapted = isinstance(model, PeftModel)
    base = model.get_base_model() if adapted else model
    training = [module for module in base.modules() if module.training]
    with model.disable_adapter() if adapted else contextlib.nullcontext():
        heads = wrap_model(base, tokenizer)
    heads.record_attention(False)
    for module in training:
        module.training = True
    if adapted:  # that of the model that a head set was made on, which had no adapter
        heads.__dict__["weights_sha256"] = _plain_sha256(base, model.base_model.prefix)
    return heads


def _plain_sha256(base: Any, prefix: str) -> str:
    """`HeadModel.weights_sha256` as it is without the adapter."""

    def plain() -> Iterator[tuple[str, Any]]:
        for name, parameter in base.named_parameters():
            if not any(part.startswith(prefix) for part in name.split(".")):
                yield name.replace(".base_layer", ""), parameter

    digest = hashlib.sha256()
    for name, parameter in sorted(plain(), key=lambda item: item[0]):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
