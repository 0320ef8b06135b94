"""`headtune evaluate`: a run, a model or an export, measured on a task."""

from __future__ import annotations

import argparse
from pathlib import Path

from headtune.analysis.utils.verbosity import silence_model_libraries

from ..arguments import (
    Add,
    chat_arguments,
    chat_of,
    completed,
    plugin_arguments,
    positive,
    print_json,
    trust_argument,
    volume_arguments,
)


def add_parsers(add: Add) -> None:
    p = add(
        "evaluate",
        "measure a run or a model",
        "evaluate runs/NAME --task one_to_many:test",
        "evaluate runs/NAME --task country_cities --out runs/NAME-cities",
        "evaluate smollm2-135m --task country_cities --max-examples 50 --json",
        "evaluate runs/NAME --lm-eval arc_easy,hellaswag --max-examples 100 --out runs/NAME-harness",
        "evaluate smollm2-135m --task country_cities --intervene sink:tau=0.5,gamma=0.5",
        "evaluate smollm2-135m --task country_cities --intervene silence:from=runs/heads,role=recall,top=4",
    )
    completed(p.add_argument("target", help="run folder, model folder, built-in name or hub id"), "model")
    task = p.add_argument(
        "--task", help="built-in name, JSONL file, hub id, or FORMAT:PATH such as truthfulqa:test.csv"
    )
    completed(task, "task")
    p.add_argument(
        "--lm-eval",
        metavar="TASKS",
        help="in place of --task: tasks of lm-evaluation-harness (pip install lm_eval), by name, YAML file or folder "
        "of them, with commas between; --max-examples limits each",
    )
    p.add_argument("--kind", choices=("lists", "exact_match", "multiple_choice"), help="how answers are scored")
    p.add_argument("--preamble", choices=("truthfulqa",), help="text before multiple-choice questions")
    p.add_argument(
        "--scoring",
        choices=("harness", "iti"),
        help="of multiple choice: as lm-evaluation-harness (default), or as ITI and LoFiT, with their instruction",
    )
    p.add_argument("--items", type=positive, help="list items scored per prompt (default: 3)")
    p.add_argument("--batch-size", type=positive, default=16)
    p.add_argument("--max-examples", type=positive)
    trust_argument(p)
    chat_arguments(p, "default: as the run's or the export's prompts were given, and as they are for a model")
    p.add_argument(
        "--intervene",
        "--knob",
        dest="knob",
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,...",
        help="switch on, once or more: sink:tau=0.5,gamma=0.5 (scale last-layer heads that look at the first "
        "position), intercept:beta=0.5[,fit=TASK] (take away the last MLP's intercept), "
        "silence:from=RUN_OR_HEADSET,role=R,top=K[,how=zero|mean|uniform|streaming][,random=SEED] (silence heads, or "
        "random ones of the same layers)",
    )
    out = p.add_argument("--out", type=Path, help="new folder to keep the result in, filed in W&B as the run is")
    completed(out, "folder")
    volume_arguments(p)
    plugin_arguments(p)
    p.set_defaults(do=evaluate_command)


def evaluate_command(arguments: argparse.Namespace) -> int:
    from headtune.analysis.utils.errors import InputError
    from headtune.analysis.utils.files import require_new_folder
    from headtune.train.runs.evaluate_target import evaluate_target, target_of

    if arguments.lm_eval is not None:
        for option in ("kind", "preamble", "scoring", "items"):
            if getattr(arguments, option) is not None:
                raise InputError(
                    f"--{option} is for --task; a task of --lm-eval says itself how it is asked and scored"
                )
    target = target_of(
        arguments.target,
        arguments.task,
        arguments.kind,
        arguments.max_examples,
        arguments.knob,
        arguments.trust_remote_code,
        chat_of(arguments),
        arguments.lm_eval,
    )
    if arguments.out is not None:
        require_new_folder(arguments.out, "choose another --out")
    silence_model_libraries()
    from headtune.analysis.tasks.messages import chat_entry
    from headtune.train.evaluation.multiple_choice import truthfulqa_preamble

    from ..console import console, notify, progress
    from ..tables import metrics_table

    preamble = truthfulqa_preamble() if arguments.preamble else ""
    result = evaluate_target(
        target,
        arguments.items or 3,
        arguments.batch_size,
        preamble,
        arguments.out,
        progress,
        notify,
        arguments.scoring or "harness",
    )
    if arguments.json:
        data = {"knobs": result.knobs, "metrics": result.metrics, "generations": result.generations}
        chats = {} if result.task is None else chat_entry(result.task.chat_template)
        print_json({"task": result.name, **chats, **data})
        return 0
    column = " ".join([arguments.target, *arguments.knob])
    console.print(metrics_table({column: result.metrics}, result.name))
    if arguments.out is not None:
        console.print(f"{arguments.out}/evaluation.json", markup=False)
    return 0
