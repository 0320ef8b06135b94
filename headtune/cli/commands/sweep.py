"""`headtune sweep`: a grid of runs of one recipe, run or resumed, then compared."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..arguments import Add, completed, plugin_arguments, positive, print_json, recipe_arguments, volume_arguments


def add_parsers(add: Add) -> None:
    p = add(
        "sweep",
        "run or resume a grid of recipes and compare them",
        "sweep lofit/relations --grid heads.top=4,8,16 --seeds 3 --out runs/top",
        "sweep lofit/relations --grid heads.top=4,8,16 --seeds 3 --print slurm",
        "sweep gain/one_to_many --controls --seeds 3 --out runs/gain",
    )
    recipe_arguments(p, "of every run")
    p.add_argument("--grid", action="append", default=[], metavar="KEY=V,V,...", help="an axis; may be given again")
    p.add_argument("--seeds", type=positive, default=1, help="seeds 0 to N-1 of every combination (default: 1)")
    p.add_argument(
        "--controls",
        action="store_true",
        help="run every control beside the recipe's identified heads: random heads, heads with scores nearest to zero, "
        "the largest, other roles' heads, LoRA and norms; say whether identification paid",
    )
    p.add_argument("--draws", type=positive, default=3, help="of random heads, with --controls (default: 3)")
    out = p.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of runs (default: runs/sweep)")
    completed(out, "folder")
    p.add_argument("--print", dest="printed", choices=("wandb", "slurm"), help="print the grid for others to run")
    volume_arguments(p)
    plugin_arguments(p)
    p.set_defaults(do=sweep_command)


def sweep_command(arguments: argparse.Namespace) -> int:
    from headtune.analysis.utils.errors import InputError
    from headtune.train.evaluation import compare
    from headtune.train.runs import controls, sweep

    from .. import console
    from ..tables import comparison_json, comparison_tables, identification_text

    if arguments.controls and arguments.printed == "wandb":
        raise InputError("--controls runs several recipes, and a W&B sweep file is of one; use --print slurm")
    asked = (arguments.recipe, arguments.grid, arguments.seeds, arguments.out, arguments.overrides)
    if arguments.controls:
        grid = controls.control_cells(*asked, arguments.draws, console.notify, in_turn=arguments.printed is None)
    else:
        grid = sweep.cells(*asked)
    if arguments.printed == "wandb":
        print(sweep.wandb_sweep(arguments.recipe, arguments.grid, arguments.seeds, arguments.overrides), end="")
        return 0
    if arguments.printed == "slurm":
        print(sweep.slurm_array(arguments.recipe, grid), end="")
        return 0
    failed = sweep.carry_out(arguments.recipe, grid, console.notify)
    if len(failed) < len(grid):
        comparison = compare.compare_runs(arguments.out, group=arguments.out.name)
        if arguments.json:
            print_json(comparison_json(comparison))
        else:
            console.console.print(*comparison_tables(comparison, console.console.width))
            if words := identification_text(comparison):
                console.console.print(words)
    return 1 if failed else 0
