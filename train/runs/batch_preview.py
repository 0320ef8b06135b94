"""What a batch teaches: the text of its rows with the tokens marked that the loss is taken on.

sft, sequence   tokens whose label is not -100
dpo             the continuation of each side
answer_set      nothing of the prompt; after it, which first tokens are right and which were given already
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PreviewRow:
    """One row of a batch.

    Attributes:
        parts: the text in order, each part with whether it is learnt on.
        side: `chosen` or `rejected` under dpo.
        right: first tokens of which any is right next, under answer_set; given: those that were given already.
    """

    parts: tuple[tuple[str, bool], ...]
    side: str = ""
    right: tuple[str, ...] = ()
    given: tuple[str, ...] = ()


def rows_of(batch: Mapping[str, Any], tokenizer: Any) -> list[PreviewRow]:
    """The rows of a collated batch; padding is left out. Under dpo the rejected follow all the chosen."""
    tokens = batch["input_ids"].tolist()
    present = batch["attention_mask"].tolist() if "attention_mask" in batch else [[1] * len(row) for row in tokens]
    more: list[dict[str, Any]]
    if "remaining" in batch:
        sets = zip(batch["remaining"].tolist(), batch["previous"].tolist(), strict=True)
        masks: list[list[bool]] = [[False] * len(row) for row in tokens]
        more = [{"right": _each(right, tokenizer), "given": _each(earlier, tokenizer)} for right, earlier in sets]
    elif "completion_mask" in batch and "labels" not in batch:
        masks = [[bool(value) for value in row] for row in batch["completion_mask"].tolist()]
        more = [{"side": "chosen" if index < len(tokens) // 2 else "rejected"} for index in range(len(tokens))]
    else:
        masks = [[label != -100 for label in row] for row in batch["labels"].tolist()]
        more = [{} for _ in tokens]
    return [
        PreviewRow(parts([token for token, here in zip(row, there, strict=True) if here],
                  [learnt for learnt, here in zip(mask, there, strict=True) if here], tokenizer), **extra)
        for row, mask, there, extra in zip(tokens, masks, present, more, strict=True)
    ]  # fmt: skip


def parts(tokens: Sequence[int], learnt: Sequence[bool], tokenizer: Any) -> tuple[tuple[str, bool], ...]:
    """Neighbouring tokens of the same kind as one text."""
    pieces, start = [], 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or learnt[end] != learnt[start]:
            pieces.append((tokenizer.decode(list(tokens[start:end])), bool(learnt[start])))
            start = end
    return tuple(pieces)


def _each(tokens: Sequence[int], tokenizer: Any) -> tuple[str, ...]:
    return tuple(tokenizer.decode([token]) for token in tokens if token >= 0)
