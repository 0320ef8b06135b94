"""Teachers of rows of text: the attention of some heads at some queries, and the logits at label positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headtune.analysis.utils.errors import InputError
from headtune.train.losses.attention_distillation import TopLogits

Heads = Mapping[int, Sequence[int]]  # layer -> heads


@dataclass(frozen=True, eq=False)
class Teacher:
    """What is kept of one row of text, in the row's own positions, without padding.

    Attributes:
        positions: query positions, sorted; empty where only logits are kept.
        heads: layer -> query heads.
        attention: layer -> `[len(heads[layer]), T, keys]` float32 probabilities, keys up to the last position.
        logits: `[labels, vocabulary]` raw float32 logits at the positions whose next token is a label (`label_mask`),
            or their `TopLogits`.
    """

    positions: list[int]
    heads: dict[int, list[int]]
    attention: dict[int, Tensor]
    logits: Tensor | TopLogits


@dataclass(frozen=True, eq=False)
class TeacherBatch:
    """Teachers of a batch padded on the right, in the layout that `attention_distillation` and `logit_kl` take.

    Attributes:
        positions: `[batch, T]` query positions, -1 where there is none.
        heads: layer -> query heads: those of any row.
        attention: layer -> `[batch, len(heads[layer]), T, keys]` float32 probabilities, 0 where there is none.
        present: layer -> `[batch, len(heads[layer]), T]` bool.
        logits: of the label positions of all rows that have a teacher, in order; None if no row has one.
    """

    positions: Tensor
    heads: dict[int, list[int]]
    attention: dict[int, Tensor]
    present: dict[int, Tensor]
    logits: Tensor | TopLogits | None


def collate_teachers(
    teachers: Sequence[Teacher | None], length: int, device: torch.device | str = "cpu"
) -> TeacherBatch:
    """Teachers of a batch of rows padded on the right to `length` tokens; None for a row that has none.

    Raises:
        InputError: a row is longer than `length`.
    """
    present_teachers = [teacher for teacher in teachers if teacher is not None]
    if too_long := [at for teacher in present_teachers for at in teacher.positions[-1:] if at >= length]:
        raise InputError(f"a teacher's query position {too_long[0]} in a batch of {length} tokens")
    union = by_layer({pair for teacher in present_teachers for pair in pairs_of(teacher.heads)})
    n_queries = max((len(teacher.positions) for teacher in present_teachers), default=0)
    positions = torch.full((len(teachers), n_queries), -1)
    attention = {layer: torch.zeros(len(teachers), len(some), n_queries, length) for layer, some in union.items()}
    present = {layer: torch.zeros(len(teachers), len(some), n_queries).bool() for layer, some in union.items()}
    for row, teacher in enumerate(teachers):
        if teacher is None:
            continue
        n = len(teacher.positions)
        positions[row, :n] = torch.tensor(teacher.positions, dtype=torch.long)
        for layer, some in teacher.heads.items():
            at = [union[layer].index(head) for head in some]
            attention[layer][row, at, :n, : teacher.positions[-1] + 1] = teacher.attention[layer]
            present[layer][row, at, :n] = True
    return TeacherBatch(
        positions.to(device),
        union,
        {layer: rows.to(device) for layer, rows in attention.items()},
        {layer: rows.to(device) for layer, rows in present.items()},
        _concatenated([teacher.logits for teacher in present_teachers], device),
    )


def by_layer(pairs: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Layer -> heads, both sorted."""
    heads: dict[int, list[int]] = {}
    for layer, head in sorted(pairs):
        heads.setdefault(layer, []).append(head)
    return heads


def pairs_of(heads: Heads) -> list[tuple[int, int]]:
    return [(layer, head) for layer, chosen in heads.items() for head in chosen]


def visible_keys(positions: Sequence[int]) -> Tensor:
    """`[T, last position + 1]` bool: the keys that each query sees."""
    queries = torch.tensor(positions, dtype=torch.long)
    return torch.arange(max(positions, default=-1) + 1) <= queries[:, None]


def _concatenated(logits: Sequence[Tensor | TopLogits], device: torch.device | str) -> Tensor | TopLogits | None:
    whole = [part for part in logits if isinstance(part, Tensor)]
    if whole:
        return torch.cat(whole).to(device)
    top = [part for part in logits if isinstance(part, TopLogits)]
    if not top:
        return None
    tokens, largest, rest = (torch.cat([getattr(part, name) for part in top]) for name in ("tokens", "logits", "rest"))
    return TopLogits(tokens, largest, rest).to(device)
