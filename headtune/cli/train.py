"""`headtune train`, alone or through accelerate launch, and `headtune demo`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .arguments import Add, completed, model_quiet, print_json, recipe_arguments, volume_arguments


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
        from .dry_run import dry_run_command

        return dry_run_command(arguments)
    if arguments.config_file is not None:
        from . import accelerate_launch

        words = [f"--{flag}" for flag in ("resume", "json", "quiet", "verbose") if getattr(arguments, flag)]
        return accelerate_launch.launch(arguments.config_file, arguments.recipe, arguments.overrides, words)
    from headtune.train.config.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    model_quiet()
    from headtune.train.runs.run import run_recipe

    from . import console

    main_rank = int(os.environ.get("RANK", "0")) == 0
    evaluation = run_recipe(
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
        console.print_evaluation(recipe.folder, evaluation)
    else:
        console.say(f"heads chosen: {recipe.folder / 'heads.json'}; tune them with heads='{{from: {recipe.folder}}}'")
    return 0


def demo_command(arguments: argparse.Namespace) -> int:
    from .demo import demo

    result = demo(arguments.out, arguments.quick)
    if arguments.json:
        print_json(result)
    return 0
