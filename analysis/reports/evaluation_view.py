"""An evaluation, before against after, made ready for `templates/evaluation.html.j2`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN_EXAMPLES = 50


def evaluation_view(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics with their change, a note on what was measured, and the first examples.

    Args:
        evaluation: the content of evaluation.json, `{"before", "after", "task", "examples"}`.
    """
    before, after = evaluation["before"], evaluation["after"]
    metrics = []
    for name in [key for key in {**before, **after} if key != "n"]:
        old, new = before.get(name), after.get(name)
        change = None if _mean(old) is None or _mean(new) is None else _mean(new) - _mean(old)
        metrics.append({"name": name.replace("_", " "), "before": old, "after": new, "change": change})
    counts = after.get("n") or before.get("n") or {}
    note = f"Task {evaluation.get('task')}. " + ", ".join(
        f"{key.replace('_', ' ')}: {in_words(value) or 'none' if isinstance(value, Mapping) else value}"
        for key, value in counts.items()
    )
    examples = evaluation.get("examples") or []
    return {"metrics": metrics, "note": note, "examples": examples[:SHOWN_EXAMPLES], "n_examples": len(examples)}


def _mean(value: Any) -> Any:
    return value.get("mean") if isinstance(value, Mapping) else value


def in_words(values: Mapping[str, Any]) -> str:
    """`key value, key value`, without what is None or empty."""
    return ", ".join(f"{key} {value}" for key, value in values.items() if value not in (None, {}))
