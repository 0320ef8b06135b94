"""Examples in tokens: positions of the subject and of each previous answer, and the answers' first tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from headtune.analysis.utils.errors import InputError

from .answer_starts import Rows, answer_rows, blank_start, starts
from .chat import as_chat, chat_examples, place_of
from .contrast import other_answers
from .messages import chat_entry
from .prompt_tokens import BlankTokens, prefix_ids, require_embeddings, token_ids, with_prefix
from .spans import ranges, subject_start
from .task import Example, Task


@dataclass(frozen=True)
class Encoded:
    """An example in tokens. The answer would follow the last one.

    Attributes:
        example: where it comes from.
        tokens: `[seq]` ids: the prompt's, and the answers' start that is written into it (see `answer_starts`).
        subject: positions of the subject's tokens (its first occurrence).
        previous: positions of each previous answer's tokens, in order.
        target_tokens: first tokens of the remaining answers, sorted; behind the start, where one is written.
        previous_tokens: first tokens of the previous answers, in order, each once.
        ambiguous: first tokens left out of both because a remaining and a previous answer share them.
        corrupt: `[seq]` ids of the example's own counterpart prompt, if it has one.
        others: (token, weight) of the other subjects' answers, what scores are contrasted with: each other subject
            counts the same, and so do its first tokens; less the first tokens of this subject's own answers. The
            weights sum to 1: a mean over permutations of the answers among subjects, over all of them where there are
            at most `contrast.PERMUTATIONS` other subjects. Empty where all subjects have the same answers.
        n_start: how many of the last tokens are the answers' start, which the prompt itself does not hold.
        special: whether the tokenizer's prefix stands in front; a chat template has written its own.
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
    n_start: int = 0
    special: bool = True

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
    blank_answers: int = 0  # not scored: of an example's answers, only these begin with a token of white space alone

    @property
    def n_subjects(self) -> int:
        """About how many subjects the examples are; intervals resample these."""
        return len({encoded.example.subject for encoded in self.examples})

    @property
    def n_started(self) -> int:
        """How many examples have the start of their answers written into the prompt."""
        return sum(encoded.n_start > 0 for encoded in self.examples)

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
            **({"n_blank_first_tokens": self.blank_answers} if self.blank_answers else {}),
            **({"n_started": self.n_started} if self.n_started else {}),
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
        special: the tokenizer's prefix stands in front, as in `prompt_ids`.
    """
    texts = {answer: prompt + continuation(prompt, answer) for answer in answers}
    rows = answer_rows(tokenizer, texts, prompt_ids, special)
    return {answer: row[0] if row else None for answer, row in rows.items()}


def check_prompt_length(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    more: int = 0,
    corrupt: bool = False,
    vocabulary: int | None = None,
) -> None:
    """Refuse a task with a prompt that is too long for the model, or has a token that the model lacks.

    Args:
        positions: how many tokens the model takes; None: any number.
        vocabulary: how many tokens it has embeddings for; None: for all.
        more: tokens that come after a prompt.
        corrupt: look at the `corrupt` prompts as well.

    Raises:
        InputError: with the longest prompt, or the token.
    """
    if (positions is None and vocabulary is None) or not task.examples:
        return
    written = as_chat(task, tokenizer).examples
    prompts = [example.prompt for example in written]
    if corrupt:
        prompts += [example.corrupt for example in written if example.corrupt is not None]
    rows = token_ids(tokenizer, prompts, special=not task.chat_template)
    require_embeddings(tokenizer, rows, vocabulary, f"task {task.name!r}")
    lengths = [len(row) for row in rows]
    longest = max(range(len(prompts)), key=lengths.__getitem__)
    if positions is not None and lengths[longest] + more > positions:
        after = f" and what comes after it up to {more}" if more else ""
        raise InputError(
            f"task {task.name!r}: prompt {prompts[longest][:60]!r}... takes {lengths[longest]} tokens{after}, and the "
            f"model takes {positions}; shorten it or leave it out"
        )


def encode(
    task: Task, tokenizer: PreTrainedTokenizerBase, positions: int | None = None, vocabulary: int | None = None
) -> EncodedTask:
    """Tokenise a task and locate spans by character offsets.

    First tokens that are white space alone say nothing: where all of an example's answers begin so, that start is
    written into the prompt (see `answer_starts`), where only some do, these count for nothing.

    First tokens shared by a remaining and a previous answer say nothing about either and are left out of both; an
    example left without targets, or without previous tokens though it has previous answers, is dropped and counted.

    Args:
        positions: how many tokens the model takes (see `positions_of`); None: any number.
        vocabulary: how many tokens it has embeddings for; None: for all.

    Raises:
        InputError: the tokenizer gives no offsets, a prompt is too long for the model or has a token that it lacks, a
            span has no tokens, or no example is left.
    """
    if not tokenizer.is_fast:
        raise InputError(f"tokenizer {tokenizer.name_or_path!r} gives no character offsets; use its fast version")
    check_prompt_length(task, tokenizer, positions, corrupt=True, vocabulary=vocabulary)
    result, blank = EncodedTask(task), BlankTokens(tokenizer)
    located: list[tuple[Encoded, Rows]] = []
    for example, (written, begin) in zip(task.examples, chat_examples(task, tokenizer), strict=True):
        if begin < 0:
            raise InputError(f"{place_of(example)}: the chat template does not keep its subject as it is")
        encoded, reason = _locate(written, tokenizer, special=not task.chat_template, begin=begin)
        if encoded is None:
            result.dropped[reason] += 1
            continue
        answers = {answer: written.prompt + continuation(written.prompt, answer) for answer in _all_answers(written)}
        located.append((encoded, answer_rows(tokenizer, answers, encoded.tokens.tolist(), encoded.special)))
    numbers = starts([(rows, blank_start(rows, blank)) for _, rows in located])
    for (place, rows), n_start in zip(located, numbers, strict=True):
        require_embeddings(tokenizer, rows.values(), vocabulary, f"task {task.name!r}: answers")
        encoded, reason, n_blank = _with_answers(place, rows, n_start, blank)
        result.blank_answers += n_blank
        if encoded is None:
            result.dropped[reason] += 1
        else:
            result.ambiguous_tokens += len(encoded.ambiguous)
            result.examples.append(encoded)
    if not result.examples:
        raise InputError(f"task {task.name!r}: no example can be scored on first tokens: {reasons(result.dropped)}")
    started = [encoded for encoded in result.examples if encoded.n_start]
    longest = max((len(row) for e in started for row in (e.tokens, e.corrupt) if row is not None), default=0)
    if positions is not None and longest > positions:
        raise InputError(
            f"task {task.name!r}: a prompt with the start of its answers takes {longest} tokens, and the model takes "
            f"{positions}; shorten it or leave it out"
        )
    result.examples = _with_others(result.examples)
    return result


def _with_others(examples: Sequence[Encoded]) -> list[Encoded]:
    """The examples, each with its `others`."""
    answers: dict[str, set[int]] = {}
    for encoded in examples:
        tokens = {*encoded.target_tokens, *encoded.previous_tokens, *encoded.ambiguous}
        answers.setdefault(encoded.example.subject, set()).update(tokens)
    weights = other_answers(answers)
    return [replace(encoded, others=weights[encoded.example.subject]) for encoded in examples]


def _all_answers(example: Example) -> list[str]:
    return [*example.remaining, *example.previous]


def _locate(
    example: Example, tokenizer: PreTrainedTokenizerBase, special: bool, begin: int
) -> tuple[Encoded | None, str]:
    """An example's prompt in tokens, and which of them the subject, the previous answers and the spans are."""
    batch = tokenizer(example.prompt, return_offsets_mapping=True, add_special_tokens=False)
    ids = with_prefix(tokenizer, prefix_ids(tokenizer, special), batch.input_ids)
    offsets = [(0, 0)] * (len(ids) - len(batch.input_ids)) + batch["offset_mapping"]

    def between(start: int, end: int) -> tuple[int, ...]:
        return tuple(i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a)

    def span(start: int, text: str) -> tuple[int, ...]:
        return between(start, start + len(text))

    # Which tokens the subject and the previous answers are.
    subject = span(subject_start(example.prompt, example.subject, begin), example.subject)
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
    corrupt = None
    if example.corrupt is not None:
        corrupt = torch.tensor(token_ids(tokenizer, [example.corrupt], special)[0])
    tokens = torch.tensor(ids)
    return Encoded(example, tokens, subject, tuple(spans), (), (), (), corrupt, spans=named, special=special), ""


