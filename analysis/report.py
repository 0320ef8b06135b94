"""The page a person reads: which heads, how surely, whether the proof holds, and what a run changed.

One HTML file that needs nothing beside it: pictures are inlined, there is no script and no request, and it reads on a
phone. The same tables go to the terminal.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from .files import atomic_path, write_text
from .headset import ROLES, HeadSet

if TYPE_CHECKING:
    from rich.table import Table

Marked = Mapping[str, Sequence[tuple[int, int]]]  # role -> (layer, head) pairs

# The maps a person wants, each with how to read it.
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
QUANTITIES = {"p_remaining": "p(remaining)", "p_previous": "p(previous)"}
COLOURS = {"recall": "#111111", "suppression": "#00b84a"}  # outlines that stand out from red, white and blue
SHOWN_EXAMPLES = 50


# --- numbers ----------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Three significant digits, thousands in full; an en dash for what is not there."""
    if value is None or not math.isfinite(value):
        return "–"
    if 999.5 <= abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.3g}"


def with_interval(mean: float, interval: Sequence[float]) -> str:
    """`0.041 [0.031, 0.052]`"""
    return f"{number(mean)} [{number(interval[0])}, {number(interval[1])}]"


# --- heat maps --------------------------------------------------------------------------------------------------------


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
        heat_map(means[name], name, path, _marked(heads))
    return paths


def _marked(heads: HeadSet) -> dict[str, list[tuple[int, int]]]:
    return {role: heads.top(role) for role in ROLES if heads.roles.get(role)}


def _png(matrix: ArrayLike, title: str, marked: Marked) -> bytes:
    # Not pyplot: it chooses a backend for the whole process and keeps every figure.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.ticker import MaxNLocator

    values = np.asarray(matrix, dtype=np.float64)
    n_layers, n_heads = values.shape
    finite = np.abs(values[np.isfinite(values)])
    limit = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    width, height = min(max(2.2 + 0.3 * n_heads, 4.2), 16), min(max(1.6 + 0.2 * n_layers, 3), 20)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("#bbbbbb")
    image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    for axis, size in ((axes.xaxis, n_heads), (axes.yaxis, n_layers)):
        axis.set_major_locator(MaxNLocator(nbins=min(size, 20), integer=True))
    axes.set(title=title, xlabel="head", ylabel="layer")
    figure.colorbar(image, ax=axes)
    for index, (role, pairs) in enumerate(marked.items()):
        inset = 0.04 + 0.1 * index  # a head of two roles shows both outlines
        for layer, head in pairs:
            corner, size = (head - 0.5 + inset, layer - 0.5 + inset), 1 - 2 * inset
            axes.add_patch(Rectangle(corner, size, size, fill=False, linewidth=2, edgecolor=_colour(role)))
    legend = [Patch(fill=False, edgecolor=_colour(role), linewidth=2, label=role) for role, p in marked.items() if p]
    if legend:
        figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _colour(role: str) -> str:
    return COLOURS.get(role, "#8e44ad")


