"""Controls that are matched to chosen heads: none shared, none twice, the nearest layers where one runs out."""

from __future__ import annotations

import numpy as np
import pytest

from headtune.analysis.heads.controls import best_in_layers, random_anywhere
from headtune.analysis.utils.errors import InputError

ORDER = np.array([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0], [9.0, 8.0, 7.0]])


def test_the_least_of_each_layer_that_are_neither_chosen_nor_barred() -> None:
    assert best_in_layers(ORDER, [(0, 1), (1, 0)]) == [(0, 2), (1, 2)]
    assert best_in_layers(ORDER, [(0, 1), (1, 0)], exclude=[(0, 2)]) == [(0, 0), (1, 2)]


def test_a_layer_that_runs_out_gives_fewer_or_the_nearest_layers_do() -> None:
    chosen = [(1, 0), (1, 1)]
    assert best_in_layers(ORDER, chosen) == [(1, 2)]
    assert best_in_layers(ORDER, chosen, neighbours=True) == [(1, 2), (0, 1)]
    assert best_in_layers(ORDER, [(2, 0), (2, 1), (1, 0)], neighbours=True) == [(1, 2), (2, 2), (1, 1)]
    every = [(layer, head) for layer in range(3) for head in range(3)]
    assert best_in_layers(ORDER, every, neighbours=True) == []


def test_random_heads_anywhere_are_seeded_and_share_none() -> None:
    chosen, barred = [(0, 0), (0, 1)], [(1, 1)]
    draws = [random_anywhere(chosen, (3, 3), seed, barred) for seed in range(30)]
    assert all(len(set(draw)) == 2 and not {*draw} & {*chosen, *barred} for draw in draws)
    assert random_anywhere(chosen, (3, 3), 4, barred) == draws[4]
    assert {head for draw in draws for head in draw} == {(0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)}
    with pytest.raises(InputError, match="5 other heads are asked for, and the model has 4"):
        random_anywhere([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)], (3, 3), 0)
