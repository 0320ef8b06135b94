"""Curves with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headtune.analysis.reports.html import png_of


def with_bounds(interval: Mapping[str, Any]) -> list[float]:
    """`[mean, low, high]`."""
    return [interval["mean"], *interval["ci"]]


def curve_png(
    x: Sequence[float] | range,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    xlabel: str,
    ylabel: str,
    mark: float | None = None,
    log: bool = False,
) -> bytes:
    """One line a curve by `x`, with its band; `mark` is a dashed vertical line, `log` a logarithmic x axis."""
    from matplotlib.figure import Figure as Plot

    figure = Plot(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, values in curves.items():
        mean, low, high = (np.array(part) for part in zip(*(with_bounds(value) for value in values), strict=True))
        axes.plot(list(x), mean, marker="o", markersize=3, label=name)
        axes.fill_between(list(x), low, high, alpha=0.2)
    if mark is not None:
        axes.axvline(mark, linestyle="--", color="#666666")
    if log:
        axes.set_xscale("symlog", linthresh=0.001)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if len(curves) > 1:
        axes.legend(frameon=False)
    return png_of(figure)
