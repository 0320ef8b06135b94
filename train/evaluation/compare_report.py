"""Runs side by side as one HTML page that needs nothing beside it; see `compare` for what the numbers are."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headtune.analysis.reports.html import number, png_of, render_page

from .compare import LOWER_IS_BETTER, Comparison, Group, Metric, group_title, jaccard, runs_of
from .identification_pays import identification_pays
from .metric_names import METRIC_NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"
SHOWN_EXAMPLES = 20
MOST_GROUPS = 24  # in a picture or beside a generation; tables show all


@dataclass(frozen=True)
class Drawing:
    """A picture of the page: PNG bytes, what stands in for them, what stands below, the width in CSS pixels."""

    png: bytes
    alt: str
    caption: str
    width: int | None = None


def write(comparison: Comparison, path: Path, title: str = "Runs side by side") -> None:
    """Write the page."""
    trained = [group for group in comparison.groups if group.runs]
    render_page(
        path,
        "comparison.html.j2",
        TEMPLATES,
        title=title,
        comparison=comparison,
        names=METRIC_NAMES,
        trained=trained,
        n_runs=sum(len(group.runs) for group in trained),
        lower_is_better=[METRIC_NAMES[key] for key in comparison.metrics if key in LOWER_IS_BETTER],
        measured=[_measured(comparison, groups) for groups in _by_prompts(comparison.groups)],
        identification=identification_pays(runs_of(comparison)),
        changed=_changed(trained),
        curves=_curves(trained),
        heads=[drawn for groups in _by_model(trained) if (drawn := _heads(groups)) is not None],
        generations=_generations(trained),
        runs=_runs(trained),
    )


def _by_prompts(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that were measured on the same prompts, together."""
    return [
        [group for group in groups if group.measured == measured]
        for measured in dict.fromkeys(group.measured for group in groups)
    ]


