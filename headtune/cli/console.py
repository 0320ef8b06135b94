"""What a person sees: progress, tables, one-line errors. Bars and colours only on a terminal."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

T = TypeVar("T")

# What is not a terminal has no width: a table in a file or pipe is as wide as it has to be.
console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 240)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def notify(line: str) -> None:
    """One plain line about what is going on, on stderr, so that stdout stays a result."""
    if not _quiet():
        errors.print(line, markup=False, style="dim" if errors.is_terminal else None)


def _quiet() -> bool:
    return logging.getLogger("headtune").level >= logging.WARNING  # --quiet; see set_verbosity


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


def print_error(message: str, code: int) -> int:
    """Print an error as one line and return the exit code."""
    from headtune.analysis.utils.secrets import redact

    print("headtune: " + redact(" ".join(message.split())), file=sys.stderr)
    return code
