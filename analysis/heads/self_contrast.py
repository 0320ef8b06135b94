"""Preference pairs of a model and itself with heads silenced: what the heads are for is in the difference.

    chosen      what the model writes after the prompt, greedily
    rejected    what it writes with the heads' outputs set to zero (z = 0, that is their columns of W_O)

Prompts on which the two are equal (as answers are compared), or either is empty, say nothing and are dropped. With
retrieval heads this is RetMask (arXiv 2601.11020), whose pairs train by DPO; any head set will do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headtune.analysis.models import hooks
from headtune.analysis.models.generation import generate, padding_id
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.chat import as_chat
from headtune.analysis.tasks.prompt_tokens import token_ids
from headtune.analysis.tasks.task import Example, Task, normalise
from headtune.analysis.tasks.tokenized import check_prompt_length, continuation
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.progress import Progress, silent

TOKENS = 32  # written at most, where the task's answers do not say


def self_contrast(
    model: HeadModel,
    task: Task,
    heads: Sequence[tuple[int, int]],
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> Task:
    """A task for `dpo`: each prompt with what the model writes as the answer, and what it writes silenced as incorrect.

    A text ends at the end of its first line.

    Args:
        heads: (layer, head) of those to silence.
        max_tokens: written at most; None: as many as the prompt's first answer has, so that needles are written in full
            and no further.

    Raises:
        InputError: no heads or none of the model's, a prompt too long for it, or no pair left.
    """
    if not heads:
        raise InputError("self-contrast without heads to silence; choose at least one")
    hooks.require_heads(model, heads)
    more = max_tokens or TOKENS
    check_prompt_length(task, model.tokenizer, model.positions, more, vocabulary=model.vocabulary)
    special = not task.chat_template
    dropped: Counter[str] = Counter()
    examples: list[Example] = []
    written = as_chat(task, model.tokenizer).examples
    for index in progress(list(range(len(written))), "writing pairs"):
        prompt = written[index].prompt
        ids = torch.tensor(token_ids(model.tokenizer, [prompt], special)[0])
        n = max_tokens or _length(model, written[index], ids, special)
        chosen = _write(model, ids, n)
        with hooks.ablate(model, heads):
            rejected = _write(model, ids, n)
        if not chosen or not rejected:
            dropped["nothing is written"] += 1
        elif normalise(chosen) == normalise(rejected):
            dropped["both write the same"] += 1
        else:
            example = task.examples[index]
            pair = Example(example.prompt, example.subject, (chosen,), (), None, (rejected,), example.spans)
            examples.append(replace(pair, messages=example.messages))
    if not examples:
        why = ", ".join(f"{reason} ({count})" for reason, count in dropped.most_common())
        raise InputError(
            f"task {task.name!r}: no pair is left of {len(written)} prompts: {why}; silence other or more heads"
        )
    about: dict[str, Any] = {"generator": "pairs", "task": task.name, "silenced": [list(head) for head in heads]}
    if dropped:
        about["dropped"] = dict(dropped)
    return replace(task, name=f"{task.name} pairs", examples=tuple(examples), kind="exact_match", about=about)


def _length(model: HeadModel, example: Example, ids: Tensor, special: bool) -> int:
    """Tokens of the first answer after the prompt."""
    text = example.prompt + continuation(example.prompt, example.remaining[0])
    return max(1, len(token_ids(model.tokenizer, [text], special)[0]) - len(ids))


def _write(model: HeadModel, ids: Tensor, n: int) -> str:
    """The first line of at most `n` tokens, without the space before it."""
    tokens = ids[None].to(model.device)
    output = generate(model.hf, tokens, torch.ones_like(tokens), n, padding_id(model.hf, model.tokenizer))
    text = str(model.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
    return text.split("\n", 1)[0].strip()