# --- the dissociation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A probability under one condition.

    Attributes:
        mean, interval: over the examples, with the 95% interval.
        ratio: to the baseline; `None` in the baseline itself, or where that is 0.
        extreme: random sets only: the mean of the most extreme set in the direction that the role is tested in.
    """

    mean: float
    interval: tuple[float, float]
    ratio: float | None = None
    extreme: float | None = None

    def __str__(self) -> str:
        text = with_interval(self.mean, self.interval)
        text += f" ×{number(self.ratio)}" if self.ratio is not None else ""
        return text + (f" (most extreme set {number(self.extreme)})" if self.extreme is not None else "")


@dataclass(frozen=True)
class Condition:
    """One row of the dissociation table: what was silenced, and quantity (a key of QUANTITIES) -> cell."""

    name: str
    cells: dict[str, Cell]


def dissociation_table(heads: HeadSet) -> list[Condition]:
    """Baseline, then for suppression and recall the chosen heads silenced and the random heads matched to them.

    Empty for a head set that was not verified; a role without confirmed heads has no rows; without previous answers
    there is no `p_previous`.
    """
    block = heads.verification
    if "baseline" not in block:
        return []
    baseline = block["baseline"]

    def condition(name: str, numbers: dict[str, Any], extreme: str | None = None) -> Condition:
        cells = {}
        for quantity in QUANTITIES:
            if quantity in numbers:
                entry, before = numbers[quantity], baseline[quantity]["mean"]
                ratio = entry["mean"] / before if before and numbers is not baseline else None
                cells[quantity] = Cell(entry["mean"], tuple(entry["ci"]), ratio, entry[extreme] if extreme else None)
        return Condition(name, cells)

    rows = [condition("nothing silenced", baseline)]
    for role, extreme in (("suppression", "highest_set"), ("recall", "lowest_set")):
        if f"ablate_{role}" not in block:
            continue
        chosen, matched = block[f"ablate_{role}"], block[f"ablate_random_like_{role}"]
        n, sets = len(chosen["heads"]), matched["sets"]
        rows.append(condition(f"top {n} {role} heads silenced", chosen))
        if sets:
            rows.append(condition(f"{n} random heads of the same layers silenced ({sets} sets)", matched, extreme))
    return rows


def render_dissociation(heads: HeadSet) -> Table:
    """The dissociation as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    rows = dissociation_table(heads)
    columns = _columns(rows)
    table = Table(title="Silencing heads at END, mean [95% interval] ×ratio to nothing silenced")
    table.add_column("condition")
    for column in columns:
        table.add_column(QUANTITIES[column])
    for row in rows:
        # Text, not markup: rich would take an interval's brackets for a style.
        table.add_row(row.name, *(Text(str(row.cells[column])) for column in columns))
    return table


def _columns(rows: Sequence[Condition]) -> list[str]:
    return [quantity for quantity in QUANTITIES if any(quantity in row.cells for row in rows)]


def verdict(heads: HeadSet) -> str:
    """Whether the dissociation holds, in plain words, and for each role where it fails why."""
    found = heads.verification.get("dissociation")
    if not found:
        return "The dissociation was not tested: this head set has no verification."
    parts = {role: _role_verdict(heads, role, found[role]) for role in ("suppression", "recall") if role in found}
    failed = [role for role in parts if not found[role]["held"]]
    if not failed:
        return f"The dissociation holds: {'; '.join(parts.values())}."
    text = f"The dissociation FAILS for {' and '.join(failed)}: {'; '.join(parts[role] for role in failed)}."
    held = [role for role in parts if role not in failed]
    return text + "".join(f" It holds for {role}: {parts[role]}." for role in held)


def _role_verdict(heads: HeadSet, role: str, result: dict[str, Any]) -> str:
    if "quantity" not in result and f"ablate_{role}" in heads.verification:
        return f"the {role} heads cannot be compared with random ones: {result['reason']}"
    if "quantity" not in result:
        return f"there are {result['reason']} for {role}, so there was nothing to silence"
    raises = role == "suppression"
    quantity = QUANTITIES[result["quantity"]]
    n = len(heads.verification[f"ablate_{role}"]["heads"])
    sets = heads.verification[f"ablate_random_like_{role}"]["sets"]
    before, after, extreme = result["baseline"], result["ablated"], result["most_extreme_random_set"]
    ratio = f" (×{number(result['ratio'])})" if result["ratio"] is not None else ""
    heads_named = f"the {n} {role} heads" if n > 1 else f"the one {role} head"
    change = f"{quantity} from {number(before)} to {number(after)}{ratio}"
    which = "highest" if raises else "lowest"
    if result["held"]:
        verb, beyond = ("raises", "above") if raises else ("lowers", "below")
        return (
            f"silencing {heads_named} {verb} {change}, {beyond} the {which} of {sets} random sets ({number(extreme)})"
        )
    wrong = []
    if (after <= before) if raises else (after >= before):
        wrong.append(f"does not {'raise' if raises else 'lower'} it")
    if (after <= extreme) if raises else (after >= extreme):
        wrong.append(
            f"does not go {'above' if raises else 'below'} the {which} of {sets} random sets ({number(extreme)})"
        )
    return f"silencing {heads_named} takes {change}, which {' and '.join(wrong)}"


# --- the page ---------------------------------------------------------------------------------------------------------