def _by_model(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups of one model together: a layer and a head of another model is another head."""
    return [[group for group in groups if _model_of(group) == model] for model in dict.fromkeys(map(_model_of, groups))]


def _model_of(group: Group) -> str:
    return str(group.runs[0].recipe.get("model.name"))


def _title(groups: Sequence[Group]) -> str:
    """The task and how many prompts of it, and the model that was trained from."""
    models = {str(run.recipe.get("model.name")) for group in groups for run in group.runs}
    return f"{group_title(groups)}, {', '.join(sorted(models))}"


# --- numbers ----------------------------------------------------------------------------------------------------------


def _measured(comparison: Comparison, groups: Sequence[Group]) -> dict[str, Any]:
    keys = [key for key in comparison.metrics if any(key in group.metrics for group in groups)]
    figure = _against_parameters(comparison, groups)
    return {"title": _title(groups), "groups": groups, "metrics": keys, "figure": figure}


def _changed(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Keys of the recipe in which groups differ, each with every group's value."""
    keys = list(dict.fromkeys(key for group in groups for key in group.changed))
    return [(key, [_short(group.changed.get(key)) for group in groups]) for key in keys] if len(groups) > 1 else []


def _short(value: Any) -> str:
    text = "–" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _runs(groups: Sequence[Group]) -> list[list[str]]:
    rows = []
    for group in groups:
        for run in group.runs:
            seconds = (run.state.get("training") or {}).get("seconds_per_step")
            memory = run.state.get("peak_memory_gib")
            cells = [run.name, group.name, run.seed, number(seconds), number(memory), run.state.get("created", "")]
            rows.append([str(cell) for cell in cells])
    return rows


# --- pictures ---------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure  # for speed: tables need no pictures

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _against_parameters(comparison: Comparison, groups: Sequence[Group]) -> Drawing | None:
    """The first metric that has intervals, over the number of trained parameters."""
    keys = [key for key in comparison.metrics if any(_has_interval(group.metrics.get(key)) for group in groups)]
    trained = [group for group in groups if group.parameters > 0][:MOST_GROUPS]
    if len(trained) < 2 or not keys:
        return None
    figure, axes = _figure(7, 4)
    key = keys[0]
    for index, group in enumerate(trained):
        metric = group.metrics.get(key)
        if metric is None:
            continue
        low, high = metric.interval or (metric.mean, metric.mean)
        beside = [other.name for other in trained if other.parameters == group.parameters].index(group.name)
        axes.errorbar(
            group.parameters * 1.06**beside,
            metric.mean,
            yerr=[[max(0.0, metric.mean - low)], [max(0.0, high - metric.mean)]],
            fmt="o",
            color=f"C{index % 10}",
            label=group.name,
        )
    base = next((group.metrics[key].mean for group in groups if not group.runs and key in group.metrics), None)
    if base is not None:
        axes.axhline(base, color="grey", linewidth=1, linestyle="--", label="base")
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel(METRIC_NAMES[key])
    axes.legend(fontsize=7, ncols=2)
    alt = f"{METRIC_NAMES[key]} over trained parameters"
    left = sum(group.parameters > 0 for group in groups) - len(trained)
    note = f" {left} more groups are not drawn." if left else ""
    return Drawing(png_of(figure), alt, f"{alt}; groups with as many stand side by side.{note}", 700)


def _has_interval(metric: Metric | None) -> bool:
    return metric is not None and metric.interval is not None


def _curves(groups: Sequence[Group]) -> Drawing | None:
    curves = [(group, [curve for run in group.runs if (curve := run.curve())]) for group in groups[:MOST_GROUPS]]
    curves = [(group, group_curves) for group, group_curves in curves if group_curves]
    if not curves:
        return None
    figure, axes = _figure(7, 4)
    for index, (group, group_curves) in enumerate(curves):
        for place, curve in enumerate(group_curves):
            steps, values = zip(*curve, strict=True)
            axes.plot(steps, values, color=f"C{index % 10}", linewidth=1, label=None if place else group.name)
    if all(value > 0 for _, group_curves in curves for curve in group_curves for _, value in curve):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(fontsize=7, ncols=2)
    left = len(groups) - len(curves)
    note = f" {left} groups have no curve or are not drawn." if left else ""
    return Drawing(png_of(figure), "training loss by step", f"One line a run, one colour a group.{note}", 700)


def _heads(groups: Sequence[Group]) -> dict[str, Any] | None:
    """Overlap of the chosen heads, and where they are."""
    chosen = [(group.name, frozenset().union(*(run.heads for run in group.runs))) for group in groups]
    chosen = [(name, heads) for name, heads in chosen if heads][:MOST_GROUPS]
    if not chosen:
        return None
    return {
        "model": _model_of(groups[0]),
        "header": ["Jaccard", *(name for name, _ in chosen)],
        "rows": [[name, *(f"{jaccard(heads, other):.2f}" for _, other in chosen)] for name, heads in chosen],
        "differ_by_seed": any(len({run.heads for run in group.runs}) > 1 for group in groups),
        "figure": _map(chosen),
    }


def _map(chosen: Sequence[tuple[str, frozenset[tuple[int, int]]]]) -> Drawing:
    n_layers = 1 + max(layer for _, heads in chosen for layer, _ in heads)
    n_heads = 1 + max(head for _, heads in chosen for _, head in heads)
    counts = np.zeros((n_layers, n_heads))
    for _, heads in chosen:
        for layer, head in heads:
            counts[layer, head] += 1
    figure, axes = _figure(max(3.0, 0.35 * n_heads), max(2.5, 0.18 * n_layers))
    drawn = axes.imshow(counts, aspect="auto", origin="lower", cmap="Blues", interpolation="nearest")
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    figure.colorbar(drawn, label="groups", ticks=range(math.ceil(counts.max()) + 1))
    return Drawing(png_of(figure), "how many groups chose each head", "How many groups chose each head.")


# --- words ------------------------------------------------------------------------------------------------------------


def _generations(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The first held-out prompts, the base model's words beside those of each group's first run."""
    sections = []
    for same_prompts in _by_prompts(groups):
        shown = same_prompts[:MOST_GROUPS]
        written = [(group.name, group.runs[0].generations(SHOWN_EXAMPLES)) for group in shown]
        written = [(name, rows) for name, rows in written if rows]
        examples = []
        for index, first in enumerate(written[0][1] if written else ()):
            sides = [_side("base", first, "before")]
            sides += [
                _side(name, rows[index], "after")
                for name, rows in written
                if index < len(rows) and rows[index]["prompt"] == first["prompt"]
            ]
            examples.append({"prompt": first["prompt"], "sides": sides})
        if examples:
            sections.append({"title": _title(shown), "examples": examples})
    return sections


def _side(name: str, row: dict[str, Any], when: str) -> dict[str, Any]:
    return {"name": name, "text": row[when].strip(), "kinds": row[f"{when}_kinds"]}
