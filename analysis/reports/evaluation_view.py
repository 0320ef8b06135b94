"""An evaluation, before against after, made ready for `templates/evaluation.html.j2`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from headtune.analysis.utils.stats import change_interval

SHOWN_EXAMPLES = 50


def evaluation_view(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics with their change, a note on what was measured, and the first examples.

    Args:
        evaluation: the content of evaluation.json, `{"before", "after", "task", "examples"}`.
    """
    before, after = evaluation["before"], evaluation["after"]
    paired = changes(evaluation)
    metrics = []
    for name in [key for key in {**before, **after} if key != "n"]:
        old, new = before.get(name), after.get(name)
        change = None if _mean(old) is None or _mean(new) is None else _mean(new) - _mean(old)
        interval = paired.get(name, {}).get("ci")
        metrics.append(
            {
                "name": name.replace("_", " "),
                "before": old,
                "after": new,
                "change": change,
                "interval": interval,
                "distinct": interval is None or excludes_zero(interval),
            }
        )
    counts = after.get("n") or before.get("n") or {}
    note = f"Task {evaluation.get('task')}. " + ", ".join(
        f"{key.replace('_', ' ')}: {in_words(value) or 'none' if isinstance(value, Mapping) else value}"
        for key, value in counts.items()
    )
    examples = evaluation.get("examples") or []
    return {"metrics": metrics, "note": note, "examples": examples[:SHOWN_EXAMPLES], "n_examples": len(examples)}


def changes(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Metric -> `{"mean", "ci"}` of after - before, for metrics that examples have: paired, over subjects.

    Empty where only one of the two was measured, or with a single subject.
    """
    examples = evaluation.get("examples") or []
    result = {}
    for name in evaluation.get("after") or {}:
        rows = [
            (e["before_values"][name], e["after_values"][name], e["subject"])
            for e in examples
            if name in e.get("before_values", {}) and name in e.get("after_values", {})
        ]
        if not rows or len({subject for *_, subject in rows}) < 2:
            continue
        old, new, subjects = zip(*rows, strict=True)
        change = change_interval(old, new, subjects)
        if all(math.isfinite(bound) for bound in change["ci"]):  # type: ignore[union-attr]
            result[name] = change
    return result


def excludes_zero(interval: Any) -> bool:
    """Whether an interval of a change does not hold 0."""
    low, high = interval
    return bool(low > 0 or high < 0)


def _mean(value: Any) -> Any:
    return value.get("mean") if isinstance(value, Mapping) else value


def in_words(values: Mapping[str, Any]) -> str:
    """`key value, key value`, without what is None or empty."""
    return ", ".join(f"{key} {value}" for key, value in values.items() if value not in (None, {}))
