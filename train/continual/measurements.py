"""What a sequence of tasks is measured by: each task before and after, what was forgotten, evaluation.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.messages import chat_as_json
from headtune.analysis.tasks.task import Task
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.stats import mean_interval
from headtune.train.config.methods import EvaluationConfig
from headtune.train.evaluation.evaluate import score_task
from headtune.train.evaluation.evaluation_file import read_before, to_row, write_evaluation
from headtune.train.evaluation.multiple_choice import truthfulqa_preamble

from .metrics import sequence_metrics

PRIMARY = {"exact_match": "exact_match", "lists": "correct_new_rate", "multiple_choice": "mc1"}
PROGRESS = "sequence.json"


def scores_of(tokenizer: Any, settings: EvaluationConfig, model: Any, task: Task) -> dict[str, Any]:
    """A task's main metric by example, with what the model wrote."""
    model.eval()
    chosen = task.kind == "multiple_choice"
    preamble = truthfulqa_preamble() if settings.preamble == "truthfulqa" and chosen else ""
    scoring = settings.scoring if chosen else "harness"
    metrics, scored = score_task(model, tokenizer, task, settings.n_items, settings.batch_size, preamble, scoring)
    main = PRIMARY[task.kind]
    return {
        "metric": main,
        "metrics": {name: value["mean"] for name, value in metrics.items() if name != "n"},
        "values": [one.values[main] for one in scored],
        "rows": [to_row(one) for one in scored],
    }


def mean(scores: Mapping[str, Any]) -> float:
    return float(np.mean(scores["values"]))


def identity_of(settings: EvaluationConfig, model: HeadModel, tasks: Sequence[Task]) -> dict[str, Any]:
    """What two measurements of the base model must share to be the same measurement."""
    digest = hashlib.sha256(" ".join(f"{task.name} {task.sha256}" for task in tasks).encode()).hexdigest()
    return {
        "task": "sequence",
        "chat_template": chat_as_json(tasks[0].chat_template),
        "task_sha256": digest,
        "weights_sha256": model.weights_sha256,
        "n_items": settings.n_items,
        "preamble": settings.preamble,
        "scoring": settings.scoring,
    }


def base_of(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The base model's measurement in another run of the same sequence, whose evaluation.json is `path`.

    Raises:
        InputError: the file is missing or measured something else.
    """
    read_before(path, identity)
    other = path.with_name(PROGRESS)
    try:
        saved = json.loads(other.read_text(encoding="utf-8"))
        return {key: saved[key] for key in ("before", "general_before", "perplexity_before")}
    except (OSError, ValueError, KeyError):
        raise InputError(f"evaluation.before {str(path)!r} has no {PROGRESS} beside it; remove the key") from None


def evaluation_of(
    identity: Mapping[str, Any],
    folder: Path,
    names: Sequence[str],
    general: Sequence[Task],
    saved: Mapping[str, Any],
    together: bool,
) -> dict[str, Any]:
    """Write evaluation.json: averages over tasks before and after, what was forgotten, and each task by itself."""
    last = saved["after"][-1]
    before = _averages(names, saved["before"], saved["general_before"], saved["perplexity_before"])
    after = _averages(names, last, saved["general_after"], saved["perplexity_after"])
    if not together:
        columns = saved["after"]
        metrics = sequence_metrics(
            [[columns[j][i]["values"] if j >= i else None for j in range(len(names))] for i in range(len(names))],
            [_subjects(one) for one in last],
        )
        after |= {"bwt": {"mean": metrics["bwt"], "ci": metrics["bwt_ci"]}, "forgetting": metrics["forgetting"]}
    counts = {name: len(of["values"]) for name, of in zip(names, last, strict=True)}
    before["n"] = after["n"] = {"examples": sum(counts.values()), "by_task": counts}
    parts = [(of["rows"], later["rows"]) for of, later in zip(saved["before"], last, strict=True)]
    parts += [(saved["general_before"][t.name]["rows"], saved["general_after"][t.name]["rows"]) for t in general]
    rows_before, rows_after = ([row for part in parts for row in part[side]] for side in (0, 1))
    return write_evaluation(folder, identity, before, after, rows_before, rows_after)


def _averages(
    names: Sequence[str], measured: Sequence[Mapping[str, Any]], general: Mapping[str, Any], perplexity: float
) -> dict[str, Any]:
    """`op`, each task's main metric, the general tasks' metrics, all as `{"mean", "ci"}`, and the perplexity."""
    once = [
        [None] * i + [one["values"]] * (len(measured) - i) for i, one in enumerate(measured)
    ]  # as if nothing changed
    metrics = sequence_metrics(once, [_subjects(one) for one in measured])
    result: dict[str, Any] = {"op": {"mean": metrics["op"], "ci": metrics["op_ci"]}}
    result |= {
        f"{name}/{one['metric']}": mean_interval(one["values"], _subjects(one))
        for name, one in zip(names, measured, strict=True)
    }
    for name, one in general.items():
        for metric in one["rows"][0]["values"]:
            result[f"{name}/{metric}"] = mean_interval([row["values"][metric] for row in one["rows"]], _subjects(one))
    return result | {"neutral_perplexity": perplexity}


def _subjects(scores: Mapping[str, Any]) -> list[str]:
    """Of each example of a task, as its values are ordered."""
    return [row["subject"] for row in scores["rows"]]
