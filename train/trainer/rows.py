"""Training rows in tokens: a prompt and its answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from headtune.analysis.tasks.chat import as_chat, turn_end
from headtune.analysis.tasks.prompt_tokens import token_ids
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import continuation
from headtune.analysis.utils.errors import InputError


@dataclass(frozen=True)
class TrainingRow:
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


def rows_of(task: Task, tokenizer: PreTrainedTokenizerBase, index: int, seed: int) -> list[TrainingRow]:
    """The training rows of the `index`-th task: `prompt + answer + newline`, the loss on the answer and the newline.

    The answer is the best one; of a list, one drawn, seeded, from those not given yet. In a chat an answer that is no
    list's ends as the template ends the assistant's turn.

    Raises:
        InputError: a prompt whose tokens are not a beginning of those of prompt and answer; a chat template that fails.
    """
    generator = random.Random(f"{seed}/{index}")
    special = not task.chat_template
    end = turn_end(task, tokenizer) if task.chat_template and task.kind != "lists" else "\n"
    rows = []
    for place, example in enumerate(as_chat(task, tokenizer).examples):
        answer = generator.choice(example.remaining) if task.kind == "lists" else example.remaining[0]
        text = example.prompt + continuation(example.prompt, answer) + end
        prompt, whole = token_ids(tokenizer, [example.prompt, text], special)
        if whole[: len(prompt)] != prompt:
            raise InputError(
                f"task {task.name!r}: the tokens of {example.prompt[-40:]!r} change when {answer!r} follows; end "
                "prompts at the end of a word"
            )
        labels = [-100] * len(prompt) + whole[len(prompt) :]
        rows.append(TrainingRow(f"{index}-{place}", tuple(whole), tuple(labels)))
    return rows


def padded(rows: Sequence[TrainingRow], pad: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
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