def write_report(
    path: Path,
    heads: HeadSet,
    means: Mapping[str, ArrayLike],
    evaluation: Mapping[str, Any] | None = None,
    title: str = "headtune report",
) -> None:
    """Write the page as one HTML file that refers to nothing outside itself.

    Args:
        means: score name -> `[n_layers, n_heads]`; those of MAPS are drawn.
        evaluation: the content of evaluation.json, `{"before", "after", "task", "examples"}`; adds the comparison.
    """
    sections = [
        f"<h1>{escape(title)}</h1>",
        _about(heads),
        "<h2>Does it hold?</h2>",
        _dissociation(heads),
        "<h2>Heads</h2>",
        *(_ranked(heads, role) for role in heads.roles),
        _stability(heads),
    ]
    if evaluation is not None:
        sections += ["<h2>Before and after</h2>", _metrics(evaluation), "<h2>What it writes</h2>", _lists(evaluation)]
    maps = [_figure(name, means[name], _marked(heads)) for name in MAPS if name in means]
    if maps:
        sections += ["<h2>Heat maps</h2>", "<p>Outlined: the chosen heads.</p>", *maps]
    body = "\n".join(sections)
    write_text(path, _PAGE.replace("{title}", escape(title)).replace("{body}", body))


def _about(heads: HeadSet) -> str:
    model, task, method = heads.model, heads.task, heads.method
    dropped = ", ".join(f"{count} {reason}" for reason, count in (task.get("dropped") or {}).items())
    lines = {
        "Model": f"{model.get('name')} ({model.get('model_type')}, {model.get('n_layers')} layers × "
        f"{model.get('n_heads')} heads, {model.get('dtype')})",
        "Revision": model.get("revision"),
        "Weights": f"sha256 {model['weights_sha256']}" if model.get("weights_sha256") else None,
        "Task": task.get("name"),
        "Examples": f"{task.get('n_examples')} used, {task.get('n_dropped', 0)} left out"
        + (f": {dropped}" if dropped else ""),
        "Method": method.get("name"),
        "Parameters": _flat(method.get("parameters") or {}),
        "Seed": method.get("seed"),
        "Made": heads.created,
        "Versions": _flat(heads.versions),
        "Command": heads.command,
    }
    rows = "".join(
        f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in lines.items() if value not in (None, "")
    )
    return f"<dl>{rows}</dl>"


