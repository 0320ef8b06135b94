"""Heads to compare chosen ones with: as many in each layer, drawn at random, or with the least evidence.

The third control, another task's heads, is a head set that the caller has.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from headtune.analysis.methods.scores import Scores
from headtune.analysis.utils.errors import InputError

from .ranking import rule_for


def random_like(
    heads: Sequence[tuple[int, int]],
    n_heads: int,
    seed: int,
    exclude: Sequence[tuple[int, int]] = (),
    overlap: bool = False,
) -> list[tuple[int, int]]:
    """Random heads, as many in each layer as `heads` has, none of `heads`, none of `exclude` where that is possible.

    Args:
        overlap: where more than half of a layer is chosen, take all its other heads and fill up with chosen ones drawn
            at random, instead of refusing.

    Raises:
        InputError: a layer has too few other heads to draw from, and `overlap` is False.
    """
    generator = random.Random(seed)
    drawn = []
    for layer in sorted({layer for layer, _ in heads}):
        taken = sorted({head for each, head in heads if each == layer})
        barred = {head for each, head in exclude if each == layer}
        others = [head for head in range(n_heads) if head not in taken]
        allowed = [head for head in others if head not in barred]
        if len(allowed) >= len(taken):
            picked = generator.sample(allowed, len(taken))
        elif len(others) >= len(taken):
            picked = generator.sample(others, len(taken))
        elif overlap:
            picked = others + generator.sample(taken, len(taken) - len(others))
        else:
            raise InputError(
                f"layer {layer} has {len(taken)} of its {n_heads} heads chosen, which leaves too few others for a "
                "matched random set; choose fewer heads"
            )
        drawn += [(layer, head) for head in picked]
    return drawn


def lowest(scores: Scores, role: str, like: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The control of least evidence: for each of `like`, the head of its layer with the score nearest to zero.

    None of `like`, none twice; fewer than asked for where a layer runs out of other heads.
    """
    attribution, _, _ = rule_for(role, scores)
    size = np.abs(scores.mean(attribution))
    drawn: list[tuple[int, int]] = []
    for layer in sorted({layer for layer, _ in like}):
        taken = {head for each, head in like if each == layer}
        others = [int(head) for head in np.argsort(size[layer], kind="stable") if int(head) not in taken]
        drawn += [(layer, head) for head in others[: len(taken)]]
    return drawn
