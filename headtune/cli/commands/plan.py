"""`headtune plan`: memory of each GPU and time of a recipe, before it runs.

headtune plan full/relations --model llama-3.1-8b --gpus 8 --engine zero3
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..arguments import Add, plugin_arguments, positive, print_json, recipe_arguments

if TYPE_CHECKING:
    from headtune.train.runs.memory_of_recipe import Stage
    from headtune.train.runs.plan import MemoryPlan

ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
LENGTH, GPU_MEMORY = 1024, 80  # where none is given


def add_parsers(add: Add) -> None:
    p = add(
        "plan",
        "estimate memory per GPU and time of a recipe",
        "plan lofit/one_to_many --length 64",
        "plan full/relations --model llama-3.1-8b --gpus 8 --engine zero3",
    )
    recipe_arguments(p)
    p.add_argument("--gpus", type=positive, default=1, help="processes, one GPU each (default: 1)")
    p.add_argument("--gpu-memory", type=positive, help="GiB of each (default: 80)")
    p.add_argument("--engine", choices=ENGINES, help="default: single, or ddp on several GPUs")
    p.add_argument("--length", type=positive, help="tokens of the longest row (default: 1024)")
    p.add_argument("--labels", type=positive, default=16, help="of those, tokens that carry loss (default: 16)")
    p.add_argument("--prompts", type=positive, help="of the training data (default: task.max_train_examples)")
    p.add_argument("--model", help="another model's sizes: folder, hub id, or llama-3.2-1b, llama-3.1-8b, -70b, -405b")
    p.add_argument("--tflops", type=float, help="peak rate of a GPU (default: H100, by precision)")
    plugin_arguments(p)
    p.set_defaults(do=plan_command)


def plan_command(arguments: argparse.Namespace) -> int:
    from headtune.analysis.utils.errors import InputError
    from headtune.train.config.recipe import load_recipe
    from headtune.train.memory.estimate import GIB
    from headtune.train.runs.plan import plan_recipe

    from ..console import console

    if arguments.tflops is not None and not arguments.tflops > 0:
        raise InputError(f"--tflops {arguments.tflops} must be above 0, such as 989 for an H100 in bfloat16")
    plan = plan_recipe(
        load_recipe(arguments.recipe, arguments.overrides),
        arguments.gpus,
        arguments.engine,
        arguments.length or LENGTH,
        (arguments.gpu_memory or GPU_MEMORY) * GIB,
        arguments.labels,
        arguments.prompts,
        arguments.model,
    )
    rate = None if arguments.tflops is None else 1e12 * arguments.tflops
    if arguments.json:
        print_json(plan.as_json(rate))
        return 0
    _print(plan, rate)
    if assumed := _assumed(arguments):
        console.print(assumed, markup=False)
    return 0


def _assumed(arguments: argparse.Namespace) -> str:
    """What was not given, and the option that gives it; empty where everything was."""
    parts = [] if arguments.length else [f"rows of {LENGTH} tokens (--length)"]
    parts += [] if arguments.gpu_memory else [f"GPUs of {GPU_MEMORY} GiB (--gpu-memory)"]
    parts += [] if arguments.tflops else ["the speed of an H100 (--tflops)"]
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
    return f"assuming {listed}" if listed else ""


def _print(plan: MemoryPlan, rate: float | None) -> None:
    from rich.table import Table

    from ..console import console, print_titled

    stages = plan.stages
    table = Table()
    table.add_column("")
    for stage in stages:
        table.add_column(stage.name, justify="right")
    names = list(dict.fromkeys(name for stage in stages for name in stage.memory.parts))
    for name in names:
        table.add_row(name, *(gib(stage.memory.parts.get(name, 0)) for stage in stages))
    table.add_section()
    table.add_row("peak", *(gib(stage.memory.peak) for stage in stages))
    for name in ("host", "disk"):
        sizes = [getattr(stage.memory, name) for stage in stages]
        if any(sizes):
            table.add_row({"host": "main memory", "disk": "on disk"}[name], *(gib(size) for size in sizes))
    table.add_row("time", *(_time(stage, rate) for stage in stages))
    size = f"{plan.parameters / 1e9:.3g}B"
    print_titled(f"{plan.model}, {size}, {plan.engine} x {plan.gpus}: GiB of each GPU", table)
    console.print(
        "An estimate. Activations and gradients are not there in full at the same time, so the peak is below the sum; "
        "evaluation, checkpoints and loading are not counted."
    )
    needed = f"{gib(plan.peak)} of {gib(plan.gpu_memory)} GiB"
    if plan.fits:
        console.print(f"fits: {needed}", markup=False)
    else:
        fix = "nothing that was tried makes it fit; choose a smaller model"
        fix = f"it would with {plan.change}" if plan.change else fix
        console.print(f"does not fit: {needed}; {fix}", markup=False)


def gib(size: float) -> str:
    """Three digits; nothing for nothing."""
    value = size / 2**30
    if not size:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else "< 0.01"


def span(seconds: tuple[float, float]) -> str:
    """A range of time in the unit that suits its end."""
    fast, slow = seconds
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if slow >= 2 * size or unit == "ms":
            return "-".join(f"{float(f'{end / size:.2g}'):g}" for end in (fast, slow)) + f" {unit}"
    return ""


def _time(stage: Stage, rate: float | None) -> str:
    each = "" if stage.units is not None else f" a {stage.unit}"
    return span(stage.seconds(rate)) + each if stage.operations else "–"
