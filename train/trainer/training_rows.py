"""The rows of each objective, as TRL's trainers take them, and their lengths checked."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Literal

import datasets
from transformers import PreTrainedTokenizerBase

from headtune.analysis.tasks.chat import as_chat, turn_end
from headtune.analysis.tasks.prompt_tokens import require_embeddings, token_ids
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import EncodedTask, continuation
from headtune.analysis.utils.errors import InputError


def answer_set_rows(encoded: EncodedTask) -> datasets.Dataset:
    """Columns `input_ids`, `labels`, `remaining`, `previous`: one prompt a row, its END the only place with a loss.

    `labels` mask everything; TRL asks for the column, the objective reads `remaining` and `previous`.
    """
    return datasets.Dataset.from_list(
        [
            {
                "input_ids": example.tokens.tolist(),
                "labels": [-100] * (len(example.tokens) - 1) + [example.target_tokens[0]],
                "remaining": list(example.target_tokens),
                "previous": sorted(set(example.previous_tokens)),
            }
            for example in encoded.examples
        ]
    )


def sft_rows(task: Task, seed: int, end: str = "\n") -> datasets.Dataset:
    """Columns `prompt`, `completion`: the best answer; of a list, one drawn, seeded, from those not given yet.

    Args:
        task: with its prompts as the model gets them (see `as_chat`).
        end: behind each answer.
    """
    generator = random.Random(seed)
    rows = []
    for example in task.examples:
        answer = generator.choice(example.remaining) if task.kind == "lists" else example.remaining[0]
        rows.append({"prompt": example.prompt, "completion": continuation(example.prompt, answer) + end})
    return datasets.Dataset.from_list(rows)


def chat_rows(task: Task, tokenizer: PreTrainedTokenizerBase, seed: int, whole: bool = False) -> datasets.Dataset:
    """Rows of chats as tokens, columns `input_ids` and `labels`: the loss is on what the assistant writes next.

    That is the answer and the end of its turn, as the template writes it; of a list, one item and the line's end.

    Args:
        whole: the loss is on the prompt, too.
    """
    end = "\n" if task.kind == "lists" else turn_end(task, tokenizer)
    return open_rows(sft_rows(as_chat(task, tokenizer), seed, end), tokenizer, whole, special=False)


def dpo_rows(task: Task, pairs: Literal["one", "all"]) -> datasets.Dataset:
    """Columns `prompt`, `chosen`, `rejected`: right and wrong answers to the same question.

    Args:
        pairs: `one` a question, its best answer and its first wrong one (Yin et al. 2024), or `all` combinations.

    Raises:
        InputError: an example without wrong answers.
    """
    rows = []
    for example in task.examples:
        if not example.incorrect:
            raise InputError(
                f"task {task.name!r} has no 'incorrect' answers for {example.prompt[:60]!r}; the dpo objective needs "
                "them, or choose method.objective=sft"
            )
        right, wrong = example.remaining, example.incorrect
        for chosen, rejected in itertools.product(*((right[:1], wrong[:1]) if pairs == "one" else (right, wrong))):
            continued = [continuation(example.prompt, answer) for answer in (chosen, rejected)]
            rows.append({"prompt": example.prompt, "chosen": continued[0], "rejected": continued[1]})
    return datasets.Dataset.from_list(rows)


def open_rows(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    whole: bool = False,
    special: bool = True,
    end: str = "",
) -> datasets.Dataset:
    """Rows of `sft_rows` as tokens, columns `input_ids` and `labels`, which TRL takes as they are.

    A text it would give to the tokenizer, with all that the tokenizer appends, or puts in front a second time.

    Args:
        whole: the loss is on the prompt, too.
        special: put the tokenizer's prefix in front (see `prompt_tokens`).
        end: behind each completion, such as the end-of-text token. Trained on it, a model ends a list after one item.
    """
    result = []
    for row in rows:
        before, ids = token_ids(tokenizer, [row["prompt"], row["prompt"] + row["completion"] + end], special)
        n_ignored = 0 if whole else _shared(before, ids)
        result.append({"input_ids": ids, "labels": [-100] * n_ignored + ids[n_ignored:]})
    return datasets.Dataset.from_list(result)


def dpo_tokens(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, special: bool = True, end: str = ""
) -> datasets.Dataset:
    """Rows of `dpo_rows` as tokens, columns `prompt_ids`, `chosen_ids`, `rejected_ids`: see `open_rows`.

    As in TRL, the prompt ends where it and the two sides part, if tokens merge across its end.
    """
    result = []
    for row in rows:
        texts = [row["prompt"], *(row["prompt"] + row[side] + end for side in ("chosen", "rejected"))]
        before, chosen, rejected = token_ids(tokenizer, texts, special)
        n = min(_shared(before, chosen), _shared(before, rejected))
        result.append({"prompt_ids": before[:n], "chosen_ids": chosen[n:], "rejected_ids": rejected[n:]})
    return datasets.Dataset.from_list(result)


def _shared(before: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids)))


def check_row_length(
    name: str,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    vocabulary: int | None = None,
) -> None:
    """Refuse rows that are too long for the model, or have a token that it lacks: of `open_rows`, `dpo_tokens` or text.

    Raises:
        InputError: see `check_lengths` and `require_embeddings`.
    """
    if "input_ids" in rows.column_names:
        whole = list(rows["input_ids"])
    elif "prompt_ids" in rows.column_names:
        sides = [rows[side] for side in ("chosen_ids", "rejected_ids")]
        whole = [before + ids for side in sides for before, ids in zip(rows["prompt_ids"], side, strict=True)]
    else:
        answers = [column for column in ("completion", "chosen", "rejected") if column in rows.column_names]
        texts = [prompt + row for column in answers for prompt, row in zip(rows["prompt"], rows[column], strict=True)]
        whole = [ids + ids[:1] for ids in token_ids(tokenizer, texts)]  # TRL adds the end
    check_lengths(name, [len(ids) for ids in whole], positions)
    require_embeddings(tokenizer, whole, vocabulary, f"task {name!r}")


def check_lengths(name: str, lengths: Sequence[int], positions: int | None) -> None:
    """Refuse training rows with more tokens than the model takes (InputError)."""
    if positions is not None and (longest := max(lengths, default=0)) > positions:
        too_long = sum(length > positions for length in lengths)
        raise InputError(
            f"task {name!r}: {too_long} of {len(lengths)} training rows are longer than the {positions} tokens that "
            f"the model takes, the longest has {longest}; shorten them or leave them out"
        )
