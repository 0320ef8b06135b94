"""`headtune train`, alone or through accelerate launch, and `headtune demo`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from .cli_parts import Add, completed, model_quiet, print_json, recipe_arguments, volume_arguments


def add_parsers(add: Add) -> None:
    p = add(
        "train",
        "run a recipe",
        "train lofit/one_to_many training.max_steps=20",
        "train my_recipe.yaml --dry-run",
        "train my_recipe.yaml --resume",
        "train lora/relations --config_file accelerate_configs/ddp.yaml",
    )
    recipe_arguments(p)
    how = p.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="continue the run in the recipe's output folder")
    how.add_argument(
        "--dry-run", action="store_true", help="check everything, show the first batch, train and write nothing"
    )
    config = p.add_argument(
        "--config_file", type=Path, help="start it through accelerate launch with this configuration"
    )
    completed(config, "file")
    volume_arguments(p)
    p.set_defaults(do=train_command)

    p = add(
        "demo", "identify, train, evaluate and export on the embedded model", "demo", "demo --quick --out runs/look"
    )
    p.add_argument("--out", type=Path, help="folder (default: the next free runs/demo, runs/demo-2, ...)")
    p.add_argument("--quick", action="store_true", help="a few steps on a few prompts, to see the machinery work")
    volume_arguments(p)
    p.set_defaults(do=demo_command)


def train_command(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        from .cli_dry_run import dry_run_command

        return dry_run_command(arguments)
    if arguments.config_file is not None:
        from . import launch

        words = [f"--{flag}" for flag in ("resume", "json", "quiet", "verbose") if getattr(arguments, flag)]
        return launch.launch(arguments.config_file, arguments.recipe, arguments.overrides, words)
    from .recipe import load

    recipe = load(arguments.recipe, arguments.overrides)
    model_quiet()
    from . import console
    from .run import run

    main_rank = int(os.environ.get("RANK", "0")) == 0
    evaluation = run(
        recipe,
        arguments.resume,
        console.progress if main_rank else (lambda items, _what: iter(items)),
        console.say if main_rank else (lambda _line: None),
    )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
    if not main_rank:
        return 0
    if arguments.json:
        print_json(evaluation)
    elif evaluation:
        print_evaluation(recipe.folder, evaluation)
    else:
        console.say(f"heads chosen: {recipe.folder / 'heads.json'}; tune them with heads='{{from: {recipe.folder}}}'")
    return 0


def print_evaluation(folder: Path, evaluation: dict[str, Any]) -> None:
    from .console import console, generations_table, metrics_table, sequence_table

    columns = {name: evaluation[name] for name in ("before", "after")}
    console.print(metrics_table(columns, f"{evaluation['task']}, {evaluation['before']['n']['examples']} prompts"))
    if (folder / "sequence.json").is_file():
        sequence = json.loads((folder / "sequence.json").read_text(encoding="utf-8"))
        console.print(sequence_table(list(evaluation["before"]["n"]["by_task"]), sequence))
    # Those that changed say more than those that did not; failures are as likely to be among them as successes.
    changed = [example for example in evaluation["examples"] if example["before"] != example["after"]]
    console.print(generations_table((changed or evaluation["examples"])[:3]))
    console.print(f"run: {folder}", markup=False)
    if (folder / "report.html").is_file():
        console.print(f"report: {folder}/report.html", markup=False)


def demo_command(arguments: argparse.Namespace) -> int:
    from .demo import demo

    result = demo(arguments.out, arguments.quick)
    if arguments.json:
        print_json(result)
    return 0
