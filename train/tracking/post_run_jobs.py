"""What is done with a finished run, filed beside it in W&B: its export, its measurement on another task.

Both are short W&B runs in the project and group of the run they belong to, with what they are made from by digest. A
trouble of W&B's is a warning, as everywhere.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headtune.analysis.utils.errors import CheckError
from headtune.analysis.utils.files import write_json
from headtune.analysis.utils.state_files import read_state
from headtune.train.evaluation.evaluation_file import flatten_metrics

from . import media
from .lineage import config_keys, config_of, input_artifacts, wandb_run_args
from .tracker import Tracker

if TYPE_CHECKING:
    from headtune.train.config.schema import Recipe

log = logging.getLogger(__name__)


def tracked_export(run: Path, recipe: Recipe, target: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Carry out an export of a run and file it with job type `export`; W&B's files go to the run's folder.

    Nothing is filed of an export that is refused; one whose proof fails is filed as failed.

    Args:
        make: writes `target`; returns the content of export.json.
    """
    try:
        result = make()
    except CheckError as error:
        _file_export(run, recipe, target, {"passed": False, "error": str(error)})
        raise
    _file_export(run, recipe, target, result)
    return result


def _file_export(run: Path, recipe: Recipe, target: Path, result: Mapping[str, Any]) -> None:
    if not os.access(run, os.W_OK):
        log.warning("the export is not filed in W&B: %s cannot be written", run)
        return
    config, paths = _config(run, recipe)
    name = f"{recipe.name}-export"
    with Tracker(run, name, config | {"target": target.name}, **wandb_run_args(recipe, "export")) as tracker:
        tracker.uses(_inputs(run), paths)
        tracker.summary({key: value for key, value in result.items() if isinstance(value, bool | int | float | str)})
        written = target / "export.json"
        if "error" in result:
            tracker.finish(failed=True)
        elif written.is_file():
            rows = [[file, digest] for file, digest in result["files"].items()]
            tracker.table("files", ["file", "sha256"], rows)
            # Small, and it names every file of the export by its digest: the weights themselves stay where they are.
            tracker.artifact(written, name, "export", copy=True)


def keep_evaluation(
    out: Path,
    target: str,
    recipe: Recipe | None,
    task: Mapping[str, Any],
    metrics: Mapping[str, Any],
    generations: Sequence[Mapping[str, Any]],
    knobs: Sequence[Any],
    interventions: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write a measurement into `out` (evaluation.json, metrics.jsonl) and file it with job type `evaluate`.

    Args:
        target: what was measured: a run's folder or a model.
        recipe: the run's; None for a model, which is filed in the project `headtune`.
        task: `{"name", "sha256", "n_examples"}`.
        generations: `{"prompt", "text", "kinds", "values"}` of every prompt.
        knobs: what was switched on, as the command line has it.
        interventions: the same with what came of it: the heads that were silenced, how well an intercept fits.
    """
    run = Path(target)
    inputs = _inputs(run) if recipe else {}
    content: dict[str, Any] = {"target": target, "task": dict(task), "knobs": list(knobs), "inputs": inputs}
    content |= {"interventions": list(interventions)} if interventions else {}
    write_json(out / "evaluation.json", content | {"metrics": dict(metrics), "generations": list(generations)})
    base = run.resolve().name
    config: dict[str, Any] = config_keys("none", None, None, None) | {"model": {"name": target}}
    paths: dict[str, Path] = {}
    arguments: dict[str, Any] = {"job_type": "evaluate", "tags": ["evaluate"]}
    if recipe is not None:
        base, arguments = recipe.name, wandb_run_args(recipe, "evaluate")
        config, paths = _config(run, recipe)
    measured = {"evaluated": target, "evaluated_task": dict(task), "knobs": [str(knob) for knob in knobs]}
    with Tracker(out, f"{base}-{task['name']}", config | measured, **arguments) as tracker:
        tracker.uses(inputs, paths)
        tracker.log(flatten_metrics("evaluate", metrics))
        tracker.summary(flatten_metrics("evaluate", metrics))
        media.show_metrics(tracker, metrics, generations)
        tracker.artifact(out / "evaluation.json", f"{base}-evaluation", "evaluation", copy=True)


def _inputs(run: Path) -> dict[str, dict[str, str]]:
    return input_artifacts(run, _state(run))


def _state(run: Path) -> dict[str, Any]:
    return read_state(run / "run.json") if (run / "run.json").is_file() else {}


def _config(run: Path, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Path]]:
    """The run's W&B configuration with its pinned keys, and where its products are, by kind."""
    state = _state(run)
    keys = config_keys(recipe.recipe, state.get("heads"), config_of(recipe)["role"], state.get("parameters"))
    products = {"heads": run / "heads.json", "adapter": run / "adapter"}
    paths = {kind: path for kind, path in products.items() if path.exists()}
    return config_of(recipe) | keys | {"run": state.get("wandb_id")}, paths
