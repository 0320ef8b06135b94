"""What scores are contrasted with: the answers of the task's other subjects."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Set

PERMUTATIONS = 100  # of the answers among subjects, at most


def other_answers(answers: Mapping[str, Set[int]]) -> dict[str, tuple[tuple[int, float], ...]]:
    """Each subject's `Encoded.others`: (token, weight) of the other subjects' answers.

    Args:
        answers: subject -> first tokens of its answers.
    """
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
    return weights
