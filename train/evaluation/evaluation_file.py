"""What a run measures and writes down: evaluation.json, before and after, and the folders beside it."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.messages import chat_as_json
from headtune.analysis.tasks.task import Task
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.files import atomic_folder, write_json
from headtune.train.config.methods import EvaluationConfig

from .evaluate import Scored, evaluate
from .multiple_choice import truthfulqa_preamble
from .run_reader import IMPLIED


def evaluation_identity(settings: EvaluationConfig, model: HeadModel, task: Task) -> dict[str, Any]:
    """What two measurements of the base model must share to be the same measurement."""
    return {
        "task": task.name,
        "chat_template": chat_as_json(task.chat_template),
        "task_sha256": task.sha256,
        "weights_sha256": model.weights_sha256,
        "n_items": settings.n_items,
        "preamble": settings.preamble,
        "scoring": settings.scoring,
    }


def read_before(path: Path, identity: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The base model's metrics and lists from an evaluation.json.

    Raises:
        InputError: the file is missing or measured another model, task or number of items.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        lists = [
            {
                "subject": e["subject"],
                "prompt": e["prompt"],
                "text": e["before"],
                "kinds": e["before_kinds"],
                "values": e["before_values"],
            }
            for e in data["examples"]
        ]
        before = data["before"]
    except FileNotFoundError:
        raise InputError(f"evaluation.before {str(path)!r} does not exist; name a run's evaluation.json") from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise InputError(f"evaluation.before {str(path)!r} is not a run's evaluation.json") from None
    for key, value in identity.items():
        measured = data.get(key, IMPLIED.get(key))
        if measured != value:
            raise InputError(
                f"evaluation.before {str(path)!r} measured another {key} ({measured!r}, not {value!r}); remove the key"
            )
    return before, lists


def to_row(scored: Scored) -> dict[str, Any]:
    """What is written down of a scored example."""
    example = scored.example
    return {
        "subject": example.subject,
        "prompt": example.prompt,
        "text": scored.text,
        "kinds": list(scored.kinds),
        "values": dict(scored.values),
    }


def write_evaluation(
    folder: Path,
    identity: Mapping[str, Any],
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
    lists_before: Sequence[dict[str, Any]],
    lists_after: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    later = lists_after or [{"text": "", "kinds": [], "values": {}}] * len(lists_before)
    content = {
        **identity,
        "before": before,
        "after": after,
        "examples": [
            {
                "subject": first["subject"],
                "prompt": first["prompt"],
                "before": first["text"],
                "after": second["text"],
                "before_kinds": first["kinds"],
                "after_kinds": second["kinds"],
                "before_values": first["values"],
                "after_values": second["values"],
            }
            for first, second in zip(lists_before, later, strict=True)
        ],
    }
    write_json(folder / "evaluation.json", content)
    return content


def measure(
    tokenizer: Any, task: Task, settings: EvaluationConfig, model: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    preamble = truthfulqa_preamble() if settings.preamble == "truthfulqa" else ""
    metrics, scored = evaluate(
        model, tokenizer, task, settings.n_items, settings.batch_size, preamble, settings.scoring
    )
    return metrics, [to_row(item) for item in scored]


def flatten_metrics(prefix: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers for the tracker: means of the metrics, `prefix/name`."""
    return {
        f"{prefix}/{name}": value["mean"] if isinstance(value, dict) else value
        for name, value in metrics.items()
        if name != "n"
    }


def new_folder(folder: Path) -> contextlib.AbstractContextManager[Path]:
    """A folder that is there whole or not at all; one that a broken run left is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    return atomic_folder(folder)


def peak_memory() -> float:
    """GiB this process has held at most: of the GPU where there is one, of main memory otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
