"""What chosen heads are compared with: random sets, the largest other heads, those of the least evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest

from headtune.analysis.heads.controls import largest, lowest, random_sets
from headtune.analysis.methods.scores import Scores

Heads = Sequence[tuple[int, int]]
CHOSEN = [(0, 1), (2, 0), (2, 3), (5, 8)]


def layers(heads: Heads) -> Counter[int]:
    return Counter(layer for layer, _ in heads)


# --- random sets ------------------------------------------------------------------------------------------------------


def test_random_sets_are_distinct_matched_and_of_other_heads() -> None:
    excluded = [(0, 3), (2, 4), (5, 0), (1, 1)]
    for seed in range(5):
        sets = random_sets(CHOSEN, (6, 9), 50, seed, excluded)
        assert len(sets) == len({frozenset(each) for each in sets}) == 50
        for each in sets:
            assert layers(each) == layers(CHOSEN) and len(set(each)) == len(CHOSEN)
            assert not set(each) & {*CHOSEN, *excluded}
            assert all(0 <= layer < 6 and 0 <= head < 9 for layer, head in each)


def test_random_sets_are_seeded_and_use_all_that_is_free() -> None:
    drawn = random_sets(CHOSEN, (6, 9), 50, 3)
    assert drawn == random_sets(CHOSEN, (6, 9), 50, 3) != random_sets(CHOSEN, (6, 9), 50, 4)
    assert drawn[:20] == random_sets(CHOSEN, (6, 9), 20, 3), "asking for more goes on where fewer end"
    everyone = {head for each in random_sets(CHOSEN, (6, 9), 400, 0) for head in each}
    assert everyone == {(layer, head) for layer in (0, 2, 5) for head in range(9)} - set(CHOSEN)


def test_random_sets_take_each_head_about_as_often() -> None:
    counts = Counter(head for each in random_sets([(1, 0), (1, 1)], (3, 30), 300, 0) for head in each)
    assert len(counts) == 28 and min(counts.values()) >= 8 and max(counts.values()) <= 36  # 21.4 expected


@pytest.mark.parametrize("n", [9, 28, 40])
def test_where_the_layers_hold_few_sets_every_one_is_drawn(n: int) -> None:
    """Two of eight others: 28 pairs. Asked for more, heads of the nearest layers come in."""
    sets = random_sets([(1, 8), (1, 9)], (3, 10), n, 0)
    pairs = {frozenset(((1, a), (1, b))) for a, b in combinations(range(8), 2)}
    drawn = {frozenset(each) for each in sets}
    assert len(drawn) == len(sets) == n
    assert (drawn <= pairs) == (n <= 28)
    assert n != 28 or drawn == pairs


def test_random_sets_widen_to_the_nearest_layers_alone() -> None:
    chosen = [(4, head) for head in range(3)]  # of four: the layer itself has one other head
    sets = random_sets(chosen, (9, 4), 20, 0)
    assert len(sets) == 20 and all(set(layers(each)) <= {3, 4, 5} for each in sets)
    assert all(len(set(each)) == 3 and not set(each) & set(chosen) for each in sets)
    more = random_sets(chosen, (9, 4), 300, 0)
    assert len(more) == 300 and {layer for each in more for layer in layers(each)} == {2, 3, 4, 5, 6}
    barred = [(layer, head) for layer in (3, 5) for head in range(4)]
    past = random_sets(chosen, (9, 4), 20, 0, barred)
    assert len(past) == 20 and {layer for each in past for layer in layers(each)} <= {2, 4, 6}


def test_all_sets_there_are_where_the_whole_model_holds_no_more() -> None:
    chosen = [(0, 0), (1, 1)]
    others = [(0, 1), (0, 2), (1, 0), (1, 2)]
    sets = random_sets(chosen, (2, 3), 50, 0)
    assert {frozenset(each) for each in sets} == {frozenset(pair) for pair in combinations(others, 2)}
    assert len(sets) == 6
    assert random_sets(chosen, (2, 3), 50, 0, others[:2]) == [((1, 0), (1, 2))]
    assert random_sets(chosen, (2, 3), 50, 0, others[:3]) == [], "one head is no pair"
    assert random_sets([(0, 0), (0, 1), (0, 2)], (1, 3), 50, 0) == []
    assert random_sets(CHOSEN, (6, 9), 0, 0) == []


# --- the largest other heads ------------------------------------------------------------------------------------------


def test_largest_takes_the_heads_that_write_most_of_the_same_layers() -> None:
    norms = np.array([[1, 9, 3, 4], [9, 9, 9, 9], [5, 1, 2, 8]], np.float32)
    assert largest(norms, [(0, 0)], []) == [(0, 1)]
    assert largest(norms, [(0, 1), (2, 1)], []) == [(0, 3), (2, 3)]
    assert largest(norms, [(0, 1)], [(0, 3)]) == [(0, 2)]
    assert largest(norms, [(2, 3), (2, 0)], []) == [(2, 2), (2, 1)]
    assert largest(norms, [(2, 3), (2, 0)], [(2, 2)]) == [(2, 1)], "fewer where a layer runs out"
    assert largest(norms, [(0, head) for head in range(4)], []) == largest(norms, [], []) == []


# --- the control of least evidence ------------------------------------------------------------------------------------


def scores_of(quantities: dict[str, dict[tuple[int, int], float]]) -> Scores:
    """Every head has a score of -1, those named their own."""
    by_example = {}
    for name, effects in quantities.items():
        values = np.full((4, 4, 5), -1.0, np.float32)
        for (layer, head), effect in effects.items():
            values[:, layer, head] = effect
        by_example[name] = values
    return Scores(by_example, list("abcd"))


def test_lowest_takes_the_heads_nearest_to_zero_of_the_same_layers() -> None:
    scores = scores_of({"dla.target": {(1, 2): 2, (3, 4): 3, (1, 4): 0.1, (1, 0): -0.2, (3, 0): 0.3, (3, 1): -0.1}})
    assert lowest(scores, "recall", [(1, 2)]) == [(1, 4)]
    assert lowest(scores, "recall", [(3, 4), (1, 2)]) == [(1, 4), (3, 1)]
    assert lowest(scores, "recall", [(1, 2), (1, 4)]) == [(1, 0), (1, 1)], "the chosen are no control of themselves"
    assert lowest(scores, "recall", []) == []


def test_lowest_of_a_crowded_layer_is_what_is_left() -> None:
    scores = scores_of({"dla.target": {}})
    found = lowest(scores, "recall", [(2, head) for head in range(4)])
    assert found == [(2, 4)] and lowest(scores, "recall", [(2, head) for head in range(5)]) == []


def test_lowest_is_by_the_score_that_ranks() -> None:
    scores = scores_of({"dla.previous": {(1, 3): 0}, "dla.target": {(1, 4): 0}, "dla.target_contrast": {(1, 1): 0}})
    assert lowest(scores, "suppression", [(1, 0)]) == [(1, 3)]
    assert lowest(scores, "recall", [(1, 0)]) == [(1, 1)]
    assert lowest(scores, "recall", [(1, 0)], by="raw") == [(1, 4)]
