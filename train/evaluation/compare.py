"""Finished runs side by side, from their own files: seeds grouped, intervals, paired differences, what was changed.

    runs = read_runs(Path("runs"), group="study")
    found = compare(runs, against="lofit-random")
    found.groups[0].metrics["exact_match"]  # mean over seeds, its interval, difference from the reference

Runs that differ in their seed alone (and in names and places) are one group. A metric's mean is that over seeds of the
means over examples; its interval is a 95% percentile bootstrap over subjects and over runs, each drawn independently,
so it says how sure the result is for other subjects and for other seeds (other trainings, other random heads); one run
alone says nothing of the latter. The means by seed stand beside it. A difference is paired over examples: the same
resampled subjects on both sides. Only runs that were measured on the same prompts are compared.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.stats import percentile_interval, subject_shares

from .metric_names import METRIC_NAMES
from .run_reader import RunRecord, read_runs

BASE = "base"
LOWER_IS_BETTER = {
    "repeat_rate",
    "wrong_rate",
    "missing_rate",
    "p_previous",
    "neutral_perplexity",
    "forgetting",
}
DRAWS = 2000
# What two runs of one group may differ in.
_OWN = re.compile(r"(seed|name|output_dir|tracking\..*|evaluation\.before|heads\.(random|control)\.seed)$")


# --- groups and numbers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """One metric of a group.

    Attributes:
        mean: over seeds.
        interval: 95%, over subjects and runs; None where examples have no such number.
        by_seed: in order of the seeds.
        minus: difference from the reference, with its interval and two-sided bootstrap p (twice the smaller tail).
    """

    mean: float
    interval: tuple[float, float] | None
    by_seed: tuple[float, ...]
    minus: tuple[float, tuple[float, float] | None, float | None] | None = None

    @property
    def differs(self) -> bool:
        """The interval of the difference does not hold 0."""
        return self.minus is not None and self.minus[1] is not None and not self.minus[1][0] <= 0 <= self.minus[1][1]


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone; `base`, the model before training, is one without runs.

    Attributes:
        measured: groups that share it were measured on the same prompts, from the same base.
        changed: the keys of the recipe in which groups differ, with this one's values.
    """

    name: str
    runs: tuple[RunRecord, ...]
    task: str
    measured: str
    parameters: int
    metrics: Mapping[str, Metric]
    changed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Groups in order of their names, the base first, by task they were measured on.

    Attributes:
        metrics: names, in the order they are shown in.
        against: the name of the reference.
        best: (`measured` of groups, metric) -> the names of the groups whose mean is best.
    """

    groups: tuple[Group, ...]
    metrics: tuple[str, ...]
    against: str
    best: Mapping[tuple[str, str], frozenset[str]]


def compare_runs(
    folder: Path | str,
    against: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    recipe: str | None = None,
) -> Comparison:
    """Every finished run in a folder (or in a sweep's folder in it), side by side: `headtune compare FOLDER`.

    Args:
        folder: holds the folders of runs.
        against: the group, or a run of it, that differences are taken from; default: the model before training.
        group, tags, recipe: only runs of this `tracking.group`, with all of these `tracking.tags`, of this family.

    Raises:
        InputError: no such folder, no finished run in it that passes, or no group or run called `against`.
    """
    return compare(read_runs(Path(folder), group, tags, recipe), against)


def compare(runs: Sequence[RunRecord], against: str | None = None) -> Comparison:
    """Group runs over seeds and compare every group with one of them.

    Args:
        against: the group, or a run of it, that differences are taken from; default: the model before training.

    Raises:
        InputError: no such group or run.
    """
    # Runs whose recipes differ in their seed alone are a group.
    together: dict[str, list[RunRecord]] = {}
    for run in runs:
        identity = {key: value for key, value in run.recipe.items() if not _OWN.match(key)}
        key = json.dumps([run.measured, identity], sort_keys=True)
        together.setdefault(key, []).append(run)
    members = [tuple(sorted(group_runs, key=lambda run: (run.seed, run.name))) for group_runs in together.values()]
    names = _unique([_label(group_runs) for group_runs in members])
    # What differences are taken from.
    reference = None
    if against is not None and against != BASE:
        matches = [
            group_runs
            for name, group_runs in zip(names, members, strict=True)
            if against in (name, *(r.name for r in group_runs))
        ]
        if not matches:
            raise InputError(f"no run or group is named {against!r}; there are {', '.join([BASE, *sorted(names)])}")
        reference = matches[0]
    # Numbers of every group, and of the base model once for each set of prompts.
    varied = _varied(members)
    groups = []
    bases: set[str] = set()
    for name, group_runs in sorted(zip(names, members, strict=True)):
        first = group_runs[0]
        if first.measured not in bases:
            bases.add(first.measured)
            groups.append(_base(first, reference))
        changed = {key: first.recipe.get(key) for key in varied}
        parameters = int(first.state.get("parameters") or 0)
        groups.append(
            Group(name, group_runs, first.task, first.measured, parameters, _metrics(group_runs, reference), changed)
        )
    ordered = sorted(groups, key=lambda group: (group.task, group.measured, bool(group.runs)))
    shown = tuple(key for key in METRIC_NAMES if any(key in group.metrics for group in ordered))
    return Comparison(tuple(ordered), shown, against or BASE, _best(ordered, shown))


def _label(runs: Sequence[RunRecord]) -> str:
    """What the names of a group's runs share, without the seed and the digest that a default name ends in."""
    stems = {re.sub(r"[-_]s(eed)?\d+(-[0-9a-f]{6})?$", "", run.name) for run in runs}
    return stems.pop() if len(stems) == 1 else runs[0].name


def _unique(names: Sequence[str]) -> list[str]:
    seen = {BASE: 1}  # the model before training
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique


def _varied(members: Sequence[Sequence[RunRecord]]) -> list[str]:
    """Keys of the recipe whose values are not the same in all groups."""
    recipes = [runs[0].recipe for runs in members]
    keys = sorted({key for recipe in recipes for key in recipe if not _OWN.match(key)})
    return [key for key in keys if len({json.dumps(recipe.get(key), sort_keys=True) for recipe in recipes}) > 1]


def _mean(value: Any) -> float:
    return float(value["mean"] if isinstance(value, Mapping) else value)


def _metrics(runs: Sequence[RunRecord], reference: Sequence[RunRecord] | None) -> dict[str, Metric]:
    metrics = {}
    weights = subject_shares(runs[0].subjects, DRAWS, seed=0)
    for key in METRIC_NAMES:
        if not all(key in run.after for run in runs):
            continue
        by_seed = tuple(_mean(run.after[key]) for run in runs)
        each = _by_example(runs, key)
        interval = None if each is None else percentile_interval(_resampled(weights, each, seed=1))
        if interval is None and len(runs) == 1 and isinstance(runs[0].after[key], Mapping):
            low, high = runs[0].after[key]["ci"]
            interval = (low, high)
        metrics[key] = Metric(float(np.mean(by_seed)), interval, by_seed, _minus(runs, key, weights, each, reference))
    return metrics


def _by_example(runs: Sequence[RunRecord], key: str, before: bool = False) -> NDArray[np.float64] | None:
    """`[n_runs, n_examples]`; None where the examples have no such value, or their mean is not the metric."""
    values = [(run.values_before if before else run.values).get(key) for run in runs]
    if any(value is None or not len(value) or not np.isfinite(value).all() for value in values):
        return None
    if any(list(run.subjects) != list(runs[0].subjects) for run in runs) or len(set(runs[0].subjects)) < 2:
        return None  # of one subject every resampling is the same
    return np.stack([value for value in values if value is not None])


def _resampled(weights: NDArray[np.float64], each: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """`[DRAWS]` means over resampled subjects and, independently, resampled runs (a two-way bootstrap).

    Runs of a group differ in their seed, and with it in their training and in the random heads they drew: what another
    seed would give is part of the interval. One run alone says nothing of that.

    Args:
        weights: `[DRAWS, n_examples]` shares of the examples.
        each: `[n_runs, n_examples]`.
    """
    n = len(each)
    runs = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=len(weights)) / n
    means: NDArray[np.float64] = ((weights @ each.T) * runs).sum(1)
    return means


def _minus(
    runs: Sequence[RunRecord],
    key: str,
    weights: NDArray[np.float64],
    each: NDArray[np.float64] | None,
    reference: Sequence[RunRecord] | None,
) -> tuple[float, tuple[float, float] | None, float | None] | None:
    """Difference from the reference, or from the model before training; None for the reference itself."""
    if reference is not None and (
        reference[0] in runs or reference[0].measured != runs[0].measured or key not in reference[0].after
    ):
        return None
    if reference is None:
        if key not in runs[0].before:
            return None
        other, there = _by_example(runs, key, before=True), _mean(runs[0].before[key])
    else:
        other, there = _by_example(reference, key), float(np.mean([_mean(run.after[key]) for run in reference]))
    gap = round(float(np.mean([_mean(run.after[key]) for run in runs])) - there, 12)
    if each is None or other is None or each.shape[1] != other.shape[1]:
        return gap, None, None
    before = weights @ other.mean(0) if reference is None else _resampled(weights, other, seed=2)
    # A resampling without a difference gives 0, not its rounding error.
    draws: NDArray[np.float64] = (_resampled(weights, each, seed=1) - before).round(12)
    p = min(1.0, 2 * float(min((draws <= 0).sum(), (draws >= 0).sum()) + 1) / (DRAWS + 1))
    return gap, percentile_interval(draws), p


def difference(
    runs: Sequence[RunRecord], key: str, reference: Sequence[RunRecord]
) -> tuple[float, tuple[float, float] | None, float | None] | None:
    """A metric of one group's runs less that of another's: the difference, its interval and p, as in `Metric.minus`.

    None where they were measured on different prompts, or one has no such metric.
    """
    if not all(key in run.after for run in (*runs, *reference)):
        return None
    return _minus(runs, key, subject_shares(runs[0].subjects, DRAWS, seed=0), _by_example(runs, key), reference)


def _base(first: RunRecord, reference: Sequence[RunRecord] | None) -> Group:
    """The model before training, as the first run of a task measured it."""
    weights = subject_shares(first.subjects, DRAWS, seed=0)
    metrics = {}
    for key in METRIC_NAMES:
        if key not in first.before:
            continue
        value = first.before[key]
        interval = (value["ci"][0], value["ci"][1]) if isinstance(value, Mapping) else None
        minus = None
        if reference is not None and reference[0].measured == first.measured:
            untrained = replace(first, after=first.before, values=first.values_before)
            minus = _minus([untrained], key, weights, _by_example([untrained], key), reference)
        metrics[key] = Metric(_mean(value), interval, (_mean(value),), minus)
    return Group(BASE, (), first.task, first.measured, 0, metrics)


def _best(groups: Sequence[Group], metrics: Sequence[str]) -> dict[tuple[str, str], frozenset[str]]:
    best = {}
    for measured in {group.measured for group in groups}:
        for key in metrics:
            means = {g.name: g.metrics[key].mean for g in groups if g.measured == measured and key in g.metrics}
            if means:
                top = min(means.values()) if key in LOWER_IS_BETTER else max(means.values())
                best[measured, key] = frozenset(name for name, mean in means.items() if mean == top)
    return best


def jaccard(a: frozenset[tuple[int, int]], b: frozenset[tuple[int, int]]) -> float:
    """|a & b| / |a | b|; 1 for two empty sets."""
    return len(a & b) / len(a | b) if a | b else 1.0


def runs_of(comparison: Comparison) -> list[RunRecord]:
    """Every run of a comparison."""
    return [run for group in comparison.groups for run in group.runs]


# --- as data ----------------------------------------------------------------------------------------------------------


def group_title(groups: Sequence[Group]) -> str:
    """The task and the number of prompts of groups that were measured on the same."""
    n = next((len(run.subjects) for group in groups for run in group.runs), 0)
    return f"{groups[0].task}, {n} prompt{'s' * (n != 1)}" if n else groups[0].task


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data."""
    return {
        "against": comparison.against,
        "groups": [
            {
                "name": group.name,
                "task": group.task,
                "parameters": group.parameters,
                "runs": [
                    {
                        "name": run.name,
                        "seed": run.seed,
                        "folder": str(run.folder),
                        "before": run.before,
                        "after": run.after,
                    }
                    for run in group.runs
                ],
                "changed": dict(group.changed),
                "metrics": {
                    key: {
                        "mean": metric.mean,
                        "ci": metric.interval,
                        "by_seed": metric.by_seed,
                        "minus": None
                        if metric.minus is None
                        else dict(zip(("mean", "ci", "p"), metric.minus, strict=True)),
                        "best": group.name in comparison.best[group.measured, key],
                    }
                    for key, metric in group.metrics.items()
                },
            }
            for group in comparison.groups
        ],
    }


def as_csv(comparison: Comparison) -> str:
    """One line a group and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["group", "task", "seeds", "parameters", "metric", "mean", "low", "high"]
    writer.writerow([*columns, "minus", "minus_low", "minus_high", "p"])
    for group in comparison.groups:
        for key, metric in group.metrics.items():
            minus = metric.minus or (None, None, None)
            row = [group.name, group.task, len(group.runs), group.parameters, key, metric.mean]
            row += [*(metric.interval or (None, None)), minus[0], *(minus[1] or (None, None)), minus[2]]
            writer.writerow(["" if cell is None else cell for cell in row])
    return text.getvalue()
