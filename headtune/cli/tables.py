"""What commands show as tables: metrics, sequences, generations, comparisons, the first batch of a dry run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from headtune.analysis.heads.head_set import HeadSet
from headtune.analysis.reports import dissociation
from headtune.analysis.reports.evaluation_view import changes, excludes_zero
from headtune.train.evaluation.compare import Comparison, Group, as_json, group_title, runs_of
from headtune.train.evaluation.identification_pays import identification_pays
from headtune.train.evaluation.metric_names import METRIC_NAMES, show
from headtune.train.runs.batch_preview import PreviewRow

from .console import console, plain_table

LEARNT, AVOIDED = "bold green", "red"  # on a terminal; elsewhere [[brackets]]


# --- metrics of a run -------------------------------------------------------------------------------------------------


def metrics_table(
    columns: Mapping[str, Mapping[str, Any]], title: str = "", changes: Mapping[str, Mapping[str, Any]] | None = None
) -> Table:
    """Metrics as rows, one column an evaluation; a dash where one has no such metric.

    Below it a note where few subjects stand behind the intervals.

    Args:
        changes: metric -> `{"mean", "ci"}`, the last column where it is given; one whose interval holds 0 is said to be
            not distinguishable from none.
    """
    from headtune.analysis.utils.stats import ENOUGH_SUBJECTS, FEW_SUBJECTS

    counts = [metrics["n"].get("subjects", FEW_SUBJECTS) for metrics in columns.values() if "n" in metrics]
    subjects = min(counts, default=FEW_SUBJECTS)
    note = f"{subjects} subject{'s' * (subjects != 1)}: the intervals say little; give {ENOUGH_SUBJECTS} or more"
    table = Table(title=title or None, title_justify="left", caption_justify="left")
    table.caption = note if subjects < FEW_SUBJECTS else None
    table.add_column("metric")
    for name in columns:
        table.add_column(name)
    if changes is not None:
        table.add_column("change")
    present = dict.fromkeys(key for metrics in columns.values() for key in metrics if key != "n")
    named = [key for key in METRIC_NAMES if key in present]
    for key in [*named, *(key for key in present if "/" in key)]:  # "task/metric": a task of a sequence by itself
        cells = [show(metrics[key]) if key in metrics else "–" for metrics in columns.values()]
        table.add_row(Text(_label(key)), *cells, *([] if changes is None else [_change(changes.get(key))]))
    return table


def _change(change: Mapping[str, Any] | None) -> Text:
    if change is None:
        return Text("")
    low, high = change["ci"]
    numbers = f"{change['mean']:+.3g} [{low:+.3g}, {high:+.3g}]"
    return Text(numbers if excludes_zero((low, high)) else f"{numbers}, not distinguishable from none")


def _label(key: str) -> str:
    task, _, metric = key.rpartition("/")
    name = METRIC_NAMES.get(metric, metric.replace("_", " "))
    return f"{task}: {name}" if task else name


def sequence_table(names: Sequence[str], sequence: Mapping[str, Any]) -> Table:
    """The accuracies a[i][j] of a sequence, a row for each task j that was learnt and a column for each task i.

    Args:
        names: of the tasks, in order.
        sequence: the content of sequence.json.
    """
    rows = [("base model", sequence["before"])]
    if len(sequence["after"]) < len(names):  # all of them at once
        rows.append(("all tasks", sequence["after"][-1]))
    else:
        rows += [(f"after {name}", column) for name, column in zip(names, sequence["after"], strict=True)]
    means = [[sum(one["values"]) / len(one["values"]) for one in column] for _, column in rows]
    cells = [[label, *row, *[None] * (len(names) - len(row))] for (label, _), row in zip(rows, means, strict=True)]
    return plain_table("", ["main metric of", *names], cells)


def generations_table(examples: Sequence[Mapping[str, Any]]) -> Table:
    """Prompts with the base model's and the adapted model's continuation side by side."""
    table = Table(show_lines=True)
    for name in ("prompt", "before", "after"):
        table.add_column(name, overflow="fold")
    for example in examples:
        # Text, not markup: what a model writes may hold brackets.
        table.add_row(Text(example["prompt"]), *(Text(_marked(example, when)) for when in ("before", "after")))
    return table


def _marked(example: Mapping[str, Any], when: str) -> str:
    kinds = ", ".join(kind.replace("_", " ") for kind in example[f"{when}_kinds"])
    text = "\n".join(line for line in example[when].split("\n") if line.strip()).strip()
    return f"{text}\n({kinds})"


def print_evaluation(folder: Path, evaluation: dict[str, Any]) -> None:
    columns = {name: evaluation[name] for name in ("before", "after")}
    title = f"{evaluation['task']}, {evaluation['before']['n']['examples']} prompts"
    console.print(metrics_table(columns, title, changes(evaluation)))
    if (folder / "sequence.json").is_file():
        sequence = json.loads((folder / "sequence.json").read_text(encoding="utf-8"))
        console.print(sequence_table(list(evaluation["before"]["n"]["by_task"]), sequence))
    # Those that changed say more than those that did not; failures are as likely to be among them as successes.
    changed = [example for example in evaluation["examples"] if example["before"] != example["after"]]
    console.print(generations_table((changed or evaluation["examples"])[:3]))
    console.print(f"run: {folder}", markup=False)
    if (folder / "report.html").is_file():
        console.print(f"report: {folder}/report.html", markup=False)


# --- heads ------------------------------------------------------------------------------------------------------------


def dissociation_table(heads: HeadSet) -> Table:
    """What silencing heads does to each probability, a row for each condition."""
    rows = dissociation.dissociation_table(heads)
    quantities = dissociation.quantities_of(rows)
    table = Table(title="Silencing heads at the last token, mean [95% interval] ×ratio to nothing silenced")
    table.add_column("condition")
    for quantity in quantities:
        table.add_column(dissociation.QUANTITIES[quantity])
    for row in rows:
        # Text, not markup: rich would take an interval's brackets for a style.
        table.add_row(row.name, *(Text(str(row.cells[quantity])) for quantity in quantities))
    return table


# --- runs side by side ------------------------------------------------------------------------------------------------


def comparison_tables(comparison: Comparison, width: int) -> list[Table]:
    """Groups as rows, metrics as columns, the best in bold; a star where the difference from the reference is not 0.

    One table for each set of prompts; its columns go on in further tables where `width` characters do not hold them.
    """
    result = []
    kinds = dict.fromkeys((group.task, group.measured) for group in comparison.groups)
    for measured in dict.fromkeys(group.measured for group in comparison.groups):
        same_prompts = [group for group in comparison.groups if group.measured == measured]
        columns = {
            "run": [Text(group.name) for group in same_prompts],
            "seeds": [Text(str(len(group.runs) or "")) for group in same_prompts],
            "parameters": [Text(f"{group.parameters:,}") for group in same_prompts],
        }
        keys = [key for key in comparison.metrics if any(key in group.metrics for group in same_prompts)]
        columns |= {
            METRIC_NAMES[key]: [_comparison_cell(comparison, group, key) for group in same_prompts] for key in keys
        }
        for part in _parts(columns, width):
            title = Text(group_title(same_prompts) + (", continued" if "seeds" not in part else ""))
            result.append(Table(title=title, title_justify="left", caption_justify="left"))
            for name in part:
                result[-1].add_column(name, justify="left" if name == "run" else "right", overflow="fold")
            for cells in zip(*(columns[name] for name in part), strict=True):
                result[-1].add_row(*cells)
    if result:
        result[-1].caption = f"bold: best; *: differs from {comparison.against}, paired bootstrap over subjects, 95%"
        if len(kinds) > len({task for task, _ in kinds}):
            result[-1].caption += (
                "\na task in several tables: its runs were measured on other prompts, another way or from another base "
                "model, and are not compared across tables"
            )
    return result


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data, with whether the choice of heads paid."""
    results = identification_pays(runs_of(comparison))
    return as_json(comparison) | {"identification": [each.to_json() for each in results]}


