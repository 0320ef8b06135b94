"""Runs side by side as one HTML page that needs nothing beside it; see `compare` for what the numbers are."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headtune.analysis.reports.html import html_table, number, picture, png_of, signed, with_interval, write_page

from .compare import LOWER_IS_BETTER, Comparison, Group, Metric, group_title, jaccard
from .metric_names import METRIC_NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_EXAMPLES = 20
MOST_GROUPS = 24  # in a picture or beside a generation; tables show all


def write(comparison: Comparison, path: Path, title: str = "Runs side by side") -> None:
    """Write the page."""
    parts = [f"<h1>{escape(title)}</h1>", _lead(comparison)]
    for measured in dict.fromkeys(group.measured for group in comparison.groups):
        groups = [group for group in comparison.groups if group.measured == measured]
        parts += [
            f"<h2>{escape(_measured(groups))}</h2>",
            _metrics(comparison, groups),
            _against_parameters(comparison, groups),
        ]
    trained = [group for group in comparison.groups if group.runs]
    parts += [_changed(trained), _curves(trained), _heads(trained), _generations(trained), _runs(trained)]
    write_page(path, title, "\n".join(part for part in parts if part))


def _lead(comparison: Comparison) -> str:
    n = sum(len(group.runs) for group in comparison.groups)
    n_groups = sum(bool(group.runs) for group in comparison.groups)
    better = ", ".join(METRIC_NAMES[key] for key in comparison.metrics if key in LOWER_IS_BETTER)
    return (
        f"<p class='lead'>{n} runs in {n_groups} groups, which differ in more "
        "than their seed. Means over seeds; 95% intervals by bootstrap over subjects; differences from "
        f"<b>{escape(comparison.against)}</b>, paired over examples; an asterisk where the interval of the difference "
        f"does not hold 0. Best in bold{f' (lower is better: {escape(better)})' if better else ''}.</p>"
    )


def _measured(groups: Sequence[Group]) -> str:
    """The task and how many prompts of it, and the model that was trained from."""
    models = {str(run.recipe.get("model.name")) for group in groups for run in group.runs}
    return f"{group_title(groups)}, {', '.join(sorted(models))}"


# --- numbers ----------------------------------------------------------------------------------------------------------


def _metrics(comparison: Comparison, groups: Sequence[Group]) -> str:
    keys = [key for key in comparison.metrics if any(key in group.metrics for group in groups)]
    header = ["run", "seeds", "parameters", *(escape(METRIC_NAMES[key]) for key in keys)]
    rows = []
    for group in groups:
        cells = [escape(group.name), str(len(group.runs) or ""), f"{group.parameters:,}"]
        rows.append([*cells, *(_cell(comparison, group, key) for key in keys)])
    return html_table(header, rows)


def _cell(comparison: Comparison, group: Group, key: str) -> str:
    metric = group.metrics.get(key)
    if metric is None:
        return "–"
    text = f"<span class='unbroken'>{with_interval(metric.mean, metric.interval)}</span>"
    if group.name in comparison.best[group.measured, key]:
        text = f"<b>{text}</b>"
    if metric.minus is not None:
        gap, interval, _ = metric.minus
        inside = f" [{signed(interval[0])}, {signed(interval[1])}]" if interval else ""
        text += f"<br><small class='note unbroken'>{signed(gap)}{inside}{'*' if metric.differs else ''}</small>"
    if len(metric.by_seed) > 1:
        text += f"<br><small class='note'>by seed {', '.join(number(value) for value in metric.by_seed)}</small>"
    return text


def _changed(groups: Sequence[Group]) -> str:
    keys = list(dict.fromkeys(key for group in groups for key in group.changed))
    if len(groups) < 2 or not keys:
        return ""
    rows = [
        [f"<code>{escape(key)}</code>", *(f"<code>{escape(_short(group.changed.get(key)))}</code>" for group in groups)]
        for key in keys
    ]
    return "<h2>What differs in the recipes</h2>" + html_table(["key", *(escape(g.name) for g in groups)], rows)


def _short(value: Any) -> str:
    text = "–" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _runs(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        for run in group.runs:
            seconds = (run.state.get("training") or {}).get("seconds_per_step")
            memory = run.state.get("peak_memory_gib")
            cells = [run.name, group.name, str(run.seed), number(seconds), number(memory), run.state.get("created", "")]
            rows.append([escape(str(cell)) for cell in cells])
    return "<h2>Runs</h2>" + html_table(["run", "group", "seed", "s/step", "GiB", "created"], rows)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _against_parameters(comparison: Comparison, groups: Sequence[Group]) -> str:
    """The first metric that has intervals, over the number of trained parameters."""
    keys = [key for key in comparison.metrics if any(_has_interval(group.metrics.get(key)) for group in groups)]
    trained = [group for group in groups if group.parameters > 0][:MOST_GROUPS]
    if len(trained) < 2 or not keys:
        return ""
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
    name = METRIC_NAMES[key]
    return picture(
        png_of(figure),
        f"{name} over trained parameters",
        f"{escape(name)} over trained parameters; groups with as many stand side by side.{_left(groups, trained)}",
        700,
    )


def _left(groups: Sequence[Group], drawn: Sequence[Group]) -> str:
    left = sum(group.parameters > 0 for group in groups) - len(drawn)
    return f" {left} more groups are not drawn." if left else ""


def _has_interval(metric: Metric | None) -> bool:
    return metric is not None and metric.interval is not None


def _curves(groups: Sequence[Group]) -> str:
    curves = [(group, [curve for run in group.runs if (curve := run.curve())]) for group in groups[:MOST_GROUPS]]
    curves = [(group, group_curves) for group, group_curves in curves if group_curves]
    if not curves:
        return ""
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
    return "<h2>Training loss</h2>" + picture(
        png_of(figure), "training loss by step", f"One line a run, one colour a group.{note}", 700
    )


def _heads(groups: Sequence[Group]) -> str:
    """Overlap of the chosen heads, and where they are."""
    chosen = [(group.name, frozenset().union(*(run.heads for run in group.runs))) for group in groups]
    chosen = [(name, heads) for name, heads in chosen if heads][:MOST_GROUPS]
    if not chosen:
        return ""
    header = ["Jaccard", *(escape(name) for name, _ in chosen)]
    rows = [
        [escape(name), *(f"{jaccard(chosen_heads, other):.2f}" for _, other in chosen)] for name, chosen_heads in chosen
    ]
    several = any(len({run.heads for run in group.runs}) > 1 for group in groups)
    note = (
        "<p class='note'>Groups whose heads differ by seed count with the heads of all their seeds.</p>"
        if several
        else ""
    )
    return "<h2>Chosen heads</h2>" + html_table(header, rows) + note + _map(chosen)


def _map(chosen: Sequence[tuple[str, frozenset[tuple[int, int]]]]) -> str:
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
    return picture(png_of(figure), "how many groups chose each head", "How many groups chose each head.")


# --- words ------------------------------------------------------------------------------------------------------------


def _generations(groups: Sequence[Group]) -> str:
    """The first held-out prompts, the base model's words beside those of each group's first run."""
    parts = []
    for measured in dict.fromkeys(group.measured for group in groups):
        same_prompts = [group for group in groups if group.measured == measured][:MOST_GROUPS]
        written = [(group.name, group.runs[0].generations(SHOWN_EXAMPLES)) for group in same_prompts]
        written = [(name, rows) for name, rows in written if rows]
        if not written:
            continue
        parts.append(f"<h3>{escape(_measured(same_prompts))}</h3>")
        for index, first in enumerate(written[0][1]):
            sides = [_side("base", first, "before")]
            sides += [
                _side(name, rows[index], "after")
                for name, rows in written
                if index < len(rows) and rows[index]["prompt"] == first["prompt"]
            ]
            parts.append(
                f"<article><pre class='prompt'>{escape(first['prompt'])}</pre>"
                f"<div class='sides'>{''.join(sides)}</div></article>"
            )
    if not parts:
        return ""
    return "<h2>What they write</h2><details><summary>Held-out prompts, first seed of each group</summary>" + (
        "".join(parts) + "</details>"
    )


def _side(name: str, row: dict[str, Any], when: str) -> str:
    kinds = "".join(f"<li class='{escape(k)}'>{escape(k.replace('_', ' '))}</li>" for k in row[f"{when}_kinds"])
    text = row[when].strip()
    return f"<div><h5>{escape(name)}</h5><pre>{escape(text)}</pre><ul class='kinds'>{kinds}</ul></div>"
