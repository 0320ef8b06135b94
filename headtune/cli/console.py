"""What a person sees: progress, tables, one-line errors. Bars and colours only on a terminal."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from headtune.train.evaluation.metric_names import METRIC_NAMES, show

T = TypeVar("T")

# What is not a terminal has no width: a table in a file or pipe is as wide as it has to be.
console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 240)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def notify(line: str) -> None:
    """One plain line about what is going on, on stderr, so that stdout stays a result."""
    if not _quiet():
        errors.print(line, markup=False, style="dim" if errors.is_terminal else None)


def _quiet() -> bool:
    return logging.getLogger("headtune").level >= logging.WARNING  # --quiet; see cli_parts.set_volume


def progress(items: Sequence[T], what: str) -> Iterator[T]:
    """Iterate with a bar on a terminal, and with a line every tenth (at most one in 5 s) elsewhere."""
    if _quiet():
        yield from items
        return
    if errors.is_terminal:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=errors, transient=True) as bar:
            yield from bar.track(items, description=what)
        return
    start = last = time.monotonic()
    for index, item in enumerate(items):
        yield item
        now, done = time.monotonic(), index + 1
        if now - last >= 5 and (done * 10 // len(items)) > (index * 10 // len(items)) and done < len(items):
            left = (now - start) / done * (len(items) - done)
            errors.print(f"{what}: {done}/{len(items)}, about {left:.0f} s left", markup=False)
            last = now


def plain_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> Table:
    """Words and numbers (three significant digits; a dash for None)."""
    from headtune.analysis.reports.html import number

    table = Table(title=title or None, title_justify="left")
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(*(Text(cell if isinstance(cell, str) else number(cell)) for cell in row))
    return table


def print_titled(title: str, table: Table) -> None:
    """A table under its title, which a Table of rich's own would break where the table is narrower."""
    console.print(Text(title, style="table.title"))
    console.print(table)


def metrics_table(columns: Mapping[str, Mapping[str, Any]], title: str = "") -> Table:
    """Metrics as rows, one column an evaluation; a dash where one has no such metric.

    Below it a note where few subjects stand behind the intervals: a bootstrap of two has three outcomes.
    """
    from headtune.analysis.methods.scores import ENOUGH_SUBJECTS, FEW_SUBJECTS

    counts = [metrics["n"].get("subjects", FEW_SUBJECTS) for metrics in columns.values() if "n" in metrics]
    subjects = min(counts, default=FEW_SUBJECTS)
    note = f"{subjects} subject{'s' * (subjects != 1)}: the intervals say little; give {ENOUGH_SUBJECTS} or more"
    table = Table(title=title or None, title_justify="left", caption_justify="left")
    table.caption = note if subjects < FEW_SUBJECTS else None
    table.add_column("metric")
    for name in columns:
        table.add_column(name)
    given = dict.fromkeys(key for metrics in columns.values() for key in metrics if key != "n")
    known = [key for key in METRIC_NAMES if key in given]
    for key in [*known, *(key for key in given if "/" in key)]:  # "task/metric": a task of a sequence by itself
        table.add_row(
            Text(_label(key)), *(show(metrics[key]) if key in metrics else "–" for metrics in columns.values())
        )
    return table


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


def fail(message: str, code: int) -> int:
    """Print an error as one line and return the exit code."""
    from headtune.analysis.utils.secrets import redact

    print("headtune: " + redact(" ".join(message.split())), file=sys.stderr)
    return code


def print_evaluation(folder: Path, evaluation: dict[str, Any]) -> None:
    pass

    columns = {name: evaluation[name] for name in ("before", "after")}
    console.print(metrics_table(columns, f"{evaluation['task']}, {evaluation['before']['n']['examples']} prompts"))
    if (folder / "sequence.json").is_file():
        sequence = json.loads((folder / "sequence.json").read_text(encoding="utf-8"))
        console.print(sequence_table(list(evaluation["before"]["n"]["by_task"]), sequence))
    # Those that changed say more than those that did not; failures are as likely to be among them as successes.
    changed = [example for example in evaluation["examples"] if example["before"] != example["after"]]
    console.print(generations_table((changed or evaluation["examples"])[:3]))
    console.print(f"run: {folder}", markup=False)
    if (folder / "report.html").is_file():
        console.print(f"report: {folder}/report.html", markup=False)
