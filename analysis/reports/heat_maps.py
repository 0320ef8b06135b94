"""Layer x head maps: one as a PNG, and all methods side by side on one colour scale, with how far they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headtune.analysis.heads.head_set import ROLES, HeadSet
from headtune.analysis.utils.files import atomic_path
from headtune.analysis.utils.stats import spearman

from .html import number, png_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Marked = Mapping[str, Sequence[tuple[int, int]]]  # role -> (layer, head) pairs

# How to read the maps that identify always makes.
MAPS = {
    "dla.target": "Direct attribution to the remaining answers, in logits: red heads write toward an answer that is "
    "still to be given, blue heads against it. Recall heads are red here.",
    "dla.previous": "Direct attribution to the answers already given, in logits: blue heads push down what has been "
    "said. Suppression heads are blue here.",
    "lens.subject.target": "The part of the attribution to the remaining answers that a head reads from the subject's "
    "tokens: red heads look at the subject and raise its answers.",
    "lens.previous.previous": "The part of the attribution to the given answers that a head reads from these answers' "
    "own tokens: blue heads look at what was said and push it down.",
    "ablation.target": "Exact effect on the logits of the remaining answers, intact minus silenced: "
    "red heads are needed for it, blue heads hold it back.",
    "ablation.previous": "Exact effect on the logits of the given answers, intact minus silenced: "
    "a blue head pushes down what was said, directly or through later layers.",
}
LENSES = {"lens.subject.target": "target", "lens.previous.previous": "previous"}
FIRST = ("dla", "lens", "ablation")  # methods in the order in which they are best read; then the others
LOGITS = "logits"
UNITS = {"gates": "gate openings"}  # method -> unit, where it is not logits
# Outlines that stand out from red, white and blue; other roles take the others, in turn.
COLOURS = {"recall": "#111111", "suppression": "#00b84a"}
OTHER_COLOURS = ("#8e44ad", "#e67e00", "#008080", "#7a5c00")
QUANTILE = 0.995  # of the sizes on the page: the few beyond it would leave everything else white


# --- one map ----------------------------------------------------------------------------------------------------------


def heat_map(matrix: ArrayLike, title: str, path: Path, marked: Marked) -> None:
    """Write a PNG of one number per head: layers down, heads across, zero white, chosen heads outlined.

    Args:
        matrix: `[n_layers, n_heads]`; NaN is grey.
        marked: role -> heads to outline.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(_png(matrix, title, marked))


def heat_maps(means: Mapping[str, ArrayLike], heads: HeadSet, folder: Path) -> dict[str, Path]:
    """Write those of MAPS that `means` has as `folder/heatmaps/<name>.png`; returns name -> path."""
    paths = {name: folder / "heatmaps" / f"{name}.png" for name in MAPS if name in means}
    for name, path in paths.items():
        heat_map(means[name], name, path, marked_heads(heads))
    return paths


def marked_heads(heads: HeadSet) -> dict[str, list[tuple[int, int]]]:
    """The heads of each role, for outlines."""
    marked = dict.fromkeys((*ROLES, *heads.roles))
    return {role: heads.top(role) for role in marked if role != "selected" and heads.roles.get(role)}


def _png(matrix: ArrayLike, title: str, marked: Marked) -> bytes:
    # Not pyplot: it chooses a backend for the whole process and keeps every figure.
    from matplotlib.figure import Figure

    values = np.asarray(matrix, dtype=np.float64)
    n_layers, n_heads = values.shape
    width, height = min(max(2.2 + 0.3 * n_heads, 4.2), 16), min(max(1.6 + 0.2 * n_layers, 3), 20)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    image = _draw(axes, values, float(_limit(values, 1.0)), marked, linewidth=2)
    axes.set(title=title, xlabel="head", ylabel="layer")
    figure.colorbar(image, ax=axes)
    _legend(figure, marked)
    return png_of(figure)


def _limit(values: NDArray[np.float64], quantile: float) -> float:
    finite = np.abs(values[np.isfinite(values)])
    largest = float(np.quantile(finite, quantile)) if finite.size else 0.0
    return largest or (float(finite.max()) if finite.size else 0.0) or 1.0


def _draw(axes: Axes, values: NDArray[np.float64], limit: float, marked: Marked, linewidth: float) -> Any:
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    axes.set_facecolor("#bbbbbb")
    image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    for axis, size in ((axes.yaxis, values.shape[0]), (axes.xaxis, values.shape[1])):
        axis.set_major_locator(MaxNLocator(nbins=min(size, 20), integer=True))
    for index, (role, pairs) in enumerate(marked.items()):
        inset = 0.04 + 0.1 * index  # a head of two roles shows both outlines
        for layer, head in pairs:
            corner, size = (head - 0.5 + inset, layer - 0.5 + inset), 1 - 2 * inset
            axes.add_patch(
                Rectangle(corner, size, size, fill=False, linewidth=linewidth, edgecolor=_colour(role, index))
            )
    return image


def _legend(figure: Any, marked: Marked) -> None:
    from matplotlib.patches import Patch

    colours = {role: _colour(role, index) for index, role in enumerate(marked)}
    handles = [Patch(fill=False, edgecolor=colours[role], linewidth=2, label=role) for role, p in marked.items() if p]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _colour(role: str, index: int) -> str:
    return COLOURS.get(role, OTHER_COLOURS[index % len(OTHER_COLOURS)])


