"""OP, BWT and forgetting of a sequence of tasks, by hand and with their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.stats import rate_interval
from headtune.train.continual.metrics import backward_transfer, forgetting, overall_performance, sequence_metrics
from headtune.train.continual.sequence import evaluation_of

A = [
    [0.8, 0.9, 0.5],
    [None, 0.6, 0.7],
    [None, None, 0.3],
]


def test_a_matrix_by_hand() -> None:
    assert overall_performance(A) == pytest.approx((0.5 + 0.7 + 0.3) / 3)
    assert backward_transfer(A) == pytest.approx(((0.5 - 0.8) + (0.7 - 0.6)) / 2)
    assert forgetting(A) == pytest.approx(((0.9 - 0.5) + (0.6 - 0.7)) / 2), "the best is before the last step"


def test_two_tasks_forget_what_they_transferred_back() -> None:
    a = [[0.8, 0.5], [None, 0.4]]
    assert backward_transfer(a) == pytest.approx(-0.3)
    assert forgetting(a) == pytest.approx(0.3)


def test_one_task_has_nothing_to_forget() -> None:
    assert (overall_performance([[0.4]]), backward_transfer([[0.4]]), forgetting([[0.4]])) == (0.4, None, None)
    found = sequence_metrics([[[1, 0, 0, 1]]], [list("abcd")])
    assert (found["accuracy"], found["op"], found["bwt"], found["bwt_ci"], found["forgetting"]) == (
        [[0.5]],
        0.5,
        None,
        None,
        None,
    )


def random_values(seed: int, sizes: tuple[int, ...] = (40, 25, 60)) -> list[list[np.ndarray | None]]:
    generator = np.random.default_rng(seed)
    return [
        [None if j < i else generator.integers(0, 2, size).astype(float) for j in range(len(sizes))]
        for i, size in enumerate(sizes)
    ]


def subjects_of(values: list[list[np.ndarray | None]], each: int = 1) -> list[list[str]]:
    """Every `each` consecutive examples are of one subject."""
    return [[f"subject {index // each}" for index in range(len(np.asarray(row[-1])))] for row in values]


@pytest.mark.parametrize("each", [1, 3])  # examples of a subject
def test_intervals_hold_the_true_values(each: int) -> None:
    """400 sequences of three tasks of 30 subjects: at least 93% of the intervals hold what they were drawn with."""
    generator, held = np.random.default_rng(each), np.zeros(2)
    for _ in range(400):
        knows = [generator.beta(2, 2, 30).repeat(each) for _ in range(3)]  # of each subject
        forgets = generator.random((3, 30 * each)) < 0.3
        first = [(generator.random(len(p)) < p).astype(float) for p in knows]
        last = [np.where(gone, 0.0, values) for values, gone in zip(first, forgets, strict=True)]
        values = [[None] * i + [first[i]] + [last[i]] * (2 - i) for i in range(3)]
        result = sequence_metrics(values, subjects_of(values, each))
        op, bwt = (0.35 + 0.35 + 0.5) / 3, -0.15  # the last task has not been forgotten yet
        bounds = result["op_ci"], result["bwt_ci"]
        held += [low <= true <= high for (low, high), true in zip(bounds, (op, bwt), strict=True)]
    assert (held / 400 >= 0.93).all(), held / 400


def test_the_interval_of_one_task_is_that_of_its_mean() -> None:
    values, subjects = np.random.default_rng(3).integers(0, 2, 30).astype(float), [f"s{i // 2}" for i in range(30)]
    found = sequence_metrics([[values]], [subjects])
    np.testing.assert_allclose(found["op_ci"], np.stack(rate_interval(values, subjects)), atol=1e-9)
    assert found["bwt_ci"] is None
    one = sequence_metrics([[values[:2], values[:2]], [None, values]], [subjects[:2], subjects])
    assert (one["op_ci"], one["bwt_ci"]) == ([0.0, 1.0], None)


def test_the_numbers_are_those_of_the_matrix() -> None:
    values = random_values(1)
    found = sequence_metrics(values, subjects_of(values))
    means = [[None if step is None else float(np.mean(step)) for step in row] for row in values]
    assert found["accuracy"] == means
    assert (found["op"], found["bwt"], found["forgetting"]) == (
        overall_performance(means),
        backward_transfer(means),
        forgetting(means),
    )


def test_intervals_are_paired() -> None:
    """Examples that all lose the same leave nothing to doubt, however much they differ among themselves."""
    first = np.random.default_rng(0).random(30)
    values = [[first, first - 0.25], [None, first[:7]]]
    subjects = subjects_of(values)
    found = sequence_metrics(values, subjects)
    np.testing.assert_allclose(found["bwt_ci"], [-0.25, -0.25])
    assert found["op_ci"][1] - found["op_ci"][0] > 0.05
    wide, narrow = (sequence_metrics(values, subjects, level=level)["op_ci"] for level in (0.99, 0.5))
    assert wide[0] < found["op_ci"][0] < narrow[0] < found["op"] < narrow[1] < found["op_ci"][1] < wide[1]


@pytest.mark.parametrize(
    ("accuracy", "message"),
    [
        ([], r"with rows of \[\]; it must be tasks x tasks"),
        ([[0.1, 0.2]], r"with rows of \[2\]"),
        ([[0.1, 0.2], [0.3, 0.4]], "on task 1 after task 0 is 0.3; it must be None"),
        ([[0.1, None], [None, 0.4]], "on task 0 after task 1 is None; it must be a number"),
        ([[0.1, float("nan")], [None, 0.4]], "on task 0 after task 1 is nan"),
    ],
)
def test_bad_matrices(accuracy: list[list[float | None]], message: str) -> None:
    for metric in (overall_performance, backward_transfer, forgetting):
        with pytest.raises(InputError, match=message):
            metric(accuracy)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[[1.0]], [None, [1.0]]], "task 0 has values after 1 steps; give one entry for each of 2 tasks"),
        ([[[1.0], [1.0]], [[1.0], [1.0]]], "task 1 has values from before it was trained"),
        ([[[1.0, 0.0], [1.0]], [None, [1.0]]], r"task 0 has \[2, 1\] examples after steps 0-1; give the same ones"),
        ([[[1.0], None], [None, [1.0]]], r"task 0 has \[1, 0\] examples"),
        ([[[1.0], [1.0]], [None, []]], r"task 1 has \[0\] examples"),
        ([[[float("nan")]]], "on task 0 after task 0 is nan"),
        ([], "it must be tasks x tasks"),
    ],
)
def test_bad_values(values: list[list[list[float] | None]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sequence_metrics(values, [["a"] * len(row[-1] or []) for row in values])


@pytest.mark.parametrize("subjects", [[], [["a", "b"]], [["a", "b"], ["a", "b"]]])
def test_every_example_has_a_subject(subjects: list[list[str]]) -> None:
    with pytest.raises(InputError, match=r"tasks of \[2, 1\] examples have .* subjects; give one for each"):
        sequence_metrics([[[1.0, 0.0], [1.0, 1.0]], [None, [1.0]]], subjects)


def saved(each: int) -> dict[str, Any]:
    """A sequence.json of two tasks of 24 subjects, whose `each` prompts all get the same value."""
    generator = np.random.default_rng(2)

    def measured() -> dict[str, Any]:
        values = [float(value) for value in generator.integers(0, 2, 24) for _ in range(each)]
        rows = [
            {"subject": f"s{i // each}", "prompt": "", "text": "", "kinds": [], "values": {"exact_match": value}}
            for i, value in enumerate(values)
        ]
        return {"metric": "exact_match", "values": values, "rows": rows}

    before, after = [measured(), measured()], [[measured()], [measured(), measured()]]
    none: dict[str, Any] = {"general_before": {}, "general_after": {}}
    return {"before": before, "after": after, "perplexity_before": 1.0, "perplexity_after": 1.0, **none}


def test_more_prompts_of_the_same_subjects_say_no_more(tmp_path: Path) -> None:
    """Prompts of one subject that all go alike are one: evaluation.json has the intervals of a prompt a subject."""
    names = ["one", "two"]
    once, often = (evaluation_of({}, tmp_path, names, [], saved(each), together=False) for each in (1, 4))
    for part, key in [("before", "op"), ("after", "op"), ("after", "bwt"), ("after", "two/exact_match")]:
        low, high = once[part][key]["ci"]
        assert high - low > 0.1
        np.testing.assert_allclose(often[part][key]["ci"], [low, high], atol=1e-12)
