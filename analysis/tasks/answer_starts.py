"""The tokens of answers after their prompts, and from which on they tell answers apart.

Answers are told apart by one token. Some tokenizers write a number, or Chinese, after a space as a bare space and the
rest (` 1969` as ` `, `1`, `9`, `6`, `9`), and the space says nothing. Such a start is written into the prompt: the
space, and then what all answers of these examples of the task have in common (`1`), so that the token that is scored
is the first that differs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .prompt_tokens import BlankTokens, token_ids

Rows = dict[str, tuple[int, ...]]


def answer_rows(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], prompt_ids: Sequence[int], special: bool = True
) -> Rows:
    """The tokens of each answer after a prompt; none where tokens merge across the border.

    Args:
        texts: answer -> the prompt with the answer behind it.
        prompt_ids: the prompt's tokens.
        special: the tokenizer's prefix stands in front, as in `prompt_ids`.
    """
    n, border = len(prompt_ids), list(prompt_ids)
    rows = token_ids(tokenizer, list(texts.values()), special)
    return {answer: tuple(ids[n:]) if ids[:n] == border else () for answer, ids in zip(texts, rows, strict=True)}


def blank_start(rows: Rows, blank: BlankTokens) -> int:
    """How many tokens of white space alone all answers begin with; those without tokens aside."""
    present = [row for row in rows.values() if row]
    return blank.count(present[0][: common_start(present)]) if present else 0


def common_start(rows: Collection[Sequence[int]]) -> int:
    """How many first tokens all rows share, where each keeps one at least."""
    columns = zip(*(row[:-1] for row in rows), strict=False)
    return next((n for n, column in enumerate(columns) if len(set(column)) > 1), min(map(len, rows)) - 1)


def starts(examples: Iterable[tuple[Rows, int]]) -> list[int]:
    """How many first tokens of its answers go into the prompt, one number an example.

    Args:
        examples: the answers of each, and its `blank_start`. All examples of a task that have one share what is
            written behind the white space, so that answers are told apart between subjects as well.
    """
    pairs = list(examples)
    behind = {row[n:] for rows, n in pairs if n for row in rows.values() if row}
    shared = common_start(behind) if len(behind) > 1 else 0
    return [n + shared if n else 0 for _, n in pairs]


def beginnings(task: Mapping[str, Any]) -> str:
    """What a task's `summary` says of answers that begin with a token of white space alone; empty if there are none."""
    parts = []
    if started := task.get("n_started"):
        parts.append(
            f"in {started} prompts every answer begins with a token of white space alone: it is written into the "
            "prompt, with what these answers have in common behind it, and the token after that is scored"
        )
    if blank := task.get("n_blank_first_tokens"):
        parts.append(f"{blank} answers that begin with one, beside others that do not, are not scored")
    return "; ".join(parts)
