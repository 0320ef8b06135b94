"""TRL's trainers with further terms in their loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler
from trl import DPOTrainer, SFTTrainer

from headtune.train.types import Penalty


class PenalisedLoss:
    """A trainer, of TRL or transformers, whose loss has further terms; each is logged by name, before its weight.

    Attributes:
        penalty: the terms.
    """

    penalty: Penalty | None = None

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        this: Any = self
        look = getattr(self.penalty, "see", None)
        if look is not None:  # some terms need to know which tokens are right
            look(inputs)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if self.penalty is None or not model.training:
            return result
        progress = this.state.global_step / max(1, this.state.max_steps)
        terms = self.penalty(this.accelerator.unwrap_model(model), progress)
        if not terms:
            return result
        for name, (term, _) in terms.items():
            self.note(name, this.accelerator.gather(term.detach().float().reshape(1)).mean().item())
        added = torch.stack([weight * term.float() for term, weight in terms.values()]).sum()
        if this.model_accepts_loss_kwargs and num_items_in_batch is not None:
            # Such a loss is a share of the whole step's; the trainer adds it up over accumulated batches, undivided.
            added = added / this.current_gradient_accumulation_steps
        return (result[0] + added, result[1]) if return_outputs else result + added

    def note(self, name: str, mean: float) -> None:
        """Keep a term's value for the next line of the log, where TRL's trainers keep theirs."""
        this: Any = self
        this._metrics["train"][name].append(mean)


class Penalised(PenalisedLoss):
    """A trainer of a recipe: with further terms in its loss, and learning rates of its own for some parameters.

    Attributes:
        rates: learning rates of parameters whose name holds a word, `{word: rate}`; the others have the run's.
    """

    rates: Mapping[str, float] = {}

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """No card of TRL's, which knows neither recipe nor data: see `export.model_card` for ours."""

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As ever, and what the next steps draw is what they would draw without it."""
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Rows in the trainer's own order, and as many of the next as fill the last step of an epoch.

        With several processes accelerate fills it up itself, with other rows, and not at all with one: the same
        recipe would train on other batches.
        """
        sampler = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        args: Any = self.args  # type: ignore[attr-defined]
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if type(sampler) is not RandomSampler or args.dataloader_drop_last or len(sampler) % step == 0:
            return sampler
        return RandomSampler(sampler.data_source, num_samples=-(-len(sampler) // step) * step)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        this: Any = self
        for word, rate in self.rates.items():
            apart = {parameter for name, parameter in this.model.named_parameters() if word in name}
            for group in list(optimizer.param_groups):
                params = [parameter for parameter in group["params"] if parameter in apart]
                if params:
                    group["params"] = [parameter for parameter in group["params"] if parameter not in apart]
                    # Without decay: pulled to 0, log alpha would half close a gate.
                    optimizer.add_param_group({**group, "params": params, "lr": rate, "weight_decay": 0.0})
        return optimizer


class SFT(Penalised, SFTTrainer):
    """Cross-entropy on completions."""


class DPO(Penalised, DPOTrainer):
    """Direct preference optimisation (Rafailov et al. 2023); the reference is the model with its adapter off.

    Rows that are tokens already are taken as they are: TRL would look for their text.
    """

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if "prompt_ids" in (dataset.column_names or ()):
            return dataset
        return super()._prepare_dataset(dataset, *args, **kwargs)
