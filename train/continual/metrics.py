"""What a sequence of tasks leaves behind: overall performance, backward transfer, forgetting.

`a[i][j]` is the accuracy on task i after training task j, for j >= i; T tasks, numbered in the order they were learnt:

    OP         = 1/T      sum_i       a[i][T]                         what the last model can do
    BWT        = 1/(T-1)  sum_{i<T}   a[i][T] - a[i][i]               below 0: earlier tasks got worse
    forgetting = 1/(T-1)  sum_{i<T}   max_{i<=j<T} a[i][j] - a[i][T]  above 0: earlier tasks were better once

(OP and BWT as in He et al. 2024, arXiv 2411.06171; forgetting as in Chaudhry et al. 2018, arXiv 1801.10112.) With one
task there is nothing to forget: BWT and forgetting are None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.stats import mean_of_means_interval

Matrix = Sequence[Sequence[float | None]]  # [i][j]: task i after training task j; None for j < i


def overall_performance(accuracy: Matrix) -> float:
    """OP: the mean accuracy on all tasks after the last one was trained.

    Raises:
        InputError: a matrix that is not T x T, or a number that is missing, where there should be none, or not finite.
    """
    a = _checked(accuracy)
    return float(a[:, -1].mean())


def backward_transfer(accuracy: Matrix) -> float | None:
    """BWT: the mean change on each earlier task since it was trained; None for one task. Raises as above."""
    a = _checked(accuracy)
    return float((a[:-1, -1] - a.diagonal()[:-1]).mean()) if len(a) > 1 else None


def forgetting(accuracy: Matrix) -> float | None:
    """The mean fall on each earlier task from its best before the last one was trained; None for one task.

    Below 0 where the last task helped the others. Raises as above.
    """
    a = _checked(accuracy)
    return float((np.nanmax(a[:-1, :-1], axis=1) - a[:-1, -1]).mean()) if len(a) > 1 else None


def sequence_metrics(
    values: Sequence[Sequence[ArrayLike | None]],
    subjects: Sequence[Sequence[str]],
    level: float = 0.95,
) -> dict[str, Any]:
    """The matrix and its three numbers from the values of every example, with intervals over subjects.

    See `mean_of_means_interval`. What an example loses is a difference of its own values. Neither the tasks nor the
    training vary: the intervals are those of this run.

    Args:
        values: `values[i][j]`, `[n_examples of task i]`: each example's accuracy after training task j, in the same
            order for all j; None for j < i.
        subjects: `subjects[i]`, `[n_examples of task i]`: of each example, in that order.
        level: of the intervals.

    Returns:
        `{"accuracy": [[a_11, a_12, ...], [None, a_22, ...], ...], "op", "op_ci": [low, high], "bwt", "bwt_ci",
        "forgetting"}`; for one task `bwt`, `bwt_ci` and `forgetting` are None.

    Raises:
        InputError: as `overall_performance`, or a task whose examples differ in number between steps, or from its
            subjects, or are none.
    """
    tables = [_table(row, i, len(values)) for i, row in enumerate(values)]
    examples, named = [table.shape[1] for table in tables], [len(names) for names in subjects]
    if examples != named:
        raise InputError(f"tasks of {examples} examples have {named} subjects; give one for each example")
    accuracy: list[list[float | None]] = [
        [None] * i + [float(x) for x in table.mean(1)] for i, table in enumerate(tables)
    ]
    final = [table[-1] for table in tables]
    change = [table[-1] - table[0] for table in tables[:-1]]
    return {
        "accuracy": accuracy,
        "op": overall_performance(accuracy),
        "op_ci": mean_of_means_interval(final, subjects, level, rates=True),
        "bwt": backward_transfer(accuracy),
        "bwt_ci": mean_of_means_interval(change, subjects[:-1], level) if change else None,
        "forgetting": forgetting(accuracy),
    }


def _table(row: Sequence[ArrayLike | None], i: int, n_tasks: int) -> NDArray[np.float64]:
    """A task's values from the step that trained it on: `[n_tasks - i, n_examples]`."""
    if len(row) != n_tasks:
        raise InputError(f"task {i} has values after {len(row)} steps; give one entry for each of {n_tasks} tasks")
    if any(step is not None for step in row[:i]):
        raise InputError(f"task {i} has values from before it was trained; leave None there")
    steps = [np.asarray(step if step is not None else (), dtype=np.float64) for step in row[i:]]
    sizes = [len(step) for step in steps]
    if not all(sizes) or len(set(sizes)) > 1:
        raise InputError(f"task {i} has {sizes} examples after steps {i}-{n_tasks - 1}; give the same ones at each")
    return np.stack(steps)


def _checked(accuracy: Matrix) -> NDArray[np.float64]:
    """The matrix `[T, T]`, with NaN below the diagonal."""
    size = len(accuracy)
    if not size or any(len(row) != size for row in accuracy):
        raise InputError(f"an accuracy matrix with rows of {[len(row) for row in accuracy]}; it must be tasks x tasks")
    for i, row in enumerate(accuracy):
        for j, value in enumerate(row):
            if j < i and value is not None:
                raise InputError(f"accuracy on task {i} after task {j} is {value}; it must be None, for i comes later")
            if j >= i and (value is None or not math.isfinite(value)):
                raise InputError(f"accuracy on task {i} after task {j} is {value}; it must be a number")
    return np.array([[np.nan if value is None else value for value in row] for row in accuracy])
