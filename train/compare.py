"""Finished runs side by side, from their own files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from rich.table import Table

from ..analysis.errors import InputError
from .console import METRIC_NAMES, show

log = logging.getLogger(__name__)


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Every finished run below `folder`: name, recipe, seed, parameters, metrics after (and once, before).

    Raises:
        InputError: no such folder, or no finished run in it.
    """
    if not folder.is_dir():
        raise InputError(f"runs folder {str(folder)!r} does not exist; give the folder that holds the runs")
    runs, others = [], []
    for path in sorted(folder.glob("*/run.json")):
        state = json.loads(path.read_text(encoding="utf-8"))
        file = path.parent / "evaluation.json"
        if state.get("state") != "done" or not file.is_file():
            others.append(
                f"{path.parent.name} ({'no evaluation' if state.get('state') == 'done' else state.get('state')})"
            )
            continue
        evaluation = json.loads(file.read_text(encoding="utf-8"))
        runs.append(
            {key: state.get(key) for key in ("name", "recipe", "seed", "parameters", "parameters_share")}
            | {key: evaluation[key] for key in ("task", "task_sha256", "before", "after")}
        )
    if not runs:
        raise InputError(f"{str(folder)!r} holds no finished run; headtune train writes one a folder")
    if others:
        log.warning("%d runs are left out: %s", len(others), ", ".join(others))
    return runs


def table(runs: list[dict[str, Any]]) -> Table:
    """Runs as rows, metrics as columns; the base model first, once per evaluation task."""
    result = Table()
    keys = [key for key in METRIC_NAMES if any(key in run["after"] for run in runs)]
    for name in ("run", "task", "parameters", *(METRIC_NAMES[key] for key in keys)):
        result.add_column(name, overflow="fold")
    seen = set()
    for run in runs:
        if run["task_sha256"] not in seen:
            seen.add(run["task_sha256"])
            result.add_row("base", run["task"], "0", *_cells(run["before"], keys))
        result.add_row(run["name"], run["task"], str(run["parameters"]), *_cells(run["after"], keys))
    return result


def _cells(metrics: dict[str, Any], keys: list[str]) -> list[str]:
    """A dash where a task of another kind has no such metric."""
    return [show(metrics[key]) if key in metrics else "–" for key in keys]