def identification_text(comparison: Comparison) -> Text:
    """Whether the choice of heads paid, in words; empty where no controls were run beside identified heads."""
    results = identification_pays(runs_of(comparison))
    costs = dict.fromkeys(line for each in results for line in each.damage_sentences())
    return Text("\n".join([*(line for each in results for line in each.sentences()), *costs]))


def _comparison_cell(comparison: Comparison, group: Group, key: str) -> Text:
    metric = group.metrics.get(key)
    if metric is None:
        return Text("–")
    value = show(metric.mean if metric.interval is None else {"mean": metric.mean, "ci": metric.interval})
    style = "bold" if group.name in comparison.best[group.measured, key] else ""
    return Text(value + ("*" if metric.differs else ""), style=style)


def _parts(columns: Mapping[str, Sequence[Text]], width: int) -> list[list[str]]:
    """Names of columns, the first one in every part, such that each part is at most `width` characters wide."""
    taken = {name: 3 + max([*map(len, name.split()), *map(len, cells)]) for name, cells in columns.items()}
    first, *others = columns
    parts = [[first]]
    for name in others:
        if len(parts[-1]) > 1 and 1 + sum(taken[column] for column in [*parts[-1], name]) > width:
            parts.append([first])
        parts[-1].append(name)
    return parts


# --- the first batch --------------------------------------------------------------------------------------------------


def batch_row(row: PreviewRow, colour: bool) -> Text:
    """A row for people: in colour, or with [[brackets]] around what is learnt on. A newline is written ↵."""
    text = Text()
    if row.side:
        text.append(f"{row.side}: ")
    for index, (part, learnt) in enumerate(row.parts):
        part = _visible(part)
        if index + 1 == len(row.parts):
            part = part.removesuffix("\n")
        _append(text, part, learnt, colour, LEARNT)
    for word, tokens, style in (("any of", row.right, LEARNT), ("none of", row.given, AVOIDED)):
        if tokens:
            text.append(f"\n  {word} ")
            for index, token in enumerate(tokens):
                text.append(" " if index else "")
                _append(text, _visible(token).removesuffix("\n"), True, colour, style)
    return text


def _append(text: Text, part: str, marked: bool, colour: bool, style: str) -> None:
    if not marked:
        text.append(part)
    elif colour:
        text.append(part, style)
    else:
        text.append(f"[[{part}]]")


def _visible(part: str) -> str:
    """Without what a terminal would obey."""
    plain = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in part)
    return plain.replace("\n", "↵\n")
