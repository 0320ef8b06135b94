"""Types that rooms share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headtune.analysis.heads.head_set import RankedHead
from headtune.analysis.methods.scores import Scores
from headtune.analysis.tasks.task import Task
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.stats import rate_interval

# The model and the share of training done, to named terms and the weights with which they are added to the loss.
Penalty = Callable[[Any, float], dict[str, tuple[Tensor, float]]]


ACCURACY = "probe.accuracy"


def require_enough(top: int, n: int) -> None:
    """InputError where more heads are asked for than there are."""
    if top > n:
        raise InputError(f"asked for the top {top} heads, the model has {n}; lower top")


@dataclass(frozen=True)
class ProbeResult:
    """What the heads' outputs tell about true and false.

    Attributes:
        scores: `probe.accuracy` of every statement, 1 where the held-out probe is right, else 0; its mean is the
            accuracy and its subjects give intervals.
        directions: `[n_layers, n_heads, head_dim]` theta, float32, in main memory.
        sigma: `[n_layers, n_heads]` spread along theta, float32.
        note: JSON-able: the statements, folds and seed.
    """

    scores: Scores
    directions: Tensor
    sigma: Tensor
    note: dict[str, Any]

    @property
    def accuracy(self) -> Tensor:
        """`[n_layers, n_heads]` share of all statements that the probe gets right while their fold is held out."""
        return torch.from_numpy(self.scores.mean(ACCURACY))

    def read(self, task: Task, seed: int, per_prompt: int | None) -> bool:
        """Whether these are the statements that `read_statements` would read."""
        expected = {"sha256": task.sha256, "seed": seed, "per_prompt": per_prompt}
        return all(self.note[key] == value for key, value in expected.items())

    def ranked(self, top: int) -> tuple[RankedHead, ...]:
        """The `top` heads by accuracy, best first (ties in order of layer and head), with intervals over subjects.

        Raises:
            InputError: more heads than there are.
        """
        require_enough(top, self.sigma.numel())
        n_heads = self.sigma.shape[1]
        low, high = rate_interval(self.scores.by_example[ACCURACY], self.scores.subjects)
        order = self.accuracy.flatten().sort(descending=True, stable=True).indices[:top].tolist()
        return tuple(
            RankedHead(
                layer,
                head,
                float(self.accuracy[layer, head]),
                (float(low[layer, head]), float(high[layer, head])),
                {"sigma": float(self.sigma[layer, head])},
            )
            for layer, head in (divmod(index, n_heads) for index in order)
        )
