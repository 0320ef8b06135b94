"""Penalties on chosen heads, added to any loss: what they attend to, put out, weigh and contribute may not drift.

    penalties = Regularisers(model, [(AttentionKl(weight=1.0), pairs), (WeightDrift(weight=0.1), pairs)])
    with penalties.installed():                    # after the adapter, if any, is on the model
        trainer.penalty = penalties                # (model, progress) -> {name: (term, weight now)}
        trainer.train()

The kinds are in `builtin_regularisers`; `registry` takes others. Each term reads the training pass just made (see
`activation_capture`), whatever the loss made of it: SFT, DPO, answer sets; accumulated batches; padding on either side.
The base is the model with its adapter switched off; in full fine-tuning a frozen copy, made when the block is entered
and only if a term compares activations. It runs the same inputs once more, without gradient, dropout or unembedding. A
trainer's `see(inputs)` tells, before the pass, which tokens are right.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.train import distributed
from headtune.train.config.regularisers import Regulariser

from . import builtin_regularisers  # noqa: F401  their kinds are registered there
from .activation_capture import Captures, PassWatcher, alike, carries_adapter
from .registry import Pairs, TrainingBatch, head_penalties_of

log = logging.getLogger(__name__)


class Regularisers:
    """Named penalty terms on heads; a trainer's `penalty`.

    Attributes:
        penalties: by name; of several of one kind the later ones are named `kind_2`, `kind_3`.

    Args:
        model: the model to be trained, with or without an adapter by the time `installed` is entered.
        terms: configurations, each with the (layer, head) pairs that it is about.
        reference: the base, frozen, where it is not the model under its adapter or as `installed` finds it.
        fisher: for `WeightDrift(fisher=True)`: `fisher_diagonal` of the model without adapter, by weight name.

    Raises:
        InputError: a head that the model does not have, an option that is not one token, no Fisher diagonal where one
            is needed.
    """

    def __init__(
        self,
        model: HeadModel,
        terms: Collection[tuple[Regulariser, Pairs]],
        reference: PreTrainedModel | None = None,
        fisher: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self.penalties = head_penalties_of(model, terms)
        for penalty in self.penalties.values():
            if penalty.needs_fisher and fisher is None:
                raise InputError(
                    f"{penalty.config.kind} with fisher=true needs a Fisher diagonal; give the rows it is taken from"
                )
        self._fisher = fisher
        self._reference = reference
        self._base: HeadModel | None = None  # another model; None: this one without its adapter
        self._inputs: Mapping[str, Tensor] | None = None
        self._calls = (-1.0, 0)  # the share of the training done, and how many calls came before at the same
        self._captures = Captures.union(penalty.captures() for penalty in self.penalties.values())
        self._base_captures = Captures.union(
            penalty.captures() for penalty in self.penalties.values() if penalty.compares_with_base
        )
        self._watcher = PassWatcher(model, self._captures)
        self._weights_read: list[Module] = []

    @property
    def counts(self) -> Counter[str]:
        """Rows looked at and rows skipped by name, such as `negative_attention.skipped`."""
        totals = {f"{name}.{what}": n for name, penalty in self.penalties.items() for what, n in penalty.counts.items()}
        return Counter(totals)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Watch the model's training passes inside the block; afterwards it is what it was.

        Raises:
            InputError: nothing that is trained can move what a weight_drift holds.
        """
        adapted = carries_adapter(self.model.hf)
        reference = None if self._reference is None else alike(self.model, self._reference)
        for penalty in self.penalties.values():
            penalty.start(reference, adapted, self._fisher)
        self._base = reference
        self._weights_read = [module for penalty in self.penalties.values() for module in penalty.weights_read()]
        if self._base_captures != Captures() and reference is None and not adapted:
            self._base = alike(self.model, copy.deepcopy(self.model.hf).requires_grad_(False))
        try:
            with self._watcher.installed(self._base):
                yield
        finally:
            for penalty in self.penalties.values():
                penalty.finish()
            self._base, self._inputs, self._weights_read = None, None, []
            if counts := self.counts:
                log.info("regularisers: %s", ", ".join(f"{name} {count}" for name, count in counts.items()))

    def see(self, inputs: Mapping[str, Any]) -> None:
        """Look at a trainer's batch, as collated, before its loss is computed: it says which tokens are right."""
        names = ("input_ids", "labels", "completion_mask", "remaining")
        self._inputs = {name: inputs[name] for name in names if isinstance(inputs.get(name), Tensor)}

    def __call__(self, model: Any, progress: float) -> dict[str, tuple[Tensor, float]]:
        """The terms of the training pass just made, unweighted, each with its weight now.

        Args:
            model: what was trained, unwrapped: the PeftModel where there is an adapter.
            progress: share of the steps done.

        Raises:
            CheckError: no pass was made since the last call, or not with what the terms need.
        """
        training_pass, inputs = self._watcher.last, self._inputs
        self._watcher.last = self._inputs = None
        if training_pass is None:
            raise CheckError("penalties on heads were asked for without a training pass inside their installed() block")
        training_pass.require(self._captures)
        batch = TrainingBatch(training_pass, None, inputs, self._seed(progress))
        if self._base_captures != Captures():
            self._run_base(model, batch)
        device = training_pass.present.device.type
        with torch.autocast(device, enabled=False), distributed.gathered_parameters(self._weights_read):
            return {
                name: (penalty.loss(batch), penalty.config.weight_at(progress))
                for name, penalty in self.penalties.items()
            }

    def _seed(self, progress: float) -> int:
        """Another one for each batch of each step."""
        self._calls = (progress, self._calls[1] + 1 if self._calls[0] == progress else 0)
        return zlib.crc32(f"{torch.initial_seed()}/{self._calls}".encode())

    def _run_base(self, model: Any, batch: TrainingBatch) -> None:
        """One pass of the base, and what penalties read of its weights."""
        without_adapter: Any = contextlib.nullcontext()
        if self._base is None:
            if not isinstance(model, PeftModel):
                raise CheckError(f"the model carries an adapter, and a {type(model).__name__} cannot switch it off")
            without_adapter = model.disable_adapter()
        base = self._base or self.model
        with torch.no_grad(), without_adapter:
            batch.base = self._watcher.again(base, batch.training_pass, self._base_captures)
            with torch.autocast(batch.training_pass.present.device.type, enabled=False):
                for penalty in self.penalties.values():
                    penalty.read_base(base, batch)
