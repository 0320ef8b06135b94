"""`headtune identify`: find and verify heads of a model on a task, alone or in several processes.

headtune identify MODEL --task TASK --out DIR
accelerate launch --config_file accelerate_configs/ddp.yaml -m headtune.analysis identify MODEL --task TASK ...
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headtune.analysis.utils.processes import is_main, world_size
from headtune.analysis.utils.verbosity import silence_model_libraries

from ..arguments import (
    Add,
    load_model_for,
    load_task_for,
    model_and_task_arguments,
    plugin_arguments,
    positive,
    volume_arguments,
)
from ..exits import leave_process_group

if TYPE_CHECKING:
    from headtune.analysis.heads.head_set import HeadSet
    from headtune.analysis.identify.pipeline import IdentifyResult


def add_parsers(add: Add) -> None:
    p = add(
        "identify",
        "find and verify heads",
        "identify smollm2-135m --task country_cities --out runs/heads",
        "identify smollm2-135m --task my_task.jsonl:train --max-examples 64 --top elbow --out runs/mine",
        "identify smollm2-135m --task conflict.jsonl:train --role memory --role context --out runs/conflict",
    )
    model_and_task_arguments(p, "new folder for heads.json, scores.safetensors, report.html")
    p.add_argument(
        "--method",
        default="all",
        help="all (dla and ablation) or names with commas, NAME@METRIC for a causal one by logit_difference, "
        "probability or kl; see --list-methods",
    )
    p.add_argument("--list-methods", action=_ListMethods, nargs=0, help="print the methods and exit")
    p.add_argument("--top", type=_top, default=8, help="heads kept per role, or 'elbow' (default: 8)")
    p.add_argument(
        "--rank-by",
        default="contrast",
        choices=("contrast", "centred", "raw"),
        help="scores less the other subjects' answers (default), less the vocabulary's mean, or as they are: raw "
        "logits rank heads high that lift all tokens alike, which changes no probability",
    )
    p.add_argument(
        "--role",
        action="append",
        default=[],
        metavar="NAME[=QUANTITY:+|-]",
        help="heads to rank, once or more: recall, suppression (the default two), memory, context, retrieval, or a "
        "role by its quantity and sign, such as memory=target-previous:+",
    )
    p.add_argument("--threshold", type=float, help="keep only heads whose ranking score is at least this far from zero")
    p.add_argument("--verify-top", type=positive, default=4, help="heads silenced together (default: 4)")
    p.add_argument(
        "--control", action="append", default=[], metavar="NAME=HEADS", help="silence another task's heads too"
    )
    p.add_argument("--project", default="headtune", help="W&B project")
    p.add_argument("--group", help="W&B group")
    p.add_argument("--wandb", choices=("online", "offline", "disabled"), help="default: online where a key is present")
    volume_arguments(p)
    plugin_arguments(p)
    p.set_defaults(do=identify_command)


def _top(text: str) -> int | str:
    try:
        return text if text == "elbow" else positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or 'elbow'") from None


class _ListMethods(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from headtune.analysis.methods.registry import METHODS

        width = max(map(len, METHODS))
        print("\n".join(f"{method.name:{width}}  {method.summary}" for method in METHODS.values()))
        parser.exit()


def identify_command(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from headtune.analysis.utils.files import require_new_folder

    from .. import console

    # What can be refused without a model.
    require_new_folder(arguments.out, "choose another --out")
    controls = _controls(arguments.control)
    task = load_task_for(arguments)
    silence_model_libraries()
    from headtune.analysis.heads.roles import roles_of
    from headtune.analysis.identify.pipeline import identify, partial_folder
    from headtune.analysis.methods.registry import parse_method_names
    from headtune.analysis.utils.errors import InputError
    from headtune.analysis.utils.progress import silent
    from headtune.train.tracking.identify_run import track_identify

    parse_method_names(arguments.method)  # before the model is loaded
    roles_of(arguments.role)
    if arguments.device_map and world_size() > 1:
        raise InputError(
            f"--device-map {arguments.device_map} spreads one model over all devices; with several processes leave it "
            "out, or start one process"
        )

    # Identify and write; an interrupted run leaves what it has scored beside `out`.
    try:
        result = identify(
            load_model_for(arguments),
            task,
            method=arguments.method,
            top=arguments.top,
            threshold=arguments.threshold,
            verify_top=arguments.verify_top,
            controls=controls,
            seed=arguments.seed,
            progress=console.progress if is_main() else silent,
            partial=partial_folder(arguments.out),
            share=True,
            rank_by=arguments.rank_by,
            roles=arguments.role or None,
        )
        result.save(arguments.out)
        if is_main():
            track_identify(result, arguments.out, arguments.project, arguments.group, arguments.wandb)
    except KeyboardInterrupt:
        if not is_main() or not partial_folder(arguments.out).exists():
            raise
        return console.print_error("interrupted; run the same command again to go on", 130)

    # The result, from the first process alone.
    leave_process_group()
    if not is_main():
        return 0
    if arguments.json:
        print(json.dumps(asdict(result.heads), ensure_ascii=False, indent=1))
    else:
        print_heads(result)
        console.console.print(f"\n{arguments.out}/heads.json, scores.safetensors, report.html", markup=False)
    return 0


def _controls(texts: Sequence[str]) -> dict[str, HeadSet]:
    from headtune.analysis.heads.head_set import HeadSet
    from headtune.analysis.utils.errors import InputError

    controls = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not re.fullmatch(r"\w+", name):
            raise InputError(f"--control {text!r} must look like capitals=runs/capitals/heads.json")
        if name in controls:
            raise InputError(f"--control {text!r} names {name!r} a second time; give each control its own name")
        controls[name] = HeadSet.load(path)
    return controls


def print_heads(result: IdentifyResult) -> None:
    """The dissociation table, what it says, and the ranked heads."""
    from rich.table import Table

    from headtune.analysis.methods.registry import METHODS
    from headtune.analysis.reports.dissociation import next_step, verdicts
    from headtune.analysis.tasks.answer_starts import beginnings
    from headtune.analysis.tasks.tokenized import reasons

    from ..console import console, print_titled
    from ..tables import dissociation_table

    heads = result.heads
    task = heads.task
    console.print(
        f"{task['n_examples']} prompts of {task['name']}, {task['n_dropped']} left out"
        + (f": {reasons(task['dropped'])}" if task["dropped"] else ""),
        markup=False,
    )
    if note := beginnings(task):
        console.print(note, markup=False)
    # One table for each role: the ranking score, and the effects that confirm it.
    for role, ranked in heads.roles.items():
        rule = heads.method["parameters"]["rules"][role]
        stable = heads.stability[role]
        how = "no stability: one fit for the whole task" if stable is None else f"bootstrap Jaccard {stable:.2f}"
        table = Table()
        method = rule["confirm"][0].split(".")[0]
        confirms = [f"{method}.{quantity}{form}" for quantity in ("target", "previous") for form in ("", "_logp")]
        confirms += ["q"]
        # Without ablation the ranking confirms itself; single facts have no previous answers.
        confirms = [name for name in confirms if name != rule["rank"] and any(name in head.effect for head in ranked)]
        for name in ("head", f"{rule['rank']} [95%]", *confirms):
            table.add_column(name)
        for entry in ranked:
            score = f"{entry.score:.3f}" + (f" [{entry.ci[0]:.3f}, {entry.ci[1]:.3f}]" if entry.ci else "")
            effects = {name: entry.effect[name] for name in confirms if name in entry.effect}
            shown = {name: f"{effect:.3g}" if name == "q" else f"{effect:+.3g}" for name, effect in effects.items()}
            table.add_row(entry.name, score, *(shown.get(name, "") for name in confirms))
        print_titled(f"{role} heads ({how})", table)
    for method, count in heads.method["parameters"]["examples_scored"].items():
        if count < task["n_examples"]:
            console.print(
                f"{method}: {count} of {task['n_examples']} prompts; the others {METHODS[method].left_out}",
                markup=False,
            )
    # What silencing them does, and what that says.
    console.print(dissociation_table(heads))
    for _, sentence in verdicts(heads):
        console.print(sentence, markup=False)
    if advice := next_step(heads):
        console.print(advice, markup=False)
