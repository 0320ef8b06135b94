"""A trainer of the answer-set objective: any answer not given yet, none of those given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from headtune.train.config.methods import AnswerSetConfig
from headtune.train.losses.answer_set import answer_set, kl_to_base

from .penalised_trainers import Penalised


class AnswerSetCollator:
    """Pad on the left, so that END is the last position of every row; pad token sets with -1."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        def padded(name: str, value: int) -> Tensor:
            width = max(1, *(len(row[name]) for row in rows))
            return torch.tensor([[value] * (width - len(row[name])) + list(row[name]) for row in rows])

        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        tokens = padded("input_ids", self.pad_token_id)
        mask = (torch.arange(tokens.shape[1]) >= (tokens.shape[1] - lengths)[:, None]).long()
        return {
            "input_ids": tokens,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
            "remaining": padded("remaining", -1),
            "previous": padded("previous", -1),
        }


class _AnswerSet(SFTTrainer):
    """SFTTrainer whose loss is `losses.answer_set` at the last token; its parts are logged by name."""

    def __init__(self, *args: Any, block: AnswerSetConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.block = block
        # The loss is a mean over rows, so accumulated steps are averaged by the trainer, not by token counts.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        remaining, previous = inputs.pop("remaining"), inputs.pop("previous")
        width = inputs["input_ids"].shape[1]
        # None in an evaluation, whose loss is to be the same each time for the same weights.
        positions = self._columns_for_kl(width) if torch.is_grad_enabled() else []
        columns = torch.tensor([*positions, width - 1], device=inputs["input_ids"].device)
        outputs = model(**inputs, use_cache=False, logits_to_keep=columns)
        terms = answer_set(outputs.logits[:, -1], remaining, previous, self.block.unlikelihood)
        loss = terms["loss"]
        if positions:
            rows = max(1, len(inputs["input_ids"]) // 4)  # a second forward pass of every row would cost too much
            base = self.accelerator.unwrap_model(model)
            some = {name: value[:rows] for name, value in inputs.items()}
            with torch.no_grad(), base.disable_adapter():
                reference = base(**some, use_cache=False, logits_to_keep=columns[:-1]).logits
            present = some["attention_mask"][:, columns[:-1]].bool()
            terms["retention"] = kl_to_base(outputs.logits[:rows, :-1][present], reference[present])
            loss = loss + self.block.retention * terms["retention"]
        mode = "train" if model.training else "eval"
        for name, term in terms.items():
            if name != "loss":
                value = self.accelerator.gather_for_metrics(term.detach()[None]).mean().item()
                self._metrics[mode][name].append(value)
        return (loss, outputs) if return_outputs else loss

    def _columns_for_kl(self, width: int) -> list[int]:
        """Columns before END, drawn anew at every step (the trainer saves and restores the random state)."""
        if not self.block.retention or width < 3:
            return []
        n = min(self.block.retention_positions, width - 2)
        return sorted((1 + torch.randperm(width - 2)[:n]).tolist())


class AnswerSetTrainer(Penalised, _AnswerSet):
    """Any answer not given yet, none of those given: `losses.answer_set` at the last token."""
