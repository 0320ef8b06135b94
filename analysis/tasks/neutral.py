"""A text about nothing in particular, written for this project: what no task is about."""

from __future__ import annotations

import importlib.resources


def neutral_text() -> str:
    """The text on which perplexity is measured, and heads' mean outputs."""
    return (importlib.resources.files("headtune.recipes") / "data" / "neutral.txt").read_text(encoding="utf-8")
