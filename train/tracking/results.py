"""What every run ends with, whether it learnt one task or a sequence: counts, report, what the tracker is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headtune.analysis.reports import head_report
from headtune.analysis.reports.head_profiles import read_profiles
from headtune.train.config.resolve_heads import ResolvedHeads
from headtune.train.config.schema import Recipe
from headtune.train.evaluation.evaluation_file import flatten_metrics

from . import lineage, media
from .tracker import Tracker


def parameter_counts(trained: int, total: int) -> dict[str, Any]:
    """What run.json says of the number of weights."""
    return {"parameters": trained, "model_parameters": total, "parameters_share": trained / total}


def finish(
    recipe: Recipe,
    tracker: Tracker,
    resolved: ResolvedHeads,
    evaluation: Mapping[str, Any],
    record: Mapping[str, Any],
) -> None:
    """Write report.html, and show the tracker the metrics, the heads and what was trained.

    Args:
        resolved: the run's heads, with the head set that the report draws, if any.
        evaluation: the content of evaluation.json; record: that of run.json.
    """
    folder = recipe.folder
    after = flatten_metrics("after", evaluation["after"])
    tracker.log(after)
    tracker.summary({key: record[key] for key in ("parameters", "parameters_share")} | after)
    role = lineage.role_of(recipe.heads)
    tracker.config(lineage.config_keys(recipe.recipe, record.get("heads"), role, record.get("parameters")))
    media.show_chosen(tracker, record.get("heads") or [])
    media.show_evaluation(tracker, evaluation)
    if (folder / "adapter").is_dir():
        tracker.artifact(folder / "adapter", f"{recipe.name}-adapter", "adapter")
    elif (folder / "model").is_dir():  # as large as the base model: known by its digest, not uploaded
        tracker.summary({"outputs/model/sha256": lineage.tree_sha256(folder / "model")})
    if resolved.head_set is None:
        media.write_run_page(recipe, folder, evaluation)
        return
    profiles = folder / "portraits.json"
    portraits = read_profiles(profiles) if profiles.is_file() else []
    head_report.write_report(
        folder / "report.html", resolved.head_set, resolved.means or {}, evaluation, portraits, title=recipe.name
    )
