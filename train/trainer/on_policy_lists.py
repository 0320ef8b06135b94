"""Training prompts that end inside lists which the model itself wrote: on-policy data of the answer-set objective."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headtune.analysis.models.loading import cache_folder
from headtune.analysis.tasks.chat import begins_reply, continued, items_start
from headtune.analysis.tasks.messages import joined
from headtune.analysis.tasks.task import Example, Task, to_jsonl
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.files import write_text
from headtune.train.config.methods import AnswerSetConfig
from headtune.train.evaluation.evaluate import generate_lists

log = logging.getLogger(__name__)


def on_policy_examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, n_items: int, batch_size: int = 16
) -> list[Example]:
    """Prompts that end inside lists which the model itself wrote, greedily, right or wrong.

    A prompt of the task is continued for `n_items` items; each item border inside the continuation gives one example,
    whose previous answers are the given ones and everything the model wrote before it. Training on these shows the
    objective the mistakes the model makes, above all its repeats, instead of flawless prefixes only.
    """
    examples = []
    for scored in generate_lists(model, tokenizer, task, n_items, batch_size):
        start = items_start(scored.text) if begins_reply(task, scored.example) else 0
        lines = scored.text[start:].split("\n")
        for index in range(1, min(len(lines), len(scored.items) + 1)):
            marker = re.match(r"\s*(\d+[.)]|[-*•])", lines[index])
            if marker is None:
                break  # no longer a list
            text = scored.text[:start] + "\n".join(lines[:index]) + "\n" + marker.group(0)
            previous = (*scored.example.previous, *scored.items[:index])
            example = continued(scored.example, text, previous, task.chat_template)
            if example.remaining:
                examples.append(example)
    return examples


def _cached(path: Path, compute: Callable[[], list[Example]]) -> list[Example]:
    """`compute()`, kept in a file: greedy lists of the same model on the same prompts are always the same."""
    if path.is_file():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [_example(row) for row in rows]
    examples = compute()
    try:
        write_text(path, to_jsonl(examples))
    except OSError as error:
        log.warning("the model's own lists are not kept for other runs: cannot write %s (%s)", path, error.strerror)
    return examples


def _example(row: Mapping[str, Any]) -> Example:
    turns = tuple((turn["role"], turn["content"]) for turn in row.get("messages", ()))
    prompt = joined(turns) if turns else row["prompt"]
    return Example(prompt, row["subject"], tuple(row["answers"]), tuple(row["previous"]), messages=turns)


def answer_set_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    block: AnswerSetConfig,
    n_rows: int,
    seed: int,
    batch_size: int = 16,
    weights_sha256: str | None = None,
) -> Task:
    """The training prompts of the answer-set objective: a share from the task, the rest from the model's own lists.

    Args:
        n_rows: prompts wanted in all; fewer where the task is smaller.
        weights_sha256: the model's; given, its lists are kept in the cache folder, so that other seeds' and methods'
            runs need not write them again.

    Raises:
        InputError: the model's own lists give no usable prompt though some were asked for.
    """
    # The share that comes from the task as it is.
    n_own = round(block.own_lists * n_rows)
    parts = list(task.limited(n_rows - n_own, seed).examples) if n_rows > n_own else []
    rows: list[Example] = []
    if n_own:
        # The rest ends inside lists of the model's own: written now, or read from the cache.
        # About `own_items` examples come from one list; the seed is moved on so that other prompts are continued.
        prompts = task.limited(-(-n_own // block.own_items) * 5 // 4, seed + 1)

        def write_lists() -> list[Example]:
            return on_policy_examples(model, tokenizer, prompts, block.own_items + 1, batch_size)

        if weights_sha256 is None:
            rows = write_lists()
        else:
            version = importlib.metadata.version("headtune")
            # "greedy": until it was, a model's generation_config.json had its part in what lists say.
            key = (
                f"{version}/greedy/{weights_sha256}/{prompts.sha256}/{block.own_items}/{batch_size}/{model.device.type}"
            )
            name = hashlib.sha256(key.encode()).hexdigest()[:24] + ".jsonl"
            rows = _cached(cache_folder() / "own-lists" / name, write_lists)
        if not rows:
            raise InputError(
                f"the model continues no prompt of {task.name!r} as a list; set method.answer_set.own_lists=0"
            )
        random.Random(seed).shuffle(rows)
        rows = rows[:n_own]
    return Task(f"{task.name}+own", tuple(parts + rows), task.chat_template)
