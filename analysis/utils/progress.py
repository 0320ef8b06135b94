"""How long runs tell their progress: bars over loops, and lines of text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Notify = Callable[[str], None]  # takes one line about what is being done
Progress = Callable[[Sequence[Any], str], Iterable[Any]]


def silent(items: Sequence[Any], _what: str) -> Iterator[Any]:
    """The `Progress` that shows nothing."""
    return iter(items)
