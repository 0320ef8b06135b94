"""Heads to compare chosen ones with: as many in each layer, drawn at random, the largest others, or with the least
evidence.

One more control, another task's heads, is a head set that the caller has.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np

from headtune.analysis.methods.scores import Array, Scores
from headtune.analysis.utils.errors import InputError

from .ranking import rule_for
from .roles import Role


def random_like(heads: Sequence[tuple[int, int]], n_heads: int, seed: int) -> list[tuple[int, int]]:
    """Random heads, as many in each layer as `heads` has, none of `heads`.

    Where more than half of a layer is chosen, all its other heads, filled up with chosen ones drawn at random.

    Args:
        n_heads: in each layer.
    """
    generator = random.Random(seed)
    drawn = []
    for layer in sorted({layer for layer, _ in heads}):
        taken = sorted({head for each, head in heads if each == layer})
        others = [head for head in range(n_heads) if head not in taken]
        if len(others) >= len(taken):
            picked = generator.sample(others, len(taken))
        else:
            picked = others + generator.sample(taken, len(taken) - len(others))
        drawn += [(layer, head) for head in picked]
    return drawn


def random_sets(
    heads: Sequence[tuple[int, int]],
    shape: tuple[int, int],
    n: int,
    seed: int,
    exclude: Sequence[tuple[int, int]] = (),
) -> list[tuple[tuple[int, int], ...]]:
    """Up to `n` different random sets like `heads`: as many heads in each layer, none of `heads`, none of `exclude`.

    Where the layers hold fewer than `n` such sets, each head is drawn from its own layer and the nearest others, as
    many as it takes. All sets there are, where even the whole model holds no more.

    Args:
        shape: layers, and heads in each.
    """
    n_layers, n_heads = shape
    barred = {*heads, *exclude}
    counts = {layer: sum(each == layer for each, _ in heads) for layer in sorted({layer for layer, _ in heads})}
    for reach in range(n_layers):
        pools = {
            layer: [
                (near, head)
                for near in range(max(0, layer - reach), min(n_layers, layer + reach + 1))
                for head in range(n_heads)
                if (near, head) not in barred
            ]
            for layer in counts
        }
        # With reach, layers' pools overlap: an upper bound, and what is drawn twice is drawn again.
        if math.prod(math.comb(len(pools[layer]), count) for layer, count in counts.items()) >= (2 * n if reach else n):
            break
    generator = random.Random(seed)
    if not reach and math.prod(math.comb(len(pools[layer]), count) for layer, count in counts.items()) <= 4 * n:
        each = [list(itertools.combinations(pools[layer], count)) for layer, count in counts.items()]
        every = [tuple(sorted(itertools.chain(*parts))) for parts in itertools.product(*each)]
        return generator.sample(every, min(n, len(every)))
    drawn: dict[tuple[tuple[int, int], ...], None] = {}
    for _ in range(50 * n):
        taken: set[tuple[int, int]] = set()
        for layer, count in counts.items():
            free = [head for head in pools[layer] if head not in taken]
            taken |= set(generator.sample(free, min(count, len(free))))
        if len(taken) == len(heads):
            drawn[tuple(sorted(taken))] = None
        if len(drawn) == n:
            break
    return list(drawn)


def best_in_layers(
    order: Array, like: Sequence[tuple[int, int]], exclude: Sequence[tuple[int, int]] = (), neighbours: bool = False
) -> list[tuple[int, int]]:
    """For each of `like`, the head of its layer with the least `order` (`[n_layers, n_heads]`), none twice.

    None of `like` or `exclude`. Where a layer runs out of other heads, fewer than asked for, or with `neighbours` those
    of the nearest layers (below before above).
    """
    barred = {*like, *exclude}
    n_layers = len(order)
    drawn: list[tuple[int, int]] = []
    for layer in sorted({layer for layer, _ in like}):
        count = sum(each == layer for each, _ in like)
        for near in sorted(range(n_layers), key=lambda each: (abs(each - layer), each)) if neighbours else [layer]:
            others = [(near, int(head)) for head in np.argsort(order[near], kind="stable")]
            others = [head for head in others if head not in barred][:count]
            drawn, count = drawn + others, count - len(others)
            barred |= set(others)
            if not count:
                break
    return drawn


def largest(norms: Array, like: Sequence[tuple[int, int]], exclude: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The control matched in size: for each of `like`, the head of its layer that writes most, by `norms`.

    Args:
        norms: `[n_layers, n_heads]`, such as `output_norms`.

    None of `like` or `exclude`, none twice; fewer than asked for where a layer runs out of other heads.
    """
    return best_in_layers(-norms, like, exclude)


def lowest(
    scores: Scores, role: Role | str, like: Sequence[tuple[int, int]], by: str = "contrast"
) -> list[tuple[int, int]]:
    """The control of least evidence: for each of `like`, the head of its layer with the score nearest to zero.

    None of `like`, none twice; fewer than asked for where a layer runs out of other heads.
    """
    return best_in_layers(np.abs(scores.mean(rule_for(role, scores, by).rank)), like)


def random_anywhere(
    heads: Sequence[tuple[int, int]], shape: tuple[int, int], seed: int, exclude: Sequence[tuple[int, int]] = ()
) -> list[tuple[int, int]]:
    """As many random heads of the whole model (of `shape`: layers, heads in each), none of `heads` or `exclude`.

    Raises:
        InputError: the model has too few others.
    """
    others = sorted({(layer, head) for layer in range(shape[0]) for head in range(shape[1])} - {*heads, *exclude})
    if len(others) < len(heads):
        raise InputError(f"{len(heads)} other heads are asked for, and the model has {len(others)}; choose fewer heads")
    return sorted(random.Random(seed).sample(others, len(heads)))