def _with_answers(encoded: Encoded, rows: Rows, n_start: int, blank: BlankTokens) -> tuple[Encoded | None, str, int]:
    """The example with what its answers begin with: `(example or None, why it is left out, blank answers)`."""
    example = encoded.example
    # Which tokens answers begin with; white space alone counts for none of them.
    firsts = {answer: row[n_start] for answer, row in rows.items() if row}
    if not any(answer in firsts for answer in example.remaining):
        return None, "tokens merge across the end of the prompt", 0
    n_blank = sum(blank(token) for token in firsts.values())
    firsts = {answer: token for answer, token in firsts.items() if not blank(token)}
    targets = {firsts[answer] for answer in example.remaining if answer in firsts}
    previous_tokens = [firsts[answer] for answer in example.previous if answer in firsts]
    if not targets or (example.previous and n_blank and not previous_tokens):
        return None, "answers begin with white space alone", n_blank
    # Those of a remaining and a previous answer count for neither.
    ambiguous = targets & set(previous_tokens)
    targets -= ambiguous
    previous = tuple(dict.fromkeys(token for token in previous_tokens if token not in ambiguous))
    if not targets or (example.previous and not previous):
        return None, "remaining and previous answers share first tokens", n_blank
    # The start of the answers goes into the prompt and into its counterpart.
    start = torch.tensor(next(row for row in rows.values() if row)[:n_start], dtype=torch.long)
    corrupt = None if encoded.corrupt is None else torch.cat([encoded.corrupt, start])
    return (
        replace(
            encoded,
            tokens=torch.cat([encoded.tokens, start]),
            corrupt=corrupt,
            target_tokens=tuple(sorted(targets)),
            previous_tokens=previous,
            ambiguous=tuple(sorted(ambiguous)),
            n_start=n_start,
        ),
        "",
        n_blank,
    )
