"""`headtune plan`: memory of each GPU and time of a recipe, before it runs.

headtune plan full/relations --model llama-3.1-8b --gpus 8 --engine zero3
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..arguments import Add, positive, recipe_arguments

if TYPE_CHECKING:
    from headtune.train.runs.memory_of_recipe import Stage

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
    p.set_defaults(do=plan_command)


def plan_command(arguments: argparse.Namespace) -> int:
    from headtune.analysis.utils.errors import InputError
    from headtune.train.config import recipe
    from headtune.train.memory import estimate as memory
    from headtune.train.memory.model_shape import shape_of
    from headtune.train.runs import memory_of_recipe

    from ..console import console

    if arguments.tflops is not None and not arguments.tflops > 0:
        raise InputError(f"--tflops {arguments.tflops} must be above 0, such as 989 for an H100 in bfloat16")
    loaded = recipe.load_recipe(arguments.recipe, arguments.overrides)
    engine = arguments.engine or ("single" if arguments.gpus == 1 else "ddp")
    length, gib_each = arguments.length or LENGTH, arguments.gpu_memory or GPU_MEMORY
    setup = memory_of_recipe.setup_of(loaded, engine, arguments.gpus, length, arguments.labels)
    shape = shape_of(arguments.model or loaded.model.name, loaded.model.revision)
    stages = memory_of_recipe.stages(loaded, shape, setup, arguments.prompts)
    limit = gib_each * memory.GIB
    fits = all(stage.memory.peak <= limit for stage in stages)
    nearest = None if fits else memory_of_recipe.cheapest(loaded, shape, setup, limit)
    change = None if nearest is None else memory_of_recipe.change(setup, nearest)
    rate = None if arguments.tflops is None else 1e12 * arguments.tflops
    if arguments.json:
        content = {
            "model": shape.name,
            "parameters": shape.parameters,
            "engine": engine,
            "gpus": arguments.gpus,
            "gpu_memory": limit,
            "fits": fits,
            "change": change,
            "stages": [_plain(stage, rate) for stage in stages],
        }
        print(json.dumps(content, indent=1))
        return 0
    _print(stages, rate, f"{shape.name}, {shape.parameters / 1e9:.3g}B, {engine} x {arguments.gpus}", limit, change)
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


def _plain(stage: Stage, rate: float | None) -> dict[str, Any]:
    return {
        "name": stage.name,
        "parts": dict(stage.memory.parts),
        "peak": stage.memory.peak,
        "host": stage.memory.host,
        "disk": stage.memory.disk,
        "unit": stage.unit,
        "units": stage.units,
        "seconds": list(stage.seconds(rate)),
    }


def _print(stages: list[Stage], rate: float | None, title: str, limit: int, change: str | None) -> None:
    from rich.table import Table

    from ..console import console, print_titled

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
    print_titled(f"{title}: GiB of each GPU", table)
    console.print(
        "An estimate. Activations and gradients are not there in full at the same time, so the peak is below the sum; "
        "evaluation, checkpoints and loading are not counted."
    )
    worst = max(stage.memory.peak for stage in stages)
    if worst <= limit:
        console.print(f"fits: {gib(worst)} of {gib(limit)} GiB", markup=False)
    else:
        fix = f"it would with {change}" if change else "nothing that was tried makes it fit; choose a smaller model"
        console.print(f"does not fit: {gib(worst)} of {gib(limit)} GiB; {fix}", markup=False)


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
