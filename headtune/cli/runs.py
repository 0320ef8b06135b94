"""The commands about what was trained: evaluate, export, sweep, compare."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from .arguments import Add, completed, model_quiet, positive, print_json, recipe_arguments, volume_arguments


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

    p = add(
        "export",
        "write a stock checkpoint and prove it equal",
        "export runs/NAME exported",
        "export runs/NAME adapter --adapter",
    )
    completed(p.add_argument("run", type=Path, help="a finished run's folder"), "folder")
    completed(p.add_argument("out", type=Path, help="new folder"), "folder")
    p.add_argument("--dtype", default="float32", help="of the stored weights (default: float32)")
    p.add_argument("--prompts", type=positive, default=20, help="prompts compared (default: 20)")
    p.add_argument("--max-shard-size", default="5GB", help="of one file of weights (default: 5GB)")
    p.add_argument("--adapter", action="store_true", help="write the PEFT adapter alone, with a card, as it is")
    volume_arguments(p)
    p.set_defaults(do=export_command)

    p = add(
        "sweep",
        "run or resume a grid of recipes and compare them",
        "sweep lofit/relations --grid heads.top=4,8,16 --seeds 3 --out runs/top",
        "sweep lofit/relations --grid heads.top=4,8,16 --seeds 3 --print slurm",
    )
    recipe_arguments(p, "of every run")
    p.add_argument("--grid", action="append", default=[], metavar="KEY=V,V,...", help="an axis; may be given again")
    p.add_argument("--seeds", type=positive, default=1, help="seeds 0 to N-1 of every combination (default: 1)")
    out = p.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of runs (default: runs/sweep)")
    completed(out, "folder")
    p.add_argument("--print", dest="printed", choices=("wandb", "slurm"), help="print the grid for others to run")
    volume_arguments(p)
    p.set_defaults(do=sweep_command)

    p = add(
        "compare",
        "runs side by side: seeds grouped, intervals, differences, what was changed",
        "compare runs --group study --against lofit-random --html study.html",
        "compare runs --recipe lofit --csv lofit.csv",
    )
    completed(p.add_argument("folder", type=Path, help="holds the runs, or folders of runs"), "folder")
    p.add_argument("--group", help="only runs of this tracking.group")
    p.add_argument("--tag", action="append", default=[], help="only runs with this tag; may be given again")
    p.add_argument("--recipe", help="only runs of this recipe family, such as lofit")
    p.add_argument("--against", help="the run or group that differences are from (default: the model before training)")
    p.add_argument("--html", type=Path, help="write one self-contained page")
    p.add_argument("--csv", type=Path, help="write one line a group and metric")
    p.set_defaults(do=compare_command)


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

    from . import console

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
        console.say(f"evaluating on {len(task.examples)} prompts, {scored(task.kind, arguments.items)}")
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
        console.console.print(console.metrics_table({column: metrics}, task.name))
        if arguments.out is not None:
            console.console.print(f"{arguments.out}/evaluation.json", markup=False)
    return 0


def export_command(arguments: argparse.Namespace) -> int:
    model_quiet()
    from headtune.train.export import checkpoint

    from .console import console, progress, say

    if arguments.adapter:
        result = checkpoint.export_adapter(arguments.run, arguments.out)
        line = f"{arguments.out}: the {result['adapter']} adapter alone"
        if result["import_first"]:
            line += f"; import {result['import_first']} before loading it with PEFT"
    else:
        result = checkpoint.export_run(
            arguments.run, arguments.out, arguments.dtype, arguments.prompts, arguments.max_shard_size, progress, say
        )
        line = (
            f"{arguments.out}: {result['dtype']}, largest logit difference {result['max_logit_difference']:.2g} on a "
            f"scale of {result['logit_scale']:.3g}, {result['identical_generations']} of {result['prompts']} greedy "
            "generations identical"
        )
    if arguments.json:
        print_json(result)
    else:
        console.print(line, markup=False)
    return 0


def sweep_command(arguments: argparse.Namespace) -> int:
    from headtune.train.evaluation import compare
    from headtune.train.evaluation.run_reader import read_runs
    from headtune.train.runs import sweep

    from . import console

    grid = sweep.cells(arguments.recipe, arguments.grid, arguments.seeds, arguments.out, arguments.overrides)
    if arguments.printed == "wandb":
        print(sweep.wandb_sweep(arguments.recipe, arguments.grid, arguments.seeds, arguments.overrides), end="")
        return 0
    if arguments.printed == "slurm":
        print(sweep.slurm_array(arguments.recipe, grid), end="")
        return 0
    failed = sweep.carry_out(arguments.recipe, grid, console.say)
    if len(failed) < len(grid):
        found = compare.compare(read_runs(arguments.out, group=arguments.out.name))
        if arguments.json:
            print_json(compare.as_json(found))
        else:
            console.console.print(*compare.tables(found, console.console.width))
    return 1 if failed else 0


def compare_command(arguments: argparse.Namespace) -> int:
    from headtune.analysis.utils.files import write_text
    from headtune.train.evaluation import compare, compare_report
    from headtune.train.evaluation.run_reader import read_runs

    from .console import console

    written = [path for path in (arguments.html, arguments.csv) if path is not None]
    runs = read_runs(arguments.folder, arguments.group, arguments.tag, arguments.recipe)
    found = compare.compare(runs, arguments.against)
    if arguments.html:
        compare_report.write(found, arguments.html)
    if arguments.csv:
        write_text(arguments.csv, compare.as_csv(found))
    if arguments.json:
        print_json(compare.as_json(found))
    else:
        console.print(*compare.tables(found, console.width))
        for path in written:
            console.print(str(path), markup=False)
    return 0
