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

from headtune.train.config.methods import ReplayConfig
from headtune.train.trainer.rows import TrainingRow


def sample(rows: Sequence[TrainingRow], block: ReplayConfig, seed: str) -> list[TrainingRow]:
    """A task's share of the buffer, in the order of the task: at least one row, at most all."""
    return drawn(rows, block.count if block.count is not None else max(1, round((block.ratio or 0) * len(rows))), seed)


def drawn(rows: Sequence[TrainingRow], count: int | Literal["all"], seed: str) -> list[TrainingRow]:
    """A random sample of rows, in their order: `count` of them, or all where there are no more."""
    n = len(rows) if count == "all" else min(count, len(rows))
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), n))]


@dataclass(frozen=True)
class Replay:
    """When which row of the buffer is seen again.

    Attributes:
        rows: the buffer.
        per_batch: how many of them belong to one batch of a process, on average.
        seed: of the order.
    """

    rows: Sequence[TrainingRow]
    per_batch: float
    seed: str

    def due(self, batch: int, process: int = 0, processes: int = 1) -> list[TrainingRow]:
        """The rows that go with the `batch`-th batch (from 0) of a process; every process gets as many."""
        first, last = (int(index * self.per_batch + 1e-9) for index in (batch, batch + 1))
        return [self._visit(index * processes + process) for index in range(first, last)]

    def _visit(self, index: int) -> TrainingRow:
        turn, place = divmod(index, len(self.rows))
        order = list(range(len(self.rows)))
        random.Random(f"{self.seed}/{turn}").shuffle(order)
        return self.rows[order[place]]
