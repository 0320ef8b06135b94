"""Finished runs, read from their own folders."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from headtune.analysis.tasks.messages import chat_from_json, chat_in_words
from headtune.analysis.utils.errors import InputError

log = logging.getLogger(__name__)
IDENTITY = ("task", "chat_template", "task_sha256", "weights_sha256", "n_items", "preamble", "scoring")
IMPLIED = {"scoring": "harness", "chat_template": False}  # by files that were written before there was a choice


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A finished run.

    Attributes:
        recipe: the resolved recipe, flat: `method.top` -> 8.
        before, after: metrics, a number or `{"mean", "ci"}`.
        values: metric -> `[n_examples]` after training, for metrics that examples have.
        values_before: the same of the base model.
        subjects: `[n_examples]`.
        heads: (layer, head) of what was tuned, held or distilled.
        measured: what two runs must share for their numbers to be comparable: prompts, base weights, way of asking.
    """

    folder: Path
    name: str
    recipe: Mapping[str, Any]
    state: Mapping[str, Any]
    task: str
    task_sha256: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    values: Mapping[str, NDArray[np.float64]]
    values_before: Mapping[str, NDArray[np.float64]]
    subjects: Sequence[str]
    heads: frozenset[tuple[int, int]]
    measured: str

    @property
    def seed(self) -> int:
        return int(self.state.get("seed") or 0)

    def generations(self, n: int) -> list[dict[str, Any]]:
        """The first `n` held-out prompts with what was written before and after."""
        data = json.loads((self.folder / "evaluation.json").read_text(encoding="utf-8"))
        return list(data.get("examples", [])[:n])

    def curve(self, name: str = "train/loss") -> list[tuple[int, float]]:
        """(step, value) of a logged number; of a step that was logged twice, after a resume, the later one.

        A line that a process did not write to its end, because it was killed, is left out with a warning.
        """
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return []
        values: dict[int, float] = {}
        damaged = 0
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                damaged += 1
                continue
            if row.get(name) is not None and row.get("step") is not None:
                values[row["step"]] = float(row[name])
        if damaged:
            lines = "1 line that cannot be read is" if damaged == 1 else f"{damaged} lines that cannot be read are"
            log.warning("%s: %s left out", path, lines)
        return sorted(values.items())


def read_runs(
    folder: Path, group: str | None = None, tags: Sequence[str] = (), recipe: str | None = None
) -> list[RunRecord]:
    """Every finished run in `folder`, or in a sweep's folder in it, in order of their names.

    Args:
        group, tags, recipe: only runs of this `tracking.group`, with all of these `tracking.tags`, of this family.

    Raises:
        InputError: no such folder, or no finished run in it that passes.
    """
    if not folder.is_dir():
        raise InputError(f"runs folder {str(folder)!r} does not exist; give the folder that holds the runs")
    runs, others = [], []
    for path in sorted([*folder.glob("*/run.json"), *folder.glob("*/*/run.json")]):
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            file = path.parent / "evaluation.json"
            if state.get("state") != "done" or not file.is_file():
                reason = "no evaluation" if state.get("state") == "done" else state.get("state")
                others.append(f"{path.parent.name} ({reason})")
                continue
            runs.append(_read(path.parent, state, json.loads(file.read_text(encoding="utf-8"))))
        except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            others.append(f"{path.parent.name} (damaged: {type(error).__name__})")
    if others:
        log.warning("not finished, left out (%d): %s", len(others), ", ".join(others))
    if not runs:
        raise InputError(f"{str(folder)!r} holds no finished run; headtune train writes one a folder")
    passing = [run for run in runs if _passes(run, group, tags, recipe)]
    if not passing:
        asked = [f"group {group!r}"] * (group is not None) + [f"tag {tag!r}" for tag in tags]
        asked += [f"recipe {recipe!r}"] * (recipe is not None)
        there = sorted({str(run.recipe.get("tracking.group")) for run in runs} - {"None"})
        raise InputError(
            f"none of the {len(runs)} finished runs in {str(folder)!r} has {' and '.join(asked)}; groups there: "
            f"{', '.join(there) or 'none'}; recipes: {', '.join(sorted({str(r.recipe['recipe']) for r in runs}))}"
        )
    return passing


def _read(folder: Path, state: Mapping[str, Any], evaluation: Mapping[str, Any]) -> RunRecord:
    path = folder / "recipe.yaml"
    recipe = flatten_config(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    for when in ("before", "after"):
        if not isinstance(evaluation[when], Mapping):
            raise TypeError(f"{when} holds no metrics")
    examples = evaluation.get("examples") or []

    def values(when: str) -> dict[str, NDArray[np.float64]]:
        names = sorted(set.intersection(*(set(row[when]) for row in examples))) if examples else []
        return {name: np.array([row[when][name] for row in examples], dtype=float) for name in names}

    return RunRecord(
        folder,
        state["name"],
        {"recipe": state.get("recipe")} | recipe,
        state,
        evaluation["task"] + _as_chats(evaluation),
        evaluation["task_sha256"],
        evaluation["before"],
        evaluation["after"],
        values("after_values"),
        values("before_values"),
        [row["subject"] for row in examples],
        frozenset((layer, head) for layer, head in state.get("heads") or []),
        json.dumps([evaluation.get(key, IMPLIED.get(key)) for key in IDENTITY]),
    )


def _as_chats(evaluation: Mapping[str, Any]) -> str:
    """What a task's name is followed by where its prompts were chats: the same prompts as they are are another task."""
    chat = chat_from_json(evaluation.get("chat_template"))
    return f", as {chat_in_words(chat)}" if chat else ""


def _passes(run: RunRecord, group: str | None, tags: Sequence[str], recipe: str | None) -> bool:
    run_tags = run.recipe.get("tracking.tags") or []
    return (
        (group is None or run.recipe.get("tracking.group") == group)
        and set(tags) <= set(run_tags)
        and (recipe is None or run.recipe["recipe"] == recipe)
    )


def flatten_config(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `a.b` -> value; lists stay whole."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: inner
        for name, item in value.items()
        for key, inner in flatten_config(item, f"{prefix}.{name}" if prefix else str(name)).items()
    }
