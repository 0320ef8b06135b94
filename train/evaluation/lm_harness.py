"""Tasks of the Language Model Evaluation Harness (EleutherAI), on a model as it is in memory: its adapter is on.

The harness (`pip install lm_eval`) is an optional package and does the measuring; here its tasks are found, and its
results brought into the form of evaluation.json: `TASK/METRIC` -> `{"mean", "ci"}` with

    ci = mean -+ 1.96 * stderr

where the harness gives a standard error, and the number alone where it gives none. A task is one of the harness's own,
by name, or a YAML file or a folder of them, whose data may be local: then nothing is asked of the hub. Such a file may
name Python functions that stand beside it (`!function`), which run with the user's rights.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from headtune.analysis.utils.errors import InputError, nearest
from headtune.analysis.utils.files import sha256_of

MISSING = "--lm-eval needs the Language Model Evaluation Harness, which is not installed; pip install 'lm_eval>=0.4.13'"
_ENDINGS = (".yaml", ".yml")
_RESAMPLES = 1000  # where a metric has no formula for its standard error


@dataclass(frozen=True)
class HarnessTasks:
    """What is to be measured.

    Attributes:
        names: of the harness's own tasks or groups.
        files: task files.
    """

    names: tuple[str, ...]
    files: tuple[Path, ...]

    @property
    def label(self) -> str:
        return ",".join([*self.names, *(path.stem for path in self.files)])


def parse_tasks(text: str) -> HarnessTasks:
    """`arc_easy,hellaswag`, a YAML file, or a folder of them; commas between several.

    Raises:
        InputError: the harness is not installed, a name is empty or given twice, a file is missing or a folder holds no
            YAML file.
    """
    if not _installed():
        raise InputError(MISSING)
    words = [word.strip() for word in text.split(",")]
    names: list[str] = []
    files: list[Path] = []
    for word in words:
        path = Path(word)
        if not word or words.count(word) > 1:
            raise InputError(
                f"--lm-eval {text!r} {'names a task twice' if word else 'has an empty name'}; name each once"
            )
        if path.is_dir():
            inside = sorted(file for ending in _ENDINGS for file in path.glob(f"*{ending}"))
            # Files that only others include start with an underscore, as in the harness's own folders.
            tasks = [file for file in inside if not file.name.startswith("_")]
            if not tasks:
                raise InputError(f"--lm-eval folder {word!r} holds no task: no .yaml file; give a folder that has one")
            files += tasks
        elif path.suffix in _ENDINGS:
            if not path.is_file():
                raise InputError(f"--lm-eval file {word!r} does not exist; give a task's YAML file or a task's name")
            files.append(path)
        else:
            names.append(word)
    return HarnessTasks(tuple(names), tuple(files))


def _installed() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


def evaluate_harness(
    model: Any, tokenizer: Any, tasks: HarnessTasks, batch_size: int = 16, limit: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Let the harness measure a model.

    Args:
        model: a transformers model or a PeftModel.
        limit: examples of each task at most.

    Returns:
        Metrics, as the head of this module says, with `n`: `{"examples"}`; and what they were measured with: the
        harness's version, of each task its version, number of examples and of shots, and the SHA-256 of files.

    Raises:
        InputError: no such task, or one that the harness cannot load: data that are not on this machine, a broken file.
    """
    logger = logging.getLogger("lm_eval")
    if logger.level == logging.NOTSET:  # it warns of what is meant here: a model that is loaded already
        logger.setLevel(logging.ERROR)
    from lm_eval import __version__, simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from headtune.analysis.models.head_model import positions_of

    folders = sorted({str(path.parent.resolve()) for path in tasks.files})
    manager = TaskManager(include_path=folders or None, include_defaults=bool(tasks.names) or _includes(tasks.files))
    names = [*tasks.names, *(_task_of(path) for path in tasks.files)]
    if unknown := [name for name in names if name not in manager.task_index]:
        raise InputError(f"--lm-eval: the harness has no task {unknown[0]!r}; {nearest(unknown[0], manager.all_tasks)}")
    model.eval()
    length = positions_of(model)
    engine = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **({"max_length": length} if length else {})
    )
    try:
        output = simple_evaluate(
            model=engine, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=_RESAMPLES, log_samples=False
        )
    except (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or ["no message"]
        raise InputError(
            f"--lm-eval {tasks.label}: the harness stops with {type(error).__name__}: {lines[0][:300]}; where a task's "
            "data are not on this machine, load them once with the network, or give a task file with local data"
        ) from error
    if output is None:
        raise InputError(f"--lm-eval {tasks.label}: the harness returned no result; run it in one process")
    counts = {name: entry["effective"] for name, entry in output["n-samples"].items()}
    facts = {
        "version": __version__,
        "limit": limit,
        "tasks": {
            name: {
                "version": output["versions"].get(name),
                "n_examples": counts[name],
                "num_fewshot": output["n-shot"].get(name),
            }
            for name in counts
        },
        "files": {path.name: sha256_of(path) for path in tasks.files},
    }
    return metrics_of(output["results"]) | {"n": {"examples": sum(counts.values())}}, facts


def metrics_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The harness's `results` as metrics of evaluation.json; a filter other than `none` is part of the name.

    Raises:
        InputError: a metric that is no finite number.
    """
    metrics: dict[str, Any] = {}
    for task, values in results.items():
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if not kind or name.endswith("_stderr") or isinstance(value, str):
                continue  # alias, sample_len: not measured
            if not math.isfinite(value):
                raise InputError(f"--lm-eval {task}: {name} is {value}; the task has no examples to measure it on")
            error = values.get(f"{name}_stderr,{kind}")
            label = f"{task}/{name}" + ("" if kind == "none" else f"@{kind}")
            has_error = isinstance(error, int | float) and math.isfinite(error)
            metrics[label] = _with_interval(value, error) if has_error else float(value)
    return metrics


def _with_interval(mean: float, stderr: Any) -> dict[str, Any]:
    return {"mean": float(mean), "ci": [mean - 1.96 * stderr, mean + 1.96 * stderr]}


class _Reader(yaml.SafeLoader):
    """Reads a task's name out of its file; what the file asks to be run or included is left alone."""


_Reader.add_multi_constructor("!", lambda _loader, _tag, _node: None)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Reader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--lm-eval file {str(path)!r} is not YAML: {str(error).splitlines()[0]}") from None
    return data if isinstance(data, dict) else {}


def _task_of(path: Path) -> str:
    """The name of the task or group that a file defines."""
    data = _read(path)
    name = data.get("task") if isinstance(data.get("task"), str) else data.get("group")
    if not isinstance(name, str):
        raise InputError(f"--lm-eval file {str(path)!r} has no key 'task' with the task's name; add it")
    return name


def _includes(files: Sequence[Path]) -> bool:
    """Whether a group in these files has tasks of the harness's own, which are looked for only then (14,000 files)."""
    defined = {_task_of(path) for path in files}
    groups = [data["task"] for data in map(_read, files) if isinstance(data.get("task"), list)]
    return any(isinstance(entry, str) and entry not in defined for members in groups for entry in members)
