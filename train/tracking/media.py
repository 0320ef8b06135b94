"""What a run shows in W&B besides its curves: maps and tables of heads, before against after, generations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headtune.analysis.reports import head_report, heat_maps

if TYPE_CHECKING:
    from headtune.analysis.heads.head_set import HeadSet
    from headtune.train.config.schema import Recipe

    from .tracker import Tracker


def write_run_page(recipe: Recipe, folder: Path, evaluation: Mapping[str, Any]) -> None:
    """report.html of a run that ranked no heads.

    Args:
        folder: of the run, wherever it lies now.
        evaluation: the content of evaluation.json.
    """
    lead = f"{recipe.recipe} on {recipe.model.name}."
    head_report.write_run_report(folder / "report.html", evaluation, recipe.to_yaml(), lead, recipe.name)


def show_heads(tracker: Tracker, head_set: HeadSet, means: Mapping[str, Any], folder: Path, artifact: str) -> None:
    """Images `heads/<score>`, tables `heads/scores` (every head) and `heads/ranked`, and heads.json as an artifact.

    Args:
        means: score -> array or tensor `[n_layers, n_heads]`; empty where the scores are not at hand.
        folder: holds heads.json; the images go there.
        artifact: its name.
    """
    if means:
        for name, path in heat_maps.heat_maps(dict(means), head_set, folder).items():
            tracker.image(f"heads/{name}", path)
        shape = next(iter(means.values())).shape
        pairs = [(layer, head) for layer in range(shape[0]) for head in range(shape[1])]
        scores = [
            [f"L{layer}H{head}", layer, head, *(float(values[layer, head]) for values in means.values())]
            for layer, head in pairs
        ]
        tracker.table("heads/scores", ["name", "layer", "head", *means], scores)
    rows = [
        [role, entry.name, entry.layer, entry.head, entry.score, *(entry.ci or (None, None))]
        for role, entries in head_set.roles.items()
        for entry in entries
    ]
    tracker.table("heads/ranked", ["role", "name", "layer", "head", "score", "low", "high"], rows)
    tracker.artifact(folder / "heads.json", artifact, "heads")


def show_chosen(tracker: Tracker, pairs: Sequence[Sequence[int]]) -> None:
    """Table `heads/chosen`: what is tuned, held or scaled, wherever it comes from."""
    rows = [[f"L{layer}H{head}", layer, head] for layer, head in pairs]
    tracker.table("heads/chosen", ["name", "layer", "head"], rows)


def show_evaluation(tracker: Tracker, evaluation: Mapping[str, Any]) -> None:
    """Tables `before_after` (one line a metric) and `generations` (one line a held-out prompt).

    Args:
        evaluation: the content of evaluation.json.
    """
    before, after = evaluation["before"], evaluation["after"]
    rows = []
    for name in (name for name in after if name != "n"):
        old, new = _mean(before.get(name)), _mean(after[name])
        rows.append([name, old, new, None if old is None or new is None else new - old, *_interval(after[name])])
    tracker.table("before_after", ["metric", "before", "after", "change", "after_low", "after_high"], rows)
    texts = [[entry["prompt"], entry["before"], entry["after"]] for entry in evaluation["examples"]]
    tracker.table("generations", ["prompt", "before", "after"], texts)


def show_metrics(tracker: Tracker, metrics: Mapping[str, Any], generations: Sequence[Mapping[str, Any]]) -> None:
    """Tables `metrics` and `generations` of one model on one task."""
    rows = [[name, _mean(value), *_interval(value)] for name, value in metrics.items() if name != "n"]
    tracker.table("metrics", ["metric", "value", "low", "high"], rows)
    tracker.table("generations", ["prompt", "text"], [[entry["prompt"], entry["text"]] for entry in generations])


def _mean(value: Any) -> float | None:
    return value["mean"] if isinstance(value, Mapping) else value


def _interval(value: Any) -> tuple[float | None, float | None]:
    return tuple(value["ci"]) if isinstance(value, Mapping) and value.get("ci") else (None, None)
