"""The loss of one task of a sequence: the task's own, and what holds earlier tasks in place.

    seekr       L_task + l1 L_replay + (1 - l1) L_logits + l2 L_attention      (He et al. 2024, arXiv 2411.06171)
    replay      L_task + L_replay
    der         L_task + L_replay + a |logits - stored logits|^2               (DER++, Buzzega et al. 2020)
    lwf         L_task + a KL(previous model || model) on the task's own rows   (Li & Hoiem 2016, temperature 1)

Each term is a mean over label tokens (attention: over heads and query rows). Terms of rows that are seen again carry
the factor `rows seen again / rows of the task in a full batch`, so that a row weighs the same wherever it comes from,
and an epoch is one pass over task and buffer together, whatever the ratio of the buffer.

Several processes see other rows each. Their means are weighed by what they are means over: the terms are those of all
rows together.

Logits are computed where there is a label only; attention is recomputed for chosen heads and query rows of the rows
seen again only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from trl import SFTTrainer

from headtune.train import distributed
from headtune.train.config.methods import SeekrConfig
from headtune.train.losses.attention_distillation import RowRecorder, attention_distillation, logit_kl
from headtune.train.losses.label_logits import label_mask, positions_only
from headtune.train.trainer.penalised_trainers import Penalised
from headtune.train.trainer.rows import TrainingRow, padded

from .replay import Replay
from .teacher_store import TeacherStore

Heads = Mapping[int, Sequence[int]]  # layer -> heads


@dataclass(frozen=True)
class ContinualInputs:
    """What a task's training takes from earlier tasks.

    Attributes:
        buffer: rows of earlier tasks that are seen again.
        seed: of their order.
        teachers: what models before said about rows, by key.
        heads: by row's key, the heads whose attention is distilled; None: those that each row's teacher has.
    """

    buffer: Sequence[TrainingRow] = ()
    seed: str = ""
    teachers: TeacherStore | None = None
    heads: Mapping[str, Heads] | None = None


def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The indices of a batch's rows; the trainer has the rows."""
    return {"row": torch.tensor([example["row"] for example in examples])}


class _Sequence(SFTTrainer):
    penalty: Any = None

    def __init__(
        self, *args: Any, rows: Sequence[TrainingRow], method: SeekrConfig, continual: ContinualInputs, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.rows, self.method, self.continual = rows, method, continual
        self.pad_token_id: int = self.processing_class.pad_token_id  # type: ignore[union-attr]
        self.model_accepts_loss_kwargs = False  # a mean over rows, not over the tokens of a whole step
        self._passes = (-1, 0)  # optimiser step, batches of it so far

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        rows = [self.rows[index] for index in inputs["row"].tolist()]
        again: list[TrainingRow] = []
        if self.continual.buffer and model.training:
            again = self._due()
        terms = self._terms(model, rows, again)
        mode = "train" if model.training else "eval"
        for name, (term, _) in terms.items():
            self._metrics[mode][name].append(self.accelerator.gather(term.detach().reshape(1)).mean().item())
        loss = torch.stack([weight * term for term, weight in terms.values()]).sum()
        return (loss, None) if return_outputs else loss

    def _due(self) -> list[TrainingRow]:
        """The rows that are seen again with the batch that is next."""
        processes = self.accelerator.num_processes
        loader: Any = self.callback_handler.train_dataloader
        in_epoch = len(loader)  # batches of this process
        step, count = self._passes
        now: int = self.state.global_step
        self._passes = (now, 0 if step != now else count + 1)
        # As the trainer counts: an epoch's last step may have fewer batches than are accumulated.
        epoch, step = divmod(now, -(-in_epoch // self.args.gradient_accumulation_steps))
        batch = epoch * in_epoch + step * self.args.gradient_accumulation_steps + self._passes[1]
        replay = Replay(self.continual.buffer, len(self.continual.buffer) / (in_epoch * processes), self.continual.seed)
        return replay.due(batch, self.accelerator.process_index, processes)

    def _terms(
        self, model: Any, rows: Sequence[TrainingRow], again: Sequence[TrainingRow]
    ) -> dict[str, tuple[Tensor, float]]:
        method, continual = self.method, self.continual
        distil = method.distil
        # One pass over the task's rows and those that are seen again, with their teachers' heads recorded.
        everything = [*rows, *again]
        batch = padded(everything, self.pad_token_id, self.accelerator.device)
        look = getattr(self.penalty, "see", None)
        if look is not None:
            look(batch)
        labels = batch.pop("labels")
        mask = label_mask(labels)
        teacher = recorder = None
        if continual.teachers is not None and (again or method.strategy == "lwf"):
            keys = [row.key for row in (rows if method.strategy == "lwf" else again)]
            teacher = continual.teachers.batch(keys, labels.shape[1], continual.heads, labels.device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(positions_only(self.accelerator.unwrap_model(model), mask))
            seen: dict[int, Tensor] = {}
            if teacher is not None and method.strategy == "seekr":
                recorder = RowRecorder(teacher.heads)
                seen = stack.enter_context(recorder.record(teacher.positions, first=len(rows)))
            logits = model(**batch, use_cache=False).logits[0].float()
        # How much each part weighs.
        counts = mask.sum(1)
        n_task = int(counts[: len(rows)].sum())  # label positions of the task's rows, which come first
        # A row that is seen again weighs as much as one of the task in a batch that is full.
        processes = self.accelerator.num_processes
        share = len(again) * processes / min(self.args.per_device_train_batch_size * processes, len(self.rows))
        of_task, of_again = (_part(tokens, logits) for tokens in (n_task, len(logits) - n_task))
        # The terms: the task, its old answers (LwF), replay, and what teachers said of replayed rows.
        cross_entropy = functional.cross_entropy(logits, labels[:, 1:][mask[:, :-1]], reduction="none")
        terms: dict[str, tuple[Tensor, float]] = {"task": (of_task * cross_entropy[:n_task].mean(), 1.0)}
        if method.strategy == "lwf" and teacher is not None:
            assert teacher.logits is not None
            terms["lwf"] = (of_task * logit_kl(logits[:n_task], teacher.logits), method.lwf_weight)
        if not again:
            return terms
        replayed = of_again * cross_entropy[n_task:].mean()
        terms["replay"] = (replayed, share * (distil.replay_weight if method.strategy == "seekr" else 1.0))
        if teacher is None:
            return terms
        assert teacher.logits is not None
        if method.strategy == "der":
            assert isinstance(teacher.logits, Tensor)
            apart = of_again * (logits[n_task:] - teacher.logits).square().mean()
            return terms | {"logits": (apart, share * method.der_weight)}
        n_rows = sum(int(there.sum()) for there in teacher.present.values())
        counted = n_rows if distil.reduction == "mean" else len(again)
        distance = attention_distillation(seen, teacher.attention, teacher.present, distil.reduction)
        attention = _part(counted, logits) * distance
        return terms | {
            "logits": (of_again * logit_kl(logits[n_task:], teacher.logits), share * (1 - distil.replay_weight)),
            "attention": (attention, share * distil.attention_weight),
        }


def _part(count: int, like: Tensor) -> Tensor:
    """How much a process's mean over so many weighs, beside 1 of an average process."""
    total = torch.tensor(float(count), device=like.device)
    return total / distributed.all_reduce_mean(total).clamp(min=1)


class SequenceTrainer(Penalised, _Sequence):
    """One task of a sequence, with further penalties."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Each row once an epoch, whose last batch may be short; of several processes accelerate fills it up."""
        return SFTTrainer._get_train_sampler(self, train_dataset)
