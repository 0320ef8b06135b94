"""The pictures of `promote_then_suppress`: lines by layer, maps of heads and of causal traces.

Not by pyplot: it keeps them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headtune.analysis.interventions.causal_tracing import KINDS
from headtune.analysis.reports.html import number, png_of

Values = NDArray[np.float64]


def shown(source: str) -> str:
    """A source for people: `previous_1` -> `o1`."""
    head, _, index = source.partition("_")
    if head == "previous":
        return f"o{index}" if index else "all previous answers"
    return {"end": "END", "subject": "the subject"}.get(source, source)


def _colours(names: Sequence[str]) -> dict[str, Any]:
    """The subject grey, next and remaining answers dark and light green, the previous ones from dark red to orange."""
    from matplotlib.colors import LinearSegmentedColormap

    previous = [name for name in names if name not in ("subject", "next", "remaining")]
    warm = LinearSegmentedColormap.from_list("previous", ["#8e1b14", "#e8543a", "#f5a623"])
    of_previous = {name: warm(i / max(1, len(previous) - 1)) for i, name in enumerate(previous)}
    return {"subject": "#6b6b6b", **of_previous, "next": "#1b7a3d", "remaining": "#86c99b"}


def lines(panels: Mapping[str, Mapping[str, dict[str, Any]]], ylabel: str) -> bytes:
    """One panel a title: a line with its band for each name, by layer."""
    from matplotlib.figure import Figure as Plot

    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Plot(figsize=(max(4 * columns, 6), 3.2 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    handles: dict[str, Any] = {}
    for axis, (title, bands) in zip(axes, panels.items(), strict=False):
        axis.axhline(0, color="#999999", linewidth=0.8)
        for name, colour in _colours(list(bands)).items():
            band = bands[name]
            if band["mean"] is not None:
                layers = range(len(band["mean"]))
                (handles[name],) = axis.plot(layers, band["mean"], color=colour, linewidth=1.6)
                axis.fill_between(layers, band["low"], band["high"], color=colour, alpha=0.18, linewidth=0)
        axis.set(title=title, xlabel="layer", ylabel=ylabel)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return png_of(figure)


def maps(matrices: Mapping[str, Values]) -> bytes:
    """Layers down, heads across, one panel a name, from -1 (blue) to 1 (red)."""
    from matplotlib.figure import Figure as Plot

    n_layers, n_heads = next(iter(matrices.values())).shape
    size = (min(1.2 + len(matrices) * max(1.4, 0.18 * n_heads), 24), min(max(1.4 + 0.16 * n_layers, 3), 16))
    figure = Plot(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(matrices), squeeze=False, sharey=True)[0]
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        axis.set_facecolor("#bbbbbb")
        image = axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
        axis.set(title=name, xlabel="head")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes)
    return png_of(figure)


def traces(
    effect: Mapping[str, Mapping[str, Values]], clean: Values, noisy: Values, names: Sequence[str], centres: range
) -> bytes:
    """A row a name, a column a kind; places down, layers across; each row of panels has a scale of its own."""
    from matplotlib.figure import Figure as Plot

    answers = [i for i, name in enumerate(names) if name != "subject" and not np.isnan(clean[0, i])]
    groups = list(effect[KINDS[0]])
    figure = Plot(figsize=(9, (0.9 + 0.24 * len(groups)) * len(answers) + 0.5), layout="constrained")
    axes = figure.subplots(len(answers), len(KINDS), squeeze=False, sharex=True, sharey=True)
    for row, index in zip(axes, answers, strict=True):
        tables = {kind: np.stack([effect[kind][group][:, 0, index] for group in groups]) for kind in KINDS}
        limit = max(float(np.nanmax(np.abs(table))) for table in tables.values()) or 1.0
        for axis, (kind, table) in zip(row, tables.items(), strict=True):
            axis.set_facecolor("#bbbbbb")
            image = axis.imshow(table, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
            change = f"{number(clean[0, index])} → {number(noisy[0, index])}"
            axis.set_title(f"{'MLP' if kind == 'mlp' else kind}: p({names[index]}) {change}", fontsize="medium")
            axis.set_yticks(range(len(groups)), [shown(group).removeprefix("the ") for group in groups])
            ticks = range(0, len(centres), -(-len(centres) // 10))
            axis.set_xticks(ticks, [str(centres[i]) for i in ticks])
        figure.colorbar(image, ax=row)
    for axis in axes[-1]:
        axis.set_xlabel("layer at the window's centre")
    return png_of(figure)
