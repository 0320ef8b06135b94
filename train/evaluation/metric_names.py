"""Metrics in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METRIC_NAMES = {
    "op": "OP, mean of the tasks",
    "bwt": "BWT, earlier tasks since learnt",
    "forgetting": "forgetting, from their best",
    "repeat_rate": "repeat rate",
    "correct_new_rate": "correct new rate",
    "wrong_rate": "wrong rate",
    "missing_rate": "missing rate",
    "p_previous": "p(previous)",
    "p_remaining": "p(remaining)",
    "exact_match": "exact match",
    "prefix_match": "begins with an answer",
    "mc1": "MC1",
    "mc2": "MC2",
    "mc1_norm": "MC1, by length",
    "neutral_perplexity": "perplexity, neutral text",
}


def show(value: Any) -> str:
    """A metric as text: `0.041 [0.031, 0.052]`, or the number alone."""
    if isinstance(value, Mapping):
        low, high = value["ci"]
        return f"{value['mean']:.3g} [{low:.3g}, {high:.3g}]"
    return f"{value:.4g}"
