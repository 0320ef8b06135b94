"""Finished runs side by side, from their own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from ..analysis.errors import InputError
from .console import METRIC_NAMES, show


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Every finished run below `folder`: name, recipe, seed, parameters, metrics after (and once, before).

    Raises:
        InputError: no such folder, or no finished run in it.
    """
    if not folder.is_dir():
        raise InputError(f"runs folder {str(folder)!r} does not exist; give the folder that holds the runs")
    runs = []
    for path in sorted(folder.glob("*/run.json")):
        state = json.loads(path.read_text(encoding="utf-8"))
        file = path.parent / "evaluation.json"
        if state.get("state") != "done" or not file.is_file():
            continue
        evaluation = json.loads(file.read_text(encoding="utf-8"))
        runs.append(
            {key: state.get(key) for key in ("name", "recipe", "seed", "parameters", "parameters_share")}
            | {key: evaluation[key] for key in ("task", "task_sha256", "before", "after")}
        )
    if not runs:
        raise InputError(f"{str(folder)!r} holds no finished run; headtune train writes one a folder")
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
            result.add_row("base", run["task"], "0", *(show(run["before"][key]) for key in keys))
        result.add_row(run["name"], run["task"], str(run["parameters"]), *(show(run["after"][key]) for key in keys))
    return result
