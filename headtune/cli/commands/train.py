"""`headtune train`: a recipe, in this process or through accelerate launch, or looked at with --dry-run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headtune.analysis.utils.processes import is_main
from headtune.analysis.utils.verbosity import silence_model_libraries

from ..arguments import Add, completed, plugin_arguments, print_json, recipe_arguments, volume_arguments
from ..exits import leave_process_group
from .plan import gib

if TYPE_CHECKING:
    from headtune.train.config.schema import Recipe
    from headtune.train.runs.batch_preview import PreviewRow
    from headtune.train.runs.dry_run import DryRun

SHOWN = 4  # rows of the first batch


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
    plugin_arguments(p)
    p.set_defaults(do=train_command)


def train_command(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        return dry_run_command(arguments)
    if arguments.config_file is not None:
        from .. import accelerate_launch

        words = [f"--{flag}" for flag in ("resume", "json", "quiet", "verbose") if getattr(arguments, flag)]
        return accelerate_launch.launch(arguments.config_file, arguments.recipe, arguments.overrides, words)
    from headtune.train.config.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    silence_model_libraries()
    from headtune.train.runs.run import run_recipe

    from .. import console, tables

    main_rank = is_main()
    evaluation = run_recipe(
        recipe,
        arguments.resume,
        console.progress if main_rank else (lambda items, _what: iter(items)),
        console.notify if main_rank else (lambda _line: None),
    )
    leave_process_group()
    if not main_rank:
        return 0
    if arguments.json:
        print_json(evaluation)
    elif evaluation:
        tables.print_evaluation(recipe.folder, evaluation)
    else:
        console.notify(
            f"heads chosen: {recipe.folder / 'heads.json'}; tune them with heads='{{from: {recipe.folder}}}'"
        )
    return 0


def dry_run_command(arguments: argparse.Namespace) -> int:
    from headtune.analysis.utils.errors import InputError
    from headtune.train.config.recipe import load_recipe

    if arguments.config_file is not None:
        raise InputError("--dry-run is for one process; leave out --config_file (headtune plan estimates several)")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    silence_model_libraries()
    from headtune.train.runs.dry_run import dry_run

    from .. import console

    console.notify(f"dry run of {recipe.name} on {recipe.model.name}: nothing is trained, nothing is written")
    result = dry_run(recipe)
    if arguments.json:
        print_json(result.as_json(recipe))
    else:
        _print_dry_run(result, recipe)
    return 0


def _print_dry_run(result: DryRun, recipe: Recipe) -> None:
    from rich.table import Table
    from rich.text import Text

    from ..console import console

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def line(name: str, value: str) -> None:
        table.add_row(name, Text(value))

    # What is trained, on what, in how many steps and how much memory.
    line("run", f"{recipe.folder} ({recipe.recipe})")
    line("model", f"{recipe.model.name}, {result.model_parameters:,} parameters")
    if result.heads is not None:
        line("heads", result.heads)
    total = sum(result.parameters.values())
    line("trained", f"{total:,} parameters, {100 * total / result.model_parameters:.4g}% of the model")
    for kind, count in result.parameters.items():
        line("", f"{count:,}  {kind}")
    line("examples", f"{result.examples[0]} to train on, {result.examples[1]} held out")
    if result.tasks:
        line("", result.tasks)
    if result.steps:
        line("steps", f"{result.steps} of {result.batch} rows; the longest row has {result.longest} tokens")
    for stage in result.stages:
        parts = ", ".join(f"{name} {gib(size)}" for name, size in stage.memory.parts.items() if size)
        line(
            "memory" if stage is result.stages[0] else "", f"{stage.name}: about {gib(stage.memory.peak)} GiB ({parts})"
        )
    if result.stages:
        peak = max(stage.memory.peak for stage in result.stages)
        verdict = "enough" if peak <= result.free else "not enough: see headtune plan for what to change"
        line("", f"free now: {gib(result.free)} GiB of {result.device} memory, {verdict}")
    for index, note in enumerate(result.notes):
        line("" if index else "note", note)
    console.print(table)
    if result.prompt is not None:
        console.print("\nfirst prompt, in the chat template", markup=False)
        console.print(result.prompt, markup=False, highlight=False, soft_wrap=True)
    if result.rows:
        _print_batch(result.rows)


def _print_batch(batch: Sequence[PreviewRow]) -> None:
    from rich.text import Text

    from ..console import console
    from ..tables import batch_row

    colour = console.is_terminal and not console.no_color
    how = "in colour" if colour else "in [[brackets]]"
    console.print(f"\nfirst batch, {min(SHOWN, len(batch))} of {len(batch)} rows; {how}: what is learnt on",
                  markup=False)  # fmt: skip
    sides = [row for row in batch if row.side == "rejected"]
    rows = [row for row in batch if row.side != "rejected"]
    for index, row in enumerate(rows[:SHOWN]):
        for each in [row, *sides[index : index + 1]]:
            text = Text.assemble((f"{index + 1} ", "dim"), batch_row(each, colour))
            console.print(text, soft_wrap=True)
