"""`headtune evaluate`: a run, a model or an export, measured on a task."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from ..arguments import Add, completed, model_quiet, positive, print_json, volume_arguments


def add_parsers(add: Add) -> None:
    p = add(
        "evaluate",
        "measure a run or a model",
        "evaluate runs/NAME --task one_to_many:test",
        "evaluate runs/NAME --task country_cities --out runs/NAME-cities",
        "evaluate smollm2-135m --task country_cities --max-examples 50 --json",
        "evaluate smollm2-135m --task country_cities --knob sink:tau=0.5,gamma=0.5",
    )
    completed(p.add_argument("target", help="run folder, model folder, built-in name or hub id"), "model")
    task = p.add_argument(
        "--task", required=True, help="built-in name, JSONL file, hub id, or FORMAT:PATH such as truthfulqa:test.csv"
    )
    completed(task, "task")
    p.add_argument("--kind", choices=("lists", "exact_match", "multiple_choice"), help="how answers are scored")
    p.add_argument("--preamble", choices=("truthfulqa",), help="text before multiple-choice questions")
    p.add_argument("--items", type=positive, default=3, help="list items scored per prompt (default: 3)")
    p.add_argument("--batch-size", type=positive, default=16)
    p.add_argument("--max-examples", type=positive)
    p.add_argument(
        "--knob",
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,...",
        help="switch on, once or more: sink:tau=0.5,gamma=0.5 (scale last-layer heads that look at the first "
        "position), intercept:beta=0.5[,fit=TASK] (take away the last MLP's intercept)",
    )
    out = p.add_argument("--out", type=Path, help="new folder to keep the result in, filed in W&B as the run is")
    completed(out, "folder")
    volume_arguments(p)
    p.set_defaults(do=evaluate_command)


def _require_target(target: Path) -> None:
    """Refuse a head set, which is easily given for the run that was trained on it."""
    from headtune.analysis.utils.errors import InputError

    if (target / "heads.json").is_file() and not (target / "config.json").is_file():
        raise InputError(
            f"{str(target)!r} is a head set, neither a run nor a model; give the folder of a run trained on it "
            f"(heads.from={target}), or a model"
        )


def evaluate_command(arguments: argparse.Namespace) -> int:
    from headtune.analysis.interventions import last_layer
    from headtune.analysis.tasks.loading import load_task
    from headtune.analysis.tasks.task import scored
    from headtune.analysis.utils.errors import InputError
    from headtune.analysis.utils.files import require_new_folder
    from headtune.train.config.recipe import load_recipe

    is_run = (Path(arguments.target) / "recipe.yaml").is_file()
    if not is_run:
        _require_target(Path(arguments.target))
    seed, kind = 0, arguments.kind
    recipe = load_recipe(str(Path(arguments.target) / "recipe.yaml")) if is_run else None
    if recipe is not None:  # a split of the task is the one that the run was trained on
        seed, kind = recipe.task.split.seed, kind or recipe.task.kind
    task = load_task(arguments.task, seed).limited(arguments.max_examples)
    if kind:
        task = dataclasses.replace(task, kind=kind)
    chosen = last_layer.parse(arguments.knob)
    if arguments.out is not None:
        require_new_folder(arguments.out, "choose another --out")
    model_quiet()
    from headtune.analysis.models.loading import load_plain, wrap_model
    from headtune.train.evaluation.evaluate import evaluate
    from headtune.train.evaluation.multiple_choice import truthfulqa_preamble
    from headtune.train.runs.load_run import load_run
    from headtune.train.tracking.follow_up import keep_evaluation

    from .. import console
    from ..tables import metrics_table

    if is_run:
        model, tokenizer, _ = load_run(Path(arguments.target))
        if chosen:  # knobs need a view of the model's heads, which an adapter around the projection would hide
            model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    else:
        try:
            model, tokenizer = load_plain(arguments.target)
        except InputError as error:
            if Path(arguments.target).exists() or "/" not in arguments.target:
                raise
            raise InputError(f"there is no run {arguments.target!r}, and {error}") from None
    turned: Any = contextlib.nullcontext([])
    if chosen:
        turned = last_layer.turned(wrap_model(model, tokenizer, arguments.target), chosen, console.progress)
    with turned as notes:
        console.notify(f"evaluating on {len(task.examples)} prompts, {scored(task.kind, arguments.items)}")
        preamble = truthfulqa_preamble() if arguments.preamble else ""
        metrics, lists = evaluate(model, tokenizer, task, arguments.items, arguments.batch_size, preamble)
    generations = [{"prompt": s.example.prompt, "text": s.text, "kinds": s.kinds, "values": s.values} for s in lists]
    if arguments.out is not None:
        measured = {"name": task.name, "sha256": task.sha256, "n_examples": len(task.examples)}
        keep_evaluation(arguments.out, arguments.target, recipe, measured, metrics, generations, arguments.knob)
    if arguments.json:
        print_json({"task": task.name, "knobs": notes, "metrics": metrics, "generations": generations})
    else:
        column = " ".join([arguments.target, *arguments.knob])
        console.console.print(metrics_table({column: metrics}, task.name))
        if arguments.out is not None:
            console.console.print(f"{arguments.out}/evaluation.json", markup=False)
    return 0
