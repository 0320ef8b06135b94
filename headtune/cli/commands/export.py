"""`headtune export`: a run, or another trainer's adapter, as a stock checkpoint or an adapter; `push`: to the hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from headtune.analysis.utils.verbosity import silence_model_libraries

from ..arguments import Add, completed, plugin_arguments, positive, print_json, volume_arguments


def add_parsers(add: Add) -> None:
    p = add(
        "export",
        "write a stock checkpoint and prove it equal",
        "export runs/NAME exported",
        "export runs/NAME adapter --adapter",
        "export my-trainer/checkpoint-50 exported --base MODEL",
    )
    completed(p.add_argument("run", type=Path, help="a finished run, or a folder with a head adapter"), "folder")
    completed(p.add_argument("out", type=Path, help="new folder"), "folder")
    p.add_argument("--dtype", default="float32", help="of the stored weights (default: float32)")
    completed(p.add_argument("--base", help="the model below an adapter (default: the one that it names)"), "model")
    task = p.add_argument("--task", help="of an adapter, whose prompts are compared (default: one_to_many:test)")
    completed(task, "task")
    p.add_argument("--prompts", type=positive, default=20, help="prompts compared (default: 20)")
    p.add_argument("--max-shard-size", default="5GB", help="of one file of weights (default: 5GB)")
    p.add_argument(
        "--adapter",
        action="store_true",
        help="write the PEFT adapter alone, with a card; that of masked with rank as a stock LoRA, proven equal",
    )
    volume_arguments(p)
    plugin_arguments(p)
    p.set_defaults(do=export_command)
    p = add(
        "push",
        "send an export or an adapter to the Hugging Face hub",
        "push exported OWNER/NAME",
        "push exported OWNER/NAME --yes",
        "push adapter OWNER/NAME --public --yes",
    )
    completed(p.add_argument("folder", type=Path, help="what headtune export wrote"), "folder")
    p.add_argument("repo", help="OWNER/NAME on the hub; made if it is not there, private")
    p.add_argument("--public", action="store_true", help="make it public (default: private)")
    p.add_argument("--yes", action="store_true", help="send; without it nothing leaves this machine")
    p.set_defaults(do=push_command)


def export_command(arguments: argparse.Namespace) -> int:
    silence_model_libraries()
    from headtune.analysis.utils.errors import InputError
    from headtune.train.export import adapter, adapter_folder, checkpoint

    from ..console import console, notify, progress

    is_run = (arguments.run / "recipe.yaml").is_file()
    for option in ("base", "task"):
        if is_run and getattr(arguments, option) is not None:
            raise InputError(f"--{option} is for an adapter without a recipe, and {str(arguments.run)!r} is a run")
    if not is_run:
        result = adapter_folder.export_adapter_folder(
            arguments.run,
            arguments.out,
            arguments.base,
            arguments.task or adapter_folder.TASK,
            arguments.dtype,
            arguments.prompts,
            arguments.max_shard_size,
            arguments.adapter,
            progress,
            notify,
        )
    elif arguments.adapter:
        result = adapter.export_adapter(arguments.run, arguments.out, arguments.prompts, progress, notify)
    else:
        result = checkpoint.export_run(
            arguments.run, arguments.out, arguments.dtype, arguments.prompts, arguments.max_shard_size, progress, notify
        )
    if "adapter" in result:
        line = f"{arguments.out}: the {result['adapter']} adapter alone"
        if "rank" in result:
            line += (
                f", rank {result['rank']}, largest logit difference {result['max_logit_difference']:.2g} on a scale of "
                f"{result['logit_scale']:.3g}, {result['identical_generations']} of {result['prompts']} greedy "
                "generations identical"
            )
        if result["import_first"]:
            line += f"; import {result['import_first']} before loading it with PEFT"
    else:
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


def push_command(arguments: argparse.Namespace) -> int:
    from headtune.train.export.push import push, push_plan

    from ..console import console, plain_table

    plan = push_plan(arguments.folder, arguments.repo, arguments.public)
    if not arguments.json:
        kind = "public" if plan.public else "private"
        console.print(f"{plan.what} {plan.folder} to {plan.endpoint}/{plan.repo}, {kind}:", markup=False)
        console.print(plain_table("", ["file", "bytes"], [[name, f"{size:,}"] for name, size in plan.files]))
        console.print(
            f"{len(plan.files)} files, {plan.size / 1e6:,.1f} MB; README.md and export.json hold paths of the recipe",
            markup=False,
        )
        if plan.left_out:
            console.print(f"not sent, no part of the export: {', '.join(plan.left_out)}", markup=False)
    result = push(plan) if arguments.yes else None
    if arguments.json:
        data = {"repo": plan.repo, "endpoint": plan.endpoint, "public": plan.public, "files": dict(plan.files)}
        print_json(data | {"left_out": list(plan.left_out), "sent": result})
    elif result is None:
        console.print("nothing was sent; the same command with --yes sends it", markup=False)
    else:
        console.print(f"sent: {result['url']}, commit {result['commit']}", markup=False)
    return 0
