"""Examples in tokens: positions of the subject and of each previous answer, and the answers' first tokens."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from headtune.analysis.utils.errors import InputError

from .chat import as_chat, chat_examples, place_of
from .messages import chat_entry
from .spans import ranges
from .task import Example, Task

PERMUTATIONS = 100  # of the answers among subjects, at most


@dataclass(frozen=True)
class Encoded:
    """An example in tokens. The answer would follow the last one.

    Attributes:
        example: where it comes from.
        tokens: `[seq]` ids.
        subject: positions of the subject's tokens (its first occurrence).
        previous: positions of each previous answer's tokens, in order.
        target_tokens: first tokens of the remaining answers, sorted.
        previous_tokens: first tokens of the previous answers, in order, each once.
        ambiguous: first tokens left out of both because a remaining and a previous answer share them.
        corrupt: `[seq]` ids of the example's own counterpart prompt, if it has one.
        others: (token, weight) of the other subjects' answers, what scores are contrasted with: each other subject
            counts the same, and so do its first tokens; less the first tokens of this subject's own answers. The
            weights sum to 1: a mean over permutations of the answers among subjects, over all of them where there are
            at most `PERMUTATIONS` other subjects. Empty where all subjects have the same answers.
    """

    example: Example
    tokens: Tensor
    subject: tuple[int, ...]
    previous: tuple[tuple[int, ...], ...]
    target_tokens: tuple[int, ...]
    previous_tokens: tuple[int, ...]
    ambiguous: tuple[int, ...] = ()
    corrupt: Tensor | None = None
    others: tuple[tuple[int, float], ...] = ()
    spans: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return len(self.tokens) - 1

    def sources(self) -> dict[str, list[int]]:
        """Source groups that partition the positions: subject, previous_1.., end, first, rest (in this precedence)."""
        groups: dict[str, list[int]] = {"subject": list(self.subject)}
        for index, span in enumerate(self.previous, start=1):
            groups[f"previous_{index}"] = list(span)
        groups |= {"end": [self.end], "first": [0]}
        taken: set[int] = set()
        for name, positions in groups.items():
            groups[name] = [position for position in positions if position not in taken]
            taken |= set(positions)
        groups["rest"] = [position for position in range(len(self.tokens)) if position not in taken]
        return groups


@dataclass
class EncodedTask:
    """The examples that first-token scores can use, and why others were left out."""

    task: Task
    examples: list[Encoded] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    ambiguous_tokens: int = 0

    @property
    def n_subjects(self) -> int:
        """About how many subjects the examples are; intervals resample these."""
        return len({encoded.example.subject for encoded in self.examples})

    def summary(self) -> dict[str, Any]:
        """The `task` block of heads.json."""
        return {
            "name": self.task.name,
            "sha256": self.task.sha256,
            "n_examples": len(self.examples),
            "n_subjects": self.n_subjects,
            "n_dropped": sum(self.dropped.values()),
            "dropped": dict(self.dropped),
            "n_ambiguous_first_tokens": self.ambiguous_tokens,
            **chat_entry(self.task.chat_template),
            **({"about": dict(self.task.about)} if self.task.about else {}),
        }


def reasons(dropped: Mapping[str, int]) -> str:
    """Why examples were left out, in words: `tokens merge across the end of the prompt (4)`."""
    return ", ".join(f"{reason} ({count})" for reason, count in dropped.items())


def continuation(prompt: str, answer: str) -> str:
    """The answer as it would follow the prompt: with a space unless the prompt already ends in white space."""
    return answer if prompt[-1:].isspace() or not prompt else " " + answer


def first_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    prompt_ids: Sequence[int],
    answers: Collection[str],
    special: bool = True,
) -> dict[str, int | None]:
    """The first token of each answer after `prompt`; None where tokens merge across the border, so there is none.

    Args:
        special: add the tokenizer's special tokens, as for `prompt_ids`.
    """
    if not answers:
        return {}
    written = [prompt + continuation(prompt, answer) for answer in answers]
    n, border = len(prompt_ids), list(prompt_ids)
    rows = tokenizer(written, add_special_tokens=special).input_ids
    return {
        answer: int(ids[n]) if len(ids) > n and ids[:n] == border else None
        for answer, ids in zip(answers, rows, strict=True)
    }


def check_prompt_length(
    task: Task, tokenizer: PreTrainedTokenizerBase, positions: int | None, more: int = 0, corrupt: bool = False
) -> None:
    """Refuse a task with a prompt that is too long for the model.

    Args:
        positions: how many tokens the model takes; None: any number.
        more: tokens that come after a prompt.
        corrupt: look at the `corrupt` prompts as well.

    Raises:
        InputError: with the longest prompt.
    """
    if positions is None or not task.examples:
        return
    written = as_chat(task, tokenizer).examples
    prompts = [example.prompt for example in written]
    if corrupt:
        prompts += [example.corrupt for example in written if example.corrupt is not None]
    lengths = [len(row) for row in tokenizer(prompts, add_special_tokens=not task.chat_template).input_ids]
    longest = max(range(len(prompts)), key=lengths.__getitem__)
    if lengths[longest] + more > positions:
        after = f" and what comes after it up to {more}" if more else ""
        raise InputError(
            f"task {task.name!r}: prompt {prompts[longest][:60]!r}... takes {lengths[longest]} tokens{after}, and the "
            f"model takes {positions}; shorten it or leave it out"
        )


def encode(task: Task, tokenizer: PreTrainedTokenizerBase, positions: int | None = None) -> EncodedTask:
    """Tokenise a task and locate spans by character offsets.

    First tokens shared by a remaining and a previous answer say nothing about either and are left out of both; an
    example left without targets, or without previous tokens though it has previous answers, is dropped and counted.

    Args:
        positions: how many tokens the model takes (see `positions_of`); None: any number.

    Raises:
        InputError: the tokenizer gives no offsets, a prompt is too long for the model, a span has no tokens, or no
            example is left.
    """
    if not tokenizer.is_fast:
        raise InputError(f"tokenizer {tokenizer.name_or_path!r} gives no character offsets; use its fast version")
    check_prompt_length(task, tokenizer, positions, corrupt=True)
    result = EncodedTask(task)
    for example, (written, begin) in zip(task.examples, chat_examples(task, tokenizer), strict=True):
        if begin < 0:
            raise InputError(f"{place_of(example)}: the chat template does not keep its subject as it is")
        encoded, reason = _encode_one(written, tokenizer, special=not task.chat_template, begin=begin)
        if encoded is None:
            result.dropped[reason] += 1
        else:
            result.ambiguous_tokens += len(encoded.ambiguous)
            result.examples.append(encoded)
    if not result.examples:
        raise InputError(f"task {task.name!r}: no example can be scored on first tokens: {reasons(result.dropped)}")
    result.examples = _with_others(result.examples)
    return result


def _with_others(examples: Sequence[Encoded]) -> list[Encoded]:
    """The examples, each with its `others`."""
    answers: dict[str, set[int]] = {}
    for encoded in examples:
        tokens = {*encoded.target_tokens, *encoded.previous_tokens, *encoded.ambiguous}
        answers.setdefault(encoded.example.subject, set()).update(tokens)
    weights: dict[str, tuple[tuple[int, float], ...]] = {}
    # Around a circle in random order: permutation k gives each subject the answers of the k-th after it.
    circle = sorted(answers)
    random.Random(0).shuffle(circle)
    for place, subject in enumerate(circle):
        tokens, counted = answers[subject], defaultdict[int, float](float)
        for k in range(1, min(len(circle) - 1, PERMUTATIONS) + 1):
            left = answers[circle[(place + k) % len(circle)]] - tokens
            for token in left:
                counted[token] += 1 / len(left)
        total = sum(counted.values())
        weights[subject] = tuple((token, counted[token] / total) for token in sorted(counted))
    return [replace(encoded, others=weights[encoded.example.subject]) for encoded in examples]


def _encode_one(
    example: Example, tokenizer: PreTrainedTokenizerBase, special: bool, begin: int
) -> tuple[Encoded | None, str]:
    batch = tokenizer(example.prompt, return_offsets_mapping=True, add_special_tokens=special)
    ids, offsets = list(batch.input_ids), batch["offset_mapping"]

    def between(start: int, end: int) -> tuple[int, ...]:
        return tuple(i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a)

    def span(start: int, text: str) -> tuple[int, ...]:
        return between(start, start + len(text))

    # Which tokens the subject and the previous answers are.
    subject = span(example.prompt.index(example.subject, begin), example.subject)
    spans: list[tuple[int, ...]] = []
    cursor = len(example.prompt)
    for answer in reversed(example.previous):
        # From the end backwards: an answer may also occur in the header or inside an earlier one ("York", "New York").
        start = example.prompt.rfind(answer, 0, cursor)
        if start < 0:
            return None, "previous answers not in the prompt's order"
        spans.insert(0, span(start, answer))
        cursor = start
    if not subject or not all(spans):
        return None, "span without tokens"
    named: dict[str, tuple[int, ...]] = {}
    for name, pieces in ranges(example.spans, example.prompt, place_of(example)).items():
        parts = [between(*piece) for piece in pieces]
        if not all(parts):
            raise InputError(f"{place_of(example)}: span {name!r} has a piece without tokens; name a longer text")
        named[name] = tuple(sorted({position for part in parts for position in part}))
    # Which tokens answers begin with; those of a remaining and a previous answer count for neither.
    firsts = first_tokens(tokenizer, example.prompt, ids, [*example.remaining, *example.previous], special)
    targets = {token for answer in example.remaining if (token := firsts[answer]) is not None}
    if not targets:
        return None, "tokens merge across the end of the prompt"
    previous_tokens = [firsts[answer] for answer in example.previous]
    ambiguous = targets & {token for token in previous_tokens if token is not None}
    targets -= ambiguous
    previous = tuple(dict.fromkeys(token for token in previous_tokens if token is not None and token not in ambiguous))
    if not targets or (example.previous and not previous):
        return None, "remaining and previous answers share first tokens"
    corrupt = None
    if example.corrupt is not None:
        corrupt = torch.tensor(tokenizer(example.corrupt, add_special_tokens=special).input_ids)
    return (
        Encoded(
            example,
            torch.tensor(ids),
            subject,
            tuple(spans),
            tuple(sorted(targets)),
            previous,
            tuple(sorted(ambiguous)),
            corrupt,
            spans=named,
        ),
        "",
    )
