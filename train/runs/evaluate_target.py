"""Measure a finished run, a model or an export on a task: what `headtune evaluate` does.

    target = target_of("runs/NAME", "one_to_many:test")
    evaluate_target(target).metrics

The first function checks all that can be checked without a model, and loads none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headtune.analysis.heads import at_test_time
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.task import Kind, Task, scored
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.files import require_new_folder
from headtune.analysis.utils.progress import Notify, Progress, silent
from headtune.train.config.recipe import load_recipe

if TYPE_CHECKING:
    from headtune.train.config.schema import Recipe
    from headtune.train.evaluation.evaluate import Scored
    from headtune.train.evaluation.lm_harness import HarnessTasks
    from headtune.train.evaluation.multiple_choice import Scoring


@dataclass(frozen=True)
class Target:
    """What is measured, on what.

    Attributes:
        name: a run's folder, a model's folder, a built-in name or a hub id.
        task: None where the harness measures.
        recipe: the run's; None for a model.
        knobs: interventions that are on while it is measured, as the command line gives them.
        harness: tasks of lm-evaluation-harness in place of `task`.
        limit: examples of each task of the harness at most.
    """

    name: str
    task: Task | None
    recipe: Recipe | None = None
    knobs: tuple[str, ...] = ()
    harness: HarnessTasks | None = None
    limit: int | None = None


@dataclass(frozen=True)
class TargetEvaluation:
    """A measurement.

    Attributes:
        metrics: as in evaluation.json.
        generations: `{"prompt", "text", "kinds", "values"}` of every prompt.
        knobs: what was on, with what was fitted for it.
        task: None where the harness measured.
        name: of what it was measured on.
    """

    name: str
    task: Task | None
    metrics: Mapping[str, Any]
    generations: Sequence[Mapping[str, Any]]
    knobs: Sequence[Mapping[str, Any]]


def target_of(
    name: Path | str,
    task: str | None,
    kind: Kind | None = None,
    max_examples: int | None = None,
    knobs: Sequence[str] = (),
    lm_eval: str | None = None,
) -> Target:
    """Check what is to be measured; a run's own seed and kind of task hold unless they are given.

    Args:
        task: built-in name, JSONL file, hub id, or FORMAT:PATH; NAME:test takes a split.
        kind: how answers are scored.
        lm_eval: tasks of lm-evaluation-harness in place of `task`: names, YAML files or folders, with commas between.
        knobs: such as `silence:from=runs/heads,role=recall,top=4`, see `headtune.analysis.heads.at_test_time`.

    Raises:
        InputError: a head set in place of a run, no such task, a damaged recipe, an unknown knob, both or neither of
            `task` and `lm_eval`, the harness is not installed.
    """
    if (task is None) == (lm_eval is None):
        raise InputError("give what to measure on: --task NAME or --lm-eval TASKS, one of them at a time")
    folder, seed, recipe = Path(name), 0, None
    if (folder / "recipe.yaml").is_file():
        recipe = load_recipe(str(folder / "recipe.yaml"))
        seed, kind = recipe.task.split.seed, kind or recipe.task.kind  # the split that the run was trained on
    elif (folder / "heads.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(
            f"{str(folder)!r} is a head set, neither a run nor a model; give the folder of a run trained on it "
            f"(heads.from={folder}), or a model"
        )
    at_test_time.parse(knobs)
    if task is None:
        from headtune.train.evaluation.lm_harness import parse_tasks

        return Target(str(name), None, recipe, tuple(knobs), parse_tasks(str(lm_eval)), max_examples)
    loaded = load_task(task, seed).limited(max_examples)
    return Target(str(name), replace(loaded, kind=kind) if kind else loaded, recipe, tuple(knobs))


def evaluate_target(
    target: Target,
    n_items: int = 3,
    batch_size: int = 16,
    preamble: str = "",
    out: Path | None = None,
    progress: Progress = silent,
    notify: Notify = lambda _line: None,
    scoring: Scoring = "harness",
) -> TargetEvaluation:
    """Load a target and measure it.

    Args:
        n_items: list items scored per prompt.
        preamble: text before multiple-choice questions, see `truthfulqa_preamble`.
        out: a new folder for evaluation.json and metrics.jsonl; filed in W&B as the run is.
        scoring: of multiple choice, `harness` or `iti`, see `headtune.train.evaluation.multiple_choice`.

    Raises:
        InputError: `out` exists, no such run or model, a task that does not go with it.
        CheckError: the run's weights are damaged.
    """
    if out is not None:
        require_new_folder(out, "choose another --out")
    # Here, so that what `target_of` refuses is refused before transformers and PEFT are imported.
    from headtune.analysis.models.loading import wrap_model
    from headtune.train.evaluation.evaluate import evaluate
    from headtune.train.tracking.post_run_jobs import keep_evaluation

    model, tokenizer = _load(target)
    task, interventions = target.task, at_test_time.parse(target.knobs)
    switched_on: contextlib.AbstractContextManager[list[dict[str, Any]]] = contextlib.nullcontext([])
    if interventions:
        switched_on = at_test_time.applied(wrap_model(model, tokenizer, target.name), interventions, progress)
    with switched_on as notes:
        if task is None:
            measured, metrics = _by_harness(target, model, tokenizer, batch_size, notify)
            answers: Sequence[Scored] = []
        else:
            notify(f"evaluating on {len(task.examples)} prompts, {scored(task.kind, n_items)}")
            metrics, answers = evaluate(model, tokenizer, task, n_items, batch_size, preamble, scoring)
            measured = {"name": task.name, "sha256": task.sha256, "n_examples": len(task.examples)}
            measured |= {"scoring": scoring} if scoring != "harness" else {}
    generations = [{"prompt": a.example.prompt, "text": a.text, "kinds": a.kinds, "values": a.values} for a in answers]
    if out is not None:
        keep_evaluation(out, target.name, target.recipe, measured, metrics, generations, target.knobs, notes)
    return TargetEvaluation(measured["name"], task, metrics, generations, notes)


def _by_harness(
    target: Target, model: Any, tokenizer: Any, batch_size: int, notify: Notify
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was measured, and the metrics."""
    from headtune.train.evaluation.lm_harness import evaluate_harness

    assert target.harness is not None
    label = target.harness.label
    notify(f"lm-evaluation-harness measures {label}")
    metrics, facts = evaluate_harness(model, tokenizer, target.harness, batch_size, target.limit)
    return {"name": f"lm_eval {label}", "n_examples": metrics["n"]["examples"], "lm_eval": facts}, metrics


def _load(target: Target) -> tuple[Any, Any]:
    """The model and its tokenizer; merged where knobs need a view of the heads, which an adapter would hide."""
    from headtune.analysis.models.loading import load_plain

    from .load_run import load_run

    if target.recipe is not None:
        model, tokenizer, _ = load_run(Path(target.name))
        if target.knobs and hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
        return model, tokenizer
    try:
        return load_plain(target.name)
    except InputError as error:
        if Path(target.name).exists() or "/" not in target.name:
            raise
        raise InputError(f"there is no run {target.name!r}, and {error}") from None