def _flat(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; the first column heads its row."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        f"<tr><th scope='row'>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _dissociation(heads: HeadSet) -> str:
    rows = dissociation_table(heads)
    text = verdict(heads)
    kind = "good" if text.startswith("The dissociation holds") else "bad"
    result = f"<p class='verdict {kind}'>{escape(text)}</p>"
    if rows:
        columns = _columns(rows)
        header = ["Silenced at the end of the prompt", *(QUANTITIES[column] for column in columns)]
        result += _html_table(
            header, [[escape(row.name), *(escape(str(row.cells[c])) for c in columns)] for row in rows]
        )
        result += (
            "<p class='note'>Mean probability of the first tokens of the answers still to be given (remaining) and of "
            "those already given (previous), with its 95% interval over subjects and its ratio to nothing silenced.</p>"
        )
    return result


def _ranked(heads: HeadSet, role: str) -> str:
    ranked = heads.roles[role]
    if not ranked:
        return f"<h3>{escape(role.capitalize())}</h3><p>No head was confirmed for this role.</p>"
    # In logits; the same in nats and probability is in heads.json, and would make the table too wide to read.
    effects = sorted({name for head in ranked for name in head.effect if name in MAPS and name.startswith("ablation.")})
    rows = [
        [
            str(rank),
            escape(head.name),
            escape(with_interval(head.score, head.ci)),
            *(number(head.effect.get(name)) for name in effects),
        ]
        for rank, head in enumerate(ranked, start=1)
    ]
    header = ["#", "head", "score [95% interval]", *(escape(name) for name in effects)]
    return f"<h3>{escape(role.capitalize())}</h3>{_html_table(header, rows)}"


def _stability(heads: HeadSet) -> str:
    values = {role: heads.stability[role] for role in heads.roles if role in heads.stability}
    if not values:
        return ""
    listed = ", ".join(f"{escape(role)} {number(value)}" for role, value in values.items())
    return (
        f"<p class='note'>Stability, the mean overlap (Jaccard, 1 = always the same heads) with the choice on "
        f"{escape(str(heads.stability.get('bootstrap', '?')))} resamplings of the subjects: {listed}. "
        "Scores are positive where a head raises the quantity; ablation effects are intact minus silenced.</p>"
    )


def _figure(name: str, matrix: ArrayLike, marked: Marked) -> str:
    data = base64.b64encode(_png(matrix, name, marked)).decode()
    return (
        f"<figure><img alt='Heat map of {name} by layer and head' src='data:image/png;base64,{data}'>"
        f"<figcaption><b>{name}</b> {escape(MAPS[name])}</figcaption></figure>"
    )


def _metrics(evaluation: Mapping[str, Any]) -> str:
    before, after = evaluation["before"], evaluation["after"]

    def cell(value: Any) -> str:
        if isinstance(value, Mapping):
            return escape(with_interval(value["mean"], value["ci"]))
        return number(value) if isinstance(value, int | float) else "–"

    def mean(value: Any) -> float | None:
        return value.get("mean") if isinstance(value, Mapping) else value

    rows = []
    for name in [key for key in {**before, **after} if key != "n"]:
        old, new = mean(before.get(name)), mean(after.get(name))
        change = None if old is None or new is None else new - old
        signed = ("+" if change is not None and change > 0 else "") + number(change)
        rows.append([escape(name.replace("_", " ")), cell(before.get(name)), cell(after.get(name)), signed])
    counts = after.get("n") or before.get("n") or {}
    note = f"Task {evaluation.get('task')}. " + ", ".join(
        f"{key.replace('_', ' ')}: {_flat(value) or 'none' if isinstance(value, Mapping) else value}"
        for key, value in counts.items()
    )
    return _html_table(["", "before", "after", "change"], rows) + f"<p class='note'>{escape(note)}</p>"


def _lists(evaluation: Mapping[str, Any]) -> str:
    examples = evaluation.get("examples") or []

    def side(example: Mapping[str, Any], when: str) -> str:
        kinds = "".join(
            f"<li class='{escape(kind)}'>{index} {escape(kind.replace('_', ' '))}</li>"
            for index, kind in enumerate(example[f"{when}_kinds"], start=1)
        )
        return f"<div><h4>{when}</h4><pre>{escape(example[when])}</pre><ol class='kinds'>{kinds}</ol></div>"

    blocks = [
        f"<article><pre class='prompt'>{escape(example['prompt'])}</pre>"
        f"<div class='sides'>{side(example, 'before')}{side(example, 'after')}</div></article>"
        for example in examples[:SHOWN_EXAMPLES]
    ]
    note = f"{len(blocks)} of {len(examples)} examples; all of them are in evaluation.json."
    return f"<p class='note'>{note}</p>" + "".join(blocks)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --fg: #1c1c1c; --soft: #5c5c5c; --bg: #fff; --card: #f4f4f2; --line: #d8d8d4;
  --red: #b3261e; --green: #1b7a3d; --grey: #6b6b6b; }
@media (prefers-color-scheme: dark) { :root { --fg: #e8e8e6; --soft: #a8a8a4; --bg: #161616; --card: #222;
  --line: #3c3c3a; --red: #ff8a80; --green: #7fd99a; --grey: #a8a8a8; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg); max-width: 60rem;
  margin: 0 auto; padding: 1rem; }
h1, h2, h3, h4 { line-height: 1.2; } h2 { margin-top: 2.5rem; } h4 { margin: 0 0 .3rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); } tbody th { font-weight: normal; }
.note, figcaption { color: var(--soft); font-size: .9rem; }
.verdict { border-left: .3rem solid; padding: .4rem .8rem; background: var(--card); }
.verdict.good { border-color: var(--green); } .verdict.bad { border-color: var(--red); }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; background: #fff; }
article { background: var(--card); padding: .8rem; margin: 1rem 0; border-radius: .4rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .5rem; font-size: .9rem; }
.prompt { color: var(--soft); } .sides { display: flex; flex-wrap: wrap; gap: 1rem; }
.sides > div { flex: 1 1 16rem; min-width: 0; }
.kinds { list-style: none; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: .4rem; font-size: .8rem; }
.kinds li { border: 1px solid; border-radius: 1rem; padding: 0 .6rem; }
.repeat { color: var(--red); } .correct_new { color: var(--green); } .wrong { color: var(--grey); }
.missing { color: var(--grey); border-style: dashed !important; }
</style>
</head>
<body>
{body}
</body>
</html>
"""
