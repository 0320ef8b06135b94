"""Rows of earlier tasks, which are seen again while later ones are learnt.

A task's share of the buffer is a random sample of its training rows, drawn once. While a later task trains, the buffer
is gone through in shuffled rounds, spread evenly over the batches: after s of the S batches of an epoch
floor(s * |buffer| / S) rows were seen again, so that an epoch goes once through the task and once through the buffer,
whatever the ratio. What comes when depends on the seed and the batch's number alone, so a resumed run sees the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..analysis.encoding import continuation
from ..analysis.errors import InputError
from ..analysis.tasks import Task
from .blocks import ReplayBlock


@dataclass(frozen=True)
class Row:
    """A prompt and its answer.

    Attributes:
        key: names it within a run: task and place.
        input_ids: `[tokens]`.
        labels: `[tokens]`, -100 where nothing is learnt.
    """

    key: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @property
    def plain(self) -> dict[str, list[int]]:
        return {"input_ids": list(self.input_ids), "labels": list(self.labels)}


def rows_of(task: Task, tokenizer: PreTrainedTokenizerBase, index: int, seed: int) -> list[Row]:
    """The training rows of the `index`-th task: `prompt + answer + newline`, the loss on the answer and the newline.

    The answer is the best one; of a list, one drawn, seeded, from those not given yet.

    Raises:
        InputError: a prompt whose tokens are not a beginning of those of prompt and answer.
    """
    generator = random.Random(f"{seed}/{index}")
    rows = []
    for place, example in enumerate(task.examples):
        answer = generator.choice(example.remaining) if task.kind == "lists" else example.remaining[0]
        prompt: list[int] = tokenizer(example.prompt).input_ids
        whole: list[int] = tokenizer(example.prompt + continuation(example.prompt, answer) + "\n").input_ids
        if whole[: len(prompt)] != prompt:
            raise InputError(
                f"task {task.name!r}: the tokens of {example.prompt[-40:]!r} change when {answer!r} follows; end "
                "prompts at the end of a word"
            )
        labels = [-100] * len(prompt) + whole[len(prompt) :]
        rows.append(Row(f"{index}-{place}", tuple(whole), tuple(labels)))
    return rows


def sample(rows: Sequence[Row], block: ReplayBlock, seed: str) -> list[Row]:
    """A task's share of the buffer, in the order of the task: at least one row, at most all."""
    return drawn(rows, block.count if block.count is not None else max(1, round((block.ratio or 0) * len(rows))), seed)


def drawn(rows: Sequence[Row], wanted: int | Literal["all"], seed: str) -> list[Row]:
    """A random sample of rows, in their order: `wanted` of them, or all where there are no more."""
    n = len(rows) if wanted == "all" else min(wanted, len(rows))
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), n))]


def padded(rows: Sequence[Row], pad: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, `[batch, longest]`, padded on the right."""
    return {
        "input_ids": filled([row.input_ids for row in rows], pad, device),
        "attention_mask": filled([[1] * row.length for row in rows], 0, device),
        "labels": filled([row.labels for row in rows], -100, device),
    }


def filled(rows: Sequence[Sequence[int]], filler: int, device: torch.device | str = "cpu") -> Tensor:
    """`[rows, longest]`, each filled up on the right."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler).to(device)


@dataclass(frozen=True)
class Replay:
    """When which row of the buffer is seen again.

    Attributes:
        rows: the buffer.
        per_batch: how many of them belong to one batch of a process, on average.
        seed: of the order.
    """

    rows: Sequence[Row]
    per_batch: float
    seed: str

    def due(self, batch: int, process: int = 0, processes: int = 1) -> list[Row]:
        """The rows that go with the `batch`-th batch (from 0) of a process; every process gets as many."""
        first, last = (int(index * self.per_batch + 1e-9) for index in (batch, batch + 1))
        return [self._visit(index * processes + process) for index in range(first, last)]

    def _visit(self, index: int) -> Row:
        turn, place = divmod(index, len(self.rows))
        order = list(range(len(self.rows)))
        random.Random(f"{self.seed}/{turn}").shuffle(order)
        return self.rows[order[place]]