# --- all methods ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sheet:
    """The maps of one quantity in one unit, to be drawn as one figure.

    Attributes:
        quantity: `target` or `previous`.
        unit: `logits`, or a method's own.
        maps: score name -> `[n_layers, n_heads]`.
        limit: what the strongest colour stands for, on all sheets of the unit alike.
        beyond: the name, layer, head and value of the strongest that lies beyond the limit, of all sheets of the unit.
        n_beyond: how many do.
    """

    quantity: str
    unit: str
    maps: dict[str, NDArray[np.float64]]
    limit: float
    beyond: tuple[str, int, int, float] | None
    n_beyond: int


def methods_of(means: Mapping[str, ArrayLike], quantity: str) -> dict[str, NDArray[np.float64]]:
    """Method -> its map of a quantity, for every `<method>.<quantity>` in `means`."""
    maps = {}
    for name, matrix in means.items():
        method, _, rest = name.partition(".")
        if rest == quantity and method != "attention":  # attention.previous is a mass, not an effect
            maps[method] = np.asarray(matrix, dtype=np.float64)
    return dict(sorted(maps.items(), key=lambda item: _place(item[0])))


def sheets(means: Mapping[str, ArrayLike]) -> list[Sheet]:
    """Every method's maps of both quantities, and two of the Token Lens's, grouped by quantity and unit.

    Maps of one unit share one symmetric scale: the QUANTILE of the sizes of all their numbers.
    """
    groups: dict[tuple[str, str], dict[str, NDArray[np.float64]]] = {}
    for quantity in ("target", "previous"):
        for method, matrix in methods_of(means, quantity).items():
            groups.setdefault((quantity, UNITS.get(method, LOGITS)), {})[f"{method}.{quantity}"] = matrix
        for name, lens_quantity in LENSES.items():
            if lens_quantity == quantity and name in means:
                groups.setdefault((quantity, LOGITS), {})[name] = np.asarray(means[name], dtype=np.float64)
    result = []
    for (quantity, unit), unordered in groups.items():
        maps = dict(sorted(unordered.items(), key=lambda item: _place(item[0])))
        same_unit = [group for (_, group_unit), group in groups.items() if group_unit == unit]
        everything = {name: matrix for group in same_unit for name, matrix in group.items()}
        limit = _limit(np.concatenate([matrix.ravel() for matrix in everything.values()]), QUANTILE)
        outside = [
            (name, int(layer), int(head), float(matrix[layer, head]))
            for name, matrix in everything.items()
            for layer, head in np.argwhere(np.abs(np.nan_to_num(matrix)) > limit)
        ]
        strongest = max(outside, key=lambda entry: abs(entry[3]), default=None)
        result.append(Sheet(quantity, unit, maps, limit, strongest, len(outside)))
    return result


def _place(name: str) -> int:
    method = name.partition(".")[0]
    return FIRST.index(method) if method in FIRST else len(FIRST)


def sheet_png(sheet: Sheet, marked: Marked) -> tuple[bytes, int]:
    """The sheet's maps side by side, chosen heads outlined, with one colour bar: PNG, and its width in CSS pixels."""
    from matplotlib.figure import Figure

    n_layers, n_heads = next(iter(sheet.maps.values())).shape
    width, height = min(max(0.16 * n_heads, 1.5), 3.2), min(max(0.14 * n_layers, 1.4), 5.5)
    columns = max(1, min(len(sheet.maps), int(9.6 / (width + 0.25))))
    rows = -(-len(sheet.maps) // columns)
    size = (max(0.9 + (width + 0.25) * columns + 0.7, 4.2), (height + 0.55) * rows + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.ravel()[len(sheet.maps) :]:
        axes.remove()
    image: Any = None
    for index, (name, matrix) in enumerate(sheet.maps.items()):
        axes = grid.ravel()[index]
        image = _draw(axes, matrix, sheet.limit, marked, linewidth=1.2)
        axes.set_title(name.removesuffix(f".{sheet.quantity}").replace("_", " "), fontsize=9)
        # Shared axes hide the numbers of all rows but the last, which may be shorter than the others.
        axes.tick_params(labelsize=7, labelbottom=index + columns >= len(sheet.maps))
        if index + columns >= len(sheet.maps):
            axes.set_xlabel("head", fontsize=8)
        if index % columns == 0:
            axes.set_ylabel("layer", fontsize=8)
    bar = figure.colorbar(image, ax=figure.axes, extend="both" if sheet.n_beyond else "neither", aspect=40, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(sheet.unit, fontsize=8)
    _legend(figure, marked)
    return png_of(figure, dpi=160), round(100 * size[0])


def scale_note(sheet: Sheet) -> str:
    """What the strongest colour stands for, and what lies beyond it; plain text."""
    text = f"The scale of all maps in {sheet.unit}: the strongest red and blue are ±{number(sheet.limit)}."
    if sheet.beyond is not None:
        name, layer, head, value = sheet.beyond
        text += f" {sheet.n_beyond} numbers lie beyond, the farthest {number(value)} (L{layer}H{head}, {name})."
    return text


def agreement(means: Mapping[str, ArrayLike], quantity: str) -> tuple[list[str], NDArray[np.float64]]:
    """Spearman's rank correlation between methods over all heads: names, `[methods, methods]`.

    Over the heads that both have a number for; NaN where one of the two is the same for all of them.
    """
    maps = methods_of(means, quantity)
    flat = [matrix.ravel() for matrix in maps.values()]
    return list(maps), np.array([[_agreement(a, b) for b in flat] for a in flat]).reshape(len(flat), len(flat))


def _agreement(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    both = np.isfinite(a) & np.isfinite(b)
    correlation = spearman(a[both], b[both])
    return float("nan") if correlation is None else correlation
